from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import CLASSES, told, write_images

from edgeres import bundle, graph, pipeline
from edgeres.bundle import Bundle
from edgeres.cli import cli
from edgeres.errors import InputError, StaleError, UsageError
from edgeres.files import read_json, write_json
from edgeres.job import Job
from edgeres.layouts import open_images
from edgeres.outcomes import beside
from edgeres.pack import open_pack, write_pack
from edgeres.ranges import hashed
from edgeres.recipe import Budget, load_recipe
from edgeres.sealed import Sealed, write
from edgeres.statistics import paired
from edgeres.validate import Comparison
from edgeres.verdict import LARGE, Loss, enough

Make = Callable[..., Job]


@pytest.fixture
def make(workspace: Path, tiny_path: Path) -> Make:
    """A job on the tiny model, with flags as section__key=value."""

    def job(**flags: Any) -> Job:
        layers: dict[str, dict[str, Any]] = {}
        for name, value in {"engine__precision": "fp32", **flags}.items():
            section, key = name.split("__")
            layers.setdefault(section, {})[key] = value
        return Job(load_recipe(workspace, flags=layers), workspace, model=tiny_path)

    return job


def manifest(value: dict[str, Any]) -> dict[str, Any]:
    return Bundle.open(Path(value["bundle"])).manifest


def test_a_bundle_has_what_a_device_needs(make: Make, workspace: Path, val_folder: Path, tmp_path: Path) -> None:
    job = make(engine__precision="int8", budget__max_drop=0.5)
    value, said = told(bundle.make, job)
    path = Path(value["bundle"])
    assert path == workspace / "engines" / "out" / "tiny-int8-cpu.bundle"
    assert value["size_bytes"] == path.stat().st_size
    sealed = Sealed.open(path)
    assert (value["digest"], value["signer"]) == (sealed.digest, None)
    members = ["manifest.json", "model.onnx", "images.pack", "reference.f32", "recipe.json", "target.toml"]
    assert list(sealed.members) == value["members"] == [*members, "labels.txt", "LICENSES.txt"]
    assert "wrote engines/out/tiny-int8-cpu.bundle: 24 of 24 images, 0." in said
    assert f"digest {sealed.digest}, not signed\n" in said

    sealed.unpack(tmp_path / "files")
    files = tmp_path / "files"
    assert (files / "labels.txt").read_text() == "".join(f"class{i}\n" for i in range(CLASSES))
    made = json.loads((files / "manifest.json").read_text())
    typed = graph.load(files / "model.onnx")
    own = graph.load(job.folder / "model.onnx")
    assert graph.digest(typed) == graph.digest(own)
    assert made["typed"] == graph.metadata(typed)
    assert graph.metadata(own) == {**made["typed"], "parity": graph.metadata(own)["parity"]}
    assert made["graph"] == {"convolutions": 15, "residuals": 4}
    assert made["model"]["digest"] == graph.digest(graph.load(job.fp32))
    assert 0 < job.fp32.stat().st_size - made["model"]["size_bytes"] < 500  # its parity
    assert (made["target"], made["precision"], made["budget"]["max_drop"]) == ("cpu", "int8", 0.5)
    assert {"edgeres", "numpy", "onnxruntime", "pillow"} <= made["reference"].keys()
    packed, images = open_pack(files / "images.pack"), open_images(val_folder)
    assert (packed.paths, packed.labels, packed.sha256) == (images.paths, images.labels, images.hashes())
    pixels = (packed.read(5, packed.preprocess), images.read(5, packed.preprocess))
    assert np.array_equal(*pixels)
    numbers = {"count": 24, "asked": 24, "of": 24, "skipped": [], "left_out": []}
    assert made["images"] == {**numbers, "digest": hashed(images).digest(), "set": hashed(images).digest()}
    opened = Bundle.open(path)
    assert (opened.target.executor, opened.budget) == ("onnxruntime", Budget(max_drop=0.5))


def test_the_reference_is_what_a_validation_has_of_fp32(make: Make, tmp_path: Path) -> None:
    job = make()
    (result,) = pipeline.validate_engines(job, [pipeline.ensure_engine(job)])
    value, said = told(bundle.make, job)
    assert "answers of the FP32 baseline are there for 1 of 1 batches" in said
    assert manifest(value)["images"]["digest"] == result["provenance"]["digests"]["images"]
    (store,) = (job.root / "engines" / "out" / "answers").iterdir()
    logits = Sealed.open(Path(value["bundle"])).read("reference.f32")
    assert logits == (store / "logits.f32").read_bytes()
    assert np.isfinite(np.frombuffer(logits, "<f4")).all()
    assert len(logits) == 4 * 24 * CLASSES


