from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from records import NEW, P50, latency, record, save
from rich.console import Console
from rich.text import Text

from edgeres import result
from edgeres.files import to_json
from edgeres.markdown import markdown
from edgeres.report import (
    checks,
    colors,
    columns,
    groups,
    intervals,
    labels,
    met,
    reasons,
    shown,
    speedup,
    table,
    verdicts,
)

FORMER = {
    "format": "edgeres result 1",
    "flips": {"right_to_wrong": 14, "wrong_to_right": 8},
    "budget": {"max_drop": 0.5},
}


def former(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """A result of the first format, read as it is read today."""
    old = {key: value for key, value in {**record(), **FORMER, **changes}.items() if key not in NEW}
    for side in ("baseline", "engine"):
        kept = ("top1", "top5", "latency_ms", "size_bytes")
        old[side] = {key: value for key, value in old[side].items() if key in kept}
    del old["drop"]["top5_interval"]
    return result.load(save(tmp_path, old))[0]


def unlabelled(**changes: Any) -> dict[str, Any]:
    r = record(labels=False, drop=None, flips=0, classes=10, verdict=None, reasons=[], **changes)
    nothing = dict.fromkeys(("top1", "top5", "top1_interval", "top5_interval"))
    return {**r, "flips": None, "classes": None, **{s: {**r[s], **nothing} for s in ("baseline", "engine")}}


def lines(item: Any, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(item)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def plain(items: list[Any]) -> list[str]:
    return [item.plain for item in items if isinstance(item, Text)]


def bare(**changes: Any) -> dict[str, Any]:
    """As `validate` writes it, without a benchmark."""
    return record(**{"latency": None, **changes})


def test_the_records_of_these_tests_are_results(tmp_path: Path) -> None:
    for r in (record(), record("fp16"), bare(), unlabelled()):
        assert result.load(save(tmp_path, r)) == [json.loads(to_json(r))]


def test_the_table_shows_baseline_and_engines() -> None:
    title, _, baseline, fp16, int8 = lines(table([bare(precision="fp16"), bare()]))
    assert title == "resnet50 v1.5 on cpu, 10,000 images"
    assert baseline.split() == ["FP32", "86.25", "94.0", "5.67", "7.94"]
    assert fp16.split() == ["FP16", "86.25", "+0.00", "-0.02", "+0.02", "99.04", "34.8", "dB", "47.0", "5.40", "7.56"]
    assert int8.split() == ["INT8", "86.20", "+0.05", "-0.09", "+0.19", "99.04", "34.8", "dB", "24.0", "2.43", "3.40"]


def test_a_table_read_back_from_json_is_the_same() -> None:
    results = [record("fp16"), record()]
    back = [json.loads(to_json(r)) for r in results]
    assert [lines(item) for item in shown(back)] == [lines(item) for item in shown(results)]


def test_an_exact_engine_has_no_ratio() -> None:
    for ratio in (None, float("inf")):
        assert "exact" in lines(table([bare(sqnr_db=ratio)]))[-1].split()


@pytest.mark.parametrize("p50", [0.31, 24.5, 999.99, 12_345.67])
@pytest.mark.parametrize("drop", [(0.05, -0.09, 0.19), (90.0, 86.21, 93.12), (-30.0, -43.47, -14.99)])
def test_no_number_is_cut_at_80_columns(p50: float, drop: tuple[float, float, float]) -> None:
    r = bare(sqnr_db=-50.2, drop={**record()["drop"], "top1": drop[0], "interval": list(drop[1:])})
    r["engine"]["latency_ms"] |= {"p50": p50, "p99": 1.2 * p50}
    r["baseline"]["latency_ms"] |= {"p50": 2 * p50, "p99": 3 * p50}
    narrow, wide = lines(table([r, bare()])), lines(table([r, bare()]), width=200)
    assert max(map(len, narrow)) <= 80
    assert "…" not in "".join(narrow)
    assert [line.split() for line in narrow] == [line.split() for line in wide]
    assert f"{drop[1]:+.2f} {drop[2]:+.2f}" in narrow[3]
    assert f"{1.2 * p50:.2f}" in narrow[3]


@pytest.mark.parametrize("width", [40, 60, 80])
def test_long_names_give_way_and_numbers_do_not(width: int) -> None:
    names = ("resnet50-v1.5-imagenet-entropy", "a name of many words that nobody expected to be so long")
    results = [record(name=name, target=name) for name in names]
    results[0]["latency"]["runners"]["FP32"]["intervals"]["p50"] = [12_345.67, 23_456.78]
    for made in (table(results), intervals(results)):
        narrow, wide = "\n".join(lines(made, width)), "\n".join(lines(made, 300))
        assert max(map(len, narrow.splitlines())) <= width
        assert "…" not in narrow
        numbers = re.findall(r"(?<=\s)[+-]?\d+\.\d+x?(?=\s|$)", wide)
        assert len(numbers) > 15
        assert sorted(re.findall(r"(?<=\s)[+-]?\d+\.\d+x?(?=\s|$)", narrow)) == sorted(numbers)
        for name in names:
            assert set(name.split()) <= set(wide.split())
    letters = "".join(line.split("  ")[0] for line in lines(table(results), 80)[3:])
    assert "resnet50-v1.5-imagenet-entropy" in letters


def test_one_image_is_one_image() -> None:
    assert lines(table([bare(images=1)]))[0] == "resnet50 v1.5 on cpu, 1 image"
    assert "INT8 note: 1 unreadable image left out" in plain(verdicts([bare(skipped=["a.png"])]))


def test_columns_are_two_apart_where_there_is_room() -> None:
    header, row = lines(table([bare()]))[1], lines(table([bare()]))[3]
    assert re.search(r"drop {2,}95% interval {2,}agree %", header)
    assert len(re.split(r" {2,}", row.strip())) == 9


def test_latency_is_that_of_the_benchmark_where_there_was_one() -> None:
    r = record()
    row = lines(table([r]))[-1].split()
    runner = r["latency"]["runners"]["INT8"]
    assert row[-2:] == [f"{runner['p50']:.2f}", f"{runner['p99']:.2f}"]
    runner["p99"] = None  # too few samples
    assert lines(table([r]))[-1].split()[-1] == f"{runner['p50']:.2f}"


def test_intervals_stand_below_the_table() -> None:
    r = record()
    head, fp32, int8 = lines(intervals([r]))
    low, high = r["latency"]["runners"]["INT8"]["intervals"]["p50"]
    assert head.split() == ["95%", "intervals", "top-1", "%", "top-5", "%", "p-value", "p50", "ms", "faster"]
    assert fp32.split()[:6] == ["FP32", "85.56", "86.91", "99.47", "99.31", "99.59"]
    numbers = ["85.51", "86.86", "99.47", "99.31", "99.59", "0.580", f"{low:.2f}", f"{high:.2f}"]
    assert int8.split() == ["INT8", *numbers, "2.33x", "2.29", "2.38"]
    assert max(map(len, (head, fp32, int8))) <= 80


def test_intervals_that_were_not_measured_have_no_column() -> None:
    head, _, int8 = lines(intervals([bare()]))
    assert head.split() == ["95%", "intervals", "top-1", "%", "top-5", "%", "p-value"]
    assert int8.split() == ["INT8", "85.51", "86.86", "99.47", "99.31", "99.59", "0.580"]
    assert intervals([unlabelled(latency=None)]) is None


def test_without_labels_there_is_no_accuracy() -> None:
    r = unlabelled(latency=None)
    assert lines(table([r]))[-1].split() == ["INT8", "100.00", "34.8", "dB", "24.0", "2.43", "3.40"]
    assert plain(shown([r])) == []


def test_a_shard_is_not_timed_and_says_what_it_is() -> None:
    r = bare(shard={"index": 2, "of": 3}, images=3344, images_of=10_000, verdict=None, reasons=[])
    r["baseline"]["latency_ms"] = r["engine"]["latency_ms"] = None
    assert lines(table([r]))[-1].split()[-1] == "24.0"
    assert speedup(r) == (None, None)
    part = "INT8 note: shard 2 of 3, 3,344 of 10,000 images; `edgeres report merge` makes one result of all"
    assert plain(shown([r])) == [part]


def test_results_of_several_baselines_have_a_table_each() -> None:
    other = bare(model="resnet50 v1")
    other["provenance"]["digests"]["model"] = "e" * 64
    titles = [lines(item)[0] for item in shown([bare(), other]) if not isinstance(item, Text)]
    assert [t for t in titles if "images" in t] == [f"resnet50 {v} on cpu, 10,000 images" for v in ("v1.5", "v1")]
    assert [c.name for c in columns([bare(), other])] == [
        *("FP32 resnet50 v1.5", "INT8 resnet50 v1.5", "FP32 resnet50 v1", "INT8 resnet50 v1")
    ]
    assert groups([bare(), other, bare()])[0] == [bare(), bare()]
    other = bare()
    other["provenance"]["digests"]["images"] = "e" * 64
    assert len(groups([bare(), other])) == 2


def test_baselines_are_told_apart_by_name_and_color() -> None:
    other, fewer = record(), record(images=500)
    other["provenance"]["digests"]["images"] = fewer["provenance"]["digests"]["images"] = "e" * 64
    found = columns([record(), other])
    assert [c.name for c in found] == ["FP32 (1)", "INT8 (1)", "FP32 (2)", "INT8 (2)"]
    assert len({c.css for c in found}) == 4
    assert [c.name for c in columns([record(), fewer])][::2] == ["FP32 on 10,000 images", "FP32 on 500 images"]
    assert [c.css for c in columns([record(), fewer])][:2] == ["c0", "c2"]


def test_engines_are_named_by_what_tells_them_apart() -> None:
    assert labels([record("fp16"), record()]) == ["FP16", "INT8"]
    assert labels([record(), record(target="rtx")]) == ["INT8 cpu", "INT8 rtx"]
    assert labels([record("fp16"), record(target="rtx")]) == ["FP16 cpu", "INT8 rtx"]
    assert labels([record(name="a"), record(name="b")]) == ["INT8 a", "INT8 b"]
    assert labels([record("fp16", name="a"), record(name="b")]) == ["FP16", "INT8"]
    assert labels([record(), record(), record("fp16")]) == ["INT8 (1)", "INT8 (2)", "FP16"]


def test_a_precision_keeps_its_color() -> None:
    assert colors(["FP32", "INT8"]) == ["c0", "c2"]
    assert colors(["FP32", "FP32 TF32", "FP16", "INT8"]) == ["c0", "c3", "c1", "c2"]
    assert [c.css for c in columns([record(), record(target="rtx")])] == ["c0", "c2", "c3"]


def test_a_runner_may_be_named_with_its_target() -> None:
    r = record()
    runners = r["latency"]["runners"]
    r["latency"]["runners"] = {f"{name} cpu": run for name, run in runners.items()}
    r["latency"]["speedup"] = {f"{name} cpu": s for name, s in r["latency"]["speedup"].items()}
    assert columns([r])[1].p50 == runners["INT8"]["p50"]
    assert speedup(r)[1] == latency()["speedup"]["INT8"]["interval"]


def test_a_ratio_to_another_than_fp32_is_no_speed_up_over_fp32() -> None:
    r = record()
    del r["latency"]["runners"]["FP32"]  # so that the ratio is to FP16
    assert speedup(r) == (r["baseline"]["latency_ms"]["p50"] / r["latency"]["runners"]["INT8"]["p50"], None)
    r["baseline"]["latency_ms"] = None
    assert speedup(r) == (None, None)
    r = record(target="rtx")
    first, *others = r["latency"]["runners"].items()
    r["latency"]["runners"] = dict([("FP32 cpu", first[1]), ("FP32 rtx", {**first[1], "p50": 9.0}), *others])
    assert speedup(r) == (9.0 / r["latency"]["runners"]["INT8"]["p50"], None)


def test_without_a_benchmark_the_speed_up_is_that_of_the_validation() -> None:
    assert speedup(bare()) == (P50["FP32"] / P50["INT8"], None)


@pytest.mark.parametrize("word", ["PASS", "FAIL", "NOT ENOUGH IMAGES"])
def test_the_verdict_line_gives_every_reason(word: str) -> None:
    r = bare(verdict=word, reasons=["the first", "the second"])
    assert plain(verdicts([r])) == [f"INT8 {word}: the first", "  the second"]
    assert met([r]) is (word == "PASS")


def test_a_result_of_the_first_format_gets_its_reason_from_its_numbers(tmp_path: Path) -> None:
    r = former(tmp_path)
    assert plain(verdicts([r])) == ["INT8 PASS: drop +0.05, at worst +0.19 points, budget 0.5"]
    r = former(tmp_path, verdict="NOT ENOUGH IMAGES", images_needed=1300, budget={"max_drop": 0.1})
    needed = "drop +0.05, at worst +0.19 points, budget 0.1; about 1,300 would decide"
    assert reasons(r) == [needed]
    assert [tuple(c) for c in checks(r)] == [("max_drop", "NOT ENOUGH IMAGES", needed)]
    assert intervals([r]) is not None  # shares have intervals, whatever the format


def test_without_a_budget_there_is_no_verdict() -> None:
    r = bare(verdict=None, reasons=[], budget={"max_drop": None, "min_relative": None, "accepted": None})
    assert (verdicts([r]), checks(r)) == ([], [])
    assert met([r])


def test_every_budget_is_a_check() -> None:
    budget = {"max_drop": 0.5, "min_relative": 99, "accepted": {"path": "old.json", "top1": 86.0, "max_loss": 0.0}}
    r = bare(verdict="FAIL", budget=budget, reasons=["a", "b", "c"])
    # it does not say which was missed: none is called met
    assert [tuple(c) for c in checks(r)] == [
        ("max_drop", "FAIL", "a"),
        ("min_relative", "FAIL", "b"),
        ("accepted", "FAIL", "c"),
    ]
    r["verdicts"] = ["PASS", "FAIL", "PASS"]
    assert [c.word for c in checks(r)] == ["PASS", "FAIL", "PASS"]


def test_notes_and_skipped_images_are_told() -> None:
    r = bare(verdict=None, reasons=[], notes=["2 of 53 convolutions [bold] stay in FP32"], skipped=["a.png", "b"])
    assert plain(verdicts([r])) == [
        "INT8 note: 2 of 53 convolutions [bold] stay in FP32",
        "INT8 note: 2 unreadable images left out",
    ]


def test_brackets_in_a_name_are_no_markup() -> None:
    assert lines(table([bare(model="[red]net")]))[0] == "[red]net on cpu, 10,000 images"
    assert lines(table([bare(), bare(target="[b]")]))[-1].startswith("INT8 [b]")


def test_one_missed_budget_is_a_missed_budget() -> None:
    good, bad, free = bare(), bare(verdict="FAIL"), bare(verdict=None, reasons=[])
    assert met([good, free])
    assert not met([good, bad])
    assert met([])


def test_one_engine_on_several_devices_is_named_by_them_in_tables_and_verdicts() -> None:
    devices = [bare(), bare(), bare(images=500)]
    for r, host in zip(devices, ("me@orin-1", "orin-2", "orin-3"), strict=True):
        r["provenance"]["host"] = host
    assert labels(devices) == ["INT8 me@orin-1", "INT8 orin-2", "INT8 orin-3"]
    assert labels(devices[:1]) == ["INT8"]
    rows = [line for item in shown(devices) if not isinstance(item, Text) for line in lines(item)]
    named = [line.split()[1] for line in rows if line.startswith("INT8")]
    assert sorted(set(named)) == ["me@orin-1", "orin-2", "orin-3"], "two tables, and no row is plain INT8"
    assert [line.split(":")[0] for line in plain(verdicts(devices))][:1] == ["INT8 me@orin-1 PASS"]


def test_a_latency_that_is_not_stable_says_so_and_why() -> None:
    r = record()
    assert not any("stable" in line for line in plain(verdicts([r])))
    r["latency"]["runners"]["INT8"] |= {"stable": False, "warnings": ["times scatter"]}
    r["latency"]["conditions"]["warnings"] = ["clocks changed"]
    assert "INT8 latency is not stable: INT8: times scatter; clocks changed" in plain(verdicts([r]))


def test_what_engines_of_one_benchmark_share_is_said_once() -> None:
    shared = latency()
    shared["runners"]["FP32"] |= {"stable": False, "warnings": ["times drift"]}
    shared["runners"]["INT8"] |= {"stable": False, "warnings": ["times scatter"]}
    other = record(target="rtx", latency=latency(seed=9))
    other["latency"]["runners"]["FP32"] |= {"stable": False, "warnings": ["times drift"]}
    other["latency"]["conditions"]["warnings"] = []
    told = plain(verdicts([record("fp16", latency=shared), record(latency=shared), other]))
    assert [line for line in told if "stable" in line] == [
        "FP16 cpu and INT8 cpu latency is not stable: FP32: times drift; INT8: times scatter; "
        "governor is schedutil, not performance",
        "INT8 rtx latency is not stable: FP32: times drift",
    ]


def test_what_a_benchmark_lacks_is_said_once() -> None:
    shared = {**latency(), "notes": ["no FP16 engine to compare with"]}
    other = record(target="rtx", latency=latency(seed=9))
    told = plain(verdicts([record("fp16", latency=shared), other, record(latency=shared)]))
    assert [line for line in told if "FP16 engine" in line] == [
        "FP16 cpu and INT8 cpu latency note: no FP16 engine to compare with"
    ]
    alone = {**record(latency=shared), "notes": ["no FP16 engine to compare with"]}
    assert [line for line in plain(verdicts([alone])) if "FP16 engine" in line] == [
        "INT8 note: no FP16 engine to compare with"
    ]
    assert markdown([alone]).count("no FP16 engine to compare with") == 1
