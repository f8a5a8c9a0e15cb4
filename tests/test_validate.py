from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rows import draw, drawn, flips
from scipy import special, stats

from edgeres import graph, pipeline, progress
from edgeres.answers import MISSING, About, Answers
from edgeres.build import Engine
from edgeres.data import ImageSet
from edgeres.errors import BuildError, InputError, UsageError
from edgeres.job import Job
from edgeres.loader import Batch
from edgeres.outcomes import Outcomes, join
from edgeres.recipe import Preprocess, load_recipe
from edgeres.runners import Runner
from edgeres.validate import (
    Comparison,
    Network,
    Question,
    Shard,
    answer,
    check_labels,
    compare,
    examine,
    grid,
    outcomes,
)


@pytest.mark.parametrize("classes", [2, 4, 5, 10, 1000])
def test_every_total_is_what_scipy_and_loops_compute(classes: int) -> None:
    reference, logits, labels = draw(150, classes, seed=classes)
    c = Comparison.of(drawn(150, classes, seed=classes))
    first, fifth, changed, changed5, same, shared, other = [0, 0], [0, 0], [0, 0], [0, 0], 0, 0.0, 0
    for a, b, label in zip(reference.astype(float), logits.astype(float), labels, strict=True):
        tops = [sorted(range(classes), key=lambda k, x=x: (-x[k], k))[:5] for x in (a, b)]
        hits, among = [top[0] == label for top in tops], [label in top for top in tops]
        for side in (0, 1):
            first[side] += hits[side]
            fifth[side] += among[side]
            changed[side] += hits[side] and not hits[1 - side]
            changed5[side] += among[side] and not among[1 - side]
        same += tops[0][0] == tops[1][0]
        other += tops[0][0] != tops[1][0] and not any(hits)
        shared += len(set(tops[0]) & set(tops[1])) / len(tops[0])
    assert c.images == 150
    assert (c.baseline, c.engine) == ((first[0], fifth[0]), (first[1], fifth[1]))
    assert [c.right_to_wrong, c.wrong_to_right, c.wrong_to_wrong] == [*changed, other]
    assert [c.lost5, c.won5] == changed5
    assert (c.same_top1, c.identical, c.labels) == (same, 0, True)
    assert c.shared_top5 == pytest.approx(shared, rel=1e-12)
    p, q = special.softmax(reference.astype(float), 1), special.softmax(logits.astype(float), 1)
    assert c.divergence == pytest.approx(special.rel_entr(p, q).sum(), rel=1e-9)
    assert c.p_value() == pytest.approx(stats.binomtest(changed[0], sum(changed)).pvalue, rel=1e-9)
    error = reference.astype(float) - logits
    assert c.sqnr_db() == pytest.approx(10 * math.log10(np.sum(reference.astype(float) ** 2) / np.sum(error**2)))
    assert c.drop() == pytest.approx(((first[0] - first[1]) / 1.5, (fifth[0] - fifth[1]) / 1.5))


def test_totals_do_not_depend_on_the_order_of_the_images() -> None:
    rows = drawn(1000, 10)
    scale = 10.0 ** np.random.default_rng(0).integers(-12, 12, 1000)  # sums of such floats do
    rows = replace(rows, signal=rows.signal * scale, noise=rows.noise * scale, divergence=rows.divergence * scale)
    order = np.random.default_rng(1).permutation(1000)
    mixed = Outcomes(**{f.name: getattr(rows, f.name)[order[: len(getattr(rows, f.name))]] for f in fields(Outcomes)})
    assert Comparison.of(mixed) == Comparison.of(rows)
    assert sum(rows.signal[order]) != sum(rows.signal)


def test_two_classes_have_every_label_in_their_top_5() -> None:
    c = Comparison.of(drawn(50, 2, noise=3))
    assert c.baseline[1] == c.engine[1] == 50
    assert c.shared_top5 == 50
    assert c.drop()[1] == 0
    assert 0 < c.same_top1 < 50


def test_an_identical_engine_loses_nothing() -> None:
    c = Comparison.of(drawn(80, 10, noise=0))
    assert c.sqnr_db() == math.inf
    assert c.drop() == (0, 0)
    assert (c.divergence, c.same_top1, c.shared_top5, c.identical, c.p_value()) == (0, 80, 80, 80, 1)
    lo, hi = c.interval()
    assert lo == -hi < 0