def job_in(root: Path, tiny_path: Path, train: Path, val: Path) -> Job:
    """A job of a workspace of its own, whose image folders have names of their own."""
    shutil.copytree(train, root / f"train-{root.name}")
    shutil.copytree(val, root / f"val-{root.name}")
    model = Path(shutil.copy(tiny_path, root / "tiny.onnx"))
    flags = {key: {"images": str(root / f"{name}-{root.name}")} for key, name in SETS.items()}
    return Job(load_recipe(root, flags=flags), root, model=model)


SETS = {"calibration": "train", "validation": "val"}


def test_the_same_inputs_give_the_same_bytes_in_any_folder(
    tmp_path: Path, tiny_path: Path, train_folder: Path, val_folder: Path
) -> None:
    jobs = [job_in(tmp_path / name, tiny_path, train_folder, val_folder) for name in ("one", "other")]
    one, other = (Path(bundle.make(job, limit=10)["bundle"]).read_bytes() for job in jobs)
    assert one == other
    again = bundle.make(jobs[0], limit=10, output=tmp_path / "again.bundle")
    assert Path(again["bundle"]).read_bytes() == one
    assert re.search(rb"20\d\d-\d\d-\d\d", one) is None


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_what_an_export_measured_does_not_travel(
    tmp_path: Path, tiny_path: Path, train_folder: Path, val_folder: Path, precision: str
) -> None:
    jobs = [job_in(tmp_path / name, tiny_path, train_folder, val_folder) for name in ("one", "other")]
    jobs = [job.with_engine(precision=precision) for job in jobs]
    for job, largest in zip(jobs, (1.25e-06, 2.0), strict=True):
        model, found = graph.load(job.fp32), {"images": 8, "max_abs": largest, "db": 131.0}
        fit = {"images": 8, "divergence": {"v1": largest}}
        graph.set_metadata(model, {**graph.metadata(model), "parity": {"random": found}, "variant_check": fit})
        graph.save(model, job.fp32)
    assert jobs[0].fp32.stat().st_size != jobs[1].fp32.stat().st_size
    one, other = (Path(bundle.make(job, limit=10)["bundle"]).read_bytes() for job in jobs)
    assert one == other


def test_no_folder_of_this_machine_is_in_a_bundle(make: Make, tmp_path: Path, val_folder: Path) -> None:
    images = open_images(val_folder)
    assert images.labels
    lines = [f"{val_folder / path} {label}\n" for path, label in zip(images.paths, images.labels, strict=True)]
    (tmp_path / "list.txt").write_text("".join(lines))
    made = Path(bundle.make(make(validation__images=str(tmp_path / "list.txt")))["bundle"])
    Sealed.open(made).unpack(tmp_path / "files")
    packed = open_pack(tmp_path / "files" / "images.pack")
    assert (packed.paths, packed.labels, packed.sha256) == (images.paths, images.labels, images.hashes())
    content = made.read_bytes()
    for place in (tmp_path, val_folder, Path.home(), Path(__file__).parents[1]):
        assert str(place).encode() not in content


def test_the_recipe_tells_the_network_and_names_members(make: Make, tmp_path: Path, val_folder: Path) -> None:
    labels = tmp_path / "names.txt"
    labels.write_text("".join(f"class{i}\n" for i in range(CLASSES)))
    value = bundle.make(make(validation__labels=str(labels)), limit=7)
    recipe = json.loads(Sealed.open(Path(value["bundle"])).read("recipe.json"))
    assert recipe["validation"] == {"images": "images.pack", "labels": "labels.txt", "limit": 7}
    assert recipe["preprocess"]["crop"] == 32  # the model's, not the workspace's
    assert (recipe["model"]["classes"], recipe["model"]["weights"]) == (CLASSES, "tiny.pth")
    assert recipe["calibration"]["images"] is None
    assert recipe["engine"]["precision"] == "fp32"


