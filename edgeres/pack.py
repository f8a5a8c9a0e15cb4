"""Packs: a preprocessed image set in one memory-mapped file. Reading one needs no image library.

byte 0     header, one page: `pixels.HEADER`, zeros, and in its last 32 bytes the SHA-256 of the bytes before them
byte 4096  pixels, uint8 (count, crop, crop, 3), RGB
after them metadata, JSON up to the end of the file: preprocess, paths, labels, classes, SHA-256 of each image
           file, images left out, SHA-256 of the pixels
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import chain
from math import ceil
from pathlib import Path
from typing import IO, Any

import numpy as np

from edgeres.data import ImageSet
from edgeres.errors import EdgeresError, InputError
from edgeres.files import alone, digest, read_json, require_writable, write_json, writing
from edgeres.loader import read_ahead, recycled, refuse_all_bad, refuse_bad
from edgeres.pixels import PAGE, VERSION, Header, Pixels, damaged, open_pixels
from edgeres.progress import say, track
from edgeres.recipe import Preprocess
from edgeres.remote import Place, place

BATCH = 32
"""Images written, and entered in the journal, at a time."""


@dataclass(frozen=True, kw_only=True)
class Pack(ImageSet):
    """The images of a pack, or some of them. ``root`` is the pack itself, ``paths`` are those of the image files.

    ``sha256`` are the digests of those files and ``skipped`` the unreadable ones among them (path, reason), both as
    they were when packed. ``made_from`` is the digest of everything that went in. ``rows`` are the places in the file.
    """

    preprocess: Preprocess
    sha256: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    made_from: str
    pixels_sha256: str
    rows: Sequence[int] = field(repr=False)
    pixels: Pixels = field(repr=False, compare=False)

    @property
    def left_out(self) -> tuple[tuple[str, str], ...]:
        return self.skipped

    def take(self, keep: Sequence[int]) -> Pack:
        taken = super().take(keep)
        assert isinstance(taken, Pack)
        return replace(taken, rows=[self.rows[i] for i in keep], sha256=tuple(self.sha256[i] for i in keep))

    def hashes(self) -> tuple[str, ...]:
        """SHA-256 of each image's original file, as it was when packed."""
        return self.sha256

    def open(self, i: int) -> IO[bytes]:
        raise InputError(f"{self.root} holds pixels, not the bytes of {self.paths[i]}", hint="give the image folder")

    def require(self, preprocess: Preprocess) -> None:
        """Raise `InputError` unless the images were packed under ``preprocess``, and the pack is where it was."""
        self.pixels.open()
        if preprocess == self.preprocess:
            return
        ours, theirs = self.preprocess.to_json(), preprocess.to_json()
        raise InputError(
            f"{self.root} was packed under another preprocess than the one asked for",
            evidence="\n".join(f"{k}: packed {ours[k]}, asked for {theirs[k]}" for k in ours if ours[k] != theirs[k]),
            hint="pack the images again, for this model",
        )

    def read(self, i: int, preprocess: Preprocess) -> np.ndarray:
        """Image ``i`` -> uint8 (crop, crop, 3) RGB, a view of the file."""
        self.require(preprocess)
        return self.pixels.read(self.rows, i)

    def verify(self) -> None:
        """Read all pixels; `InputError` unless they are those that were packed."""
        if (found := self.pixels.digest()) != self.pixels_sha256:
            raise damaged(self.root, "has damaged pixels", f"SHA-256 {found}, recorded is {self.pixels_sha256}")


def open_pack(path: str | Place) -> Pack:
    """Open the pack at ``path`` and check everything but the pixels, which `Pack.verify` checks."""
    pixels = open_pixels(place(path))
    pixels.open()
    text = pixels.metadata()
    if sha256(text).digest() != pixels.header.metadata_sha256:
        raise damaged(pixels.path, "has damaged metadata", "its SHA-256 is not the one in the header")
    return _from_metadata(pixels, text)


def _from_metadata(pixels: Pixels, text: bytes) -> Pack:
    path, crop, count = pixels.path, pixels.header.crop, pixels.header.images
    try:
        record = json.loads(text)
        pack = Pack(
            root=path,
            paths=tuple(record["paths"]),
            labels=None if record["labels"] is None else tuple(record["labels"]),
            classes=tuple(record["classes"]),
            preprocess=Preprocess.from_json(record["preprocess"]),
            sha256=tuple(record["sha256"]),
            skipped=tuple((path, reason) for path, reason in record["skipped"]),
            made_from=record["made_from"],
            pixels_sha256=record["pixels_sha256"],
            rows=range(count),
            pixels=pixels,
        )
        shape = record["shape"]
        texts = chain(pack.paths, pack.classes, pack.sha256, *pack.skipped, (pack.made_from, pack.pixels_sha256))
        if set(map(type, texts)) != {str} or set(map(type, pack.labels or ())) - {int}:
            raise TypeError("a name or a digest is no text, or a label is no integer")
    except (KeyError, TypeError, ValueError, RecursionError, EdgeresError) as error:
        raise damaged(path, "has unusable metadata", f"{type(error).__name__}: {error}") from error
    lengths = {len(part) for part in (pack.paths, pack.sha256, pack.rows)}
    lengths |= set() if pack.labels is None else {len(pack.labels)}
    if shape != [count, crop, crop, 3] or len(lengths) > 1 or pack.preprocess.crop != crop:
        raise damaged(path, "has unusable metadata", "its parts are not about the same images")
    return pack


