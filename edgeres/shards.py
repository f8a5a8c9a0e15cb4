"""WebDataset tar shards, read in place: one pass finds where each image lies, nothing is unpacked."""

from __future__ import annotations

import io
import json
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np

from edgeres.data import ImageSet
from edgeres.errors import EdgeresError, InputError
from edgeres.images import decode
from edgeres.recipe import Preprocess
from edgeres.remote import Place

IMAGES = ("jpg", "jpeg", "png", "webp")
LABELS = ("cls", "json", "txt")
"""Extensions that carry a class, the first one there wins: index or name; ``{"label": index or name}``; name."""
MAX_MEMBER = 256 << 20
MAX_LABEL = 1 << 20
MAX_MEMBERS = 20_000_000


class Sample(NamedTuple):
    """An image in a shard: member name, place of its bytes, and class as written (None: no such member)."""

    name: str
    offset: int
    size: int
    label: str | None


@dataclass(frozen=True)
class ShardedSet(ImageSet):
    """Images inside tar files. ``paths`` are ``shard.tar/member``; ``places`` (N, 3) are shard, offset and size."""

    shards: tuple[str, ...] = ()
    places: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64), compare=False, repr=False)

    def take(self, keep: Sequence[int]) -> ImageSet:
        taken, places = super().take(keep), self.places[np.asarray(keep, np.int64)]
        assert isinstance(taken, ShardedSet)
        used, places[:, 0] = np.unique(places[:, 0], return_inverse=True)
        return replace(taken, shards=tuple(self.shards[i] for i in used), places=places)

    def read(self, i: int, preprocess: Preprocess) -> np.ndarray:
        return decode(self.open(i), preprocess)

    def open(self, i: int) -> IO[bytes]:
        return io.BytesIO(self._bytes(i))

    def _files(self) -> Iterator[Place]:
        return (self.root / shard for shard in self.shards)

    def _hash(self, i: int) -> str:
        return sha256(self._bytes(i)).hexdigest()

    def _bytes(self, i: int) -> bytes:
        shard, offset, size = self.places[i].tolist()
        path = self.root / self.shards[shard]
        try:
            with open(path, "rb") as f:  # one handle per read: threads share no position
                f.seek(offset)
                content = f.read(size)
        except OSError as error:
            raise InputError(f"cannot read {path}", evidence=error.strerror or str(error)) from error
        if len(content) < size:
            raise InputError(f"{path} was cut short since it was opened")
        return content


def gather(root: Path, shards: Sequence[str]) -> tuple[ShardedSet, list[str | None]]:
    """Index ``shards``, paths below ``root`` -> the images without labels, and the class of each as written."""
    paths: list[str] = []
    labels: list[str | None] = []
    places: list[tuple[int, int, int]] = []
    for number, shard in enumerate(shards):
        for sample in read_index(root / shard):
            paths.append(f"{shard}/{sample.name}")
            labels.append(sample.label)
            places.append((number, sample.offset, sample.size))
        if len(paths) > MAX_MEMBERS:
            raise InputError(f"more than {MAX_MEMBERS:,} images in the shards of {root}", hint="open fewer at a time")
    table = np.asarray(places, np.int64).reshape(-1, 3)
    return ShardedSet(root, tuple(paths), None, (), tuple(shards), table), labels


def read_index(path: Path) -> list[Sample]:
    """The images of one shard, sorted by key. `InputError` names what does not belong in a shard."""
    images: dict[str, tuple[str, int, int]] = {}  # key -> name, offset, size
    labels: dict[str, tuple[int, str]] = {}  # key -> rank of the extension in LABELS, class as written
    orphans: dict[str, str] = {}
    for member, tar in _members(path):
        key, extension = _split(member.name)
        if extension in IMAGES:
            if key in images:
                raise _refusal(path, f"two images for {key!r}", f"{images[key][0]} and {member.name}")
            images[key] = (member.name, member.offset_data, member.size)
        elif extension in LABELS:
            rank = LABELS.index(extension)
            if (written := _label(path, tar, member, extension)) is not None and rank < labels.get(key, (9,))[0]:
                labels[key] = (rank, written)
            orphans.setdefault(key, member.name)
    if alone := next((name for key, name in orphans.items() if key not in images), None):
        raise _refusal(path, "a label without an image", repr(alone))
    if labels and (bare := next((images[key][0] for key in images if key not in labels), None)):
        raise _refusal(path, "an image without a label, though others have one", repr(bare))
    return [Sample(*images[key], labels[key][1] if key in labels else None) for key in sorted(images)]


