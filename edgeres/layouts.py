"""How image sets lie on disk: class folders, flat folders with a ground truth, list files, CSV, tar shards, packs."""

from __future__ import annotations

import csv
import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePath

from edgeres import imagenet, shards
from edgeres.data import ImageSet
from edgeres.errors import InputError, UsageError
from edgeres.progress import say

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


def open_images(source: str | Path, labels: str | Path | None = None, classes: int | None = None) -> ImageSet:
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

    Names that begin with a dot are left out. ``classes``, the number of the model's, bounds labels given as numbers
    and switches ImageNet's numbering off if it is not 1000: a model of ten classes numbers its ten folders itself.
    """
    path, truth = Path(source), None if labels is None else Path(labels)
    if path.is_dir():
        images = _open_folder(path, truth, classes)
    elif path.is_file():
        images = _open_file(path, truth, classes)
    elif glob.has_magic(str(source)) and (found := sorted(glob.glob(str(source), recursive=True))):
        if other := next((f for f in found if not f.endswith(".tar")), None):
            raise InputError(f"{source} matches {other}", hint="a pattern is for tar shards alone, such as 'val-*.tar'")
        images = _open_shards([Path(f) for f in found], truth, classes)
    else:
        raise InputError(f"no images at {source}", hint=HINT)
    if not len(images):
        looked = f"looked for files ending in {', '.join(sorted(IMAGE_SUFFIXES))}"
        raise InputError(f"no images in {source}", evidence=looked, hint=HINT)
    if odd := next((p for p in images.paths if "\n" in p or "\t" in p or "\r" in p), None):
        raise InputError("a file name holds a tab or a line break", evidence=repr(odd), hint="rename it")
    return images


def _open_file(path: Path, labels: Path | None, classes: int | None) -> ImageSet:
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


def _starts_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as f:
        return f.read(len(magic)) == magic


# folders


def _open_folder(root: Path, labels: Path | None, classes: int | None) -> ImageSet:
    top = _entries(str(root))
    found: dict[str, list[str]] = {}
    for entry in top:
        if entry.is_dir():
            found[entry.name] = list(_walk(entry.path, entry.name, (os.path.realpath(root),)))
            if not found[entry.name] and _entries(entry.path):
                say(f"no images in {entry.path}: not a class")
    flat = [entry.name for entry in top if not entry.is_dir() and _is_image(entry)]
    if folders := [name for name, paths in found.items() if paths]:
        if flat:
            say(f"left out {len(flat)} images beside the class folders of {root}, the first is {flat[0]}")
        return _class_folders(root, {name: found[name] for name in folders}, labels, classes)
    tars = [Path(entry.path) for entry in top if entry.name.endswith(".tar") and entry.is_file()]
    if tars and not flat:
        return _open_shards(tars, labels, classes)
    return _with_truth(ImageSet(root, tuple(flat), None), root, labels, classes)


def _class_folders(root: Path, found: dict[str, list[str]], labels: Path | None, classes: int | None) -> ImageSet:
    """``found``: folder -> paths, folders in alphabetical order."""
    if labels is not None:
        index = {name: i for i, name in enumerate(read_names(labels))}
        if unknown := [name for name in found if name not in index]:
            raise InputError(f"class folder {unknown[0]!r} is not in the labels file", evidence=f"in {root}")
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


def number_names(names: list[str], classes: int | None, what: str) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class names in alphabetical order -> all the classes by index, and the index of each name.

    English names are taken for ImageNet's only if the model is known to have 1000 classes: ant, bee and zebra could be
    all there is.
    """
    everything = len(imagenet.ids())
    ids = all(map(imagenet.WORDNET_ID.fullmatch, names))
    if classes == everything or (classes is None and ids):
        if known := imagenet.indices(names):
            return imagenet.ids(), known
        unknown = [name for name in names if imagenet.index(name) is None]
        if classes == everything != len(names) and len(unknown) < len(names):
            raise InputError(
                f"some of {what} are classes of ImageNet, others are not",
                evidence=f"{len(unknown)} of {len(names)} are not, or could be two of them: {', '.join(unknown[:5])}"
                if unknown
                else "WordNet ids and English names are mixed, or one class has two names",
                hint="name every class by its WordNet id, or give --labels FILE with one class name per line",
            )
    if len(names) > 10 and all(map(str.isdecimal, names)) and sorted(names, key=int) != names:
        say(f"{what} are numbers, in alphabetical order as in torchvision: {', '.join(names[:3])}, ...")
    return tuple(names), {name: i for i, name in enumerate(names)}


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
    if os.path.splitext(entry.name)[1].lower() not in IMAGE_SUFFIXES:
        return False
    if not entry.is_file() and os.path.exists(entry.path):
        raise InputError(f"{entry.path} is no regular file", hint="remove the pipe, socket or device")
    return True


