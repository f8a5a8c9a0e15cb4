"""What an image set holds, and what is wrong with it: every image read once."""

from __future__ import annotations

import io
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from hashlib import sha256
from typing import Any, NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

from edgeres.data import ImageSet, threaded
from edgeres.errors import need
from edgeres.images import open_image, to_rgb
from edgeres.pack import Pack
from edgeres.progress import track
from edgeres.remote import Unreachable

ORIENTATION = 0x0112  # EXIF tag; 1 is upright
SHOWN = 5
"""Lines that `table` prints of each list."""


class Look(NamedTuple):
    """What was seen of one image: SHA-256 of its bytes (None: unreadable), and what it is, or why it cannot be read."""

    sha256: str | None
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    format: str = ""
    rotated: bool = False
    reason: str = ""


def check(images: ImageSet, other: ImageSet | None = None, classes: int | None = None) -> dict[str, Any]:
    """Read every image of ``images`` in full -> a report in JSON values.

    ``classes`` is how many there should be, if the set does not know. ``overlap`` lists images whose bytes ``other``
    holds too. Lists hold everything found, in the order of the set. Names that are no UTF-8 are escaped.

    A pack holds pixels alone: its images have no sizes, modes or formats to report; its digest is checked.
    """
    if isinstance(images, Pack):
        images.verify()
    looks = _looks(images)
    names = [_shown(path) for path in images.paths]
    groups: dict[str, list[str]] = defaultdict(list)
    for name, look in zip(names, looks, strict=True):
        if look.sha256:
            groups[look.sha256].append(name)
    seen = [look for look in looks if look.format]
    known = len(images.classes) or classes
    return {
        "images": len(images),
        "source": _shown(str(images.root)),
        "classes": _classes(images, known),
        "unreadable": [
            {"path": name, "reason": look.reason} for name, look in zip(names, looks, strict=True) if look.reason
        ],
        "duplicates": [group for group in groups.values() if len(group) > 1],
        "labels_out_of_range": _out_of_range(images, names, known),
        "overlap": _overlap(names, looks, other),
        "against": None if other is None else len(other),
        "width": _spread([look.size[0] for look in seen]),
        "height": _spread([look.size[1] for look in seen]),
        "modes": dict(Counter(look.mode for look in seen).most_common()),
        "formats": dict(Counter(look.format for look in seen).most_common()),
        "rotated": [name for name, look in zip(names, looks, strict=True) if look.rotated],
        "not_utf8": [name for name, path in zip(names, images.paths, strict=True) if name != path],
    }


def _looks(images: ImageSet) -> list[Look]:
    if not _has_files(images):
        return [Look(digest) for digest in images.hashes()]
    need("PIL.Image", "images")
    found = threaded(partial(_look, images), range(len(images)), ahead=256)
    return list(track(found, "check", len(images), "images"))


def _has_files(images: ImageSet) -> bool:
    """Whether there are encoded images to open. A pack knows the hashes of files that it does not hold."""
    return type(images).hashes is ImageSet.hashes


def _look(images: ImageSet, i: int) -> Look:
    digest = None
    try:
        with images.open(i) as f:
            content = f.read()
        digest = sha256(content).hexdigest()
        with open_image(io.BytesIO(content)) as image:
            size, mode, kind = image.size, image.mode, image.format or ""
            rotated = image.getexif().get(ORIENTATION, 1) != 1
            to_rgb(image)
        return Look(digest, size, mode, kind, rotated)
    except Unreachable:  # says nothing about the image
        raise
    except Exception as error:  # a damaged file can raise anything from an image library
        return Look(digest, reason=str(error).partition("\n")[0] or type(error).__name__)


def _shown(path: str) -> str:
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _classes(images: ImageSet, known: int | None) -> dict[str, Any] | None:
    """How many images the classes have: those that occur, and how many do not."""
    if images.labels is None:
        return None
    counts = Counter(images.labels)
    absent = None if known is None else known - sum(label < known for label in counts)
    return {"known": known, "seen": len(counts), "empty": absent, "images": _spread(list(counts.values()))}


