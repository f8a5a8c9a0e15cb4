"""The records in calibration/ and engines/ belong together, and the images they name are kept apart."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from conftest import SHARED, shared
from packaging.specifiers import SpecifierSet

import edgeres
from edgeres.calibrate import RangeTable
from edgeres.data import Manifest
from edgeres.files import sha256_file
from edgeres.layouts import open_images
from edgeres.recipe import load_recipe, tomllib
from edgeres.targets import load_target

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "engines").glob("*.toml"))
RESULTS = sorted((ROOT / "engines").glob("*.result.json"))
TABLES = sorted((ROOT / "calibration").glob("*.json"))


def test_there_are_records_to_guard() -> None:
    assert RECIPES
    assert RESULTS
    assert TABLES


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads_and_is_named_after_its_engine(path: Path) -> None:
    recipe = load_recipe(ROOT, path)
    load_target(recipe.engine.target, recipe.engine.precision)
    stem = recipe.name or f"resnet50-{recipe.model.variant}"
    assert path.stem == f"{stem}-{recipe.engine.precision}"
    assert recipe.budget.max_drop is not None
    assert recipe.calibration.images != recipe.validation.images


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_every_table_was_measured_on_the_manifest_beside_it(path: Path) -> None:
    table = RangeTable.load(path)
    manifest = Manifest.from_text(path.with_suffix(".txt").read_text(encoding="utf-8"))
    assert table.made_from["images"] == manifest.digest()
    assert table.images == len(manifest.paths) - len(table.skipped)
    assert len(set(manifest.paths)) == len(manifest.paths)
    assert not any(Path(p).is_absolute() or ".." in Path(p).parts for p in manifest.paths)


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_every_accepted_result_passed_and_names_the_records_here(path: Path) -> None:
    recipe = load_recipe(ROOT, path.with_name(path.name.replace(".result.json", ".toml")))
    (result,) = json.loads(path.read_text(encoding="utf-8"))
    assert result["verdict"] == "PASS"
    assert result["budget"]["max_drop"] == recipe.budget.max_drop
    assert (result["precision"], result["target"]) == (recipe.engine.precision, recipe.engine.target)
    assert result["provenance"]["preprocess"] == json.loads(json.dumps(recipe.preprocess.to_json()))
    table = ROOT / "calibration" / f"{result['name']}.json"
    assert result["provenance"]["quantization"]["table"] == sha256_file(table)
    assert result["provenance"]["digests"]["model"] == RangeTable.load(table).made_from["model"]


@shared
@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_calibration_images_are_what_the_manifest_says_and_none_is_a_validation_image(path: Path) -> None:
    manifest = Manifest.from_text(path.with_suffix(".txt").read_text(encoding="utf-8"))
    train = SHARED / "cifar10" / "train"
    assert [sha256_file(train / p) for p in manifest.paths] == list(manifest.hashes)
    assert not set(manifest.hashes) & set(open_images(SHARED / "cifar10" / "test").hashes())


def test_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert edgeres.__version__.count(".") == 2


def test_development_asks_for_a_python_that_takes_all_that_is_pinned() -> None:
    text = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "README.md", "constraints.txt")}
    said = {
        tuple(re.findall(r"version_info < \((\d+), (\d+)\)", text["Makefile"])),
        tuple(re.findall(r"`make` needs (\d+)\.(\d+)", text["README.md"])),
        tuple(re.findall(r"Needs Python (\d+)\.(\d+)", text["constraints.txt"])),
    }
    (((major, minor),),) = said
    pinned = set(text["constraints.txt"].split())
    needs = {
        f"{d.name}=={d.version}": d.metadata.get("Requires-Python", "")
        for d in distributions()
        if f"{d.name}=={d.version}" in pinned
    }
    assert {pin: said for pin, said in needs.items() if not SpecifierSet(said).contains(f"{major}.{minor}")} == {}


def test_an_older_python_is_told_before_anything_is_installed(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ $1 = -c ] && exec {sys.executable} -c "import sys; sys.version_info = (3, 10); $2"\n'
    )
    python.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    make = subprocess.run(
        ["make", f"PYTHON={python}", "check"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert make.returncode
    assert "needs Python 3.11 or newer" in make.stderr
    assert "is 3.10: make PYTHON=python3.11 check" in make.stderr
    assert not (tmp_path / ".venv").exists()


def test_no_tracked_file_is_large() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]
    assert files
    assert [f for f in files if f.stat().st_size > 1 << 20] == []
