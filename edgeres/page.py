"""Results -> one HTML page that needs nothing beside it: no script, no other file, no network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgeres import panels
from edgeres.charts import Axis, apart
from edgeres.errors import need
from edgeres.report import Column, benchmarks, columns, labels, reasons, speedup, unstable
from edgeres.thumbnails import Draw, judged
from edgeres.words import NONE, between, count, decibels, megabytes, milliseconds, number, probability

Record = dict[str, Any]
THUMBNAILS = 60
"""At most this many in a page, however many results it shows."""
SHORT = 6
"""Letters of a name that has room within a chart, beside its point."""
VERDICTS = {
    "FAIL": ("fail", "✗"),
    "NO LABELS": ("open", "?"),
    "NOT ENOUGH IMAGES": ("open", "?"),
    "PASS": ("pass", "✓"),
    None: ("none", NONE),
}
"""Word -> its style, and the sign beside it: color alone says nothing to some. The worst comes first."""


def page(results: list[Record], engines: Sequence[Record | None] = (), images: Draw | None = None) -> str:
    """The page for ``results``.

    ``engines``: the engine.json of each, where known. ``images`` draws those for thumbnails.
    """
    jinja = need("jinja2", "report")
    environment = jinja.Environment(
        loader=jinja.PackageLoader("edgeres", "templates"),
        autoescape=True,
        undefined=jinja.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("report.html").render(content(results, engines, images))
    return str(text).strip() + "\n"


def content(results: list[Record], engines: Sequence[Record | None] = (), images: Draw | None = None) -> Record:
    """Everything that the page says, in the order and the words in which it says it."""
    names = labels(results)
    sides = columns(results)
    share = max(1, THUMBNAILS // len(results))
    known = [*engines, *[None] * (len(results) - len(engines))]
    measured = [
        {"of": ", ".join(of), **panels.benchmark(same[0]["latency"])} for of, same in benchmarks(results, names)
    ]
    shown = [
        {
            "name": name,
            "css": next(side.css for side in sides if side.record is r and side.engine),
            **_headline(r),
            "layers": panels.layers(r),
            "ranges": panels.ranges(r),
            "flips": panels.flips(r, share, pictures),
            "classes": panels.classes(r),
            "fusion": panels.fusion(r, engine),
            "provenance": {"precision": r["precision"], "target": r["target"], **r["provenance"]},
        }
        for name, r, engine, pictures in zip(names, results, known, judged(results, images), strict=True)
    ]
    words = [r["verdict"] for r in results]
    worst = next((word for word in VERDICTS if word in words), None)
    models = " and ".join(dict.fromkeys(r["model"] for r in results))
    return {
        "title": f"{models}: {', '.join(names)}",
        "verdict": worst,
        "models": models,
        "targets": " and ".join(dict.fromkeys(r["target"] for r in results)),
        "images": " and ".join(dict.fromkeys(count(r["images"], "image") for r in results)),
        "engines": shown,
        "several": len(results) > 1,
        "columns": sides,
        "accuracy": _accuracy(sides),
        "drops": _drops(sides),
        "scatter": _scatter(sides),
        "benchmarks": measured,
        "plain_latency": None if measured else _plain_latency(sides),
        "missing": _missing(results, shown),
    }


def _headline(r: Record) -> Record:
    """Verdict and the few numbers that matter, of one engine."""
    css, sign = VERDICTS[r["verdict"]]
    baseline, engine, drop = r["baseline"], r["engine"], r["drop"]
    p50, (ratio, interval), doubts = [column.p50 for column in columns([r])], speedup(r), unstable(r)
    facts = []
    if drop:
        detail = f"drop {number(drop['top1'], sign=True)} points; 95% {between(drop['interval'], sign=True)}"
        facts.append(("top-1", f"{number(baseline['top1'])} → {number(engine['top1'])} %", detail))
    if ratio is not None:
        faster = f"{ratio:.2f} times as fast as FP32" + (f"; 95% {between(interval)}" if interval else "")
        facts.append(
            ("latency p50" + ", not stable" * bool(doubts), " → ".join(map(milliseconds, p50)) + " ms", faster)
        )
    facts += [
        (
            "size",
            f"{megabytes(baseline['size_bytes'])} → {megabytes(engine['size_bytes'])} MB",
            f"{baseline['size_bytes'] / engine['size_bytes']:.1f} times smaller",
        ),
        (
            "same answer as FP32",
            f"{number(r['agreement']['top1'])} %",
            f"of {count(r['images'], 'image')}; logits {decibels(r['sqnr_db'])}",
        ),
    ]
    why = reasons(r) or ["no budget was set"]
    if r["shard"]:
        why = [f"shard {r['shard']['index']} of {r['shard']['of']}: a part of the images is not judged"]
    word = r["verdict"] or "no verdict"
    return {"word": word, "verdict_css": css, "sign": sign, "facts": facts, "reasons": why, "doubts": doubts}


def _cell(value: str, small: str = "") -> Record:
    return {"value": value, "small": "" if small == NONE else small}


def _accuracy(sides: list[Column]) -> list[Record]:
    """Rows of the table of accuracy; a cell for each column. Rows nobody has a number for are left out."""
    rows: list[tuple[str, str, list[Record]]] = []

    def row(name: str, hint: str, cells: list[Record]) -> None:
        if any(cell["value"] not in (NONE, "") for cell in cells):
            rows.append((name, hint, cells))

    for key, name in (("top1", "top-1 %"), ("top5", "top-5 %")):
        cells = [_cell(number(c.side[key]), between(c.side.get(f"{key}_interval"))) for c in sides]
        row(name, "", cells)
    for key, name in (("top1", "drop, top-1"), ("top5", "drop, top-5")):
        ends = "interval" if key == "top1" else "top5_interval"
        drops = [c.record["drop"] if c.engine else None for c in sides]
        cells = [_cell(number(d[key], sign=True), between(d.get(ends), sign=True)) if d else _cell("") for d in drops]
        row(name, "points", cells)
    row("p-value", "exact McNemar test", [_cell(_p(c)) for c in sides])
    for kind in ("right_to_wrong", "wrong_to_right", "wrong_to_wrong"):
        flips = [c.record["flips"] if c.engine else None for c in sides]
        hint = "images, to another wrong answer" if kind == "wrong_to_wrong" else "images"
        row(kind.replace("_", " "), hint, [_cell(number(f[kind], 0) if f else "") for f in flips])
    for key, name, hint in (
        ("top1", "same answer %", "of all images"),
        ("top5", "same top-5 %", "share of common answers"),
    ):
        row(name, hint, [_cell(number(c.record["agreement"][key]) if c.engine else "") for c in sides])
    row("SQNR", "of the logits", [_cell(decibels(c.record["sqnr_db"]) if c.engine else "") for c in sides])
    row("KL divergence", "nats, mean of images", [_cell(f"{c.record['kl']:.2g}" if c.engine else "") for c in sides])
    row("size", "MB", [_cell(megabytes(c.side["size_bytes"])) for c in sides])
    return [{"name": name, "hint": hint, "cells": cells} for name, hint, cells in rows]


def _p(side: Column) -> str:
    drop = side.record["drop"] if side.engine else None
    return probability(drop["p_value"]) if drop else ""


def _drops(sides: list[Column]) -> Record | None:
    """The drop of each engine with its interval, and the budgets."""
    known = [c for c in sides if c.engine and c.record["drop"]]
    if not known:
        return None
    budgets = sorted({b for c in known if (b := c.record["budget"].get("max_drop")) is not None})
    drops = [c.record["drop"] for c in known]
    axis = Axis.around([0.0, *budgets, *(end for d in drops for end in (*d["interval"], d["top1"]))])
    rows = [
        {
            "name": c.name,
            "css": c.css,
            "at": axis.at(d["top1"]),
            "lo": axis.at(d["interval"][0]),
            "hi": axis.at(d["interval"][1]),
            "text": f"{number(d['top1'], sign=True)} ({between(d['interval'], sign=True)})",
        }
        for c, d in zip(known, drops, strict=True)
    ]
    lines = [{"at": axis.at(0), "css": "zero", "label": ""}]
    lines += [{"at": axis.at(b), "css": "budget", "label": f"budget {b:g}"} for b in budgets]
    return {"rows": rows, "ticks": axis.ticks(sign=True), "lines": lines}


def _scatter(sides: list[Column]) -> Record | None:
    """Top-1 against p50 of everything that has both."""
    known = [(c, c.p50) for c in sides if c.side["top1"] is not None and c.p50 is not None]
    if not known:
        return None
    ends = [c.side.get("top1_interval") or [c.side["top1"]] * 2 for c, _ in known]
    times = [(p50, *(c.p50_interval or ())) for c, p50 in known]
    across = Axis(0.0, 1.25 * max(t for some in times for t in some))  # with room for the last name
    upward = Axis.around((end for some in ends for end in some), 0.12)
    xs, ys = [across.at(p50) for _, p50 in known], [upward.up(c.side["top1"]) for c, _ in known]
    names = apart(list(zip(xs, ys, strict=True)))
    points = [
        {
            "name": c.name,
            "css": c.css,
            "x": x,
            "y": y,
            "top": upward.up(hi),
            "bottom": upward.up(lo),
            "left": across.at(min(time)),
            "right": across.at(max(time)),
            "name_y": name_y,
            "text": f"{number(c.side['top1'])} %, {milliseconds(p50)} ms{', not stable' * c.shaky}",
        }
        for (c, p50), (lo, hi), time, x, y, name_y in zip(known, ends, times, xs, ys, names, strict=True)
    ]
    y_ticks = [{"at": round(100 - tick.at, 2), "label": tick.label} for tick in upward.ticks(4)]
    within = all(len(c.name) <= SHORT for c, _ in known)  # else the names stand below the chart alone
    return {"points": points, "x_ticks": across.ticks(), "y_ticks": y_ticks, "within": within}


def _plain_latency(sides: list[Column]) -> Record | None:
    """What a validation alone measures."""
    known = [c.side["latency_ms"] or {} for c in sides]
    first = next(filter(None, known), None)
    if first is None:
        return None
    rows = [
        {"name": key, "hint": "ms", "cells": [_cell(milliseconds(latency.get(key))) for latency in known]}
        for key in ("p50", "p90", "p99")
    ]
    return {"rows": rows, "note": f"batch {first['batch']}, {first['samples']:,} samples each, measured in turn"}


def _missing(results: list[Record], shown: list[Record]) -> list[str]:
    """What the page has no section for, and why."""
    lacking = {key: all(e[key] is None for e in shown) for key in ("layers", "ranges", "flips", "classes")}
    labels = any(r["labels"] for r in results)
    return [
        why
        for absent, why in (
            (not labels, "Accuracy: the images have no labels. Answers are compared with FP32's."),
            (all(r["latency"] is None for r in results), "Intervals of latency: no benchmark is in these results."),
            (lacking["layers"], "Fidelity layer by layer: it was not measured."),
            (lacking["ranges"], "Histograms of ranges: they are not recorded."),
            (lacking["flips"], "Changed answers: results of an earlier version do not list them."),
            (lacking["classes"] and labels, "Damage by class: results of an earlier version do not have it."),
            (lacking["classes"] and not labels, "Damage by class: the images have no labels."),
        )
        if absent
    ]
