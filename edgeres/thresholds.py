"""From a measured range to the interval that INT8 covers. One method, one function.

A method maps a `TensorRange` and the scheme's number of integer ``steps`` between the ends to (lo, hi) with
lo <= 0 <= hi. Values outside are clipped to the ends. Symmetric schemes use -max(|lo|, |hi|) to max(|lo|, |hi|).

Weights are at hand themselves. A rule for them maps rows (K, n), one per output channel, and the largest integer
``top`` to a threshold per row (K,): the scale is threshold / top, and integers reach from -top - 1 to top.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from edgeres.calibrate import BINS, TensorRange

CLIPPING = 1 / 64
"""Times steps is what ``mse`` counts clipping for. Rounding errors go both ways and average out over a neighborhood;
clipped values lie together and are all cut the same way. Held-out SQNR of the logits is best with 2 to 3 at 127 steps,
with 4 to 8 at 255 (DECISIONS.md)."""
PERCENTILE = 99.999
"""Share of values that ``percentile`` keeps on each side, in percent, where its name says no other."""
SHARES = np.concatenate([np.geomspace(1 / BINS, 0.2, 80, endpoint=False), np.linspace(0.2, 1.0, 161)])
"""Shares of a measured range that ``mse`` tries; one odd value may reach a hundred times as far as all others."""
SHRINK = np.linspace(1.0, 0.5, 51, dtype=np.float32)
"""Shares of the largest weight that ``least_squares`` tries."""
PIECE = 1 << 15
"""Weights looked at together, so that they stay in the processor's cache."""


def minmax(r: TensorRange, steps: int) -> tuple[float, float]:
    """The whole measured range: nothing is clipped."""
    return min(r.min, 0.0), max(r.max, 0.0)


def percentile(r: TensorRange, steps: int, keep: float = PERCENTILE) -> tuple[float, float]:
    """The interval that leaves (100 - ``keep``) % of all values outside, on each side."""
    share = _before(r.histogram) / r.count  # of values below each edge
    lo = r.edges()[np.searchsorted(share, 1 - keep / 100, side="right") - 1]
    hi = r.edges()[np.searchsorted(share, keep / 100, side="left")]
    return _within(r, float(lo), float(hi))


def mse(r: TensorRange, steps: int) -> tuple[float, float]:
    """The interval with the least squared error, of rounding inside and (weighted) of clipping outside.

    Over a grid of ends. Rounding costs step^2 / 12 per value on average, clipping the squared distance to the end,
    times `CLIPPING` * steps. Exact zeros, half of what leaves a ReLU, cost nothing: every scheme represents 0 exactly.
    """
    full_lo, full_hi = lo, hi = minmax(r, steps)
    negative, positive = _clipping(r.histogram[BINS - 1 :: -1], r), _clipping(r.histogram[BINS:], r)

    def cost(lo: np.ndarray | float, hi: np.ndarray | float) -> np.ndarray:
        rounding = (r.count - r.zeros) * np.square((np.asarray(hi) - lo) / steps) / 12
        return rounding + CLIPPING * steps * (negative(-np.asarray(lo)) + positive(np.asarray(hi)))

    for _ in range(2):  # the ends interact only through the step, so taking turns settles at once
        hi = float((full_hi * SHARES)[np.argmin(cost(lo, full_hi * SHARES))])
        lo = float((full_lo * SHARES)[np.argmin(cost(full_lo * SHARES, hi))])
    return lo, hi


