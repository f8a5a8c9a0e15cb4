from __future__ import annotations

import io

import pytest
from rich.console import Console

from edgeres import progress
from edgeres.progress import printable


def test_names_cannot_talk_to_the_terminal() -> None:
    assert printable("a\x1b]0;title\x07\x1b[2Jb\x9b2J\udcff") == "a\ufffd]0;title\ufffd\ufffd[2Jb\ufffd2J\ufffd"
    assert printable("\x1b[1;31mred\x1b[0m\n\tnext") == "\x1b[1;31mred\x1b[0m\n\tnext"
    console = Console(file=io.StringIO(), width=80)
    with progress.to(console):
        progress.say("skipped \x1b[2J.jpg")
        progress.say("a:100:b")
    assert console.file.getvalue() == "skipped \ufffd[2J.jpg\na:100:b\n"  # type: ignore[attr-defined]


def test_one_of_a_thing_is_not_several() -> None:
    console = Console(file=io.StringIO(), width=80)
    with progress.to(console):
        for unit in ("batches", "models", "MiB"):
            for total in (1, 2):
                with progress.bar("work", total, unit):
                    pass
    said = [line.partition(" in ")[0] for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert said == [f"work: {n}" for n in ("1 batch", "2 batches", "1 model", "2 models", "1 MiB", "2 MiB")]


def test_off_a_terminal_nothing_is_drawn_and_no_line_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.Progress, "stop", lambda self: self.console.print())  # as Rich 13 does when disabled
    told = io.StringIO()
    with progress.to(Console(file=told)):
        assert list(progress.track([1, 2], "look", 2)) == [1, 2]
    assert told.getvalue().startswith("look: 2 batches in ")
    assert told.getvalue().count("\n") == 1