def _split(name: str) -> tuple[str, str]:
    """Key and extension: the base name ends at its first dot, as in WebDataset. ("", "") for a hidden file."""
    folder, base = posixpath.split(name)
    stem, _, extension = base.partition(".")
    return (posixpath.join(folder, stem), extension.lower()) if stem else ("", "")


def _label(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> str | None:
    if member.size > MAX_LABEL:
        raise _refusal(path, f"a label of {member.size:,} bytes", repr(member.name))
    stream = tar.extractfile(member)
    try:
        text = (stream.read() if stream else b"").decode("utf-8-sig").strip()
        if extension != "json":
            return text
        value = json.loads(text)
        label = value.get("label") if isinstance(value, dict) else None
    except (ValueError, RecursionError) as error:
        raise _refusal(path, "a label that cannot be read", f"{member.name!r}: {error}") from error
    return str(label) if isinstance(label, str | int) and not isinstance(label, bool) else None


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Each regular file of a tar, checked; names without a leading ``./``."""
    seen: set[str] = set()
    try:
        with open(path, "rb") as f, tarfile.open(fileobj=cast(Any, _Bounded(f)), mode="r:") as tar:
            end = -1
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or it would hold every header
                if member.size < 0 or tar.offset <= end:
                    raise _refusal(path, "a header that points backward", repr(member.name))
                end = tar.offset
                if member.isdir():
                    continue
                member.name = _checked_name(path, member)
                if member.name in seen:
                    raise _refusal(path, "one name twice", repr(member.name))
                seen.add(member.name)
                yield member, tar
            _require_end(path, f, tar.offset)
    except EdgeresError:
        raise
    except Exception as error:  # a damaged archive can raise anything
        raise InputError(f"cannot read {path} as a tar file", evidence=str(error) or type(error).__name__) from error


def _checked_name(path: Path, member: tarfile.TarInfo) -> str:
    name = member.name.removeprefix("./")
    shown = f"{member.name!r}"
    if not member.isreg() or member.issparse():
        kind = "a link" if member.issym() or member.islnk() else "a sparse or special file"
        raise _refusal(path, kind, f"{shown} -> {member.linkname!r}" if member.linkname else shown)
    if re.match(r"[\\/]|[A-Za-z]:", name) or ".." in re.split(r"[\\/]", name):
        raise _refusal(path, "a name that leads out of the archive", shown)
    if member.size > MAX_MEMBER:
        raise _refusal(path, f"a file of {member.size:,} bytes, more than {MAX_MEMBER:,}", shown)
    return name


def _require_end(path: Path, f: IO[bytes], offset: int) -> None:
    """`tarfile` takes a damaged header for the end, and never looks behind the first end."""
    f.seek(offset)
    rest = f.read(1 << 20)
    if len(rest) < 512 or any(rest[:512]):
        what = "is cut short" if len(rest) < 512 else "is damaged"
        raise InputError(f"{path} {what}", evidence=f"no header and no end mark at byte {offset:,}")
    if any(rest):
        raise InputError(
            f"{path} goes on after its end mark",
            evidence=f"an archive ends at byte {offset:,}",
            hint="archives joined with cat lose all but the first; join them with `tar -A`, or keep them apart",
        )


def _refusal(path: Path, what: str, evidence: str) -> InputError:
    return InputError(
        f"{path} holds {what}",
        evidence=evidence,
        hint="a shard holds pairs of files: key.jpg (or .jpeg, .png, .webp) with key.cls, key.json or key.txt",
    )


class _Bounded:
    """A file whose reads are small: a header may claim any size, and `tarfile` would believe it."""

    def __init__(self, f: IO[bytes]) -> None:
        self.seek, self.tell, self._read = f.seek, f.tell, f.read

    def read(self, size: int = -1) -> Any:
        if not 0 <= size <= MAX_LABEL + 512:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._read(size)
