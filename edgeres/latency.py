"""What measured times come to: percentiles with intervals, spread, steadiness, ratios; and the table that shows them.

Times are in ms, in the order they were taken. Intervals are of 95 % and assume no distribution: their ends are samples,
chosen by rank so that a binomial count lies between the ranks often enough (Hahn and Meeker, Statistical Intervals,
5.2). They take samples for independent; what drifts is not, and is reported as such.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.text import Text

from edgeres.tables import Measured, Trimmed

PERCENTILES = {"p50": 500, "p90": 900, "p95": 950, "p99": 990, "p99.9": 999}
"""Name -> how many of 1,000 samples lie at or below it."""
BEYOND = 2
"""Samples that must lie beyond a percentile, or it would be the maximum or next to it."""
SURE = 3688
"""The least number of samples that give p99.9, the rarest of `PERCENTILES`, its interval."""
CONFIDENCE = 0.95
SCATTER = 10.0
"""Coefficient of variation, percent, above which a measurement is not called stable."""
DRIFT = 0.03
"""Change of the median between the first and the second half above which it is not called stable."""
BINS = 40


def rank(samples: int, per_mille: int) -> int:
    """Which of the ascending ``samples`` is the percentile: trtexec's rule, which takes a sample as it is.

    It leaves out (1 - p) of them from above, in 32-bit floats: 1 of 200 for p99, as 1 - 0.99 is a little less than 0.01
    there (NVIDIA/TensorRT: samples/common/sampleReporting.cpp, findPercentile).
    """
    share = np.float32(1) - np.float32(per_mille / 10) / np.float32(100)
    return max(samples - 1 - int(share * np.float32(samples)), 0)


def median(ordered: np.ndarray) -> float:
    """Of an ascending array, as trtexec has it: of an even number, the mean of the two in the middle (findMedian)."""
    return float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def percentile(ordered: np.ndarray, per_mille: int) -> float | None:
    """The percentile of an ascending array; None where fewer than `BEYOND` samples lie beyond. A median always is."""
    at = rank(len(ordered), per_mille)
    enough = per_mille == PERCENTILES["p50"] or len(ordered) - 1 - at >= BEYOND
    return _value(ordered, per_mille) if enough else None


def _value(ordered: np.ndarray, per_mille: int) -> float:
    """The percentile, however few samples there are."""
    return median(ordered) if per_mille == PERCENTILES["p50"] else float(ordered[rank(len(ordered), per_mille)])


def interval(ordered: np.ndarray, per_mille: int, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Where the percentile lies of what an ascending array is a sample of; None where that takes more samples."""
    ends = ranks(len(ordered), per_mille, confidence)
    return (float(ordered[ends[0]]), float(ordered[ends[1]])) if ends else None


@functools.lru_cache(256)
def ranks(n: int, per_mille: int, confidence: float = CONFIDENCE) -> tuple[int, int] | None:
    """Which two of ``n`` ascending samples the percentile lies between; each end fails half as often as allowed."""
    if n < 1:
        return None
    below = np.cumsum(_binomial(n, per_mille / 1000))  # P(at most k samples are below the percentile)
    tail = (1 - confidence) / 2
    low = int(np.searchsorted(below, tail, side="right")) - 1  # the last k with P(at most k) within the tail
    high = int(np.searchsorted(below, 1 - tail, side="left")) + 1  # the first k with P(k or more) within it
    return (low, high - 1) if low >= 0 and high <= n else None


def _binomial(n: int, p: float) -> np.ndarray:
    """Probabilities of 0 to n successes."""
    factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange(n + 1)
    return np.exp(factorial[n] - factorial - factorial[::-1] + k * math.log(p) + (n - k) * math.log1p(-p))


def summary(milliseconds: np.ndarray, batch: int) -> dict[str, Any]:
    """p50, p90 and p99 in ms however few samples there are, as results have had them from the first version on."""
    ordered, n = np.sort(milliseconds), len(milliseconds)
    values = {name: round(_value(ordered, PERCENTILES[name]), 4) for name in ("p50", "p90", "p99")}
    return {**values, "batch": batch, "samples": n}


