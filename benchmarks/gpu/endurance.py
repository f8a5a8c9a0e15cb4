"""What only shows after a while: memory that does not come back. And whether both CUDA packages do the same."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import nets
import numpy as np
from outcome import Skip, under_way
from parts import TARGETS
from plans import folder_of

from edgeres import trt
from edgeres.build import Engine
from edgeres.runners import cuda

CYCLES = 100
INFERENCES = 100_000
DEVICE_LEAK = 16 << 20
"""Bytes that may be missing on the GPU in the end: a single engine left behind holds 50 MB of FP16 weights."""
HOST_LEAK = 64 << 20
"""Bytes that the process may have grown: a hundred plans left behind would be 5 GB, pieces of results more."""
SETTLED = 0.1
"""Share of the work, or of its time, after which memory is looked at first: what is loaded once has been by then."""
SLOWER = 1.25
"""Ratio of two medians above which two CUDA packages are not as fast as one another."""
TURNS = 100


def memory(target: str) -> dict[str, int]:
    """Bytes that are free on the GPU, and that this process holds on the host."""
    device = cuda.open_cuda(trt.EXECUTORS[TARGETS[target]][1])
    try:
        with device.current():
            free = device.free_bytes()
    finally:
        device.close()
    (line,) = (x for x in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if x.startswith("VmRSS"))
    return {"device_free": free, "host_used": int(line.split()[1]) * 1024}


def growth(before: dict[str, int], after: dict[str, int]) -> dict[str, Any]:
    """What was not given back between two looks at `memory`, and whether that is little."""
    device = before["device_free"] - after["device_free"]
    host = after["host_used"] - before["host_used"]
    return {
        "device_bytes": device,
        "host_bytes": host,
        "checks": {
            f"the GPU has its memory back, within {DEVICE_LEAK >> 20} MiB": device < DEVICE_LEAK,
            f"the process has not grown by {HOST_LEAK >> 20} MiB": host < HOST_LEAK,
        },
    }


def cycles(work: Path, target: str, seconds: float = 30.0, times: int = CYCLES) -> dict[str, Any]:
    """Load, run once, close: ``times``, or as often as fits ``seconds``. Memory before and after."""
    engine = Engine.load(folder_of(work, target, "v1.5", "fp16"))
    start, done, before = time.monotonic(), 0, None
    while done < times and (passed := time.monotonic() - start) < seconds:
        if before is None and done >= 2 and (done >= SETTLED * times or passed >= SETTLED * seconds):
            before = memory(target)
        with engine.open() as runner:
            runner.infer(np.zeros((2, 3, runner.input_size, runner.input_size), np.float32))
        done += 1
    if before is None:
        raise Skip(f"no time: {done} of {times} in {seconds:.0f} s, which tells nothing of memory")
    return {"cycles": done, "wanted": times, **cut(done, times), **growth(before, memory(target))}


def inferences(work: Path, target: str, seconds: float = 30.0, times: int = INFERENCES) -> dict[str, Any]:
    """One image at a time: ``times``, or as often as fits ``seconds``. Memory after a tenth of it and at the end."""
    engine = Engine.load(folder_of(work, target, "v1.5", "fp16"))
    with engine.open() as runner:
        image = runner.prepare(nets.pixels(1, runner.input_size, 400))
        first = runner.infer(image)
        start, done, before, same = time.monotonic(), 0, None, True
        while done < times and (passed := time.monotonic() - start) < seconds:
            if before is None and (done >= SETTLED * times or passed >= SETTLED * seconds):
                before = memory(target)
            found = runner.infer(image)
            same = same and bool((found == first).all())
            done += 1
        record = growth(before or memory(target), memory(target))
    record["checks"]["every inference gives the same logits"] = same
    return {"inferences": done, "wanted": times, **cut(done, times), **record}


def cut(done: int, times: int) -> dict[str, Any]:
    """The note that fewer were done than wanted."""
    return {} if done == times else {"skipped": {f"{times - done:,} of {times:,}": "no time"}}


def packages(work: Path, target: str, turns: int = TURNS, batch: int = 8) -> dict[str, Any]:
    """The same engine by PyCUDA and by cuda-python, in turn: the same logits to the last bit, and as fast."""
    engine = Engine.load(folder_of(work, target, "v1.5", "fp16"))
    runners: dict[str, Any] = {}
    try:
        for package in (cuda.PyCuda, cuda.CudaPython):
            under_way(work, package.__name__)
            with mock.patch("edgeres.runners.tensorrt.open_cuda", lambda extra, graphs, package=package: package()):
                try:
                    runners[package.__name__] = engine.open()
                except ImportError as error:
                    raise Skip(f"one of the two is missing: {error}") from error
        pixels = nets.pixels(batch, next(iter(runners.values())).input_size, 500)
        logits = {name: runner.infer(pixels) for name, runner in runners.items()}
        times: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(turns):
            for name, runner in runners.items():
                start = time.perf_counter()
                runner.infer(pixels)
                times[name].append(1e3 * (time.perf_counter() - start))
    finally:
        for runner in runners.values():
            runner.close()
    p50 = {name: statistics.median(taken) for name, taken in times.items()}
    (_, a), (_, b) = logits.items()
    return {
        "p50_ms": p50,
        "batch": batch,
        "ratio": max(p50.values()) / min(p50.values()),
        "checks": {
            "both give the same logits": bool((a == b).all()),
            f"neither is {SLOWER} times slower": max(p50.values()) <= SLOWER * min(p50.values()),
        },
    }