def test_a_part_of_the_images_is_the_one_that_validate_draws(make: Make, val_folder: Path) -> None:
    value = bundle.make(make(), limit=10)
    made = manifest(value)["images"]
    assert (made["count"], made["asked"], made["of"]) == (10, 10, 24)
    (packed,) = (p for p in [Sealed.open(Path(value["bundle"]))])
    packed.unpack(Path("files"))
    assert open_pack(Path("files/images.pack")).paths == open_images(val_folder).subset(10, 0).paths


@pytest.mark.parametrize(("limit", "recipe", "count"), [(None, None, 24), (None, 9, 9), (256, 9, 9), (5, 9, 5)])
def test_the_recipe_bounds_what_is_judged_on(make: Make, limit: int | None, recipe: int | None, count: int) -> None:
    flags = {} if recipe is None else {"validation__limit": recipe}
    assert manifest(bundle.make(make(**flags), limit=limit))["images"]["count"] == count


def test_calibration_images_may_not_judge(make: Make, train_folder: Path) -> None:
    job = make(engine__precision="int8", validation__images=str(train_folder))
    with pytest.raises(InputError, match="32 validation images are calibration images too"):
        bundle.make(job)
    assert list(job.root.rglob("*.bundle")) == []


def test_a_method_that_calibrates_on_the_device_does_not_travel(make: Make) -> None:
    job = make(engine__precision="int8", engine__target="desktop-implicit", calibration__method="tensorrt-entropy")
    with pytest.raises(UsageError, match="takes the calibration images while TensorRT builds") as caught:
        bundle.make(job)
    assert "--method mse" in caught.value.hint
    assert not job.folder.exists()


def test_implicit_int8_has_its_calibration_cache_with_it(make: Make) -> None:
    job = make(engine__precision="int8", engine__target="jetson-agx-orin-dla", build__dla_core=1)
    sealed = Sealed.open(Path(bundle.make(job)["bundle"]))
    assert sealed.read("model.cache").startswith(b"TRT-")
    opened = Bundle.open(sealed.path)
    assert (opened.target.build.dla_core, opened.target.dla, opened.target.tensorrt) == (1, True, "10.3.0")
    assert opened.target.asked == opened.manifest["build"]


@pytest.mark.parametrize(("tensorrt", "told"), [("8.5.2", True), ("8.6.2", False), (None, False)])
def test_a_device_whose_python_is_too_old_for_the_test_is_told_of(make: Make, tensorrt: str | None, told: bool) -> None:
    job = make(engine__precision="fp16", engine__target="jetson-agx-orin", engine__tensorrt=tensorrt)
    assert any("JetPack 5" in note for note in bundle.make(job)["notes"]) == told


def test_an_accepted_result_and_its_outcomes_travel(make: Make, tmp_path: Path) -> None:
    job = make()
    pipeline.validate_engines(job, [pipeline.ensure_engine(job)])
    kept = tmp_path / "kept" / "result.json"
    kept.parent.mkdir()
    one = read_json(job.folder / "result.json", "result")
    write_json(kept, [one, {**one, "precision": "int8"}])  # as `run` keeps them
    shutil.copy(beside(job.folder / "result.json"), beside(kept))
    job = make(budget__accepted=str(kept), budget__max_loss=1.0)
    value = bundle.make(job)
    sealed = Sealed.open(Path(value["bundle"]))
    assert json.loads(sealed.read("accepted.json"))["precision"] == "fp32"
    assert sealed.read("accepted.outcomes.npz") == beside(kept).read_bytes()
    assert Bundle.open(sealed.path).budget == Budget(accepted="accepted.json", max_loss=1.0)
    assert json.loads(sealed.read("recipe.json"))["budget"]["accepted"] == "accepted.json"
    assert str(kept.parent).encode() not in sealed.path.read_bytes()
    # 24 images, all its own: compared image by image, of which 381 would do
    assert any(note.startswith("max_loss 1 takes 381 images at least") for note in value["notes"])
    part = bundle.make(job, limit=10)
    assert any(
        note.startswith("max_loss 1 would hardly be decided: the accepted result is of other images")
        for note in part["notes"]
    )


