from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import NEW, full
from rows import drawn, flips
from statsmodels.stats.multitest import multipletests

import edgeres.result
from edgeres.card import card
from edgeres.diff import diff
from edgeres.errors import InputError
from edgeres.files import to_json, write_json
from edgeres.junit import junit
from edgeres.markdown import markdown
from edgeres.outcomes import Outcomes
from edgeres.page import content, page
from edgeres.recipe import Budget
from edgeres.report import shown
from edgeres.result import FORMER, MOST_FLIPPED, load, measured, result
from edgeres.schema import ENGINE as ENGINE_FIELDS
from edgeres.schema import LATENCY, refuse, wrong
from edgeres.statistics import mcnemar, paired, wilson
from edgeres.validate import Comparison, Shard
from edgeres.verdict import judge

ENGINE: dict[str, Any] = {
    "depth": 50,
    "variant": "v1.5",
    "target": "cpu",
    "precision": "int8",
    "sha256": "e" * 64,
    "preprocess": {"crop": 32},
    "quantization": {"method": "mse", "table": "t" * 64},
    "built_with": {"edgeres": "0.1.0", "onnxruntime": "1.20.0"},
    "fusion": {"operators": {"QLinearConv": 53}, "notes": ["slow"]},
}


def side(p50: float, size: int) -> dict[str, Any]:
    latency = {"p50": p50, "p90": p50 * 1.1, "p99": p50 * 1.2, "batch": 1, "samples": 200}
    return {"latency_ms": latency, "size_bytes": size}


def path_of(place: int) -> str:
    return f"class/{place}.png"


def name_of(index: int) -> str | None:
    return f"c{index}" if index else None


def make(rows: Outcomes, max_drop: float | None = 1.0, shard: Shard | None = None) -> dict[str, Any]:
    judged = judge(Budget(max_drop=max_drop), None, rows, "i" * 64)
    digests = {"model": "m" * 64, "images": "i" * 64, "outcomes": "o" * 64}
    sides = [side(24.5, 102_200_000), side(10.25, 25_900_000)]
    shown = measured(rows, path_of, name_of)
    return result("tiny", ENGINE, shown, judged, sides, ["bad.png"], digests, len(rows) + 1, shard)


def test_labels_in_another_order_are_doubted_and_the_notes_of_the_engine_stay() -> None:
    rows = drawn(400, 10)
    assert make(rows)["notes"] == ["slow"]
    rotated = replace(rows, label=(rows.label + 1) % 10)
    doubt, slow = make(rotated)["notes"]
    assert doubt.startswith(f"FP32 itself is right on only {make(rotated)['baseline']['top1']:.2f} % of the images")
    assert slow == "slow"
    assert make(rotated, shard=Shard(1, 2))["notes"] == ["slow"]  # merged, they have it: as one run
    assert make(drawn(400, 10, labelled=False))["notes"] == ["slow"]
    assert make(drawn(8, 4))["notes"] == ["slow"]  # too few to say so


def test_the_json_is_the_contract_that_scripts_read() -> None:
    r = json.loads(to_json(make(drawn(2000, 10))))
    assert r.keys() >= {
        *("format", "name", "model", "target", "precision", "images", "skipped", "baseline", "engine", "drop", "flips"),
        *("agreement", "sqnr_db", "kl", "budget", "verdict", "images_needed", "notes", "provenance"),
        *NEW,
    }
    for name in ("baseline", "engine"):
        assert r[name].keys() == {
            *("name", "precision", "top1", "top5", "top1_interval", "top5_interval", "latency_ms", "size_bytes"),
        }
    assert r["drop"].keys() == {"top1", "top5", "interval", "top5_interval", "p_value"}
    assert r["flips"].keys() == {"right_to_wrong", "wrong_to_right", "wrong_to_wrong"}
    assert r["budget"] == {"max_drop": 1.0, "min_relative": None, "accepted": None}
    digests = {"model": "m" * 64, "images": "i" * 64, "outcomes": "o" * 64, "engine": "e" * 64}
    assert r["provenance"]["digests"] == digests
    assert r["provenance"]["versions"].keys() >= {"edgeres", "python", "numpy", "onnxruntime"}
    assert (r["provenance"]["preprocess"], r["provenance"]["built_with"]) == ({"crop": 32}, ENGINE["built_with"])


