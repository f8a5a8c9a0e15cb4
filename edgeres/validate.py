"""Engines against the FP32 baseline on the same images: accuracy, agreement, fidelity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeres.answers import HOLES, MISSING, Answers
from edgeres.build import Engine
from edgeres.data import ImageSet
from edgeres.errors import BuildError, InputError, UsageError
from edgeres.fidelity import decibels
from edgeres.loader import Batch, normalizer, read_ahead, recycled, refuse_all_bad
from edgeres.outcomes import Outcomes, join, measure
from edgeres.progress import say, track
from edgeres.recipe import Preprocess
from edgeres.runners import Runner
from edgeres.statistics import mcnemar, paired

UNREADABLE = "it could not be read"
BASELINE = "the FP32 baseline"
"""What the FP32 model is called in errors."""


@dataclass(frozen=True)
class Shard:
    """Part ``index`` (from 1) of ``of``: every ``of``-th batch of the set."""

    index: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The inverse of `str`; `UsageError` for what is none."""
        index, slash, of = text.partition("/")
        if not slash or not (index.isdecimal() and of.isdecimal()) or not 1 <= int(index) <= int(of):
            raise UsageError(f"{text!r} is no shard", hint="give I/N, such as 1/4 to 4/4")
        return cls(int(index), int(of))

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"


