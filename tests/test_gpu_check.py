"""The kit for machines with a GPU, on one without: its frame for real, its parts with what can be had of a GPU."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_resnet

from edgeres import devices, runners
from edgeres.calibrate import RangeTable, TensorRange
from edgeres.errors import BuildError, MissingDependency
from edgeres.loader import Batch
from edgeres.model import Bottleneck, ResNet, describe, resnet

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu"
MADE_UP = """
import os, signal, subprocess, sys, time
from outcome import Skip, left, so_far, under_way

def look(work):
    gpu = {"name": "Made Up", "capability": "8.9"}
    return {"why": "", "machine": {"gpus": [gpu]}, "conditions": {}, "versions": {}}

def well(work, **arguments):
    return {"gmacs": 4.1, "calibration": "nothing", **arguments}

def crash(work):
    under_way(work, "a crash")
    os.kill(os.getpid(), signal.SIGSEGV)

def fussy(work, without=()):
    if "bad" not in without:
        under_way(work, "bad")
        os.kill(os.getpid(), signal.SIGABRT)
    return {"without": list(without)}

def slow(work):
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (work / "pid").write_text(str(grandchild.pid))
    under_way(work, "sleep")
    time.sleep(60)

def complain(work):
    print("first of all")
    raise ZeroDivisionError("by zero")

def hang(work):
    assert 0 < left() < 3
    so_far(work, "hang", {"rate": 7, "bad": float("nan")})
    under_way(work, "the second thing")
    time.sleep(60)

def refuse(work):
    raise Skip("not here")

def late_crash(work):
    import atexit
    atexit.register(os.kill, os.getpid(), signal.SIGSEGV)
    return {"gmacs": 1}

def partly(work):
    return {"skipped": {"one thing": "no room"}, "checks": {"it works": True}}
"""


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A module of the kit, which is scripts beside one another."""
    monkeypatch.syspath_prepend(str(GPU))
    return importlib.import_module