# ground truth of flat folders


def _with_truth(images: ImageSet, folder: Path, labels: Path | None, classes: int | None) -> ImageSet:
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


def _truth_beside(folder: Path) -> Path | None:
    above = [folder, *folder.resolve().parents]
    places = [f / name for f in above[:2] for name in TRUTHS]
    places += [f / TRUTHS[0] for f in above[2:5]]  # Kaggle's layout keeps it four folders up
    for path in places:
        if path.is_file() and (path.name != "val.txt" or any(ILSVRC.search(line) for _, line in read_lines(path)[:1])):
            if path.name != TRUTHS[-1]:
                return path
            say(f"no labels: {path} numbers classes in an order of its own; see docs/recipes.md")
    return None


def _read_truth(path: Path) -> dict[str, str]:
    """Base name (with or without suffix) -> label as written, from one of these.

    - ``name label`` lines, 0-based indices or WordNet ids (MLPerf's val_map.txt, Caffe's val.txt)
    - Kaggle's LOC_val_solution.csv (``ImageId,PredictionString``), or any CSV file that `open_images` takes
    - 50,000 lines of one WordNet id each, the n-th for ``ILSVRC2012_val_<n>``

    Numbers alone, as in the development kit's ILSVRC2012_validation_ground_truth.txt, are refused: those count from 1
    in the kit's own order of synsets (meta.mat), which is not that of the sorted ids that networks are trained with.
    """
    if path.suffix.lower() == ".csv":
        rows = list(_csv_rows(path, (*PATH_COLUMNS, "imageid"), (*LABEL_COLUMNS, "predictionstring")))
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


def _truth_in_order(path: Path, lines: list[str]) -> dict[str, str]:
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


def _open_list(path: Path, names: list[str] | None, classes: int | None) -> ImageSet:
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


def _open_csv(path: Path, names: list[str] | None, classes: int | None) -> ImageSet:
    rows = list(_csv_rows(path, PATH_COLUMNS, LABEL_COLUMNS))
    _refuse_twice(path, [(number, name) for number, name, _, _ in rows])
    numbers, found = number_labels(
        [label for *_, label, _ in rows], names, classes, lambda i: f"{path}, line {rows[i][0]}"
    )
    return ImageSet(path.parent, tuple(name for _, name, _, _ in rows), numbers, found)


