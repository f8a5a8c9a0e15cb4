"""Latency of several runners, measured in turn, so that drift of the machine meets them all alike."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from edgeres.progress import bar
from edgeres.runners import Runner

WARM_UP = 5
SAMPLES = 200
"""Per runner: enough that p99 is not the maximum."""


def latency(runners: dict[str, Runner], pixels: np.ndarray, samples: int | None = None) -> dict[str, np.ndarray]:
    """Wall time of ``infer(pixels)`` in ms, ``samples`` (`SAMPLES`) per runner, after a warm-up that is not counted.

    Each runner gets pixels in the type it takes.
    """
    samples = samples or SAMPLES
    ready = {name: runner.prepare(pixels) for name, runner in runners.items()}
    times: dict[str, list[float]] = {name: [] for name in runners}
    with bar("measure latency", samples, "rounds") as step:
        for i in range(WARM_UP + samples):
            for name, runner in runners.items():
                start = time.perf_counter()
                runner.infer(ready[name])
                times[name].append(1e3 * (time.perf_counter() - start))
            if i >= WARM_UP:
                step()
    return {name: np.asarray(values[WARM_UP:]) for name, values in times.items()}


def summary(milliseconds: np.ndarray, batch: int) -> dict[str, Any]:
    """p50, p90 and p99 in ms, by trtexec's rule: the sample at n - 1 - int((1 - p/100) n), no interpolation."""
    ordered = np.sort(milliseconds)
    n = len(ordered)
    percentiles = {f"p{p}": round(float(ordered[n - 1 - (100 - p) * n // 100]), 4) for p in (50, 90, 99)}
    return {**percentiles, "batch": batch, "samples": n}
