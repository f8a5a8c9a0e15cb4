from __future__ import annotations

import io
import json
import math
import re
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from edgeres.files import to_json
from edgeres.report import met, result, table, verdicts
from edgeres.validate import Comparison

ENGINE = {
    "depth": 50,
    "variant": "v1.5",
    "target": "cpu",
    "precision": "int8",
    "sha256": "e" * 64,
    "preprocess": {"crop": 32},
    "quantization": {"method": "mse", "table": "t" * 64},
    "built_with": {"edgeres": "0.1.0", "onnxruntime": "1.20.0"},
    "fusion": {"operators": {"QLinearConv": 53}, "notes": []},
}
COMPARISON = Comparison(
    images=2000,
    baseline=(1700, 1950),
    engine=(1694, 1951),
    right_to_wrong=14,
    wrong_to_right=8,
    same_top1=1960,
    shared_top5=1940.4,
    signal=31_622.776601683792,
    noise=10.0,
    divergence=6.2,
)


def side(p50: float, megabytes: float) -> dict[str, Any]:
    latency = {"p50": p50, "p90": p50 * 1.1, "p99": p50 * 1.2, "batch": 1, "samples": 200}
    return {"latency_ms": latency, "size_bytes": round(megabytes * 1e6)}


def make(
    comparison: Comparison = COMPARISON,
    max_drop: float | None = 1.0,
    precision: str = "int8",
    notes: tuple[str, ...] = (),
    skipped: tuple[tuple[str, str], ...] = (),
    sides: tuple[dict[str, Any], dict[str, Any]] = (side(24.5, 102.2), side(10.25, 25.9)),
) -> dict[str, Any]:
    engine = {**ENGINE, "precision": precision, "fusion": {"operators": {}, "notes": list(notes)}}
    digests = {"model": "m" * 64, "images": "i" * 64}
    return result("tiny", engine, comparison, list(sides), max_drop, list(skipped), digests)


