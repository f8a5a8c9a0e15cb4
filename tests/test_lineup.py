from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edgeres import benchmark, graph, lineup
from edgeres.benchmark import Plan
from edgeres.build import RECORD, Engine, build
from edgeres.cli import cli
from edgeres.errors import StaleError, UsageError
from edgeres.files import sha256_file
from edgeres.job import Job
from edgeres.lineup import Entry, kind, names, random_pixels
from edgeres.recipe import Preprocess, load_recipe
from edgeres.runners import Runner
from edgeres.targets import load_target

MODEL = "m" * 64
NO_FP16 = "no FP16 engine to compare with; to build it: edgeres build-engine --precision fp16 --target cpu"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SECONDS", 0.01)
    monkeypatch.setattr(benchmark, "SLICE", 0.01)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(load_recipe(tmp_path, None, {}), tmp_path)


@pytest.fixture
def engine(tmp_path: Path, tiny_path: Path) -> Engine:
    """An engine of the tiny model that calls itself INT8, where a workspace has it, beside its FP32 model."""
    folder = tmp_path / "engines" / "out" / "tiny-int8-cpu"
    built = build(tiny_path, folder, "cpu", load_target("cpu"))
    (folder.parent / "tiny.onnx").write_bytes(tiny_path.read_bytes())
    (folder / RECORD).write_text(json.dumps({**built.record, "precision": "int8"}))
    return Engine.load(folder)


