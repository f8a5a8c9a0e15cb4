"""How image sets lie on disk: class folders, flat folders with a ground truth, list files, CSV, tar shards, packs."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import NamedTuple

from edgeres import imagenet, shards
from edgeres.data import ImageSet
from edgeres.errors import InputError, UsageError
from edgeres.labels import csv_rows, number_labels, number_names, read_lines, read_names
from edgeres.progress import say
from edgeres.remote import Address, Place, place

IMAGE_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
ARCHIVES = (".zip", ".tgz", ".tar.gz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".7z", ".rar")
SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))
PATH_COLUMNS = ("path", "filename", "file", "image")
LABEL_COLUMNS = ("label", "target", "class")
TRUTHS = (
    "LOC_val_solution.csv",
    "val_map.txt",
    "val.txt",
    "imagenet_2012_validation_synset_labels.txt",
    "ILSVRC2012_validation_ground_truth.txt",
)
"""What a ground truth of ImageNet's validation images is called, looked for beside them and one folder up."""
ILSVRC = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)
HINT = "give a folder with one folder per class, a list file with one `path label` per line, a CSV file or tar shards"


def open_images(source: str | Place, labels: str | Place | None = None, classes: int | None = None) -> ImageSet:
    """Open whatever ``source`` is.

    - a folder of class folders: indices are ImageNet's where every name is a WordNet id of ImageNet-1k, however few
      there are, or, if ``classes`` is 1000, where every one is an English name of it; otherwise alphabetical. A
      mixture is alphabetical too, and refused if ``classes`` is 1000. ``labels``, a file with one class name per line,
      comes before all that.
    - a flat folder: no labels, or those of the ground truth given as ``labels``, or for ``ILSVRC2012_val_*.JPEG`` of
      one that lies beside them (see `_read_truth`).
    - a list file: ``path label`` lines, or paths alone.
    - a CSV file with a header naming a path and a label column.
    - WebDataset shards: a .tar, a folder of them, or a pattern such as ``val-*.tar``.
    - a .pack that edgeres made.

    All but tar shards may lie at an address that fsspec knows, such as s3://bucket/val.pack: names are listed once,
    images and pixels are read when they are needed. Web servers list no folders.

    Names that begin with a dot are left out. ``classes``, the number of the model's, bounds labels given as numbers
    and switches ImageNet's numbering off if it is not 1000: a model of ten classes numbers its ten folders itself.
    """
    path, truth = place(source), None if labels is None else place(labels)
    kind, shown = _kind(path), path if isinstance(path, Address) else source
    if kind == "directory":
        images = _open_folder(path, truth, classes)
    elif kind == "file":
        images = _open_file(path, truth, classes)
    elif glob.has_magic(str(source)) and (found := sorted(glob.glob(str(source), recursive=True))):
        if other := next((f for f in found if not f.endswith(".tar")), None):
            raise InputError(f"{source} matches {other}", hint="a pattern is for tar shards alone, such as 'val-*.tar'")
        images = _open_shards([Path(f) for f in found], truth, classes)
    else:
        raise InputError(f"no images at {shown}", hint=HINT)
    if not len(images):
        looked = f"looked for files ending in {', '.join(sorted(IMAGE_SUFFIXES))}"
        raise InputError(f"no images in {shown}", evidence=looked, hint=HINT)
    if odd := next((p for p in images.paths if "\n" in p or "\t" in p or "\r" in p), None):
        raise InputError("a file name holds a tab or a line break", evidence=repr(odd), hint="rename it")
    return images


def _kind(path: Place) -> str:
    """What lies there: "file", "directory", or something else."""
    if not isinstance(path, Address):
        return "directory" if path.is_dir() else "file" if path.is_file() else ""
    if not path.web:
        return path.kind()
    if path.suffix:
        return "file"  # if it is not there, reading it says so
    raise InputError(
        f"{path} names no file", evidence="web servers do not list folders", hint="give a pack, or a list of the images"
    )


def _open_file(path: Place, labels: Place | None, classes: int | None) -> ImageSet:
    name = path.name.lower()
    if name.endswith(".pack"):
        from edgeres.pack import open_pack

        if labels is not None:
            raise UsageError(f"{path} has its labels inside", hint="leave --labels out, or pack the images with it")
        packed: ImageSet = open_pack(path)
        return packed
    if name.endswith(".tar"):
        return _open_shards([path], labels, classes)
    if name.endswith(ARCHIVES) or _starts_with(path, b"PK\x03\x04"):
        raise InputError(
            f"{path} is a compressed archive; images are not read out of those",
            hint="unpack it and give the folder; a plain, uncompressed .tar of WebDataset pairs is read in place",
        )
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise InputError(f"{path} is one image, not a set of them", hint=HINT)
    names = None if labels is None else read_names(labels)
    return (_open_csv if name.endswith(".csv") else _open_list)(path, names, classes)