def _clipping(counts: np.ndarray, r: TensorRange) -> Callable[[np.ndarray], np.ndarray]:
    """Squared distances beyond an end >= 0, as a function of it: sum n (c - end)^2 over the bins whose center c is."""
    centers = (np.arange(BINS) + 0.5) * (r.limit / BINS)
    n, nc, ncc = (np.append(np.cumsum((counts * centers**k)[::-1])[::-1], 0.0) for k in range(3))

    def cost(end: np.ndarray) -> np.ndarray:
        i = np.searchsorted(centers, end)
        return ncc[i] - 2 * end * nc[i] + np.square(end) * n[i]

    return cost


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
    bins = np.arange(min(levels, used), used + 1, 4)  # candidates (C,): how many bins stay inside
    bins = bins[counts[bins - 1] > 0]  # else P has mass where Q cannot have any: infinite divergence
    if not len(bins):
        return _within(r, -r.limit * used / BINS, r.limit * used / BINS)
    first = -(-np.arange(levels + 1) * bins[:, None] // levels)  # (C, levels + 1): where each level begins
    level = np.diff(_before(counts)[first])  # (C, levels): values at each level
    q = level / np.maximum(np.diff(_before(counts > 0)[first]), 1)  # (C, levels): Q in each filled bin of a level
    # KL = sum P log(P / Q) - log(sum P) + log(sum Q), over sum P; of the bins only P's last differs from what Q spreads
    last = counts[bins - 1]
    inside = _before(counts)[bins]
    beyond = counts.sum() - inside
    p_log_p = _before(counts * _log(counts))[bins] - last * _log(last) + (last + beyond) * _log(last + beyond)
    p_log_q = (level * _log(q)).sum(1) + beyond * _log(q[:, -1])
    divergence = (p_log_p - p_log_q) / counts.sum() + np.log(inside)
    threshold = r.limit * int(bins[np.argmin(divergence)]) / BINS
    return _within(r, -threshold, threshold)


def _before(values: np.ndarray) -> np.ndarray:
    """Sum of the values before each place, the place behind the last included: (n,) -> (n + 1,)."""
    return np.concatenate([[0.0], np.cumsum(values)])


def _log(values: np.ndarray) -> np.ndarray:
    """Logarithm; 0 for 0, which no term is to notice."""
    return np.log(np.where(values > 0, values, 1.0))


def _within(r: TensorRange, lo: float, hi: float) -> tuple[float, float]:
    """Cut an interval to what was measured, zero included."""
    return min(max(lo, r.min), 0.0), max(min(hi, r.max), 0.0)


METHODS: dict[str, Callable[[TensorRange, int], tuple[float, float]]] = {
    "minmax": minmax,
    "entropy": entropy,
    "percentile-99.9": partial(percentile, keep=99.9),
    "percentile-99.99": partial(percentile, keep=99.99),
    "percentile": percentile,
    "mse": mse,
}


def absmax(rows: np.ndarray, top: int) -> np.ndarray:
    """The largest magnitude of each row: nothing is clipped."""
    return np.abs(rows).max(1, initial=0)


def least_squares(rows: np.ndarray, top: int) -> np.ndarray:
    """The threshold of each row whose integers restore it with the least squared error, rounding and clipping alike.

    Over a grid of shares of the largest magnitude. That of a row of zeros is 0.
    """
    largest = absmax(rows, top)
    share = np.ones_like(largest)
    step = max(1, PIECE // max(rows.shape[1], 1))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        # in units of the last integer: weights as small or large as floats get have squares, too
        unit = rows[part] / np.where(largest[part] > 0, largest[part], 1)[:, None] * np.float32(top)
        error = np.empty((len(SHRINK), len(unit)), np.float32)
        restored = np.empty_like(unit)
        for squares, shrink in zip(error, SHRINK, strict=True):
            np.divide(unit, shrink, out=restored)
            np.rint(restored, out=restored)
            np.minimum(restored, top, out=restored)
            np.maximum(restored, -top - 1, out=restored)
            np.multiply(restored, shrink, out=restored)
            np.subtract(restored, unit, out=restored)
            np.einsum("kn,kn->k", restored, restored, out=squares)
        share[part] = SHRINK[error.argmin(0)]
    return largest * share


WEIGHTS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {"absmax": absmax, "mse": least_squares}
