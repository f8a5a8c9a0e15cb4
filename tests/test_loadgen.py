from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edgeres import loadgen
from edgeres.build import RECORD, Engine, build
from edgeres.cli import cli
from edgeres.errors import InputError, MissingDependency, UsageError
from edgeres.layouts import open_images
from edgeres.loader import Loader
from edgeres.loadgen import SCENARIOS, Library, accuracy, of_images, of_noise, performance
from edgeres.recipe import Preprocess
from edgeres.runners import Runner, open_runner
from edgeres.targets import load_target

try:
    import mlperf_loadgen  # noqa: F401
except ImportError:
    THERE = False
else:
    THERE = True

real = pytest.mark.skipif(not THERE, reason="mlcommons-loadgen is not installed; it has wheels for x86-64 alone")


class Answering(Runner):
    """Answers with the class that an image's first pixel is, modulo 1,000, after ``seconds``; keeps the batches."""

    input_size = 2

    def __init__(self, seconds: float = 0.0, batch: int | None = None) -> None:
        self.seconds, self.batch, self.calls = seconds, batch, list[int]()

    def _run(self, pixels: np.ndarray) -> np.ndarray:
        self.calls.append(len(pixels))
        time.sleep(self.seconds)
        return np.eye(1000, dtype=np.float32)[pixels[:, 0, 0, 0].astype(int) % 1000]

    def close(self) -> None: ...


def numbered(count: int, labels: tuple[int, ...] | None = None) -> Library:
    """Images whose first pixel is their place."""

    def read(places: Any) -> np.ndarray:
        pixels = np.zeros((len(places), 3, 2, 2), np.float32)
        pixels[:, 0, 0, 0] = places
        return pixels

    return Library(count, read, labels)


@pytest.fixture
def engine(tmp_path: Path, tiny_path: Path) -> Engine:
    return build(tiny_path, tmp_path / "engines" / "out" / "tiny-fp32-cpu", "cpu", load_target("cpu"))


@real
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_loadgen_measures_a_real_network(
    tiny_path: Path, preprocess: Preprocess, tmp_path: Path, scenario: str
) -> None:
    with open_runner(tiny_path, "onnxruntime") as runner:
        record = performance(runner, of_noise(preprocess), scenario, tmp_path / "logs", seconds=1)
    assert (record["scenario"], record["seconds"], record["images"], record["random"]) == (scenario, 1, 64, True)
    assert record["images_per_second"] > 0
    assert record["loadgen"].count(".") >= 1
    assert record["deviations"][:3] == ["1 of 600 s", "random pixels", "64 of 1,024 images in memory"]
    log = (tmp_path / "logs" / "mlperf_log_detail.txt").read_text()
    assert f'"effective_scenario", "value": "{SCENARIOS[scenario]}"' in log
    assert '"effective_performance_sample_count", "value": 64,' in log
    assert (tmp_path / "logs" / "mlperf_log_summary.txt").is_file()
    if scenario == "offline":
        assert (record["queries"], record["latency_ms"], record["early_stopping"]) == (1, None, None)
    else:
        assert record["queries"] > 10
        assert 0 < record["latency_ms"]["p50"] <= record["latency_ms"]["p99"] <= record["latency_ms"]["p99.9"]
        assert record["early_stopping"]["percentile"] == (90 if scenario == "single-stream" else 99)


@real
@pytest.mark.parametrize(("scenario", "images"), [("single-stream", 1), ("multi-stream", 8), ("offline", 32)])
def test_a_query_is_one_call_of_as_many_images_as_the_scenario_has(tmp_path: Path, scenario: str, images: int) -> None:
    runner = Answering(0.001)
    record = performance(runner, numbered(40), scenario, tmp_path, seconds=0.2)
    assert set(runner.calls) <= ({images} if scenario != "offline" else set(range(1, 33)))
    assert runner.calls.count(images) > 5
    if scenario != "offline":
        assert len(runner.calls) - loadgen.TRIES == record["queries"]
        assert record["latency_ms"]["p50"] >= 1
        assert record["images_per_second"] <= 1000 * images


