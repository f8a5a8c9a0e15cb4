from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from edgeres import benchmark
from edgeres.benchmark import WARM_UP, latency, summary
from edgeres.runners import Runner


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
        self.name, self.clock, self.cost = name, clock, cost

    def _run(self, pixels: np.ndarray) -> np.ndarray:
        self.clock.now += self.cost(self.clock.calls.count(self.name)) / 1e3
        self.clock.calls.append(self.name)
        return pixels

    def close(self) -> None: ...


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


PIXELS = np.zeros((1, 3, 2, 2), np.float32)


def test_every_runner_is_measured_by_its_own_time_in_ms(clock: Clock) -> None:
    runners: dict[str, Runner] = {"a": Worker("a", clock, lambda i: 4 + i), "b": Worker("b", clock, lambda i: 0.5)}
    times = latency(runners, PIXELS, samples=3)
    assert list(times) == ["a", "b"]
    np.testing.assert_allclose(times["a"], [4 + WARM_UP, 5 + WARM_UP, 6 + WARM_UP], rtol=1e-6)
    np.testing.assert_allclose(times["b"], [0.5] * 3, rtol=1e-6)


def test_the_warm_up_is_not_counted(clock: Clock) -> None:
    worker = Worker("a", clock, lambda i: 1000 if i < WARM_UP else 1)
    np.testing.assert_allclose(latency({"a": worker}, PIXELS, samples=10)["a"], [1] * 10, rtol=1e-6)


def test_runners_take_turns(clock: Clock) -> None:
    runners: dict[str, Runner] = {name: Worker(name, clock, lambda i: 1) for name in "abc"}
    latency(runners, PIXELS, samples=4)
    assert clock.calls == ["a", "b", "c"] * (WARM_UP + 4)


def test_percentiles_of_200_samples_are_samples_by_rank() -> None:
    samples = np.random.default_rng(0).permutation(np.arange(1, 201)).astype(float)
    assert summary(samples, 1) == {"p50": 100.0, "p90": 180.0, "p99": 198.0, "batch": 1, "samples": 200}


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 99, 100, 101, 200, 1000])
def test_a_percentile_leaves_out_no_more_than_its_share(n: int) -> None:
    found = summary(np.arange(n, dtype=float), 8)
    for p in (50, 90, 99):
        above = n - 1 - found[f"p{p}"]
        assert above * 100 <= (100 - p) * n < (above + 1) * 100
    assert (found["batch"], found["samples"]) == (8, n)


def test_the_samples_stay_in_the_order_they_were_taken() -> None:
    samples = np.asarray([3.0, 1.0, 2.0])
    summary(samples, 1)
    np.testing.assert_array_equal(samples, [3, 1, 2])
