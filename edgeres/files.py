"""Digests, and files that are either whole or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeres.errors import InputError, UsageError
from edgeres.progress import say
from edgeres.remote import Place

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk, or of one's share of it, on which nothing more fits."""


def sha256_file(path: Place) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    try:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(f)
    except OSError as error:
        raise InputError(f"cannot read {path}", evidence=error.strerror or str(error)) from error


def _sha256(f: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    h = hashlib.sha256()
    while chunk := f.read(1 << 20):
        h.update(chunk)
    return h.hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that no other process takes, also of another machine or container on the same disk."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def require_writable(
    path: Path, hint: str = "give -o a file in a folder where you may write, on a disk with room"
) -> None:
    """`InputError` unless a file can be made at ``path``, whose folder is made: to look before work, not after it."""
    try:
        temporary = _beside(path)
        try:
            temporary.write_bytes(bytes(4096))  # a full disk still takes an empty file
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}", evidence=error.strerror or str(error), hint=hint) from error


def refuse_replacing(path: Path, source: Path) -> None:
    """`UsageError` if writing ``path`` would replace ``source``, from which it is made."""
    if path.resolve() == source.resolve():
        raise UsageError(f"{path} would take the place of what it is made from", hint="give one of them another name")


def _beside(path: Path) -> Path:
    """A temporary name for ``path``, whose folder is made; `OSError` where no file can be."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    return temporary_name(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name ``path`` if the disk fills in the block: a write names no file, and a copy the one that it reads."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            error.filename, error.filename2 = os.fspath(path), None
        raise


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; it becomes ``path`` only when the block ends without an error."""
    temporary = _beside(path)
    try:
        with writing(path):
            yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename == os.fspath(temporary):  # a name that the user knows
            error.filename = os.fspath(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Wait until no other process is in such a block for ``path``, as far as the system has locks.

    ``path`` is a folder, or a file that is made if missing, and that the block may rename or remove at its end.
    ``what`` that process does is said to who waits.
    """
    if os.name != "posix":
        yield
        return
    while True:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                lock(handle, wait=False)
            except BlockingIOError:
                say(f"another process {what}: wait for it")
                lock(handle, wait=True)
            if _is_at(path, handle):
                yield
                return
        finally:
            os.close(handle)  # and with it the lock


def lock(handle: int, wait: bool) -> bool:
    """Lock an open file or folder of a POSIX system, until it is closed, also by death; False where there are no locks.

    Without ``wait`` `BlockingIOError` if another holds it.
    """
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:  # some network file systems have none
        return False
    return True


def _is_at(path: Path, handle: int) -> bool:
    """Whether the open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text. A float that is not finite becomes null, since JSON has no word for it."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(to_json(value, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object; ``what`` names the kind of file in the error."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {what} {path}", evidence=str(error)) from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not {what}", evidence=f"it holds a JSON {type(value).__name__}")
    return value


def cache_folder() -> Path:
    """``EDGERES_CACHE``, or the platform's folder for caches."""
    if folder := os.environ.get("EDGERES_CACHE"):
        return Path(folder)
    try:
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "edgeres" / "Cache"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "edgeres"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeres"
    except RuntimeError as error:  # a user without a home, as in containers
        hint = f"name a folder, such as EDGERES_CACHE={tempfile.gettempdir()}/edgeres"
        raise UsageError("there is no folder for caches", evidence=str(error), hint=hint) from error
