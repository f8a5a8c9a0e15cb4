"""From a measured range to the interval that INT8 covers. One method, one function.

A method maps a `TensorRange` and the scheme's number of integer ``steps`` between the ends to (lo, hi) with
lo <= 0 <= hi. Values outside are clipped to the ends. Symmetric schemes use -max(|lo|, |hi|) to max(|lo|, |hi|).
"""

from __future__ import annotations

import numpy as np

from edgeres.calibrate import BINS, TensorRange

PERCENTILE = 99.999
"""Share of values that ``percentile`` keeps on each side, in percent."""


def minmax(r: TensorRange, steps: int) -> tuple[float, float]:
    """The whole measured range: nothing is clipped."""
    return min(r.min, 0.0), max(r.max, 0.0)


def percentile(r: TensorRange, steps: int) -> tuple[float, float]:
    """The interval that leaves (100 - PERCENTILE) % of all values outside, on each side."""
    share = np.concatenate([[0.0], np.cumsum(r.histogram)]) / r.count  # of values below each edge
    tail = 1 - PERCENTILE / 100
    lo = r.edges()[np.searchsorted(share, tail, side="right") - 1]
    hi = r.edges()[np.searchsorted(share, 1 - tail, side="left")]
    return _within(r, float(lo), float(hi))


def mse(r: TensorRange, steps: int) -> tuple[float, float]:
    """The interval with the least squared error of rounding inside and clipping outside, over a grid of ends.

    Rounding costs step^2 / 12 per value on average, clipping the squared distance to the end. Exact zeros, half of
    what leaves a ReLU, cost nothing: every scheme represents 0 exactly.
    """
    lo, hi = minmax(r, steps)
    centers = (r.edges()[:-1] + r.edges()[1:]) / 2
    shrink = np.linspace(0.2, 1.0, 161)[:, None]

    def cost(lo: np.ndarray | float, hi: np.ndarray | float) -> np.ndarray:
        outside = np.maximum(centers - hi, 0) + np.maximum(lo - centers, 0)  # (161, 2 BINS)
        rounding = (r.count - r.zeros) * np.square((np.asarray(hi) - lo) / steps) / 12
        return np.ravel(rounding) + np.square(outside) @ r.histogram

    full_lo, full_hi = lo, hi
    for _ in range(2):  # the ends interact only through the step, so taking turns settles at once
        hi = float((full_hi * shrink)[np.argmin(cost(lo, full_hi * shrink)), 0])
        lo = float((full_lo * shrink)[np.argmin(cost(full_lo * shrink, hi)), 0])
    return lo, hi


def entropy(r: TensorRange, steps: int) -> tuple[float, float]:
    """The threshold whose quantized distribution of |x| diverges least (Kullback-Leibler) from the measured one.

    TensorRT's calibration (S. Migacz, "8-bit inference with TensorRT", GTC 2017): for each candidate the clipped
    values join the last bin of the reference P; Q spreads each quantization level evenly over its non-empty bins.
    The bin at zero is left out: zero is exact, and a ReLU's zeros would outweigh everything else.
    """
    counts = (r.histogram[BINS:] + r.histogram[BINS - 1 :: -1]).astype(np.float64)  # of |x| over [0, limit)
    counts[0] = 0
    levels = steps // 2 + 1 if r.min < 0 else steps + 1  # integers for |x|: the sign takes half of them
    used = int(np.flatnonzero(counts).max(initial=0)) + 1
    best, best_divergence = used, np.inf
    above = counts.sum() - np.cumsum(counts)  # values beyond each bin
    for bins in range(min(levels, used), used + 1, 4):
        inside = counts[:bins]
        level = np.arange(bins) * levels // bins
        filled = inside > 0
        total = np.bincount(level, inside, levels)
        share = np.bincount(level, filled, levels)
        q = np.where(filled, (total / np.maximum(share, 1))[level], 0)
        p = inside.copy()
        p[-1] += above[bins - 1]
        if not filled[-1]:
            continue  # P has mass where Q cannot have any: infinite divergence
        divergence = np.sum(p[filled] / p.sum() * np.log((p[filled] / p.sum()) / (q[filled] / q.sum())))
        if divergence < best_divergence:
            best, best_divergence = bins, divergence
    threshold = float(r.edges()[BINS + best])
    return _within(r, -threshold, threshold)


def _within(r: TensorRange, lo: float, hi: float) -> tuple[float, float]:
    """Cut an interval to what was measured, zero included."""
    return min(max(lo, r.min), 0.0), max(min(hi, r.max), 0.0)


METHODS = {"minmax": minmax, "entropy": entropy, "percentile": percentile, "mse": mse}