def in_short(record: dict[str, Any], name: str) -> dict[str, Any]:
    """`summary` of a runner in a benchmark record; where samples were too few for a percentile, the slowest of them."""
    runner = record["runners"][name]
    slowest = runner["histogram"]["edges"][-1]
    values = {key: slowest if runner[key] is None else runner[key] for key in ("p50", "p90", "p99")}
    return {**values, "batch": record["batch"], "samples": runner["samples"]}


def describe(milliseconds: np.ndarray, images: int, seconds: float) -> dict[str, Any]:
    """The record of one runner, that took ``seconds`` for all its calls, of ``images`` images in all."""
    ordered, mean = np.sort(milliseconds), float(np.mean(milliseconds))
    intervals = {name: interval(ordered, p) for name, p in PERCENTILES.items() if percentile(ordered, p) is not None}
    return {
        **{name: _rounded(percentile(ordered, p)) for name, p in PERCENTILES.items()},
        "mean": _rounded(mean),
        "cv": round(variation(milliseconds), 3),
        "intervals": {name: [_rounded(end) for end in ends] for name, ends in intervals.items() if ends},
        "samples": len(ordered),
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 2) if seconds else None,
        "histogram": histogram(milliseconds),
    }


def variation(milliseconds: np.ndarray) -> float:
    """Coefficient of variation in percent: standard deviation by mean."""
    mean = float(np.mean(milliseconds))
    return 100 * float(np.std(milliseconds)) / mean if mean else 0.0


def histogram(milliseconds: np.ndarray) -> dict[str, list[Any]]:
    """Counts of all samples between ``edges`` that grow by equal factors, so that stragglers do not crowd the rest."""
    low, high = float(np.min(milliseconds)), float(np.max(milliseconds))
    if not 0 < low < high:
        return {"edges": [_rounded(low), _rounded(high)], "counts": [len(milliseconds)]}
    edges = np.geomspace(low, high, BINS + 1)
    counts, _ = np.histogram(np.log(milliseconds), np.log(edges))
    return {"edges": [float(f"{edge:.6g}") for edge in edges], "counts": counts.tolist()}


def doubts(milliseconds: np.ndarray, limit: float = SCATTER) -> list[str]:
    """Why these samples are not of something steady, in words; empty if they seem to be.

    ``limit`` is on the coefficient of variation. A drift counts if it is above `DRIFT` and beyond chance: the
    intervals of the two halves' medians are apart.
    """
    found = []
    if (cv := variation(milliseconds)) > limit:
        found.append(f"times scatter: coefficient of variation {cv:.1f} %, limit {limit:g} %")
    halves = [np.sort(half) for half in np.array_split(milliseconds, 2)]
    ends = [interval(half, 500) for half in halves]
    if ends[0] and ends[1]:
        first, second = (median(half) for half in halves)
        apart = ends[0][1] < ends[1][0] or ends[1][1] < ends[0][0]
        if apart and abs(second - first) > DRIFT * first:
            found.append(f"times drift: median {first:.4g} ms in the first half, {second:.4g} ms in the second")
    return found


def speedup(first: np.ndarray, other: np.ndarray, paired: bool = True) -> dict[str, Any]:
    """How much faster ``other`` is than ``first``: the median of the ratios within rounds, and its interval.

    Without rounds (``paired``) it is the ratio of the medians; its interval is made of theirs, of 97.5 % each.
    """
    if paired:
        ratios = np.sort(first / other)
        ends = interval(ratios, 500)
        value = median(ratios)
    else:
        sides = [np.sort(side) for side in (first, other)]
        top, bottom = (median(side) for side in sides)
        (a, b), value = (interval(side, 500, (1 + CONFIDENCE) / 2) for side in sides), top / bottom
        ends = (a[0] / b[1], a[1] / b[0]) if a and b else None
    return {"of_p50": round(value, 4), "interval": [round(end, 4) for end in ends] if ends else None}


