"""Image sets: the images and labels in them, and records of which were used. How they are opened is in `layouts`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import IO, Any, TypeVar

import numpy as np

from edgeres.errors import InputError, need
from edgeres.files import digest, sha256_file
from edgeres.images import decode
from edgeres.machine import cores
from edgeres.recipe import Preprocess
from edgeres.remote import Address, Place

T = TypeVar("T")
S = TypeVar("S")


ELSEWHERE = "where other processes read the images, give a path that every machine sees, or an address such as s3://..."
HASHED = 64
"""Files that one task hashes: a task for each small file would cost more than reading it."""


@dataclass(frozen=True)
class ImageSet:
    """Image files in a fixed order. ``paths`` are relative to ``root``; ``labels`` are class indices, or None.

    ``classes`` are the class names by index, empty where the labels came as numbers.

    Sets may be pickled: images stay where they are, and are found there from any folder. Loading one reads nothing;
    `require` says whether another process, or another machine, sees the images.
    """

    root: Place
    paths: tuple[str, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...] = ()

    @property
    def left_out(self) -> tuple[tuple[str, str], ...]:
        """Images that are no longer there because they could not be read when a pack was made (path, reason)."""
        return ()

    def __len__(self) -> int:
        return len(self.paths)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "root": self.root.absolute()}

    def subset(self, limit: int | None, seed: int = 0) -> ImageSet:
        """At most ``limit`` images, drawn by a hash of seed and path: the same ones on every machine.

        The smaller of two subsets with one seed is contained in the larger.
        """
        if limit is None or limit >= len(self):
            return self
        rank = {
            i: hashlib.sha256(f"{seed}/{p}".encode("utf-8", "surrogateescape")).digest()
            for i, p in enumerate(self.paths)
        }
        return self.take(sorted(sorted(rank, key=rank.__getitem__)[:limit]))

    def without(self, other: ImageSet) -> ImageSet:
        """The images that are not in ``other``, by path."""
        theirs = set(other.paths)
        return self.take([i for i, path in enumerate(self.paths) if path not in theirs])

    def take(self, keep: Sequence[int]) -> ImageSet:
        """The images at these places, in this order."""
        labels = tuple(self.labels[i] for i in keep) if self.labels is not None else None
        return replace(self, paths=tuple(self.paths[i] for i in keep), labels=labels)

    def hashes(self) -> tuple[str, ...]:
        """SHA-256 of each image's file, in order."""
        places = range(len(self))
        pieces = [places[i : i + HASHED] for i in places[::HASHED]]
        return tuple(h for piece in threaded(lambda some: [self._hash(i) for i in some], pieces) for h in piece)

    def _hash(self, i: int) -> str:
        return sha256_file(self.root / self.paths[i])

    def require(self, preprocess: Preprocess) -> None:
        """Raise what keeps every image from being read under ``preprocess``: no image library, no image there."""
        need("PIL.Image", "images")
        if isinstance(self.root, Address) or not len(self):  # every machine sees the same at an address
            return
        # a broken link counts as there: it is one unreadable image
        if not any(os.path.lexists(str(file)) for file in self._files()):
            raise InputError(
                f"none of the {len(self)} images in {self.root} is there",
                evidence=f"the first would be {next(self._files())}",
                hint=ELSEWHERE,
            )

    def _files(self) -> Iterator[Place]:
        """The files that are read."""
        return (self.root / path for path in self.paths)

    def read(self, i: int, preprocess: Preprocess) -> np.ndarray:
        """Image ``i`` resized and cropped -> uint8 (crop, crop, 3) RGB. Raises what decoding raises."""
        return decode(self.root / self.paths[i], preprocess)

    def open(self, i: int) -> IO[bytes]:
        """The encoded bytes of image ``i``, to be closed by the caller."""
        return (self.root / self.paths[i]).open("rb")


def threaded(function: Callable[[S], T], items: Iterable[S], ahead: int = 1024) -> Iterator[T]:
    """``map`` over threads, in order; at most ``ahead`` results wait at a time."""
    rest = iter(items)
    with ThreadPoolExecutor(cores()) as pool:
        while some := list(islice(rest, ahead)):
            yield from pool.map(function, some)


@dataclass(frozen=True)
class Manifest:
    """A record of which images were used: path, SHA-256 and label of each. A list file that also carries hashes."""

    paths: tuple[str, ...]
    hashes: tuple[str, ...]
    labels: tuple[int, ...] | None

    @classmethod
    def of(cls, images: ImageSet) -> Manifest:
        """Read and hash every file of ``images``."""
        return cls(images.paths, images.hashes(), images.labels)

    def digest(self) -> str:
        """Identity of the set: contents and labels in order, not where the files lie."""
        return digest([list(self.hashes), None if self.labels is None else list(self.labels)])

    def to_text(self) -> str:
        """One line per image: path, label (or -), SHA-256, separated by tabs."""
        labels = self.labels if self.labels is not None else ["-"] * len(self.paths)
        return "".join(f"{p}\t{label}\t{h}\n" for p, label, h in zip(self.paths, labels, self.hashes, strict=True))

    @classmethod
    def from_text(cls, text: str) -> Manifest:
        """The inverse of `to_text`. `InputError` names a line that is not one of its."""
        rows = [line.split("\t") for line in text.removesuffix("\n").split("\n")] if text else []
        for number, row in enumerate(rows, 1):
            if len(row) != 3 or not (row[1] == "-" or row[1].isdecimal()):
                raise InputError(
                    f"line {number} of a manifest is not path, label and SHA-256",
                    evidence=repr("\t".join(row))[:200],
                    hint="it was edited or cut short; calibrate again to write it anew",
                )
        labels = None if any(r[1] == "-" for r in rows) else tuple(int(r[1]) for r in rows)
        return cls(tuple(r[0] for r in rows), tuple(r[2] for r in rows), labels)