def test_without_labels_there_is_fidelity_and_nothing_else() -> None:
    c, labelled = Comparison.of(drawn(80, 10, labelled=False)), Comparison.of(drawn(80, 10))
    for name in ("images", "same_top1", "shared_top5", "signal", "noise", "divergence", "identical"):
        assert getattr(c, name) == getattr(labelled, name)
    assert (c.baseline, c.engine, c.lost5, c.won5, c.labels) == ((0, 0), (0, 0), 0, 0, False)
    assert c.right_to_wrong == c.wrong_to_right == c.wrong_to_wrong == 0


def test_lost_and_won_are_told_apart() -> None:
    c = Comparison.of(flips(1000, 30, 12))
    assert (c.right_to_wrong, c.wrong_to_right, c.same_top1) == (30, 12, 958)
    assert c.drop()[0] == pytest.approx(1.8)


# shards and the grid

ABOUT = About("n" * 64, "onnxruntime", "1", "p" * 64, "m" * 64, {}, images=70, classes=12, batch=8)


def test_shards_share_the_batches_of_one_grid() -> None:
    assert list(grid(70, 8)) == list(range(9))
    assert list(grid(70, 8, Shard(2, 4))) == [1, 5]
    parts = [grid(70, 8, Shard(i, 4)) for i in range(1, 5)]
    assert sorted(batch for part in parts for batch in part) == list(range(9))


def test_more_shards_than_batches_are_refused() -> None:
    assert list(grid(70, 8, Shard(9, 9))) == [8]
    with pytest.raises(UsageError, match="70 images are too few for 10 shards") as caught:
        grid(70, 8, Shard(1, 10))
    assert "9 batches of 8" in caught.value.hint


def test_a_shard_is_written_as_it_is_given() -> None:
    assert Shard.parse("3/4") == Shard(3, 4)
    assert str(Shard.parse("1/1")) == "1/1"


@pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "1/0", "-1/4", "a/4", "1/4/2", "1.0/4"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no shard"):
        Shard.parse(text)


# running


