"""Images in: folders and list files -> batches of (N, 3, crop, crop) float32."""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from edgeres.errors import InputError, need
from edgeres.files import digest, sha256_file
from edgeres.images import decode, normalize
from edgeres.recipe import Preprocess

IMAGE_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))


@dataclass(frozen=True)
class ImageSet:
    """Image files in a fixed order. ``paths`` are relative to ``root``; ``labels`` are class indices, or None.

    ``classes`` are the class names by index, empty where the labels came as numbers.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

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
        keep = sorted(sorted(rank, key=rank.__getitem__)[:limit])
        labels = tuple(self.labels[i] for i in keep) if self.labels is not None else None
        return replace(self, paths=tuple(self.paths[i] for i in keep), labels=labels)

    def hashes(self) -> tuple[str, ...]:
        """SHA-256 of each file, in order."""
        with ThreadPoolExecutor() as pool:
            return tuple(pool.map(lambda p: sha256_file(self.root / p), self.paths))

    def read(self, i: int, preprocess: Preprocess) -> np.ndarray:
        """Image ``i`` resized and cropped -> uint8 (crop, crop, 3) RGB. Raises what decoding raises."""
        return decode(self.root / self.paths[i], preprocess)


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
        """The inverse of `to_text`."""
        rows = [line.split("\t") for line in text.removesuffix("\n").split("\n")]
        labels = None if any(r[1] == "-" for r in rows) else tuple(int(r[1]) for r in rows)
        return cls(tuple(r[0] for r in rows), tuple(r[2] for r in rows), labels)


def open_images(source: str | Path, labels: str | Path | None = None) -> ImageSet:
    """Open a folder of class folders, a flat folder (no labels), or a list file of ``path label`` lines.

    Class folders get their index from alphabetical order, or from ``labels``, a file with one class name per line.
    Paths in a list file start at the file's own folder.
    """
    source = Path(source)
    names = _read_names(Path(labels)) if labels is not None else None
    if source.is_dir():
        images = _open_folder(source, names)
    elif source.is_file():
        images = _open_list(source, names)
    else:
        raise InputError(f"no images at {source}", hint="give a folder with one folder per class, or a list file")
    if not images.paths:
        raise InputError(
            f"no images in {source}",
            evidence=f"looked for files ending in {', '.join(sorted(IMAGE_SUFFIXES))}",
            hint="give a folder with one folder per class, or a list file with one `path label` per line",
        )
    return images


def _open_folder(root: Path, names: list[str] | None) -> ImageSet:
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    found = {folder: _image_files(root / folder) for folder in folders}
    classes = [folder for folder in folders if found[folder]]
    if not classes:
        return ImageSet(root, tuple(p.name for p in _image_files(root, deep=False)), None)
    index = {name: i for i, name in enumerate(names or classes)}
    if unknown := [c for c in classes if c not in index]:
        raise InputError(f"class folder {unknown[0]!r} is not in the labels file", evidence=f"in {root}")
    pairs = [(p.relative_to(root).as_posix(), index[c]) for c in classes for p in found[c]]
    return ImageSet(root, tuple(p for p, _ in pairs), tuple(label for _, label in pairs), tuple(index))


def _image_files(folder: Path, deep: bool = True) -> list[Path]:
    files = folder.rglob("*") if deep else folder.iterdir()
    return sorted(f for f in files if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())


def _open_list(path: Path, names: list[str] | None) -> ImageSet:
    index = {name: i for i, name in enumerate(names or ())}
    paths, labels = [], []
    for number, line in _read_lines(path):
        if line.startswith("#"):
            continue
        # with tabs a third column (a manifest's hash) may follow; with spaces the path may contain some
        name, label = map(str.strip, line.split("\t")[:2] if "\t" in line else line.rpartition(" ")[::2])
        if not name or not (label.isdecimal() or label in index):
            raise InputError(
                f"{path}, line {number}: expected `path label`",
                evidence=repr(line),
                hint=f"the label is a class index{' or a name from the labels file' if index else ''}",
            )
        paths.append(name)
        labels.append(index[label] if label in index else int(label))
    return ImageSet(path.parent, tuple(paths), tuple(labels), tuple(index))


def _read_names(path: Path) -> list[str]:
    """Class names by index, from a labels file."""
    names = [line for _, line in _read_lines(path)]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise InputError(
            f"{path} names class {twice!r} twice",
            evidence=f"as class {names.index(twice)} and again below",
            hint="give each class a name of its own, such as its folder's",
        )
    return names


def _read_lines(path: Path) -> list[tuple[int, str]]:
    """Line number and text of each line that is not blank."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        return [(number, line) for number, raw in enumerate(lines, 1) if (line := raw.strip())]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} as a text file", evidence=str(error)) from error