def plan_of(root: Path, name: str, **changes: Any) -> Engine:
    """The folder of a TensorRT engine, the plan a few bytes."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "engine.plan").write_bytes(name.encode())
    record = {
        "format": "edgeres engine 1",
        "file": "engine.plan",
        "sha256": sha256_file(folder / "engine.plan"),
        "size_bytes": len(name),
        "executor": "tensorrt",
        "target": "desktop",
        "precision": "int8",
        "options": {"tf32": False, "profile": [1, 8, 32]},
        "made_from": {"model": MODEL},
        "built_with": {"tensorrt": "10.3.0"},
        "preprocess": Preprocess(crop=32, resize=36).to_json(),
        **changes,
    }
    (folder / RECORD).write_text(json.dumps(record))
    return Engine.load(folder)


def kinds(entries: list[Entry]) -> list[str]:
    return [entry.kind for entry in entries]


def test_on_a_cpu_the_baseline_is_the_fp32_model_in_the_engines_own_executor(job: Job, engine: Engine) -> None:
    entries, notes = lineup.lineup(job, [engine])
    assert kinds(entries) == ["FP32", "INT8"]
    assert notes == [NO_FP16]
    with entries[0].open(False, None) as fp32, engine.open() as runner:
        assert type(fp32) is type(runner)


def test_another_or_no_fp32_model_is_said_and_not_built(job: Job, engine: Engine, tmp_path: Path) -> None:
    beside = tmp_path / "engines" / "out" / "tiny.onnx"
    model = graph.load(beside)
    model.graph.initializer[0].raw_data = bytes(len(model.graph.initializer[0].raw_data))
    graph.save(model, beside)
    words = ["no FP32 model to compare tiny-int8-cpu with; name it with --model", NO_FP16]
    assert lineup.lineup(job, [engine])[1] == words
    beside.unlink()
    entries, notes = lineup.lineup(job, [engine])
    assert (kinds(entries), notes) == (["INT8"], words)
    assert not beside.exists()


def test_a_named_model_must_be_the_right_one(job: Job, engine: Engine, tiny_path: Path, tmp_path: Path) -> None:
    (tmp_path / "engines" / "out" / "tiny.onnx").unlink()
    assert kinds(lineup.lineup(Job(job.recipe, tmp_path, model=tiny_path), [engine])[0]) == ["FP32", "INT8"]
    record = {**engine.record, "made_from": {"model": "0" * 64}}
    with pytest.raises(StaleError, match="another model than"):
        lineup.lineup(Job(job.recipe, tmp_path, model=tiny_path), [Engine(engine.path, record)])


def test_the_model_of_the_workspace_will_do_too(job: Job, engine: Engine, tiny_path: Path, tmp_path: Path) -> None:
    (tmp_path / "engines" / "out" / "tiny.onnx").unlink()
    job.fp32.write_bytes(tiny_path.read_bytes())
    assert kinds(lineup.lineup(job, [engine])[0]) == ["FP32", "INT8"]


def test_a_model_under_another_name_is_found_by_its_digest(job: Job, engine: Engine, tmp_path: Path) -> None:
    usual = tmp_path / "engines" / "out" / "tiny.onnx"
    usual.rename(usual.with_name("mine.onnx"))
    usual.with_name("damaged.onnx").write_bytes(b"cut")
    entries, notes = lineup.lineup(job, [engine])
    assert ([entry.folder for entry in entries], notes) == (["mine.onnx", "tiny-int8-cpu"], [NO_FP16])


def test_a_target_without_fp16_is_not_asked_for_it(job: Job, engine: Engine) -> None:
    openvino = Engine(engine.path, {**engine.record, "target": "cpu-openvino", "executor": "openvino"})
    assert lineup.lineup(job, [openvino])[1] == []


def test_an_fp32_engine_that_was_named_is_the_baseline(job: Job, tiny_path: Path, tmp_path: Path) -> None:
    engine = build(tiny_path, tmp_path / "engines" / "out" / "tiny-fp32-cpu", "cpu", load_target("cpu"))
    assert lineup.lineup(job, [engine])[1] == []
    assert kinds(lineup.lineup(job, [engine])[0]) == ["FP32"]


def test_with_tensorrt_what_lies_beside_is_compared_and_what_is_missing_said(job: Job, tmp_path: Path) -> None:
    int8 = plan_of(tmp_path, "net-int8-desktop")
    entries, notes = lineup.lineup(job, [int8])
    assert kinds(entries) == ["INT8"]
    build_it = "engine to compare with; to build it: edgeres build-engine --precision"
    assert notes == [
        f"no FP32 {build_it} fp32 --target desktop",
        f"no FP32 TF32 {build_it} fp32 --target desktop --build tf32=true -o {tmp_path / 'net-fp32-tf32-desktop'}",
        f"no FP16 {build_it} fp16 --target desktop",
    ]
    plan_of(tmp_path, "net-fp16-desktop", precision="fp16")
    plan_of(tmp_path, "net-fp32-tf32-desktop", precision="fp32", options={"tf32": True})
    plan_of(tmp_path, "net-fp32-desktop", precision="fp32")
    entries, notes = lineup.lineup(job, [int8])
    assert kinds(entries) == ["FP32", "FP32 TF32", "FP16", "INT8"]
    assert [entry.folder for entry in entries][1] == "net-fp32-tf32-desktop"
    assert notes == []


def test_fp16_is_no_baseline_of_fp16_or_of_fp32(job: Job, tmp_path: Path) -> None:
    fp16 = plan_of(tmp_path, "net-fp16-desktop", precision="fp16")
    fp32 = plan_of(tmp_path, "net-fp32-desktop", precision="fp32")
    plan_of(tmp_path, "net-int8-desktop")
    assert kinds(lineup.lineup(job, [fp16])[0]) == ["FP32", "FP16"]
    assert kinds(lineup.lineup(job, [fp32])[0]) == ["FP32"]


def test_engines_of_another_model_target_or_none_at_all_are_left_alone(job: Job, tmp_path: Path) -> None:
    int8 = plan_of(tmp_path, "net-int8-desktop")
    plan_of(tmp_path, "other-fp32-desktop", precision="fp32", made_from={"model": "o" * 64})
    plan_of(tmp_path, "net-fp32-orin", precision="fp32", target="jetson-agx-orin")
    damaged = plan_of(tmp_path, "net-fp16-desktop", precision="fp16")
    damaged.path.write_bytes(b"cut")
    entries, notes = lineup.lineup(job, [int8])
    assert kinds(entries) == ["INT8"]
    assert len(notes) == 3


def test_a_gpu_without_tf32_is_not_asked_for_it(job: Job, tmp_path: Path) -> None:
    xavier = plan_of(tmp_path, "net-int8-jetson-xavier-nx", target="jetson-xavier-nx")
    assert [note.split(" engine")[0] for note in lineup.lineup(job, [xavier])[1]] == ["no FP32", "no FP16"]


def test_a_plan_with_tf32_is_not_called_fp32(tmp_path: Path) -> None:
    assert kind(plan_of(tmp_path, "a", precision="fp32", options={"tf32": True})) == "FP32 TF32"
    assert kind(plan_of(tmp_path, "b", precision="fp32")) == "FP32"
    assert kind(plan_of(tmp_path, "c", options={"tf32": True})) == "INT8"  # what is not quantized may use it


def entry(kind: str, target: str = "cpu", folder: str = "a") -> Entry:
    return Entry(kind, target, folder, lambda *_: pytest.fail("opened"))


def test_names_say_no_more_than_tells_them_apart() -> None:
    assert names([entry("FP32"), entry("INT8")]) == ["FP32", "INT8"]
    both = [entry("FP32"), entry("FP32", "rtx"), entry("INT8")]
    assert names(both) == ["FP32 cpu", "FP32 rtx", "INT8 cpu"]
    assert names([entry("INT8"), entry("INT8", folder="b")]) == ["INT8 a", "INT8 b"]
    with pytest.raises(UsageError, match="twice"):
        names([entry("INT8"), entry("INT8")])


class Opened(Runner):
    """Answers at once; ``alive`` are those that were not closed."""

    batch, input_size = None, 32
    alive: list[Opened] = []
    sizes: list[int] = []

    def __init__(self) -> None:
        Opened.alive.append(self)

    def _run(self, pixels: np.ndarray) -> np.ndarray:
        Opened.sizes.append(len(pixels))
        return np.zeros((len(pixels), 4), np.float32)

    def close(self) -> None:
        Opened.alive.remove(self)


class Gpu(Opened):
    largest = 32

    def split(self, pixels: np.ndarray) -> dict[str, float]:
        self.infer(pixels)
        return {"copy_in": 0.1, "compute": 1.0, "copy_out": 0.1}

    def repeat(
        self, pixels: np.ndarray, go_on: Callable[[dict[str, float]], bool], transfers: bool, spin: bool
    ) -> None:
        while go_on({**self.split(pixels), **({} if transfers else {"copy_in": 0.0, "copy_out": 0.0})}):
            time.sleep(0.001)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Settings of the plans that were opened by a fake of TensorRT 10.3."""
    found: list[dict[str, Any]] = []

    def open_runner(path: Path, name: str, threads: int | None = None, **settings: Any) -> Runner:
        found.append({"path": path, "name": name, "threads": threads, **settings})
        return Gpu()

    class Tool:
        @staticmethod
        def version() -> str:
            return "10.3.0"

    for module in ("edgeres.lineup", "edgeres.build"):
        monkeypatch.setattr(f"{module}.open_runner", open_runner)
    monkeypatch.setattr("edgeres.build.executor", lambda name: Tool)
    monkeypatch.setattr("edgeres.build.devices.gpus", list)
    Opened.alive.clear()
    Opened.sizes.clear()
    return found


