from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rows import drawn, flips

from edgeres.errors import InputError, StaleError, UsageError
from edgeres.files import write_json
from edgeres.outcomes import Outcomes, beside
from edgeres.recipe import Budget, load_recipe
from edgeres.result import measured, result
from edgeres.statistics import apart, paired, unpaired
from edgeres.validate import Comparison, Shard
from edgeres.verdict import LARGE, Accepted, Loss, judge

ENGINE: dict[str, Any] = {
    "depth": 50,
    "variant": "v1.5",
    "target": "cpu",
    "precision": "int8",
    "sha256": "e" * 64,
    "preprocess": {"crop": 32},
    "built_with": {"edgeres": "0.1.0"},
    "fusion": {"notes": []},
}
SIDE = {"latency_ms": None, "size_bytes": 1000}


def word(rows: Outcomes, **budgets: Any) -> tuple[str | None, int | None]:
    """Verdict and images needed of ``rows`` under budgets."""
    judged = judge(Budget(**budgets), None, rows, "i" * 64)
    return judged["verdict"], judged["images_needed"]


def ends(rows: Outcomes) -> tuple[float, float]:
    return Comparison.of(rows).interval()


def test_pass_and_fail_are_decided_by_the_ends_of_the_interval() -> None:
    loss = Loss.of(Comparison.of(flips(10_000, 110, 60)))
    lo, hi = loss.interval
    assert 0 < lo < 0.5 < hi < 1
    assert loss.judge(hi) == loss.judge(hi + 1) == ("PASS", None)
    assert loss.judge(lo - 1e-9) == loss.judge(-1) == ("FAIL", None)
    for budget in (lo, (lo + hi) / 2, hi - 1e-9):
        assert loss.judge(budget)[0] == "NOT ENOUGH IMAGES"


@pytest.mark.parametrize("budget", [0.2, 0.3, 0.75, 1.0])
@pytest.mark.parametrize(("images", "lost", "won"), [(1000, 25, 20), (2000, 60, 50), (500, 12, 10)])
def test_the_images_needed_would_decide(images: int, lost: int, won: int, budget: float) -> None:
    found, needed = word(flips(images, lost, won), max_drop=budget)
    assert found == "NOT ENOUGH IMAGES"
    assert needed is not None
    assert needed > images
    assert len(str(needed).rstrip("0")) <= 2

    def with_times(factor: float) -> str | None:
        return word(flips(round(images * factor), round(lost * factor), round(won * factor)), max_drop=budget)[0]

    factor = needed / images
    assert with_times(1.05 * factor) == ("PASS" if 100 * (lost - won) / images < budget else "FAIL")
    assert with_times(0.85 * factor) == "NOT ENOUGH IMAGES"


@pytest.mark.parametrize("images", [1, 2, 3])
def test_a_few_images_that_all_went_one_way_decide_nothing(images: int) -> None:
    assert word(flips(images, 0, images), max_drop=0.0) == ("NOT ENOUGH IMAGES", 4)
    assert word(flips(images, images, 0), max_drop=0.0) == ("NOT ENOUGH IMAGES", 4)


def test_no_number_of_images_is_named_where_none_would_decide() -> None:
    assert word(flips(100, 3, 3), max_drop=0.0) == ("NOT ENOUGH IMAGES", None)
    assert word(flips(100, 3, 3), max_drop=1e-7) == ("NOT ENOUGH IMAGES", None)


# a budget of 0


def test_an_identical_engine_meets_any_budget() -> None:
    rows = drawn(24, 4, noise=0)
    assert ends(rows)[1] > 5
    for budgets in ({"max_drop": 0.0}, {"max_drop": 0.1}, {"min_relative": 100.0}):
        assert word(rows, **budgets) == ("PASS", None)
    (reason,) = judge(Budget(max_drop=0.0), None, rows, "")["reasons"]
    assert reason == "every logit is the baseline's to the last bit: within max_drop 0"


def test_one_logit_that_differs_is_not_identical() -> None:
    rows = flips(24, 0, 0, noise=0)
    assert word(rows, max_drop=0.0) == ("PASS", None)
    other = np.zeros(24)
    other[7] = 1e-30
    assert word(replace(rows, noise=other), max_drop=0.0) == ("NOT ENOUGH IMAGES", LARGE)


def test_an_engine_that_loses_none_of_many_images_meets_any_budget() -> None:
    assert word(flips(LARGE, 0, 0), max_drop=0.0) == ("PASS", None)
    assert word(flips(LARGE, 0, 3), max_drop=0.0) == ("PASS", None)
    assert word(flips(LARGE - 1, 0, 0), max_drop=0.0) == ("NOT ENOUGH IMAGES", LARGE)
    assert word(flips(LARGE, 1, 1), max_drop=0.0) == ("NOT ENOUGH IMAGES", None)
    (reason,) = judge(Budget(max_drop=0.0), None, flips(LARGE, 0, 0), "")["reasons"]
    assert reason == "not one right answer of 10,000 images is lost: within max_drop 0"


