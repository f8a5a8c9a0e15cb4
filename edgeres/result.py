"""The record of one validation, result.json: made here, read here, checked field by field."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeres import machine
from edgeres.errors import InputError
from edgeres.outcomes import ABSENT, Outcomes
from edgeres.statistics import holm, mcnemar, paired, wilson
from edgeres.validate import Comparison, Shard

FORMAT = "edgeres result 2"
FORMER = "edgeres result 1"
"""Of edgeres before 0.2: without labels, intervals of accuracies, classes, flipped images, reasons, shards."""
VERDICTS = ("PASS", "NOT ENOUGH IMAGES", "NO LABELS", "FAIL")
"""What a budget may come to. Only the first is a pass; without labels no number of images would be."""
WORD = ", ".join(VERDICTS)
MOST_FLIPPED = 200
"""Changed answers that are listed one by one."""


def result(
    name: str,
    engine: dict[str, Any],
    measured: dict[str, Any],
    judged: dict[str, Any],
    sides: Sequence[dict[str, Any]],
    skipped: Sequence[str],
    digests: dict[str, Any],
    images_of: int,
    shard: Shard | None = None,
    latency: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of one validation. Others' scripts read these names: fields are added, never renamed.

    ``engine`` is the engine's own record, ``measured`` what `measured` gives, ``judged`` what `verdict.judge` gives.
    ``sides`` are what was measured of baseline and engine besides accuracy. ``images_of``: images in the whole set.
    """
    precision = engine["precision"]
    named = {"name": "FP32", "precision": "fp32"}, {"name": precision.upper(), "precision": precision}
    both = {
        side: {**title, **measured[side], **more}
        for side, title, more in zip(("baseline", "engine"), named, sides, strict=True)
    }
    return {
        "format": FORMAT,
        "name": name,
        "model": f"resnet{engine['depth']} {engine['variant'] or ''}".strip() if engine.get("depth") else name,
        "target": engine["target"],
        "precision": precision,
        "shard": vars(shard) if shard else None,
        "images_of": images_of,
        "skipped": list(skipped),
        **measured,
        **both,
        **judged,
        "latency": latency,
        "layers": [{"name": n, "sqnr_db": db} for n, db in engine.get("layers", {}).items()] or None,
        "ranges": engine.get("ranges") or None,
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


def measured(rows: Outcomes, path: Callable[[int], str], name: Callable[[int], str | None]) -> dict[str, Any]:
    """Every field that is computed from ``rows`` alone. ``path`` of an image by its place, ``name`` of a class.

    Accuracies and agreement are in percent, drops in percentage points, KL in nats. ``sqnr_db`` is inf, null in JSON,
    where engine and baseline agree to the last bit. What needs labels is None without them.
    """
    c = Comparison.of(rows)
    n = c.images
    sides: list[dict[str, Any]] = []
    for first, fifth in (c.baseline, c.engine):
        values = (100 * first / n, 100 * fifth / n, list(wilson(first, n)), list(wilson(fifth, n)))
        keys = ("top1", "top5", "top1_interval", "top5_interval")
        sides.append(dict(zip(keys, values if c.labels else [None] * 4, strict=True)))
    drop: dict[str, Any] | None = None
    flips: dict[str, int] | None = None
    if c.labels:
        drop = dict(zip(("top1", "top5"), c.drop(), strict=True))
        drop |= {"interval": list(c.interval()), "top5_interval": list(paired(c.lost5, c.won5, n))}
        drop["p_value"] = c.p_value()
        flips = {key: getattr(c, key) for key in ("right_to_wrong", "wrong_to_right", "wrong_to_wrong")}
    return {
        "images": n,
        "labels": c.labels,
        "baseline": sides[0],
        "engine": sides[1],
        "drop": drop,
        "flips": flips,
        "classes": classes(rows, name) if c.labels else None,
        "flipped": flipped(rows, path),
        "flipped_total": n - c.same_top1,
        "agreement": {"top1": 100 * c.same_top1 / n, "top5": 100 * c.shared_top5 / n},
        "sqnr_db": c.sqnr_db(),
        "kl": c.divergence / n,
    }


def classes(rows: Outcomes, name: Callable[[int], str | None]) -> list[dict[str, Any]]:
    """Every class with images: hits of both sides, what was lost and won, and whether that is chance."""
    before, after = rows.hits(rows.baseline_top)[0], rows.hits(rows.engine_top)[0]
    size = int(rows.label.max()) + 1
    counts = {
        key: np.bincount(rows.label[which], minlength=size)
        for key, which in {
            "images": np.ones(len(rows), bool),
            "baseline": before,
            "engine": after,
            "lost": before & ~after,
            "won": ~before & after,
        }.items()
    }
    p_values = [mcnemar(int(lost), int(won)) for lost, won in zip(counts["lost"], counts["won"], strict=True)]
    there = np.flatnonzero(counts["images"]).tolist()
    adjusted = holm([p_values[i] for i in there])
    return [
        {
            "index": i,
            "name": name(i),
            **{key: int(count[i]) for key, count in counts.items()},
            "p_value": p_values[i],
            "p_adjusted": p,
        }
        for i, p in zip(there, adjusted, strict=True)
    ]


def flipped(rows: Outcomes, path: Callable[[int], str]) -> list[dict[str, Any]]:
    """Changed answers, at most `MOST_FLIPPED`: first where the baseline was surest."""
    before, after = rows.baseline_top[:, 0], rows.engine_top[:, 0]
    changed = np.flatnonzero(before != after)
    order = changed[np.lexsort((rows.index[changed], -rows.margin[changed]))][:MOST_FLIPPED]
    return [
        {
            "index": int(rows.index[i]),
            "path": path(int(rows.index[i])),
            "label": int(rows.label[i]) if rows.label[i] != ABSENT else None,
            "baseline": {"answer": int(before[i]), "probability": float(rows.baseline_probability[i])},
            "engine": {"answer": int(after[i]), "probability": float(rows.engine_probability[i])},
            "margin": float(rows.margin[i]),
            "kind": _kind(int(rows.label[i]), int(before[i]), int(after[i])),
        }
        for i in order.tolist()
    ]


def _kind(label: int, before: int, after: int) -> str:
    if label == ABSENT:
        return "changed"
    return {before: "right_to_wrong", after: "wrong_to_right"}.get(label, "wrong_to_wrong")


SIDES = ("baseline", "engine")
FIELDS = (
    ("object", "* agreement budget provenance provenance.digests provenance.built_with provenance.preprocess"),
    ("object", "provenance.versions provenance.machine"),
    ("object?", "drop flips shard budget.accepted latency *.latency_ms provenance.quantization"),
    ("list", "skipped flipped reasons notes"),
    ("list?", "classes layers ranges verdicts"),
    ("object", "flipped[] flipped[].* classes[] layers[] ranges[]"),
    ("text", "name model target precision *.name *.precision skipped[] reasons[] notes[] budget.accepted.path"),
    ("text", "flipped[].path flipped[].kind layers[].name ranges[].tensor"),
    ("text", "provenance.digests.model provenance.digests.images provenance.digests.engine"),
    ("text?", "classes[].name"),
    (f"{WORD}?", "verdict"),
    (WORD, "verdicts[]"),
    ("true or false", "labels"),
    ("count", "images images_of flipped_total flips.right_to_wrong flips.wrong_to_right shard.index shard.of"),
    ("count", "*.size_bytes *.latency_ms.batch *.latency_ms.samples flipped[].index flipped[].*.answer"),
    ("count", "classes[].index classes[].images classes[].* classes[].lost classes[].won"),
    ("count?", "images_needed flips.wrong_to_wrong flipped[].label"),
    ("number", "drop.top1 drop.top5 drop.p_value agreement.top1 agreement.top5 kl"),
    ("number", "*.latency_ms.p50 *.latency_ms.p90 *.latency_ms.p99 budget.accepted.top1 budget.accepted.max_loss"),
    ("number", "flipped[].margin flipped[].*.probability classes[].p_value classes[].p_adjusted"),
    ("number?", "*.top1 *.top5 sqnr_db budget.max_drop budget.min_relative layers[].sqnr_db"),
    ("pair of numbers", "drop.interval"),
    ("pair of numbers?", "drop.top5_interval *.top1_interval *.top5_interval"),
)
"""What fields are, in the order of checking: what holds a field comes before it.

``?``: or null. ``[]``: each of a list. ``*``: baseline and engine.
"""


def load(path: Path) -> list[dict[str, Any]]:
    """The results in a file that `validate` or `run` wrote, one or a list; `InputError` naming what is wrong.

    Those of earlier versions get the fields of this one, as far as they can be computed.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read result {path}", evidence=str(error)) from error
    records = value if isinstance(value, list) else [value]
    if not records:
        raise InputError(f"{path} holds no results")
    for record in records:
        form = record.get("format") if isinstance(record, dict) else None
        if form not in (FORMAT, FORMER):
            raise InputError(
                f"{path} is not a result",
                evidence=f"its format is {form!r}, expected {FORMAT!r}",
                hint="`edgeres validate` writes one",
            )
        try:
            if form == FORMER:
                _fill(record)
            record.setdefault("verdicts", None)  # the first results of this format have none
            wrong = next(_wrong(record), None)
        except (AttributeError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            raise InputError(f"result {path} is damaged", evidence=wrong, hint="validate again to write it anew")
    return records


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _fill(record: dict[str, Any]) -> None:
    """Give a record of the former format the fields it lacks."""
    n, precision = record["images"], record["precision"]
    for side, name, kind in (("baseline", "FP32", "fp32"), ("engine", precision.upper(), precision)):
        intervals = {f"{key}_interval": list(wilson(round(record[side][key] * n / 100), n)) for key in ("top1", "top5")}
        record[side] = {"name": name, "precision": kind, **intervals, **record[side]}
    record["drop"].setdefault("top5_interval", None)
    record["flips"].setdefault("wrong_to_wrong", None)
    record["budget"] = {"min_relative": None, "accepted": None, **record["budget"]}
    more = {"labels": True, "images_of": n, "shard": None, "reasons": [], "flipped": []}
    more["flipped_total"] = round((100 - record["agreement"]["top1"]) * n / 100)
    more |= dict.fromkeys(("classes", "latency", "layers", "ranges"))
    record |= {key: value for key, value in more.items() if key not in record}


def _wrong(record: dict[str, Any]) -> Iterator[str]:
    """A line for each field that is missing or not what it should be."""
    for kind, paths in FIELDS:
        name, optional = kind.removesuffix("?"), kind.endswith("?")
        for path in (p.replace("*", side) for p in paths.split() for side in (SIDES if "*" in p else SIDES[:1])):
            for place, value in _at(record, path):
                if value is ...:
                    yield f"{place} is missing"
                elif not (_is(value, name) or (optional and value is None)):
                    yield f"{place} is {json.dumps(value)[:40]}, not {name}{' or null' * optional}"
    if record["labels"] and record["drop"] is None:
        yield "drop is null, though there are labels"


def _at(value: Any, path: str, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every (place, value) at a dotted path; ... where there is none. Below null there is nothing to find."""
    key, _, rest = path.partition(".")
    name = key.removesuffix("[]")
    found = value.get(name, ...)
    items = [(f"{place}{name}", found)]
    if key.endswith("[]"):
        items = [(f"{place}{name}[{i}]", item) for i, item in enumerate(found or ())]
    for where, item in items:
        if not rest:
            yield where, item
        elif item is not None:
            yield from _at(item, rest, f"{where}.")


def _is(value: Any, kind: str) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    kinds: dict[str, Callable[[], bool]] = {
        "object": lambda: isinstance(value, dict),
        "list": lambda: isinstance(value, list),
        "text": lambda: isinstance(value, str),
        WORD: lambda: value in VERDICTS,
        "true or false": lambda: isinstance(value, bool),
        "number": lambda: number,
        "count": lambda: number and isinstance(value, int) and value >= 0,
        "pair of numbers": lambda: isinstance(value, list) and len(value) == 2 and all(_is(v, "number") for v in value),
    }
    return kinds[kind]()