def _starts_with(path: Place, magic: bytes) -> bool:
    if isinstance(path, Address):
        return path.piece(0, len(magic))[0] == magic
    with open(path, "rb") as f:
        return f.read(len(magic)) == magic


# folders


class _Listing(NamedTuple):
    """What a folder holds, by name: the images below each folder in it, images and tar files in it."""

    folders: dict[str, list[str]]
    flat: list[str]
    tars: list[str]


def _open_folder(root: Place, labels: Place | None, classes: int | None) -> ImageSet:
    found, flat, tars = _list_address(root) if isinstance(root, Address) else _list(root)
    if folders := [name for name, paths in found.items() if paths]:
        if flat:
            say(f"left out {len(flat)} images beside the class folders of {root}, the first is {flat[0]}")
        return _class_folders(root, {name: found[name] for name in folders}, labels, classes)
    if tars and not flat:
        return _open_shards([root / name for name in tars], labels, classes)
    return _with_truth(ImageSet(root, tuple(flat), None), root, labels, classes)


def _list(root: Path) -> _Listing:
    top = _entries(str(root))
    found: dict[str, list[str]] = {}
    for entry in top:
        if entry.is_dir():
            found[entry.name] = list(_walk(entry.path, entry.name, (os.path.realpath(root),)))
            if not found[entry.name] and _entries(entry.path):
                say(f"no images in {entry.path}: not a class")
    flat = [entry.name for entry in top if not entry.is_dir() and _is_image(entry)]
    return _Listing(found, flat, [entry.name for entry in top if entry.name.endswith(".tar") and entry.is_file()])


def _list_address(root: Address) -> _Listing:
    """The same for a folder at an address, in the same order."""
    found: dict[str, list[str]] = {}
    files = [parts for parts in root.find() if not any(part.startswith(".") for part in parts)]
    for top, *below in files:
        images = found.setdefault(top, []) if below else []
        if below and _image_suffix(below[-1]):
            images.append("/".join((top, *below)))
    for name, images in found.items():
        if not images:
            say(f"no images in {root / name}: not a class")
    flat = [name for name, *below in files if not below]
    return _Listing(found, [n for n in flat if _image_suffix(n)], [n for n in flat if n.endswith(".tar")])


def _class_folders(root: Place, found: dict[str, list[str]], labels: Place | None, classes: int | None) -> ImageSet:
    """``found``: folder -> paths, folders in alphabetical order."""
    if labels is not None:
        index = {name: i for i, name in enumerate(read_names(labels))}
        if unknown := [name for name in found if name not in index]:
            raise InputError(
                f"class folder {unknown[0]!r} is not in the labels file",
                evidence=f"in {root}; {labels} has {', '.join(map(repr, list(index)[:3]))}{', ...' * (len(index) > 3)}",
                hint="the file names each class as its folder is called, one per line, in the model's order",
            )
        names: Sequence[str] = tuple(index)
    else:
        if set(map(str.lower, found)) <= SPLITS:
            raise InputError(
                f"the folders of {root} are {' and '.join(found)}: splits, not classes",
                hint=f"give one of them, such as {root / next(iter(found))}",
            )
        names, index = number_names(list(found), classes, f"the class folders of {root}")
    pairs = [(path, index[name]) for name, paths in found.items() for path in paths]
    return ImageSet(root, tuple(p for p, _ in pairs), tuple(i for _, i in pairs), tuple(names))


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What lies in a folder, by name, without what is hidden."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}", evidence=error.strerror or str(error)) from error


