"""Tables and text as the terminal shows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

NAME = 8
"""Columns of a terminal that names keep, however many the numbers beside them take."""


class Trimmed:
    """Some renderables below each other, without the blanks that rich puts at the end of lines."""

    def __init__(self, *parts: RenderableType) -> None:
        self.parts = Group(*parts)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for line in console.render_lines(self.parts, options, pad=False):
            while line and not line[-1].text.strip():
                line.pop()
            if line:
                text, style, control = line.pop()
                line.append(Segment(text.rstrip(), style, control))
            yield from line
            yield Segment.line()


def plain_table(*columns: str, title: str, right: int = 99) -> Table:
    """A table without lines. ``right``: the first column that is aligned to the right."""
    name = Text(title)  # brackets in a path are no markup
    out = Table(title=name, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        out.add_column(column, justify="right" if i >= right else "left")
    return out


class Measured:
    """A table of numbers, named by its first column. The first of ``rows`` is the heading.

    A number that is cut is another number. Where there is too little room, names are folded; where that is not enough,
    the columns that are too many follow below, under the same names.
    """

    def __init__(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        self.title, self.rows = title, rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        room = options.max_width
        name, *widths = [max(map(cell_len, column)) for column in zip(*self.rows, strict=True)]
        gap = 2 if name + sum(widths) + 2 * len(widths) <= min(room, 80) else 1
        parts, least = [list[int]()], min(name, NAME)
        for i, width in enumerate(widths):
            if parts[-1] and least + sum(widths[j] + gap for j in parts[-1]) + gap + width > room:
                parts.append([])
            parts[-1].append(i)
        if self.title:
            yield Text(self.title, style="bold")  # brackets in it are no markup
        for part in parts:
            out = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
            left = max(least, room - sum(widths[i] + gap for i in part))
            out.add_column(self.rows[0][0], width=min(name, left), overflow="fold")
            for i in part:
                out.add_column(self.rows[0][i + 1], justify="right", no_wrap=True, width=widths[i])
            for cells in self.rows[1:]:
                out.add_row(Text(cells[0]), *(Text(cells[i + 1]) for i in part))
            yield Trimmed(out)
