"""Logits of one network on one image set, kept on disk: a run that is cut short goes on, another engine reuses them.

A store is a folder named by the digest of what it belongs to, with

    logits.f32    raw float32 (images, classes), in the order of the set; NaN for an image that could not be read
    done          a byte per batch: 0 missing, 1 there, 2 there but for unreadable images
    about.json    what it belongs to

The rows of a batch are on the disk before its byte is. Several processes may fill one store at once.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from edgeres.errors import BuildError, InputError
from edgeres.files import digest, read_json, temporary_name, write_json, writing
from edgeres.progress import say

LOGITS, DONE, ABOUT = "logits.f32", "done", "about.json"
MISSING, WHOLE, HOLES = 0, 1, 2
SYNC_EVERY = 1.0
"""Seconds between two waits for the disk: what a power cut takes at most."""


@dataclass(frozen=True)
class About:
    """What logits depend on. Another value anywhere is another store.

    ``network`` is an engine's SHA-256 or a model's digest, ``manifest`` the digest of the images, ``read_by`` what
    decoded them. ``shard``: a part of the set whose store is its own.
    """

    network: str
    executor: str
    version: str
    preprocess: str
    manifest: str
    read_by: dict[str, str]
    images: int
    classes: int
    batch: int
    shard: str | None = None
    format: str = "edgeres answers 1"

    @property
    def key(self) -> str:
        """Name of the store's folder."""
        return digest(asdict(self))[:16]


class Answers:
    """The store for ``about`` under the folder ``root``; made if it is not there, made anew if it is damaged."""

    def __init__(self, root: Path, about: About) -> None:
        self.about, self.folder = about, root / about.key
        self.batches = math.ceil(about.images / about.batch)
        if self.folder.exists() and (wrong := self._wrong()):
            say(f"the answers in {self.folder} are damaged ({wrong}): begin anew")
            shutil.rmtree(self.folder)
        if not self.folder.exists():
            self._create()
        with ExitStack() as stack:
            self._logits = stack.enter_context(open(self.folder / LOGITS, "r+b", buffering=0))
            self._done = stack.enter_context(open(self.folder / DONE, "r+b", buffering=0))
            self._files = stack.pop_all()
        self._waiting: dict[int, int] = {}
        self._synced = time.monotonic()

    def _sizes(self) -> dict[str, int]:
        return {LOGITS: 4 * self.about.images * self.about.classes, DONE: self.batches}

    def _wrong(self) -> str:
        """What is wrong with the store that is there; empty if nothing is."""
        for name, size in self._sizes().items():
            path = self.folder / name
            if not path.is_file():
                return f"no {name}"
            if (found := path.stat().st_size) != size:
                return f"{name} has {found:,} of {size:,} bytes"
        try:
            known = read_json(self.folder / ABOUT, "answers")
        except InputError as error:
            return error.cause
        return "" if known == asdict(self.about) else f"{ABOUT} is of others"

    def _create(self) -> None:
        scratch = temporary_name(self.folder)
        scratch.mkdir(parents=True)
        try:
            for name, size in self._sizes().items():
                with open(scratch / name, "wb") as f:
                    f.truncate(size)  # zeros, which take no space until they are written
            write_json(scratch / ABOUT, asdict(self.about))
            scratch.rename(self.folder)
        except OSError:
            if not self.folder.exists():  # else another process was quicker
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def places(self, batch: int) -> range:
        """Places in the set of the images of a batch."""
        start = batch * self.about.batch
        return range(start, min(start + self.about.batch, self.about.images))

    def state(self, batch: int) -> int:
        """`MISSING`, `WHOLE` or `HOLES`, whichever process wrote it."""
        if batch in self._waiting:
            return self._waiting[batch]
        self._done.seek(batch)
        return self._done.read(1)[0]

    def write(self, batch: int, good: np.ndarray, logits: np.ndarray) -> None:
        """Keep the ``logits`` (n, classes) of the images of a batch that are readable, at the places ``good`` (n,)."""
        if logits.shape[1] != self.about.classes:
            raise BuildError(
                f"the network gives {logits.shape[1]} logits, and the model has {self.about.classes} classes",
                hint="build the engine from this model",
            )
        places = self.places(batch)
        rows = np.full((len(places), self.about.classes), np.nan, "<f4")
        rows[good - places.start] = logits
        self._logits.seek(4 * self.about.classes * places.start)
        self._put(rows.data.cast("B"))
        self._waiting[batch] = WHOLE if len(good) == len(places) else HOLES
        if time.monotonic() > self._synced + SYNC_EVERY:
            self.flush()

    def _put(self, data: memoryview) -> None:
        with writing(self.folder / LOGITS):
            while len(data):  # a full disk takes a part, and the rest is an error
                data = data[self._logits.write(data) or 0 :]

    def flush(self) -> None:
        """Wait until rows are on the disk, then mark their batches."""
        if self._waiting:
            with writing(self.folder):
                os.fsync(self._logits.fileno())
                for batch, state in self._waiting.items():
                    self._done.seek(batch)
                    self._done.write(bytes([state]))
            self._waiting.clear()
        self._synced = time.monotonic()

    def read(self, batch: int) -> np.ndarray:
        """Logits float32 (n, classes) of a batch that is there."""
        assert self.state(batch) != MISSING
        places = self.places(batch)
        self._logits.seek(4 * self.about.classes * places.start)
        data = self._logits.read(4 * self.about.classes * len(places))
        return np.frombuffer(data, "<f4").reshape(len(places), self.about.classes)

    def close(self) -> None:
        """Keep what was written. Safe to call twice."""
        if not self._done.closed:
            try:
                self.flush()
            finally:
                self._files.close()

    def remove(self) -> None:
        """Delete the store."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
