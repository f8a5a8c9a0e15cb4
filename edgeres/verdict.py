"""Whether an engine may ship: what it lost, judged against every budget it was given."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeres import result
from edgeres.errors import InputError, UsageError
from edgeres.outcomes import Outcomes, beside
from edgeres.recipe import Budget
from edgeres.statistics import Interval, apart, paired, unpaired
from edgeres.validate import Comparison

PASS, OPEN, UNLABELLED, FAIL = result.VERDICTS
LARGE = 10_000
"""Images of which not one may be lost for any budget to be met, even of 0: with 95% confidence the engine then loses
fewer than 3 in 10,000 (Hanley and Lippman-Hand 1983, "If nothing goes wrong, is everything all right?", JAMA 249).
No interval of a sample reaches 0, however large it is.
"""
MOST = 10**9
"""Images that anybody might have: a number needed above it is not named."""


def enough(allowed: float) -> int:
    """The least number of images that show a drop within ``allowed`` points, if no right answer is lost on them."""
    return 1 + bisect.bisect_left(range(1, LARGE), True, key=lambda n: paired(0, 0, n)[1] <= allowed)


@dataclass(frozen=True)
class Verdict:
    """``word`` is one of `result.VERDICTS`; ``images_needed`` estimates how many would decide NOT ENOUGH IMAGES.

    It is None too where the drop seen is so close to the budget that no number can be named. ``reason``: a sentence.
    """

    word: str
    images_needed: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class Loss:
    """Points of top-1 lost over ``images``; where nothing is lost for sure, ``proof`` says why.

    ``among``: the 95% interval, of this many images or of another number with the same shares. ``lossless``: not one
    image was lost, which many more of the same kind would make a proof.
    """

    seen: float
    among: Callable[[int], Interval]
    images: int
    proof: str = ""
    lossless: bool = False

    @classmethod
    def paired(cls, lost: int, won: int, images: int, identical: str = "") -> Loss:
        """On the same images; ``identical`` says that it is not only answers that are the same."""
        proof = identical
        if not proof and not lost and images >= LARGE:
            proof = f"not one right answer of {images:,} images is lost"

        def among(n: int) -> Interval:
            return paired(lost * n / images, won * n / images, n)

        return cls(100 * (lost - won) / images, among, images, proof, not lost)

    @classmethod
    def of(cls, c: Comparison) -> Loss:
        """Of the engine against the baseline."""
        identical = "every logit is the baseline's to the last bit" if c.identical == c.images else ""
        return cls.paired(c.right_to_wrong, c.wrong_to_right, c.images, identical)

    @property
    def interval(self) -> Interval:
        """95% interval of the loss in points."""
        return self.among(self.images)

    def judge(self, allowed: float) -> tuple[str, int | None]:
        """PASS if even the worst end of the interval is within ``allowed`` points, FAIL if even the best is not."""

        def word(images: int) -> str:
            best, worst = self.among(images)
            if worst <= allowed or (self.lossless and images >= LARGE and allowed >= 0):
                return PASS
            return FAIL if best > allowed else OPEN

        if self.proof and allowed >= 0:
            return PASS, None
        if (found := word(self.images)) != OPEN:
            return found, None
        more = range(self.images, MOST)
        needed = self.images + bisect.bisect_left(more, True, key=lambda n: word(n) != OPEN)
        if needed == MOST:
            return OPEN, None  # the drop seen is the budget itself, or hardly another: no number can be named
        magnitude = 10 ** max(0, math.floor(math.log10(needed)) - 1)
        return OPEN, math.ceil(needed / magnitude) * magnitude


@dataclass(frozen=True)
class Accepted:
    """A result that was accepted before, at ``path`` as it is shown; with its outcomes if they lie beside it."""

    path: str
    record: dict[str, Any]
    outcomes: Outcomes | None

    @classmethod
    def load(cls, path: Path, shown: str, engine: dict[str, Any]) -> Accepted:
        """Read it; of several results the one for the precision and target of ``engine``."""
        records = result.load(path)
        fits = [r for r in records if all(r[key] == engine[key] for key in ("precision", "target"))]
        record = records[0] if len(records) == 1 else fits[0] if len(fits) == 1 else None
        if record is None:
            raise InputError(
                f"{path} holds {len(records)} results, {len(fits)} of them for this engine",
                evidence=f"precision {engine['precision']}, target {engine['target']}",
                hint="give the result.json of one engine",
            )
        if record["engine"]["top1"] is None or record["shard"]:
            raise InputError(
                f"{path} has no accuracy to compare with",
                evidence="it is of a shard" if record["shard"] else "its images have no labels",
                hint="accept a result of the whole labelled set",
            )
        digest = record["provenance"]["digests"].get("outcomes")
        rows = beside(path)
        return cls(shown, record, Outcomes.load(rows, digest) if digest and rows.is_file() else None)

    def loss(self, rows: Outcomes, images: str) -> tuple[Loss, str]:
        """What ``rows``, of the image set with digest ``images``, lost against it, and how that was compared."""
        identical = "every answer is that of the accepted engine to the last bit"
        if self.record["provenance"]["digests"].get("outcomes") == rows.digest():
            return Loss.paired(0, 0, len(rows), identical), "image by image"
        after = rows.hits(rows.engine_top)[0]
        theirs = self.outcomes
        same_set = self.record["provenance"]["digests"]["images"] == images
        if theirs is not None and same_set and np.array_equal(theirs.index, rows.index):
            before = theirs.hits(theirs.engine_top)[0]
            columns = ("engine_top", "engine_probability", "noise", "divergence")
            same = all(np.array_equal(getattr(theirs, c), getattr(rows, c)) for c in columns)
            lost, won = int((before & ~after).sum()), int((~before & after).sum())
            return Loss.paired(lost, won, len(rows), identical if same else ""), "image by image"
        if not same_set:  # they may be easier: what each engine lost against FP32 can be compared, accuracy cannot
            mine, drop = Loss.of(Comparison.of(rows)), self.record["drop"]
            ends = drop["interval"]
            loss = Loss(
                mine.seen - drop["top1"], lambda m: apart(mine.seen, mine.among(m), drop["top1"], ends), len(rows)
            )
            return loss, "of other images, by what each lost against FP32"
        n = self.record["images"]
        hits, share = round(self.record["engine"]["top1"] * n / 100), float(after.mean())
        loss = Loss(100 * (hits / n - share), lambda m: unpaired((hits, n), (share * m, m)), len(rows))
        return loss, "not image by image"


def refuse_overwriting(accepted: Path, results: list[Path], show: Callable[[Path], str] = str) -> None:
    """Raise `UsageError` if the accepted result is one of those that a run writes: the next would be judged by this."""
    for path in results:
        if accepted.resolve() == path.resolve():
            raise UsageError(
                f"{show(path)} is what this run writes, and cannot be what it is judged against",
                evidence="the next run would be judged against this one, and each could lose a little more",
                hint="copy it and outcomes.npz to engines/NAME.result.json and NAME.outcomes.npz, and accept that",
            )


def judge(budget: Budget, accepted: Accepted | None, rows: Outcomes, images: str, whole: bool = True) -> dict[str, Any]:
    """The part of a result that judges: budgets, verdict, images needed, and a word and a reason for each budget.

    ``images`` is the digest of the set that ``rows`` are of. Unless they are the ``whole`` of it, nothing is judged.
    """
    verdicts = _verdicts(budget, accepted, rows, images) if whole else []
    word = next((w for w in reversed(result.VERDICTS) if any(v.word == w for v in verdicts)), None)
    needed = [v.images_needed for v in verdicts if v.word == OPEN]
    known = [n for n in needed if n is not None]
    return {
        "budget": budget_record(budget, accepted),
        "verdict": word,
        "images_needed": max(known) if word == OPEN and len(known) == len(needed) else None,
        "reasons": [v.reason for v in verdicts],
        "verdicts": [v.word for v in verdicts],
    }


def budget_record(budget: Budget, accepted: Accepted | None) -> dict[str, Any]:
    """The budgets, as a result has them."""
    before = None
    if accepted:
        top1 = accepted.record["engine"]["top1"]
        before = {"path": accepted.path, "top1": top1, "max_loss": budget.max_loss}
    return {"max_drop": budget.max_drop, "min_relative": budget.min_relative, "accepted": before}


def _verdicts(budget: Budget, accepted: Accepted | None, rows: Outcomes, images: str) -> list[Verdict]:
    """A verdict for every budget that is given."""
    if not rows.labels:
        why = "the images have no labels, so that accuracy cannot be judged"
        return [Verdict(UNLABELLED, None, f"{why}: not decided for {key}") for key in budget.given]
    c = Comparison.of(rows)
    loss, found = Loss.of(c), []
    if budget.max_drop is not None:
        found.append(_verdict(loss, budget.max_drop, f"max_drop {budget.max_drop:g}"))
    if budget.min_relative is not None:
        # a share of FP32's accuracy as measured, as MLPerf's rules have it: 99% of 76.46 is 75.695
        top1 = 100 * c.baseline[0] / c.images
        allowed = top1 * (1 - budget.min_relative / 100)
        what = f"min_relative {budget.min_relative:g}, {allowed:.2f} points of {top1:.2f}"
        found.append(_verdict(loss, allowed, what))
    if accepted:
        against, how = accepted.loss(rows, images)
        top1 = accepted.record["engine"]["top1"]
        what = f"max_loss {budget.max_loss:g} from the {top1:.2f} of {accepted.path} ({how})"
        found.append(_verdict(against, budget.max_loss, what))
    return found


def _verdict(loss: Loss, allowed: float, what: str) -> Verdict:
    word, needed = loss.judge(allowed)
    best, worst = (f"{end:+.2f}" for end in loss.interval)
    drop = f"drop {loss.seen:+.2f}"
    if word == PASS:
        proven = loss.proof and loss.interval[1] > allowed
        reason = f"{loss.proof if proven else f'{drop}, at worst {worst} points'}: within {what}"
    elif word == FAIL:
        reason = f"{drop}, at best {best} points: more than {what}"
    else:
        about = (
            f"about {needed:,} images would decide" if needed else "no number of images can be named that would decide"
        )
        reason = f"{drop}, between {best} and {worst} points: not decided for {what}; {about}"
    return Verdict(word, needed, reason)
