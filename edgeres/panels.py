"""What a page shows of one engine or one benchmark, ready to be drawn; None where a record has nothing to show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from edgeres.charts import Axis, histogram
from edgeres.recipe import Preprocess
from edgeres.report import colors
from edgeres.thumbnails import Judged, thumbnails
from edgeres.words import NONE, between, count, milliseconds, number, probability, spread

Record = dict[str, Any]
WORST = 5
"""Layers that are named beside their chart; all of them are in a table below it."""
HURT = 15
"""Classes that are shown at once."""
TENSORS = 6
"""Histograms of ranges in a page, at most."""
CARDS = 12
"""Changed answers that are shown at once."""
KINDS = {
    "right_to_wrong": "right, now wrong",
    "wrong_to_right": "wrong, now right",
    "wrong_to_wrong": "wrong both times",
    "changed": "another answer",
}
UNITS = {
    "clocks": "MHz",
    "temperatures": "°C",
    "load_1min": "load, 1 minute",
    "steal_percent": "stolen time, %",
    "memory_free_mb": "free memory, MB",
}
PERCENTILES = ("p50", "p90", "p95", "p99", "p99.9")


def layers(r: Record) -> Record | None:
    """Fidelity of each layer in the order of the network, and the worst of them."""
    known = [la for la in r.get("layers") or [] if la["sqnr_db"] is not None]
    if not known:
        return None
    ratios = [la["sqnr_db"] for la in known]
    axis = Axis(min(0.0, *ratios), Axis.around([0.0, *ratios]).hi)
    order = sorted(range(len(known)), key=lambda i: ratios[i])
    worst = set(order[:WORST])
    width = 100 / len(known)
    bars = [
        {
            "at": round(i * width, 3),
            "width": round(0.8 * width, 3),
            "height": axis.at(la["sqnr_db"]),
            "css": "worst" if i in worst else "",
            "text": f"{la['name']}: {number(la['sqnr_db'], 1)} dB",
        }
        for i, la in enumerate(known)
    ]
    ticks = [{"at": round(100 - tick.at, 2), "label": tick.label} for tick in axis.ticks(4)]
    rows = [(la["name"], f"{number(la['sqnr_db'], 1)} dB") for la in known]
    exact = [la["name"] for la in r["layers"] if la["sqnr_db"] is None]
    return {"bars": bars, "ticks": ticks, "rows": rows, "worst": [rows[i] for i in order[:WORST]], "exact": exact}


def ranges(r: Record) -> list[Record] | None:
    """Histograms with the thresholds of each method, and the ones in use."""
    found = []
    for entry in (r.get("ranges") or [])[:TENSORS]:
        edges, counts, used = entry["edges"], entry["counts"], entry["used"]
        filled = [i for i, n in enumerate(counts) if n]
        if not filled:
            continue
        axis = Axis.around([edges[filled[0]], edges[filled[-1] + 1], *used], 0.02)
        methods = [
            {
                "name": method,
                "css": f"c{i % 5 + 1}",
                "text": between(ends, 3),
                "at": [axis.at(end) for end in ends if end],
            }
            for i, (method, ends) in enumerate(entry["thresholds"].items())
        ]
        low, high = axis.at(used[0]), axis.at(used[1])
        found.append(
            {
                "tensor": entry["tensor"],
                "bars": histogram(edges, counts, axis, log=True),
                "ticks": axis.ticks(),
                "methods": methods,
                "used": {"at": low, "width": round(high - low, 2), "text": between(used, 3)},
                "total": f"{sum(counts):,}",
            }
        )
    return found or None


def flips(r: Record, most: int, judged: Judged) -> Record | None:
    """The answers that changed: the first ``most`` with a thumbnail, the rest as rows."""
    flipped = r["flipped"]
    if len(flipped) < min(r["flipped_total"], 1):  # of an earlier version, which counted them alone
        return None
    names = {c["index"]: c["name"] for c in r.get("classes") or [] if c["name"]}

    def answer(index: int | None) -> str:
        return NONE if index is None else names.get(index, f"class {index}")

    shown = flipped[:most]
    preprocess = Preprocess.from_json(r["provenance"]["preprocess"])
    pictures = thumbnails([f["path"] for f in shown], preprocess, judged.images)
    rows = [
        {
            "path": f["path"],
            "kind": f["kind"],
            "words": KINDS[f["kind"]],
            "label": None if f["label"] is None else answer(f["label"]),
            "baseline": f"{answer(f['baseline']['answer'])} {f['baseline']['probability']:.0%}",
            "engine": f"{answer(f['engine']['answer'])} {f['engine']['probability']:.0%}",
            "margin": number(f["margin"], 3),
        }
        for f in flipped
    ]
    cards = [{**row, "thumbnail": picture} for row, picture in zip(rows, pictures, strict=False)]
    kinds = [(kind, words, n) for kind, words in KINDS.items() if (n := sum(f["kind"] == kind for f in flipped))]
    return {
        "first": cards[:CARDS],
        "more": cards[CARDS:],
        "rest": rows[most:],
        "kinds": kinds,
        "total": r["flipped_total"],
        "images": r["images"],
        "listed": len(flipped),
        "others": judged.why,
    }


def classes(r: Record) -> Record | None:
    """Classes by what they lost, the ones for which it is least likely to be chance first."""
    if not r.get("classes"):
        return None
    ordered = sorted(r["classes"], key=lambda c: (c["p_adjusted"], c["won"] - c["lost"], c["index"]))
    largest = max(max(c["lost"], c["won"]) for c in ordered) or 1
    rows = [
        {
            "name": c["name"] or f"class {c['index']}",
            "images": count(c["images"], "image"),
            "baseline": number(100 * c["baseline"] / c["images"], 1),
            "engine": number(100 * c["engine"] / c["images"], 1),
            "lost": c["lost"],
            "won": c["won"],
            "lost_width": round(100 * c["lost"] / largest, 1),
            "won_width": round(100 * c["won"] / largest, 1),
            "p": probability(c["p_adjusted"]),
            "sure": c["p_adjusted"] < 0.05,
        }
        for c in ordered
    ]
    sure = sum(row["sure"] for row in rows)
    return {"first": rows[:HURT], "rest": rows[HURT:], "sure": sure, "total": len(rows)}


def fusion(r: Record, engine: Record | None) -> Record:
    """Notes on what is not as asked, and what the executor really runs, if engine.json is at hand."""
    operators = (engine or {}).get("fusion", {}).get("operators") or {}
    return {"notes": r["notes"], "operators": [(name, f"{n:,}") for name, n in operators.items()]}


def benchmark(latency: Record) -> Record:
    """Distributions, percentiles, speed-up, sweep and conditions of one benchmark."""
    runners = latency["runners"]
    css = dict(zip(runners, colors(list(runners)), strict=True))
    return {
        "note": _setting(latency),
        "names": list(runners),
        "css": css,
        "rows": _rows(runners),
        "ridges": _ridges(runners, css),
        "speedups": _speedups(latency.get("speedup") or {}, css, next(iter(runners), "")),
        "doubts": list(_doubts(latency)),
        "notes": [*(latency.get("notes") or []), *(latency.get("left_out") or [])],
        "sweep": _sweep(latency.get("sweep") or []),
        "conditions": conditions(latency.get("conditions")),
        "machine": latency.get("machine"),
    }


def _setting(latency: Record) -> str:
    streams, sweep = latency.get("streams") or 1, [str(entry["batch"]) for entry in latency.get("sweep") or []]
    more = [f"{streams} streams"] * (streams > 1) + [f"sweep of batches {', '.join(sweep)} below"] * bool(sweep)
    return "; ".join([f"batch {latency['batch']}", *more, f"preset {latency['preset']}"])


def _doubts(latency: Record) -> Iterator[str]:
    """A line for each runner that is not stable, with the reasons; then what else is to be known of each."""
    conditions = (latency.get("conditions") or {}).get("warnings") or []
    for name, run in latency["runners"].items():
        warnings = run.get("warnings") or []
        if run.get("stable") is False:
            yield f"{name} is not stable: {'; '.join([*warnings, *conditions]) or 'no reason is recorded'}"
        else:
            yield from (f"{name}: {warning}" for warning in warnings)


def _rows(runners: Record) -> list[Record]:
    """Rows of the table of a benchmark, a cell for each runner; those without any number are left out."""
    rows: list[Record] = []

    def row(name: str, hint: str, values: list[tuple[str, str]]) -> None:
        if any(value != NONE for value, _ in values):
            cells = [{"value": value, "small": "" if small == NONE else small} for value, small in values]
            rows.append({"name": name, "hint": hint, "cells": cells})

    runs = list(runners.values())
    for key in PERCENTILES:
        intervals = [(run.get("intervals") or {}).get(key) for run in runs]
        cells = [(milliseconds(run.get(key)), spread(ends)) for run, ends in zip(runs, intervals, strict=True)]
        row(key, "ms", cells)
    row("mean", "ms", [(milliseconds(run.get("mean")), "") for run in runs])
    row("variation", "% of the mean", [(number(run.get("cv"), 1), "") for run in runs])
    row("throughput", "images/s", [(number(run.get("images_per_second"), 1), "") for run in runs])
    for key, name in (("copy_in", "copy in"), ("compute", "compute"), ("copy_out", "copy out")):
        row(name, "ms, median", [(milliseconds((run.get("split") or {}).get(key)), "") for run in runs])
    row("enqueue", "ms, median", [(milliseconds(run.get("enqueue")), "") for run in runs])
    energy = [run.get("energy") or {} for run in runs]
    cells = [(number(e.get("joules_per_image"), 4), ", ".join(e.get("rails") or [])) for e in energy]
    row("energy", "J per image, idle power subtracted", cells)
    row("samples", "", [(number(run.get("samples"), 0), f"{number(run.get('seconds'), 1)} s") for run in runs])
    return rows


def _ridges(runners: Record, css: Record) -> Record | None:
    """A histogram for each runner on one axis; the slowest percent of each may lie beyond its end."""
    known = {name: run for name, run in runners.items() if (run.get("histogram") or {}).get("counts")}
    if not known:
        return None
    shapes = [run["histogram"] for run in known.values()]
    low = min(h["edges"][i] for h in shapes for i, n in enumerate(h["counts"]) if n)
    high = max(
        next(run[key] for key in ("p99", "p95", "p90", "p50") if run.get(key) is not None) for run in known.values()
    )
    axis = Axis(low - 0.03 * (high - low or low), high + 0.1 * (high - low or low))
    rows = []
    for name, run in known.items():
        shape = run["histogram"]
        beyond = sum(n for edge, n in zip(shape["edges"], shape["counts"], strict=False) if edge >= axis.hi)
        marks = [{"at": axis.at(run[key]), "label": key} for key in ("p50", "p90", "p99") if run.get(key) is not None]
        text = ", ".join(
            f"{key} {milliseconds(run[key])} ms" for key in ("p50", "p90", "p99") if run.get(key) is not None
        )
        more = f"; {count(beyond, 'sample')} beyond {milliseconds(axis.hi)} ms" if beyond else ""
        bars = histogram(shape["edges"], shape["counts"], axis)
        rows.append({"name": name, "css": css[name], "bars": bars, "marks": marks, "text": text + more})
    return {"rows": rows, "ticks": axis.ticks()}


def _speedups(speedup: Record, css: Record, first: str) -> Record | None:
    known = {name: s for name, s in speedup.items() if s and s.get("of_p50") is not None}
    if not known:
        return None
    axis = Axis.around([0.0, 1.0, *(v for s in known.values() for v in (s["of_p50"], *(s["interval"] or ())))])
    axis = Axis(0.0, axis.hi)
    rows = []
    for name, s in known.items():
        ends: Sequence[float] = s["interval"] or [s["of_p50"]] * 2
        text = f"{number(s['of_p50'])}x" + (f" ({between(ends)})" if s["interval"] else "")
        places = {"at": axis.at(s["of_p50"]), "lo": axis.at(ends[0]), "hi": axis.at(ends[1])}
        rows.append({"name": name, "css": css.get(name, "c0"), "text": text, **places})
    lines = [{"at": axis.at(1), "css": "zero", "label": f"as fast as {first}"}]
    return {"rows": rows, "ticks": axis.ticks(), "lines": lines}


def _sweep(entries: list[Record]) -> Record | None:
    if not entries:
        return None
    names = list(dict.fromkeys(name for entry in entries for name in entry["runners"]))
    rows = []
    for entry in entries:
        runs = [entry["runners"].get(name) or {} for name in names]
        cells = [
            {"value": number(run.get("images_per_second"), 1), "small": f"p50 {milliseconds(run.get('p50'))} ms"}
            for run in runs
        ]
        rows.append({"name": f"batch {entry['batch']}", "hint": "images/s", "cells": cells})
    return {"names": names, "rows": rows}


def conditions(record: Record | None) -> Record | None:
    """Rows (what, before, after) of what was known of the machine, and what makes the measurement doubtful."""
    if not record:
        return None
    before, after = (dict(_flat(record.get(key) or {})) for key in ("before", "after"))
    names = [name for name in dict.fromkeys([*before, *after]) if (before.get(name), after.get(name)) != (None, None)]
    rows = [(name, _plain(before.get(name)), _plain(after.get(name))) for name in names]
    return {"rows": rows, "warnings": list(record.get("warnings") or [])}


def _flat(record: Record, unit: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, UNITS.get(key, key.replace("_", " ")))
        else:
            yield UNITS.get(key, key.replace("_", " ")) + f", {unit}" * bool(unit), value


def _plain(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