class Function(Runner):
    """A runner that computes ``function`` of the first pixels of each image."""

    batch, input_size = None, 2

    def __init__(self, function: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> None:
        self.function = function
        self.seen: list[int] = []

    def _run(self, pixels: np.ndarray) -> np.ndarray:
        self.seen.append(len(pixels))
        return self.function(pixels.reshape(len(pixels), -1))

    def close(self) -> None:
        raise AssertionError("the runners belong to the caller")


def worse(x: np.ndarray) -> np.ndarray:
    """Not the same for an image among others: as of a network whose sums depend on its batch."""
    return x + 0.1 * x[:, ::-1] + np.float32(1e-3) * x.mean(0)


@dataclass(frozen=True)
class Made(ImageSet):
    """Images of random pixels, drawn by their name; those in ``bad`` cannot be read."""

    bad: frozenset[str] = frozenset()

    def require(self, preprocess: Preprocess) -> None:
        pass

    def read(self, i: int, preprocess: Preprocess) -> np.ndarray:
        if self.paths[i] in self.bad:
            raise OSError("broken")
        return np.random.default_rng(int(self.paths[i])).integers(0, 256, (2, 2, 3), np.uint8)


PREPROCESS = Preprocess(crop=2, resize=2)
LABELS = tuple(np.random.default_rng(5).integers(0, 12, 70).tolist())
IMAGES = Made(Path("made"), tuple(map(str, range(70))), LABELS)


class Run:
    """A validation of one engine, or of a part: its runners, what was said, its rows."""

    def __init__(
        self,
        root: Path,
        images: Made = IMAGES,
        shard: Shard | None = None,
        skip_bad: bool = False,
        engine: Callable[[np.ndarray], np.ndarray] = worse,
        name: str = "e",
    ) -> None:
        self.baseline, self.engine = Function(), Function(engine)
        console = Console(file=io.StringIO(), width=300)
        with ExitStack() as stack:
            stack.enter_context(progress.to(console))
            stores = [stack.enter_context(Answers(root, replace(ABOUT, network=n))) for n in ("FP32", name)]
            networks = [
                Network(who, runner, store)
                for who, runner, store in zip(
                    ("the FP32 baseline", f"engine {name}"), (self.baseline, self.engine), stores, strict=True
                )
            ]
            batches = grid(70, 8, shard)
            self.bad = answer(networks, images, PREPROCESS, batches, skip_bad)
            self.rows = outcomes(stores[0], stores[1], images, batches)
        self.said = console.file.getvalue()  # type: ignore[attr-defined]


def assert_same(one: Outcomes, other: Outcomes) -> None:
    for f in fields(Outcomes):
        np.testing.assert_array_equal(getattr(one, f.name), getattr(other, f.name), f.name)


def test_rows_are_those_of_the_logits_of_each_batch(tmp_path: Path) -> None:
    run = Run(tmp_path)
    pixels = np.stack([IMAGES.read(i, PREPROCESS) for i in range(70)]).astype(np.float32).transpose(0, 3, 1, 2)
    mean, std = (np.asarray(v, np.float32).reshape(3, 1, 1) for v in (PREPROCESS.mean, PREPROCESS.std))
    x = ((pixels / np.float32(255) - mean) / std).reshape(70, 12)
    whole = np.concatenate([worse(x[start : start + 8]) for start in range(0, 70, 8)])
    assert run.rows.index.tolist() == list(range(70))
    assert run.rows.label.tolist() == list(LABELS)
    assert run.rows.baseline_top[:, 0].tolist() == x.argmax(1).tolist()
    assert run.rows.engine_top[:, 0].tolist() == whole.argmax(1).tolist()
    np.testing.assert_allclose(run.rows.noise, ((x - whole).astype(float) ** 2).sum(1), rtol=1e-4)
    assert run.engine.seen == [8] * 8 + [6]


@pytest.mark.parametrize("of", [2, 5])
def test_shards_give_the_same_rows_to_the_last_bit(tmp_path: Path, of: int) -> None:
    whole = Run(tmp_path / "whole").rows
    parts = [Run(tmp_path / str(i), shard=Shard(i, of)).rows for i in range(1, of + 1)]
    assert_same(join(parts), whole)
    assert all(len(part) < 70 for part in parts)


def test_a_second_engine_pays_only_for_itself(tmp_path: Path) -> None:
    first = Run(tmp_path)
    again = Run(tmp_path, name="other")
    assert (first.baseline.seen, first.said.count("are there")) == ([8] * 8 + [6], 0)
    assert (again.baseline.seen, again.engine.seen) == ([], [8] * 8 + [6])
    assert "answers of the FP32 baseline are there for 9 of 9 batches" in again.said
    assert_same(again.rows, first.rows)


def test_what_was_cut_short_goes_on_at_the_next_batch(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def until_the_fourth(x: np.ndarray) -> np.ndarray:
        if len(calls) == 3:
            raise Stop
        calls.append(len(x))
        return worse(x)

    calls: list[int] = []
    with pytest.raises(Stop):
        Run(tmp_path, engine=until_the_fourth)
    run = Run(tmp_path)
    assert (run.baseline.seen, run.engine.seen) == ([8] * 4 + [6], [8] * 5 + [6])  # the fourth was kept of FP32
    assert "answers of engine e are there for 3 of 9 batches" in run.said
    assert_same(run.rows, Run(tmp_path / "whole").rows)
    assert Run(tmp_path).engine.seen == []


BAD = replace(IMAGES, bad=frozenset(("9", "20", *map(str, range(64, 70)))))


def test_unreadable_images_are_named_all_of_a_batch(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="6 unreadable images in made") as caught:
        Run(tmp_path, replace(BAD, bad=BAD.bad - {"9", "20"}))
    assert "64: broken" in caught.value.evidence
    assert "--skip-bad" in caught.value.hint


def test_skipped_images_leave_empty_rows_in_every_run(tmp_path: Path) -> None:
    run = Run(tmp_path, BAD, skip_bad=True)
    assert run.bad == dict.fromkeys([9, 20, *range(64, 70)], "broken")
    assert run.rows.skipped.tolist() == [9, 20, *range(64, 70)]
    assert run.rows.index.tolist() == [i for i in range(64) if i not in (9, 20)]
    assert run.rows.label.tolist() == [LABELS[i] for i in run.rows.index]
    assert run.engine.seen == [8, 7, 7, 8, 8, 8, 8, 8]
    again = Run(tmp_path, BAD, skip_bad=True)
    assert (again.bad, again.engine.seen) == ({}, [])
    assert_same(again.rows, run.rows)
    parts = [Run(tmp_path / str(i), BAD, Shard(i, 3), skip_bad=True) for i in (3, 1, 2)]
    assert_same(join([part.rows for part in parts]), run.rows)
    assert {place: reason for part in parts for place, reason in part.bad.items()} == run.bad


def test_what_was_skipped_is_an_error_for_a_run_that_may_not_skip(tmp_path: Path) -> None:
    Run(tmp_path, BAD, skip_bad=True)
    with pytest.raises(InputError, match="1 unreadable image in made") as caught:
        Run(tmp_path, BAD)
    assert caught.value.evidence == "9: broken"
    assert Run(tmp_path, IMAGES).rows.skipped.tolist() == []  # readable again: only those batches are run
    with Answers(tmp_path, replace(ABOUT, network="e")) as store:
        assert all(store.state(batch) != MISSING for batch in range(9))


def test_a_set_of_unreadable_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of the 70 images is readable"):
        Run(tmp_path, replace(IMAGES, bad=frozenset(IMAGES.paths)), skip_bad=True)


def test_an_engine_that_computes_nan_is_named_with_the_image(tmp_path: Path) -> None:
    wrong = Run(tmp_path / "other").rows.index[43]

    def poison(x: np.ndarray) -> np.ndarray:
        calls.append(len(x))
        y = worse(x)
        y[3] = np.nan if len(calls) == 6 else y[3]
        return y

    calls: list[int] = []
    with pytest.raises(BuildError, match="engine e computes NaN or infinity") as caught:
        Run(tmp_path, engine=poison)
    assert caught.value.evidence == f"on 1 of 8 images, first image {wrong} of the set"
    assert Run(tmp_path).engine.seen == [8] * 3 + [6]  # nothing of it was kept


def test_images_without_labels_are_compared(tmp_path: Path) -> None:
    run = Run(tmp_path, replace(IMAGES, labels=None))
    assert not run.rows.labels
    assert_same(replace(run.rows, label=np.asarray(LABELS, np.int32)), Run(tmp_path / "labelled").rows)


@pytest.mark.parametrize(("labels", "seen"), [([0, 3, 4], "labels 0 to 4"), ([0, -1, 2], "labels -1 to 2")])
def test_a_label_out_of_range_is_refused(labels: list[int], seen: str) -> None:
    with pytest.raises(InputError, match="a label is out of range") as caught:
        check_labels(labels, 4)
    assert caught.value.evidence == f"{seen}, 4 classes"
    check_labels([0, 3], 4)
    check_labels(None, 4)


# parts of a set, in memory


def question(images: ImageSet = IMAGES, skip_bad: bool = False, engines: int = 1) -> Question:
    made = [Engine(Path(f"e{i}", "engine.onnx"), {}) for i in range(engines)]
    return Question(Path("fp32.onnx"), "n" * 64, 12, PREPROCESS, made, images, {}, skip_bad)


def pieces(
    images: Made, places: list[range], engine: Function, skip_bad: bool = False
) -> tuple[Outcomes, dict[int, str]]:
    """`examine` of the images at each of ``places`` -> all rows, all that is bad."""
    parts, bad = [], {}
    for some in places:
        (rows,), unreadable = examine(question(images.take(some), skip_bad), some.start, 8, [Function(), engine], 1)
        parts.append(rows)
        bad |= unreadable
    return join(parts), bad


PLACES = [range(32, 56), range(32), range(56, 64), range(64, 70)]


@pytest.mark.parametrize("labels", [LABELS, None])
def test_parts_of_whole_batches_give_the_rows_of_one_run(tmp_path: Path, labels: tuple[int, ...] | None) -> None:
    images = replace(IMAGES, labels=labels)
    rows, bad = pieces(images, PLACES, Function(worse))
    assert bad == {}
    assert_same(rows, Run(tmp_path, images).rows)


def test_unreadable_images_of_parts_are_told_by_their_places_in_the_set(tmp_path: Path) -> None:
    run = Run(tmp_path, BAD, skip_bad=True)
    rows, bad = pieces(BAD, PLACES, Function(worse), skip_bad=True)  # of the last part every image is bad
    assert bad == run.bad
    assert_same(rows, run.rows)
    with pytest.raises(InputError, match="6 unreadable images in made"):
        pieces(BAD, PLACES[-1:], Function(worse))


def test_every_engine_has_rows_of_its_own_and_nan_is_told_by_name_and_place(tmp_path: Path) -> None:
    runners = [Function(), Function(), Function(worse)]
    (same, other), _ = examine(question(engines=2), 0, 8, runners)
    assert same.noise.sum() == 0
    assert_same(other, Run(tmp_path).rows)
    runners[2] = Function(lambda x: x * np.float32(np.nan))
    with pytest.raises(BuildError, match="engine e1 computes NaN or infinity") as caught:
        examine(question(IMAGES.take(range(48, 70)), engines=2), 48, 8, runners)
    assert caught.value.evidence == "on 8 of 8 images, first image 48 of the set"


def test_images_that_were_calibrated_on_are_named_with_their_list() -> None:
    asked = replace(question(), calibrated={"a.txt": frozenset(("x",)), "b.txt": frozenset(("h3", "h5"))})
    asked.refuse_overlap([f"g{i}" for i in range(70)])
    with pytest.raises(InputError, match="2 validation images are calibration images too") as caught:
        asked.refuse_overlap([f"h{i}" for i in range(70)])
    assert caught.value.evidence == "the first is 3, listed in b.txt"


# in memory


def labelled(labels: list[int] | None, size: int = 3) -> list[Batch]:
    images = len(labels) if labels is not None else 4
    pixels = np.random.default_rng(1).standard_normal((images, 3, 2, 2), dtype=np.float32)
    return [
        Batch(
            pixels[i : i + size], np.asarray(labels[i : i + size]) if labels else None, np.arange(images)[i : i + size]
        )
        for i in range(0, images, size)
    ]


def test_engines_are_compared_on_the_same_images_in_memory() -> None:
    labels = [0, 1, 2, 3, 0, 1, 11]
    engines: dict[str, Runner] = {"same": Function(), "opposite": Function(lambda x: -x)}
    results = compare(Function(), engines, labelled(labels))
    x = np.concatenate([b.pixels for b in labelled(labels)]).reshape(7, 12)
    assert list(results) == ["same", "opposite"]
    for name, sign in (("same", 1), ("opposite", -1)):
        assert results[name].baseline[0] == int((x.argmax(1) == labels).sum())
        assert results[name].engine[0] == int(((sign * x).argmax(1) == labels).sum())
    assert (results["same"].identical, results["opposite"].identical) == (7, 0)


def test_a_wrong_label_or_value_stops_a_comparison_in_memory() -> None:
    with pytest.raises(InputError, match="a label is out of range"):
        compare(Function(), {"e": Function()}, labelled([0, 12]))
    with pytest.raises(BuildError, match="the FP32 baseline computes NaN or infinity") as caught:
        compare(Function(lambda x: x + np.float32(np.inf)), {}, labelled([0, 1]))
    assert caught.value.evidence.startswith("on 2 of 2 images, first image 0")
    assert "check the weights" in caught.value.hint  # FP32 has no other precision
    assert not compare(Function(), {"e": Function()}, labelled(None))["e"].labels


def test_kept_answers_belong_to_the_model_the_images_and_who_computed_them(workspace: Path, tiny_path: Path) -> None:
    job = Job(load_recipe(workspace, flags={"engine": {"precision": "fp16"}}), workspace, model=tiny_path)
    (result,) = pipeline.validate_engines(job, [pipeline.ensure_engine(job)])
    model, digests = graph.load(tiny_path), result["provenance"]["digests"]
    (about,) = (workspace / "engines" / "out" / "answers").glob("*/about.json")
    assert json.loads(about.read_text()) == {
        "format": "edgeres answers 1",
        "network": graph.digest(model),
        "executor": "onnxruntime",
        "version": result["provenance"]["versions"]["onnxruntime"],
        "preprocess": Preprocess.from_json(graph.metadata(model)["preprocess"]).digest(),
        "manifest": digests["images"],
        "read_by": {key: result["provenance"]["versions"][key] for key in ("edgeres", "pillow")},
        "images": 24,
        "classes": 4,
        "batch": 32,
        "shard": None,
    }
    assert digests["model"] == graph.digest(model)


# killed at any moment

SCRIPT = """
import os, shutil, signal, sys, time
from pathlib import Path
import onnx, onnxruntime, PIL.Image
from edgeres import answers, benchmark, pipeline, validate
from edgeres.answers import Answers
from edgeres.build import Engine
from edgeres.job import Job
from edgeres.outcomes import Outcomes
from edgeres.recipe import load_recipe

root, model, moments = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
folder = root / "engines" / "out" / "tiny-fp16-cpu"
benchmark.SAMPLES, benchmark.SECONDS, answers.SYNC_EVERY = 3, 0.01, 0.0
told = None

def slow(owner, name, letter):
    function = getattr(owner, name)
    def wrapped(*arguments):
        for mark in (letter, letter.upper()):
            os.write(told, mark.encode())
            time.sleep(0.001)
            if mark == letter:
                value = function(*arguments)
        return value
    setattr(owner, name, wrapped)

slow(validate, "_infer", "i")
slow(Answers, "write", "w")
slow(Answers, "flush", "f")
slow(Outcomes, "save", "s")
slow(pipeline, "write_json", "j")
slow(Answers, "remove", "r")

def run(until=None):
    "Validate in a process that is killed after so many steps -> the steps it took."
    global told
    ours, told = os.pipe()
    process = os.fork()
    if not process:
        try:
            recipe = load_recipe(root, flags={"engine": {"precision": "fp16"}})
            pipeline.validate_engines(Job(recipe, root, model), [Engine.load(folder)])
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(told)
    seen = b""
    while (until is None or len(seen) < until) and (more := os.read(ours, 1)):
        seen += more
    if until is not None:
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    os.close(ours)
    if until is None:
        assert status == 0, status
    else:
        assert os.WIFSIGNALED(status), seen
    return seen.decode()

def fresh():
    shutil.rmtree(root / "engines" / "out" / "answers", ignore_errors=True)
    (folder / "result.json").unlink(missing_ok=True)
    (folder / "outcomes.npz").unlink(missing_ok=True)

whole = run()
print("whole", whole, (folder / "result.json").read_text().replace(chr(10), ""))
for i in range(moments):
    fresh()
    before = run(1 + i * (len(whole) - 2) // (moments - 1))
    after = run()
    print(before, after, (folder / "result.json").read_text().replace(chr(10), ""))
"""


def test_a_run_that_is_killed_at_any_moment_gives_the_same_result(workspace: Path, tiny_path: Path) -> None:
    for i in range(96):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
        path = workspace / "many" / f"class{i % 4}" / f"{i}.pgm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"P5 8 8 255\n" + pixels.tobytes())
    toml = workspace / "edgeres.toml"
    toml.write_text('[validation]\nimages = "many"\n[engine]\nprecision = "fp16"\n', encoding="utf-8")
    pipeline.ensure_engine(Job(load_recipe(workspace), workspace, model=tiny_path))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(workspace), str(tiny_path), "20"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (_, whole, reference), *runs = (line.split(" ", 2) for line in done.stdout.splitlines())
    assert whole.count("i") == 6  # three batches, two networks
    assert len(runs) == 20
    moments = set()
    for before, after, found in runs:
        moments.add(before)
        left = 6 - before.count("W")
        # the batch under way may have been kept; an engine's answers go when its result is written
        assert after.count("i") in ((0, 3) if "r" in before else (left, left - 1))
        assert digits(found) == digits(reference)
    assert len(moments) == 20


def digits(text: str) -> dict[str, Any]:
    """A result without its times and the load of the machine."""
    record = json.loads(text)
    assert record["images"] == 96
    for side in ("baseline", "engine"):
        record[side].pop("latency_ms")
    record["provenance"]["machine"].pop("load_1min")
    return {**record, "latency": None}