def test_a_record_has_its_title_and_its_notes(job: Job, engine: Engine) -> None:
    record = lineup.run(job, [engine], Plan())
    assert record["title"] == "tiny-int8-cpu on cpu, 32 x 32"
    assert list(record["runners"]) == ["FP32", "INT8"]
    assert (record["batch"], record["notes"]) == (1, [NO_FP16])
    assert record["sources"] == {"FP32": "tiny.onnx", "INT8": "tiny-int8-cpu"}
    assert record["speedup"]["INT8"]["of_p50"] > 0
    json.dumps(record)
    known = Engine(engine.path, {**engine.record, "depth": 50})
    assert lineup.run(job, [known], Plan())["title"] == "resnet50 v1.5 on cpu, 32 x 32"


def called(record: dict[str, Any], engine: Engine) -> list[str | None]:
    """What a result calls FP32 and ``engine`` in a record, None without times."""
    sides = lineup.of_baseline(record, engine), lineup.of_engine(record, engine)
    assert all(("name" in side) == bool(side["latency_ms"]) for side in sides)
    return [side.get("name") for side in sides]


def test_what_is_not_fp32_is_no_baseline_of_a_result(job: Job, tmp_path: Path, opened: list[dict[str, Any]]) -> None:
    int8 = plan_of(tmp_path, "net-int8-desktop")
    assert called(lineup.run(job, [int8], Plan()), int8) == [None, "INT8"]
    plan_of(tmp_path, "net-fp16-desktop", precision="fp16")
    tf32 = plan_of(tmp_path, "net-fp32-tf32-desktop", precision="fp32", options={"tf32": True})
    record = lineup.run(job, [int8], Plan())
    assert list(record["runners"]) == ["FP32 TF32", "FP16", "INT8"]
    assert (called(record, int8), called(record, tf32)) == ([None, "INT8"], [None, "FP32 TF32"])
    plan_of(tmp_path, "net-fp32-desktop", precision="fp32")
    record = lineup.run(job, [tf32], Plan())
    assert called(record, tf32) == ["FP32", "FP32 TF32"]


