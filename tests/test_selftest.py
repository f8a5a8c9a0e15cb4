"""A bundle is tested in an environment with what a device has: the base dependencies and ONNX Runtime."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import write_images
from test_bundle import changed, told

from edgeres import build, bundle, devices, pipeline, selftest
from edgeres.bundle import Bundle
from edgeres.cli import cli
from edgeres.devices import Gpu, Jetson
from edgeres.errors import BuildError, EdgeresError, InputError, MissingDependency, StaleError, UsageError
from edgeres.files import read_json, sha256_file
from edgeres.job import Job
from edgeres.outcomes import Outcomes, beside
from edgeres.recipe import Budget, load_recipe
from edgeres.result import load
from edgeres.sealed import Sealed
from edgeres.targets import load_target

DEVICE = Path(__file__).parents[1] / ".venv-device" / "bin" / "python"
device = pytest.mark.skipif(not DEVICE.is_file(), reason="needs .venv-device, which `make test` sets up")
IMAGES, PER_BATCH = 72, 32


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, train_folder: Path) -> Job:
    """An INT8 job for the CPU, on three batches of images, with a budget of 5 points."""
    root = tmp_path_factory.mktemp("workspace")
    write_images(root / "val", IMAGES // 4, seed=5)
    flags = {
        "calibration": {"images": str(train_folder)},
        "validation": {"images": str(root / "val")},
        "budget": {"max_drop": 5.0},
    }
    return Job(load_recipe(root, flags=flags), root, model=tiny_path)


@pytest.fixture(scope="module")
def made(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle."""
    return Path(bundle.make(job, output=tmp_path_factory.mktemp("bundle") / "a.bundle")["bundle"])


