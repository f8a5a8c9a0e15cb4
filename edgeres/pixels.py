"""Where the pixels of a pack are: a header that says which pack it is, and rows that come when they are asked for."""

from __future__ import annotations

import mmap
import os
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from edgeres.data import ELSEWHERE
from edgeres.errors import InputError
from edgeres.remote import Address, Place

PAGE = 4096
MAGIC = b"EDGEPACK"
VERSION = 1
HEADER = struct.Struct("<8sIIQQQ32s")
"""Magic, version, crop, count; where the metadata begins, its length and SHA-256."""
RELEASE = 16 << 20
"""Bytes read until the pages read so far are handed back, so that a large pack does not fill this process."""
BLOCK = 4 << 20
"""Bytes that are fetched at a time from an address: the wait for an answer should be worth it."""
MOST = 256
"""Rows in a block, at most: small ones that a set takes here and there are a request each."""
KEPT = 32
"""Blocks that are kept until all their rows were read, at most; reading in order needs one or two for each thread."""
PIECE = 32
"""Rows that a digest takes at a time."""


class Header(NamedTuple):
    """What the first page says. The SHA-256 of the metadata, which hold that of the pixels, tells packs apart."""

    crop: int
    images: int
    start: int
    length: int
    metadata_sha256: bytes

    @property
    def row(self) -> int:
        """Bytes of one image."""
        return self.crop * self.crop * 3

    @classmethod
    def parse(cls, path: Place, page: bytes, size: int) -> Header:
        """The header in the first page of a pack of ``size`` bytes, or `InputError`."""
        if not page.startswith(MAGIC):
            unfinished = bool(page) and not page.strip(b"\0")
            raise InputError(
                f"{path} is not a pack",
                evidence="packing it was interrupted" if unfinished else f"it starts with {page[:8]!r}",
                hint="run the same edgeres pack again"
                if unfinished
                else "make one with: edgeres pack DIR -o FILE.pack",
            )
        if len(page) < PAGE:
            raise damaged(path, "was cut short", f"{size:,} bytes are not even its header")
        _, version, crop, count, start, length, expected = HEADER.unpack_from(page)
        if version != VERSION:
            raise InputError(
                f"{path} is a pack of version {version}, this edgeres reads {VERSION}",
                hint="pack the images again, or use the edgeres that made it",
            )
        pixels = count * crop * crop * 3
        if sha256(page[:-32]).digest() != page[-32:] or not pixels or start != PAGE + pixels:
            raise damaged(path, "has a damaged header", "it does not match its own digest")
        if size != start + length:
            what = "was cut short" if size < start + length else "has bytes after its end"
            raise damaged(path, what, f"it has {size:,} bytes, its header says {start + length:,}")
        return cls(crop, count, start, length, expected)

    def to_page(self) -> bytes:
        """The first page of a pack: the header, zeros, and the SHA-256 of both."""
        page = HEADER.pack(MAGIC, VERSION, *self).ljust(PAGE - 32, b"\0")
        return page + sha256(page).digest()

    def require(self, path: Place, found: Header) -> None:
        """Raise `InputError` unless the pack found at ``path`` is the one of this header."""
        if found != self:
            raise InputError(
                f"{path} is another pack than the one that was opened",
                evidence=f"SHA-256 of its metadata is {found.metadata_sha256.hex()}, not {self.metadata_sha256.hex()}",
                hint=ELSEWHERE,
            )


class Pixels(ABC):
    """The pixels of the pack at ``path``: uint8 (count, crop, crop, 3), read-only.

    Pickled, they are a path and a header. Whoever loads those opens the pack there when it is first needed, which
    reads one page, and gets `InputError` if another one lies there.
    """

    def __init__(self, path: Place, header: Header) -> None:
        self.path, self.header = path, header

    def __reduce__(self) -> tuple[type[Pixels], tuple[Place, Header]]:
        return type(self), (self.path.absolute(), self.header)

    @abstractmethod
    def open(self) -> None:
        """Raise `InputError` unless the pack is there and still the one of the header."""

    @abstractmethod
    def metadata(self) -> bytes:
        """What follows the pixels."""

    @abstractmethod
    def read(self, rows: Sequence[int], i: int) -> np.ndarray:
        """Row ``rows[i]`` (crop, crop, 3). The other ``rows`` say what will be wanted around it."""

    @abstractmethod
    def between(self, start: int, stop: int) -> np.ndarray:
        """Rows from ``start`` up to ``stop``."""

    def digest(self) -> str:
        """SHA-256 of all pixels."""
        total = sha256()
        for start in range(0, self.header.images, PIECE):
            total.update(self.between(start, min(start + PIECE, self.header.images)).data)
        return total.hexdigest()