@pytest.fixture
def frame(kit: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The entry, with parts from `MADE_UP` on a machine that says it has a GPU."""
    (tmp_path / "made_up.py").write_text(MADE_UP, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check, Part = kit("check"), kit("parts").Part
    monkeypatch.setattr(check, "PROBE", Part("machine", "made_up:look"))
    work = tmp_path / "work"

    def part(call: str, name: str = "", **more: Any) -> Any:
        return Part(name or call, f"made_up:{call}", **{"limit": 20.0, "least": 0.0, **more})

    def run(*todo: Any, limit_s: float = 60.0) -> dict[str, Any]:
        return check.check(list(todo), work, check.environment(None), time.monotonic(), limit_s)

    return SimpleNamespace(check=check, part=part, run=run, work=work)


def test_without_a_gpu_every_part_is_skipped_with_the_reason(tmp_path: Path, kit: Callable[[str], Any]) -> None:
    path, start = tmp_path / "out" / "gpu.json", time.monotonic()
    done = subprocess.run(
        [sys.executable, str(GPU / "check.py"), "-o", str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - start < 15
    result = json.loads(path.read_text(encoding="utf-8"))
    names = [part.name for part in kit("parts").parts(480)]
    assert (result["status"], result["failed"], list(result["parts"])) == ("ok", [], names)
    assert [s["part"] for s in result["skipped"]] == names
    reason = result["skipped"][0]["reason"]
    assert {s["reason"] for s in result["skipped"]} == {reason}
    assert "driver" in reason or "device" in reason.lower()
    assert max(map(len, done.stdout.replace(str(path), "").splitlines())) <= 80
    assert reason[:30] in done.stdout
    assert "parts: 0 ok, 0 failed" in done.stdout
    assert result["machine"]["cores"]
    assert torch.__version__.startswith(result["versions"]["torch"])  # which may add what CUDA it is for


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--limit-s", "0"], "--limit-s 0"),
        (["--limit-s", "nan"], "--limit-s nan"),
        (["-o", "file.txt/gpu.json"], "cannot write file.txt/gpu.json"),
        (["-o", "."], "cannot write ."),
    ],
)
def test_wrong_usage_is_said_before_anything_is_done(
    frame: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    (tmp_path / "file.txt").write_text("", encoding="utf-8")
    monkeypatch.setattr(frame.check, "check", None)
    monkeypatch.setattr(sys, "argv", ["check.py", *arguments])
    with pytest.raises(SystemExit) as status:
        frame.check.main()
    assert status.value.code == 2
    assert said in capsys.readouterr().err


def test_a_part_that_crashes_fails_alone(
    frame: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(frame.check, "parts", lambda limit_s: [frame.part("crash"), frame.part("well")])
    monkeypatch.setattr(sys, "argv", ["check.py", "-o", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit) as status:
        frame.check.main()
    assert status.value.code == 1
    result = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert result["failed"] == [{"part": "crash", "reason": "died: SIGSEGV; at a crash"}]
    assert result["parts"]["well"]["status"] == "ok"
    out = capsys.readouterr().out
    assert "Made Up (8.9)" in out
    assert "died: SIGSEGV" in out
    assert "parts: 1 ok, 1 failed" in out


def test_a_part_that_takes_too_long_is_ended_with_what_it_started(frame: SimpleNamespace) -> None:
    start = time.monotonic()
    result = frame.run(frame.part("slow", limit=3.0), frame.part("well"))
    assert time.monotonic() - start < 20
    assert result["failed"] == [{"part": "slow", "reason": "ended after 3 s, its limit; at sleep"}]
    assert result["parts"]["well"]["status"] == "ok"
    pid = int((frame.work / "pid").read_text())
    state = Path(f"/proc/{pid}/stat")
    for _ in range(50):  # until whoever inherits it has buried it
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {pid} is still there")


def test_what_cannot_be_killed_does_not_keep_the_other_parts(
    frame: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    children, real, kill = list[Any](), subprocess.Popen, os.killpg

    def popen(*args: Any, **more: Any) -> Any:
        children.append(real(*args, **more))
        return children[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(frame.check, "ENDING", 0.1)
    monkeypatch.setattr(os, "killpg", lambda group, number: None)  # as where a driver holds it
    try:
        result = frame.run(frame.part("slow", limit=2.0), frame.part("well"))
        assert children[1].poll() is None
    finally:
        for child in children:
            with suppress(ProcessLookupError):
                kill(child.pid, signal.SIGKILL)
            child.wait()
    assert result["parts"]["slow"]["reason"] == "ended after 2 s, its limit; at sleep"
    assert result["parts"]["well"]["status"] == "ok"


def test_a_crash_after_the_work_keeps_what_was_measured(frame: SimpleNamespace) -> None:
    found = frame.run(frame.part("late_crash"))["parts"]["late_crash"]
    assert (found["status"], found["record"]) == ("failed", {"gmacs": 1})
    assert "SIGSEGV" in found["reason"]


def test_what_died_over_one_thing_is_tried_without_it_and_stays_failed(frame: SimpleNamespace) -> None:
    result = frame.run(frame.part("fussy", again=True), frame.part("fussy", "once"))
    found = result["parts"]["fussy"]
    assert (found["status"], found["record"]) == ("failed", {"without": ["bad"]})
    assert found["reason"] == "died: SIGABRT; at bad; tried again without it"
    assert result["parts"]["once"]["record"] == {}


def test_parts_that_lack_time_or_what_they_need_are_skipped(frame: SimpleNamespace) -> None:
    later = [frame.part("well", "after", needs=("refuse",)), frame.part("well", "long", least=100.0)]
    result = frame.run(frame.part("refuse"), *later, frame.part("partly"))
    reasons = {s["part"]: s["reason"] for s in result["skipped"]}
    assert reasons["refuse"] == "not here"
    assert reasons["after"] == "needs 'refuse': not here"
    assert reasons["long"].startswith("no time: ")
    assert reasons["partly"] == "one thing: no room"
    assert (result["status"], result["parts"]["partly"]["status"]) == ("ok", "ok")


def test_what_failed_but_can_be_used_is_what_others_need(frame: SimpleNamespace) -> None:
    part = frame.part("well", needs=("before",))
    failed = {"status": "failed", "reason": "so", "record": {}}
    assert frame.check.unmet(part, {"before": failed}) == "needs 'before': so"
    assert frame.check.unmet(part, {"before": {**failed, "record": {"usable": True}}}) == ""
    assert frame.check.unmet(part, {}) == ""


def test_an_interruption_keeps_what_was_found(frame: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    real = frame.check.retried

    def interrupted(part: Any, *more: Any) -> Any:
        if part.name == "second":
            raise KeyboardInterrupt
        return real(part, *more)

    monkeypatch.setattr(frame.check, "retried", interrupted)
    result = frame.run(*(frame.part("well", name) for name in ("first", "second", "third")))
    assert [part["status"] for part in result["parts"].values()] == ["ok", "failed", "skipped"]
    assert result["parts"]["third"]["reason"] == "interrupted"


def test_the_file_has_what_was_found_after_every_part(frame: SimpleNamespace) -> None:
    seen: list[dict[str, Any]] = []
    todo = [frame.part("well", "one"), frame.part("crash"), frame.part("well", "skipped", needs=("crash",))]
    env = frame.check.environment(None)
    last = frame.check.check(
        todo, frame.work, env, time.monotonic(), 60.0, lambda r: seen.append(json.loads(json.dumps(r)))
    )
    assert [[*r["parts"]] for r in seen] == [["one"], ["one", "crash"]]
    assert [r["status"] for r in [*seen, last]] == ["unfinished", "unfinished", "failed"]
    assert seen[0]["machine"]["gpus"][0]["name"] == "Made Up"


def test_who_ends_the_whole_still_gets_what_was_found(tmp_path: Path, frame: SimpleNamespace) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import check; from parts import Part\n"
        "check.PROBE = Part('machine', 'made_up:look')\n"
        "check.parts = lambda s: [Part(n, f'made_up:{n}', limit=50, least=0) for n in ('well', 'slow', 'partly')]\n"
        "check.main()\n"
    )
    path, work = tmp_path / "gpu.json", tmp_path / "kept"
    command = [sys.executable, "-c", script, str(GPU), "-o", str(path), "--work", str(work)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        for _ in range(200):
            if (work / "pid").exists():
                break
            time.sleep(0.1)
        kept = json.loads(path.read_text(encoding="utf-8"))
        assert (kept["status"], [*kept["parts"]]) == ("unfinished", ["well"])
        run.terminate()
        assert run.wait(20) == 1
    result = json.loads(path.read_text(encoding="utf-8"))
    assert [found["status"] for found in result["parts"].values()] == ["ok", "failed", "skipped"]
    assert result["parts"]["slow"]["reason"] == "interrupted"


def test_parts_that_were_ok_are_not_done_again(frame: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    todo = [frame.part("well"), frame.part("crash"), frame.part("fussy", again=True)]
    first = frame.run(*todo, frame.part("well", "late", least=100.0))
    assert [found["status"] for found in first["parts"].values()] == ["ok", "failed", "failed", "skipped"]
    capsys.readouterr()
    second = frame.run(*todo, frame.part("well", "late"))
    assert second["parts"]["well"] == first["parts"]["well"]
    assert second["parts"]["late"]["status"] == "ok"
    assert [found["status"] for found in second["parts"].values()] == ["ok", "failed", "failed", "ok"]
    assert capsys.readouterr().err.count("in an earlier run") == 1


def test_what_failed_before_and_nothing_needs_is_done_last(
    frame: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    needed, needs = frame.part("crash", "needed"), frame.part("well", "needs", needs=("needed",))
    first = frame.run(needed, frame.part("complain"), frame.part("hang", limit=2.0), needs)
    assert [found["status"] for found in first["parts"].values()] == ["failed", "failed", "failed", "skipped"]
    capsys.readouterr()
    second = frame.run(needed, frame.part("complain"), frame.part("well", "hang"), needs, frame.part("well", "new"))
    said = [line for line in capsys.readouterr().err.splitlines() if line.endswith("...")]
    assert said == ["needed ...", "hang ...", "new ...", "complain ..."]
    assert list(second["parts"]) == ["needed", "complain", "hang", "needs", "new"]


def test_a_failure_has_the_end_of_its_log(frame: SimpleNamespace) -> None:
    found = frame.run(frame.part("complain"), frame.part("well"))["parts"]
    assert found["complain"]["log"][0] == "first of all"
    assert "ZeroDivisionError: by zero" in found["complain"]["log"]
    assert "log" not in found["well"]
    assert (frame.work / "complain.log").read_text().startswith("first of all")


def test_what_a_part_kept_before_it_was_ended_is_in_the_file(frame: SimpleNamespace) -> None:
    found = frame.run(frame.part("hang", limit=3.0))["parts"]["hang"]
    assert (found["status"], found["record"]) == ("failed", {"rate": 7, "bad": None})
    assert found["reason"].startswith("ended after 3 s, its limit; at the second thing")


def test_every_part_names_a_function_and_what_comes_before_it(kit: Callable[[str], Any]) -> None:
    seen: set[str] = set()
    todo = kit("parts").parts(480)
    for part in todo:
        module, _, function = part.call.partition(":")
        names = getattr(kit(module), function).__code__.co_varnames
        assert {*part.arguments, *(["without"] if part.again else [])} <= {*names}, part.name
        assert {*part.needs} <= seen, part.name
        assert part.least <= part.limit, part.name
        seen.add(part.name)
    assert len(seen) == len(todo)
    assert [p.limit for p in kit("parts").parts(960)] == [2 * p.limit for p in todo]
    assert kit("parts").parts(60) == todo


def test_wheels_are_installed_once_without_a_network(
    kit: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, wheels = kit("check"), tmp_path / "wheels"
    monkeypatch.setattr(check, "ROOT", tmp_path)
    wheels.mkdir()
    with pytest.raises(SystemExit, match="no wheels in"):
        check.installed(wheels)
    with zipfile.ZipFile(wheels / "small_thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("small_thing.py", "VALUE = 7\n")
        wheel.writestr("small_thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: small-thing\nVersion: 1.0\n")
        tags = "Wheel-Version: 1.0\nGenerator: made up\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr("small_thing-1.0.dist-info/WHEEL", tags)
        wheel.writestr("small_thing-1.0.dist-info/RECORD", "")
    site = check.installed(wheels)
    seen = subprocess.run(
        [sys.executable, "-c", "import small_thing, edgeres; print(small_thing.VALUE)"],
        env=check.environment(site) | {"PYTHONPATH": f"{GPU.parents[1]}{os.pathsep}{site}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert seen.stdout == "7\n"
    assert str(site) in check.environment(site)["PYTHONPATH"]
    monkeypatch.setattr(subprocess, "run", None)
    assert check.installed(wheels) == site


@pytest.mark.parametrize(
    ("raised", "status", "reason"),
    [
        (MissingDependency("this needs the package 'x'", evidence="No module named 'x'"), "skipped", "package 'x' No"),
        (ModuleNotFoundError("No module named 'y'", name="y"), "skipped", "the package y is not installed"),
        (BuildError("TensorRT could not run", evidence="out of\nmemory"), "failed", "could not run out of memory"),
        (ZeroDivisionError("by zero"), "failed", "ZeroDivisionError: by zero"),
    ],
)
def test_what_a_part_raises_says_whether_it_failed(
    kit: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, raised: Exception, status: str, reason: str
) -> None:
    def part(work: Path) -> None:
        raise raised

    monkeypatch.setattr(kit("suite"), "run", part)
    found = kit("child").done(Path(), "suite:run", {})
    assert found["status"] == status
    assert reason in found["reason"]


def test_checks_that_are_not_met_fail_a_part_and_keep_its_record(
    kit: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"checks": {"this": True, "that": False}, "value": float("inf"), "more": [float("nan"), 1.5]}
    monkeypatch.setattr(kit("suite"), "run", lambda work: record)
    found = kit("child").done(Path(), "suite:run", {})
    assert (found["status"], found["reason"], found["record"]) == ("failed", "not so: that", record)
    assert kit("child").finite(record)["value"] is None
    assert kit("child").finite(record)["more"] == [None, 1.5]


SUITE = """
import pytest
pytestmark = pytest.mark.gpu
def test_one(): pass
@pytest.mark.skip(reason="no such card")
def test_two(): pass
"""


def test_the_tests_that_need_a_gpu_are_counted(kit: Callable[[str], Any], tmp_path: Path) -> None:
    suite, tests = kit("suite"), tmp_path / "tests"
    tests.mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n", encoding="utf-8")
    with pytest.raises(kit("outcome").Skip, match="no tests in"):
        suite.run(tmp_path, tests)
    (tests / "test_some.py").write_text(SUITE, encoding="utf-8")
    (tests / "test_other.py").write_text("def test_not_marked(): assert False\n", encoding="utf-8")
    found = suite.run(tmp_path, tests)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, [], {"1 tests": "no such card"})
    assert all(found["checks"].values())
    (tests / "test_some.py").write_text(SUITE + "def test_three(): assert 1 == 2\n", encoding="utf-8")
    found = suite.run(tmp_path, tests)
    assert (found["passed"], found["failed"]) == (1, ["tests.test_some::test_three"])
    assert "1 == 2" in found["messages"][0]
    assert list(found["checks"]) == ["pytest -m gpu passes (tests.test_some::test_three)"]
    assert not all(found["checks"].values())
    (tests / "test_some.py").write_text(SUITE.replace("def test_one(): pass\n", ""), encoding="utf-8")
    with pytest.raises(kit("outcome").Skip, match="all 1 tests skipped: no such card"):
        suite.run(tmp_path, tests)


HANGS = """
import os, pytest, warnings
pytestmark = pytest.mark.gpu
@pytest.mark.parametrize("what", ["a b", "c"])
def test_one(what): warnings.warn("of another version of a package")
@pytest.mark.skip(reason="no such card")
def test_two(): pass
def test_three(): assert 1 == 2
def test_four(): os._exit(3)
"""


def test_tests_before_one_that_ends_it_all_are_counted(kit: Callable[[str], Any], tmp_path: Path) -> None:
    suite, outcome, tests = kit("suite"), kit("outcome"), tmp_path / "tests"
    tests.mkdir()
    ini = "[pytest]\nmarkers = gpu: needs one\nfilterwarnings = error\n"
    (tmp_path / "pytest.ini").write_text(ini, encoding="utf-8")
    (tests / "test_some.py").write_text(HANGS, encoding="utf-8")
    with pytest.raises(RuntimeError, match="status 3 and no report"):
        suite.run(tmp_path, tests)
    found = outcome.record_of(tmp_path, "pytest -m gpu")
    assert (found["passed"], found["failed"]) == (2, ["tests/test_some.py::test_three"])
    assert [*found["skipped"]] == ["1 tests"]
    assert (
        kit("answers").line("pytest -m gpu", {"status": "ok", "reason": "", "record": found}) == "2 passed, 1 skipped"
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with a tiny network in place of ResNet-50."""
    work = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(GPU))
        patch.setattr("edgeres.model.resnet", tiny)
        importlib.import_module("nets").make(work, "v1.5", crop=32)
    return work


