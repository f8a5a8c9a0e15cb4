"""Image sets -> batches of (N, 3, crop, crop) float32, decoded by threads a few batches ahead."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from edgeres.data import ImageSet
from edgeres.errors import InputError, UsageError
from edgeres.machine import cores
from edgeres.recipe import Preprocess
from edgeres.remote import Unreachable

AHEAD = 2
"""Batches decoded while one is used; more if that would leave cores idle."""
TASK = 8
"""Images a thread takes at a time, at most: handing over one costs about as much as reading it from a pack."""


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
    ``skip_bad``, is left out and listed in ``skipped`` (path, reason). Memory is bounded by a few batches. A batch is
    the caller's to keep. ``threads`` decode, None for one on each core.
    """

    images: ImageSet
    preprocess: Preprocess
    batch: int = 32
    skip_bad: bool = False
    skipped: list[tuple[str, str]] = field(default_factory=list)
    threads: int | None = None

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch)

    def __iter__(self) -> Iterator[Batch]:
        self.skipped.clear()
        labels, crop = self.images.labels, self.preprocess.crop
        empty = recycled((self.batch, 3, crop, crop), np.float32)
        pieces = read_ahead(self.images, self.preprocess, self.batch, empty, normalizer(self.preprocess), self.threads)
        with closing(pieces):
            for piece in pieces:
                self.skipped += piece.accept(self.images, self.skip_bad)
                if len(index := piece.good):
                    said = None if labels is None else np.asarray([labels[i] for i in index], np.int64)
                    yield Batch(piece.rows, said, index)
        refuse_all_bad(self.images, self.skipped)


@dataclass(frozen=True)
class Piece:
    """What was read of the images at ``places``: ``rows`` of the ``good`` ones, and why the ``bad`` are missing."""

    places: range
    good: np.ndarray
    rows: np.ndarray
    bad: list[tuple[int, str]]

    def accept(self, images: ImageSet, skip_bad: bool) -> list[tuple[str, str]]:
        """The bad images as (path, reason); without ``skip_bad`` `InputError` if there is one."""
        bad = [(images.paths[i], reason) for i, reason in self.bad]
        if not skip_bad:
            refuse_bad(images, bad)
        return bad


def read_ahead(
    images: ImageSet,
    preprocess: Preprocess,
    batch: int,
    empty: Callable[[int], np.ndarray],
    fill: Callable[[np.ndarray, np.ndarray], None],
    threads: int | None = None,
) -> Generator[Piece, None, None]:
    """Read ``images`` in order by ``threads``, None for one on each core, ``batch`` at a time -> one `Piece` each.

    ``empty(n)`` makes the array for n images, ``fill(row, pixels)`` puts one image, uint8 (crop, crop, 3), into its
    row; it is called in the thread that read the image.
    """
    images.require(preprocess)
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads to read images with", hint="give 1 or more, or None for all cores")
    threads = threads or cores()
    ahead = max(AHEAD, math.ceil(2 * threads / batch))
    step = max(1, min(TASK, batch // (4 * threads)))

    def read(places: range, rows: np.ndarray) -> list[tuple[int, str]]:
        bad = []
        for i, row in zip(places, rows, strict=True):
            try:
                pixels = images.read(i, preprocess)
            except Unreachable:  # a network that is down says nothing about an image: it is not one to skip
                raise
            except Exception as error:  # a damaged file can raise anything from an image library
                bad.append((i, str(error) or type(error).__name__))
                continue
            fill(row, pixels)
        return bad

    starts = iter(range(0, len(images), batch))
    queue: deque[tuple[range, np.ndarray, list[Future[list[tuple[int, str]]]]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        while True:
            while len(queue) <= ahead and (start := next(starts, None)) is not None:
                places = range(start, min(start + batch, len(images)))
                rows = empty(len(places))
                parts = [slice(at, at + step) for at in range(0, len(places), step)]
                queue.append((places, rows, [pool.submit(read, places[part], rows[part]) for part in parts]))
            if not queue:
                return
            places, rows, tasks = queue.popleft()
            bad = [pair for task in tasks for pair in task.result()]
            good = np.delete(np.arange(places.start, places.stop), [i - places.start for i, _ in bad])
            yield Piece(places, good, rows[good - places.start] if bad else rows, bad)
    finally:
        pool.shutdown(cancel_futures=True)


def normalizer(preprocess: Preprocess) -> Callable[[np.ndarray, np.ndarray], None]:
    """A function that fills float32 (3, H, W) from uint8 (H, W, 3), bit by bit what `images.normalize` gives.

    It takes the same steps in place, plane by plane, which stay in the processor's cache: a fifth of the time.
    """
    mean_of, std_of = (np.asarray(values, np.float32) for values in (preprocess.mean, preprocess.std))
    channels = list(zip(range(3), mean_of, std_of, strict=True))
    if preprocess.channel_order == "BGR":
        channels.reverse()

    def fill(row: np.ndarray, pixels: np.ndarray) -> None:
        for plane, (channel, mean, std) in zip(row, channels, strict=True):
            plane[...] = pixels[..., channel]
            plane /= np.float32(255)
            plane -= mean
            plane /= std

    return fill


def recycled(shape: tuple[int, ...], dtype: type) -> Callable[[int], np.ndarray]:
    """A function that makes arrays of up to ``shape``, on memory whose former arrays are all gone where there is some.

    The system clears each page it hands out. For a batch of floats that takes longer than filling it.
    """
    free: list[np.ndarray] = []

    def empty(n: int) -> np.ndarray:
        return np.asarray(_Memory(free.pop() if free else np.empty(shape, dtype), free))[:n]

    return empty


class _Memory:
    """What arrays on ``block`` refer to, so that the last of them to go gives it back to ``free``."""

    def __init__(self, block: np.ndarray, free: list[np.ndarray]) -> None:
        self.block, self.free = block, free
        self.__array_interface__ = block.__array_interface__

    def __del__(self) -> None:
        self.free.append(self.block)


def refuse_bad(images: ImageSet, bad: list[tuple[str, str]]) -> None:
    """Raise `InputError` naming the ``bad`` images (path, reason), if there are any."""
    if bad:
        raise InputError(
            f"{len(bad)} unreadable image{'s' if len(bad) > 1 else ''} in {images.root}",
            evidence=_listing(bad),
            hint="repair or remove them, or leave them out with --skip-bad",
        )


def refuse_all_bad(images: ImageSet, skipped: list[tuple[str, str]]) -> None:
    """Raise `InputError` if every one of ``images`` was skipped."""
    if len(skipped) == len(images):
        raise InputError(f"none of the {len(images)} images is readable", evidence=_listing(skipped))


def _listing(bad: list[tuple[str, str]], most: int = 10) -> str:
    lines = [f"{path}: {reason}" for path, reason in bad[:most]]
    return "\n".join([*lines, *([f"and {len(bad) - most} more"] if len(bad) > most else [])])
