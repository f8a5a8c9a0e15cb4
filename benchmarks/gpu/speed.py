"""All sides at one batch size, in turn, so that drift of the machine meets them all alike."""

from __future__ import annotations

import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import nets
import numpy as np
from outcome import Skip, left, record_of, under_way
from parts import BATCHES, PRECISIONS, TARGETS
from plans import folder_of, usable
from roofline import floor_ms
from sides import EngineSide, OrtSide, Side, TorchSide

from edgeres import sensors
from edgeres.errors import MissingDependency
from edgeres.latency import doubts, interval, speedup

FIRST = "PyTorch FP32"
"""What all are compared with, if it is there."""
COMPILED = "PyTorch FP16, compiled"
"""Opened last, as it takes longest: the others must not lack its time."""
LATE = "not ready after"
OPENING = 2.5
"""Times ``most`` that opening all sides may take."""
AGAIN = 5.0
"""Seconds after which a block that is late is told so again: code that it called may have caught the first."""
CALLS = 5
"""Per turn, clock and side: the first of them may find the GPU's caches full of the side before."""
ROUNDS = 4
"""At least, besides one that is not counted."""
AGREE_DB = {"fp32": 60.0, "fp16": 40.0, "int8": 5.0}
"""Signal to noise against the first side below which a side does not compute the same network."""

Maker = Callable[[], Side]


def makers(work: Path, pixels: np.ndarray) -> dict[str, tuple[str, Maker]]:
    """Name -> precision, and what opens it. PyTorch in every way, then the rest."""

    def pytorch(half: bool, channels_last: bool, how: str) -> Maker:
        return lambda: TorchSide(nets.load(work, "v1.5")[0], pixels, half, channels_last, how)

    def ort(precision: str) -> Maker:
        return lambda: OrtSide(nets.onnx_file(work, "v1.5", precision), pixels)

    def engine(folder: Path, graphs: bool) -> Maker:
        return lambda: EngineSide(folder, pixels, graphs)

    found: dict[str, tuple[str, Maker]] = {
        FIRST: ("fp32", pytorch(False, False, "eager")),
        "PyTorch FP16": ("fp16", pytorch(True, False, "eager")),
        "PyTorch FP16, CUDA graph": ("fp16", pytorch(True, True, "graph")),
        COMPILED: ("fp16", pytorch(True, True, "compiled")),
        "ONNX Runtime FP32": ("fp32", ort("fp32")),
        "ONNX Runtime FP16": ("fp16", ort("fp16")),
    }
    for target in TARGETS:
        for precision in reversed(PRECISIONS):
            if usable(work, target, precision):
                folder = folder_of(work, target, "v1.5", precision)
                for graphs, how in ((False, ""), (True, ", CUDA graph")):
                    found[f"{target} {precision.upper()}{how}"] = precision, engine(folder, graphs)
    return found


