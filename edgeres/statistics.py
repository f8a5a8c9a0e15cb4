"""Intervals and tests on counts of images. Shares come in percent, differences in percentage points."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""

Interval = tuple[float, float]


def wilson(hits: float, images: float) -> Interval:
    """95% score interval of ``hits`` among ``images``, percent (Wilson 1927, JASA 22)."""
    n, squared = images + Z95**2, Z95**2
    center = (hits + squared / 2) / n
    half = Z95 * math.sqrt(hits * (images - hits) / images + squared / 4) / n
    # at the ends of the scale the formula gives 0 and 1 but for rounding
    return 100 * (center - half) if hits else 0.0, 100 * (center + half) if hits < images else 100.0


def paired(lost: float, won: float, images: float) -> Interval:
    """95% interval of a drop in points, paired by image: ``lost`` went from right to wrong, ``won`` the other way.

    Tango 1998, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design" (Statistics in Medicine 17): all drops that the score test does not reject. Counts need not be whole.
    """
    return -100 * _tango(won, lost, images), 100 * _tango(lost, won, images)


def _tango(lost: float, won: float, images: float) -> float:
    """The largest drop, as a share, that the score test does not reject."""
    low, high = (lost - won) / images, 1.0
    for _ in range(60):  # halves, until floats end
        drop = (low + high) / 2
        # the likeliest share of `won` if that is the drop is the root of a quadratic, 2 n x^2 + b x + c
        b = (2 * images - lost + won) * drop - lost - won
        c = -won * drop * (1 - drop)
        # where every image was won, what is below the root is 0 but for rounding
        share = (math.sqrt(max(0.0, b * b - 8 * images * c)) - b) / (4 * images)
        variance = images * (2 * share + drop * (1 - drop))
        if images * drop - (lost - won) > Z95 * math.sqrt(max(0.0, variance)):
            high = drop
        else:
            low = drop
    return high


def unpaired(before: tuple[float, float], after: tuple[float, float]) -> Interval:
    """95% interval of a drop in points between two (hits, images) that are not matched image by image.

    Newcombe 1998, "Interval estimation for the difference between independent proportions" (Statistics in Medicine
    17), method 10: from the Wilson interval of each.
    """
    p, q = (100 * hits / images for hits, images in (before, after))
    return apart(p, wilson(*before), q, wilson(*after))


def apart(p: float, p_ends: Interval, q: float, q_ends: Interval) -> Interval:
    """95% interval of p - q, of two independent estimates, from the interval of each.

    Zou and Donner 2008, "Construction of confidence limits about effect measures" (Statistics in Medicine 27).
    """
    return p - q - math.hypot(p - p_ends[0], q_ends[1] - q), p - q + math.hypot(p_ends[1] - p, q - q_ends[0])


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p-value of the hypothesis that ``lost`` and ``won`` are equally likely (McNemar's test)."""
    changed, fewer = lost + won, min(lost, won)
    tail = term = 1  # binomial coefficients in whole numbers: exact for any count
    for k in range(fewer):
        term = term * (changed - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**changed)


def holm(p_values: Sequence[float]) -> list[float]:
    """``p_values`` adjusted for being many, in their order (Holm 1979): those below 0.05 hold at 5% all together."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = least
    return adjusted
