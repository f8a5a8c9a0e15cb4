"""Outcomes made up: of random logits, or with numbers of hits that a test asks for."""

from __future__ import annotations

import numpy as np

from edgeres.outcomes import Outcomes, measure


def draw(images: int, classes: int, noise: float = 0.7, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of a fair baseline, logits of a worse engine, labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    reference = rng.standard_normal((images, classes)) + 2 * np.eye(classes)[labels]
    logits = reference + noise * rng.standard_normal((images, classes))
    return reference.astype(np.float32), logits.astype(np.float32), labels


def drawn(images: int, classes: int, noise: float = 0.7, seed: int = 0, labelled: bool = True) -> Outcomes:
    """The rows of `draw`."""
    reference, logits, labels = draw(images, classes, noise, seed)
    return measure(reference, logits, labels if labelled else None, np.arange(images))


def flips(images: int, lost: int, won: int, right: int | None = None, noise: float = 1.0) -> Outcomes:
    """Rows of two classes, label 0: ``lost`` went wrong, ``won`` came right, ``right`` stay so (half of the others)."""
    right = (images - lost - won) // 2 if right is None else right
    before = np.repeat([0, 1, 0, 1], [lost, won, right, images - lost - won - right])
    after = np.repeat([1, 0, 0, 1], [lost, won, right, images - lost - won - right])
    one, two = np.ones(images), np.full(images, 0.5)
    return Outcomes(
        index=np.arange(images),
        label=np.zeros(images, np.int32),
        baseline_top=np.stack([before, 1 - before], 1).astype(np.int32),
        engine_top=np.stack([after, 1 - after], 1).astype(np.int32),
        baseline_probability=two,
        engine_probability=two,
        margin=0 * one,
        signal=one,
        noise=noise * one,
        divergence=0 * one,
        skipped=np.zeros(0, np.int64),
    )
