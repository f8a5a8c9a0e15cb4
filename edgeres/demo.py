"""The whole flow offline: a real ResNet-50 trained on the handwritten digits that come with scikit-learn.

Only the checkpoint is special. It and the images are files; everything after them is what a user runs.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from edgeres import pipeline
from edgeres.errors import need
from edgeres.files import atomic, cache_folder, digest
from edgeres.job import Job
from edgeres.layouts import open_images
from edgeres.loader import Loader
from edgeres.progress import bar, say
from edgeres.recipe import WORKSPACE_FILE, load_recipe

SIZE = 40
"""Input height and width; the digits are 8x8. Below 33 the last stage is 1x1, where batch norm learns poorly."""
BATCH, STEPS = 64, 88
"""Four times through the 1,437 training images."""
PEAK_RATE, WEIGHT_DECAY, SMOOTHING, SHIFT, WARM_UP = 3e-3, 0.05, 0.1, 2, 0.25

WORKSPACE = """\
# Written by `edgeres demo`: ResNet-50 {variant} on scikit-learn's handwritten digits.
name = "resnet50-{variant}-digits"

[model]
variant = "{variant}"
weights = "{weights}"

[preprocess]
crop = {size}
resize = {size}
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]

[calibration]
images = "digits/train"

[validation]
images = "digits/test"

[budget]
max_drop = 2.0  # points; 360 images cannot tell finer
"""


def run(variant: str = "v1.5", seed: int = 0) -> list[dict[str, Any]]:
    """Train (once), then export, quantize, build and validate -> the results of FP16 and INT8."""
    root = cache_folder() / "demo" / variant
    write_digits(root / "digits")
    settings = [SIZE, BATCH, STEPS, PEAK_RATE, WEIGHT_DECAY, SMOOTHING, SHIFT, WARM_UP, seed]
    weights = root / f"resnet50-{variant}-digits-{digest(settings)[:8]}.pth"
    with atomic(root / WORKSPACE_FILE) as temporary:
        temporary.write_text(WORKSPACE.format(variant=variant, weights=weights.name, size=SIZE), encoding="utf-8")
    job = Job(load_recipe(root), root)
    if not weights.is_file():
        say(f"train ResNet-50 {variant} on handwritten digits (once; kept in {root})")
        train(job, variant, seed, weights)
    results = pipeline.run(job, ("fp16", "int8"))
    say(f"files: {root}")
    return results


def write_digits(folder: Path) -> None:
    """Write the 1,797 digits as 8x8 images, class = folder: every fifth to ``test``, the others to ``train``."""
    digits = need("sklearn.datasets", "demo").load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / ("train" if i % 5 else "test") / str(label) / f"{i:04}.pgm"
        if not path.is_file():
            # the plainest image format there is: the same bytes whichever library reads or writes
            with atomic(path) as temporary:
                temporary.write_bytes(b"P5 8 8 255\n" + np.round(pixels * 255 / 16).astype(np.uint8).tobytes())


def train(job: Job, variant: str, seed: int, path: Path) -> None:
    """Train on the calibration split and save the state dict. About a minute on two cores."""
    # read when PyTorch loads: waiting threads sleep. As fast on idle cores, twice as fast beside another process
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    torch, nn = need("torch", "torch"), need("torch.nn", "torch")
    from edgeres.model import resnet50

    recipe = job.recipe
    batches = list(Loader(open_images(str(recipe.calibration.images)), recipe.preprocess, 256))
    x = torch.from_numpy(np.concatenate([b.pixels for b in batches]))
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.from_numpy(np.concatenate([b.labels for b in batches if b.labels is not None]))
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = resnet50(variant, 10)
    model.to(memory_format=torch.channels_last).train()
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.zeros_(parameter)  # each bottleneck starts as its shortcut
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, PEAK_RATE, betas=(0.9, 0.99), fused=True)
    epoch = len(x) // BATCH
    with bar("train", STEPS, "steps") as step:
        for done in range(STEPS):
            if done % epoch == 0:
                order = torch.randperm(len(x), generator=rng)
            index = order[done % epoch * BATCH :][:BATCH]
            for group in optimizer.param_groups:
                group["lr"] = PEAK_RATE * _schedule((done + 1) / STEPS)
            optimizer.zero_grad()
            logits = model(_shifted(x[index], rng))
            loss = nn.functional.cross_entropy(logits, y[index], label_smoothing=SMOOTHING)
            loss.backward()
            optimizer.step()
            step(f"loss {loss.item():.2f}")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics of the final weights, averaged over the whole set
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for part in torch.randperm(len(x), generator=rng).chunk(6):
            model(x[part])
    with atomic(path) as temporary:
        torch.save(model.state_dict(), temporary)


def _schedule(at: float) -> float:
    """Share of the peak learning rate at ``at`` of the training: linear warm-up, then half a cosine."""
    if at < WARM_UP:
        return 0.1 + 0.9 * at / WARM_UP
    return max(0.5 * (1 + math.cos(math.pi * (at - WARM_UP) / (1 - WARM_UP))), 1e-3)


def _shifted(x: Any, rng: Any) -> Any:
    """Each image of ``x`` (N, C, H, W) moved by up to `SHIFT` pixels each way, black (-1) let in."""
    torch = need("torch", "torch")
    n, _, h, w = x.shape
    padded = torch.nn.functional.pad(x, (SHIFT,) * 4, value=-1.0)
    rows = torch.randint(2 * SHIFT + 1, (n, 1), generator=rng) + torch.arange(h)
    columns = torch.randint(2 * SHIFT + 1, (n, 1), generator=rng) + torch.arange(w)
    moved = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (N, H, W, C)
    return moved.permute(0, 3, 1, 2)