def test_unreadable_images_are_left_out_by_name_or_refused(make: Make, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "some", 2, seed=3)
    (folder / "class1" / "0.png").write_bytes(b"no image")
    job = make(validation__images=str(folder))
    with pytest.raises(InputError, match="1 unreadable image in"):
        bundle.make(job)
    skipping = Job(job.recipe, job.root, job.model, skip_bad=True)
    made = manifest(bundle.make(skipping))["images"]
    assert (made["count"], made["asked"], made["left_out"]) == (2 * CLASSES - 1, 2 * CLASSES, ["class1/0.png"])
    images = open_images(folder)
    assert (made["set"], made["skipped"]) == (hashed(images).digest(), [images.paths.index("class1/0.png")])


def test_nothing_is_left_beside_the_bundle(make: Make) -> None:
    job = make()
    bundle.make(job)
    assert sorted(p.name for p in job.folder.iterdir()) == ["model.onnx"]


def test_two_bundles_of_one_job_at_once_wait_for_each_other(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, waits, answers = make(), threading.Event(), bundle._answers
    paths = tmp_path / "one.bundle", tmp_path / "other.bundle"
    other = threading.Thread(target=bundle.make, args=(job, 6), kwargs={"output": paths[1]})

    def while_the_other_begins(*arguments: Any) -> Any:
        if other.ident is None:
            other.start()
            while other.is_alive() and not waits.wait(0.01):
                pass
        return answers(*arguments)

    monkeypatch.setattr(bundle, "_answers", while_the_other_begins)
    monkeypatch.setattr("edgeres.files.say", lambda text: waits.set() if "wait for it" in text else None)
    bundle.make(job, output=paths[0])
    other.join()
    for path, count in zip(paths, (24, 6), strict=True):
        opened = Bundle.open(path)
        opened.sealed.unpack(tmp_path / path.stem)
        packed = open_pack(tmp_path / path.stem / "images.pack")
        assert (len(packed), hashed(packed).digest()) == (count, opened.manifest["images"]["digest"])
    assert [p.name for p in job.folder.iterdir()] == ["model.onnx"]


def test_a_pack_that_another_process_wrote_is_not_sealed(
    make: Make, train_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system has no locks."""
    job = make()

    def meanwhile(_: Any, packed: Any) -> None:
        write_pack(open_images(train_folder), packed.preprocess, packed.root)

    monkeypatch.setattr(bundle, "_top1", meanwhile)
    with pytest.raises(StaleError, match=r"images\.pack changed while the bundle was made"):
        bundle.make(job)
    assert list(job.root.rglob("*.bundle")) == []


@pytest.mark.parametrize(
    ("known", "said"), [("BSD-3-Clause", "license: BSD-3-Clause"), (None, "license: not recorded")]
)
def test_licenses_say_what_is_recorded_and_what_is_not(known: str | None, said: str) -> None:
    text = bundle.licenses({"source": "imagenet", "sha256": "a" * 64, **({"license": known} if known else {})}, 7)
    weights, images = text.split("\n\n")
    assert f"\n  {said}" in weights
    assert "source: imagenet" in weights
    assert "images.pack: 7" in images
    assert "which is not recorded" in images
    assert ("does not know" in weights) is (known is None)


@pytest.mark.parametrize("allowed", [0.0, 0.02, 0.1, 0.5, 0.76, 1.0, 10.0, 90.0])
def test_enough_images_are_enough_and_one_less_is_not(allowed: float) -> None:
    needed = enough(allowed)
    assert Loss.of(nothing_lost(needed)).judge(allowed)[0] == "PASS"
    if needed > 1:
        assert Loss.of(nothing_lost(needed - 1)).judge(allowed)[0] != "PASS"
    assert needed <= LARGE


def nothing_lost(images: int) -> Comparison:
    return Comparison(images=images, baseline=(images, images), engine=(images, images), identical=0)


def test_notes_say_what_so_many_images_can_show() -> None:
    def notes(images: int, whole: int, top1: float | None = 80.0, **budget: float) -> list[str]:
        return list(bundle.shows(Budget(**budget), None, images, whole, top1, ""))

    at_most = f"{paired(0, 0, 256)[1]:.2g}"
    assert notes(256, 1000) == [f"if no right answer is lost, 256 images show a drop of at most {at_most} points"]
    assert len(notes(256, 1000, max_drop=1.6)) == 1
    _, tight = notes(256, 1000, max_drop=0.5)
    assert tight == "max_drop 0.5 takes 765 images at least (--limit 765): with these it ends as NOT ENOUGH IMAGES"
    _, relative = notes(256, 300, min_relative=99.5)  # 0.4 of 80 points
    assert relative.startswith(f"min_relative 99.5 takes {enough(0.4)} images at least (and the set has 300)")
    assert notes(24, 24, None, max_drop=1.0) == ["the images have no labels: no budget can be judged on them"]


def test_a_bundle_is_signed_by_ssh_keygen(make: Make, tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    value, said = told(bundle.make, make(), sign_with=key)
    assert f"digest {value['digest']}, signed by {value['signer']}\n" in said
    assert value["signer"].startswith("SHA256:")
    assert Bundle.open(Path(value["bundle"]), key.with_suffix(".pub")).sealed.signer == value["signer"]


@pytest.mark.parametrize("flags", [{"sign_with": Path("absent")}, {"output": Path()}, {"output": Path("file/a")}])
def test_a_key_or_a_place_that_will_not_do_is_said_first(make: Make, flags: dict[str, Path]) -> None:
    Path("file").touch()
    job = make()
    with pytest.raises(InputError, match=r"cannot (sign with absent|write)"):
        bundle.make(job, **flags)
    assert not job.folder.exists()


@pytest.mark.parametrize("budget", ["max_drop", "min_relative", "accepted"])
def test_a_budget_needs_labels(make: Make, tmp_path: Path, val_folder: Path, budget: str) -> None:
    (tmp_path / "flat").mkdir()
    for i, path in enumerate(sorted(val_folder.rglob("*.png"))[:4]):
        shutil.copy(path, tmp_path / "flat" / f"{i}.png")
    flat = {"validation__images": str(tmp_path / "flat")}
    job = make(**flat, **{f"budget__{budget}": "absent.json" if budget == "accepted" else 1.0})
    with pytest.raises(UsageError, match="flat has no labels") as error:
        bundle.make(job)
    assert budget in error.value.evidence
    assert "leave the budget out" in error.value.hint
    assert not job.folder.exists()
    assert bundle.make(make(**flat))["notes"] == ["the images have no labels: no budget can be judged on them"]


def changed(path: Path, output: Path, members: dict[str, bytes | None]) -> Path:
    """The bundle at ``path`` with other ``members``, or without them, sealed again."""
    sealed = Sealed.open(path)
    contents = {name: members.get(name, sealed.read(name)) for name in sealed.members}
    write(output, {name: content for name, content in contents.items() if content is not None})
    return output


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "edgeres bundle 2"}, "is not of a format that this edgeres reads"),
        ({"target": 3}, "has a damaged manifest.json"),
        ({"images": {}}, "has a damaged manifest.json"),
        ({"build": {"no": 1}}, "has a damaged manifest.json"),
        ({"budget": {"max_drop": "much"}}, "has a damaged manifest.json"),
        ({"typed": {"precision": "fp32", "classes": 4, "preprocess": {"crop": -1}}}, "has a damaged manifest.json"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(make: Make, change: dict[str, Any], words: str) -> None:
    value = bundle.make(make())
    text = json.dumps({**manifest(value), **change}).encode()
    path = changed(Path(value["bundle"]), Path("other.bundle"), {"manifest.json": text})
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        Bundle.open(path)
    assert caught.value.evidence
    assert caught.value.hint


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("typed", {"batch": "x"}),
        ("typed", {"batch": 0}),
        ("typed", {"batch": -3}),
        ("typed", {"batch": 10**7}),
        ("typed", {"classes": True}),
        ("typed", {"quantization": "x"}),
        ("typed", {"quantization": {"weight_bits": "x"}}),
        ("typed", {"layers": "x"}),
        ("typed", {"ranges": {}}),
        ("model", {"size_bytes": -1}),
        ("images", {"left_out": [1]}),
        ("images", {"skipped": ["1"]}),
        ("images", {"count": 22, "skipped": [3, 3]}),
        ("images", {"count": 22, "skipped": [4, 3]}),
        ("images", {"count": 23, "skipped": [24]}),
        ("images", {"count": 23}),
    ],
)
def test_a_value_of_another_kind_in_a_manifest_is_named(make: Make, section: str, change: dict[str, Any]) -> None:
    value = bundle.make(make())
    record = manifest(value)
    record[section] |= change
    path = changed(Path(value["bundle"]), Path("other.bundle"), {"manifest.json": json.dumps(record).encode()})
    with pytest.raises(InputError, match=r"has a damaged manifest\.json") as caught:
        Bundle.open(path)
    assert f"{section}.{next(iter(change))}" in caught.value.evidence


def test_a_fixed_batch_is_in_order(make: Make) -> None:
    value = bundle.make(make())
    record = manifest(value)
    record["typed"]["batch"] = 8
    path = changed(Path(value["bundle"]), Path("other.bundle"), {"manifest.json": json.dumps(record).encode()})
    assert Bundle.open(path).manifest["typed"]["batch"] == 8


@pytest.mark.parametrize("name", ["manifest.json", "target.toml"])
def test_a_text_too_long_for_memory_is_refused_unread(make: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = changed(Path(bundle.make(make())["bundle"]), Path("other.bundle"), {name: bytes(bundle.TEXT + 1)})
    seen: list[str] = []
    monkeypatch.setattr(Sealed, "read", lambda _, name: seen.append(name))
    with pytest.raises(InputError, match=r"other\.bundle is no bundle") as caught:
        Bundle.open(path)
    assert caught.value.evidence == f"{name} has 16,777,217 bytes, of at most 16,777,216"
    assert not seen


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff", b"{}", b"[" * 200_000 + b"]" * 200_000])
def test_a_manifest_that_is_none_is_refused(make: Make, text: bytes) -> None:
    path = changed(Path(bundle.make(make())["bundle"]), Path("other.bundle"), {"manifest.json": text})
    with pytest.raises(InputError, match=r"has a damaged manifest\.json"):
        Bundle.open(path)


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "images.pack", "reference.f32", "target.toml"])
def test_a_bundle_without_a_part_is_none(make: Make, name: str) -> None:
    path = changed(Path(bundle.make(make())["bundle"]), Path("other.bundle"), {name: None})
    with pytest.raises(InputError, match=r"other\.bundle is no bundle") as caught:
        Bundle.open(path)
    assert caught.value.evidence == f"it holds no {name}"


def test_the_command_makes_one_and_says_where(workspace: Path, tiny_path: Path) -> None:
    command = ["bundle", "--model", str(tiny_path), "--precision", "fp32", "--max-drop", "0.5", "-o", "a.bundle"]
    done = CliRunner().invoke(cli, [*command, "--limit", "6", "--json"])
    assert done.exit_code == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["images"]["count"] == 6
    assert value["budget"]["max_drop"] == 0.5
    assert Sealed.open(Path("a.bundle")).digest == value["digest"]
    assert "note: max_drop 0.5 takes 765 images at least" in done.stderr
    again = CliRunner().invoke(cli, [*command, "--limit", "all"])
    assert again.stdout == "a.bundle\n"
    assert manifest({"bundle": "a.bundle"})["images"]["count"] == 24


def test_a_bundle_may_be_of_a_recipe(workspace: Path, tiny_path: Path) -> None:
    toml = (workspace / "edgeres.toml").read_text(encoding="utf-8")
    (workspace / "nine.toml").write_text(f'name = "nine"\n{toml}\n[budget]\nmax_drop = 9\n', encoding="utf-8")
    done = CliRunner().invoke(cli, ["bundle", "nine.toml", "--model", str(tiny_path), "--precision", "fp32", "--json"])
    assert done.exit_code == 0, done.stderr
    value = json.loads(done.stdout)
    assert (Path(value["bundle"]).name, value["budget"]["max_drop"]) == ("nine-fp32-cpu.bundle", 9)


@pytest.mark.parametrize(("said", "limit"), [([], 256), (["--limit", "7"], 7), (["--limit", "all"], None)])
def test_a_limit_is_a_number_or_all(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], limit: int | None
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(bundle, "make", lambda job, *rest: seen.append(rest) or {"bundle": ""})
    assert CliRunner().invoke(cli, ["bundle", *said]).exit_code == 0
    assert seen == [(limit, None, None)]


@pytest.mark.parametrize("limit", ["0", "-1", "some", "1.5", ""])
def test_a_limit_that_is_no_number_of_images_is_wrong_usage(workspace: Path, limit: str) -> None:
    done = CliRunner().invoke(cli, ["bundle", "--limit", limit])
    assert done.exit_code == 2
    assert "is no number of images" in done.stderr
