"""The record of one validation, result.json: made here, read here, checked field by field."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeres import machine, schema
from edgeres.errors import InputError, UsageError
from edgeres.outcomes import ABSENT, Outcomes
from edgeres.recipe import Preprocess
from edgeres.statistics import holm, mcnemar, paired, wilson
from edgeres.validate import Comparison, Shard
from edgeres.words import number

FORMAT = "edgeres result 2"
FORMER = "edgeres result 1"
"""Of edgeres before 0.2: without labels, intervals of accuracies, classes, flipped images, reasons, shards."""
SIDES, VERDICTS = schema.SIDES, schema.VERDICTS
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
        "notes": [*([] if shard else doubts(measured)), *engine["fusion"]["notes"]],
        "provenance": {
            "digests": {**digests, "engine": engine["sha256"]},
            "preprocess": engine["preprocess"],
            "quantization": engine.get("quantization"),
            "built_with": engine["built_with"],
            "versions": machine.versions("numpy", "onnxruntime", "pillow"),
            "machine": machine.describe(),
        },
    }


def doubts(measured: dict[str, Any]) -> list[str]:
    """Says where FP32 itself knows nothing of the images, so that no drop from it proves anything.

    It does where FP32 is not shown to be right more often than who always answers with the commonest class, and is
    shown to be wrong on three of four: labels in another order look like that, and so does another preprocess.
    """
    if not measured["labels"]:
        return []
    best_blind = max(row["images"] for row in measured["classes"]) / measured["images"]
    low, high = measured["baseline"]["top1_interval"]
    if low > 100 * best_blind or high > 25:
        return []
    top1 = number(measured["baseline"]["top1"])
    return [
        f"FP32 itself is right on only {top1} % of the images, as by chance: are labels and preprocess the model's?"
    ]


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


def load(path: Path) -> list[dict[str, Any]]:
    """The results in a file that `validate` or `run` wrote, one or a list; `InputError` naming what is wrong.

    Those of earlier versions get the fields of this one, as far as they can be computed.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        evidence = (isinstance(error, OSError) and error.strerror) or str(error)
        hint = "give an engine folder, or a result.json: `edgeres validate` writes it beside the engine"
        raise InputError(f"cannot read result {path}", evidence=evidence, hint=hint) from error
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
        again = f"result {path}", "validate again to write it anew"
        if form == FORMER:
            schema.refuse(schema.wrong(record, schema.FORMER), *again)
            _fill(record)
        record.setdefault("verdicts", None)  # the first results of this format have none
        schema.refuse(schema.wrong(record, schema.RESULT), *again)
        schema.refuse(_at_odds(record), *again)
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


def _at_odds(record: dict[str, Any]) -> Iterator[str]:
    """A line for each field that does not go with another, or with what reads it."""
    if record["labels"] and record["drop"] is None:
        yield "drop is null, though there are labels"
    for side, key in itertools.product(SIDES, ("top1", "top5")):
        if record["drop"] and record[side][key] is None:
            yield f"{side}.{key} is null, though there is a drop"
    if record["verdict"] and not record["reasons"] and None in (record["drop"], record["budget"]["max_drop"]):
        yield "reasons is [], though there is a verdict"
    try:
        Preprocess.from_json(record["provenance"]["preprocess"])
    except UsageError as error:
        yield f"provenance.preprocess: {error.cause}"