def shown(results: list[dict[str, Any]], width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(table(results))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_the_json_is_the_contract_that_scripts_read() -> None:
    r = json.loads(to_json(make()))
    assert r.keys() >= {
        *("images", "model", "target", "precision", "baseline", "engine", "drop", "agreement", "sqnr_db", "kl"),
        *("verdict", "provenance"),
    }
    for name in ("baseline", "engine"):
        assert r[name].keys() >= {"top1", "top5", "latency_ms"}
        assert r[name]["latency_ms"].keys() >= {"p50", "p90", "p99"}
    assert r["drop"].keys() >= {"top1", "top5", "interval", "p_value"}
    assert r["agreement"].keys() >= {"top1", "top5"}
    assert r["provenance"]["digests"] == {"model": "m" * 64, "images": "i" * 64, "engine": "e" * 64}
    assert r["provenance"]["versions"].keys() >= {"edgeres", "python", "numpy", "onnxruntime"}


def test_the_json_is_in_percent_points_and_ms() -> None:
    r = json.loads(to_json(make(skipped=(("class0/bad.png", "truncated"),))))
    assert (r["name"], r["model"], r["target"], r["precision"]) == ("tiny", "resnet50 v1.5", "cpu", "int8")
    assert r["images"] == 2000
    assert (r["baseline"]["top1"], r["baseline"]["top5"]) == (85.0, 97.5)
    assert (r["engine"]["top1"], r["engine"]["top5"]) == pytest.approx((84.7, 97.55))
    assert (r["drop"]["top1"], r["drop"]["top5"]) == pytest.approx((0.3, -0.05))
    assert r["drop"]["interval"] == pytest.approx(COMPARISON.interval())
    assert r["drop"]["p_value"] == COMPARISON.p_value()
    assert (r["agreement"]["top1"], r["agreement"]["top5"]) == pytest.approx((98.0, 97.02))
    assert (r["sqnr_db"], r["kl"]) == pytest.approx((35.0, 0.0031))
    assert (r["engine"]["latency_ms"]["p50"], r["engine"]["size_bytes"]) == (10.25, 25_900_000)
    assert r["flips"] == {"right_to_wrong": 14, "wrong_to_right": 8}
    assert (r["verdict"], r["budget"], r["images_needed"]) == ("PASS", {"max_drop": 1.0}, None)
    assert r["skipped"] == ["class0/bad.png"]


def test_an_exact_engine_has_no_ratio_in_json() -> None:
    exact = Comparison(10, (9, 10), (9, 10), 0, 0, 10, 10.0, signal=5.0)
    assert math.isinf(make(exact)["sqnr_db"])
    r = json.loads(to_json(make(exact)))
    assert r["sqnr_db"] is None
    assert "exact" in shown([r])[-1].split()


def test_without_a_budget_there_is_no_verdict() -> None:
    r = make(max_drop=None)
    assert (r["verdict"], r["images_needed"], r["budget"]) == (None, None, {"max_drop": None})
    assert verdicts([r]) == []
    assert met([r])


def test_the_table_shows_baseline_and_engines() -> None:
    title, _, baseline, fp16, int8 = shown([make(precision="fp16"), make()])
    assert title.strip() == "resnet50 v1.5 on cpu, 2,000 images"
    assert baseline.split() == ["FP32", "85.00", "102.2", "24.50", "29.40"]
    lo, hi = COMPARISON.interval()
    row = ["84.70", "+0.30", f"{lo:+.2f}", f"{hi:+.2f}", "98.00", "35.0", "dB", "25.9", "10.25", "12.30"]
    assert fp16.split() == ["FP16", *row]
    assert int8.split() == ["INT8", *row]


def test_a_table_read_back_from_json_is_the_same() -> None:
    results = [make(precision="fp16"), make()]
    assert shown([json.loads(to_json(r)) for r in results]) == shown(results)


EXTREMES = [
    COMPARISON,
    Comparison(200, (200, 200), (0, 20), 200, 0, 0, 3.0, signal=1.0, noise=1e5, divergence=900.0),
    Comparison(50, (10, 50), (25, 50), 5, 20, 20, 30.0, signal=1e13, noise=1.0, divergence=0.0),
    Comparison(60_000, (59_999, 60_000), (60_000, 60_000), 0, 1, 59_999, 6e4, signal=9.0),
]


@pytest.mark.parametrize("p50", [0.31, 24.5, 999.99, 12_345.67])
@pytest.mark.parametrize("comparison", EXTREMES)
def test_no_number_is_cut_at_80_columns(comparison: Comparison, p50: float) -> None:
    results = [make(comparison, sides=(side(p50 * 2, 102.2), side(p50, 25.9))), make()]
    lines, wide = shown(results), shown(results, width=200)
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    assert [line.split() for line in lines] == [line.split() for line in wide]
    lo, hi = comparison.interval()
    assert f"{lo:+.2f} {hi:+.2f}" in lines[3]
    assert f"{p50 * 1.2:.2f}" in lines[3]


def test_columns_are_two_apart_where_there_is_room() -> None:
    header, row = shown([make()])[1], shown([make()])[3]
    assert re.search(r"drop {2,}95% interval {2,}agree %", header)
    assert len(re.split(r" {2,}", row.strip())) == 9


@pytest.mark.parametrize(
    ("comparison", "max_drop", "word"),
    [
        (COMPARISON, 1.0, "PASS"),
        (Comparison(2000, (1700, 1950), (1600, 1900), 110, 10, 1800, 1900.0, 9.0, 1.0), 1.0, "FAIL"),
        (COMPARISON, 0.5, "NOT ENOUGH IMAGES"),
    ],
)
def test_the_verdict_line_says_drop_and_budget(comparison: Comparison, max_drop: float, word: str) -> None:
    r = make(comparison, max_drop)
    (line,) = (text.plain for text in verdicts([r]))
    drop, worst = comparison.drop()[0], comparison.interval()[1]
    start = f"INT8 {word}: drop {drop:+.2f}, at worst {worst:+.2f} points, budget {max_drop:g}"
    needed = f"; about {r['images_needed']:,} would decide" if word == "NOT ENOUGH IMAGES" else ""
    assert line == start + needed
    assert met([r]) is (word == "PASS")


def test_a_number_that_cannot_be_named_is_not() -> None:
    exact = Comparison(100, (90, 100), (90, 100), 0, 0, 100, 100.0, signal=5.0)
    (line,) = (text.plain for text in verdicts([make(exact, 0.0)]))
    assert line.startswith("INT8 NOT ENOUGH IMAGES: drop +0.00, at worst ")
    assert line.endswith("points, budget 0")


def test_notes_and_skipped_images_are_told() -> None:
    r = make(max_drop=None, notes=("2 of 53 convolutions [bold] stay in FP32",), skipped=(("a.png", "bad"), ("b", "")))
    assert [text.plain for text in verdicts([r])] == [
        "INT8 note: 2 of 53 convolutions [bold] stay in FP32",
        "INT8 note: 2 unreadable images left out",
    ]


def test_one_missed_budget_is_a_missed_budget() -> None:
    good, bad, free = make(), make(max_drop=-5.0), make(max_drop=None)
    assert (good["verdict"], bad["verdict"]) == ("PASS", "FAIL")
    assert met([good, free])
    assert not met([good, bad])
    assert met([])


def test_no_number_in_the_record_is_of_numpy() -> None:
    def walk(value: Any) -> None:
        assert not isinstance(value, np.generic)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(item)

    reference = np.random.default_rng(0).standard_normal((20, 4))
    comparison = Comparison()
    comparison.add(reference, reference + 0.1 * reference[::-1], np.arange(20) % 4)
    walk(make(comparison))


def test_engines_of_several_targets_are_told_apart() -> None:
    other = {**make(notes=("slow",)), "target": "cpu-openvino"}
    title, _, _, first, second = shown([make(), other])
    assert title.strip() == "resnet50 v1.5 on cpu and cpu-openvino, 2,000 images"
    assert first.startswith("INT8 cpu ")
    assert second.startswith("INT8 cpu-openvino ")
    lines = [line.plain for line in verdicts([make(), other])]
    assert [line.split(" PASS")[0] for line in lines[:2]] == ["INT8 cpu", "INT8 cpu-openvino"]
    assert lines[2] == "INT8 cpu-openvino note: slow"
