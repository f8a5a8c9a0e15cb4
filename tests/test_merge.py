from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from edgeres import pipeline, progress
from edgeres.errors import InputError, StaleError, UsageError
from edgeres.files import write_json
from edgeres.job import Job
from edgeres.layouts import open_images
from edgeres.merge import _skipped, merge
from edgeres.outcomes import Outcomes, beside
from edgeres.pack import write_pack
from edgeres.recipe import Preprocess, load_recipe
from edgeres.result import load
from edgeres.runners import Runner
from edgeres.validate import Shard

IMAGES = 150
"""Five batches, the last of 22."""


def write_noise(folder: Path) -> Path:
    """Images whose answers are anything, of which three cannot be read."""
    for i in range(IMAGES):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
        path = folder / f"class{i % 4}" / f"{i:03}.pgm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"P5 8 8 255\n" + pixels.tobytes()[: 3 if i in (7, 40, 149) else None])
    return folder


def shaken(who: str, runner: Runner, pixels: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Logits of images that all look alike, moved apart: each network answers in its own way."""
    logits = runner.infer(pixels)
    apart = np.sin(1e5 * logits)
    return logits + 2 * apart if who == "the FP32 baseline" else logits + 2 * apart + 0.3 * np.sin(1e6 * logits)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Iterator[Job]:
    """An engine that is built, and images to judge it on."""
    root = tmp_path_factory.mktemp("merge")
    write_noise(root / "val")
    (root / "edgeres.toml").write_text(
        '[validation]\nimages = "val"\n[budget]\nmax_drop = 0.5\nmin_relative = 99.0\n', encoding="utf-8"
    )
    made = Job(load_recipe(root), root, model=tiny_path, skip_bad=True).with_engine(precision="fp16")
    pipeline.ensure_engine(made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgeres.validate._infer", shaken)
        yield made


def validate(job: Job, shard: Shard | None = None) -> Path:
    """Validate the whole set or a shard -> where the result lies."""
    engine = pipeline.ensure_engine(job)
    pipeline.validate_engines(job, [engine], shard)
    return job.folder / (f"result-{shard.index}of{shard.of}.json" if shard else "result.json")


@pytest.fixture(scope="module")
def shards(job: Job, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Both halves of the set, where no other test writes."""
    return copies([validate(job, Shard(i, 2)) for i in (1, 2)], tmp_path_factory.mktemp("shards"))


def copies(shards: list[Path], folder: Path) -> list[Path]:
    """Results with their outcomes somewhere else."""
    for path in (*shards, *map(beside, shards)):
        (folder / path.name).write_bytes(path.read_bytes())
    return [folder / shard.name for shard in shards]


def digits(record: dict[str, Any]) -> dict[str, Any]:
    """A result without what was measured of time and load."""
    record = json.loads(json.dumps(record))
    for side in ("baseline", "engine"):
        record[side]["latency_ms"] = None
    record["provenance"]["machine"].pop("load_1min")
    return {**record, "latency": None}


@pytest.mark.parametrize("of", [2, 5])
def test_merged_shards_are_one_run_to_the_last_digit(
    job: Job, tmp_path: Path, of: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeres.result.MOST_FLIPPED", 5)  # of every shard and of the whole
    (whole,) = load(validate(job))
    paths = [validate(job, Shard(i, of)) for i in range(1, of + 1)]
    merge(paths[::-1], tmp_path / "merged" / "result.json", job.root)
    (merged,) = load(tmp_path / "merged" / "result.json")
    assert (merged["baseline"]["latency_ms"], merged["engine"]["latency_ms"], merged["shard"]) == (None, None, None)
    assert digits(merged) == digits(whole)
    assert (merged["images"], merged["images_of"], len(merged["skipped"])) == (147, 150, 3)
    assert 0 < merged["flipped_total"] < 147
    assert len(merged["reasons"]) == 2
    assert (tmp_path / "merged" / "outcomes.npz").read_bytes() == beside(job.folder / "result.json").read_bytes()


def test_a_shard_is_neither_timed_nor_judged(shards: list[Path]) -> None:
    (one,), (two,) = map(load, shards)
    assert (one["shard"], two["shard"]) == ({"index": 1, "of": 2}, {"index": 2, "of": 2})
    assert (one["images"] + two["images"], one["images_of"]) == (147, 150)
    for record in (one, two):
        assert (record["verdict"], record["reasons"], record["budget"]["max_drop"]) == (None, [], 0.5)
        assert record["baseline"]["latency_ms"] is record["engine"]["latency_ms"] is None


def test_several_shards_share_the_answers_of_the_baseline(job: Job, shards: list[Path]) -> None:
    records = [load(path)[0]["provenance"]["digests"] for path in shards]
    stores = (job.root / "engines" / "out" / "answers").glob("*/about.json")
    (store,) = (p.parent for p in stores if json.loads(p.read_text())["manifest"] == records[0]["images"])
    rows = [Outcomes.load(beside(p), digests["outcomes"]) for p, digests in zip(shards, records, strict=True)]
    holes = {place // 32 for shard in rows for place in shard.skipped.tolist()}
    assert (store / "done").read_bytes() == bytes([2 if batch in holes else 1 for batch in range(5)])


def test_labels_are_not_needed(job: Job, tmp_path: Path) -> None:
    paths = "".join(f"class{i % 4}/{i:03}.pgm\n" for i in range(IMAGES))
    (job.root / "val" / "list.txt").write_text(paths, encoding="utf-8")
    recipe = replace(job.recipe, validation=replace(job.recipe.validation, images=str(job.root / "val" / "list.txt")))
    unlabelled = replace(job, recipe=recipe)
    (whole,) = load(validate(unlabelled))
    merged = merge([validate(unlabelled, Shard(i, 3)) for i in (1, 2, 3)], tmp_path / "result.json", job.root)
    assert digits(load(tmp_path / "result.json")[0]) == digits(whole)
    assert (merged["labels"], merged["verdict"]) == (False, "NO LABELS")
    assert 0 < merged["flipped_total"] < 147


def test_what_a_pack_leaves_out_is_told_once(job: Job, tmp_path: Path, preprocess: Preprocess) -> None:
    pack = job.root / "val.pack"
    write_pack(open_images(job.root / "val"), preprocess, pack, skip_bad=True)
    packed = replace(job, recipe=replace(job.recipe, validation=replace(job.recipe.validation, images=str(pack))))
    (whole,) = load(validate(packed))
    merge([validate(packed, Shard(i, 2)) for i in (1, 2)], tmp_path / "result.json", job.root)
    (merged,) = load(tmp_path / "result.json")
    assert digits(merged) == digits(whole)
    assert (merged["images"], merged["images_of"], len(merged["skipped"])) == (147, 147, 3)


def test_unreadable_images_follow_what_the_set_leaves_out(job: Job, shards: list[Path]) -> None:
    (one,), (two,) = map(load, shards)
    rows = [Outcomes.load(beside(p), load(p)[0]["provenance"]["digests"]["outcomes"]) for p in shards]
    first, second = ([f"{i}.png" for i in part.skipped] for part in rows)
    records = [{**one, "skipped": ["z.png", *first]}, {**two, "skipped": ["z.png", *second]}]
    assert _skipped(records, rows) == ["z.png", *(f"{i}.png" for i in sorted([*rows[0].skipped, *rows[1].skipped]))]
    assert len(first) + len(second) == 3


def test_a_shard_that_is_done_leaves_the_answers_of_another(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(who: str, *arguments: Any) -> np.ndarray:
        if who != "the FP32 baseline" and calls:
            raise KeyboardInterrupt
        calls.append(who)
        return shaken(who, *arguments)

    calls = list[str]()
    with monkeypatch.context() as patch:
        patch.setattr("edgeres.validate._infer", stopped)
        with pytest.raises(KeyboardInterrupt):
            validate(job, Shard(2, 2))
    validate(job, Shard(1, 2))
    console = Console(file=io.StringIO(), width=300)
    with progress.to(console):
        validate(job, Shard(2, 2))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "answers of engine tiny-fp16-cpu are there for 1 of 2 batches" in said


def test_an_accepted_result_is_looked_for_from_the_workspace(job: Job, tmp_path: Path) -> None:
    accepted = job.root / "accepted.json"
    path = validate(job)
    accepted.write_bytes(path.read_bytes())
    beside(accepted).write_bytes(beside(path).read_bytes())
    budget = replace(job.recipe.budget, accepted=str(accepted))
    judged = replace(job, recipe=replace(job.recipe, budget=budget))
    (whole,) = load(validate(judged))
    assert whole["budget"]["accepted"]["path"] == "accepted.json"
    assert "every answer is that of the accepted engine to the last bit" in whole["reasons"][2]
    parts = [validate(judged, Shard(i, 2)) for i in (1, 2)]
    with pytest.raises(UsageError, match=r"accepted\.json is what this run writes"):
        merge(parts, accepted, job.root)
    merge(parts, tmp_path / "result.json", job.root)
    assert digits(load(tmp_path / "result.json")[0]) == digits(whole)


def test_a_shard_that_is_missing_or_there_twice_is_named(job: Job, shards: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    with pytest.raises(InputError, match="1 of 2 shards are missing") as caught:
        merge(shards[:1], output, job.root)
    assert caught.value.evidence == "2/2"
    assert "--shard 2/2" in caught.value.hint
    with pytest.raises(InputError, match="shard 2/2 is there twice") as caught:
        merge([*shards, shards[1]], output, job.root)
    assert caught.value.evidence == f"{shards[1]}\n{shards[1]}"
    with pytest.raises(InputError, match="not of the same shards") as caught:
        merge([shards[0], validate(job, Shard(2, 3))], output, job.root)
    assert "one of 2" in caught.value.evidence
    assert not output.exists()


def spoil(path: Path, **changes: Any) -> None:
    """Set fields of the result at ``path``, given as section__key=value."""
    (record,) = load(path)
    for key, value in changes.items():
        *above, last = key.split("__")
        inner = record
        for name in above:
            inner = inner[name]
        inner[last] = value
    write_json(path, record)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"provenance__digests__model": "x" * 64}, "digest of model: "),
        ({"provenance__digests__images": "x" * 64}, "digest of images: "),
        ({"provenance__digests__engine": "x" * 64}, "digest of engine: "),
        ({"provenance__digests__weights": None}, "digest of weights: "),
        ({"provenance__preprocess__crop": 30}, "preprocess: "),
        ({"provenance__built_with__onnxruntime": "1.0"}, "built_with: "),
        ({"budget__max_drop": 0.6}, "budget: "),
        ({"precision": "int8"}, "precision: fp16 and int8"),
        ({"images_of": 149}, "images_of: 150 and 149"),
        ({"labels": False}, "labels: True and False"),
    ],
)
def test_shards_of_something_else_are_refused(
    job: Job, shards: list[Path], tmp_path: Path, change: dict[str, Any], word: str
) -> None:
    one, two = copies(shards, tmp_path)
    spoil(two, **change)
    with pytest.raises(StaleError, match="are not shards of one validation") as caught:
        merge([one, two], tmp_path / "result.json", job.root)
    assert caught.value.evidence.startswith(word)


def test_outcomes_must_be_there_and_be_those_of_the_result(job: Job, shards: list[Path], tmp_path: Path) -> None:
    one, two = copies(shards, tmp_path)
    beside(two).write_bytes(beside(one).read_bytes())
    with pytest.raises(StaleError, match=r"outcomes-2of2.npz is not what its result was computed from"):
        merge([one, two], tmp_path / "result.json", job.root)
    beside(two).unlink()
    with pytest.raises(InputError, match=r"cannot read .*outcomes-2of2.npz"):
        merge([one, two], tmp_path / "result.json", job.root)
    assert not (tmp_path / "result.json").exists()


def test_images_that_no_outcome_or_two_are_of_are_named(job: Job, shards: list[Path], tmp_path: Path) -> None:
    one, two = copies(shards, tmp_path)
    (record,) = load(two)
    rows = Outcomes.load(beside(two), record["provenance"]["digests"]["outcomes"])
    index = rows.index.copy()
    index[3] = 2
    spoil(two, provenance__digests__outcomes=replace(rows, index=index).save(beside(two)))
    with pytest.raises(InputError, match="do not cover the 150 images") as caught:
        merge([one, two], tmp_path / "result.json", job.root)
    assert caught.value.evidence == "image 2 is there 2 times, 2 images are not there once"


def test_a_whole_result_is_no_shard(job: Job, shards: list[Path], tmp_path: Path) -> None:
    path = validate(job)
    with pytest.raises(InputError, match=r"result.json is not the result of a shard") as caught:
        merge([shards[0], path], tmp_path / "merged.json", job.root)
    assert caught.value.evidence == "it holds the result of a whole set"
    write_json(tmp_path / "two.json", [json.loads(s.read_text()) for s in shards])
    with pytest.raises(InputError, match=r"two.json is not the result of a shard"):
        merge([tmp_path / "two.json"], tmp_path / "merged.json", job.root)
    spoil(copies(shards, tmp_path)[1], provenance__digests=dict.fromkeys(("model", "images", "engine"), "x"))
    with pytest.raises(InputError, match="is damaged") as caught:
        merge([tmp_path / shards[1].name], tmp_path / "merged.json", job.root)
    assert caught.value.evidence == "provenance.digests.outcomes is missing"
