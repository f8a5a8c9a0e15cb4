"""The whole flow in seconds. If this fails, look here first."""

from pathlib import Path

import pytest

from edgeres import pipeline
from edgeres.job import Job
from edgeres.recipe import load_recipe


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_model_to_verdict(workspace: Path, tiny_path: Path, precision: str) -> None:
    recipe = load_recipe(workspace, flags={"engine": {"precision": precision}, "budget": {"max_drop": 100.0}})
    (result,) = pipeline.run(Job(recipe, workspace, tiny_path), (precision,))
    assert result["verdict"] == "PASS"
    assert result["agreement"]["top1"] > 80
    assert result["sqnr_db"] > 20
    assert (workspace / "engines/out" / f"tiny-{precision}-cpu" / "result.json").is_file()