def test_the_json_is_in_percent_points_and_ms() -> None:
    rows = flips(2000, 14, 8, right=1686, noise=1 / 10**3.5)
    r = json.loads(to_json(make(rows)))
    assert (r["name"], r["model"], r["target"], r["precision"]) == ("tiny", "resnet50 v1.5", "cpu", "int8")
    assert (r["images"], r["images_of"], r["labels"], r["shard"]) == (2000, 2001, True, None)
    assert (r["baseline"]["top1"], r["baseline"]["top5"]) == (85.0, 100.0)
    assert r["engine"]["top1"] == pytest.approx(84.7)
    assert r["engine"]["top1_interval"] == pytest.approx(wilson(1694, 2000))
    assert r["baseline"]["top5_interval"] == pytest.approx(wilson(2000, 2000))
    assert (r["drop"]["top1"], r["drop"]["top5"]) == pytest.approx((0.3, 0.0))
    assert r["drop"]["interval"] == pytest.approx(paired(14, 8, 2000))
    assert r["drop"]["top5_interval"] == pytest.approx(paired(0, 0, 2000))
    assert r["drop"]["p_value"] == mcnemar(14, 8)
    assert (r["agreement"]["top1"], r["agreement"]["top5"]) == pytest.approx((98.9, 100.0))
    assert (r["sqnr_db"], r["kl"]) == pytest.approx((35.0, 0.0))
    assert (r["engine"]["latency_ms"]["p50"], r["engine"]["size_bytes"]) == (10.25, 25_900_000)
    assert [r[s][k] for s in ("baseline", "engine") for k in ("name", "precision")] == ["FP32", "fp32", "INT8", "int8"]
    assert r["flips"] == {"right_to_wrong": 14, "wrong_to_right": 8, "wrong_to_wrong": 0}
    assert (r["verdict"], r["images_needed"]) == ("PASS", None)
    assert (r["skipped"], r["notes"]) == (["bad.png"], ["slow"])


def test_top5_has_the_interval_of_its_own_flips() -> None:
    rows = drawn(2000, 10)
    c = Comparison.of(rows)
    assert c.lost5 > c.won5 > 0
    assert (c.lost5, c.won5) != (c.right_to_wrong, c.wrong_to_right)
    assert make(rows)["drop"]["top5_interval"] == list(paired(c.lost5, c.won5, 2000))


def test_an_exact_engine_has_no_ratio_in_json() -> None:
    exact = make(drawn(10, 4, noise=0))
    assert math.isinf(exact["sqnr_db"])
    assert json.loads(to_json(exact))["sqnr_db"] is None


def test_every_class_has_its_hits_and_what_is_not_chance_stands_out() -> None:
    rows = drawn(3000, 10, noise=0.4)
    label = rows.label.copy()
    label[label == 7] = 8  # a class without images
    found = make(replace(rows, label=label))["classes"]
    assert [row["index"] for row in found] == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert [row["name"] for row in found[:2]] == [None, "c1"]
    for row in found:
        mine = label == row["index"]
        before, after = (top[mine, 0] == row["index"] for top in (rows.baseline_top, rows.engine_top))
        assert (row["images"], row["baseline"], row["engine"]) == (mine.sum(), before.sum(), after.sum())
        assert (row["lost"], row["won"]) == ((before & ~after).sum(), (~before & after).sum())
        assert row["p_value"] == mcnemar(row["lost"], row["won"])
    adjusted = multipletests([row["p_value"] for row in found], method="holm")[1]
    assert [row["p_adjusted"] for row in found] == pytest.approx(adjusted)
    assert len({row["p_adjusted"] for row in found}) > 1


