"""Results: one JSON record per engine, from which everything that is shown is made."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from edgeres import machine
from edgeres.validate import Comparison, judge

FORMAT = "edgeres result 1"


def result(
    name: str,
    engine: dict[str, Any],
    comparison: Comparison,
    sides: list[dict[str, Any]],
    max_drop: float | None,
    skipped: list[tuple[str, str]],
    digests: dict[str, Any],
) -> dict[str, Any]:
    """The record of one validation. Others' scripts read these names: fields are added, never renamed.

    Accuracies and agreement are in percent, drops in percentage points, latencies in ms, KL in nats. ``sqnr_db`` is
    inf, null in JSON, where engine and baseline agree to the last bit. ``sides`` are what was measured of baseline and
    engine besides accuracy.
    """
    c, n = comparison, comparison.images
    verdict = judge(c, max_drop) if max_drop is not None else None
    top1, top5 = c.drop()
    baseline, candidate = (
        {"top1": 100 * hits[0] / n, "top5": 100 * hits[1] / n, **side}
        for hits, side in zip((c.baseline, c.engine), sides, strict=True)
    )
    return {
        "format": FORMAT,
        "name": name,
        "model": f"resnet{engine['depth']} {engine['variant'] or ''}".strip() if engine.get("depth") else name,
        "target": engine["target"],
        "precision": engine["precision"],
        "images": n,
        "skipped": [path for path, _ in skipped],
        "baseline": baseline,
        "engine": candidate,
        "drop": {"top1": top1, "top5": top5, "interval": list(c.interval()), "p_value": c.p_value()},
        "flips": {"right_to_wrong": c.right_to_wrong, "wrong_to_right": c.wrong_to_right},
        "agreement": {"top1": 100 * c.same_top1 / n, "top5": 100 * c.shared_top5 / n},
        "sqnr_db": c.sqnr_db(),
        "kl": c.divergence / n,
        "budget": {"max_drop": max_drop},
        "verdict": verdict.word if verdict else None,
        "images_needed": verdict.images_needed if verdict else None,
        "notes": engine["fusion"]["notes"],
        "provenance": {
            "digests": {**digests, "engine": engine["sha256"]},
            "preprocess": engine["preprocess"],
            "quantization": engine.get("quantization"),
            "built_with": engine["built_with"],
            "versions": machine.versions("numpy", "onnxruntime", "pillow"),
            "machine": machine.describe(),
        },
    }


def table(results: list[dict[str, Any]]) -> Table:
    """One row for the FP32 baseline, one per engine. Fits 80 columns."""
    first = results[0]
    rows = [["", "top-1 %", "drop", "95% interval", "agree %", "SQNR", "MB", "p50 ms", "p99 ms"]]

    def row(name: str, side: dict[str, Any], *middle: str) -> None:
        latency = side["latency_ms"]
        ends = f"{side['size_bytes'] / 1e6:.1f}", f"{latency['p50']:.2f}", f"{latency['p99']:.2f}"
        rows.append([name, f"{side['top1']:.2f}", *middle, *ends])

    row("FP32", first["baseline"], "", "", "", "")
    for r in results:
        lo, hi = r["drop"]["interval"]
        noise = "exact" if r["sqnr_db"] in (None, float("inf")) else f"{r['sqnr_db']:.1f} dB"
        middle = f"{r['drop']['top1']:+.2f}", f"{lo:+.2f} {hi:+.2f}", f"{r['agreement']['top1']:.2f}", noise
        row(_label(r, results), r["engine"], *middle)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    gap = 2 if sum(widths) + 2 * (len(widths) - 1) <= 80 else 1  # a number cut short would be a wrong number
    where = " and ".join(dict.fromkeys(r["target"] for r in results))
    title = f"{first['model']} on {where}, {first['images']:,} images"
    out = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, gap, 0, 0))
    for i, heading in enumerate(rows[0]):
        out.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for cells in rows[1:]:
        out.add_row(*cells)
    return out


def _label(result: dict[str, Any], among: list[dict[str, Any]]) -> str:
    """An engine's precision; with its target, where ``among`` are several."""
    several = len({r["target"] for r in among}) > 1
    return result["precision"].upper() + f" {result['target']}" * several


def verdicts(results: list[dict[str, Any]]) -> list[Text]:
    """A line per engine with a budget, then what the user should know about each engine."""
    lines = []
    for r in results:
        name, word = _label(r, results), r["verdict"]
        if word is not None:
            style = {"PASS": "green", "FAIL": "red"}.get(word, "yellow")
            drop = f"drop {r['drop']['top1']:+.2f}, at worst {r['drop']['interval'][1]:+.2f}"
            needed = f"; about {r['images_needed']:,} would decide" if r["images_needed"] else ""
            line = f": {drop} points, budget {r['budget']['max_drop']:g}{needed}"
            lines.append(Text.assemble(f"{name} ", (word, f"bold {style}"), line))
        lines += [Text(f"{name} note: {note}") for note in r["notes"]]
        if r["skipped"]:
            lines.append(Text(f"{name} note: {len(r['skipped'])} unreadable images left out"))
    return lines


def met(results: list[dict[str, Any]]) -> bool:
    """Whether every result with a budget passed. NOT ENOUGH IMAGES is no pass."""
    return all(r["verdict"] in (None, "PASS") for r in results)
