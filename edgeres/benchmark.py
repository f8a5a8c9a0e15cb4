"""Latency and throughput of several runners, measured in turn, so that drift of the machine meets them all alike."""

from __future__ import annotations

import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgeres import machine, sensors
from edgeres.errors import UsageError
from edgeres.latency import SCATTER, SURE, describe, doubts, left_out, speedup, summary
from edgeres.progress import say
from edgeres.runners import Runner
from edgeres.runners.calls import PARTS

__all__ = ["PRESETS", "Plan", "Preset", "latency", "measure", "summary"]

FORMAT = "edgeres benchmark 1"
WARM_UP = 5
"""Rounds that are not counted, at least."""
SAMPLES = 368
"""Per runner, at least: the fewest that give p99 its interval."""
SECONDS = 3.0
"""That each runner works, at least; a tenth of it before that, to warm up."""
TAIL = 7
"""For `SURE` samples a runner may go on for so many times `SECONDS`: some 20 s of each, a minute for three of them.
Calls of more than 5.7 ms would take minutes more, for a number that few need; who does gives ``seconds``.
"""
PATIENCE = 20
"""No runner is measured for longer than so many times its seconds, whatever `SAMPLES` says."""
MOST = 20_000
"""Rounds, at most: enough for p99.9, five times over."""
SWEEP_SAMPLES = 30
"""Per runner and further batch of a sweep: enough for a median."""
SLICE = 0.25
"""Seconds that the streams of one runner work before it is the next one's turn."""
SPLITS = 50
"""Calls that are looked into for how they split up."""
ENQUEUE_BOUND = 0.8
"""Share of the GPU's time from which on queueing the work holds it up (NVIDIA/TensorRT: sampleReporting.cpp)."""


@dataclass(frozen=True)
class Preset:
    """How trtexec measures an engine unless told otherwise, as far as its report depends on it.

    It lets one engine work alone, ``warm_up`` seconds that do not count, then 3 s and ``samples`` calls at least. Two
    calls are under way at a time; with ``spin`` its thread asks until one is done, else it sleeps. Without
    ``transfers`` nothing is copied but the input, once. Its latency is the GPU's time for copies in, computation and
    copies out; host time and what a call waits for the one before are not in it. ``scatter``: the percentage from
    which on it calls computation unstable, 1 before 10.13.2. Its averages of 10 runs are lines of its log; percentiles
    are of all calls. Sources are NVIDIA/TensorRT's samples/common/sampleOptions.h, sampleInference.cpp and
    sampleReporting.cpp.

    Throughput differs by one call in all: trtexec's time begins when the first call that counts does and ends with the
    last, here it begins when the call before is done.
    """

    transfers: bool
    cuda_graph: bool
    spin: bool
    scatter: float = 2.5
    warm_up: float = 0.2
    samples: int = 10


PRESETS = {
    "edgeres": None,
    "trtexec-10": Preset(transfers=True, cuda_graph=False, spin=False),
    "trtexec-11": Preset(transfers=False, cuda_graph=True, spin=True),
}
"""From 11 on, trtexec copies nothing, launches a CUDA graph and spins unless told otherwise (sampleOptions.cpp)."""


@dataclass(frozen=True)
class Plan:
    """What to measure: ``batches``, the first in full and the others as a sweep; ``streams`` at a time; as a preset.

    ``batches``: empty, all images that there are. ``seconds``: that each runner works, at least (`SECONDS`). Where they
    are not given, ``tail`` goes on until p99.9 has its interval too, if that takes no longer than `TAIL` allows.
    """

    batches: tuple[int, ...] = ()
    streams: int = 1
    preset: str = "edgeres"
    seconds: float | None = None
    tail: bool = True

    def __post_init__(self) -> None:
        for wrong, what in (
            (min(self.batches, default=1) < 1, f"a batch of {min(self.batches, default=1)} images"),
            (len(set(self.batches)) < len(self.batches), f"batches {self.batches} repeat themselves"),
            (self.streams < 1, f"{self.streams} streams"),
            (self.seconds is not None and not 0 < self.seconds < float("inf"), f"{self.seconds} seconds to measure"),
            (self.preset not in PRESETS, f"no preset {self.preset!r}; there are {', '.join(PRESETS)}"),
        ):
            if wrong:
                raise UsageError(what)
        if PRESETS[self.preset] and self.streams > 1:
            raise UsageError(
                f"preset {self.preset} is for one stream",
                evidence="streams take turns at an engine here; those of trtexec have a context each",
                hint="leave out --streams or --preset",
            )