@real
def test_offline_takes_the_batch_that_a_runner_is_made_for(tmp_path: Path) -> None:
    fixed, usual = Answering(0.001, batch=4), Answering(0.001)
    usual.usual = 16  # type: ignore[attr-defined]
    for runner, images in ((fixed, 4), (usual, 16)):
        performance(runner, numbered(40), "offline", tmp_path, seconds=0.1)
        assert runner.calls[0] == images == max(runner.calls)


def nanoseconds(pattern: str, summary: str) -> int:
    """The number that LoadGen's own summary has there."""
    found = re.search(pattern, summary)
    assert found, summary
    return int(found[1])


@real
def test_early_stopping_is_read_from_the_log(tmp_path: Path) -> None:
    runner = Answering(0.001)
    enough = performance(runner, numbered(40), "single-stream", tmp_path / "a", seconds=0.5)
    summary = (tmp_path / "a" / "mlperf_log_summary.txt").read_text()
    assert enough["valid"] is ("Result is : VALID" in summary) is True
    found = enough["early_stopping"]
    assert found["met"] is True
    assert found["latency_ms"] == round(nanoseconds(r"90\.0th percentile estimate: (\d+)", summary) / 1e6, 4)
    assert enough["latency_ms"]["p90"] <= found["latency_ms"] <= enough["latency_ms"]["p99.9"]
    written = nanoseconds(r"90\.00 percentile latency \(ns\) +: (\d+)", summary)
    assert enough["latency_ms"]["p90"] == round(written / 1e6, 4)
    short = performance(runner, numbered(40), "multi-stream", tmp_path / "b", seconds=0.1)
    assert short["early_stopping"] == {"met": False, "percentile": 99, "latency_ms": None}
    assert short["valid"] is False
    assert short["deviations"][-1].startswith("LoadGen calls it invalid (Only processed")


@real
def test_a_runner_that_becomes_faster_still_has_queries_until_the_end(tmp_path: Path) -> None:
    class Waking(Answering):
        def _run(self, pixels: np.ndarray) -> np.ndarray:
            time.sleep(0.0025 if len(self.calls) < loadgen.TRIES else 0)  # LoadGen itself bears twice
            return super()._run(pixels)

    assert performance(Waking(0.001), numbered(40), "single-stream", tmp_path, seconds=0.3)["valid"]


@real
def test_settings_are_those_of_mlperf_unless_shortened() -> None:
    lg = pytest.importorskip("mlperf_loadgen")
    found = {scenario: loadgen._settings(lg, scenario) for scenario in SCENARIOS}
    assert {s.min_duration_ms for s in found.values()} == {600_000}
    assert {s.performance_sample_count_override for s in found.values()} == {1024}
    assert found["single-stream"].single_stream_target_latency_percentile == 0.9
    assert found["multi-stream"].multi_stream_target_latency_percentile == 0.99
    assert found["multi-stream"].multi_stream_samples_per_query == 8
    assert found["multi-stream"].min_query_count == 662
    assert found["offline"].min_query_count == 24_576
    assert found["offline"].qsl_rng_seed != 0


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_test_prepares_more_than_the_tries_say_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenario: str
) -> None:
    asked = SimpleNamespace(min_duration_ms=600_000, performance_sample_count_override=1024, min_query_count=1)

    def start(*_: Any) -> Any:
        raise OSError("started")

    monkeypatch.setattr(loadgen, "need", lambda *_: SimpleNamespace(TestMode=SimpleNamespace(PerformanceOnly=0)))
    monkeypatch.setattr(loadgen, "_settings", lambda *_: asked)
    monkeypatch.setattr(loadgen._System, "try_out", lambda _: 0.02)
    monkeypatch.setattr(loadgen._System, "start", start)
    with pytest.raises(OSError, match="started"):
        performance(Answering(batch=8), numbered(40), scenario, tmp_path)
    images = 1 if scenario == "single-stream" else 8
    assert asked.offline_expected_qps == pytest.approx(1.2 * images / 0.02)  # one that ends too early is invalid
    assert asked.single_stream_expected_latency_ns == asked.multi_stream_expected_latency_ns == 0.01e9