def _walk(folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    """Paths of the images in a folder and below, depth first, by name. ``above``: real paths of the folders above."""
    rest: list[tuple[str, str, tuple[str, ...] | None]] = [(folder, prefix, above)]
    while rest:
        path, relative, above_it = rest.pop()
        if above_it is None:
            yield relative
            continue
        real = os.path.realpath(path)
        if real in above_it:
            raise InputError(f"the folder {path} leads back to one above it", evidence=f"it links to {real}")
        for entry in reversed(_entries(path)):
            if entry.is_dir():
                rest.append((entry.path, f"{relative}/{entry.name}", (*above_it, real)))
            elif _is_image(entry):
                rest.append((entry.path, f"{relative}/{entry.name}", None))


def _is_image(entry: os.DirEntry[str]) -> bool:
    """By name. A broken link counts, so that reading it is an error; a pipe or device of that name is refused."""
    if not _image_suffix(entry.name):
        return False
    if not entry.is_file() and os.path.exists(entry.path):
        raise InputError(f"{entry.path} is no regular file", hint="remove the pipe, socket or device")
    return True


def _image_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


# ground truth of flat folders


def _with_truth(images: ImageSet, folder: Place, labels: Place | None, classes: int | None) -> ImageSet:
    """``images`` with labels from a file, by base name; ImageNet's validation images may have theirs beside them."""
    bases = [path.rpartition("/")[2] for path in images.paths]
    validation = bool(bases) and all(map(ILSVRC.fullmatch, bases))
    if labels is None:
        if not validation or (labels := _truth_beside(folder)) is None:
            return images
        say(f"labels from {labels}")
    truth = _read_truth(labels)
    written = [truth.get(base, truth.get(base.rpartition(".")[0])) for base in bases]
    if missing := [base for base, label in zip(bases, written, strict=True) if label is None]:
        raise InputError(
            f"{labels} has no label for {len(missing)} of {len(bases)} images",
            evidence=f"the first is {missing[0]!r}",
            hint="the images are in no class folders, so each needs a line `name label`",
        )
    texts = [label for label in written if label is not None]
    known = list(imagenet.ids()) if validation else None
    numbers, names = number_labels(texts, known, classes, lambda i: f"{labels}, {bases[i]}")
    return replace(images, labels=numbers, classes=names)


def _truth_beside(folder: Place) -> Place | None:
    above = [folder, *folder.resolve().parents]
    places = [f / name for f in above[:2] for name in TRUTHS]
    places += [f / TRUTHS[0] for f in above[2:5]]  # Kaggle's layout keeps it four folders up
    for path in places:
        if path.is_file() and (path.name != "val.txt" or any(ILSVRC.search(line) for _, line in read_lines(path)[:1])):
            if path.name != TRUTHS[-1]:
                return path
            say(f"no labels: {path} numbers classes in an order of its own; see docs/recipes.md")
    return None


def _read_truth(path: Place) -> dict[str, str]:
    """Base name (with or without suffix) -> label as written, from one of these.

    - ``name label`` lines, 0-based indices or WordNet ids (MLPerf's val_map.txt, Caffe's val.txt)
    - Kaggle's LOC_val_solution.csv (``ImageId,PredictionString``), or any CSV file that `open_images` takes
    - 50,000 lines of one WordNet id each, the n-th for ``ILSVRC2012_val_<n>``

    Numbers alone, as in the development kit's ILSVRC2012_validation_ground_truth.txt, are refused: those count from 1
    in the kit's own order of synsets (meta.mat), which is not that of the sorted ids that networks are trained with.
    """
    if path.suffix.lower() == ".csv":
        rows = list(csv_rows(path, (*PATH_COLUMNS, "imageid"), (*LABEL_COLUMNS, "predictionstring")))
        pairs = [
            (n, name, (label.split() or [""])[0] if "ImageId" in column else label) for n, name, label, column in rows
        ]
    else:
        lines = [(n, line) for n, line in read_lines(path) if not line.startswith("#")]
        alone = [line for _, line in lines if len(line.split()) == 1]
        if lines and len(alone) == len(lines):
            return _truth_in_order(path, alone)
        pairs = [(n, *_columns(line)) for n, line in lines]
    truth: dict[str, str] = {}
    for number, name, label in pairs:
        base = name.replace("\\", "/").rpartition("/")[2]
        if not base or not label:
            raise InputError(
                f"{path}, line {number}: expected `name label`", hint="as in `ILSVRC2012_val_00000001.JPEG 65`"
            )
        if base in truth:
            raise InputError(f"{path}, line {number}: {base!r} has a label already", evidence=truth[base])
        truth[base] = label
    return truth


def _truth_in_order(path: Place, lines: list[str]) -> dict[str, str]:
    if all(map(str.isdecimal, lines)):
        raise InputError(
            f"{path} has numbers alone, and which class each stands for is not known",
            evidence="the development kit counts from 1 in the order of its meta.mat, networks in the order of the ids",
            hint="use LOC_val_solution.csv, or lines `ILSVRC2012_val_00000001.JPEG 65` counted from 0",
        )
    if wrong := next((i for i, line in enumerate(lines) if imagenet.WORDNET_ID.fullmatch(line) is None), None):
        raise InputError(f"{path}, line {wrong + 1}: expected a WordNet id", evidence=repr(lines[wrong]))
    if imagenet.WORDNET_ID.fullmatch(lines[0]) is None or len(lines) < 50_000:
        raise InputError(
            f"{path} does not say which image each of its {len(lines):,} lines belongs to",
            evidence=repr(lines[0]),
            hint="the images are in no class folders, so each needs a line `name label`",
        )
    return {f"ILSVRC2012_val_{number:08}": line for number, line in enumerate(lines, 1)}


# list files and CSV


def _open_list(path: Place, names: list[str] | None, classes: int | None) -> ImageSet:
    """``path label`` lines: an index, a WordNet id, or a name from the labels file. Or paths alone, or ``-``."""
    rows = [(number, line, *_columns(line)) for number, line in read_lines(path) if not line.startswith("#")]
    known = set(names or ())
    bare = all(_only_path(line, label) for _, line, _, label in rows)
    paths, labels = [], []
    for number, line, name, label in rows:
        if bare:
            name, label = line.partition("\t")[0].strip(), "0"
        wordnet = names is None and imagenet.WORDNET_ID.fullmatch(label) and imagenet.index(label) is not None
        if not name or not (label.isdecimal() or label in known or wordnet):
            raise InputError(
                f"{path}, line {number}: expected `path label`",
                evidence=repr(line),
                hint=f"the label is a class index{' or a name from the labels file' if names else ''}, or a WordNet id",
            )
        paths.append(name)
        labels.append(label)
    _refuse_twice(path, [(number, name) for (number, *_), name in zip(rows, paths, strict=True)])
    if bare:
        return ImageSet(path.parent, tuple(paths), None, tuple(names or ()))
    numbers, found = number_labels(labels, names, classes, lambda i: f"{path}, line {rows[i][0]}")
    return ImageSet(path.parent, tuple(paths), numbers, found)


def _columns(line: str) -> tuple[str, str]:
    """Path and label of a line. With tabs a third column may follow (a manifest's hash)."""
    name, label = (*line.split("\t"), "")[:2] if "\t" in line else line.rpartition(" ")[::2]
    return name.strip(), label.strip()


def _only_path(line: str, label: str) -> bool:
    if "\t" in line:
        return label == "-"
    return not label.isdecimal() and PurePath(line).suffix.lower() in IMAGE_SUFFIXES


def _open_csv(path: Place, names: list[str] | None, classes: int | None) -> ImageSet:
    rows = list(csv_rows(path, PATH_COLUMNS, LABEL_COLUMNS))
    _refuse_twice(path, [(number, name) for number, name, _, _ in rows])
    numbers, found = number_labels(
        [label for *_, label, _ in rows], names, classes, lambda i: f"{path}, line {rows[i][0]}"
    )
    return ImageSet(path.parent, tuple(name for _, name, _, _ in rows), numbers, found)


def _refuse_twice(path: Place, lines: list[tuple[int, str]]) -> None:
    first: dict[str, int] = {}
    for number, name in lines:
        if first.setdefault(name, number) != number:
            raise InputError(
                f"{path}, line {number}: {name!r} is listed already",
                evidence=f"on line {first[name]}",
                hint="an image that counts twice distorts what is measured; remove one of the lines",
            )


# shards


def _open_shards(places: Sequence[Place], labels: Place | None, classes: int | None) -> ImageSet:
    files = [path for path in places if isinstance(path, Path)]
    if len(files) < len(places):
        raise InputError(
            f"{places[0]} is a tar file at an address",
            evidence="tar files have no index: to find the images in one, all of it is read",
            hint="make a pack of a copy here (edgeres pack), and give the address of that",
        )
    root = files[0].parent if len({f.parent for f in files}) == 1 else Path(os.path.commonpath(files))
    images, written = shards.gather(root, [f.relative_to(root).as_posix() for f in files])
    if written and all(label is None for label in written):
        return _with_truth(images, root, labels, classes)
    if None in written:
        path = images.paths[written.index(None)]
        raise InputError(f"no label for {path}, though others have one", evidence=f"in {root}")
    texts = [label for label in written if label is not None]
    names = None if labels is None else read_names(labels)
    numbers, found = number_labels(texts, names, classes, lambda i: f"{root}, {images.paths[i]}")
    return replace(images, labels=numbers, classes=found)
