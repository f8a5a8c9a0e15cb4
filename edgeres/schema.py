"""What the fields are of records that are read back: results, benchmarks, engines. A file may come from anywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from edgeres.errors import InputError
from edgeres.recipe import PRECISIONS

SIDES = ("baseline", "engine")
VERDICTS = ("PASS", "NOT ENOUGH IMAGES", "NO LABELS", "FAIL")
"""What a budget may come to. Only the first is a pass; without labels no number of images would be."""
WORD = ", ".join(VERDICTS)
LEAST, MOST = 1e-100, 1e100
"""No number of a record comes near them, and what is reckoned from those between stays finite."""

Fields = tuple[tuple[str, str], ...]
"""(kind, paths of fields of that kind), in the order of checking: what holds a field comes before it.

A kind is one of `KINDS`, some of them with " or " between, or words with commas between. In a path ``[]`` is each of a
list, ``{}`` each of an object, ``*`` baseline and engine; a field with ``?`` may be missing.
"""
LATENCY: Fields = (
    ("object", "runners runners{} conditions"),
    ("list", "runners{}.warnings conditions.warnings"),
    ("object or null", "speedup? speedup{} conditions.before? conditions.after? machine?"),
    ("object or null", "runners{}.intervals? runners{}.split? runners{}.energy? runners{}.histogram?"),
    ("list or null", "sweep? notes? left_out?"),
    ("object", "sweep[] sweep[].runners"),
    ("object or null", "sweep[].runners{}"),
    ("text", "preset runners{}.warnings[] conditions.warnings[] notes[] left_out[]"),
    ("true or false", "runners{}.stable"),
    ("count above 0", "batch streams sweep[].batch"),
    ("number above 0", "runners{}.p50"),
    ("number above 0 or null", "runners{}.p90? runners{}.p95? runners{}.p99? runners{}.p99.9? speedup{}.of_p50"),
    ("number or null", "runners{}.mean? runners{}.cv? runners{}.images_per_second? runners{}.seconds?"),
    ("number or null", "runners{}.samples? runners{}.split{} runners{}.enqueue? runners{}.energy.joules_per_image?"),
    ("number or null", "sweep[].runners{}.p50? sweep[].runners{}.images_per_second?"),
    ("interval [low, high] above 0 or null", "runners{}.intervals{} speedup{}.interval"),
    ("object or list or null", "runners{}.energy.rails?"),
    ("text", "runners{}.energy.rails[]"),
    ("list of numbers", "runners{}.histogram.edges"),
    ("list of counts", "runners{}.histogram.counts"),
    ("object with an edge more than counts or null", "runners{}.histogram?"),
    ("object whose percentiles lie in its histogram", "runners{}"),
    ("list or null", "machine.gpus?"),
    ("object, not deep, with lists of one kind or null", "machine? conditions.before? conditions.after?"),
)
"""Of a benchmark, which results have as ``latency``."""
RESULT: Fields = (
    ("object", "* agreement budget provenance provenance.digests provenance.built_with provenance.preprocess"),
    ("object", "provenance.versions provenance.machine"),
    ("object or null", "drop flips shard budget.accepted latency *.latency_ms provenance.quantization"),
    ("object or null", "provenance.bundle?"),
    ("list", "skipped flipped reasons notes"),
    ("list or null", "classes layers ranges verdicts provenance.machine.gpus?"),
    ("object", "flipped[] flipped[].* classes[] layers[] ranges[] ranges[].thresholds provenance.machine.gpus[]"),
    ("text", "name model target *.name skipped[] reasons[] notes[] budget.accepted.path"),
    (", ".join(PRECISIONS), "precision *.precision"),
    ("text", "flipped[].path layers[].name ranges[].tensor provenance.machine.gpus[].name"),
    ("text", "provenance.digests.model provenance.digests.images provenance.digests.engine"),
    ("text or null", "classes[].name provenance.digests.outcomes? provenance.host? provenance.machine.cpu?"),
    ("text or object or null", "provenance.digests{}"),
    (f"{WORD} or null", "verdict"),
    (WORD, "verdicts[]"),
    ("right_to_wrong, wrong_to_right, wrong_to_wrong, changed", "flipped[].kind"),
    ("true or false", "labels"),
    ("count above 0", "images images_of *.size_bytes shard.index shard.of classes[].images"),
    ("count", "flipped_total flips.right_to_wrong flips.wrong_to_right"),
    ("count", "*.latency_ms.batch *.latency_ms.samples flipped[].index flipped[].*.answer"),
    ("count", "classes[].index classes[].* classes[].lost classes[].won"),
    ("count or null", "images_needed flips.wrong_to_wrong flipped[].label provenance.quantization.images?"),
    ("number", "drop.top1 drop.top5 kl budget.accepted.max_loss flipped[].margin"),
    ("number or null", "sqnr_db budget.max_drop budget.min_relative layers[].sqnr_db"),
    ("number above 0", "*.latency_ms.p50 *.latency_ms.p90 *.latency_ms.p99"),
    ("number from 0 to 1", "drop.p_value flipped[].*.probability classes[].p_value classes[].p_adjusted"),
    ("number from 0 to 100", "agreement.top1 agreement.top5 budget.accepted.top1"),
    ("number from 0 to 100 or null", "*.top1 *.top5"),
    ("interval [low, high]", "drop.interval ranges[].used ranges[].thresholds{}"),
    ("interval [low, high] or null", "drop.top5_interval *.top1_interval *.top5_interval"),
    ("list of numbers", "ranges[].edges"),
    ("list of counts", "ranges[].counts"),
    ("object with an edge more than counts", "ranges[]"),
    ("object, not deep, with lists of one kind", "provenance"),
    *((kind, " ".join(f"latency.{path}" for path in paths.split())) for kind, paths in LATENCY),
)
FORMER: Fields = (
    ("object", "* drop flips budget agreement"),
    (", ".join(PRECISIONS), "precision"),
    ("count above 0", "images"),
    ("number from 0 to 100", "*.top1 *.top5 agreement.top1"),
)
"""Of a result before 0.2: what its other fields are computed from."""
ENGINE: Fields = (
    ("object", "fusion? built_with? made_from? options?"),
    ("object or null", "fusion.operators?"),
    ("list or null", "kept_fp32?"),
    ("text", "sha256? precision? target? kept_fp32[] made_from.model?"),
    ("text or null", "executor? io?"),
    ("count", "fusion.operators{}"),
    ("count or null", "classes? size_bytes?"),
)
"""Of an engine.json: what is read before anything else can say that it is damaged."""


def refuse(found: Iterable[str], what: str, hint: str) -> None:
    """Raise `InputError` that ``what`` is damaged with the first line ``found``, if there is one."""
    try:
        line = next(iter(found), None)
    except RecursionError as error:  # lists in lists in lists
        line = str(error)
    if line:
        raise InputError(f"{what} is damaged", evidence=line, hint=hint)


def wrong(record: dict[str, Any], fields: Fields) -> Iterator[str]:
    """A line for each field that is missing or not what it should be."""
    for kind, paths in fields:
        for path in paths.split():
            for place, value in _at(record, re.split(r"\.(?!\d)", path), ""):  # p99.9 is one name
                if value is ...:
                    yield f"{place} is missing"
                elif not any(KINDS[k](value) if k in KINDS else value in k.split(", ") for k in kind.split(" or ")):
                    yield f"{place} is {json.dumps(value)[:40]}, not {kind}"


def _at(value: Any, path: list[str], place: str) -> Iterator[tuple[str, Any]]:
    """Every (place, value) at a path; ... where there is none. What is no object has no fields to look for."""
    if not isinstance(value, dict):
        return
    key, *rest = path
    name = key.rstrip("?[]{}")
    found = value.get(name, ...)
    items = [(f"{place}{name}", found)]
    if key == "*":
        items = [(f"{place}{side}", value.get(side, ...)) for side in SIDES]
    elif key.endswith("[]"):
        items = [(f"{place}{name}[{i}]", item) for i, item in enumerate(found if isinstance(found, list) else ())]
    elif key.endswith("{}"):
        each = found.items() if isinstance(found, dict) else ()
        items = [(f"{place}{name}.{json.dumps(k)[1:-1]}", item) for k, item in each]
    elif key.endswith("?") and found is ...:
        return
    for where, item in items:
        if rest:
            yield from _at(item, rest, f"{where}.")
        else:
            yield where, item


def _number(value: Any, low: float = -MOST, high: float = MOST) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _count(value: Any, low: int = 0) -> bool:
    return isinstance(value, int) and _number(value, low)


def _interval(value: Any, low: float = -MOST) -> bool:
    return _numbers(value) and len(value) == 2 and low <= value[0] <= value[1]


def _numbers(value: Any, kind: Callable[[Any], bool] = _number) -> bool:
    return isinstance(value, list) and all(map(kind, value))


def _drawn(runner: dict[str, Any]) -> bool:
    """Whether some sample of its histogram is as short as the largest percentile that a page looks at."""
    shape = runner.get("histogram") or {"counts": []}
    first = next((edge for edge, n in zip(shape.get("edges", ()), shape["counts"], strict=False) if n), None)
    if first is None:
        return not shape["counts"]
    return bool(first <= next(p for key in ("p99", "p95", "p90", "p50") if (p := runner.get(key)) is not None))


def _tidy(value: Any, deepest: int = 20) -> bool:
    """Whether it can be shown whatever its fields are: each list in it holds objects alone, or none."""
    if isinstance(value, dict):
        return deepest > 0 and all(_tidy(item, deepest - 1) for item in value.values())
    if isinstance(value, list):
        alike = len({isinstance(item, dict) for item in value}) < 2
        return deepest > 0 and alike and all(_tidy(item, deepest - 1) for item in value)
    return True


KINDS: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "object with an edge more than counts": lambda v: isinstance(v, dict) and len(v["edges"]) == 1 + len(v["counts"]),
    "object whose percentiles lie in its histogram": _drawn,
    "object, not deep, with lists of one kind": lambda v: isinstance(v, dict) and _tidy(v),
    "list": lambda v: isinstance(v, list),
    "list of numbers": _numbers,
    "list of counts": lambda v: _numbers(v, _count),
    "text": lambda v: isinstance(v, str),
    "null": lambda v: v is None,
    "true": lambda v: v is True,
    "false": lambda v: v is False,
    "number": _number,
    "number above 0": lambda v: _number(v, LEAST),
    "number from 0 to 1": lambda v: _number(v, 0, 1),
    "number from 0 to 100": lambda v: _number(v, 0, 100),
    "count": _count,
    "count above 0": lambda v: _count(v, 1),
    "interval [low, high]": _interval,
    "interval [low, high] above 0": lambda v: _interval(v, LEAST),
}
