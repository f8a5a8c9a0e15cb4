"""Files at an address such as s3://bucket/val.pack, read through fsspec: whole where they are small, else by range.

Credentials and settings are those of fsspec and of the package behind each protocol: environment variables, their
configuration files. Nothing is written, and nothing is kept on this machine.
"""

from __future__ import annotations

import io
import posixpath
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote

from edgeres.errors import InputError, MissingDependency, need

T = TypeVar("T")

ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
WAITS = (0.5, 2.0)
"""Seconds before another try. s3fs and gcsfs try again by themselves, the http of fsspec does not."""
TRANSIENT = frozenset(("ConnectionError", "TimeoutError", "ClientConnectionError", "ClientPayloadError"))
"""Errors that may be gone in a moment: Python's own, and those of aiohttp, which fsspec's http passes on."""


class Unreachable(InputError):
    """An address did not answer, or not as it should. This says nothing about the file that lies there."""


class _Missing(InputError):
    """There is no such file."""


def is_address(source: object) -> bool:
    """Whether ``source`` is written as an address, ``protocol://...``, and not as a path."""
    return isinstance(source, Address) or ADDRESS.match(str(source)) is not None


def place(source: str | Place) -> Place:
    """A path, or an address where ``source`` is one; a `Path` made of an address would have lost a slash."""
    if isinstance(source, Path | Address):
        return source
    return Address(source) if is_address(source) else Path(source)


@dataclass(frozen=True, repr=False)
class Address:
    """An address, and as much of the ways of a `Path` as image sets need. Reading raises `InputError`."""

    url: str

    def __str__(self) -> str:
        """The address without a password, and without the signature that a web address may end with."""
        return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1@", self._plain)

    def __repr__(self) -> str:
        return f"Address({str(self)!r})"

    @property
    def web(self) -> bool:
        """Whether it belongs to a web server, which lists no folders."""
        return self.url.lower().startswith(("http://", "https://"))

    @property
    def _plain(self) -> str:
        return self.url.partition("?")[0] if self.web else self.url

    def __truediv__(self, name: str) -> Address:
        """The file called ``name``, a relative path, below this folder; an address stands for itself."""
        if is_address(name):
            return Address(name)
        protocol, _, path = self._plain.partition("://")
        path = f"{path.rstrip('/')}/{quote(name, errors='surrogateescape') if self.web else name}"
        if {".", ".."} & set(name.split("/")):
            path = posixpath.normpath(path)
        return Address(f"{protocol}://{path}")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._plain.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> Address:
        """The folder above; at the top it is the same again."""
        protocol, _, path = self._plain.partition("://")
        above, slash, _ = path.rstrip("/").rpartition("/")
        return Address(f"{protocol}://{above or slash}") if above or slash else self

    @property
    def parents(self) -> tuple[Address, ...]:
        """The folders above, the nearest first."""
        above = self.parent
        return () if above == self else (above, *above.parents)

    def absolute(self) -> Address:
        """Itself: an address has no current folder."""
        return self

    resolve = absolute

    def kind(self) -> str:
        """What lies there: "file", "directory", or "" for nothing."""
        try:
            found: str = self._ask(lambda fs, path: fs.info(path)["type"])
        except _Missing:
            return ""
        return found

    def is_file(self) -> bool:
        """Whether a file lies there that may be seen."""
        try:
            return self.kind() == "file"
        except Unreachable:
            return False

    def find(self) -> list[tuple[str, ...]]:
        """The files below this folder as parts of their relative paths, each folder's in the order of their names."""
        found, top = self._ask(lambda fs, path: (fs.find(path), path.rstrip("/") + "/"))
        below = (tuple(path.removeprefix(top).split("/")) for path in found if path.startswith(top))
        return sorted(parts for parts in below if all(parts))  # an empty part: the mark of an empty folder

    def read_bytes(self) -> bytes:
        """The whole file, in one request."""
        content: bytes = self._ask(lambda fs, path: fs.cat_file(path))
        return content

    def open(self, mode: str = "rb") -> io.BytesIO:
        """The whole file, in one request."""
        assert mode == "rb"
        return io.BytesIO(self.read_bytes())

    def piece(self, start: int, length: int) -> tuple[bytes, int]:
        """Up to ``length`` bytes from ``start`` on, and the size of the file.

        A web server that sends files whole is refused as soon as that is seen, before it has sent all.
        """

        def ask(fs: Any, path: str) -> tuple[bytes, Any]:
            with fs.open(path, "rb", block_size=length, cache_type="none") as f:
                f.seek(start)
                return f.read(length), fs.size(path)

        content, size = self._ask(ask)
        if size is None:
            raise Unreachable(f"cannot read {self} in pieces", evidence="its server does not say how long it is")
        return content, size

    def ranges(self, starts: Sequence[int], stops: Sequence[int]) -> list[bytes]:
        """The bytes from each start up to each stop, one request for each."""
        found: list[bytes] = self._ask(lambda fs, path: _cat_ranges(fs, path, starts, stops))
        for start, stop, part in zip(starts, stops, found, strict=True):
            if len(part) != stop - start:
                raise Unreachable(
                    f"cannot read {self} in pieces",
                    evidence=f"asked for {stop - start:,} bytes from {start:,} on, the answer has {len(part):,}",
                    hint="its server must answer requests for ranges, and the file must not change",
                )
        return found

    def _ask(self, question: Callable[[Any, str], T]) -> T:
        """The answer to ``question`` (file system, path there), asked again where the trouble may have passed."""
        fs, path = self._system()
        for wait in (*WAITS, None):
            try:
                return question(fs, path)
            except Exception as error:  # each file system has errors of its own
                # fsspec's http says "not found", with the reason behind it, of a server that did not answer at all
                passing = next((e for e in (error, error.__cause__) if e is not None and _transient(e)), None)
                if isinstance(error, FileNotFoundError) and passing is None:
                    raise _Missing(f"nothing at {self}") from error
                if wait is None or passing is None:
                    raise self._unreachable(passing or error) from error
                time.sleep(wait)
        raise AssertionError("the last try ends the loop")

    def _system(self) -> tuple[Any, str]:
        core = need("fsspec.core", "remote")
        try:
            fs, path = core.url_to_fs(self.url)
        except ImportError as error:  # fsspec says which
            protocol = self.url.partition("://")[0]
            raise MissingDependency(
                f"{protocol}:// needs a package of its own", evidence=str(error), hint="install it beside fsspec"
            ) from error
        except Exception as error:  # an unknown protocol, a server that some file systems log in to at once
            raise self._unreachable(error) from error
        return fs, path

    def _unreachable(self, error: BaseException) -> Unreachable:
        secret = self.url.removeprefix(self._plain)
        evidence = str(error) or type(error).__name__
        return Unreachable(f"cannot read {self}", evidence=evidence.replace(secret, "") if secret else evidence)


Place = Path | Address


def _cat_ranges(fs: Any, path: str, starts: Sequence[int], stops: Sequence[int]) -> list[bytes]:
    found = fs.cat_ranges([path] * len(starts), list(starts), list(stops), on_error="raise")
    for part in found:
        if isinstance(part, Exception):  # before 2026, file systems that run at once returned errors all the same
            raise part
    return [bytes(part) for part in found]


def _transient(error: BaseException) -> bool:
    status = getattr(error, "status", None)  # of an answer of the web
    names = {base.__name__ for base in type(error).__mro__}
    return bool(TRANSIENT & names) or (isinstance(status, int) and status >= 500)