def measure(
    work: Path, batch: int, seconds: float = 0.6, most: float = 35.0, without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Every side that opens in ``most`` seconds, for ``seconds`` each, as far as all fit ``most``.

    A side of others that does not open is skipped, and one that was too slow at another batch size is not waited for
    again. An engine that does not open is a failure, unless it lacks a package.
    """
    _, model = nets.load(work, "v1.5")
    pixels = nets.pixels(batch, model["crop"], 300)
    before, rates = sensors.conditions(), record_of(work, "matrix and copy rates")
    wanted = makers(work, pixels)
    skipped = {**slow(work, batch), **dict.fromkeys(without, "died")}
    until = time.monotonic() + min(OPENING * most, 0.6 * left())
    sides: dict[str, Side] = {}
    opening: dict[str, float] = {}
    checks: dict[str, bool] = {}
    try:
        for name in sorted(wanted, key=lambda name: urgency(name, wanted[name][0])):
            if name in skipped:
                continue
            under_way(work, name)
            start = time.monotonic()
            try:
                with within(min(most, until - start)):
                    sides[name] = opened(wanted[name][1])
                opening[name] = time.monotonic() - start
            except (Skip, TimeoutError, MissingDependency) as reason:
                skipped[name] = " ".join(str(reason).split())[:200]
            except Exception as error:  # compilers and drivers raise whatever they like
                skipped[name] = said(error)
                if name.startswith(tuple(TARGETS)):
                    checks[f"{name} opens"] = False
        sides = {name: sides[name] for name in wanted if name in sides}
        times, broken = in_turn(sides, seconds, min(most, 0.7 * left()), partial(under_way, work))
        logits = {name: sides[name].logits for name in times}
    finally:
        under_way(work)
        for name, side in sides.items():
            try:
                side.close()
            except Exception:  # what was measured is kept
                traceback.print_exc()
                checks[f"{name} closes"] = False
    skipped |= broken
    checks |= {f"{name} runs": False for name in broken}
    if not times:
        what = "nothing to compare: " + "; ".join(f"{name}: {why}" for name, why in skipped.items())
        raise RuntimeError(what) if broken else Skip(what)
    precisions = {name: wanted[name][0] for name in times}
    rows = {
        name: {
            "precision": precisions[name],
            "opened_s": opening[name],
            **row(found, batch, floor_ms(model["layers"], batch, precisions[name], rates)),
        }
        for name, found in times.items()
    }
    compare(rows, times)
    after = sensors.conditions(since=before)
    return {
        "batch": batch,
        "sides": rows,
        "skipped": skipped,
        "checks": {**checks, **agreement(logits, precisions)},
        "conditions": {"before": before, "after": after, "warnings": sensors.changed(before, after)},
    }


def urgency(name: str, precision: str) -> int:
    """What is opened first, as time may run out: the lowest. FP32 matters least, but for the side of comparison."""
    return 2 if name == COMPILED else 1 if precision == "fp32" and name != FIRST else 0


def slow(work: Path, batch: int) -> dict[str, str]:
    """Which sides were too slow to open at other batch sizes, and why."""
    others = [record_of(work, f"speed at batch {other}") for other in BATCHES if other != batch]
    told = {name: why for record in others for name, why in record.get("skipped", {}).items()}
    return {name: f"{why}, at another batch size" for name, why in told.items() if why.startswith(LATE)}


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` where the block is after ``seconds``: a compiler may take minutes."""
    if seconds <= 0:
        raise TimeoutError("no time")
    what, told = f"{LATE} {seconds:.3g} s", False

    def late(*_: Any) -> None:
        nonlocal told
        told = True
        raise TimeoutError(what)

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    except Exception as error:
        if told and not isinstance(error, TimeoutError):  # PyTorch makes an error of its own of it
            raise TimeoutError(what) from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def opened(maker: Maker) -> Side:
    """A side that has run both clocks once."""
    side = maker()
    try:
        side.compute()
        side.whole()
    except BaseException:
        side.close()
        raise
    return side


Times = dict[str, list[list[float]]]
"""Clock ("compute", "whole") -> milliseconds of each call of each round."""


def in_turn(
    sides: Mapping[str, Side], seconds: float, most: float, note: Callable[[str], None] = lambda name: None
) -> tuple[dict[str, Times], dict[str, str]]:
    """Rounds in which each side has its turn, until each has worked for ``seconds``; one at least, ``most`` seconds.

    Also those that broke, and over what: the others go on. ``note`` gets whose turn it is.
    """
    until = time.monotonic() + most
    times: dict[str, Times] = {name: {"compute": [], "whole": []} for name in sides}
    broken: dict[str, str] = {}
    spent, rounds = dict.fromkeys(sides, 0.0), -1
    while spent and (rounds < 1 or (time.monotonic() < until and (rounds < ROUNDS or min(spent.values()) < seconds))):
        for name in list(spent):
            note(name)
            start = time.perf_counter()
            try:
                for clock in ("compute", "whole"):
                    call = getattr(sides[name], clock)
                    taken = [call() for _ in range(CALLS)]
                    if rounds >= 0:
                        times[name][clock].append(taken)
            except Exception as error:  # drivers raise whatever they like
                traceback.print_exc()
                broken[name] = said(error)
                del times[name], spent[name]
                continue
            spent[name] += (time.perf_counter() - start) * (rounds >= 0)
        rounds += 1
    return times, broken


def said(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def row(times: Times, batch: int, floor: dict[str, float]) -> dict[str, Any]:
    """What is kept of one side. ``of_floor``: how many times the least that the GPU could take."""
    kept: dict[str, Any] = {}
    for clock, rounds in times.items():
        calls = np.asarray(rounds).ravel()
        ordered = np.sort(calls)
        p50 = statistics.median(calls)
        kept[clock] = {
            "p50_ms": p50,
            "interval_ms": interval(ordered, 500),
            "samples": len(calls),
            "images_per_s": 1e3 * batch / p50,
            "warnings": doubts(calls),
        }
    kept["floor_ms"] = floor
    kept["of_floor"] = kept["compute"]["p50_ms"] / floor["layers"] if floor else None
    return kept


def compare(rows: dict[str, dict[str, Any]], times: Mapping[str, Times]) -> None:
    """Add how many times faster each is than the first side, and than PyTorch at its fastest, by both clocks."""
    for clock in ("compute", "whole"):
        medians = {name: np.asarray([statistics.median(calls) for calls in t[clock]]) for name, t in times.items()}
        pytorch = [name for name in rows if name.startswith("PyTorch")]
        fastest = min(pytorch, key=lambda name: rows[name][clock]["p50_ms"], default="")
        for name, found in rows.items():
            against = {key: side for key, side in (("first", FIRST), ("fastest_pytorch", fastest)) if side in rows}
            found[clock]["faster"] = {key: ratio(medians[side], medians[name]) for key, side in against.items()}
        if fastest:
            rows[fastest][clock]["fastest_pytorch"] = True


def ratio(first: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """`speedup` of ``other``, over the rounds that both had."""
    rounds = min(len(first), len(other))
    return speedup(first[:rounds], other[:rounds])


def agreement(logits: Mapping[str, np.ndarray], precisions: Mapping[str, str]) -> dict[str, bool]:
    """Whether each side computes the network that the first one does: else its speed says nothing."""
    from edgeres.fidelity import decibels, squares

    first = next(iter(logits.values()))
    return {
        f"{name} computes the same network": decibels(*squares(first, found)) >= AGREE_DB[precisions[name]]
        for name, found in logits.items()
    }
