"""v1 or v1.5? Both have the same tensor names and shapes, so a checkpoint loads into either without a word.

Its batch norm layers remember mean and variance of what they saw in training. Run a few images through both variants:
the right one reproduces those statistics, the wrong one does not. No labels are needed. Images and input size should
be those of the training; at another size both fit worse, and the difference shrinks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edgeres.recipe import STRIDE_ON
from edgeres.weights import Checkpoint, load_model

CLEAR = 2.5
"""How many times better one variant must fit to call the other one wrong.

On images of half the training size v1.5 fits a v1 checkpoint up to twice better.
"""
FITS = 0.15
"""Nats, at most, of the one that fits: above, neither does, and which is nearer says nothing."""


@dataclass(frozen=True)
class Identity:
    """``divergence`` in nats by variant: how far what enters the batch norms is from what they remember."""

    images: int
    divergence: dict[str, float]

    @property
    def variant(self) -> str | None:
        """The variant that fits, and clearly better than the other; or None."""
        best, other = sorted(self.divergence, key=self.divergence.__getitem__)[:2]
        clear = self.divergence[other] > CLEAR * self.divergence[best]
        return best if clear and self.divergence[best] <= FITS else None

    def __str__(self) -> str:
        best, other = sorted(self.divergence, key=self.divergence.__getitem__)[:2]
        fits = ", ".join(f"{v} {d:.4f}" for v, d in sorted(self.divergence.items()))
        ratio = self.divergence[other] / max(self.divergence[best], 1e-12)
        far = self.divergence[best] > FITS
        sure = "" if self.variant else ", too little to tell"
        measured = f"divergence from the batch norm statistics {fits} nats, {self.images} images"
        advice = "; are input size and preprocess those of the training?" if far else ""
        return f"{best} fits {ratio:.1f} times better than {other}{sure} ({measured}){advice}"


def identify(checkpoint: Checkpoint, pixels: np.ndarray, depth: int = 50) -> Identity:
    """Fit of both variants to ``checkpoint``, on preprocessed ``pixels`` (N, 3, H, W)."""
    images = torch.from_numpy(pixels)
    return Identity(len(images), {v: _divergence(load_model(checkpoint, v, depth=depth), images) for v in STRIDE_ON})


def _divergence(model: nn.Module, images: Tensor) -> float:
    """Mean over batch norms and channels of the Kullback-Leibler divergence between two normal distributions.

    (r - 1 - ln r + d^2 / v) / 2 with r the ratio of variances seen to remembered, d the difference of means and v the
    remembered variance. Channels that never varied in training say nothing and are left out.
    """
    found: list[float] = []

    def hook(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        x = inputs[0].double()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance = norm.running_mean.double(), norm.running_var.double()
        alive = variance > 1e-8
        several = x.numel() > x.shape[1]  # one value has no variance
        ratio = x.var((0, 2, 3), correction=int(several)).clamp_min(1e-12) / variance
        shift = (x.mean((0, 2, 3)) - mean).square() / variance
        found.append(((ratio - 1 - ratio.log() + shift) / 2)[alive].mean().item() if alive.any() else 0.0)

    hooks = [m.register_forward_pre_hook(hook) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    try:
        with torch.inference_mode():
            model(images)
    finally:
        for handle in hooks:
            handle.remove()
    return float(np.mean(found))