def test_a_loss_of_less_than_3_in_10000_is_what_no_loss_in_so_many_images_shows() -> None:
    assert (1 - 3e-4) ** LARGE < 0.05 < (1 - 2.9e-4) ** LARGE


def test_a_clear_gain_meets_a_budget_of_0_and_a_clear_loss_misses_it() -> None:
    assert word(flips(2000, 5, 40), max_drop=0.0)[0] == "PASS"
    assert word(flips(2000, 40, 5), max_drop=0.0)[0] == "FAIL"


@pytest.mark.parametrize("images", [300, LARGE - 1, LARGE, 20_000])
@pytest.mark.parametrize(("lost", "won"), [(0, 0), (0, 2), (1, 0), (3, 1), (10, 20)])
def test_a_larger_budget_is_never_judged_worse(images: int, lost: int, won: int) -> None:
    rank = ["FAIL", "NOT ENOUGH IMAGES", "PASS"]
    loss = Loss.of(Comparison.of(flips(images, lost, won)))
    ranks = [rank.index(loss.judge(budget)[0]) for budget in np.linspace(0, 3, 600)]
    assert ranks == sorted(ranks)
    assert ranks[-1] == 2


# a share of FP32's accuracy


def test_a_relative_budget_is_a_share_of_the_accuracy_of_fp32() -> None:
    # MLPerf: 99% of 76.46 is 75.695, a drop of 0.7646
    rows = flips(50_000, 500, 300, right=38_230 - 500)
    c = Comparison.of(rows)
    assert 100 * c.baseline[0] / c.images == 76.46
    assert ends(rows)[1] < 76.46 - 75.6954
    assert word(rows, min_relative=99.0)[0] == "PASS"
    exact = 100 * (1 - ends(rows)[1] / 76.46)
    assert word(rows, min_relative=exact - 1e-9)[0] == "PASS"
    assert word(rows, min_relative=exact + 1e-9)[0] == "NOT ENOUGH IMAGES"
    best = 100 * (1 - ends(rows)[0] / 76.46)
    assert word(rows, min_relative=best + 1e-9)[0] == "FAIL"
    assert word(rows, min_relative=best - 1e-9)[0] == "NOT ENOUGH IMAGES"
    (reason,) = judge(Budget(min_relative=99.0), None, rows, "")["reasons"]
    assert reason == f"drop +0.40, at worst {ends(rows)[1]:+.2f} points: within min_relative 99, 0.76 points of 76.46"


def test_the_worst_of_several_budgets_counts() -> None:
    rows = flips(10_000, 110, 60, right=8000)  # 0.25 to 0.76 points of 81.1
    both = judge(Budget(max_drop=1.0, min_relative=99.5), None, rows, "")
    assert (both["verdict"], len(both["reasons"])) == ("NOT ENOUGH IMAGES", 2)
    assert both["reasons"][0].startswith("drop +0.50, at worst +0.76 points: within max_drop 1")
    assert "not decided for min_relative 99.5, 0.41 points of 81.10; about" in both["reasons"][1]
    assert both["images_needed"] > 10_000
    worse = judge(Budget(max_drop=0.1, min_relative=99.5), None, rows, "")
    assert (worse["verdict"], worse["images_needed"]) == ("FAIL", None)
    assert worse["reasons"][0].startswith("drop +0.50, at best +0.25 points: more than max_drop 0.1")
    assert judge(Budget(max_drop=1.0, min_relative=98.0), None, rows, "")["verdict"] == "PASS"
    assert worse["budget"] == {"max_drop": 0.1, "min_relative": 99.5, "accepted": None}


def test_images_needed_are_those_of_the_budget_that_needs_most() -> None:
    rows = flips(1000, 25, 20, right=800)
    one, other = word(rows, max_drop=1.0)[1], word(rows, max_drop=0.75)[1]
    assert one is not None
    assert other is not None
    assert one < other
    assert word(rows, max_drop=1.0, min_relative=100 - 100 * 0.75 / 82.5) == ("NOT ENOUGH IMAGES", other)
    none = word(flips(1000, 20, 20, right=800), max_drop=0.0, min_relative=99.0)
    assert none == ("NOT ENOUGH IMAGES", None)


def test_without_a_budget_there_is_no_verdict() -> None:
    judged = judge(Budget(), None, flips(100, 3, 3), "")
    assert (judged["verdict"], judged["images_needed"], judged["reasons"]) == (None, None, [])


