"""What became of a part, in the words that parent and child share. Standard library only."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

OK, FAILED, SKIPPED = "ok", "failed", "skipped"
NOT_HERE = "does not run on compute capability"
UNTIL = "GPU_CHECK_UNTIL"
"""Variable of the environment: when the parent ends the process, in seconds of `time.time`."""
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


def finite(value: Any) -> Any:
    """``value`` as JSON can say it: a float that is not finite becomes null."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def so_far(work: Path, name: str, record: dict[str, Any]) -> None:
    """Keep what part ``name`` has measured by now, in case its process does not live to the end."""
    write(kept(work, name), finite(outcome(FAILED, "", record)))


def left() -> float:
    """Seconds until this process is ended; infinite where nobody will."""
    return float(os.environ.get(UNTIL, "inf")) - time.time()


def write(path: Path, value: Any) -> None:
    """JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def under_way(work: Path, what: str = "") -> None:
    """Note what is done now, so that the parent can say it if this process dies over it; "" when it is over."""
    (work / "under-way").write_text(what, encoding="utf-8")