def test_changed_answers_are_listed_where_fp32_was_surest_first() -> None:
    rows = drawn(3000, 10)
    rows = replace(rows, index=rows.index + 50)
    r = make(rows)
    changed = rows.baseline_top[:, 0] != rows.engine_top[:, 0]
    assert r["flipped_total"] == changed.sum() > MOST_FLIPPED == len(r["flipped"])
    margins = [flip["margin"] for flip in r["flipped"]]
    assert margins == sorted(rows.margin[changed], reverse=True)[:MOST_FLIPPED]
    kinds = set()
    for flip in r["flipped"]:
        i = flip["index"] - 50
        before, after, label = rows.baseline_top[i, 0], rows.engine_top[i, 0], rows.label[i]
        assert (flip["path"], flip["label"]) == (path_of(i + 50), label)
        assert flip["baseline"] == {"answer": before, "probability": rows.baseline_probability[i]}
        assert flip["engine"] == {"answer": after, "probability": rows.engine_probability[i]}
        kind = f"{'right' if before == label else 'wrong'}_to_{'right' if after == label else 'wrong'}"
        assert flip["kind"] == kind
        kinds.add(kind)
    assert kinds == {"right_to_wrong", "wrong_to_right", "wrong_to_wrong"}


def test_of_equal_margins_the_first_image_comes_first() -> None:
    r = make(flips(1000, 3, 2))
    assert [flip["index"] for flip in r["flipped"]] == [0, 1, 2, 3, 4]


def test_without_labels_what_needs_them_is_null() -> None:
    r = make(drawn(500, 10, labelled=False), max_drop=None)
    assert (r["labels"], r["drop"], r["flips"], r["classes"], r["verdict"]) == (False, None, None, None, None)
    for name in ("baseline", "engine"):
        assert [r[name][key] for key in ("top1", "top5", "top1_interval", "top5_interval")] == [None] * 4
    assert r["flipped_total"] == Comparison.of(drawn(500, 10)).images - Comparison.of(drawn(500, 10)).same_top1
    assert {(flip["label"], flip["kind"]) for flip in r["flipped"]} == {(None, "changed")}
    assert r["sqnr_db"] == make(drawn(500, 10))["sqnr_db"]


def test_no_number_in_the_record_is_of_numpy() -> None:
    def walk(value: Any) -> None:
        assert not isinstance(value, np.generic)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(item)

    walk(make(drawn(200, 4)))


# reading


def saved(tmp_path: Path, *records: Any) -> Path:
    path = tmp_path / "result.json"
    write_json(path, list(records) if len(records) != 1 else records[0])
    return path


@pytest.mark.parametrize("rows", [drawn(300, 10), drawn(300, 10, noise=0), drawn(300, 10, labelled=False)])
def test_what_is_written_is_what_is_read(tmp_path: Path, rows: Outcomes) -> None:
    r = json.loads(to_json(make(rows, shard=Shard(2, 3))))
    assert load(saved(tmp_path, r)) == [r]
    assert load(saved(tmp_path, r, r)) == [r, r]
    r["baseline"]["latency_ms"] = None
    assert load(saved(tmp_path, r)) == [r]


def former() -> dict[str, Any]:
    """A record as edgeres 0.1 wrote it."""
    r = json.loads(to_json(make(flips(2000, 14, 8, right=1686))))
    for key in NEW:
        del r[key]
    for name in ("baseline", "engine"):
        r[name] = {key: r[name][key] for key in ("top1", "top5", "latency_ms", "size_bytes")}
    del r["drop"]["top5_interval"], r["flips"]["wrong_to_wrong"], r["provenance"]["digests"]["outcomes"]
    return {**r, "format": FORMER, "budget": {"max_drop": 1.0}}


def test_a_result_of_the_former_format_gets_what_can_be_computed(tmp_path: Path) -> None:
    (r,) = load(saved(tmp_path, former()))
    new = json.loads(to_json(make(flips(2000, 14, 8, right=1686))))
    assert r.keys() == new.keys()
    assert r["format"] == FORMER
    for name in ("baseline", "engine"):
        assert r[name] == new[name]
    assert (r["labels"], r["images_of"], r["flipped_total"], r["shard"]) == (True, 2000, 22, None)
    assert r["flips"] == {"right_to_wrong": 14, "wrong_to_right": 8, "wrong_to_wrong": None}
    assert r["budget"] == new["budget"]
    assert (r["classes"], r["flipped"], r["latency"]) == (None, [], None)


def test_the_first_results_of_this_format_have_no_words_of_each_budget(tmp_path: Path) -> None:
    r = json.loads(to_json(make(drawn(300, 10))))
    del r["verdicts"]
    assert load(saved(tmp_path, r)) == [{**r, "verdicts": None}]


