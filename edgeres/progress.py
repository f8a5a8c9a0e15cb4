"""What is going on, told on stderr. Silent unless `to` was called, so that a library user sees nothing."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
_console: ContextVar[Console | None] = ContextVar("console", default=None)


@contextmanager
def to(console: Console | None) -> Iterator[None]:
    """Show progress on ``console`` inside the block; None is silence."""
    token = _console.set(console)
    try:
        yield
    finally:
        _console.reset(token)


def printable(text: str) -> str:
    """``text`` without what would move the cursor or talk to the terminal otherwise; colors stay, and lines.

    Names come from image folders, bundles and devices, and may hold anything.
    """
    return _CONTROL.sub("\ufffd", text)


_CONTROL = re.compile(r"\x1b(?!\[[0-9;]*m)|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\ud800-\udfff]")


def say(message: str) -> None:
    """One line: a step taken, a fact that the user should not miss."""
    if console := _console.get():
        console.print(printable(message), highlight=False, markup=False, emoji=False, soft_wrap=True)


@contextmanager
def busy(what: str) -> Iterator[Callable[[str], None]]:
    """A spinner on a terminal, for work that has no steps to count; what it yields changes the text beside it."""
    console = _console.get()
    if console is None or not console.is_terminal:
        yield lambda text: None
        return
    with console.status(what) as status:
        yield status.update


class Step(Protocol):
    """Reports one more of ``total`` done, with a word about how it goes."""

    def __call__(self, note: str = "") -> None: ...


@contextmanager
def bar(what: str, total: int, unit: str) -> Iterator[Step]:
    """A bar on a terminal; elsewhere one line when done. ``unit`` is a plural."""
    console = _console.get()
    if console is None:
        yield lambda note="": None
        return
    start, last = time.perf_counter(), ""
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn()]
    columns += [TimeRemainingColumn(), TextColumn("{task.fields[note]}")]
    progress = Progress(*columns, console=console, transient=True)
    with progress if console.is_terminal else nullcontext():  # one that is disabled prints an empty line with Rich 13
        task = progress.add_task(what, total=total, note="")

        def step(note: str = "") -> None:
            nonlocal last
            last = note or last
            progress.update(task, advance=1, note=last)

        yield step
    if total == 1:
        unit = unit.removesuffix("es" if unit.endswith("ches") else "s")
    say(f"{what}: {total:,} {unit} in {time.perf_counter() - start:.1f} s{', ' * bool(last)}{last}")


def track(items: Iterable[T], what: str, total: int, unit: str = "batches") -> Iterator[T]:
    """Iterate over ``items`` under a `bar`."""
    with bar(what, total, unit) as step:
        for item in items:
            yield item
            step()