@dataclass
class Times:
    """What was measured of one runner: milliseconds of each round's calls, their number, seconds that passed."""

    rounds: list[list[float]] = field(default_factory=list)
    samples: int = 0
    seconds: float = 0.0

    def add(self, calls: list[float], seconds: float) -> None:
        """Another round."""
        self.rounds.append(calls)
        self.samples += len(calls)
        self.seconds += seconds

    @property
    def all(self) -> np.ndarray:
        """Every call, in order."""
        return np.concatenate(self.rounds)

    @property
    def by_round(self) -> np.ndarray:
        """The median call of each round."""
        return np.asarray([statistics.median(calls) for calls in self.rounds])


Turn = Callable[[], tuple[list[float], float]]
"""A runner's part of a round: milliseconds of each call, and seconds that passed."""
Until = Callable[[list[Times]], bool]
"""Whether what was measured of each runner will do."""


def latency(runners: Mapping[str, Runner], pixels: np.ndarray, samples: int | None = None) -> dict[str, np.ndarray]:
    """Wall time of ``infer(pixels)`` in ms, ``samples`` (`SAMPLES`) per runner, after a warm-up that is not counted.

    Each runner gets pixels in the type it takes.
    """
    rounds = samples or SAMPLES
    turns = {name: _call(runner, pixels) for name, runner in runners.items()}
    say(f"measure latency of {', '.join(runners)}: {rounds} rounds")
    _in_turn(turns, lambda times: len(times[0].rounds) >= WARM_UP)
    times = _in_turn(turns, lambda times: len(times[0].rounds) >= rounds)
    return {name: each.all for name, each in times.items()}


def measure(
    runners: Mapping[str, Runner | Sequence[Runner]], pixels: np.ndarray, plan: Plan | None = None
) -> dict[str, Any]:
    """The benchmark record of ``runners``, compared with the first.

    A runner is one that all streams share, or one for each. ``pixels`` are normalized float32 (N, 3, H, W), N at least
    the largest batch. Raises `UsageError` for what cannot be measured.
    """
    plan = plan or Plan()
    sides = {name: _per_stream(runner, plan.streams) for name, runner in runners.items()}
    first, *more = plan.batches or (len(pixels),)
    if (most := max([first, *more])) > len(pixels):
        raise UsageError(f"a batch of {most}, and {len(pixels)} images to make it of")
    for name, side in sides.items():
        _refuse_preset(name, side[0], plan.preset, most)
    before = sensors.conditions()
    records, faster = _measure(sides, pixels[:first], plan)
    threads = _threads()
    sweep = [{"batch": first, "runners": _brief(records)}] if more else []
    for batch in more:
        at, _ = _measure(sides, pixels[:batch], plan, SWEEP_SAMPLES)
        sweep.append({"batch": batch, "runners": _brief(at)})
    after = sensors.conditions(since=before)
    changes = sensors.changed(before, after)
    for record in records.values():
        record["stable"] = record["stable"] and not changes
    unknown = _add_energy(records, sides, pixels[:first], plan.seconds or SECONDS)
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "format": FORMAT,
        "batch": first,
        "streams": plan.streams,
        "preset": plan.preset,
        "runners": records,
        "speedup": faster,
        "sweep": sweep,
        "left_out": [*left_out(records), *unknown] if plan.tail else [],
        "conditions": {"before": before, "after": after, "warnings": changes},
        "machine": {**machine.describe(), "affinity": affinity, "threads": threads},
    }


def _per_stream(runner: Runner | Sequence[Runner], streams: int) -> list[Runner]:
    if isinstance(runner, Runner):
        return [runner] * streams
    if len(runner) != streams:
        raise UsageError(f"{len(runner)} runners for {streams} streams")
    return list(runner)