def test_accepted_results_of_this_repository_load() -> None:
    paths = sorted((Path(__file__).parents[1] / "engines").glob("*.result.json"))
    assert paths
    assert all(load(path)[0]["verdict"] == "PASS" for path in paths)


def at(path: str, value: Any = ...) -> Callable[[dict[str, Any]], None]:
    """Set the field at a dotted path, or remove it."""

    def change(record: Any) -> None:
        *above, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
        for key in above:
            record = record[key]
        if value is ...:
            del record[last]
        else:
            record[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (at("kl"), "kl is missing"),
        (at("baseline.top1", "85"), 'baseline.top1 is "85", not number from 0 to 100 or null'),
        (at("engine", None), "engine is null, not object"),
        (at("images", 3.5), "images is 3.5, not count above 0"),
        (at("images", -3), "images is -3, not count above 0"),
        (at("images", True), "images is true, not count above 0"),
        (at("labels", 1), "labels is 1, not true or false"),
        (at("drop", None), "drop is null, though there are labels"),
        (at("drop.interval", [0.1]), "drop.interval is [0.1], not interval [low, high]"),
        (at("drop.interval", None), "drop.interval is null, not interval [low, high]"),
        (at("drop.top5_interval", ["a", 1]), 'drop.top5_interval is ["a", 1], not interval [low, high] or null'),
        (at("flips.wrong_to_wrong"), "flips.wrong_to_wrong is missing"),
        (at("classes", {}), "classes is {}, not list or null"),
        (at("classes.3.lost", None), "classes[3].lost is null, not count"),
        (at("classes.0", 7), "classes[0] is 7, not object"),
        (at("flipped.2.engine.answer"), "flipped[2].engine.answer is missing"),
        (at("flipped.2.engine"), "flipped[2].engine is missing"),
        (at("reasons.0", 3), "reasons[0] is 3, not text"),
        (at("verdict", 1), "verdict is 1, not PASS, NOT ENOUGH IMAGES, NO LABELS, FAIL or null"),
        (at("verdicts", "PASS"), 'verdicts is "PASS", not list or null'),
        (at("verdicts.0", "pass"), 'verdicts[0] is "pass", not PASS, NOT ENOUGH IMAGES, NO LABELS, FAIL'),
        (
            at("verdict", "\x1b[32mPASS"),
            'verdict is "\\u001b[32mPASS", not PASS, NOT ENOUGH IMAGES, NO LABELS, FAIL or null',
        ),
        (at("images", 10**400), f"images is {10**39}, not count above 0"),
        (at("baseline.latency_ms.p90"), "baseline.latency_ms.p90 is missing"),
        (at("precision", "int8`; rm x"), 'precision is "int8`; rm x", not fp32, fp16, int8'),
        (at("engine.precision", "int4"), 'engine.precision is "int4", not fp32, fp16, int8'),
        (at("budget.accepted", {"path": "x", "top1": 1.0}), "budget.accepted.max_loss is missing"),
        (at("shard", {"index": 1}), "shard.of is missing"),
        (at("layers", [{"name": "conv1", "sqnr_db": "much"}]), 'layers[0].sqnr_db is "much", not number or null'),
        (at("provenance.digests"), "provenance.digests is missing"),
        (at("provenance.digests.images", None), "provenance.digests.images is null, not text"),
    ],
)
def test_what_is_wrong_with_a_result_is_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], wrong: str
) -> None:
    record = json.loads(to_json(make(drawn(300, 10))))
    change(record)
    with pytest.raises(InputError, match=r"result.json is damaged") as caught:
        load(saved(tmp_path, record))
    assert caught.value.evidence == wrong


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (at("images", 0), "images is 0, not count above 0"),
        (at("engine.size_bytes", 0), "engine.size_bytes is 0, not count above 0"),
        (at("classes.1.images", 0), "classes[1].images is 0, not count above 0"),
        (at("drop.interval", [0.2, 0.1]), "drop.interval is [0.2, 0.1], not interval [low, high]"),
        (at("drop.p_value", 1.5), "drop.p_value is 1.5, not number from 0 to 1"),
        (at("engine.top5", None), "engine.top5 is null, though there is a drop"),
        (at("engine.top1", 100.5), "engine.top1 is 100.5, not number from 0 to 100 or null"),
        (at("flipped.0.kind", "x"), 'flipped[0].kind is "x", not right_to_wrong, wrong_to_right, ... changed'),
        (at("provenance.machine.gpus.0", None), "provenance.machine.gpus[0] is null, not object"),
        (at("provenance.digests.weights", 3), "provenance.digests.weights is 3, not text or object or null"),
        (at("provenance.fleet.versions.1", 1), "provenance is ... , not object, not deep, with lists of one kind"),
        (at("provenance.preprocess.crop", "x"), "provenance.preprocess: 'crop' ... must be int, not 'x'"),
        (at("ranges.0.edges.0"), "ranges[0] is ... , not object with an edge more than counts"),
        (at("ranges.0.counts.0", -1), "ranges[0].counts is ... , not list of counts"),
        (at("ranges.0.thresholds.mse", []), "ranges[0].thresholds.mse is [], not interval [low, high]"),
        (at("latency.runners"), "latency.runners is missing"),
        (at("latency.streams", 0), "latency.streams is 0, not count above 0"),
        (at("latency.runners.INT8.stable"), "latency.runners.INT8.stable is missing"),
        (at("latency.runners.\x1b", 1), "latency.runners.\\u001b is 1, not object"),
        (
            at("latency.runners.INT8.intervals.p50", [0.0, 1.0]),
            "latency.runners.INT8.intervals.p50 is ... or null",
        ),
        (at("latency.runners.INT8.p99", 1e-9), "latency.runners.INT8 is ... whose percentiles lie in its histogram"),
        (at("latency.runners.INT8.histogram.counts", [0, 0]), "latency.runners.INT8 is ... lie in its histogram"),
        (at("latency.runners.INT8.energy.rails", [1]), "latency.runners.INT8.energy.rails[0] is 1, not text"),
        (at("latency.conditions.warnings", None), "latency.conditions.warnings is null, not list"),
    ],
)
def test_what_would_not_be_shown_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], wrong: str
) -> None:
    record = full()
    assert load(saved(tmp_path, record)) == [record]
    change(record)
    with pytest.raises(InputError, match=r"result.json is damaged") as caught:
        load(saved(tmp_path, record))
    begins, _, ends = wrong.partition(" ... ")
    evidence = caught.value.evidence
    assert (evidence[: len(begins)], evidence[len(evidence) - len(ends) :]) == (begins, ends)
    assert caught.value.hint == "validate again to write it anew"


