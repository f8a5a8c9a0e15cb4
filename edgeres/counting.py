"""The compiled loop of calibration: extremes and histogram of some values, in pieces that stay in the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from edgeres.errors import need

BINS = 2048
"""Histogram bins on each side of zero."""
SMALLEST = 2.0**-116
"""The first limit of a histogram."""
PIECE = 1 << 13
MAGNITUDE = np.int32(0x7FFFFFFF)
INFINITY = 0x7F800000

Counter = Callable[[np.ndarray, np.ndarray, float], tuple[int, int, int, float]]


def count(values: np.ndarray, histogram: np.ndarray, limit: float) -> tuple[float, float, int, float]:
    """Add float32 ``values`` (n,) to ``histogram`` (2 BINS,), whose ``limit`` may have to grow.

    Gives min, max, how many are zero, and the new limit. If one of the values is not finite, neither is min or max,
    and only some of the others were counted. Threads may count at the same time, each into its own histogram.
    """
    *keys, zeros, limit = compiled()(values, histogram, limit)
    # a sum with 0.0 makes -0.0 plain: which of two zeros comes first must not matter
    lo, hi = np.asarray([k if k >= 0 else k ^ int(MAGNITUDE) for k in keys], np.int32).view(np.float32) + np.float32(0)
    return float(lo), float(hi), zeros, limit


@functools.cache
def compiled() -> Counter:
    """`_count` as machine code: made in about a second, then kept in numba's cache, if there is room for one."""
    numba = need("numba", "calibrate")
    signature = "(float32[::1], int64[::1], float64)"
    try:
        return numba.njit(signature, nogil=True, cache=True)(_count)
    except (OSError, RuntimeError):  # neither the package's folder nor the user's cache can be written
        return numba.njit(signature, nogil=True)(_count)


def _count(values: Any, histogram: Any, limit: float) -> Any:
    """In one step each, which the compiler turns into vector instructions: extremes, places in the histogram, counts.

    Extremes are compared as integers that order like the floats they stand for: the bits of a positive one; of a
    negative one with all bits but the sign inverted. ``~key`` is then the magnitude of a negative value, and NaN lies
    outside the infinities. Floats themselves would keep the compiler from using vectors, and NaN would be lost.
    """
    bits = values.view(np.int32)
    low, high, zeros = MAGNITUDE, ~MAGNITUDE, 0
    place = np.empty(PIECE, np.uint32)
    # equal values often follow each other, and adding to one counter twice in a row has to wait: take turns
    turns = np.zeros((4, 2 * BINS), np.uint32)
    first, second, third, fourth = turns[0], turns[1], turns[2], turns[3]
    for start in range(0, values.size, PIECE):
        piece, raw = values[start : start + PIECE], bits[start : start + PIECE]
        for i in range(raw.size):
            key = np.int32(raw[i] ^ np.int32(np.int32(raw[i] >> np.int32(31)) & MAGNITUDE))
            low, high = min(low, key), max(high, key)
            zeros += np.int32(raw[i] & MAGNITUDE) == 0
        largest = max(high, ~low)
        if largest >= INFINITY:
            break
        magnitude = np.int32(largest).view(np.float32)
        if magnitude >= limit:
            for turn in turns:
                for i in range(2 * BINS):
                    histogram[i] += turn[i]
                    turn[i] = 0
            while magnitude >= limit:
                limit *= 2
                for i in range(BINS // 2):  # pairs of bins, from zero outward
                    histogram[BINS + i] = histogram[BINS + 2 * i] + histogram[BINS + 2 * i + 1]
                    histogram[BINS - 1 - i] = histogram[BINS - 1 - 2 * i] + histogram[BINS - 2 - 2 * i]
                histogram[: BINS // 2] = 0
                histogram[BINS + BINS // 2 :] = 0
        scale = BINS / limit  # a power of two: products are exact, in float64 those of the smallest values too
        for i in range(piece.size):
            place[i] = np.uint32(np.int32(np.floor(piece[i] * scale)) + np.int32(BINS))
        whole = piece.size // 4 * 4
        for i in range(0, whole, 4):
            first[place[i]] += np.uint32(1)
            second[place[i + 1]] += np.uint32(1)
            third[place[i + 2]] += np.uint32(1)
            fourth[place[i + 3]] += np.uint32(1)
        for i in range(whole, piece.size):
            first[place[i]] += np.uint32(1)
    for turn in turns:
        for i in range(2 * BINS):
            histogram[i] += turn[i]
    return low, high, zeros, limit
