"""What a call of a plan needs on the GPU, and calls back to back."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeres.errors import BuildError
from edgeres.runners.cuda import Cuda

PARTS = ("copy_in", "compute", "copy_out")
"""What a call of the GPU consists of."""
UNDER_WAY = 2
"""Calls back to back that are under way at a time."""


@dataclass
class Slot:
    """What one piece of a batch needs from its arrival to its result, so that two pieces can be under way.

    ``marks`` are events: before the copy in, after it, after the computation, and after the copy out.
    """

    stream: Any
    marks: list[Any]
    source: np.ndarray
    result: np.ndarray
    source_address: int
    result_address: int
    graph: Any = None


def back_to_back(
    cuda: Cuda,
    slot: Slot,
    images: int,
    enqueue: Callable[[], None],
    go_on: Callable[[dict[str, float]], bool],
    transfers: bool,
    spin: bool,
) -> None:
    """Compute ``images`` images of ``slot`` again and again, as trtexec does, until ``go_on`` says no.

    The next call is queued before the former is waited for; copies in, computation and copies out have a stream each,
    so that they overlap (NVIDIA/TensorRT: samples/common/sampleInference.cpp, IterationBase and inferenceLoop).
    ``enqueue`` queues the computation in the slot's stream. ``transfers``: copy in and out at every call. ``spin``: ask
    until a call is done, with a core that does nothing else, or else sleep. ``go_on`` gets each call that is done, as
    milliseconds of `PARTS`, and of the host to ``enqueue``; the one then under way, in the end, it does not get.
    """
    copies_in, copies_out = cuda.stream(), cuda.stream()
    free = deque([cuda.event(blocking=not spin) for _ in range(2 * len(PARTS))] for _ in range(UNDER_WAY))
    queued: deque[tuple[list[Any], float]] = deque()

    def queue(marks: list[Any]) -> float:
        """Queue a call with its marks, a beginning and an end for each part -> milliseconds to ``enqueue``."""
        arrive, arrived, begin, computed, leave, left = marks
        if transfers:
            cuda.record(arrive, copies_in)
            # into memory that the former call may be reading: it holds the same pixels
            cuda.copy_in(slot.source_address, slot.source[:images], copies_in)
            cuda.record(arrived, copies_in)
            cuda.wait(slot.stream, arrived)
        cuda.record(begin, slot.stream)
        start = time.perf_counter()
        enqueue()
        ms = 1e3 * (time.perf_counter() - start)
        cuda.record(computed, slot.stream)
        if transfers:
            cuda.wait(copies_out, computed)
            cuda.record(leave, copies_out)
            cuda.copy_out(slot.result[:images], slot.result_address, copies_out)
            cuda.record(left, copies_out)
        return ms

    def collect(marks: list[Any], ms: float) -> dict[str, float]:
        """Wait for a call."""
        cuda.finish(marks[5] if transfers else marks[3])
        split = dict.fromkeys(PARTS, 0.0)
        for i, part in enumerate(PARTS):
            if transfers or part == "compute":
                split[part] = cuda.elapsed(marks[2 * i], marks[2 * i + 1])
        return {**split, "enqueue": ms}

    try:
        while True:
            marks = free.popleft()
            queued.append((marks, queue(marks)))
            if len(queued) == UNDER_WAY:
                done = queued.popleft()
                free.append(done[0])
                if not go_on(collect(*done)):
                    return
    finally:
        for stream in (copies_in, slot.stream, copies_out):
            with suppress(BuildError):  # what went wrong is raised already, or does not matter any more
                cuda.synchronize(stream)