def _refuse_preset(name: str, runner: Any, preset: str, batch: int) -> None:
    """Raise `UsageError` if ``runner`` cannot be measured by ``preset`` at ``batch``."""
    if PRESETS[preset] and not hasattr(runner, "repeat"):
        raise UsageError(
            f"preset {preset} is what trtexec measures on a GPU",
            evidence=f"{name} runs on the CPU: nothing is copied in or out, and there is no GPU to time",
            hint="leave out --preset",
        )
    if PRESETS[preset] and batch > runner.largest:
        raise UsageError(
            f"preset {preset} measures one call, and {name} takes {runner.largest} images in one",
            evidence=f"a batch of {batch}",
            hint="choose a smaller batch, or leave out --preset",
        )


def _measure(
    sides: dict[str, list[Runner]], pixels: np.ndarray, plan: Plan, samples: int | None = None
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """A record per runner, and how much faster each is than the first, at one batch size."""
    preset, seconds = PRESETS[plan.preset], plan.seconds or SECONDS
    least = samples or (preset.samples if preset else SAMPLES)
    warm_up = preset.warm_up if preset else seconds / 10
    tail = plan.tail and plan.seconds is None and not preset and samples is None
    splits: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    times: dict[str, Times] = {}

    def warm(each: list[Times]) -> bool:
        return len(each[0].rounds) >= WARM_UP and min(t.seconds for t in each) >= warm_up

    def done(each: list[Times]) -> bool:
        spent, rounds = [t.seconds for t in each], len(each[0].rounds)
        enough = min(spent) >= seconds and min(t.samples for t in each) >= least
        if enough and tail and min(t.samples for t in each) < SURE:
            enough = SURE * max(t.seconds / t.samples for t in each) > TAIL * seconds
        return rounds >= WARM_UP and (enough or rounds >= MOST or max(spent) >= PATIENCE * seconds)

    # one line and no spinner: what it draws would be measured too
    say(f"measure {', '.join(sides)} at batch {len(pixels)}: {seconds:g} s of each, and {least} calls, at least")
    # trtexec leaves the GPU and its caches to one engine; otherwise a round has every runner's turn
    if preset:
        for name, (runner, *_) in sides.items():
            times[name], splits[name] = _back_to_back(runner, pixels, preset, warm, done)
    else:
        turns = {name: _turn(side, pixels) for name, side in sides.items()}
        _in_turn(turns, warm)
        times = _in_turn(turns, done)
        for name, (runner, *_) in sides.items():
            if hasattr(runner, "split"):
                ready = runner.prepare(pixels)
                splits[name] = [runner.split(ready) for _ in range(SPLITS)]
    records = {name: _record(t, len(pixels), preset, least, splits[name]) for name, t in times.items()}
    for name, side in sides.items():
        if side[0].batch not in (None, len(pixels)):
            records[name]["warnings"].append(f"computes {side[0].batch} images a call, whatever the batch")
    first, *others = times.values()
    names = list(times)[1:]
    if preset:
        return records, {n: speedup(first.all, t.all, paired=False) for n, t in zip(names, others, strict=True)}
    return records, {n: speedup(first.by_round, t.by_round) for n, t in zip(names, others, strict=True)}


def _record(
    times: Times, batch: int, preset: Preset | None, least: int, splits: list[dict[str, float]]
) -> dict[str, Any]:
    """What is kept of one runner."""
    parts = {part: statistics.median(s[part] for s in splits) for part in splits[0]} if splits else {}
    enqueue = parts.pop("enqueue", None)
    judged = np.asarray([s["compute"] for s in splits]) if preset else times.all
    found = doubts(judged, preset.scatter if preset else SCATTER)
    warnings = list(found)
    if times.samples < least:
        warnings.append(f"{times.samples} samples in {times.seconds:.0f} s, {least} wanted: calls take long")
    if enqueue is not None and enqueue > ENQUEUE_BOUND * parts["compute"]:
        share = f"{enqueue:.3g} of {parts['compute']:.3g} ms"
        warnings.append(f"bound by queueing work, not by the GPU ({share}): a CUDA graph may help")
    copies = {"in": parts.get("copy_in", 0.0), "out": parts.get("copy_out", 0.0)}
    for way, ms in copies.items():
        if parts and ms >= parts["compute"]:
            warnings.append(f"bound by copies {way}, not by computation ({ms:.3g} and {parts['compute']:.3g} ms)")
    return {
        **describe(times.all, batch * times.samples, times.seconds),
        "stable": not found,
        "warnings": warnings,
        "split": {part: round(ms, 4) for part, ms in parts.items()} or None,
        "enqueue": None if enqueue is None else round(enqueue, 4),
        "energy": None,
    }


def _brief(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a sweep keeps."""
    return {name: {key: r[key] for key in ("p50", "images_per_second")} for name, r in records.items()}


def _in_turn(turns: Mapping[str, Turn], done: Until) -> dict[str, Times]:
    """Rounds in which each of ``turns`` comes once, until ``done``."""
    times = {name: Times() for name in turns}
    each = list(times.values())
    while not done(each):
        for name, turn in turns.items():
            times[name].add(*turn())
    return times


def _turn(side: list[Runner], pixels: np.ndarray) -> Turn:
    """What a runner, or its streams, do in a round."""
    return _call(side[0], pixels) if len(side) == 1 else _slice(side, pixels)


def _call(runner: Runner, pixels: np.ndarray) -> Turn:
    """One call, by the clock on the wall."""
    ready = runner.prepare(pixels)

    def turn() -> tuple[list[float], float]:
        start = time.perf_counter()
        runner.infer(ready)
        seconds = time.perf_counter() - start
        return [1e3 * seconds], seconds

    return turn


def _back_to_back(
    runner: Any, pixels: np.ndarray, preset: Preset, warm: Until, done: Until
) -> tuple[Times, list[dict[str, float]]]:
    """A runner's calls as ``preset`` makes them, by the GPU's clock, and how each splits up; without the warm-up's."""
    times, splits, until, last = Times(), list[dict[str, float]](), warm, time.perf_counter()

    def go_on(split: dict[str, float]) -> bool:
        nonlocal times, until, last
        before, last = last, time.perf_counter()
        times.add([sum(split[part] for part in PARTS)], last - before)
        splits.append(split)
        if not until([times]):
            return True
        if until is done:
            return False
        times, until = Times(), done
        splits.clear()
        return True

    runner.repeat(runner.prepare(pixels), go_on, transfers=preset.transfers, spin=preset.spin)
    return times, splits


def _slice(side: list[Runner], pixels: np.ndarray) -> Turn:
    """As many calls in each stream as fit `SLICE`, streams at the same time, from the first start to the last end."""
    ready, calls = side[0].prepare(pixels), 1
    together = threading.Barrier(len(side))

    def stream(runner: Runner, times: int) -> list[float]:
        marks = []
        together.wait()
        for _ in range(times):
            marks.append(time.perf_counter())
            runner.infer(ready)
        return [*marks, time.perf_counter()]

    def turn() -> tuple[list[float], float]:
        nonlocal calls
        with ThreadPoolExecutor(len(side)) as pool:
            marks = list(pool.map(stream, side, [calls] * len(side)))
        seconds = max(m[-1] for m in marks) - min(m[0] for m in marks)
        found = [1e3 * (end - start) for m in marks for start, end in itertools.pairwise(m)]
        calls = max(calls, round(calls * SLICE / seconds)) if seconds else calls
        return found, seconds

    return turn


def _add_energy(
    records: dict[str, dict[str, Any]], sides: dict[str, list[Runner]], pixels: np.ndarray, seconds: float
) -> list[str]:
    """What an image costs while each runner works alone, after all have rested -> why not, where no sensor tells."""
    rest, unknown = None, []
    for name, side in sides.items():
        turn, calls, spent, on_gpu = _turn(side, pixels), 0, 0.0, hasattr(side[0], "split")
        with sensors.energy(gpu=on_gpu, idle_watts=rest) as meter:
            while meter is not None and spent < seconds:
                times, took = turn()
                calls, spent = calls + len(times), spent + took
        if meter is not None:
            rest = meter.idle_watts
            records[name]["energy"] = meter.record(calls * len(pixels))
        else:
            unknown.append(f"no energy per image: {sensors.why_no_energy(gpu=on_gpu)}")
    return list(dict.fromkeys(unknown))


def _threads() -> int | None:
    """Threads of this process, the executors' among them, where Linux tells."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else None