@real
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_accuracy_is_what_the_runner_answers(tmp_path: Path, scenario: str) -> None:
    labels = tuple(i if i % 4 else 999 for i in range(70))  # a quarter is wrong
    record = accuracy(Answering(), numbered(70, labels), scenario, tmp_path / "logs")
    assert record == {"top1": pytest.approx(100 * 52 / 70), "images": 70, "logs": str(tmp_path / "logs")}
    rows = json.loads((tmp_path / "logs" / "mlperf_log_accuracy.json").read_text())
    assert {row["qsl_idx"] for row in rows} == set(range(70))


@real
def test_more_images_than_fit_in_memory_come_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    library = numbered(1100, tuple(i % 1000 for i in range(1100)))

    def counted(places: Any) -> np.ndarray:
        read.extend(places)
        return library.read(places)

    assert accuracy(Answering(), replace(library, read=counted), "offline", tmp_path)["top1"] == 100
    log = (tmp_path / "mlperf_log_detail.txt").read_text()
    assert log.count('"loaded_qsl_set"') == 2
    assert set(read) == set(range(1100))


@real
def test_real_images_are_judged_as_a_loop_over_them_does(
    tiny_path: Path, preprocess: Preprocess, val_folder: Path, tmp_path: Path
) -> None:
    images = open_images(val_folder)
    with open_runner(tiny_path, "onnxruntime") as runner:
        batches = list(Loader(images, preprocess))
        hits = sum(int((runner.infer(b.pixels).argmax(1) == b.labels).sum()) for b in batches)
        found = accuracy(runner, of_images(images, preprocess), "single-stream", tmp_path)
    assert found["top1"] == 100 * hits / len(images)