def on_device(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [DEVICE, "-m", "edgeres", "selftest", *arguments, "--seconds", "0.01"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# on the device


@device
def test_the_device_has_nothing_but_the_executor() -> None:
    for package in ("torch", "onnx", "PIL"):
        done = subprocess.run([DEVICE, "-c", f"import {package}"], capture_output=True, text=True, check=False)
        assert "ModuleNotFoundError" in done.stderr


@device
def test_the_device_finds_the_digits_of_validate(made: Path, job: Job, tmp_path: Path) -> None:
    (expected,) = pipeline.validate_engines(job, [pipeline.ensure_engine(job)])
    before = Outcomes.load(beside(job.folder / "result.json"), expected["provenance"]["digests"]["outcomes"])

    done = on_device(made, "--json", "-o", tmp_path / "out" / "result.json")
    assert done.returncode in (0, 1), done.stderr
    result = json.loads(done.stdout)
    (kept,) = load(tmp_path / "out" / "result.json")
    assert kept == result
    rows = Outcomes.load(tmp_path / "out" / "outcomes.npz", result["provenance"]["digests"]["outcomes"])
    for name, column in vars(before).items():
        assert np.array_equal(column, getattr(rows, name)), name
    own = {"baseline", "engine", "latency", "notes", "provenance"}
    strict = {key: value for key, value in json.loads(json.dumps(expected)).items() if key not in own}
    assert {key: value for key, value in result.items() if key not in own} == strict
    for side in ("baseline", "engine"):
        for key in ("top1", "top5", "top1_interval", "top5_interval", "name", "precision"):
            assert result[side][key] == json.loads(json.dumps(expected[side][key])), (side, key)
    digests = ("model", "images", "weights")
    theirs = expected["provenance"]["digests"]
    assert {d: result["provenance"]["digests"][d] for d in digests} == {d: theirs[d] for d in digests}
    assert done.returncode == (0 if expected["verdict"] == "PASS" else 1)


@device
def test_later_batches_take_no_more_memory_than_the_first(tmp_path: Path, tiny_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import numpy as np; from edgeres.runners import open_runner\n"
        "peak = lambda: int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])\n"
        "pixels = np.zeros((4096, 3, 32, 32), np.float32)\n"
        "with open_runner(Path(sys.argv[1]), 'onnxruntime') as runner:\n"
        "    peaks = [peak(), *((runner.infer(pixels), peak())[1] for _ in range(3))]\n"
        "print(*peaks)"
    )
    done = subprocess.run([DEVICE, "-c", code, tiny_path], capture_output=True, text=True, check=True)
    loaded, first, *_, last = map(int, done.stdout.split())
    assert last - first < (first - loaded) / 2


@device
def test_the_report_says_what_the_device_cannot_know(made: Path, tmp_path: Path) -> None:
    done = on_device(made)
    assert "INT8 note: FP32 does not run here: its answers came in the bundle, so it has no latency" in done.stdout
    assert "was not looked at" not in done.stdout  # into a graph for the CPU: nothing is lost by it
    work = tmp_path / "cache" / "bundles" / Sealed.open(made).digest[:16]
    (result,) = load(work / "result.json")
    assert result["baseline"]["latency_ms"] is None
    assert result["engine"]["latency_ms"]["p50"] > 0
    assert list(result["latency"]["runners"]) == ["INT8"]
    assert "before" in result["latency"]["conditions"]
    assert result["provenance"]["machine"]["cores"]
    sealed = Sealed.open(made)
    about = result["provenance"]["bundle"]
    assert (about["digest"], about["signer"]) == (sealed.digest, None)
    assert about["reference"]["onnxruntime"] == json.loads(sealed.read("manifest.json"))["reference"]["onnxruntime"]


@device
def test_the_engine_is_used_again_and_the_answers_are_not(made: Path, tmp_path: Path) -> None:
    first = on_device(made, "--work", "here")
    engine = tmp_path / "here" / "engine" / "engine.json"
    built = engine.read_bytes()
    again = on_device(made, "--work", "here")
    assert "built " in first.stderr
    assert "is up to date" not in first.stderr
    assert "is up to date" in again.stderr
    assert "built " not in again.stderr
    assert engine.read_bytes() == built
    assert "answers of the engine are there" not in again.stderr
    assert list((tmp_path / "here" / "answers").iterdir()) == []


KILLED = """
import os, signal, sys
from edgeres import answers
from edgeres.runners.onnxruntime import OnnxRuntimeRunner
answers.SYNC_EVERY = 0
calls, run = [], OnnxRuntimeRunner._run
def die(self, pixels):
    calls.append(len(pixels))
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return run(self, pixels)
OnnxRuntimeRunner._run = die
from edgeres.cli import cli
cli(["selftest", *sys.argv[1:]])
"""


@device
def test_a_test_that_was_killed_goes_on(made: Path, tmp_path: Path) -> None:
    killed = subprocess.run([DEVICE, "-c", KILLED, made, "--work", "here"], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "here" / "result.json").exists()
    again = on_device(made, "--work", "here", "--json")
    assert "answers of the engine are there for 2 of 3 batches" in again.stderr
    plain = json.loads(on_device(made, "--work", "there", "--json").stdout)
    result = json.loads(again.stdout)
    assert result["provenance"]["digests"] == plain["provenance"]["digests"]


@device
def test_a_refusal_is_an_error_message_and_no_traceback(made: Path, tmp_path: Path) -> None:
    done = on_device(made, "--target", "desktop", "--json")
    assert done.returncode == 1
    assert (
        done.stderr == f"Error: {made} is for cpu, not for desktop\nNext: `edgeres bundle --target desktop` makes one\n"
    )
    assert not (tmp_path / "cache").exists()


# in this process


def test_exit_status_and_verdict_belong_together(job: Job, tmp_path: Path) -> None:
    for drop, word, status in ((90.0, "PASS", 0), (0.0, "NOT ENOUGH IMAGES", 1)):
        asked = replace(job, recipe=replace(job.recipe, budget=replace(job.recipe.budget, max_drop=drop)))
        path = bundle.make(asked, output=tmp_path / "a.bundle")["bundle"]
        done = CliRunner().invoke(cli, ["selftest", path, "--work", "w"])
        assert (done.exit_code, f"INT8 {word}" in done.stdout) == (status, True), done.stdout + done.stderr


@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 0.999])
def test_a_changed_byte_is_refused(made: Path, tmp_path: Path, where: float) -> None:
    content = bytearray(made.read_bytes())
    content[int(where * len(content))] ^= 1
    (tmp_path / "b.bundle").write_bytes(content)
    with pytest.raises(InputError):
        selftest.run(tmp_path / "b.bundle", work=tmp_path / "w")
    assert not (tmp_path / "w" / "engine").exists()
    assert not (tmp_path / "w" / "bundle").exists()


