"""Other depths, heads, sizes and gray images, through the whole flow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgeres import pipeline
from edgeres.build import Engine
from edgeres.job import Job
from edgeres.model import resnet
from edgeres.recipe import load_recipe


def gray_images(root: Path, classes: int, per_class: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    for label in range(classes):
        (root / f"{label:03}").mkdir(parents=True)
        for i in range(per_class):
            small = Image.fromarray(rng.integers(0, 256, (6, 6), np.uint8))
            small.resize((50, 60), Image.Resampling.BICUBIC).save(root / f"{label:03}" / f"{i}.png")
    return str(root)


@pytest.mark.parametrize(
    ("depth", "variant", "classes", "size"),
    [
        (18, "v1.5", 7, 48),
        (34, "v1.5", 1, 64),
        (50, "v1", 7, 48),
        pytest.param(101, "v1.5", 3, 64, marks=pytest.mark.slow),
        pytest.param(152, "v1", 2, 48, marks=pytest.mark.slow),
    ],
)
def test_from_checkpoint_to_verdict(tmp_path: Path, depth: int, variant: str, classes: int, size: int) -> None:
    torch.manual_seed(depth)
    torch.save(resnet(depth, variant, classes).state_dict(), tmp_path / "mine.pth")
    flags = {
        "model": {"depth": depth, "variant": variant, "weights": str(tmp_path / "mine.pth")},
        "preprocess": {"crop": size},
        "calibration": {"images": gray_images(tmp_path / "train", classes, 8, seed=1), "method": "minmax"},
        "validation": {"images": gray_images(tmp_path / "val", classes, 4, seed=2)},
    }
    (result,) = pipeline.run(Job(load_recipe(tmp_path, flags=flags), tmp_path), ("int8",))
    assert result["model"].startswith(f"resnet{depth}")
    assert result["images"] == 4 * classes
    assert result["engine"]["top5"] >= result["engine"]["top1"]
    assert result["sqnr_db"] > 15
    stem = f"resnet{depth}" if depth in (18, 34) else f"resnet{depth}-{variant}"
    operators = Engine.load(tmp_path / "engines" / "out" / f"{stem}-int8-cpu").record["fusion"]["operators"]
    assert "Conv" not in operators
    convolutions = {18: 20, 34: 36, 50: 53, 101: 104, 152: 155}[depth]  # with the projections of the shortcuts
    assert operators["QLinearConv"] == convolutions