@real
@pytest.mark.parametrize("failure", [OSError("unplugged"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("where", ["run", "read"])
def test_what_goes_wrong_in_a_test_comes_out_and_leaves_no_logs(
    tmp_path: Path, failure: BaseException, where: str
) -> None:
    runner, library = Answering(0.001), numbered(40)

    def broken(*_: Any) -> Any:
        raise failure

    def after_tries(pixels: np.ndarray) -> np.ndarray:
        return broken() if len(runner.calls) > loadgen.TRIES + 3 else Answering._run(runner, pixels)

    def after_one(places: Any) -> np.ndarray:
        return library.read(places) if len(places) == 1 else broken()

    tested = library
    if where == "run":
        runner._run = after_tries  # type: ignore[method-assign]
    else:
        tested = replace(library, read=after_one)
    start = time.perf_counter()
    with pytest.raises(type(failure)):
        performance(runner, tested, "single-stream", tmp_path / "logs", seconds=20)
    assert time.perf_counter() - start < 10  # the rest is answered at once
    assert not (tmp_path / "logs").exists()
    runner = Answering(0.001)
    assert performance(runner, library, "single-stream", tmp_path / "logs", seconds=0.1)["queries"] > 10


@real
def test_a_process_whose_test_failed_ends_as_usual(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_loadgen import Answering, numbered\n"
        "from edgeres.loadgen import performance\n"
        "class Broken(Answering):\n"
        "    def _run(self, pixels):\n"
        "        if len(self.calls) > 10: raise OSError('unplugged')\n"
        "        return super()._run(pixels)\n"
        "performance(Broken(), numbered(40), 'single-stream', pathlib.Path('logs'), 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1  # not the 134 of an abort
    assert done.stderr.rstrip().endswith("OSError: unplugged")


@real
def test_a_file_in_the_current_folder_does_not_change_the_settings(tmp_path: Path) -> None:
    Path("audit.config").write_text("*.*.min_query_count = 5\n*.*.max_query_count = 5\n")
    found = performance(Answering(0.001), numbered(40), "single-stream", tmp_path / "logs", seconds=0.2)
    assert found["queries"] > 5


@real
def test_old_logs_make_room(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "old").write_text("")
    performance(Answering(0.001), numbered(40), "single-stream", tmp_path / "logs", seconds=0.1)
    assert not (tmp_path / "logs" / "old").exists()


def test_without_the_package_the_extra_is_named(
    engine: Engine, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    with pytest.raises(MissingDependency) as error:
        performance(Answering(), numbered(40), "offline", workspace)
    assert error.value.hint == 'pip install "edgeres[loadgen]"'
    failed = edgeres("benchmark", engine.path.parent, "--scenario", "offline")
    assert failed.exit_code == 1
    assert "edgeres[loadgen]" in failed.stderr


def test_an_old_loadgen_that_does_not_know_the_settings_is_refused() -> None:
    class Old:
        class TestSettings:
            def FromConfig(self, path: str, model: str, scenario: str, is_mlperf_conf: bool) -> int:  # noqa: N802
                return -2

    with pytest.raises(Exception, match="does not know MLPerf's settings"):
        loadgen._settings(Old, "offline")


@pytest.mark.parametrize("content", [None, "", ":::MLLOG {", ':::MLLOG {"value": 1}'])
def test_a_log_that_is_none_is_an_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "mlperf_log_detail.txt"
    if content is not None:
        path.write_text(content)
    if content == "":
        assert loadgen._log(path) == {}
        return
    with pytest.raises(InputError, match="cannot read LoadGen's log"):
        loadgen._log(path)


def test_of_a_key_that_a_log_has_twice_the_last_counts(tmp_path: Path) -> None:
    lines = [f':::MLLOG {{"key": "{key}", "value": {value}}}' for key, value in (("a", 1), ("b", 2), ("a", 3))]
    (tmp_path / "log").write_text("\n".join(["other", *lines]))
    assert loadgen._log(tmp_path / "log") == {"a": 3, "b": 2}


def record(**changes: Any) -> dict[str, Any]:
    return {
        "precision": "int8",
        "target": "jetson-agx-orin-dla",
        "scenario": "single-stream",
        "early_stopping": {"met": True, "percentile": 90, "latency_ms": 1234.567},
        "latency_ms": {"p50": 1111.111, "p99": 2222.222},
        "images_per_second": 12345.678,
        "queries": 1234567,
        "accuracy": {"top1": 75.6949},
        "deviations": [],
        "logs": "engines/out/x",
        **changes,
    }


def shown(*records: dict[str, Any]) -> list[str]:
    from io import StringIO

    from rich.console import Console

    console = Console(width=200, file=StringIO())
    console.print(loadgen.table(list(records)))
    return str(console.file.getvalue()).splitlines()  # type: ignore[attr-defined]


def test_the_table_fits_80_columns_and_says_whose_word_it_is() -> None:
    lines = shown(record())
    assert lines[0] == "MLPerf-style single-stream on jetson-agx-orin-dla, unverified by MLCommons"
    assert max(map(len, lines)) <= 80
    assert lines[2].split() == ["INT8", "1234.567", "1111.111", "2222.222", "12,345.7", "1,234,567", "75.69"]
    assert lines[3:] == ["INT8: logs in engines/out/x"]


def test_engines_of_several_targets_are_named_with_theirs() -> None:
    lines = shown(record(), record(target="cpu", precision="fp32"))
    assert " on jetson-agx-orin-dla and cpu, " in lines[0]
    assert lines[2].startswith("INT8 jetson-agx-orin-dla ")
    assert lines[3].startswith("FP32 cpu ")


def test_the_table_says_why_a_run_is_not_valid() -> None:
    early = {"met": False, "percentile": 99, "latency_ms": None}
    lines = shown(record(early_stopping=early, deviations=["1 of 600 s", "random pixels"], accuracy=None))
    assert "MLPerf p99 ms" in lines[1]
    assert "top-1 %" not in lines[1]
    assert "too short" in lines[2]
    assert lines[3] == "INT8: not a valid MLPerf run: 1 of 600 s; random pixels"


def test_offline_shows_images_per_second_alone() -> None:
    lines = shown(record(scenario="offline", early_stopping=None, latency_ms=None, accuracy=None))
    assert lines[1].split() == ["images/s"]
    assert lines[2].split() == ["INT8", "12,345.7"]


def edgeres(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


@real
def test_the_command_measures_judges_and_keeps_the_logs_in_the_engines_folder(
    engine: Engine, workspace: Path, val_folder: Path
) -> None:
    folder = engine.path.parent
    done = edgeres(
        "benchmark", folder, "--scenario", "single-stream", "--seconds", "0.3", "--data", val_folder, "--limit", "20"
    )
    assert done.exit_code == 0, done.output
    assert "top-1 %" in done.stdout
    assert "not a valid MLPerf run: 0.3 of 600 s; 20 of 50,000 images; 20 of 1,024 images in memory" in " ".join(
        done.stdout.split()
    )
    assert "4 classes, resnet v1.5 at 32 x 32, for 1000, resnet50 v1.5 at 224" in " ".join(done.stdout.split())
    kept = json.loads((folder / "loadgen" / "single-stream" / "result.json").read_text())
    assert (kept["images"], kept["accuracy"]["images"], kept["precision"]) == (20, 20, "fp32")
    assert (folder / "loadgen" / "single-stream" / "performance" / "mlperf_log_summary.txt").is_file()
    assert (folder / "loadgen" / "single-stream" / "accuracy" / "mlperf_log_accuracy.json").is_file()
    noise = edgeres("benchmark", folder, "--scenario", "offline", "--seconds", "0.1", "--json", "-o", "runs.json")
    (value,) = json.loads(noise.stdout)
    assert (value["random"], value["accuracy"]) == (True, None)
    assert json.loads(Path("runs.json").read_text()) == [value]


@real
def test_images_without_labels_are_refused_before_the_test(
    engine: Engine, workspace: Path, val_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "list.txt").write_text("\n".join(str(p) for p in val_folder.rglob("*.png")))
    failed = edgeres("benchmark", engine.path.parent, "--scenario", "offline", "--data", tmp_path / "list.txt")
    assert failed.exit_code == 2, failed.output
    assert "no labels" in failed.stderr
    assert not (engine.path.parent / "loadgen").exists()
    with pytest.raises(UsageError, match="labels"):
        accuracy(Answering(), numbered(4), "offline", tmp_path)


@real
def test_mlperfs_own_network_at_its_own_settings_has_no_deviation_but_time(engine: Engine, tmp_path: Path) -> None:
    record = {**engine.record, "depth": 50, "variant": "v1.5", "classes": 1000}
    record["preprocess"] = {**record["preprocess"], "crop": 224}
    assert loadgen._other_network(record) == ""
    for change in ({"depth": 18}, {"variant": "v1"}, {"classes": 10}):
        assert "resnet50 v1.5 at 224" in loadgen._other_network({**record, **change})
    whole = numbered(50_000)
    found = performance(Answering(0.001), whole, "single-stream", tmp_path, seconds=0.3)
    assert found["deviations"] == ["0.3 of 600 s"]


def test_the_command_line_knows_every_scenario() -> None:
    (option,) = [p for p in cli.commands["benchmark"].params if p.name == "scenario"]
    assert set(option.type.choices) == set(SCENARIOS)  # type: ignore[attr-defined]


def test_the_record_of_an_engine_has_what_a_result_needs(engine: Engine) -> None:
    assert {"precision", "target", "preprocess", "classes"} <= set(
        json.loads((engine.path.parent / RECORD).read_text())
    )


@real
@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_no_time_at_all_is_refused(tmp_path: Path, seconds: float) -> None:
    with pytest.raises(UsageError, match="seconds"):
        performance(Answering(), numbered(4), "offline", tmp_path, seconds)
