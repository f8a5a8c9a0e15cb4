from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgeres import benchmark
from edgeres.benchmark import PRESETS, WARM_UP, Plan, latency, measure
from edgeres.cli import cli
from edgeres.errors import UsageError
from edgeres.latency import SURE
from edgeres.runners import Runner


@pytest.fixture(autouse=True)
def _seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks here are scripted: no need to be quick."""
    monkeypatch.setattr(benchmark, "SECONDS", 3.0)


class Clock:
    """Time that passes only while a runner works, in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.calls: list[str] = []

    def perf_counter(self) -> float:
        return self.now


class Worker(Runner):
    """Takes ``cost(i)`` ms for its call i."""

    batch, input_size = None, 2

    def __init__(self, name: str, clock: Clock, cost: Callable[[int], float]) -> None:
        self.name, self.clock, self.cost, self.done = name, clock, cost, 0

    def _run(self, pixels: np.ndarray) -> np.ndarray:
        self.clock.now += self.cost(self.done) / 1e3
        self.clock.calls.append(self.name)
        self.done += 1
        return pixels

    def close(self) -> None: ...


class Gpu(Worker):
    """Tells how its calls split up: 2 ms in, ``cost(i)`` of work, 1 ms out, and 4 ms more of the host's time."""

    parts = {"copy_in": 2.0, "copy_out": 1.0}
    largest = 8
    spins: bool | None = None

    def repeat(
        self, pixels: np.ndarray, go_on: Callable[[dict[str, float]], bool], transfers: bool, spin: bool
    ) -> None:
        assert pixels.dtype == self.dtype
        self.spins, going = spin, True
        while going:
            before = self.clock.now
            self.infer(pixels)
            compute = 1e3 * (self.clock.now - before)
            copies = {part: ms * (transfers or part == "enqueue") for part, ms in self.parts.items()}
            self.clock.now += (sum(copies.values()) + 4) / 1e3
            going = go_on({"copy_in": copies["copy_in"], "compute": compute, **copies})

    def split(self, pixels: np.ndarray) -> dict[str, float]:
        start = self.clock.now
        self.infer(pixels)
        compute = 1e3 * (self.clock.now - start)
        self.clock.now += (sum(self.parts.values()) + 4) / 1e3
        return {"copy_in": self.parts["copy_in"], "compute": compute, **self.parts}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine without sensors, on which nothing changes; tests may change what it says."""
    calm = SimpleNamespace(conditions=lambda since=None: {"since": since}, changed=lambda before, after: [])

    @contextmanager
    def energy(**_: Any) -> Iterator[None]:
        yield None

    calm.energy, calm.why_no_energy = energy, lambda gpu: f"no meter of the {'GPU' if gpu else 'processor'}"
    monkeypatch.setattr(benchmark, "sensors", calm)
    monkeypatch.setattr(benchmark, "SAMPLES", 368)  # no waiting: the clock stands still while nothing works
    return calm


PIXELS = np.zeros((8, 3, 2, 2), np.float32)
ONE = PIXELS[:1]


def test_every_runner_is_measured_by_its_own_time_in_ms(clock: Clock) -> None:
    runners: dict[str, Runner] = {"a": Worker("a", clock, lambda i: 4 + i), "b": Worker("b", clock, lambda i: 0.5)}
    times = latency(runners, PIXELS, samples=3)
    assert list(times) == ["a", "b"]
    np.testing.assert_allclose(times["a"], [4 + WARM_UP, 5 + WARM_UP, 6 + WARM_UP], rtol=1e-6)
    np.testing.assert_allclose(times["b"], [0.5] * 3, rtol=1e-6)


def test_the_warm_up_is_not_counted(clock: Clock) -> None:
    worker = Worker("a", clock, lambda i: 1000 if i < WARM_UP else 1)
    np.testing.assert_allclose(latency({"a": worker}, PIXELS, samples=10)["a"], [1] * 10, rtol=1e-6)
    worker.done = 0
    assert measure({"a": worker}, ONE, Plan(seconds=0.1))["runners"]["a"]["histogram"]["edges"][-1] == 1


def test_a_warm_up_lasts_a_tenth_of_the_measurement(clock: Clock) -> None:
    worker = Worker("a", clock, lambda i: 50 if i < 30 else 1)  # 30 slow ones take half of 3 s
    assert measure({"a": worker}, ONE, Plan(seconds=3))["runners"]["a"]["histogram"]["edges"][-1] == 50
    worker.done = 0
    assert measure({"a": worker}, ONE, Plan(seconds=15))["runners"]["a"]["histogram"]["edges"][-1] == 1


def test_runners_take_turns(clock: Clock) -> None:
    runners: dict[str, Runner] = {name: Worker(name, clock, lambda i: 1) for name in "abc"}
    latency(runners, PIXELS, samples=4)
    assert clock.calls == ["a", "b", "c"] * (WARM_UP + 4)
    clock.calls.clear()
    measure(runners, ONE, Plan(seconds=0.1))
    assert clock.calls == ["a", "b", "c"] * (len(clock.calls) // 3)


def test_the_record_has_the_fields_of_the_contract(clock: Clock) -> None:
    record = measure({"FP32": Worker("a", clock, lambda i: 5), "INT8": Worker("b", clock, lambda i: 2)}, PIXELS)
    assert record["format"] == "edgeres benchmark 1"
    assert (record["batch"], record["streams"], record["preset"], record["sweep"]) == (8, 1, "edgeres", [])
    fields = {"p50", "p90", "p95", "p99", "p99.9", "mean", "cv", "intervals", "samples", "seconds"}
    fields |= {"images_per_second", "stable", "warnings", "split", "enqueue", "energy", "histogram"}
    assert set(record["runners"]["FP32"]) == fields
    assert record["runners"]["INT8"]["images_per_second"] == 4000
    assert record["runners"]["INT8"]["stable"] is True
    assert record["speedup"] == {"INT8": {"of_p50": 2.5, "interval": [2.5, 2.5]}}
    assert record["conditions"] == {"before": {"since": None}, "after": {"since": {"since": None}}, "warnings": []}
    assert {"cpu", "cores", "instruction_sets", "affinity", "threads"} <= set(record["machine"])
    assert record["machine"]["threads"] >= 1


def test_every_runner_works_for_its_seconds_and_gives_samples_for_the_interval_of_p99(clock: Clock) -> None:
    slow, quick = Worker("a", clock, lambda i: 10), Worker("b", clock, lambda i: 1)
    runners = measure({"slow": slow, "quick": quick}, ONE)["runners"]
    assert runners["quick"]["seconds"] == pytest.approx(3, abs=0.01)
    assert runners["slow"]["samples"] == runners["quick"]["samples"] == pytest.approx(3000, abs=1)
    slow = Worker("c", clock, lambda i: 100)
    alone = measure({"slow": slow}, ONE)["runners"]["slow"]
    assert (alone["samples"], alone["seconds"]) == (368, pytest.approx(36.8))
    assert set(alone["intervals"]) == {"p50", "p90", "p95", "p99"}


def test_a_measurement_goes_on_for_the_interval_of_p99_9_where_that_takes_20_s_at_most(clock: Clock) -> None:
    def samples(ms: float, plan: Plan | None = None) -> int:
        record = measure({n: Worker(n, clock, lambda i: ms) for n in "ab"}, ONE, plan)
        found = record["runners"]["b"]
        sure, asked = found["samples"] >= SURE, plan is None or plan.tail
        assert ("p99.9" in found["intervals"]) is sure
        assert any("p99.9" in words for words in record["left_out"]) is (asked and not sure)
        return int(found["samples"])

    assert samples(5.6) == SURE  # 20.7 s
    assert samples(5.8) == pytest.approx(518, abs=1)  # 3 s: it would be 21.4
    assert samples(0.5) == pytest.approx(6000, abs=1)
    assert samples(5.6, Plan(tail=False)) == pytest.approx(536, abs=1)
    assert samples(5.6, Plan(seconds=3)) == pytest.approx(536, abs=1)  # who says how long is not made to wait longer
    assert samples(5.8, Plan(seconds=22)) == pytest.approx(3793, abs=1)


def test_no_preset_and_no_further_batch_goes_on(clock: Clock) -> None:
    assert measure({"a": Gpu("a", clock, lambda i: 1)}, ONE, Plan(preset="trtexec-11"))["runners"]["a"]["samples"] < 650
    worker = Worker("a", clock, lambda i: 5)
    measure({"a": worker}, PIXELS, Plan((1, 8)))
    assert worker.done == pytest.approx(60 + SURE + 60 + 600, abs=4)


def test_patience_ends_and_what_is_then_lacking_is_said(clock: Clock) -> None:
    record = measure({"a": Worker("a", clock, lambda i: 1000)}, ONE)["runners"]["a"]
    assert (record["samples"], record["p99"], record["p90"]) == (60, None, 1000)
    assert record["warnings"] == ["60 samples in 60 s, 368 wanted: calls take long"]
    quick = measure({"a": Worker("a", clock, lambda i: 1e-3)}, ONE)["runners"]["a"]
    assert quick["samples"] == benchmark.MOST
    assert quick["p99.9"] == 0.001


def test_what_is_not_steady_is_called_so_in_words(clock: Clock, quiet: SimpleNamespace) -> None:
    wild, calm = Worker("a", clock, lambda i: 1 + 2 * (i % 2)), Worker("b", clock, lambda i: 1)
    runners = measure({"wild": wild, "calm": calm}, ONE, Plan(seconds=0.1))["runners"]
    assert [r["stable"] for r in runners.values()] == [False, True]
    assert runners["wild"]["warnings"] == ["times scatter: coefficient of variation 50.0 %, limit 10 %"]
    quiet.changed = lambda before, after: ["throttled"] if after["since"] is before else []
    record = measure({"calm": calm}, ONE, Plan(seconds=0.1))
    assert record["runners"]["calm"]["stable"] is False
    assert record["conditions"]["warnings"] == ["throttled"]


def test_a_speedup_is_taken_within_rounds_against_the_first(clock: Clock) -> None:
    def drifting(name: str, ms: float) -> Worker:
        return Worker(name, clock, lambda i: ms * (1 + i / 100))

    found = measure({"a": drifting("a", 6), "b": drifting("b", 2), "c": drifting("c", 3)}, ONE)
    assert found["speedup"] == {
        "b": {"of_p50": 3, "interval": [3, 3]},
        "c": {"of_p50": 2, "interval": [2, 2]},
    }
    assert "times drift" in found["runners"]["a"]["warnings"][1]


def test_a_sweep_has_every_batch_and_the_first_in_full(clock: Clock) -> None:
    seen: list[int] = []

    class PerImage(Worker):
        def _run(self, pixels: np.ndarray) -> np.ndarray:
            seen.append(len(pixels))
            self.cost = lambda i: 1.0 + len(pixels)
            return super()._run(pixels)

    record = measure({"a": PerImage("a", clock, lambda i: 0)}, PIXELS, Plan((2, 1, 8), seconds=0.01))
    assert (record["batch"], record["runners"]["a"]["samples"]) == (2, 67)  # 0.2 s at most
    assert record["sweep"] == [
        {"batch": 2, "runners": {"a": {"p50": 3, "images_per_second": pytest.approx(666.67)}}},
        {"batch": 1, "runners": {"a": {"p50": 2, "images_per_second": 500}}},
        {"batch": 8, "runners": {"a": {"p50": 9, "images_per_second": pytest.approx(888.89)}}},
    ]
    assert list(dict.fromkeys(seen)) == [2, 1, 8]
    assert seen.count(8) < 67


def test_pixels_are_ready_in_the_type_that_a_runner_takes(clock: Clock) -> None:
    taken: list[np.ndarray] = []

    class Half(Worker):
        dtype = np.dtype(np.float16)

        def prepare(self, pixels: np.ndarray) -> np.ndarray:
            clock.now += 1000
            return super().prepare(pixels)

        def _run(self, pixels: np.ndarray) -> np.ndarray:
            taken.append(pixels)
            return super()._run(pixels)

    record = measure({"a": Half("a", clock, lambda i: 1)}, ONE, Plan(seconds=0.01))
    assert {p.dtype for p in taken} == {np.dtype(np.float16)}
    assert record["runners"]["a"]["mean"] == 1


class Meeting(Runner):
    """Every call waits for one of the other stream; ``lone`` are the calls that found their runner in use."""

    batch, input_size = None, 2

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier, self.busy, self.shared, self.calls = barrier, 0, False, 0

    def _run(self, pixels: np.ndarray) -> np.ndarray:
        self.calls += 1
        self.busy += 1
        self.barrier.wait(10)
        self.shared |= self.busy > 1
        self.barrier.wait(10)
        self.busy -= 1
        return pixels

    def close(self) -> None: ...


def test_streams_work_at_the_same_time_each_on_its_own_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SLICE", 0.005)
    barrier = threading.Barrier(2)
    side = [Meeting(barrier), Meeting(barrier)]  # without another stream a call would wait forever
    record = measure({"a": side, "b": side}, PIXELS[:2], Plan(streams=2, seconds=0.02))
    found = record["runners"]["a"]
    assert record["streams"] == 2
    assert not any(runner.shared for runner in side)
    assert found["samples"] % 2 == 0
    # both were at it all the time, and their time counts once
    assert found["mean"] * found["samples"] / 1e3 > 1.5 * found["seconds"]
    assert found["images_per_second"] == pytest.approx(2 * found["samples"] / found["seconds"], rel=0.05)
    assert record["speedup"]["b"]["of_p50"] > 0


def test_streams_share_a_runner_that_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SLICE", 0.005)
    runner = Meeting(threading.Barrier(2))
    measure({"a": runner}, ONE, Plan(streams=2, seconds=0.005))
    assert runner.shared


def test_an_error_in_a_stream_comes_out() -> None:
    class Broken(Runner):
        batch, input_size = None, 2

        def _run(self, pixels: np.ndarray) -> np.ndarray:
            raise OSError("unplugged")

        def close(self) -> None: ...

    with pytest.raises(OSError, match="unplugged"):
        measure({"a": Broken()}, ONE, Plan(streams=3))


@pytest.mark.parametrize(("preset", "ms", "copies"), [("trtexec-10", 8.0, 1), ("trtexec-11", 5.0, 0)])
def test_a_preset_counts_what_trtexec_counts(clock: Clock, preset: str, ms: float, copies: int) -> None:
    gpu = Gpu("a", clock, lambda i: 5)
    gpu.dtype = np.dtype(np.float16)
    record = measure({"INT8": gpu}, PIXELS, Plan(preset=preset))
    found = record["runners"]["INT8"]
    assert found["p50"] == ms
    assert found["split"] == {"copy_in": 2 * copies, "compute": 5, "copy_out": copies}
    assert found["seconds"] == pytest.approx(3, abs=0.013)  # the host's time counts for duration and throughput
    assert found["images_per_second"] == pytest.approx(8e3 / (ms + 4), rel=1e-3)
    assert gpu.spins is (preset == "trtexec-11")
    assert record["preset"] == preset


def test_a_preset_lets_each_engine_work_alone_after_200_ms(clock: Clock) -> None:
    slow_start = Gpu("a", clock, lambda i: 93 if i < 2 else 3)  # with copies and host 100 ms, then 10
    record = measure({"FP32": slow_start, "INT8": Gpu("b", clock, lambda i: 1)}, ONE, Plan(preset="trtexec-10"))
    order = "".join(dict.fromkeys(clock.calls))
    assert clock.calls == ["a"] * clock.calls.count("a") + ["b"] * clock.calls.count("b")
    assert order == "ab"
    assert clock.calls.count("a") == pytest.approx(WARM_UP + 300, abs=1)
    assert record["runners"]["FP32"]["p50"] == 6
    assert record["runners"]["FP32"]["stable"] is True  # the warm-up's calls are not among those that are judged
    assert record["speedup"]["INT8"] == {"of_p50": 1.5, "interval": [1.5, 1.5]}


def test_a_preset_judges_the_computation_by_its_own_limit(clock: Clock) -> None:
    record = measure({"a": Gpu("a", clock, lambda i: 5 + 0.4 * (i % 2))}, ONE, Plan(preset="trtexec-11"))
    assert record["runners"]["a"]["warnings"] == ["times scatter: coefficient of variation 3.8 %, limit 2.5 %"]
    assert measure({"a": Gpu("b", clock, lambda i: 5 + 0.4 * (i % 2))}, ONE)["runners"]["a"]["stable"]
    drowned = Gpu("a", clock, lambda i: 5 + 0.4 * (i % 2))
    drowned.parts = {"copy_in": 4.0, "copy_out": 4.0}  # with which it is 1.5 %
    record = measure({"a": drowned}, ONE, Plan(preset="trtexec-10"))
    assert record["runners"]["a"]["warnings"] == ["times scatter: coefficient of variation 3.8 %, limit 2.5 %"]


def test_ten_calls_are_enough_for_a_preset(clock: Clock) -> None:
    record = measure({"a": Gpu("a", clock, lambda i: 993)}, ONE, Plan(preset="trtexec-10"))
    assert record["runners"]["a"]["samples"] == 10


def test_a_gpu_says_how_its_calls_split_up_without_a_preset_too(clock: Clock) -> None:
    found = measure({"a": Gpu("a", clock, lambda i: 5)}, ONE, Plan(seconds=0.1))["runners"]["a"]
    assert (found["p50"], found["split"]["compute"], found["enqueue"]) == (5, 5, None)
    assert found["warnings"] == []


@pytest.mark.parametrize(
    ("parts", "preset", "words"),
    [
        ({"copy_in": 5.0, "copy_out": 1.0}, "edgeres", ["bound by copies in, not by computation (5 and 5 ms)"]),
        ({"copy_in": 1.0, "copy_out": 6.0}, "trtexec-10", ["bound by copies out, not by computation (6 and 5 ms)"]),
        ({"copy_in": 6.0, "copy_out": 6.0}, "trtexec-11", []),
        (
            {"copy_in": 1.0, "copy_out": 1.0, "enqueue": 4.1},
            "trtexec-10",
            ["bound by queueing work, not by the GPU (4.1 of 5 ms): a CUDA graph may help"],
        ),
        ({"copy_in": 1.0, "copy_out": 1.0, "enqueue": 3.9}, "trtexec-10", []),
    ],
)
def test_what_holds_the_gpu_up_is_said(clock: Clock, parts: dict[str, float], preset: str, words: list[str]) -> None:
    gpu = Gpu("a", clock, lambda i: 5)
    gpu.parts = parts
    found = measure({"a": gpu}, ONE, Plan(preset=preset, seconds=0.1))["runners"]["a"]
    assert found["warnings"] == words
    assert found["enqueue"] == parts.get("enqueue")
    assert set(found["split"]) == {"copy_in", "compute", "copy_out"}
    assert found["stable"] is True  # it is steady all the same


def test_a_preset_is_refused_on_the_cpu_and_in_pieces_before_anything_runs(clock: Clock) -> None:
    with pytest.raises(UsageError, match="on a GPU") as error:
        measure({"INT8": Worker("a", clock, lambda i: 1)}, ONE, Plan(preset="trtexec-10"))
    assert "INT8 runs on the CPU" in error.value.evidence
    gpu = Gpu("a", clock, lambda i: 1)
    gpu.largest = 4
    with pytest.raises(UsageError, match="INT8 takes 4 images in one"):
        measure({"FP32": Gpu("b", clock, lambda i: 1), "INT8": gpu}, PIXELS, Plan((1, 8), preset="trtexec-11"))
    assert clock.calls == []


class Meter:
    """What sensors give: 3 W at rest."""

    def __init__(self, given: dict[str, Any], joules: float | None) -> None:
        self.given, self.joules, self.idle_watts = given, joules, 3.0

    def record(self, images: int) -> dict[str, Any] | None:
        return None if self.joules is None else {"joules_per_image": self.joules / images, "idle_watts": 3.0}


def test_energy_is_that_of_each_runner_working_alone(clock: Clock, quiet: SimpleNamespace) -> None:
    meters: list[Meter] = []

    @contextmanager
    def energy(**given: Any) -> Iterator[Meter]:
        clock.calls.clear()
        meters.append(Meter(given, 12.0))
        yield meters[-1]

    quiet.energy = energy
    cpu, gpu = Worker("a", clock, lambda i: 5), Gpu("b", clock, lambda i: 10)
    runners = measure({"FP32": cpu, "INT8": gpu}, PIXELS[:2], Plan(seconds=1))["runners"]
    assert runners["FP32"]["energy"] == {"joules_per_image": pytest.approx(12 / 400, rel=0.01), "idle_watts": 3}
    assert runners["INT8"]["energy"]["joules_per_image"] == pytest.approx(12 / 200, rel=0.01)
    assert set(clock.calls) == {"b"}
    # at rest once; only the first waits for it
    assert [m.given for m in meters] == [{"gpu": False, "idle_watts": None}, {"gpu": True, "idle_watts": 3}]


def test_energy_counts_every_call_of_every_stream(monkeypatch: pytest.MonkeyPatch, quiet: SimpleNamespace) -> None:
    monkeypatch.setattr(benchmark, "SLICE", 0.005)
    side = [Meeting(threading.Barrier(1)) for _ in range(2)]
    spent: list[int] = []

    class Counting(Meter):
        def record(self, images: int) -> dict[str, Any] | None:
            spent.append(images)
            return super().record(images)

    @contextmanager
    def energy(**given: Any) -> Iterator[Meter]:
        before = [runner.calls for runner in side]
        yield Counting(given, 12.0)
        spent.append(sum(runner.calls for runner in side) - sum(before))

    quiet.energy = energy
    measure({"a": side}, PIXELS[:2], Plan(streams=2, seconds=0.02))
    calls, images = spent
    assert images == 2 * calls
    assert calls > 4


def test_energy_is_null_where_sensors_fall_silent_or_are_none(clock: Clock, quiet: SimpleNamespace) -> None:
    @contextmanager
    def silent(**given: Any) -> Iterator[Meter]:
        yield Meter(given, None)

    before = measure({"a": Worker("a", clock, lambda i: 5)}, ONE, Plan(seconds=0.1))
    calls = len(clock.calls)
    quiet.energy = silent
    after = measure({"a": Worker("a", clock, lambda i: 5)}, ONE, Plan(seconds=0.1))
    assert before["runners"]["a"]["energy"] is after["runners"]["a"]["energy"] is None
    assert len(clock.calls) > 2 * calls  # it did run for them; without sensors nothing more runs
    assert before["left_out"][-1] == "no energy per image: no meter of the processor"
    assert not any("energy" in words for words in after["left_out"])


def test_a_fixed_batch_that_is_another_is_said(clock: Clock) -> None:
    fixed = Worker("a", clock, lambda i: 5)
    fixed.batch = 4
    words = ["computes 4 images a call, whatever the batch"]
    assert measure({"a": fixed}, ONE, Plan(seconds=0.1))["runners"]["a"]["warnings"] == words
    assert measure({"a": fixed}, PIXELS, Plan((4,), seconds=0.1))["runners"]["a"]["warnings"] == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"batches": (0,)},
        {"batches": (4, -1)},
        {"batches": (4, 4)},
        {"streams": 0},
        {"seconds": 0},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"preset": "nvbench"},
        {"preset": "trtexec-10", "streams": 2},
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Plan(**wrong)


def test_too_few_pixels_or_runners_are_refused(clock: Clock) -> None:
    worker = Worker("a", clock, lambda i: 1)
    with pytest.raises(UsageError, match="a batch of 16, and 8 images"):
        measure({"a": worker}, PIXELS, Plan((1, 16)))
    with pytest.raises(UsageError, match="1 runners for 2 streams"):
        measure({"a": [worker]}, PIXELS, Plan(streams=2))
    assert clock.calls == []


def test_the_command_line_knows_every_preset() -> None:
    (option,) = [p for p in cli.commands["benchmark"].params if p.name == "preset"]
    assert set(option.type.choices) == set(PRESETS)  # type: ignore[attr-defined]
