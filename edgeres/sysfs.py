"""Short reads of what Linux shows as files below /sys and /proc."""

from __future__ import annotations

from pathlib import Path


def text(path: Path) -> str:
    """What ``path`` holds, without blanks around it; empty if it cannot be read.

    A sensor that is switched off answers with an error, as many do for want of a privilege.
    """
    try:
        return path.read_bytes().decode(errors="replace").strip("\0 \n\t")
    except OSError:
        return ""


def number(path: Path) -> float | None:
    """The number that ``path`` holds; None if it cannot be read, or holds something else."""
    try:
        return float(text(path))
    except ValueError:
        return None