def test_a_percentile_with_a_point_in_its_name_is_looked_at(tmp_path: Path) -> None:
    record = full()
    record["latency"]["runners"]["INT8"]["p99.9"] = "x"
    with pytest.raises(InputError) as caught:
        load(saved(tmp_path, record))
    assert caught.value.evidence == 'latency.runners.INT8.p99.9 is "x", not number above 0 or null'


def test_a_verdict_has_reasons(tmp_path: Path) -> None:
    record = {**full(), "reasons": []}
    assert load(saved(tmp_path, record))  # they are made from the drop and the budget on it
    record["budget"]["max_drop"] = None
    with pytest.raises(InputError) as caught:
        load(saved(tmp_path, record))
    assert caught.value.evidence == "reasons is [], though there is a verdict"


GONE, BAD = object(), (None, "x", -1, 0, [])
TWICE = ("FP32", "after", "minmax", "percentile", "entropy", "p90", "p95")
"""Fields that have a like one, which is spoilt; nor does each item of a list need to be."""


def spoilt(record: Any, value: Any = None, path: str = "") -> Iterator[str]:
    """``record`` with one field or item after another gone or `BAD`, and then as it was."""
    value = value or record
    for key, item in [*value.items()] if isinstance(value, dict) else [*enumerate(value[:1])]:
        if key in TWICE:
            continue
        place = f"{path}.{key}"
        for bad in (GONE, *BAD):
            if bad is not GONE:
                value[key] = bad
                yield f"{place} = {bad!r}"
                value[key] = item
            elif isinstance(value, list):
                yield from ()  # an empty list is among `BAD`
            else:
                order = [*value.items()]
                del value[key]
                yield f"{place} gone"
                value |= dict(order)
        if item and isinstance(item, dict | list):
            yield from spoilt(record, item, place)


