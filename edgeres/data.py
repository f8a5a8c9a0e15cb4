"""Image sets: folders and list files, the images and labels in them, and records of which were used."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgeres.errors import InputError, need
from edgeres.files import digest, sha256_file
from edgeres.images import decode
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
        return self.take(sorted(sorted(rank, key=rank.__getitem__)[:limit]))

    def take(self, keep: Sequence[int]) -> ImageSet:
        """The images at these places, in this order."""
        labels = tuple(self.labels[i] for i in keep) if self.labels is not None else None
        return replace(self, paths=tuple(self.paths[i] for i in keep), labels=labels)

    def hashes(self) -> tuple[str, ...]:
        """SHA-256 of each file, in order."""
        with ThreadPoolExecutor() as pool:
            return tuple(pool.map(lambda p: sha256_file(self.root / p), self.paths))

    def require(self, preprocess: Preprocess) -> None:
        """Raise what keeps every image from being read under ``preprocess``: here, that no image library is there."""
        need("PIL.Image", "images")

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
