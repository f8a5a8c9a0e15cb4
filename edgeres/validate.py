"""Engines against the FP32 baseline on the same batches: accuracy, agreement, fidelity, verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from edgeres.errors import BuildError, InputError
from edgeres.fidelity import decibels, squares
from edgeres.loader import Batch
from edgeres.runners import Runner

Z95 = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""


@dataclass
class Comparison:
    """Sums over images, of an engine against the baseline. ``baseline`` and ``engine`` count (top-1, top-5) hits."""

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

    def add(self, reference: np.ndarray, logits: np.ndarray, labels: np.ndarray) -> None:
        """Add a batch: two sets of logits (N, classes) and ``labels`` (N,)."""
        reference, logits = reference.astype(np.float64), logits.astype(np.float64)
        top_b, top_e = top5(reference), top5(logits)
        hit_b, hit_e = top_b[:, 0] == labels, top_e[:, 0] == labels
        in_b, in_e = (top_b == labels[:, None]).any(1), (top_e == labels[:, None]).any(1)
        self.images += len(labels)
        self.baseline = (self.baseline[0] + int(hit_b.sum()), self.baseline[1] + int(in_b.sum()))
        self.engine = (self.engine[0] + int(hit_e.sum()), self.engine[1] + int(in_e.sum()))
        self.right_to_wrong += int((hit_b & ~hit_e).sum())
        self.wrong_to_right += int((~hit_b & hit_e).sum())
        self.same_top1 += int((top_b[:, 0] == top_e[:, 0]).sum())
        self.shared_top5 += float((top_b[:, :, None] == top_e[:, None, :]).any(2).mean(1).sum())
        signal, noise = squares(reference, logits)
        self.signal, self.noise = self.signal + signal, self.noise + noise
        log_p, log_q = _log_softmax(reference), _log_softmax(logits)
        self.divergence += float((np.exp(log_p) * (log_p - log_q)).sum())

    def drop(self) -> tuple[float, float]:
        """Loss of top-1 and top-5 against the baseline, in percentage points; negative is a gain."""
        b, e = self.baseline, self.engine
        return 100 * (b[0] - e[0]) / self.images, 100 * (b[1] - e[1]) / self.images

    def interval(self) -> tuple[float, float]:
        """95% interval of the top-1 drop in points, paired by image.

        Agresti and Min 2005, "Simple improved confidence intervals for comparing matched proportions" (Statistics in
        Medicine 24): Wald's interval after adding 1/2 to each of the four cells.
        """
        n = self.images + 2
        lost, won = self.right_to_wrong + 0.5, self.wrong_to_right + 0.5
        center = (lost - won) / n
        half = Z95 * math.sqrt(lost + won - (lost - won) ** 2 / n) / n
        return 100 * (center - half), 100 * (center + half)

    def p_value(self) -> float:
        """Exact two-sided McNemar test that right-to-wrong and wrong-to-right are equally likely."""
        changed, fewer = self.right_to_wrong + self.wrong_to_right, min(self.right_to_wrong, self.wrong_to_right)
        tail = term = 1  # binomial coefficients in whole numbers: exact for any count
        for k in range(fewer):
            term = term * (changed - k) // (k + 1)
            tail += term
        return min(1.0, 2 * tail / 2**changed)

    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio of the logits in dB; inf if they are identical."""
        return decibels(self.signal, self.noise)


@dataclass(frozen=True)
class Verdict:
    """``word`` is PASS, FAIL or NOT ENOUGH IMAGES; ``images_needed`` estimates how many would decide the last.

    It is None too where the drop seen is so close to the budget that no number can be named.
    """

    word: str
    images_needed: int | None = None


def judge(comparison: Comparison, max_drop: float) -> Verdict:
    """PASS if even the worst end of the drop's interval is within ``max_drop`` points, FAIL if even the best is not."""
    best, worst = comparison.interval()
    if worst <= max_drop:
        return Verdict("PASS")
    if best > max_drop:
        return Verdict("FAIL")
    # the interval narrows with the square root of the number of images, around the drop seen so far
    room = abs(max_drop - (best + worst) / 2)
    needed = comparison.images * ((worst - best) / 2 / room) ** 2 if room else math.inf
    if needed > 1e9:
        return Verdict("NOT ENOUGH IMAGES")  # the drop seen is the budget itself: no number can be named
    magnitude = 10 ** max(0, math.floor(math.log10(needed)) - 1)
    return Verdict("NOT ENOUGH IMAGES", math.ceil(needed / magnitude) * magnitude)


def compare(baseline: Runner, engines: dict[str, Runner], batches: Iterable[Batch]) -> dict[str, Comparison]:
    """Run baseline and every engine on the same ``batches``, which must carry labels."""
    results = {name: Comparison() for name in engines}
    for batch in batches:
        reference = _infer("the FP32 baseline", baseline, batch)
        if batch.labels is None or batch.labels.min() < 0 or batch.labels.max() >= reference.shape[1]:
            raise InputError(
                "the validation images have no labels" if batch.labels is None else "a label is out of range",
                evidence=""
                if batch.labels is None
                else f"labels {batch.labels.min()} to {batch.labels.max()}, {reference.shape[1]} classes",
                hint="give one folder per class, in the model's class order, or a list file of `path label` lines",
            )
        for name, runner in engines.items():
            results[name].add(reference, _infer(f"engine {name}", runner, batch), batch.labels)
    return results


def _infer(who: str, runner: Runner, batch: Batch) -> np.ndarray:
    logits = runner.infer(batch.pixels)
    if not np.isfinite(logits).all():
        bad = batch.index[~np.isfinite(logits).all(1)]
        raise BuildError(
            f"{who} computes NaN or infinity",
            evidence=f"on {len(bad)} of {len(logits)} images, first image {bad[0]} of the set",
            hint="a value overflows in this precision; build with another --precision",
        )
    return logits


def top5(logits: np.ndarray) -> np.ndarray:
    """Indices (N, min(5, classes)) of the largest logits, best first; of equal ones the lower index first."""
    return np.argsort(-logits, axis=1, kind="stable")[:, :5]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))