def tiny(depth: int = 50, variant: str = "v1.5") -> ResNet:
    """Eight times narrower than ResNet-50, and four bottlenecks deep."""
    return tiny_resnet({"v1": "1x1", "v1.5": "3x3"}[variant])


def test_models_are_made_and_loaded_again(
    kit: Callable[[str], Any], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeres.model.resnet", tiny)
    nets = kit("nets")
    model, record = nets.load(models, "v1.5")
    assert (record["crop"], record["weights"]) == (32, "random, seed 0")
    branches = [m.bn3.weight for m in model.modules() if isinstance(m, Bottleneck)]
    assert all(torch.allclose(w, torch.full_like(w, nets.BRANCH)) for w in branches)
    seen = torch.from_numpy(np.concatenate([nets.pixels(8, 32, 100 + seed) for seed in range(nets.IMAGES // 8)]))
    with torch.no_grad():
        average = model.conv1(seen).mean((0, 2, 3))
    np.testing.assert_allclose(model.bn1.running_mean, average, rtol=1e-3, atol=1e-4)  # of all batches alike
    with np.load(models / "models" / "v1.5.npz") as kept, torch.no_grad():
        expected = model(torch.from_numpy(kept["pixels"])).numpy()
        np.testing.assert_allclose(kept["fp32"], expected, rtol=1e-3, atol=1e-4)
        assert not np.array_equal(kept["int8"], kept["fp32"])


def test_what_is_counted_of_a_network_is_what_edgeres_describes(kit: Callable[[str], Any]) -> None:
    for variant, gmacs in (("v1", 3.86), ("v1.5", 4.09)):
        with torch.device("meta"):
            model = resnet(50, variant).eval()
            found = kit("nets").layers(model, 224)
            assert sum(layer["macs"] for layer in found) == sum(part.macs for part in describe(model))
        assert sum(layer["macs"] for layer in found) / 1e9 == pytest.approx(gmacs, abs=0.01)
        assert len(found) == 53 + 1 + 16
        assert sum(layer["weights"] for layer in found) == pytest.approx(25.5e6, rel=0.01)
    assert found[0] == {"macs": 118013952, "read": 3 * 224**2, "written": 64 * 112**2, "weights": 64 * 3 * 49}


def test_the_floor_is_the_slower_of_arithmetic_and_memory_layer_by_layer(kit: Callable[[str], Any]) -> None:
    layers = [
        {"macs": 1000, "read": 10, "written": 10, "weights": 100},  # arithmetic takes longer
        {"macs": 10, "read": 400, "written": 100, "weights": 0},  # memory does
    ]
    rates = {"operations_per_s": {"fp16": 1e6}, "bytes_per_s": {"device": 1e6}}
    found = kit("roofline").floor_ms(layers, 2, "fp16", rates)
    assert found == pytest.approx({"arithmetic": 4.04, "memory": 0.28 + 2.0, "layers": 4.0 + 2.0})
    assert kit("roofline").floor_ms(layers, 2, "int8", rates) == {}
    assert kit("roofline").floor_ms(layers, 2, "fp16", {}) == {}


class Event:
    """Of CUDA, by the clock of the host."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch, kit: Callable[[str], Any]) -> None:
    """PyTorch's CUDA, as far as it can be had on a CPU."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(kit("sides"), "cuda", lambda: torch)


@pytest.mark.usefixtures("no_cuda")
def test_rates_are_those_of_the_fastest_run(kit: Callable[[str], Any]) -> None:
    naps = iter([0.0, *[0.02, 0.005, 0.02] * 100])
    found = kit("roofline").best(torch, lambda: time.sleep(next(naps)), seconds=0.3)
    assert 0.005 <= found < 0.02
    kinds = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int32}
    for precision, dtype in kinds.items():
        assert kit("roofline").multiply(torch, precision, 32, "cpu")().dtype == dtype


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_pytorch_without_a_gpu_is_skipped(kit: Callable[[str], Any]) -> None:
    with pytest.raises(kit("outcome").Skip, match=r"PyTorch .* sees no GPU"):
        kit("roofline").cuda()


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_pytorch_side_has_both_clocks_and_the_logits(kit: Callable[[str], Any], channels_last: bool) -> None:
    model, pixels = tiny_resnet(), kit("nets").pixels(3, 32)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels)).numpy()
    side = kit("sides").TorchSide(model, pixels, False, channels_last, "eager", device="cpu")
    side.input.zero_()  # what is computed is what was copied in
    assert side.compute() > 0
    assert side.whole() > 0
    np.testing.assert_allclose(side.logits, expected, rtol=1e-4, atol=1e-5)
    assert side.input.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_onnx_runtime_is_a_side_where_it_has_cuda(kit: Callable[[str], Any], models: Path) -> None:
    sides, nets = kit("sides"), kit("nets")
    path, pixels = nets.onnx_file(models, "v1.5", "fp32"), nets.pixels(2, 32)
    side = sides.OrtSide(path, pixels, "CPUExecutionProvider")
    assert side.compute() > 0
    assert side.whole() > 0
    np.testing.assert_allclose(side.logits, nets.reference(path, pixels), rtol=1e-3, atol=1e-5)
    side.close()
    with pytest.raises(kit("outcome").Skip, match="has no NotThereExecutionProvider"):
        sides.OrtSide(path, pixels, "NotThereExecutionProvider")


class Runner:
    """Of TensorRT, as far as the kit asks it."""

    input_size, dtype = 32, np.dtype(np.float32)

    def __init__(self, log: list[str], value: float = 1.0) -> None:
        self.log, self.value = log, value

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        return pixels

    def infer(self, pixels: np.ndarray) -> np.ndarray:
        self.log.append("infer")
        return np.full((len(pixels), 4), self.value, np.float32)

    def split(self, pixels: np.ndarray) -> dict[str, float]:
        return {"copy_in": 1.0, "compute": 2.5, "copy_out": 0.5, "enqueue": 0.1}

    def close(self) -> None:
        self.log.append("close")

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


@pytest.fixture
def engine(kit: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An engine folder that opens as `Runner`."""
    found = SimpleNamespace(log=list[str](), opened=list[bool](), values=itertools.repeat(1.0), graph="a graph")

    def load(folder: Path) -> SimpleNamespace:
        def opened(graphs: bool = False) -> Runner:
            found.opened.append(graphs)
            runner = Runner(found.log, next(found.values))
            runner._slots = [SimpleNamespace(graph=found.graph if graphs else None)]
            return runner

        return SimpleNamespace(open=opened)

    stand_in = SimpleNamespace(load=load)
    monkeypatch.setattr("edgeres.build.Engine", stand_in)
    monkeypatch.setattr(kit("endurance"), "Engine", stand_in)
    return found


def test_an_engine_side_takes_computation_from_the_gpu(kit: Callable[[str], Any], engine: SimpleNamespace) -> None:
    side = kit("sides").EngineSide(Path(), kit("nets").pixels(2, 32), True)
    assert (side.compute(), engine.opened) == (2.5, [True])
    assert side.whole() > 0
    assert side.logits.shape == (2, 4)
    side.close()
    assert engine.log[-1] == "close"
    engine.graph = None
    with pytest.raises(kit("outcome").Skip, match="cannot be captured"):
        kit("sides").EngineSide(Path(), kit("nets").pixels(2, 32), True)
    assert engine.log.count("close") == 2
    kit("sides").EngineSide(Path(), kit("nets").pixels(2, 32), False)


class Made:
    """A side of made-up speed."""

    def __init__(self, ms: float, logits: np.ndarray, log: list[str], name: str) -> None:
        self.ms, self.logits, self.log, self.name = ms, logits, log, name

    def compute(self) -> float:
        self.log.append(self.name)
        return self.ms

    def whole(self) -> float:
        return 2 * self.ms

    def close(self) -> None:
        self.log.append(f"close {self.name}")


@pytest.fixture
def speed(kit: Callable[[str], Any], models: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`measure` with made-up sides: name -> precision, ms; None does not open."""
    monkeypatch.setattr("edgeres.model.resnet", tiny)
    module, log = kit("speed"), list[str]()
    good, other = np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)[::-1]

    def measure(sides: dict[str, tuple[str, Any]], wrong: str = "", **more: Any) -> dict[str, Any]:
        def maker(name: str, ms: Any) -> Callable[[], Any]:
            def made() -> Made:
                if isinstance(ms, Exception):
                    raise ms
                return Made(ms, other if name == wrong else good, log, name)

            return made

        made = {name: (precision, maker(name, ms)) for name, (precision, ms) in sides.items()}
        monkeypatch.setattr(module, "makers", lambda work, pixels: made)
        return dict(module.measure(models, 8, seconds=0.0, **more))

    return SimpleNamespace(measure=measure, log=log, module=module, work=models)


def test_sides_take_turns_and_are_compared(speed: SimpleNamespace, kit: Callable[[str], Any], models: Path) -> None:
    outcome = kit("outcome")
    rates = {"operations_per_s": {"fp32": 1e9, "fp16": 2e9}, "bytes_per_s": {"device": 1e15}}
    outcome.write(outcome.kept(models, "matrix and copy rates"), outcome.outcome("ok", record=rates))
    sides = {
        "PyTorch FP32": ("fp32", 8.0),
        "PyTorch FP16": ("fp16", 4.0),
        "PyTorch FP16, compiled": ("fp16", RuntimeError("no compiler")),
        "rtx FP16": ("fp16", 2.0),
        "ONNX Runtime FP32": ("fp32", kit("outcome").Skip("no CUDA")),
        "rtx INT8": ("int8", 1.0),
        "rtx INT8, CUDA graph": ("int8", MissingDependency("no cuda-python")),
    }
    found = speed.measure(sides, without=("rtx INT8",))
    assert list(found["sides"]) == ["PyTorch FP32", "PyTorch FP16", "rtx FP16"]
    assert found["skipped"] == {
        "rtx INT8": "died",
        "PyTorch FP16, compiled": "RuntimeError: no compiler",
        "ONNX Runtime FP32": "no CUDA",
        "rtx INT8, CUDA graph": "no cuda-python",
    }
    assert all(found["checks"].values())
    fp16 = found["sides"]["rtx FP16"]
    assert (fp16["compute"]["p50_ms"], fp16["whole"]["p50_ms"]) == (2.0, 4.0)
    assert fp16["compute"]["images_per_s"] == 4000
    assert fp16["compute"]["faster"]["first"]["of_p50"] == 4
    assert fp16["compute"]["faster"]["fastest_pytorch"]["of_p50"] == 2
    assert found["sides"]["PyTorch FP16"]["compute"]["fastest_pytorch"] is True
    macs = sum(layer["macs"] for layer in kit("nets").load(models, "v1.5")[1]["layers"])
    assert fp16["of_floor"] == pytest.approx(2.0 / (2e3 * 8 * macs / 2e9), rel=1e-3)
    calls, rounds = speed.module.CALLS, speed.module.ROUNDS
    assert fp16["compute"]["samples"] == calls * rounds
    assert [n for n in speed.log if n[:5] != "close"][3 : 3 + 2 * calls] == ["PyTorch FP32"] * calls + [
        "PyTorch FP16"
    ] * calls
    assert [n for n in speed.log if n[:5] == "close"] == [f"close {name}" for name in found["sides"]]
    assert not (models / "under-way").read_text()


def test_a_side_that_computes_something_else_fails_the_part(speed: SimpleNamespace) -> None:
    sides = {"PyTorch FP32": ("fp32", 8.0), "rtx INT8": ("int8", 4.0)}
    assert speed.measure(sides, wrong="rtx INT8")["checks"] == {
        "PyTorch FP32 computes the same network": True,
        "rtx INT8 computes the same network": False,
    }


def test_an_engine_that_does_not_open_fails_the_part(speed: SimpleNamespace) -> None:
    found = speed.measure({"PyTorch FP32": ("fp32", 8.0), "rtx INT8": ("int8", BuildError("broken"))})
    assert found["checks"] == {"rtx INT8 opens": False, "PyTorch FP32 computes the same network": True}
    assert found["skipped"] == {"rtx INT8": "BuildError: broken"}


def test_a_side_that_takes_too_long_is_left_out(speed: SimpleNamespace) -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"not ready after 0.05 s"), speed.module.within(0.05):
        time.sleep(20)
    with speed.module.within(0.05):
        pass
    time.sleep(0.1)  # the alarm is off
    assert time.monotonic() - start < 10
    slow = Made(1.0, np.eye(4), [], "slow")
    slow.compute = lambda: time.sleep(0.02) or 20.0  # type: ignore[method-assign,assignment]
    found, broken = speed.module.in_turn({"slow": slow}, 60.0, 0.05)  # whatever the time, once
    assert (len(found["slow"]["compute"]), broken) == (1, {})


def test_a_side_that_breaks_leaves_the_others(
    speed: SimpleNamespace, kit: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = itertools.cycle([1.0] * 8 + [None])

    def compute(self: Made) -> float:
        turns.append((speed.work / "under-way").read_text())
        if self.name == "rtx INT8" and next(answers) is None:
            raise BuildError("cudaErrorLaunchFailure", evidence="in a later round")
        return self.ms

    def close(self: Made) -> None:
        if self.name == "rtx FP16":
            raise BuildError("cudaFree failed")

    turns = list[str]()
    monkeypatch.setattr(Made, "compute", compute)
    monkeypatch.setattr(Made, "close", close)
    sides = {"PyTorch FP32": ("fp32", 8.0), "rtx INT8": ("int8", 1.0), "rtx FP16": ("fp16", 2.0)}
    found = speed.measure(sides)
    assert list(found["sides"]) == ["PyTorch FP32", "rtx FP16"]
    assert found["skipped"] == {"rtx INT8": "BuildError: cudaErrorLaunchFailure in a later round"}
    assert (found["checks"].pop("rtx INT8 runs"), found["checks"].pop("rtx FP16 closes")) == (False, False)
    assert all(found["checks"].values())
    assert set(turns[-20:]) == {"PyTorch FP32", "rtx FP16"}  # what it is at, if the process dies
    assert not (speed.work / "under-way").read_text()
    with pytest.raises(RuntimeError, match="nothing to compare: rtx INT8: BuildError: cudaErrorLaunchFailure"):
        speed.measure({"rtx INT8": ("int8", 1.0)})


@pytest.mark.parametrize("catches", [False, True])
def test_a_side_is_too_late_also_where_what_it_calls_makes_another_error_of_it(
    speed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, catches: bool
) -> None:
    monkeypatch.setattr(speed.module, "AGAIN", 0.05)
    start = time.monotonic()

    def compiled() -> None:
        try:
            time.sleep(20)
        except TimeoutError as error:
            if not catches:
                raise RuntimeError("the compiler failed") from error
        time.sleep(20)

    with pytest.raises(TimeoutError, match=r"not ready after 0.05 s"), speed.module.within(0.05):
        compiled()
    with pytest.raises(KeyError), speed.module.within(60.0):  # in time: what it raises is its own
        raise KeyError
    assert time.monotonic() - start < 10


def test_a_side_that_was_too_slow_elsewhere_is_not_waited_for(
    speed: SimpleNamespace, kit: Callable[[str], Any]
) -> None:
    late = TimeoutError(f"{speed.module.LATE} 35 s")
    sides = {"PyTorch FP32": ("fp32", 8.0), "PyTorch FP16, compiled": ("fp16", late), "rtx FP16": ("fp16", 2.0)}
    found = speed.measure(sides)
    assert found["skipped"] == {"PyTorch FP16, compiled": "not ready after 35 s"}
    outcome, work = kit("outcome"), speed.work
    outcome.write(outcome.kept(work, "speed at batch 1"), outcome.outcome("ok", record=found))
    sides["PyTorch FP16, compiled"] = ("fp16", AssertionError("opened"))
    try:
        found = speed.measure(sides)
    finally:
        outcome.kept(work, "speed at batch 1").unlink()
    assert found["skipped"] == {"PyTorch FP16, compiled": "not ready after 35 s, at another batch size"}


def test_what_takes_longest_to_open_comes_last_and_others_keep_their_order(
    speed: SimpleNamespace, kit: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = {"PyTorch FP32": ("fp32", 8.0), "PyTorch FP16, compiled": ("fp16", 3.0), "rtx FP32": ("fp32", 2.0)}
    sides |= {"rtx FP16": ("fp16", 2.0), "rtx INT8": ("int8", 1.0)}
    opened, real = list[str](), speed.module.under_way
    monkeypatch.setattr(speed.module, "under_way", lambda work, what="": (opened.append(what), real(work, what)))
    found = speed.measure(sides)["sides"]
    assert list(found) == list(sides)
    assert opened[:5] == ["PyTorch FP32", "rtx FP16", "rtx INT8", "rtx FP32", "PyTorch FP16, compiled"]
    assert all(0 <= side["opened_s"] < 5 for side in found.values())
    monkeypatch.setenv(kit("outcome").UNTIL, str(time.time() - 1))
    with pytest.raises(
        kit("outcome").Skip, match="nothing to compare: PyTorch FP32: no time; rtx FP16: no time; rtx INT8"
    ):
        speed.measure(sides)


def test_without_any_side_there_is_nothing_to_compare(speed: SimpleNamespace, kit: Callable[[str], Any]) -> None:
    with pytest.raises(kit("outcome").Skip, match="nothing to compare: PyTorch FP32: RuntimeError: gone"):
        speed.measure({"PyTorch FP32": ("fp32", RuntimeError("gone"))})


def test_engines_that_were_built_are_sides_with_and_without_a_graph(
    kit: Callable[[str], Any], tmp_path: Path, engine: SimpleNamespace
) -> None:
    outcome = kit("outcome")
    outcome.write(outcome.kept(tmp_path, "rtx v1.5 int8"), outcome.outcome("failed", record={"usable": True}))
    outcome.write(outcome.kept(tmp_path, "rtx v1.5 fp16"), outcome.outcome("failed"))  # it crashed
    kit("plans").folder_of(tmp_path, "rtx", "v1.5", "fp16").mkdir()
    found = kit("speed").makers(tmp_path, kit("nets").pixels(1, 32))
    mine = [name for name in found if name.startswith(("rtx", "desktop"))]
    assert mine == ["rtx INT8", "rtx INT8, CUDA graph"]
    for name in mine:
        found[name][1]()
    assert engine.opened == [False, True]


COUNTED = [
    np.random.default_rng(0).standard_normal((3, 4, 50), np.float32),
    np.maximum(np.random.default_rng(1).standard_normal((2, 5000), np.float32), 0),
    np.array([0.0, -0.0, 1e-45, -1e-45, 2.0, -2.0, 1.9999999, -1.9999999, 2.0**-11, -(2.0**-11)], np.float32),
    np.array([3e5, -7.0, -1e-45, 1e-40, -1e-40, 0.0], np.float32),  # bins are so wide that small ones would vanish
    np.array([-3e38, -1e-30], np.float32),
]


@pytest.mark.parametrize("start", range(len(COUNTED)))
def test_pytorch_counts_as_edgeres_does_to_the_last_value(kit: Callable[[str], Any], start: int) -> None:
    expected, found = TensorRange(), TensorRange()
    for values in COUNTED[start:] + COUNTED[:start]:
        expected.update(values)
        found = kit("on_torch").counted(torch, found, torch.from_numpy(values))
        assert found.to_json() == expected.to_json()
    with pytest.raises(FloatingPointError):
        kit("on_torch").counted(torch, found, torch.tensor([1.0, float("nan")]))


def as_tf32(values: torch.Tensor) -> torch.Tensor:
    """With ten bits behind the point, as GPUs round what they multiply in TF32."""
    return ((values.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("what", ["calibration", "fidelity"])
def test_passes_elsewhere_are_timed_and_their_numbers_compared(
    kit: Callable[[str], Any], models: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    passes = kit("passes")
    found = getattr(passes, what)(models, "cpu", "CPUExecutionProvider", most=600.0, batch=2)
    assert list(found["passes"]) == ["CPU", "PyTorch", "ONNX Runtime"]
    assert (found["images"], found["rounds"], found["skipped"]) == (2 * (passes.BATCHES - 1), passes.ROUNDS, {})
    assert len(found["checks"]) == {"calibration": 10, "fidelity": 2}[what]
    assert all(found["checks"].values())
    pytorch, other = (found["passes"][name] for name in ("PyTorch", "ONNX Runtime"))
    assert other["moved"] == 0 if what == "calibration" else other["equal"]
    assert min(each["images_per_s"] for each in found["passes"].values()) > 0
    assert pytorch["faster"] > 0
    outcome, answers = kit("outcome"), kit("answers")
    kept = outcome.record_of(models, what)  # meanwhile
    assert list(kept["passes"]) == list(found["passes"])
    part = {"status": "ok", "reason": "", "record": kept}
    assert f"PyTorch {kept['passes']['PyTorch']['faster']:.2f}x, " in answers.same(part)
    assert answers.line(what, part).startswith("images/s: CPU ")
    real = torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda x, w, *more: real(as_tf32(x), as_tf32(w), *more))
    found = getattr(passes, what)(models, "cpu", batch=2, most=0.0)
    assert found["rounds"] == 1
    assert "has no CUDAExecutionProvider" in found["skipped"]["ONNX Runtime"]
    assert not all(found["checks"].values())


@pytest.mark.parametrize(
    ("tensor", "change", "missed"),
    [
        ("conv1", lambda x: x, []),
        ("conv1", lambda x: x * np.float32(1 + 1e-6), []),
        ("conv1", lambda x: np.where(x == x.max(), x * np.float32(1.0003), x), ["extremes differ by 0.01% at most"]),
        ("conv1", lambda x: np.where(abs(x) < 0.1, x + np.float32(0.001), x), ["0.1% of values at most are in"]),
        (
            "conv1",
            lambda x: np.where((abs(x) > 2) & (abs(x) < 3.7), np.copysign(np.float32(3.7), x), x),
            ["0.1% of values at most are in", "thresholds differ by 3% at most"],
        ),
        ("conv1", lambda x: x[:-1], ["as many values are counted"]),
        ("input", lambda x: x * np.float32(1 + 1e-6), ["pixels are counted alike, to the last one"]),
    ],
)
def test_tables_are_the_same_within_rounding(
    kit: Callable[[str], Any], tensor: str, change: Callable[[np.ndarray], np.ndarray], missed: list[str]
) -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    values *= np.float32(3.999 / abs(values).max())  # a little more, and bins are twice as wide
    tables = [RangeTable({}, tensors={"input": TensorRange(), "conv1": TensorRange()}) for _ in range(2)]
    for table, changed in zip(tables, ("", tensor), strict=True):
        for name, r in table.tensors.items():
            r.update(change(values) if name == changed else values)
    found = kit("passes").differences(*tables)
    assert len(found["checks"]) == 5
    failed = [what for what, met in found["checks"].items() if not met]
    assert len(failed) == len(missed)
    assert all(what.startswith(wanted) for what, wanted in zip(failed, missed, strict=True))
    assert found["extremes"]["tensor"] in tables[0].tensors


def test_a_pass_that_breaks_leaves_what_others_measured(
    kit: Callable[[str], Any], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, batches = kit("passes"), [Batch(np.zeros((1, 3, 8, 8), np.float32), None, np.arange(1))] * 2

    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(passes, "measure", broken)
    found = passes.calibration(models, "cpu", "CPUExecutionProvider", batch=2, most=0.0)
    assert list(found["passes"]) == ["CPU", "ONNX Runtime"]
    assert found["skipped"] == {"PyTorch": "RuntimeError: CUDA error: out of memory"}
    assert [what for what, met in found["checks"].items() if not met] == ["PyTorch runs"]
    with pytest.raises(RuntimeError):  # nothing to compare with
        passes.compare(models, "calibration", {"CPU": broken}, batches, passes.apart, 0.0)


def test_the_first_batch_of_a_pass_is_not_timed_and_rounds_fit_the_time(
    kit: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, now = kit("passes"), 0.0
    monkeypatch.setattr(passes, "time", SimpleNamespace(monotonic=lambda: now, perf_counter=lambda: now))
    batches = [Batch(np.zeros((2, 3, 8, 8), np.float32), None, np.arange(2))] * 3

    def slow(first: float, other: float) -> Callable[[Any], np.ndarray]:
        def go(clocked: Any) -> np.ndarray:
            nonlocal now
            for place, _ in enumerate(clocked):
                now += other if place else first
            return np.ones((2, 4), np.float32)

        return go

    todo = {"CPU": slow(1.0, 4.0), "PyTorch": slow(6.0, 0.5)}  # 16 s in all
    for most, rounds in ((20.0, 1), (33.0, 2), (1000.0, passes.ROUNDS)):
        found = passes.compare(tmp_path, "a", todo, batches, passes.apart, most)
        assert (found["images"], found["rounds"]) == (4, rounds)
        assert [each["images_per_s"] for each in found["passes"].values()] == [0.5, 4.0]
        assert found["passes"]["PyTorch"]["faster"] == 8.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_passes_without_a_gpu_are_skipped(kit: Callable[[str], Any], models: Path) -> None:
    for what in ("calibration", "fidelity"):
        with pytest.raises(kit("outcome").Skip, match="sees no GPU"):
            getattr(kit("passes"), what)(models)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_is_built_run_and_judged(kit: Callable[[str], Any], models: Path, precision: str) -> None:
    found = kit("plans").make(models, "cpu", "v1.5", precision)
    assert all(found["checks"].values())
    assert found["usable"]
    assert 0 < found["first_logits_s"] < 60
    assert found["same_answer"] > 0.9
    assert found["size_bytes"] > 0
    assert (kit("plans").folder_of(models, "cpu", "v1.5", precision) / "engine.json").exists()


def test_an_engine_that_cannot_be_looked_into_is_of_use(
    kit: Callable[[str], Any], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeres.runners.tensorrt import TensorRt

    def built(onnx: Path, folder: Path, target: str, settings: Any) -> Any:
        try:
            TensorRt("tensorrt-rtx").examine(folder / "engine.plan")
        except BuildError as error:
            notes.append(error.cause)
        runner = SimpleNamespace(infer=lambda pixels: single)
        record = {"build_seconds": 1.0, "size_bytes": 2, "fusion": {"notes": notes}}
        return SimpleNamespace(record=record, open=lambda: nullcontext(runner))

    plans, notes = kit("plans"), list[str]()
    with np.load(models / "models" / "v1.5.npz") as kept:
        single = kept["fp32"]
    monkeypatch.setattr(TensorRt, "examine", lambda self, path: pytest.fail("looked into"))
    monkeypatch.setattr(plans.build, "build", built)
    found = plans.make(models, "rtx", "v1.5", "fp32", without=["build, and a look into the engine"])
    assert (found["usable"], found["inspector"]) == (True, {"summary": ["a process died over it"]})
    with pytest.raises(kit("outcome").Skip, match="does not run"):
        plans.make(models, "rtx", "v1.5", "fp32", without=[plans.RUN])
    assert all(part.again for part in kit("parts").parts(480) if part.call == "plans:make")


def test_logits_are_judged_by_precision(kit: Callable[[str], Any]) -> None:
    rng = np.random.default_rng(0)
    single = rng.standard_normal((16, 10)).astype(np.float32) + 5

    def noisy(db: float) -> np.ndarray:
        spread = single - single.mean(0)
        return single + rng.standard_normal(single.shape).astype(np.float32) * spread.std() * 10 ** (-db / 20)

    def met(precision: str, found: np.ndarray) -> bool:
        return all(kit("plans").quality(precision, found, single, simulated)["checks"].values())

    simulated = noisy(20)
    assert met("int8", noisy(20))  # as far from FP32, in another direction
    assert not met("int8", noisy(10))
    assert not met("int8", single[::-1])
    assert met("fp32", single + 1e-5)
    assert not met("fp32", noisy(40))
    assert met("fp16", noisy(60))
    assert not met("fp16", noisy(20))
    assert not met("fp16", np.full_like(single, np.nan))


def test_tensorrt_rtx_that_does_not_know_a_gpu_is_skipped_with_what_it_says(
    kit: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    plans, raised = kit("plans"), BuildError("TensorRT could not load the plan")

    def refuse(plan: Path, executor: str) -> None:
        raise raised

    monkeypatch.setattr(plans, "open_cuda", lambda extra: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(plans, "TensorRtRunner", refuse)
    monkeypatch.setattr(plans, "TRIED", ("8.6",))
    monkeypatch.setattr(devices, "gpus", lambda: [devices.Gpu("Made Up", "9.0", 1 << 30, False)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(kit("outcome").Skip, match=r"does not run on compute capability 9.0: validity INVALID") as skip:
        plans.start(tmp_path, "tensorrt-rtx")
    assert "built for: {'8.6': 'INVALID (" in str(skip.value)
    assert "could not load the plan" in str(skip.value)
    assert (tmp_path / "tensorrt-rtx.plan").stat().st_size > 1000
    monkeypatch.setattr(devices, "gpus", lambda: [devices.Gpu("Made Up", "8.9", 1 << 30, False)])
    with pytest.raises(BuildError):  # one that it should know
        plans.start(tmp_path, "tensorrt-rtx")
    monkeypatch.undo()
    monkeypatch.setattr(devices, "gpus", lambda: [devices.Gpu("Made Up", "9.0", 1 << 30, False)])
    monkeypatch.setattr(plans, "open_cuda", lambda extra: refuse(tmp_path, extra))
    with pytest.raises(BuildError):  # CUDA does not work, which says nothing of the library
        plans.start(tmp_path, "tensorrt-rtx")


def test_tensorrt_rtx_that_does_not_build_for_a_gpu_is_skipped_with_what_it_says(
    kit: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    plans, real = kit("plans"), kit("plans").trt.build_plan

    def build(library: Any, onnx: bytes, precision: str, options: Any) -> Any:
        if not options.capabilities:
            raise BuildError("TensorRT-RTX cannot start", evidence="Unsupported SM: 0x900")
        return real(library, onnx, precision, options)

    monkeypatch.setattr(plans.trt, "build_plan", build)
    monkeypatch.setattr(plans, "open_cuda", lambda extra: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(plans, "TRIED", ("8.6",))
    monkeypatch.setattr(devices, "gpus", lambda: [devices.Gpu("Made Up", "9.0", 1 << 30, False)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(
        kit("outcome").Skip, match=r"compute capability 9.0: no plan; built for: {'8.6': 'INVALID"
    ) as skip:
        plans.start(tmp_path, "tensorrt-rtx")
    assert "Unsupported SM: 0x900" in str(skip.value)
    monkeypatch.setattr(devices, "gpus", lambda: [devices.Gpu("Made Up", "8.9", 1 << 30, False)])
    with pytest.raises(BuildError):  # for one that it should know
        plans.start(tmp_path, "tensorrt-rtx")


def test_tensorrt_rtx_is_tried_also_where_it_calls_a_plan_not_valid(
    kit: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    plans, answer = kit("plans"), 27.0
    runner = SimpleNamespace(infer=lambda pixels: np.full((2, 4), answer, np.float32))
    monkeypatch.setattr(plans, "TensorRtRunner", lambda plan, executor: nullcontext(runner))
    monkeypatch.setattr(plans, "open_cuda", lambda extra: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(plans, "TRIED", ())
    monkeypatch.setattr(devices, "gpus", lambda: [devices.Gpu("Made Up", "9.0", 1 << 30, False)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = plans.start(tmp_path, "tensorrt-rtx")
    assert (found["validity"], found["checks"]) == ("INVALID", {"a small plan computes what it should": True})
    assert found["usable"]  # also if the process then dies
    answer = 3.0
    found = plans.start(tmp_path, "tensorrt-rtx")
    assert (found["usable"], *found["checks"].values()) == (False, False)


def test_a_plan_is_shown_as_its_inspector_tells_it(kit: Callable[[str], Any]) -> None:
    def tensor(name: str, kind: str) -> dict[str, Any]:
        return {"Name": name, "Dimensions": [1, 8, 8, 8], "Format/Datatype": kind}

    layers: list[Any] = [
        {
            "Name": f"conv{i}",
            "LayerType": "CaskConvolution",
            "Inputs": [tensor("a", "Int8")],
            "Outputs": [tensor("b", kind)],
        }
        for i, kind in enumerate(["Int8", "FP32"])
    ]
    kept = {"layers": layers, "times_ms": {"conv0": 1.0, "conv1": 3.0}, "convolutions": 2, "residuals": 0}
    found = kit("plans").inspected(kept, "int8")
    assert (found["in_and_out"], found["in_only"], found["total_ms"]) == (1, 1, 4.0)
    assert found["first_layers"] == layers
    assert list(found["slowest_ms"]) == ["conv1", "conv0"]
    part = {"status": "ok", "reason": "", "record": {"inspector": found}}
    answers = kit("answers")
    assert answers.int8(part) == "1 of 2 in and out, 1 in only; others: none"
    gone = {
        "status": "skipped",
        "reason": "tensorrt-rtx 1.7 does not run on compute capability 9.0: INVALID",
        "record": {},
    }
    assert answers.starts(gone) == f"no: {gone['reason']}"
    assert answers.starts({**gone, "reason": "no time"}) == "not found out: no time"
    assert answers.inspector(part) == "2 layers, 0 by name only; a layer has: Name, LayerType, Inputs, Outputs"
    found = kit("plans").inspected({**kept, "layers": ["conv0", "conv1"]}, "int8")
    assert "does not tell" in answers.int8({**part, "record": {"inspector": found}})


def test_the_benchmark_runs_without_and_with_graphs(
    kit: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans, log = kit("plans"), list[str]()

    class Measured(Runner):
        """With what a benchmark asks besides."""

        batch = None

    runners.Runner.register(Measured)

    def load(folder: Path) -> SimpleNamespace:
        def opened(graphs: bool) -> Any:
            if graphs:
                raise BuildError("CUDA graphs need cuda-python")
            return Measured(log)

        return SimpleNamespace(open=opened)

    outcome = kit("outcome")
    for precision in ("fp16", "int8"):
        outcome.write(outcome.kept(tmp_path, f"rtx v1.5 {precision}"), outcome.outcome("ok", record={"usable": True}))
    monkeypatch.setattr(plans.build, "Engine", SimpleNamespace(load=load))
    found = plans.benchmark(tmp_path, "rtx", seconds=0.01)
    assert list(found["plain"]["runners"]) == ["fp16", "int8"]
    assert found["plain"]["runners"]["int8"]["split"]["compute"] == 2.5
    assert [point["batch"] for point in found["plain"]["sweep"]] == [1, 8, 32]
    assert found["skipped"] == {"with CUDA graphs": "CUDA graphs need cuda-python"}
    assert list(outcome.record_of(tmp_path, "rtx benchmark")["plain"]["runners"]) == ["fp16", "int8"]  # kept meanwhile
    assert log.count("close") == 2


@pytest.fixture
def leaky(kit: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], list[int]]:
    """Memory that goes by so many bytes from one look to the next, of the GPU and of the host; the looks so far."""

    def leak(device: int, host: int) -> list[int]:
        looks: list[int] = []

        def memory(target: str) -> dict[str, int]:
            looks.append(len(looks))
            return {"device_free": (1 << 40) - device * len(looks), "host_used": host * len(looks)}

        monkeypatch.setattr(kit("endurance"), "memory", memory)
        return looks

    return leak


@pytest.mark.parametrize(("device", "host", "met"), [(0, 0, True), (1 << 30, 0, False), (0, 1 << 30, False)])
@pytest.mark.parametrize("what", ["cycles", "inferences"])
def test_memory_that_does_not_come_back_fails(
    kit: Callable[[str], Any],
    engine: SimpleNamespace,
    leaky: Callable[[int, int], list[int]],
    what: str,
    device: int,
    host: int,
    met: bool,
) -> None:
    leaky(device, host)
    found = getattr(kit("endurance"), what)(Path(), "rtx", seconds=20, times=30)
    assert (found[what], found["wanted"]) == (30, 30)
    assert "skipped" not in found
    assert all(found["checks"].values()) == met
    assert (found["device_bytes"], found["host_bytes"]) == (device, host)
    assert engine.log.count("close") == (30 if what == "cycles" else 1)


def test_fewer_repetitions_in_the_time_are_said(
    kit: Callable[[str], Any], engine: SimpleNamespace, leaky: Callable[[int, int], list[int]]
) -> None:
    looks = leaky(0, 0)
    with pytest.raises(kit("outcome").Skip, match="of 100 in 0 s, which tells nothing of memory"):
        kit("endurance").cycles(Path(), "rtx", seconds=1e-9)
    looks.clear()
    for what in ("cycles", "inferences"):
        found = getattr(kit("endurance"), what)(Path(), "rtx", seconds=0.05, times=10**9)
        assert 0 < found[what] < 10**9
        ((gone, why),) = found["skipped"].items()
        assert gone.endswith(" of 1,000,000,000")
        assert why == "no time"


def test_logits_that_change_fail(
    kit: Callable[[str], Any],
    engine: SimpleNamespace,
    leaky: Callable[[int, int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leaky(0, 0)
    values = iter([1.0] * 5 + [2.0] + [1.0] * 1000)
    monkeypatch.setattr(Runner, "infer", lambda self, pixels: np.full((len(pixels), 4), next(values)))
    found = kit("endurance").inferences(Path(), "rtx", seconds=20, times=20)
    assert not found["checks"]["every inference gives the same logits"]


def test_memory_is_what_the_gpu_and_linux_say(kit: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    endurance, log = kit("endurance"), list[str]()
    cuda = SimpleNamespace(current=nullcontext, free_bytes=lambda: 77, close=lambda: log.append("close"))
    monkeypatch.setattr(endurance.cuda, "open_cuda", lambda extra: cuda)
    found = endurance.memory("rtx")
    assert (found["device_free"], log) == (77, ["close"])
    assert found["host_used"] > 10 << 20


def test_both_cuda_packages_are_compared(
    kit: Callable[[str], Any], engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    endurance = kit("endurance")
    found = endurance.packages(Path(), "rtx", turns=50)
    assert list(found["p50_ms"]) == ["PyCuda", "CudaPython"]
    assert found["checks"]["both give the same logits"]
    assert engine.log.count("close") == 2
    engine.values = iter([1.0, 2.0])
    assert not endurance.packages(Path(), "rtx", turns=2)["checks"]["both give the same logits"]
    engine.values = iter([1.0, 1.0])
    naps = iter([0.0, 0.0] + [0.0, 0.01] * 10)
    monkeypatch.setattr(Runner, "infer", lambda self, pixels: time.sleep(next(naps)) or np.zeros((8, 4)))
    found = endurance.packages(Path(), "rtx", turns=10)
    assert found["ratio"] > endurance.SLOWER
    assert not found["checks"][f"neither is {endurance.SLOWER} times slower"]


def result(kit: Callable[[str], Any]) -> dict[str, Any]:
    """A run in which everything has something to say."""
    names = [part.name for part in kit("parts").parts(480)]
    skipped = {
        "status": "skipped",
        "reason": "no time: 3 s are left, it takes 20 s at least",
        "seconds": 0,
        "record": {},
    }
    parts = dict.fromkeys(names, skipped)
    inner = {"summary": ["53 of 53 convolutions INT8 in and out; 16 of 16 residual adds fused; " * 2], "layers": 70}
    inner |= {"by_name": 0, "convolutions": 53, "in_and_out": 50, "in_only": 3, "other": {}, "first_layers": ["a"]}
    clock = {"p50_ms": 12345.678, "images_per_s": 123456.7, "faster": {"first": {"of_p50": 123.456}}}
    side = {"compute": clock, "whole": clock, "of_floor": 123.4}
    fast = {**side, "compute": {**clock, "p50_ms": 6172.839, "faster": {}}, "of_floor": None}
    pair = {"extremes": {"largest": 1.03e-06}, "thresholds": {"largest": 0.0061}}
    counted = {"images_per_s": 1234.5, "faster": 12.648, "moved": 4.5e-5, **pair}
    logits, alike = {"images_per_s": 3210.0, "faster": 10.0, "db": 124.9, "equal": False}, {"db": None, "equal": True}
    records = {
        "matrix and copy rates": {"operations_per_s": {"fp32": 5e13, "int8": 1e15}, "bytes_per_s": {"device": 3e12}},
        "rtx starts": {"version": "1.7.1.116", "capability": "9.0", "validity": "VALID"},
        "models v1.5": {"gmacs": 4.089, "calibration": "minmax of 32 smooth random images"},
        "rtx v1.5 int8": {"build_s": 12.3, "db": 41.5, "inspector": inner},
        "rtx inferences": {"inferences": 100000, "device_bytes": 5 << 20, "host_bytes": -1 << 20},
        "rtx CUDA packages": {"ratio": 1.01, "p50_ms": {"PyCuda": 1.0, "CudaPython": 1.01}},
        "pytest -m gpu": {"passed": 51, "skipped": {"3 tests": "why"}},
        "calibration": {"passes": {"CPU": {"images_per_s": 97.6}, "PyTorch": counted, "ONNX Runtime": counted}},
        "fidelity": {"passes": {"CPU": {"images_per_s": 321.0}, "PyTorch": logits, "ONNX Runtime": logits | alike}},
        "speed at batch 8": {
            "batch": 8,
            "sides": {"PyTorch FP16, CUDA graph and a long name": side, "rtx FP16": side, "rtx INT8": fast},
        },
    }
    for name, record in records.items():
        parts[name] = {"status": "ok", "reason": "", "seconds": 1.0, "record": record}
    parts["desktop starts"] = {**skipped, "status": "failed", "reason": "died: SIGSEGV; " + "at something " * 20}
    machine = {"gpus": [{"name": "NVIDIA H100 80GB HBM3", "capability": "9.0"}], "driver": "580.159.04"}
    gone = [{"part": name, "reason": part["reason"]} for name, part in parts.items() if part["status"] == "skipped"]
    gone += [{"part": f"speed at batch {batch}", "reason": "PyTorch FP16, compiled: no compiler"} for batch in (1, 8)]
    found = {"seconds": 412.3, "machine": machine, "parts": parts, "failed": [1], "skipped": gone}
    return {**found, "answers": kit("answers").answers(found)}


def test_the_table_fits_80_columns_and_says_what_was_found(kit: Callable[[str], Any]) -> None:
    shown = kit("table").table(result(kit))
    assert max(map(len, shown.splitlines())) <= 80
    flat = " ".join(shown.split())
    for text in (
        "NVIDIA H100 80GB HBM3 (9.0), driver 580.159.04: 412 s",
        "FP32 50, INT8 1000 TOP/s; copies 3000 GB/s",
        "built in 12.3 s, 42 dB of FP32; 53 of 53 convolutions",
        "100,000 inferences: +5.0 MiB on the GPU, -1.0 MiB on the host",
        "51 passed, 3 skipped",
        "died: SIGSEGV",
        "no time: 3 s are left",
        "does TensorRT-RTX run on this GPU: yes: TensorRT-RTX 1.7.1.116 on compute capability 9.0, validity VALID",
        "do INT8 convolutions run as INT8 (rtx): 50 of 53 in and out, 3 in only",
        "how much faster is INT8 than FP16 (rtx): 2.00x at batch 8",
        "do INT8 convolutions run as INT8 (desktop): not found out: no time",
        "images/s: CPU 98, PyTorch 1,234, ONNX Runtime 1,234",
        "is calibration faster on the GPU, and the same: PyTorch 12.65x, 4.5e-05 of values in another bin, "
        "extremes within 1.0e-06, thresholds 6.1e-03; ONNX Runtime 12.65x",
        "PyTorch 10.00x, 125 dB; ONNX Runtime 10.00x, equal to the last bit; the CPU 321 images/s",
        "skipped: PyTorch FP16, compiled: no compiler speed at batch 1, speed at batch 8",
        "parts: 10 ok, 1 failed; 23 things skipped",
    ):
        assert text in flat, text
    (row,) = (line.split() for line in shown.splitlines() if line.startswith("rtx INT8 "))
    assert row == ["rtx", "INT8", "6172.8", "123,457", "-", "-", "12345.7", "123,457"]
