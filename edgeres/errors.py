"""Every error a user can cause, and the one way to ask for an optional package.

    EdgeresError               exit status 1; cause, evidence, next step
    ├── UsageError             exit status 2: an option, a key or a combination that makes no sense
    ├── MissingDependency      a package of an extra is not installed
    ├── InputError             a file is missing, unreadable, or not what it should be; `remote.Unreachable` is one
    ├── StaleError             an artifact was made from other inputs than these
    └── BuildError             an executor refused a graph or an engine

Anything else that escapes is a bug in edgeres and keeps its traceback.
"""

from __future__ import annotations

import importlib
from typing import Any


class EdgeresError(Exception):
    """What went wrong, in three parts: ``cause`` (one line), ``evidence`` (what was seen), ``hint`` (what to do)."""

    exit_code = 1

    def __init__(self, cause: str, *, evidence: str = "", hint: str = "") -> None:
        super().__init__(cause)
        self.cause, self.evidence, self.hint = cause, evidence, hint

    def __str__(self) -> str:
        return "\n".join(part for part in (self.cause, self.evidence, self.hint) if part)


class UsageError(EdgeresError):
    """An option, a recipe key or a combination of them that makes no sense."""

    exit_code = 2


class MissingDependency(EdgeresError):
    """An optional package is not installed; the hint names the extra that brings it."""


class InputError(EdgeresError):
    """A file is missing, unreadable, or not what it should be."""


class StaleError(EdgeresError):
    """An artifact was made from other inputs than the ones at hand; the evidence names the input that changed."""


class BuildError(EdgeresError):
    """An executor refused a graph or an engine."""


def need(module: str, extra: str) -> Any:
    """Import ``module``, or raise `MissingDependency` naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependency(
            f"this needs the package {module.split('.')[0]!r}",
            evidence=str(error),
            hint=f'pip install "edgeres[{extra}]"',
        ) from error
