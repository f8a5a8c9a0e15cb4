"""Where the marks of a chart lie, in percent of its width and height; templates/charts.html draws them.

Positions are percentages, so that a chart fills a phone and a screen alike while its text keeps one size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

BARS = 120
"""At most this many in a histogram: as many as can be told apart on a phone."""


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis, in percent."""

    at: float
    label: str


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram in percent: its left end, width and height."""

    at: float
    width: float
    height: float


@dataclass(frozen=True)
class Axis:
    """A linear axis from ``lo`` to ``hi``."""

    lo: float
    hi: float

    @classmethod
    def around(cls, values: Iterable[float | None], pad: float = 0.08) -> Axis:
        """An axis on which all ``values`` fit, with ``pad`` of its length to spare at both ends."""
        known = [value for value in values if value is not None and math.isfinite(value)]
        lo, hi = min(known, default=0.0), max(known, default=1.0)
        room = (hi - lo) * pad or abs(hi) * pad or 1.0
        return cls(lo - room, hi + room)

    def at(self, value: float) -> float:
        """Where ``value`` lies, in percent; beyond an end, that end."""
        share = (value - self.lo) / (self.hi - self.lo)
        return round(100 * min(1.0, max(0.0, share)), 2)

    def up(self, value: float) -> float:
        """Where ``value`` lies on a vertical axis, in percent from the top."""
        return round(100 - self.at(value), 2)

    def steps(self, most: int = 5) -> list[float]:
        """Up to ``most`` round numbers within the axis, as far apart as 1, 2 or 5 times a power of ten."""
        rough = (self.hi - self.lo) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * (1 - 1e-9))
        first, last = math.ceil(self.lo / step - 1e-9), math.floor(self.hi / step + 1e-9)
        return [n * step for n in range(first, last + 1)]

    def ticks(self, most: int = 5, sign: bool = False) -> list[Tick]:
        """Labelled places on this axis; all labels have as many digits as they need."""
        steps = self.steps(most)
        apart = steps[1] - steps[0] if len(steps) > 1 else abs(self.hi - self.lo)
        digits = max(0, -math.floor(math.log10(apart) + 1e-9))
        labels = [f"{step:{'+' if sign else ','}.{digits}f}" for step in steps]
        return [
            Tick(self.at(step), "0" if float(label.replace(",", "")) == 0 else label)
            for step, label in zip(steps, labels, strict=True)
        ]


def histogram(edges: Sequence[float], counts: Sequence[float], axis: Axis, log: bool = False) -> list[Bar]:
    """Bars of the part of a histogram that lies within ``axis``, the highest 100 percent; narrow bins are merged.

    Heights are counts per width, since bins need not be equally wide; with ``log``, the logarithm of the counts.
    """
    bins = [(lo, hi, n) for lo, hi, n in zip(edges, edges[1:], counts, strict=False) if hi > axis.lo and lo < axis.hi]
    together = max(1, math.ceil(len(bins) / BARS))
    groups = [bins[i : i + together] for i in range(0, len(bins), together)]
    merged = [(group[0][0], group[-1][1], sum(n for *_, n in group)) for group in groups]
    heights = [math.log10(1 + n) if log else n / (hi - lo) if hi > lo else 0.0 for lo, hi, n in merged]
    highest = max(heights, default=0.0) or 1.0
    return [
        Bar(axis.at(lo), round(axis.at(hi) - axis.at(lo), 2), round(100 * height / highest, 2))
        for (lo, hi, n), height in zip(merged, heights, strict=True)
        if n
    ]


def apart(places: Sequence[tuple[float, float]], wide: float = 25, high: float = 8) -> list[float]:
    """Heights for names at ``places`` (x, y in percent, y from the top), moved down where two would overlap.

    A name is up to ``wide`` percent of the chart wide and ``high`` percent high.
    """
    moved = [y for _, y in places]
    done = list[int]()
    for i in sorted(range(len(places)), key=lambda i: places[i][1]):
        for other in sorted(done, key=lambda j: moved[j]):
            if abs(places[i][0] - places[other][0]) < wide and abs(moved[i] - moved[other]) < high:
                moved[i] = round(moved[other] + high, 2)
        done.append(i)
    return moved