@dataclass(frozen=True)
class Comparison:
    """Totals over images. ``baseline`` and ``engine`` count (top-1, top-5) hits.

    ``lost5``, ``won5``: as right_to_wrong and wrong_to_right, of the top 5. ``identical``: images whose logits are the
    same to the last bit. Without ``labels`` what needs them is 0.
    """

    images: int = 0
    baseline: tuple[int, int] = (0, 0)
    engine: tuple[int, int] = (0, 0)
    right_to_wrong: int = 0
    wrong_to_right: int = 0
    same_top1: int = 0
    shared_top5: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    divergence: float = 0.0
    wrong_to_wrong: int = 0
    lost5: int = 0
    won5: int = 0
    identical: int = 0
    labels: bool = True

    @classmethod
    def of(cls, rows: Outcomes) -> Comparison:
        """The totals of ``rows``. Floats are summed exactly, so that their order is none."""
        same = rows.baseline_top[:, 0] == rows.engine_top[:, 0]
        shared = (rows.baseline_top[:, :, None] == rows.engine_top[:, None, :]).any(2)
        (b1, b5), (e1, e5) = rows.hits(rows.baseline_top), rows.hits(rows.engine_top)
        return cls(
            images=len(rows),
            baseline=(int(b1.sum()), int(b5.sum())),
            engine=(int(e1.sum()), int(e5.sum())),
            right_to_wrong=int((b1 & ~e1).sum()),
            wrong_to_right=int((~b1 & e1).sum()),
            same_top1=int(same.sum()),
            shared_top5=int(shared.sum()) / shared.shape[1],
            signal=math.fsum(rows.signal),
            noise=math.fsum(rows.noise),
            divergence=math.fsum(rows.divergence),
            wrong_to_wrong=int((~same & ~b1 & ~e1).sum()) if rows.labels else 0,
            lost5=int((b5 & ~e5).sum()),
            won5=int((~b5 & e5).sum()),
            identical=int((rows.noise == 0).sum()),
            labels=rows.labels,
        )

    def drop(self) -> tuple[float, float]:
        """Loss of top-1 and top-5 against the baseline, in percentage points; negative is a gain."""
        b, e = self.baseline, self.engine
        return 100 * (b[0] - e[0]) / self.images, 100 * (b[1] - e[1]) / self.images

    def interval(self) -> tuple[float, float]:
        """95% interval of the top-1 drop in points, paired by image."""
        return paired(self.right_to_wrong, self.wrong_to_right, self.images)

    def p_value(self) -> float:
        """Exact two-sided McNemar test that right-to-wrong and wrong-to-right are equally likely."""
        return mcnemar(self.right_to_wrong, self.wrong_to_right)

    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio of the logits in dB; inf if they are identical."""
        return decibels(self.signal, self.noise)


@dataclass(frozen=True)
class Question:
    """How do ``engines`` answer ``images``, beside the FP32 model at ``fp32``, whose digest is ``network``?

    ``calibrated``: the lists of images that may not be among them, by what a user calls each list, as SHA-256 digests.
    """

    fp32: Path
    network: str
    classes: int
    preprocess: Preprocess
    engines: Sequence[Engine]
    images: ImageSet
    calibrated: Mapping[str, frozenset[str]]
    skip_bad: bool

    @property
    def names(self) -> list[str]:
        """What the FP32 model and each engine are called in errors."""
        return [BASELINE, *(f"engine {engine.path.parent.name}" for engine in self.engines)]

    def refuse_overlap(self, hashes: Sequence[str]) -> None:
        """Raise `InputError` if one of the images was calibrated on: an engine judged on those looks better than it is.

        ``hashes`` are the SHA-256 digests of the images, in order.
        """
        for listed, calibrated in self.calibrated.items():
            if shared := [i for i, sha256 in enumerate(hashes) if sha256 in calibrated]:
                raise InputError(
                    f"{len(shared)} validation images are calibration images too",
                    evidence=f"the first is {self.images.paths[shared[0]]}, listed in {listed}",
                    hint="calibrate on images of the training split",
                )


@dataclass(frozen=True)
class Found:
    """The answer to a `Question`: ``rows`` of each engine, and why images could not be read, by place.

    ``digest`` is that of the images' manifest, ``fleet`` tells of the machines that worked, if there were several.
    ``stores`` are to be removed once results are written. ``copies``: how many of the images are others once more, to
    the last byte.
    """

    rows: list[Outcomes]
    bad: dict[int, str]
    digest: str
    fleet: dict[str, Any] | None = None
    stores: list[Answers] = field(default_factory=list)
    copies: int = 0


@dataclass(frozen=True)
class Network:
    """A loaded network, what it is called in errors, and where its logits are kept."""

    who: str
    runner: Runner
    answers: Answers


def grid(images: int, batch: int, shard: Shard | None = None) -> range:
    """Numbers of the batches to look at. They lie alike in every run, so an image always has the same neighbours."""
    batches = range(math.ceil(images / batch))
    if shard and shard.of > len(batches):
        raise UsageError(
            f"{images:,} images are too few for {shard.of} shards",
            hint=f"they are {len(batches)} batches of {batch}: one shard each at most",
        )
    return batches[shard.index - 1 :: shard.of] if shard else batches


def answer(
    networks: Sequence[Network], images: ImageSet, preprocess: Preprocess, batches: Sequence[int], skip_bad: bool
) -> dict[int, str]:
    """Run each of ``networks`` on what its store lacks of ``batches`` -> unreadable images met, by place, and why.

    `InputError` names them unless ``skip_bad``. `BuildError` for logits that are not finite.
    """

    def lacks(network: Network, batch: int) -> bool:
        state = network.answers.state(batch)
        return state == MISSING or (state == HOLES and not skip_bad)

    first = networks[0].answers
    for network in networks:
        there = sum(not lacks(network, batch) for batch in batches)
        if there:
            say(f"answers of {network.who} are there for {there:,} of {len(batches):,} batches")
    todo = [batch for batch in batches if any(lacks(network, batch) for network in networks)]
    if not todo:
        return {}
    places = [place for batch in todo for place in first.places(batch)]
    taken, size, crop = images.take(places), first.about.batch, preprocess.crop
    empty = recycled((size, 3, crop, crop), np.float32)
    bad: dict[int, str] = {}
    with closing(read_ahead(taken, preprocess, size, empty, normalizer(preprocess))) as pieces:
        for batch, piece in zip(todo, track(pieces, "validate", len(todo)), strict=True):
            piece.accept(taken, skip_bad)
            bad |= {places[i]: reason for i, reason in piece.bad}
            good = np.asarray([places[i] for i in piece.good], np.int64)
            for network in networks:
                if lacks(network, batch):  # another process may have been quicker
                    logits = np.empty((0, network.answers.about.classes), np.float32)
                    if len(good):
                        logits = _infer(network.who, network.runner, piece.rows, good)
                    network.answers.write(batch, good, logits)
    return bad


def outcomes(baseline: Answers, engine: Answers, images: ImageSet, batches: Sequence[int]) -> Outcomes:
    """The rows of ``batches``, from the answers of both."""
    parts = []
    for batch in batches:
        reference, logits = baseline.read(batch), engine.read(batch)
        good = ~(np.isnan(reference[:, 0]) | np.isnan(logits[:, 0]))
        index = np.asarray(baseline.places(batch))
        labels = None if images.labels is None else np.asarray([images.labels[i] for i in index[good]], np.int64)
        rows = measure(reference[good], logits[good], labels, index[good])
        parts.append(replace(rows, skipped=index[~good]))
    rows = join(parts)
    if not len(rows):
        refuse_all_bad(images.take(rows.skipped.tolist()), [(images.paths[i], UNREADABLE) for i in rows.skipped])
    return rows


def examine(
    question: Question, first: int, batch: int, runners: Sequence[Runner], threads: int | None = None
) -> tuple[list[Outcomes], dict[int, str]]:
    """Answer ``question`` with no store: rows of each engine, and unreadable images by place, and why.

    Its images are some of a larger set: whole batches, the first of which begins at place ``first``. ``runners`` are
    those of the FP32 model and of each engine. Errors are those of `answer`, except that all images may be unreadable.
    """
    images, preprocess = question.images, question.preprocess
    empty = recycled((batch, 3, preprocess.crop, preprocess.crop), np.float32)
    parts: list[list[Outcomes]] = [[] for _ in question.engines]
    bad: dict[int, str] = {}
    with closing(read_ahead(images, preprocess, batch, empty, normalizer(preprocess), threads)) as pieces:
        for piece in pieces:
            piece.accept(images, question.skip_bad)
            unreadable = {first + i: reason for i, reason in piece.bad}
            bad |= unreadable
            index = first + piece.good
            labels = None if images.labels is None else np.asarray([images.labels[i] for i in piece.good], np.int64)
            logits = [np.empty((0, question.classes), np.float32)] * len(runners)
            if len(index):
                logits = [_infer(*pair, piece.rows, index) for pair in zip(question.names, runners, strict=True)]
            for part, answers in zip(parts, logits[1:], strict=True):
                rows = measure(logits[0], answers, labels, index)
                part.append(replace(rows, skipped=np.asarray(list(unreadable), np.int64)))
    return [join(part) for part in parts], bad


def check_labels(labels: Sequence[int] | np.ndarray | None, classes: int) -> None:
    """Raise `InputError` unless every label is the index of one of ``classes``."""
    if labels is not None and (min(labels) < 0 or max(labels) >= classes):
        raise InputError(
            "a label is out of range",
            evidence=f"labels {min(labels)} to {max(labels)}, {classes} classes",
            hint="give one folder per class, in the model's class order, or a list file of `path label` lines",
        )


def compare(baseline: Runner, engines: dict[str, Runner], batches: Iterable[Batch]) -> dict[str, Comparison]:
    """Run baseline and every engine on the same ``batches``; nothing is kept."""
    parts: dict[str, list[Outcomes]] = {name: [] for name in engines}
    for batch in batches:
        reference = _infer(BASELINE, baseline, batch.pixels, batch.index)
        check_labels(batch.labels, reference.shape[1])
        for name, runner in engines.items():
            logits = _infer(f"engine {name}", runner, batch.pixels, batch.index)
            parts[name].append(measure(reference, logits, batch.labels, batch.index))
    return {name: Comparison.of(join(rows)) for name, rows in parts.items()}


def _infer(who: str, runner: Runner, pixels: np.ndarray, index: np.ndarray) -> np.ndarray:
    logits = runner.infer(pixels)
    if not np.isfinite(logits).all():
        bad = index[~np.isfinite(logits).all(1)]
        hint = "a value overflows in this precision; build with another --precision"
        if who == BASELINE:
            hint = "check the weights and the preprocess: nothing can be compared with such answers"
        raise BuildError(
            f"{who} computes NaN or infinity",
            evidence=f"on {len(bad)} of {len(logits)} images, first image {bad[0]} of the set",
            hint=hint,
        )
    return logits
