"""Trained checkpoints on real images, where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import SHARED, shared

from edgeres import pipeline
from edgeres.build import Engine
from edgeres.job import Job
from edgeres.recipe import load_recipe

TOP1 = {"v1.5": 86.25, "v1": 85.84}
"""FP32 on all 10,000 test images, measured independently of edgeres."""


def job(root: Path, variant: str, limit: int | None) -> Job:
    cifar10 = SHARED / "cifar10"
    flags = {
        "model": {
            "variant": variant,
            "weights": str(SHARED / "checkpoints" / f"resnet50-{variant}-cifar10.safetensors"),
        },
        "preprocess": {"crop": 64, "resize": 64},
        "calibration": {"images": str(cifar10 / "train"), "limit": 512 if limit is None else 64},
        "validation": {"images": str(cifar10 / "test"), "limit": limit},
        "budget": {"max_drop": 0.5},
    }
    return Job(
        load_recipe(root, flags={k: {n: x for n, x in v.items() if x is not None} for k, v in flags.items()}), root
    )


@shared
def test_int8_of_a_trained_checkpoint_keeps_its_answers(tmp_path: Path) -> None:
    (result,) = pipeline.run(job(tmp_path, "v1.5", 300), ("int8",))
    assert result["baseline"]["top1"] == pytest.approx(TOP1["v1.5"], abs=6)
    assert result["agreement"]["top1"] > 98
    assert result["sqnr_db"] > 30
    fused = Engine.load(tmp_path / "engines/out/resnet50-v1.5-int8-cpu").record["fusion"]["operators"]
    assert (fused["QLinearConv"], fused["QLinearAdd"], fused.get("Conv", 0)) == (53, 16, 0)


@shared
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["v1.5", "v1"])
def test_all_test_images(tmp_path: Path, variant: str) -> None:
    (result,) = pipeline.run(job(tmp_path, variant, None), ("int8",))
    assert result["images"] == 10_000
    assert result["baseline"]["top1"] == pytest.approx(TOP1[variant], abs=0.05)
    assert result["drop"]["top1"] <= 0.3
    assert result["verdict"] == "PASS"