def test_a_result_takes_the_times_of_its_own_engine(job: Job, tmp_path: Path, opened: list[dict[str, Any]]) -> None:
    one, other = plan_of(tmp_path, "a/net", precision="fp16"), plan_of(tmp_path, "b/net")
    record = lineup.run(job, [one, other], Plan())
    assert [called(record, engine)[1] for engine in (one, other)] == ["FP16", "INT8"]
    twins = [plan_of(tmp_path, f"twins/{name}") for name in ("mse", "minmax")]
    record = lineup.run(job, twins, Plan())
    assert [called(record, engine) for engine in twins] == [[None, "INT8 mse"], [None, "INT8 minmax"]]
    both = []
    for target in ("desktop", "jetson-agx-orin"):
        plan_of(tmp_path, f"both/net-fp32-{target}", precision="fp32", target=target)
        both.append(plan_of(tmp_path, f"both/net-int8-{target}", target=target))
    record = lineup.run(job, both, Plan())
    assert [called(record, engine)[0] for engine in both] == ["FP32 desktop", "FP32 jetson-agx-orin"]
    assert [called(record, engine)[1] for engine in both] == ["INT8 desktop", "INT8 jetson-agx-orin"]


def test_runners_are_closed_also_when_one_does_not_open(
    job: Job, tmp_path: Path, opened: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    int8, fp32 = plan_of(tmp_path, "net-int8-desktop"), plan_of(tmp_path, "net-fp32-desktop", precision="fp32")
    lineup.run(job, [int8, fp32], Plan())
    assert len(opened) == 2
    assert Opened.alive == []
    stale = Engine(int8.path, {**int8.record, "built_with": {"tensorrt": "8.6.1"}})
    with pytest.raises(StaleError, match="is for tensorrt"):
        lineup.run(job, [stale, fp32], Plan())
    assert len(opened) == 3
    assert Opened.alive == []


def test_a_preset_opens_plans_for_a_cuda_graph_with_their_own_settings(
    job: Job, tmp_path: Path, opened: list[dict[str, Any]]
) -> None:
    plan = plan_of(tmp_path, "net-int8-desktop", options={"dla_core": 1, "tf32": False, "version_compatible": False})
    record = lineup.run(job, [plan], Plan(preset="trtexec-11", seconds=0.01))
    settings = {"path": plan.path, "name": "tensorrt", "threads": None, "dla_core": 1, "version_compatible": False}
    assert opened == [{**settings, "cuda_graph": True}]
    assert record["runners"]["INT8"]["p50"] == 1.0
    lineup.run(job, [plan], Plan(preset="trtexec-10", seconds=0.01))
    assert opened[1:] == [{**settings, "cuda_graph": False}]
    stale = Engine(plan.path, {**plan.record, "built_with": {"tensorrt": "10.4.0"}})
    with pytest.raises(StaleError, match=r"tensorrt 10\.4\.0"):
        lineup.run(job, [stale], Plan(preset="trtexec-11"))


@pytest.mark.parametrize(
    ("cores", "streams", "share", "words"),
    [
        (8, 3, 2, "3 sessions on 8 cores of the CPU, each with 2 threads"),
        (2, 3, 1, "3 sessions on 2 cores of the CPU, each with 1 thread"),
        (1, 2, 1, "2 sessions on 1 core of the CPU, each with 1 thread"),
    ],
)
def test_streams_of_a_cpu_have_sessions_of_their_own_with_a_share_of_the_cores(
    job: Job,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    streams: int,
    share: int,
    words: str,
) -> None:
    opened: list[int | None] = []
    for module in ("edgeres.lineup", "edgeres.build"):
        monkeypatch.setattr(f"{module}.open_runner", lambda path, name, threads: opened.append(threads) or Opened())
    monkeypatch.setattr(lineup, "physical_cores", lambda: cores)
    record = lineup.run(job, [engine], Plan(streams=streams, seconds=0.01))
    assert opened == [share] * 2 * streams  # the FP32 model's too
    assert record["notes"] == [NO_FP16, words]
    assert Opened.alive == []
    opened.clear()
    assert lineup.run(job, [engine], Plan(seconds=0.01))["notes"] == [NO_FP16]
    assert opened == [None] * 2


def test_streams_of_a_gpu_share_a_runner(job: Job, tmp_path: Path, opened: list[dict[str, Any]]) -> None:
    record = lineup.run(job, [plan_of(tmp_path, "net-int8-desktop")], Plan(streams=3))
    assert [settings["threads"] for settings in opened] == [None]
    assert "sessions" not in " ".join(record["notes"])


def test_threads_that_share_a_core_count_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lineup, "CPUS", tmp_path)
    monkeypatch.setattr(lineup.os, "sched_getaffinity", lambda _: {0, 1, 2, 5}, raising=False)
    assert lineup.physical_cores() == 4  # where Linux tells nothing of them
    for cpu, siblings in {0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7", 5: "1,5"}.items():
        file = tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        file.parent.mkdir(parents=True)
        file.write_text(f"{siblings}\n")
    assert lineup.physical_cores() == 3
    monkeypatch.delattr(lineup.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(lineup, "cores", lambda: 7)
    assert lineup.physical_cores() == 7


def test_without_a_batch_it_is_that_of_the_engine(job: Job, tmp_path: Path, opened: list[dict[str, Any]]) -> None:
    lineup.run(job, [plan_of(tmp_path, "a-int8-desktop", batch=4)], Plan())
    assert set(Opened.sizes) == {4}
    record = lineup.run(job, [plan_of(tmp_path, "b-int8-desktop", batch=None)], Plan())
    assert record["batch"] == 1
    assert "pieces" not in " ".join(record["notes"])


def test_a_batch_above_what_the_plan_takes_is_said(job: Job, tmp_path: Path, opened: list[dict[str, Any]]) -> None:
    record = lineup.run(job, [plan_of(tmp_path, "net-int8-desktop")], Plan((1, 64)))
    assert "INT8 takes 32 images at a time: 64 go through in pieces" in record["notes"]


def test_random_pixels_are_what_preprocessing_makes_of_bytes(engine: Engine) -> None:
    preprocess = Preprocess(crop=8, resize=8)
    pixels = random_pixels(3, preprocess)
    assert (pixels.dtype, pixels.shape) == (np.float32, (3, 3, 8, 8))
    mean, std = (np.asarray(v).reshape(3, 1, 1) for v in (preprocess.mean, preprocess.std))
    raw = (pixels * std + mean) * 255
    np.testing.assert_allclose(raw, np.rint(raw), atol=1e-3)
    assert (raw.min() >= -1e-3, raw.max() <= 255.001) == (True, True)
    assert raw.std() > 60
    np.testing.assert_array_equal(pixels, random_pixels(3, preprocess))
    assert (pixels != random_pixels(3, preprocess, seed=1)).any()


def edgeres(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def test_the_command_prints_one_table_and_keeps_the_record(workspace: Path, engine: Engine) -> None:
    done = edgeres("benchmark", engine.path.parent, "--batch", "2,1", "--seconds", "0.01", "-o", "out/latency.json")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].endswith("on cpu, 32 x 32, batches 2, 1")
    assert [line.split()[:2] for line in lines[2:6]] == [["2", "FP32"], ["2", "INT8"], ["1", "FP32"], ["1", "INT8"]]
    assert max(map(len, lines[:6])) <= 80
    record = json.loads((workspace / "out" / "latency.json").read_text())
    assert [point["batch"] for point in record["sweep"]] == [2, 1]
    printed = edgeres("benchmark", engine.path.parent, "--seconds", "0.01", "--streams", "2", "--json")
    assert json.loads(printed.stdout)["streams"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "1,x"], "not a list of numbers"),
        (["--batch", "0"], "a batch of 0 images"),
        (["--seconds", "0"], "0.0 seconds"),
        (["--streams", "0"], "0 streams"),
        (["--preset", "trtexec-10"], "what trtexec measures on a GPU"),
        (["--preset", "trtexec-11", "--streams", "2"], "for one stream"),
        (["--data", "somewhere"], "for the accuracy of a --scenario"),
        (["--limit", "3", "--scenario", "offline"], "for the accuracy of a --scenario"),
        (["--scenario", "offline", "--batch", "2"], "has its own batches"),
        (["--scenario", "offline", "--streams", "1"], "has its own batches"),
    ],
)
def test_what_makes_no_sense_is_wrong_usage(workspace: Path, engine: Engine, arguments: list[str], words: str) -> None:
    failed = edgeres("benchmark", engine.path.parent, *arguments)
    assert failed.exit_code == 2, failed.output
    assert words in failed.stderr
    assert failed.stdout == ""


def test_an_engine_that_is_not_there_is_named(workspace: Path) -> None:
    failed = edgeres("benchmark", "engines/out/nothing")
    assert failed.exit_code == 1
    assert "no engine at engines/out/nothing" in failed.stderr