def write_pack(images: ImageSet, preprocess: Preprocess, path: str | Path, *, skip_bad: bool = False) -> Pack:
    """Decode, resize and crop ``images`` into a pack at ``path``; the same input gives the same bytes.

    What an interrupted call leaves in ``path``.part the next one continues, if images and preprocess are the same, and
    otherwise begins anew. A whole pack of the same input is left as it is. Of two processes the second waits. Memory is
    bounded by a few batches.
    """
    path = Path(path)
    require_writable(path)
    images.require(preprocess)
    record = {
        "preprocess": preprocess.to_json(),
        "paths": images.paths,
        "labels": images.labels,
        "classes": images.classes,
        "sha256": images.hashes(),
    }
    made_from = digest([VERSION, record])
    if (there := _finished(path, made_from, skip_bad)) is not None:
        return there
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _Part(path, made_from, preprocess.crop)
    with alone(part.file, f"writes {path}"):
        if (there := _finished(path, made_from, skip_bad)) is not None:  # by that process
            part.remove()
            return there
        part.resume()
        with writing(part.file):
            part.append(images, preprocess, skip_bad)
            part.finish(record)
        return open_pack(path)


def _finished(path: Path, made_from: str, skip_bad: bool) -> Pack | None:
    """The pack at ``path``, if it is whole, was made from the same, and lacks no image unless that is allowed."""
    try:
        pack = open_pack(path)
    except InputError:
        return None
    if pack.made_from != made_from or (pack.skipped and not skip_bad):
        return None
    say(f"{path} is up to date")
    return pack


class _Part:
    """A pack that is being written: pixels after an empty page, and in a journal beside it what they are.

    ``done`` images were looked at, ``bad`` are the places of those left out, each with the reason.
    """

    def __init__(self, path: Path, made_from: str, crop: int) -> None:
        self.path, self.made_from, self.crop = path, made_from, crop
        self.file = path.with_name(path.name + ".part")
        self.journal = path.with_name(path.name + ".part.json")
        self.done, self.bad, self.pixels = 0, list[tuple[int, str]](), sha256()

    @property
    def end(self) -> int:
        """Where the next image goes."""
        return PAGE + (self.done - len(self.bad)) * self.crop * self.crop * 3

    def resume(self) -> None:
        """Take up what an earlier call left, if it was made from the same and is what its journal says."""
        if not (self.journal.is_file() and self.file.is_file()):
            return
        try:
            left = read_json(self.journal, "a journal")
            if left["made_from"] == self.made_from:
                self.done, self.bad = int(left["done"]), [(int(i), str(reason)) for i, reason in left["bad"]]
                self._hash_pixels()
                why = "" if self.pixels.hexdigest() == left["pixels"] else "is damaged"
            else:
                why = "was made from other images or under another preprocess"
        except (InputError, KeyError, TypeError, ValueError):
            why = "is damaged"
        if why:
            say(f"{self.file.name} {why}: begin anew")
            self.done, self.bad, self.pixels = 0, [], sha256()
        else:
            say(f"continue {self.file.name}: {self.done:,} images are done")

    def _hash_pixels(self) -> None:
        with open(self.file, "rb") as f:
            f.seek(PAGE)
            while piece := f.read(max(0, min(1 << 20, self.end - f.tell()))):
                self.pixels.update(piece)

    def append(self, images: ImageSet, preprocess: Preprocess, skip_bad: bool) -> None:
        """Read what is missing of ``images``, and note in the journal after each batch how far it is."""
        if not skip_bad:
            refuse_bad(images, [(images.paths[i], reason) for i, reason in self.bad])
        first = self.done
        rest = images.take(range(first, len(images)))
        empty = recycled((BATCH, self.crop, self.crop, 3), np.uint8)
        with open(self.file, "r+b" if first else "wb") as f:
            f.truncate(self.end)
            f.seek(self.end)
            with closing(read_ahead(rest, preprocess, BATCH, empty, np.copyto)) as pieces:
                for piece in track(pieces, "pack", ceil(len(rest) / BATCH)):
                    piece.accept(rest, skip_bad)
                    # a reason must not depend on where the images lie
                    self.bad += [(first + i, why.replace(f"{images.root}{os.sep}", "")) for i, why in piece.bad]
                    self.done += len(piece.places)
                    self.pixels.update(piece.rows.data)
                    f.write(piece.rows.data)
                    f.flush()
                    self._note()
        if len(self.bad) == len(images):
            self.remove()
            refuse_all_bad(images, [(images.paths[i], reason) for i, reason in self.bad])

    def _note(self) -> None:
        left = {"made_from": self.made_from, "done": self.done, "bad": self.bad, "pixels": self.pixels.hexdigest()}
        write_json(self.journal, left)

    def finish(self, record: dict[str, Any]) -> None:
        """Write the metadata, then the header, and give the file its name. ``record`` still lists every image."""
        without = {i for i, _ in self.bad}
        good = [i for i in range(self.done) if i not in without]
        kept = {k: record[k] and [record[k][i] for i in good] for k in ("paths", "labels", "sha256")}
        record = {
            **record,
            **kept,
            "shape": [len(good), self.crop, self.crop, 3],
            "skipped": [(record["paths"][i], reason) for i, reason in self.bad],
            "made_from": self.made_from,
            "pixels_sha256": self.pixels.hexdigest(),
        }
        text = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
        header = Header(self.crop, len(good), self.end, len(text), sha256(text).digest())
        with open(self.file, "r+b") as f:
            f.seek(self.end)
            f.write(text)
            f.truncate()
            f.seek(0)
            f.write(header.to_page())
            f.flush()
            os.fsync(f.fileno())  # the name must not be there before the bytes are
        self.journal.unlink(missing_ok=True)
        os.replace(self.file, self.path)  # last: from now on the next process may begin a part

    def remove(self) -> None:
        """Leave nothing behind."""
        self.journal.unlink(missing_ok=True)
        self.file.unlink(missing_ok=True)
