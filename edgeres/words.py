"""Numbers as reports write them; every report says the same number the same way. None becomes ``NONE``."""

from __future__ import annotations

from collections.abc import Sequence

NONE = "\N{EN DASH}"
"""Stands where there is no number."""


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A number with so many digits after the point, with its sign if asked."""
    if value is None:
        return NONE
    text = f"{value:+.{digits}f}" if sign else f"{value:,.{digits}f}"
    return text.replace("-", "+") if sign and float(text) == 0 else text  # -0.00 is no loss of its own


def between(ends: Sequence[float | None] | None, digits: int = 2, sign: bool = False) -> str:
    """The two ends of an interval: "+0.05 to +0.55"."""
    if not ends or None in ends:
        return NONE
    return " to ".join(number(end, digits, sign) for end in ends)


def milliseconds(value: float | None) -> str:
    """Milliseconds with at least three digits that count."""
    return NONE if value is None else number(value, 2 if value >= 1 else 3 if value >= 0.1 else 4)


def spread(ends: Sequence[float | None] | None) -> str:
    """An interval of milliseconds, both ends written alike."""
    if not ends or ends[0] is None or ends[1] is None:
        return NONE
    return between(ends, 2 if ends[0] >= 1 else 3 if ends[0] >= 0.1 else 4)


def probability(value: float | None) -> str:
    """A p-value; "< 0.0001" where more digits say nothing."""
    if value is None:
        return NONE
    return "< 0.0001" if value < 1e-4 else f"{value:.3f}" if value >= 0.001 else f"{value:.4f}"


def decibels(value: float | None) -> str:
    """A signal to noise ratio; None and infinity, which JSON cannot write, mean that nothing differs."""
    return "exact" if value in (None, float("inf")) else f"{value:.1f} dB"


def megabytes(size: int | None) -> str:
    """Bytes as megabytes of 10^6."""
    return NONE if size is None else f"{size / 1e6:,.1f}"


def count(amount: int, what: str, plural: str = "") -> str:
    """Such as "1 image", "2 images", "3 classes"."""
    return f"{amount:,} {what if amount == 1 else plural or what + 's'}"