def test_a_part_of_a_set_is_not_judged() -> None:
    judged = judge(Budget(max_drop=0.5), None, flips(100, 50, 0), "", whole=False)
    assert (judged["verdict"], judged["reasons"], judged["budget"]["max_drop"]) == (None, [], 0.5)


def test_images_without_labels_meet_no_budget() -> None:
    judged = judge(Budget(max_drop=100.0, min_relative=0.0), None, drawn(50, 4, labelled=False), "")
    assert (judged["verdict"], judged["images_needed"]) == ("NO LABELS", None)
    assert judged["reasons"] == [
        f"the images have no labels, so that accuracy cannot be judged: not decided for {k}"
        for k in ("max_drop", "min_relative")
    ]


@pytest.mark.parametrize(
    "wrong",
    [{"max_drop": -0.1}, {"min_relative": 100.1}, {"min_relative": -1.0}, {"max_loss": -1.0}, {"max_drop": math.nan}],
)
def test_a_budget_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"budget.{next(iter(wrong))} is"):
        Budget(**wrong)


def test_a_recipe_names_an_accepted_result_from_its_workspace(tmp_path: Path) -> None:
    text = '[budget]\naccepted = "kept/result.json"\nmax_loss = 0.1\nmin_relative = 99\n'
    (tmp_path / "edgeres.toml").write_text(text, encoding="utf-8")
    assert load_recipe(tmp_path).budget == Budget(None, 99.0, str(tmp_path / "kept" / "result.json"), 0.1)


# an accepted result


def accept(
    folder: Path, rows: Outcomes, images: str = "i" * 64, with_rows: bool = True, shard: Shard | None = None
) -> Path:
    """A result of ``rows`` as it lies in a folder, with its outcomes unless not ``with_rows``."""
    path = folder / "result.json"
    digests = {"model": "m" * 64, "images": images, "outcomes": rows.save(beside(path))}
    judged = judge(Budget(), None, rows, images)
    shown = measured(rows, str, lambda _: None)
    write_json(path, result("tiny", ENGINE, shown, judged, [SIDE, SIDE], [], digests, len(rows), shard))
    if not with_rows:
        beside(path).unlink()
    return path


def against(path: Path, rows: Outcomes, max_loss: float = 0.0) -> dict[str, Any]:
    accepted = Accepted.load(path, "accepted.json", ENGINE)
    return judge(Budget(accepted=str(path), max_loss=max_loss), accepted, rows, "i" * 64)


def shifted(rows: Outcomes, lost: int, won: int) -> Outcomes:
    """``rows`` where the engine loses ``lost`` more of its right answers and wins ``won`` of its wrong ones."""
    top = rows.engine_top.copy()
    right = top[:, 0] == rows.label
    for i in (*np.flatnonzero(right)[:lost], *np.flatnonzero(~right)[:won]):
        top[i] = top[i][::-1]
    return replace(rows, engine_top=top)


def test_an_accepted_result_on_the_same_images_is_compared_image_by_image(tmp_path: Path) -> None:
    before = flips(5000, 200, 100, right=4000)
    path = accept(tmp_path, before)
    judged = against(path, shifted(before, 10, 8), max_loss=0.3)
    assert judged["verdict"] == "PASS"
    hi = Loss.paired(10, 8, 5000).interval[1]
    assert judged["reasons"] == [
        f"drop +0.04, at worst {hi:+.2f} points: within max_loss 0.3 from the 82.00 of accepted.json (image by image)"
    ]
    assert judged["budget"]["accepted"] == {"path": "accepted.json", "top1": 82.0, "max_loss": 0.3}
    assert against(path, shifted(before, 10, 8))["verdict"] == "NOT ENOUGH IMAGES"
    assert against(path, shifted(before, 60, 8))["verdict"] == "FAIL"
    assert against(path, shifted(before, 8, 60))["verdict"] == "PASS"


def test_the_accepted_engine_itself_is_not_worse(tmp_path: Path) -> None:
    rows = drawn(100, 4)
    judged = against(accept(tmp_path, rows), rows)
    assert judged["verdict"] == "PASS"
    assert judged["reasons"][0].startswith("every answer is that of the accepted engine to the last bit: within")
    beside(tmp_path / "result.json").unlink()  # as `engines/` keeps it: the digest tells as much
    assert against(tmp_path / "result.json", rows)["reasons"] == judged["reasons"]
    other = replace(rows, engine_probability=rows.engine_probability + 1e-15)
    assert against(tmp_path / "result.json", other)["verdict"] == "NOT ENOUGH IMAGES"