def test_a_file_changed_after_unpacking_is_put_right(made: Path, tmp_path: Path) -> None:
    selftest.run(made, work=tmp_path / "w")
    logits = tmp_path / "w" / "bundle" / "reference.f32"
    content = logits.read_bytes()
    logits.write_bytes(bytes(len(content)))
    selftest.run(made, work=tmp_path / "w")
    assert logits.read_bytes() == content


def test_a_signature_of_another_is_refused(job: Job, tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    path = Path(bundle.make(job, sign_with=tmp_path / "ours", output=tmp_path / "s.bundle")["bundle"])
    result = selftest.run(path, signed_by=tmp_path / "ours.pub")
    assert result["provenance"]["bundle"]["signer"] == Sealed.open(path).signer
    for wrong, key in ((path, "theirs.pub"), (bare(job, tmp_path), "ours.pub")):
        with pytest.raises(InputError, match="is not signed by"):
            selftest.run(wrong, signed_by=tmp_path / key, work=tmp_path / "w")
    assert not (tmp_path / "w").exists()
    for key, status in (("ours", (0, 1)), ("theirs", (1,))):
        done = CliRunner().invoke(cli, ["selftest", str(path), "--signed-by", f"{key}.pub", "--json"])
        assert done.exit_code in status
        assert ("is not signed by" in done.stderr) is (key == "theirs")


def bare(job: Job, folder: Path) -> Path:
    return Path(bundle.make(job, output=folder / "bare.bundle")["bundle"])


def test_no_room_is_said_before_anything_is_written(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 1000))
    with pytest.raises(EdgeresError, match="no room to unpack") as caught:
        selftest.run(made, work=tmp_path / "w")
    assert "1,000 are free" in caught.value.evidence
    assert not (tmp_path / "w").exists()