def _out_of_range(images: ImageSet, names: list[str], known: int | None) -> list[dict[str, Any]]:
    if images.labels is None or known is None:
        return []
    pairs = zip(names, images.labels, strict=True)
    return [{"path": name, "label": label} for name, label in pairs if not 0 <= label < known]


def _overlap(names: list[str], looks: list[Look], other: ImageSet | None) -> list[dict[str, str]]:
    if other is None:
        return []
    wanted = {look.sha256 for look in looks if look.sha256}
    there: dict[str, str] = {}
    for path, digest in zip(other.paths, _hashes(other), strict=True):
        if digest in wanted:
            there.setdefault(digest, _shown(path))
    pairs = ((name, look.sha256) for name, look in zip(names, looks, strict=True))
    return [{"path": name, "other": there[digest]} for name, digest in pairs if digest in there]


def _hashes(images: ImageSet) -> Iterable[str]:
    if not _has_files(images):
        return images.hashes()

    def one(i: int) -> str:
        try:
            with images.open(i) as f:
                return sha256(f.read()).hexdigest()
        except Unreachable:
            raise
        except Exception:  # an unreadable image of the other set is no image of this one
            return ""

    return track(threaded(one, range(len(images))), "compare", len(images), "images")


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    """Smallest, median and largest; None of nothing."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)} if values else None


def table(report: dict[str, Any]) -> Group:
    """A report for a terminal of 80 columns: what the set holds, then what is wrong, a few lines of each kind."""
    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column()
    rows = [("images", f"{report['images']:,}")]
    if classes := report["classes"]:
        known = f"{classes['seen']:,}" if classes["known"] is None else f"{classes['seen']:,} of {classes['known']:,}"
        rows.append(("classes", f"{known}, with {_range(classes['images'])} images each"))
    else:
        rows.append(("classes", "no labels"))
    if report["width"]:
        rows.append(("width", _range(report["width"])))
        rows.append(("height", _range(report["height"])))
        rows.append(("formats", _counts(report["formats"])))
        rows.append(("modes", _counts(report["modes"])))
    for name, cell in rows:
        grid.add_row(name, cell)
    return Group(grid, *_findings(report))


def _findings(report: dict[str, Any]) -> list[Text]:
    overlap = "" if report["against"] is None else f" of the {report['against']:,} to compare with"
    kinds = [
        ("unreadable", "red", "unreadable", [f"{r['path']}: {r['reason']}" for r in report["unreadable"]]),
        (
            "labels_out_of_range",
            "red",
            "with a label outside the classes",
            [f"{r['path']}: {r['label']}" for r in report["labels_out_of_range"]],
        ),
        ("overlap", "red", f"the same as one{overlap}", [f"{r['path']} = {r['other']}" for r in report["overlap"]]),
        ("duplicates", "yellow", "sets of identical images", [" = ".join(group) for group in report["duplicates"]]),
        ("rotated", "yellow", "to be turned by their EXIF tag, which is not done", report["rotated"]),
        ("not_utf8", "yellow", "with names that are not UTF-8", report["not_utf8"]),
    ]
    lines = []
    for key, style, what, listed in kinds:
        if report[key]:
            lines.append(Text(f"{len(listed):,} {what}", style=style))
            lines += [Text(f"  {line}") for line in listed[:SHOWN]]
            if len(listed) > SHOWN:
                lines.append(Text(f"  and {len(listed) - SHOWN:,} more (--json lists all)"))
    if report["against"] is not None and not report["overlap"]:
        lines.append(Text(f"no image in common with the {report['against']:,} compared", style="green"))
    return lines or [Text("nothing wrong found", style="green")]


def _range(spread: dict[str, float]) -> str:
    low, middle, high = (
        f"{spread[k]:,g}" if spread[k] < 1e6 else f"{spread[k]:,.0f}" for k in ("min", "median", "max")
    )
    return low if low == high else f"{low} to {high}, median {middle}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
