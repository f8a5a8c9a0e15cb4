"""How far two sets of logits are apart, measured the same way everywhere."""

from __future__ import annotations

import math

import numpy as np

MIN_PARITY_DB = 80.0
"""FP32 rounding alone leaves well over 100 dB; a wrong graph falls far below this."""


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two sums of squares; inf without noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def squares(reference: np.ndarray, result: np.ndarray) -> tuple[float, float]:
    """(signal, noise) = (sum ref^2, sum (ref - result)^2), in FP64, for `decibels`."""
    reference, result = reference.astype(np.float64), result.astype(np.float64)
    return float(np.square(reference).sum()), float(np.square(reference - result).sum())