def left_out(runners: dict[str, Any]) -> list[str]:
    """Which percentile has no interval in one of ``runners``, why, and for how long to measure that it has one."""
    short = [r["seconds"] / r["samples"] for r in runners.values() if r["samples"] < SURE]
    if not short:
        return []
    took = SURE * max(short)
    seconds = math.ceil(1.1 * took)  # the pace may change
    return [f"no interval of p99.9: it takes {SURE:,} samples, here {took:.3g} s of each; --seconds {seconds} gives it"]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def table(record: dict[str, Any]) -> Trimmed:
    """A benchmark as the terminal shows it: one table, then what the reader should know. Fits 80 columns."""
    runners = record["runners"]
    streams = f", {record['streams']} streams" if record["streams"] > 1 else ""
    preset = f", as {record['preset']} measures" if record["preset"] != "edgeres" else ""
    batches = [p["batch"] for p in record["sweep"]] or [record["batch"]]
    batch = f"batch{'es' * (len(batches) > 1)} {', '.join(map(str, batches))}"
    title = Text(f"{record.get('title') or 'latency'}, {batch}{streams}{preset}", style="bold")
    notes = [f"{name}: {warning}" for name, r in runners.items() for warning in r["warnings"]]
    notes += [*record["conditions"]["warnings"], *record.get("notes", []), *record.get("left_out", [])]
    unstable = [name for name, r in runners.items() if not r["stable"]]
    return Trimmed(
        title,
        aligned(_columns(record)),
        *([Text(f"not stable: {', '.join(unstable)}", style="yellow")] if unstable else []),
        *(Text(f"note: {note}") for note in notes),
    )


def aligned(columns: dict[str, list[str]]) -> Measured:
    """A table of numbers, from heading -> cells; the first column has the names."""
    rows: list[Sequence[str]] = [[*columns], *zip(*columns.values(), strict=True)]
    return Measured("", rows)


def _columns(record: dict[str, Any]) -> dict[str, list[str]]:
    """Heading -> a cell per runner, and per runner and further batch of a sweep; without columns that say nothing."""
    runners, speedups = record["runners"], record["speedup"]
    rows: list[dict[str, str]] = []
    digits = max((len(str(point["batch"])) for point in record["sweep"]), default=0)

    def called(batch: int, name: str) -> dict[str, str]:
        return {"batch": f"{batch:<{digits}}  {name}"} if digits else {"": name}

    for name, r in runners.items():
        row = called(record["batch"], name)
        row |= {"p50 ms": _ms(r["p50"]), "95% interval": _ends(r["intervals"].get("p50"))}
        row |= {heading: _ms(r[heading]) for heading in ("p99", "p99.9")}
        row["images/s"] = _per_second(r["images_per_second"])
        if s := speedups.get(name):
            row |= {"faster": f"{s['of_p50']:.2f}x", "interval": _ends(s["interval"], "{:.2f}")}
        if r["energy"]:
            row["J/image"] = f"{r['energy']['joules_per_image']:.3g}"
        rows.append(row)
    for point in record["sweep"]:
        if point["batch"] == record["batch"]:
            continue
        first = next(iter(point["runners"].values()))["p50"]
        for name, r in point["runners"].items():
            row = {**called(point["batch"], name), "p50 ms": _ms(r["p50"])}
            row["images/s"] = _per_second(r["images_per_second"])
            if name in speedups and first and r["p50"]:
                row["faster"] = f"{first / r['p50']:.2f}x"
            rows.append(row)
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    cells = {heading: [row.get(heading, "") for row in rows] for heading in headings}
    return {heading: column for heading, column in cells.items() if any(cell not in ("", "-") for cell in column)}


def _ms(value: float | None) -> str:
    """Three digits that count, at least."""
    return "-" if value is None else f"{value:.{max(0, min(4, 2 - math.floor(math.log10(value))))}f}" if value else "0"


def _per_second(value: float | None) -> str:
    return "-" if value is None else f"{value:,.{0 if value >= 100 else 1}f}"


def _ends(ends: list[float] | None, form: str = "") -> str:
    if not ends:
        return "-"
    return " ".join(form.format(end) if form else _ms(end) for end in ends)
