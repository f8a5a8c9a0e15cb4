"""Classes as people write them -> indices, and the text files that name images and classes."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence

from edgeres import imagenet
from edgeres.errors import InputError
from edgeres.progress import say
from edgeres.remote import Place


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


def csv_rows(path: Place, names: tuple[str, ...], labels: tuple[str, ...]) -> Iterator[tuple[int, str, str, str]]:
    """Line number, path, label and the path column's heading, for each row of a CSV file with a header."""
    text = read_text(path)
    header = text.partition("\n")[0]
    separator = max(",;\t", key=header.count)
    # not splitlines, which cuts at a form feed and at line separators of Unicode, too
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
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


def read_names(path: Place) -> list[str]:
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


def read_lines(path: Place) -> list[tuple[int, str]]:
    """Line number and text of each line that is not blank."""
    lines = read_text(path).split("\n")
    return [(number, line) for number, raw in enumerate(lines, 1) if (line := raw.strip())]


def read_text(path: Place) -> str:
    """The text of a UTF-8 file, without a byte order mark."""
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