@pytest.mark.parametrize("reason", ["no outcomes", "images that were skipped"])
def test_otherwise_it_is_compared_by_intervals(tmp_path: Path, reason: str) -> None:
    rows = flips(5000, 200, 100, right=4000)
    path = accept(tmp_path, rows, with_rows=reason != "no outcomes")
    now = replace(rows, margin=rows.margin + 1)  # not the same run
    if reason == "images that were skipped":
        now = flips(4999, 200, 100, right=3999)
        now = replace(now, index=now.index + 1)
    judged = against(path, now, max_loss=2.0)
    assert judged["verdict"] == "PASS"  # 1.5 points, as two samples of 5,000
    assert "at worst +1.5" in judged["reasons"][0]
    assert "of accepted.json (not image by image)" in judged["reasons"][0]
    assert against(path, now, max_loss=1.0)["verdict"] == "NOT ENOUGH IMAGES"
    assert against(path, flips(5000, 600, 100, right=3800), max_loss=1.0)["verdict"] == "FAIL"


def test_on_other_images_what_each_lost_against_fp32_is_compared(tmp_path: Path) -> None:
    before = flips(20_000, 200, 200, right=16_000)  # top-1 of 81, and nothing lost
    path = accept(tmp_path, before, "x" * 64)
    easier = against(path, flips(5000, 150, 0, right=4850), max_loss=1.0)  # top-1 of 97, but 3 points lost
    assert easier["verdict"] == "FAIL"
    best, _ = apart(3.0, paired(150, 0, 5000), 0.0, paired(200, 200, 20_000))
    how = "of other images, by what each lost against FP32"
    assert easier["reasons"] == [
        f"drop +3.00, at best {best:+.2f} points: more than max_loss 1 from the 81.00 of accepted.json ({how})"
    ]
    assert against(path, flips(5000, 30, 30, right=2500), max_loss=1.0)["verdict"] == "PASS"  # harder, and nothing lost
    few = against(path, flips(500, 5, 2, right=400), max_loss=1.0)
    assert few["verdict"] == "NOT ENOUGH IMAGES"
    needed = few["images_needed"]
    lost, won = (needed * k / 500 for k in (5, 2))
    assert 500 < needed < 20_000
    assert apart(0.6, paired(lost, won, needed), 0.0, paired(200, 200, 20_000))[1] <= 1.0
    assert apart(0.6, paired(0.9 * lost, 0.9 * won, 0.9 * needed), 0.0, paired(200, 200, 20_000))[1] > 1.0


def test_of_the_same_images_without_outcomes_more_of_this_run_would_decide(tmp_path: Path) -> None:
    path = accept(tmp_path, flips(1000, 20, 0, right=800), with_rows=False)
    judged = against(path, flips(900, 30, 0, right=720), max_loss=3.0)
    best, worst = unpaired((800, 1000), (720, 900))
    assert f"between {best:+.2f} and {worst:+.2f} points: not decided" in judged["reasons"][0]
    needed, share = judged["images_needed"], 0.8
    assert needed > 900
    assert unpaired((800, 1000), (share * needed, needed))[1] <= 3.0
    assert unpaired((800, 1000), (share * 0.9 * needed, 0.9 * needed))[1] > 3.0


def test_outcomes_that_are_not_those_of_the_result_are_refused(tmp_path: Path) -> None:
    path = accept(tmp_path, flips(100, 3, 3))
    flips(100, 2, 3).save(beside(path))
    with pytest.raises(StaleError, match="is not what its result was computed from"):
        Accepted.load(path, "", ENGINE)


def test_of_several_results_that_of_this_engine_is_taken(tmp_path: Path) -> None:
    path = accept(tmp_path, flips(100, 3, 3), with_rows=False)
    (one,) = [Accepted.load(path, "", {**ENGINE, "precision": "fp16"}).record]  # the only one there is
    write_json(path, [{**one, "precision": "fp16"}, one, {**one, "target": "rtx"}])
    assert Accepted.load(path, "", ENGINE).record == one
    with pytest.raises(InputError, match="holds 3 results, 0 of them for this engine") as caught:
        Accepted.load(path, "", {**ENGINE, "precision": "fp32"})
    assert caught.value.evidence == "precision fp32, target cpu"
    write_json(path, [one, one])
    with pytest.raises(InputError, match="2 of them for this engine"):
        Accepted.load(path, "", ENGINE)


def test_a_result_without_accuracy_cannot_be_accepted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no accuracy to compare with") as caught:
        Accepted.load(accept(tmp_path, drawn(50, 4, labelled=False)), "", ENGINE)
    assert "no labels" in caught.value.evidence
    with pytest.raises(InputError, match="has no accuracy to compare with") as caught:
        Accepted.load(accept(tmp_path, drawn(50, 4), shard=Shard(1, 2)), "", ENGINE)
    assert "of a shard" in caught.value.evidence
