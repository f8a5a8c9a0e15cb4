"""Tables and text as the terminal shows them."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text


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