class Mapped(Pixels):
    """Pixels of a file here; bytes come from it as they are touched."""

    def __init__(self, path: Path, header: Header) -> None:
        super().__init__(path, header)
        self._touched = 0

    def open(self) -> None:
        self._map  # noqa: B018

    @cached_property
    def _map(self) -> mmap.mmap:
        try:
            with open(str(self.path), "rb") as f:
                self.header.require(self.path, _header(self.path, f))
                return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            evidence = error.strerror or str(error)
            raise InputError(f"cannot read {self.path}", evidence=evidence, hint=ELSEWHERE) from error

    @cached_property
    def _rows(self) -> np.ndarray:
        crop, images = self.header.crop, self.header.images
        return np.frombuffer(self._map, np.uint8, images * crop * crop * 3, PAGE).reshape(images, crop, crop, 3)

    def metadata(self) -> bytes:
        return self._map[self.header.start :]

    def read(self, rows: Sequence[int], i: int) -> np.ndarray:
        return self._touch(self._rows[rows[i]])

    def between(self, start: int, stop: int) -> np.ndarray:
        return self._touch(self._rows[start:stop])

    def _touch(self, found: np.ndarray) -> np.ndarray:
        self._touched += found.nbytes
        if self._touched > RELEASE and hasattr(mmap, "MADV_DONTNEED"):
            self._touched = 0
            self._map.madvise(mmap.MADV_DONTNEED)  # an array still in use finds its bytes in the file again
        return found


class Fetched(Pixels):
    """Pixels at an address, fetched by range: a block of the rows that are wanted next, each block once."""

    def __init__(self, address: Address, header: Header, checked: bool = False) -> None:
        super().__init__(address, header)
        self._checked = checked
        self._lock = threading.Lock()
        self._blocks: dict[tuple[int, ...], _Block] = {}

    def open(self) -> None:
        if not self._checked:
            self.header.require(self.path, Header.parse(self.path, *self._address.piece(0, PAGE)))
            self._checked = True

    @property
    def _address(self) -> Address:
        assert isinstance(self.path, Address)
        return self.path

    def metadata(self) -> bytes:
        return self._address.piece(self.header.start, self.header.length)[0]

    def read(self, rows: Sequence[int], i: int) -> np.ndarray:
        at = i - i % (count := min(MOST, max(1, BLOCK // self.header.row)))
        wanted = tuple(rows[at : at + count])
        with self._lock:  # of the threads that want a block the first one fetches it, the others wait
            if mine := wanted not in self._blocks:
                self._blocks[wanted] = _Block(len(wanted))
                if len(self._blocks) > KEPT:
                    del self._blocks[next(iter(self._blocks))]
            block = self._blocks[wanted]
            block.left -= 1
            if not block.left:  # who reads in order comes but once
                del self._blocks[wanted]
        if mine:
            try:
                block.rows.set_result(self._fetch(wanted))
            except BaseException as error:
                block.rows.set_exception(error)
                with self._lock:
                    self._blocks.pop(wanted, None)
        found: np.ndarray = block.rows.result()[i - at]
        return found

    def between(self, start: int, stop: int) -> np.ndarray:
        return self._fetch(range(start, stop))

    def _fetch(self, rows: Sequence[int]) -> np.ndarray:
        """These rows, one request for each run of neighbours."""
        crop, row = self.header.crop, self.header.row
        cuts = [0, *(i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1), len(rows)]
        starts = [PAGE + rows[first] * row for first in cuts[:-1]]
        stops = [PAGE + (rows[after - 1] + 1) * row for after in cuts[1:]]
        content = b"".join(self._address.ranges(starts, stops))
        return np.frombuffer(content, np.uint8).reshape(len(rows), crop, crop, 3)


class _Block:
    """Rows on their way, and how often they will be asked for."""

    def __init__(self, left: int) -> None:
        self.rows, self.left = Future[np.ndarray](), left


def open_pixels(path: Place) -> Pixels:
    """The pixels of the pack at ``path``, with the header found there."""
    if isinstance(path, Address):
        return Fetched(path, Header.parse(path, *path.piece(0, PAGE)), checked=True)
    try:
        with open(path, "rb") as f:
            header = _header(path, f)
    except OSError as error:
        raise InputError(f"cannot read {path}", evidence=error.strerror or str(error)) from error
    return Mapped(path, header)


def _header(path: Place, file: IO[bytes]) -> Header:
    return Header.parse(path, file.read(PAGE), os.fstat(file.fileno()).st_size)


def damaged(path: Place, what: str, evidence: str) -> InputError:
    """The refusal of a pack that is not whole."""
    return InputError(f"{path} {what}", evidence=evidence, hint="copy it again, or pack the images again")