def views(r: dict[str, Any], engine: dict[str, Any] | None = None) -> None:
    """Everything that shows results, but `diff`, which reads files, and the page's template, which takes its time."""
    assert all((shown([r]), markdown([r]), junit([r]), content([r], [engine]), card(r, engine)))


def test_a_spoilt_result_is_refused_or_every_view_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, counts = json.loads(to_json(full())), Counter[str]()
    path, whole = tmp_path / "result.json", tmp_path / "whole.json"
    read = {whole: [full()]}
    monkeypatch.setattr(edgeres.result, "load", read.__getitem__)  # for `diff`, once is enough
    for what in spoilt(record):
        path.write_text(json.dumps(record), encoding="utf-8")
        try:
            read[path] = load(path)
        except InputError:
            counts["refused"] += 1
            continue
        try:
            views(read[path][0])
            diff(whole, path)
        except Exception as error:
            raise AssertionError(f"{what} breaks a view") from error
        counts["shown"] += 1
    assert record == full()
    assert min(counts["refused"], counts["shown"]) > 300


def test_the_page_of_a_full_result_is_made() -> None:
    assert "orin" in page([full()])


def test_a_spoilt_engine_record_is_refused_or_every_view_works() -> None:
    engine = {
        "sha256": "8" * 64,
        "classes": 10,
        "size_bytes": 24_000_000,
        "executor": "onnxruntime",
        "io": "fp32",
        "kept_fp32": ["fc"],
        "fusion": {"operators": {"QLinearConv": 53}, "notes": []},
        "built_with": {"edgeres": "0.1.0"},
        "made_from": {"model": "a" * 64},
    }
    r = full()
    assert not list(wrong(engine, ENGINE_FIELDS))
    for what in spoilt(engine):
        if not list(wrong(engine, ENGINE_FIELDS)):
            try:
                views(r, engine)
            except Exception as error:
                raise AssertionError(f"{what} breaks a view") from error
    assert list(wrong({"fusion": "x"}, ENGINE_FIELDS)) == ['fusion is "x", not object']


def test_a_benchmark_is_looked_at_as_within_a_result() -> None:
    with pytest.raises(InputError, match=r"^benchmark b\.json is damaged") as caught:
        refuse(wrong({"format": "edgeres benchmark 1"}, LATENCY), "benchmark b.json", "measure again")
    assert (caught.value.evidence, caught.value.hint) == ("runners is missing", "measure again")
    measured = full()["latency"]
    refuse(wrong(measured, LATENCY), "", "")
    at("conditions.warnings.0", 3)(measured)
    assert list(wrong(measured, LATENCY)) == ["conditions.warnings[0] is 3, not text"]


def test_a_file_of_lists_in_lists_is_refused(tmp_path: Path) -> None:
    nested: Any = {}
    for _ in range(30):
        nested = {"deeper": nested}
    record = full()
    record["provenance"]["fleet"] = nested
    with pytest.raises(InputError, match="is damaged") as caught:
        load(saved(tmp_path, record))
    assert caught.value.evidence.endswith("not object, not deep, with lists of one kind")


@pytest.mark.parametrize("key", ["images", "precision", "baseline", "drop", "budget", "agreement"])
def test_what_a_former_result_lacks_is_named(tmp_path: Path, key: str) -> None:
    record = former()
    del record[key]
    with pytest.raises(InputError, match="is damaged") as caught:
        load(saved(tmp_path, record))
    assert key in caught.value.evidence


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("{", "cannot read result"),
        ("", "cannot read result"),
        ("[]", "holds no results"),
        ("[3]", "is not a result"),
        ('{"format": "edgeres engine 1"}', "is not a result"),
        ('{"format": "edgeres result 2", "kl": NaN}', "cannot read result"),
        ("\udcff", "cannot read result"),
        ("[" * 200_000 + "]" * 200_000, "cannot read result"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, text: str, cause: str) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=cause):
        load(path)
    with pytest.raises(InputError, match="cannot read result"):
        load(tmp_path / "nowhere.json")


def test_a_number_that_is_none_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    record = json.loads(to_json(make(drawn(300, 10))))
    other = deepcopy(record)
    other["flipped"][0]["margin"] = "0.5"
    with pytest.raises(InputError, match="is damaged") as caught:
        load(saved(tmp_path, record, other))
    assert caught.value.evidence == 'flipped[0].margin is "0.5", not number'
