"""Pictures of what was measured."""

from __future__ import annotations

import difflib
from pathlib import Path

from edgeres.calibrate import RangeTable
from edgeres.errors import InputError, UsageError, need
from edgeres.files import atomic
from edgeres.thresholds import METHODS

FORMATS = (".png", ".svg")
BARS = 128
"""At most this many on each side of zero: what can be told apart."""


def histogram(table: RangeTable, tensor: str, path: Path) -> None:
    """Write the histogram of ``tensor``, log counts, with the interval of each method on top, as PNG or SVG."""
    if path.suffix not in FORMATS:
        raise UsageError(f"cannot plot to {path}", hint=f"the name of a picture ends in {' or '.join(FORMATS)}")
    if tensor not in table.tensors:
        near = difflib.get_close_matches(tensor, table.tensors, 5, 0.5) or list(table.tensors)[:5]
        raise InputError(f"no tensor {tensor!r} in the range table", hint=f"there are {', '.join(near)}")
    figure = need("matplotlib.figure", "report").Figure(figsize=(10, 5), layout="constrained")
    r = table.tensors[tensor]
    counts, edges = r.bars(BARS)
    axes = figure.add_subplot()
    axes.stairs(counts, edges, fill=True, color="0.75")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)
    axes.set_ylabel(f"values in {edges[1] - edges[0]:.3g}")
    axes.set_xlabel("value")
    axes.set_title(f"{tensor}: {r.count:,} values of {table.images:,} images, {r.zeros / r.count:.1%} exactly 0")
    for i, (name, method) in enumerate(METHODS.items()):
        lo, hi = method(r, 255)
        style = {"color": f"C{i}", "linestyle": ("-", "--", ":")[i % 3], "linewidth": 1.5}
        for n, end in enumerate(sorted({lo, hi} - {0}) or [0]):
            axes.axvline(end, **style, label=None if n else f"{name}\n{lo:.4g} to {hi:.4g}")
    figure.legend(loc="outside right upper", frameon=False)
    with atomic(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=120)