def _csv_rows(path: Path, names: tuple[str, ...], labels: tuple[str, ...]) -> Iterator[tuple[int, str, str, str]]:
    """Line number, path, label and the path column's heading, for each row of a CSV file with a header."""
    text = _read_text(path)
    header = text.partition("\n")[0]
    separator = max(",;\t", key=header.count)
    reader = csv.reader(text.splitlines(keepends=True), delimiter=separator, strict=True)
    try:
        headings = [heading.strip() for heading in next(reader, [])]
        columns = [_column(headings, wanted) for wanted in (names, labels)]
        if None in columns:
            raise InputError(
                f"{path} has no column for the {'path' if columns[0] is None else 'label'}",
                evidence=f"its first line names {', '.join(map(repr, headings)) or 'nothing'}",
                hint=f"call one of {', '.join(names)}, and one of {', '.join(labels)}",
            )
        at, label = (c for c in columns if c is not None)
        for row in reader:
            if not row:
                continue
            if len(row) != len(headings) or not row[at].strip() or not row[label].strip():
                problem = (
                    f"{len(row)} columns, {len(headings)} in the header" if len(row) != len(headings) else repr(row)
                )
                raise InputError(f"{path}, line {reader.line_num}: expected a path and a label", evidence=problem)
            yield reader.line_num, row[at].strip(), row[label].strip(), headings[at]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not valid CSV", evidence=str(error)) from error


def _column(headings: list[str], wanted: tuple[str, ...]) -> int | None:
    """Place of the first of ``wanted`` that is there."""
    lower = [heading.lower() for heading in headings]
    return next((lower.index(name) for name in wanted if name in lower), None)


def _refuse_twice(path: Path, lines: list[tuple[int, str]]) -> None:
    first: dict[str, int] = {}
    for number, name in lines:
        if first.setdefault(name, number) != number:
            raise InputError(
                f"{path}, line {number}: {name!r} is listed already",
                evidence=f"on line {first[name]}",
                hint="an image that counts twice distorts what is measured; remove one of the lines",
            )


# shards


def _open_shards(files: list[Path], labels: Path | None, classes: int | None) -> ImageSet:
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


# labels as written


def number_labels(
    written: Sequence[str], names: list[str] | None, classes: int | None, where: Callable[[int], str]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Labels as written -> class indices, and the class names by index (none where labels are numbers).

    With ``names``, each label is one of them or an index into them. Without, all are indices, or all names, which
    are numbered as class folders are. ``where`` says where label i comes from, for an error.
    """
    index = {name: i for i, name in enumerate(names or ())}
    found: tuple[str, ...] = tuple(names or ())
    distinct = set(written)
    texts = sorted(label for label in distinct if label not in index and not label.isdecimal())
    if texts and names is None:
        mixed = len(texts) < len(distinct)
        if mixed and not set(texts) <= set(imagenet.ids()):
            raise InputError(
                "some labels are numbers, others are names",
                evidence=f"{where(next(i for i, w in enumerate(written) if w == texts[0]))}: {texts[0]!r}",
                hint="write all of them as indices, or give --labels FILE with one class name per line",
            )
        found, index = number_names(texts, None if mixed else classes, "the labels")
    most = len(found) or classes or 1 << 31
    numbers = {}
    for label in distinct:
        number = index.get(label, int(label) if label.isdecimal() and len(label) < 12 else None)
        if number is None or number >= most:
            place = where(next(i for i, w in enumerate(written) if w == label))
            raise InputError(
                f"{place}: no class {label!r}",
                evidence=f"there are {most:,}, counted from 0",
                hint="labels that count from 1 name every class wrongly" if label == str(most) else "",
            )
        numbers[label] = number
    return tuple(numbers[label] for label in written), found


def read_names(path: Path) -> list[str]:
    """Class names by index, from a labels file."""
    names = [line for _, line in read_lines(path)]
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        if first.setdefault(name, i) != i:
            raise InputError(
                f"{path} names class {name!r} twice",
                evidence=f"as class {first[name]} and as class {i}",
                hint="give each class a name of its own, such as its folder's",
            )
    return names


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Line number and text of each line that is not blank."""
    lines = _read_text(path).split("\n")
    return [(number, line) for number, raw in enumerate(lines, 1) if (line := raw.strip())]


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"cannot read {path} as a text file",
            evidence=f"line {line} is not UTF-8: {content.splitlines()[line - 1][:80]!r}",
            hint="save it as UTF-8",
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {path} as a text file", evidence=error.strerror or str(error)) from error
