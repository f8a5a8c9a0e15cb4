from __future__ import annotations

import pytest
from records import latency, record

from edgeres.markdown import markdown, text


def row(document: str, name: str) -> list[str]:
    (line,) = [line for line in document.splitlines() if line.startswith(f"| {name} |") and line.count("|") == 10]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_for_fp32_and_each_engine() -> None:
    document = markdown([record("fp16"), record()])
    assert document.startswith("### resnet50 v1.5 on cpu, 10,000 images\n\n|  | verdict | top-1 % |")
    assert row(document, "FP32")[:3] == ["FP32", "", "86.25 (85.56 to 86.91)"]
    assert row(document, "INT8") == [
        *("INT8", "**PASS**", "86.20 (85.51 to 86.86)", "+0.05 (-0.09 to +0.19)", "99.04", "34.8 dB", "24.0"),
        *("2.50 (2.48 to 2.51)", "2.33 (2.29 to 2.38)"),
    ]
    assert "95% intervals in brackets" in document


def test_every_row_of_a_table_has_as_many_cells() -> None:
    document = markdown([record("fp16"), record(notes=["a | b"])])
    for block in document.split("\n\n"):
        rows = [line.replace("\\|", "") for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows}) <= 1


def test_reasons_notes_and_doubts_are_told() -> None:
    r = record(verdict="FAIL", reasons=["first reason", "second reason"], notes=["fc is FP32"], skipped=["a.png"])
    document = markdown([r])
    assert "**FAIL**" in document
    for line in ("first reason", "second reason", "fc is FP32", "1 unreadable image left out"):
        assert f"- INT8: {line}\n" in document
    assert "- INT8: latency: governor is schedutil, not performance" in document
    assert "not stable" not in document


def test_a_latency_that_is_not_stable_is_marked_with_the_reason() -> None:
    shared = {**latency(), "notes": ["no FP32 engine"]}
    shared["runners"]["INT8"] |= {"stable": False, "warnings": ["times scatter"]}
    document = markdown([record("fp16", latency=shared), record(latency=shared)])
    assert row(document, "INT8")[-2] == "2.50 (2.48 to 2.51), **not stable**"
    assert "not stable" not in " ".join(row(document, "FP32") + row(document, "FP16"))
    why = "INT8: times scatter; governor is schedutil, not performance"
    assert document.count(f"- FP16 and INT8: latency is **not stable**: {why}\n") == 1
    assert document.count("governor") == 1
    assert document.count("- FP16 and INT8: latency: no FP32 engine\n") == 1


def test_without_a_budget_benchmark_or_labels_it_says_less() -> None:
    r = record(verdict=None, reasons=[], latency=None, labels=False, drop=None)
    for side in ("baseline", "engine"):
        r[side] |= dict.fromkeys(("top1", "top5", "top1_interval", "top5_interval"))
    r["baseline"]["latency_ms"] = r["engine"]["latency_ms"] = None
    none = "\N{EN DASH}"
    assert row(markdown([r]), "INT8") == ["INT8", "**no budget**", none, "", "99.04", "34.8 dB", "24.0", none, none]
    assert "No budget was set, so nothing was judged." in markdown([r])
    assert "in brackets" not in markdown([r])
    assert "The images have no labels, so accuracy was not measured" in markdown([r])
    assert f"{none}: not measured." in markdown([r])
    assert "labels" not in markdown([record()])
    assert "measured" not in markdown([record()])


def test_the_provenance_is_folded_away() -> None:
    folded = markdown([record()]).split("<details>")[1]
    for digest in ("a" * 64, "b" * 64, "d" * 64, "8" * 64):
        assert f"`{digest}`" in folded
    assert "onnxruntime 1.31.1" in folded


@pytest.mark.parametrize(
    "name", ["<img src=x onerror=alert(1)>", "a|b", "`x`", "[x](http://e.org)", "*b* _i_ ~s~ #1 @me"]
)
def test_names_are_shown_letter_for_letter(name: str) -> None:
    document = markdown([record(model=name, target=name, notes=[name], reasons=[name + "\n\n# x"])])
    assert name not in document
    assert document.count("\n#") == 0
    assert text(name) in document


def test_what_has_a_meaning_in_markdown_is_escaped() -> None:
    assert text("a|<b>&`*_[]~#!@\\ $x$") == "a\\|&lt;b&gt;&amp;\\`\\*\\_\\[\\]\\~\\#\\!\\@\\\\ \\$x\\$"
    assert text("two\n lines\r\n") == "two lines "


def test_results_of_two_models_have_a_table_each() -> None:
    other = record(model="resnet50 v1")
    other["provenance"]["digests"]["model"] = "e" * 64
    document = markdown([record(), other])
    assert document.count("### ") == 2
    assert document.count("| FP32 |") == 2


def test_a_shard_is_not_judged_whatever_its_budget() -> None:
    document = markdown([record(verdict=None, reasons=[], shard={"index": 1, "of": 2})])
    assert row(document, "INT8")[1] == "**not judged**"
    assert "- INT8: shard 1 of 2: a part of the images is not judged\n" in document
    assert "budget" not in document