def test_a_disk_that_is_full_is_named_by_the_file_that_it_did_not_take(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(source: Path, _: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(source))  # as shutil.copyfile does

    monkeypatch.setattr(build.shutil, "copyfile", fails)
    done = CliRunner().invoke(cli, ["selftest", str(made), "--work", str(tmp_path / "w")])
    assert done.exit_code == 1
    assert f"cannot write {tmp_path / 'w' / 'engine' / 'engine.onnx'}\n  No space left on device" in done.stderr


@pytest.mark.parametrize("output", [Path(), Path("file/result.json")])
def test_a_place_that_cannot_be_written_is_said_first(made: Path, tmp_path: Path, output: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        selftest.run(made, work=tmp_path / "w", output=tmp_path / output)
    assert not (tmp_path / "w").exists()


def test_a_file_is_no_folder_to_work_in(made: Path) -> None:
    with pytest.raises(EdgeresError, match="cannot unpack in") as caught:
        selftest.run(made, work=made)
    assert caught.value.evidence == f"{made} is a file"


def test_an_unknown_target_is_no_target_to_make_a_bundle_for(made: Path) -> None:
    with pytest.raises(UsageError, match="unknown target 'nonsense'") as caught:
        selftest.run(made, "nonsense")
    assert "choose from: cpu, " in caught.value.hint


def test_logits_of_another_number_of_classes_are_refused(made: Path, tmp_path: Path) -> None:
    logits = Sealed.open(made).read("reference.f32")
    path = changed(made, tmp_path / "b.bundle", {"reference.f32": logits[: len(logits) // 4 * 3]})
    with pytest.raises(InputError, match="does not belong together") as caught:
        selftest.run(path)
    assert f"864 bytes; {IMAGES} images of 4 classes take 1,152" in caught.value.evidence


def test_an_engine_of_another_number_of_classes_is_refused(made: Path, tmp_path: Path) -> None:
    record = json.loads(Sealed.open(made).read("manifest.json"))
    record["typed"]["classes"] = 3
    logits = Sealed.open(made).read("reference.f32")
    members = {"reference.f32": logits[: len(logits) // 4 * 3], "manifest.json": json.dumps(record).encode()}
    path = changed(made, tmp_path / "b.bundle", members)
    with pytest.raises(InputError, match="a label is out of range"):
        selftest.run(path)


def test_logits_that_are_no_numbers_are_refused(made: Path, tmp_path: Path) -> None:
    logits = np.frombuffer(Sealed.open(made).read("reference.f32"), "<f4").copy()
    logits[200] = np.nan
    path = changed(made, tmp_path / "b.bundle", {"reference.f32": logits.tobytes()})
    with pytest.raises(InputError, match=r"reference\.f32 holds NaN or infinity"):
        selftest.run(path)


@pytest.mark.parametrize(
    ("change", "evidence"),
    [
        ({"images": {"digest": "0" * 64}}, "the images are not those of the manifest"),
        ({"typed": {"preprocess": {"crop": 32, "resize": 40}}}, "the images are prepared for another model"),
        ({"images": {"asked": 99, "count": 99}}, f"the pack has {IMAGES} images, and the manifest 99"),
    ],
)
def test_images_for_another_model_are_refused(
    made: Path, tmp_path: Path, change: dict[str, dict[str, Any]], evidence: str
) -> None:
    record = json.loads(Sealed.open(made).read("manifest.json"))
    for key, values in change.items():
        record[key] |= values
    path = changed(made, tmp_path / "b.bundle", {"manifest.json": json.dumps(record).encode()})
    with pytest.raises(InputError, match="does not belong together") as caught:
        selftest.run(path)
    assert caught.value.evidence == evidence


@pytest.mark.parametrize("seconds", [-1.0, 0.0, math.nan, math.inf])
def test_seconds_are_a_time_before_anything_else(tmp_path: Path, seconds: float) -> None:
    with pytest.raises(UsageError, match="seconds to measure"):
        selftest.run(tmp_path / "no.bundle", seconds=seconds)


def test_an_fp32_engine_is_not_the_fp32_it_is_compared_with(job: Job, tmp_path: Path) -> None:
    path = bundle.make(job.with_engine(precision="fp32"), output=tmp_path / "a.bundle")["bundle"]
    done = CliRunner().invoke(cli, ["selftest", path, "--json"])
    assert done.exit_code == 0, done.stderr  # the same to the last bit: any budget is met
    result = json.loads(done.stdout)
    assert (result["verdict"], result["sqnr_db"]) == ("PASS", None)
    assert (result["baseline"]["name"], result["baseline"]["latency_ms"]) == ("FP32", None)
    assert (result["engine"]["name"], list(result["latency"]["runners"])) == ("FP32 engine", ["FP32 engine"])
    row = CliRunner().invoke(cli, ["report", "show", str(work(path) / "result.json")]).stdout.splitlines()[2]
    assert len(row.split()) == 3  # name, accuracy and size: no time of the engine in the baseline's row


def work(path: str | Path) -> Path:
    return Path(os.environ["EDGERES_CACHE"]) / "bundles" / Sealed.open(Path(path)).digest[:16]


def test_an_accepted_result_judges_on_the_device_too(job: Job, tmp_path: Path) -> None:
    pipeline.validate_engines(job, [pipeline.ensure_engine(job)])
    kept = Path(shutil.copy(job.folder / "result.json", tmp_path / "result.json"))
    shutil.copy(beside(job.folder / "result.json"), beside(kept))
    budget = replace(job.recipe.budget, max_drop=None, accepted=str(kept))
    asked = replace(job, recipe=replace(job.recipe, budget=budget))
    path = Path(bundle.make(asked, output=tmp_path / "a.bundle")["bundle"])
    result = selftest.run(path)
    assert result["verdict"] == "PASS"
    (reason,) = result["reasons"]
    assert reason.startswith("every answer is that of the accepted engine to the last bit: within max_loss 0 from the ")
    assert reason.endswith("of accepted.json of the bundle (image by image)")
    alone = selftest.run(changed(path, tmp_path / "b.bundle", {"accepted.outcomes.npz": None}))
    assert alone["reasons"] == [reason]  # its digest is in the accepted result


def test_a_set_with_unreadable_images_is_judged_image_by_image(job: Job, tmp_path: Path) -> None:
    root = tmp_path / "some"
    shutil.copytree(job.root / "val", root / "val")
    for path in sorted((root / "val").rglob("*.png"))[3:20:16]:
        path.write_bytes(b"no image")
    section = replace(job.recipe.validation, images=str(root / "val"))
    asked = replace(job, recipe=replace(job.recipe, validation=section), root=root, skip_bad=True)
    (expected,) = pipeline.validate_engines(asked, [pipeline.ensure_engine(asked)])
    budget = replace(job.recipe.budget, max_drop=None, accepted=str(asked.folder / "result.json"))
    value = bundle.make(replace(asked, recipe=replace(asked.recipe, budget=budget)))
    assert any(note.startswith("max_loss 0 takes 10,000 images at least") for note in value["notes"])
    result = selftest.run(Path(value["bundle"]), seconds=0.01, output=tmp_path / "result.json")
    assert "(image by image)" in result["reasons"][0]
    for key in ("images", "images_of", "skipped", "flipped", "drop", "flips"):
        assert json.dumps(result[key]) == json.dumps(expected[key]), key
    digests = [r["provenance"]["digests"] for r in (expected, result)]
    assert digests[0]["images"] == digests[1]["images"]
    assert (result["images"], len(result["skipped"])) == (IMAGES - 2, 2)
    before, after = (
        Outcomes.load(beside(file), found["outcomes"])
        for file, found in zip((asked.folder / "result.json", tmp_path / "result.json"), digests, strict=True)
    )
    for name, column in vars(before).items():
        assert np.array_equal(column, getattr(after, name)), name


def test_unlabelled_images_test_fidelity_alone(job: Job, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted((job.root / "val").rglob("*.png"))[:8]):
        shutil.copy(path, flat / f"{i}.png")
    section = replace(job.recipe.validation, images=str(flat))
    asked = replace(job, recipe=replace(job.recipe, validation=section, budget=Budget()))
    value = bundle.make(asked, output=tmp_path / "a.bundle")
    assert value["notes"] == ["the images have no labels: no budget can be judged on them"]
    result = selftest.run(Path(value["bundle"]))
    assert (result["labels"], result["verdict"], result["engine"]["top1"]) == (False, None, None)
    assert result["sqnr_db"] > 10


# which device


def opened(path: Path, **changes: Any) -> Bundle:
    """The bundle at ``path`` as if it were for another target, with other keys of its manifest."""
    found = Bundle.open(path)
    record = {**found.manifest, **changes}
    return replace(found, manifest=record, target=load_target(record["target"], tensorrt=record["tensorrt"]))


@pytest.fixture
def orin(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Let this machine be a Jetson of that model, with that TensorRT."""

    def pretend(model: str, tensorrt: str) -> None:
        monkeypatch.setattr(devices, "jetson", lambda: Jetson(model, "36.4.3", "6.2"))
        monkeypatch.setattr(devices, "gpus", lambda: [Gpu("Orin", "8.7", 1 << 33, True)])
        versions = type("Executor", (), {"version": staticmethod(lambda: tensorrt)})
        monkeypatch.setattr(build, "executor", lambda _: versions)

    return pretend


AGX, NANO = "NVIDIA Jetson AGX Orin Developer Kit", "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit"


def test_another_jetson_than_the_target_names_is_refused(made: Path, orin: Callable[[str, str], None]) -> None:
    orin(NANO, "10.3.0")
    for name in ("jetson-agx-orin", "jetson-orin-nx", "jetson-agx-orin-dla"):
        with pytest.raises(BuildError, match=f"is for {name}") as caught:
            selftest.require_fit(opened(made, target=name, tensorrt="10.3.0"), None)
        assert NANO in caught.value.evidence
    fits = opened(made, target="jetson-orin-nano", tensorrt="10.3.0")
    assert selftest.require_fit(fits, "jetson-orin-nano") == "10.3.0"
    orin(AGX, "10.3.0")
    for name in ("jetson-agx-orin", "jetson-agx-orin-dla"):
        assert selftest.require_fit(opened(made, target=name, tensorrt="10.3.0"), None) == "10.3.0"


def test_a_gpu_of_another_capability_is_refused(made: Path, orin: Callable[[str, str], None]) -> None:
    orin("NVIDIA Jetson AGX Thor", "10.13.3")
    with pytest.raises(BuildError, match=r"jetson-agx-thor is for compute capability 11\.0") as caught:
        selftest.require_fit(opened(made, target="jetson-agx-thor", tensorrt="10.13.3"), None)
    assert "has 8.7" in caught.value.evidence
    assert "edgeres doctor" in caught.value.hint


@pytest.mark.parametrize(
    ("target", "precision", "made_for", "here", "fits"),
    [
        ("jetson-agx-orin", "int8", "10.3.0", "10.7.0.23", True),
        ("jetson-agx-orin", "int8", "10.3.0", "8.6.2", False),
        ("jetson-agx-orin", "int8", "8.6.2", "10.3.0", False),
        ("jetson-agx-orin", "fp32", "8.6.2", "10.3.0", True),
        ("jetson-agx-orin-dla", "int8", "10.3.0", "11.4.1", False),
        ("desktop", "fp16", None, "11.0.0.114", True),
        ("desktop", "fp16", None, "8.6.1", False),
    ],
)
def test_a_graph_is_for_the_tensorrt_it_was_made_for(
    made: Path,
    orin: Callable[[str, str], None],
    target: str,
    precision: str,
    made_for: str | None,
    here: str,
    fits: bool,
) -> None:
    orin(AGX, here)
    asked = opened(made, target=target, precision=precision, tensorrt=made_for)
    if fits:
        assert selftest.require_fit(asked, None) == here
        return
    with pytest.raises(StaleError, match="is made for TensorRT") as caught:
        selftest.require_fit(asked, None)
    assert f"here is TensorRT {here}" in caught.value.evidence
    assert f"--tensorrt {here}" in caught.value.hint


def test_implicit_int8_takes_its_ranges_from_the_cache(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = job.with_engine(target="jetson-agx-orin-dla")
    found = Bundle.open(Path(bundle.make(asked, output=tmp_path / "a.bundle")["bundle"]))
    found.sealed.unpack(tmp_path / "files")
    seen: list[Any] = []
    engine = build.Engine(tmp_path / "engine.plan", {"size_bytes": 1})
    monkeypatch.setattr(build, "build", lambda *arguments: seen.append(arguments) or engine)
    assert selftest.ensure_engine(found, tmp_path / "files", tmp_path / "e", "10.3.0") is engine
    ((typed, folder, name, target, calibration),) = seen
    assert (typed.path, folder, name) == (tmp_path / "files" / "model.onnx", tmp_path / "e", "jetson-agx-orin-dla")
    assert (target, typed.convolutions) == (found.target, 15)  # the classifier is a convolution too, and not counted
    assert calibration.cache == (tmp_path / "files" / "model.cache").read_text()
    (tmp_path / "files" / "model.cache").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"model\.cache of .*a\.bundle is no calibration cache"):
        selftest.ensure_engine(found, tmp_path / "files", tmp_path / "e", "10.3.0")


def test_a_missing_executor_is_named(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BuildError, match="no engine for jetson-agx-orin can be built here"):
        selftest.require_fit(opened(made, target="jetson-agx-orin", tensorrt="10.3.0"), None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependency, match="'onnxruntime'"):
        selftest.run(made)


def test_eight_bit_weights_on_a_cpu_without_vnni_are_noted(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeres.targets.exact_dot_product", lambda *_: False)
    found = Bundle.open(made)
    found.manifest["typed"]["quantization"]["weight_bits"] = 8
    (note,) = selftest.notes(found)
    assert "weights have 8 bits, and this CPU has no VNNI" in note
    found.manifest["typed"]["quantization"]["weight_bits"] = 7
    assert selftest.notes(found) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("made_from", {"onnx": "0" * 64}), ("built_with", {"onnxruntime": "1.0"}), ("asked", {"tf32": True})],
)
def test_an_engine_made_otherwise_is_built_again(made: Path, tmp_path: Path, key: str, value: dict[str, Any]) -> None:
    selftest.run(made, work=tmp_path / "w")
    path = tmp_path / "w" / "engine" / "engine.json"
    record = read_json(path, "engine record")
    path.write_text(json.dumps({**record, key: {**record.get(key, {}), **value}}))
    _, said = told(selftest.run, made, work=tmp_path / "w")
    assert f"built {path.with_name('engine.onnx')}" in said
    assert read_json(path, "engine record") | {"build_seconds": 0} == record | {"build_seconds": 0}
    assert record["made_from"]["onnx"] == sha256_file(tmp_path / "w" / "bundle" / "model.onnx")
