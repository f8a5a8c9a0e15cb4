"""What became of a part, in the words that parent and child share. Standard library only."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

OK, FAILED, SKIPPED = "ok", "failed", "skipped"
NOT_HERE = "does not run on compute capability"
Outcome = dict[str, Any]
"""``status``, ``reason`` ("" if ok), ``seconds``, ``record``: what the part measured, {} if it came to nothing."""


class Skip(Exception):
    """This part cannot be done here, through no fault of edgeres: the text says why."""


def outcome(status: str, reason: str = "", record: dict[str, Any] | None = None) -> Outcome:
    """An `Outcome` that took no time yet."""
    return {"status": status, "reason": reason, "seconds": 0.0, "record": record or {}}


def slug(name: str) -> str:
    """``name`` as part of a file name."""
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in name)


def kept(work: Path, name: str) -> Path:
    """Where the outcome of part ``name`` lies."""
    return work / f"{slug(name)}.outcome.json"


def record_of(work: Path, name: str) -> dict[str, Any]:
    """What part ``name`` measured; {} if it has not, or not yet."""
    try:
        return dict(json.loads(kept(work, name).read_text(encoding="utf-8"))["record"])
    except OSError:
        return {}


def write(path: Path, value: Any) -> None:
    """JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def under_way(work: Path, what: str = "") -> None:
    """Note what is done now, so that the parent can say it if this process dies over it; "" when it is over."""
    (work / "under-way").write_text(what, encoding="utf-8")
