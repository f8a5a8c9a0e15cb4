"""One part in a process of its own: ``python child.py WORK NAME CALL ARGUMENTS``, the last as JSON."""

from __future__ import annotations

import ctypes
import importlib
import json
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from outcome import FAILED, OK, SKIPPED, Outcome, Skip, finite, kept, outcome, write

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Do it, and keep the outcome where the parent looks for it."""
    if sys.platform == "linux":  # a parent that is killed cannot end this, and the GPU would stay taken
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    work, name, call, arguments = sys.argv[1:]
    write(kept(Path(work), name), finite(done(Path(work), call, json.loads(arguments))))


def done(work: Path, call: str, arguments: dict[str, Any]) -> Outcome:
    """Call "module:function" with ``work`` and ``arguments`` -> what came of it. ``checks`` in a record decide."""
    from edgeres.errors import EdgeresError, MissingDependency

    module, _, function = call.partition(":")
    try:
        record = getattr(importlib.import_module(module), function)(work, **arguments)
    except Skip as reason:
        return outcome(SKIPPED, str(reason))
    except MissingDependency as error:
        return outcome(SKIPPED, " ".join((error.cause, error.evidence)).strip())
    except ModuleNotFoundError as error:
        return outcome(SKIPPED, f"the package {error.name} is not installed")
    except EdgeresError as error:
        return outcome(FAILED, " ".join(str(error).split()))
    except Exception as error:  # a bug, here or in a driver: the log has the rest
        traceback.print_exc()
        return outcome(FAILED, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    missed = [what for what, met in record.get("checks", {}).items() if not met]
    return outcome(FAILED if missed else OK, f"not so: {'; '.join(missed)}" if missed else "", record)


if __name__ == "__main__":
    main()