@dataclass(frozen=True)
class Batch:
    """``pixels`` float32 (N, 3, crop, crop), ``labels`` int64 (N,) or None, ``index`` the images' places in the set."""

    pixels: np.ndarray
    labels: np.ndarray | None
    index: np.ndarray


@dataclass
class Loader:
    """Iterate over ``images`` in order, decoded by threads a few batches ahead.

    An unreadable image stops the iteration with `InputError` naming every bad one of its batch, or, with
    ``skip_bad``, is left out and listed in ``skipped`` (path, reason). Memory is bounded by a few batches.
    """

    images: ImageSet
    preprocess: Preprocess
    batch: int = 32
    skip_bad: bool = False
    skipped: list[tuple[str, str]] = field(default_factory=list)

    AHEAD = 2  # batches decoded while one is used

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch)

    def __iter__(self) -> Iterator[Batch]:
        need("PIL.Image", "images")
        self.skipped.clear()
        starts = iter(range(0, len(self.images), self.batch))
        queue: deque[tuple[int, list[Future[np.ndarray | str]]]] = deque()
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            while True:
                while len(queue) <= self.AHEAD and (start := next(starts, None)) is not None:
                    places = range(start, min(start + self.batch, len(self.images)))
                    queue.append((start, [pool.submit(self._read, i) for i in places]))
                if not queue:
                    break
                start, futures = queue.popleft()
                if (batch := self._collect(start, [f.result() for f in futures])) is not None:
                    yield batch
        finally:
            pool.shutdown(cancel_futures=True)
        if len(self.skipped) == len(self.images):
            raise InputError(f"none of the {len(self.images)} images is readable", evidence=_listing(self.skipped))

    def _read(self, i: int) -> np.ndarray | str:
        try:
            return self.images.read(i, self.preprocess)
        except Exception as error:  # a damaged file can raise anything from an image library
            return str(error) or type(error).__name__

    def _collect(self, start: int, results: list[np.ndarray | str]) -> Batch | None:
        bad = [(self.images.paths[start + i], r) for i, r in enumerate(results) if isinstance(r, str)]
        if bad and not self.skip_bad:
            raise InputError(
                f"{len(bad)} unreadable image{'s' if len(bad) > 1 else ''} in {self.images.root}",
                evidence=_listing(bad),
                hint="repair or remove them, or leave them out with --skip-bad",
            )
        self.skipped += bad
        good = [i for i, r in enumerate(results) if not isinstance(r, str)]
        if not good:
            return None
        index = np.asarray(good, np.int64) + start
        pixels = normalize(np.stack([r for r in results if not isinstance(r, str)]), self.preprocess)
        labels = self.images.labels
        return Batch(pixels, None if labels is None else np.asarray([labels[i] for i in index], np.int64), index)


def _listing(bad: list[tuple[str, str]], most: int = 10) -> str:
    lines = [f"{path}: {reason}" for path, reason in bad[:most]]
    return "\n".join([*lines, *([f"and {len(bad) - most} more"] if len(bad) > most else [])])
