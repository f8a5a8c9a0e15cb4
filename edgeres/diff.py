"""Two results, or two engines: what changed from A to B, and whether B is worse beyond noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import RenderableType

from edgeres import engine_layers, result
from edgeres.diff_table import plain, shown
from edgeres.errors import InputError, StaleError
from edgeres.files import read_json
from edgeres.outcomes import Outcomes, beside
from edgeres.publish import engine_record
from edgeres.report import Column, speedup
from edgeres.statistics import mcnemar, paired, unpaired

Record = dict[str, Any]
FORMAT = "edgeres diff 1"
SLOWER, SHARE = 0.10, 0.01
"""A layer's time has changed if by more than a tenth of it, and more than a hundredth of all layers' time."""
FAINTER = 1.0
"""A layer's fidelity has changed if by so many dB."""


@dataclass(frozen=True)
class Side:
    """A or B: the result, the engine's record, and its layers (label -> types, ms), as far as there are any."""

    path: str
    result: Record | None
    engine: Record | None
    outcomes: Outcomes | None
    layers: dict[str, tuple[str, float | None]] | None

    @classmethod
    def open(cls, path: Path) -> Side:
        """Whatever lies at ``path``, a result, an engine's folder or an engine.json, with what lies beside it."""
        folder = path if path.is_dir() else path.parent
        is_engine = path.is_dir() or path.name == "engine.json"
        file = folder / "result.json" if is_engine else path
        record = _result(file) if not is_engine or file.is_file() else None
        engine = engine_record(folder)
        if engine is None and is_engine:
            hint = "give a result.json, an engine folder or an engine.json"
            raise InputError(f"no engine at {path}", evidence=f"there is no engine.json in {folder}", hint=hint)
        if record and engine and engine.get("sha256") != record["provenance"]["digests"]["engine"]:
            if is_engine:
                hint = "validate the engine again, or delete the result"
                raise StaleError(f"{file} is of another engine than the one beside it", hint=hint)
            engine = None
        rows = None
        digest = record["provenance"]["digests"].get("outcomes") if record else None
        if digest and beside(file).is_file():
            rows = Outcomes.load(beside(file), digest)
        return cls(str(path), record, engine, rows, _layers(folder, engine) if engine else None)

    @property
    def column(self) -> Column | None:
        """The engine as reports show it."""
        return Column("", "", self.result, self.result["engine"], True) if self.result else None

    def value(self, *keys: str) -> Any:
        """What the result says there, else the engine's record, else None."""
        for record in (self.result, self.engine):
            found: Any = record
            for key in keys:
                found = found.get(key) if isinstance(found, dict) else None
            if found is not None:
                return found
        return None


def _result(file: Path) -> Record:
    records = result.load(file)
    if len(records) > 1:
        raise InputError(f"{file} holds {len(records)} results", hint="give the result.json of one engine")
    return records[0]


def _layers(folder: Path, engine: Record) -> dict[str, tuple[str, float | None]] | None:
    file = folder / engine_layers.FILE
    if not file.is_file():
        return None
    kept = read_json(file, "the layers of an engine")
    if kept.get("sha256", engine.get("sha256")) != engine.get("sha256"):
        raise StaleError(f"{file} is of another engine", hint="build this one again, or delete the file")
    raw, times, *_ = engine_layers.read_kept(kept, str(file))
    found: dict[str, tuple[str, float | None]] = {}
    for layer in engine_layers.read(raw, times):
        if layer.kind in engine_layers.IDLE:
            continue
        label, twin = layer.label, 1
        while label in found:
            twin += 1
            label = f"{layer.label} ({twin})"
        found[label] = layer.types, layer.ms
    return found


def diff(a: Path, b: Path) -> tuple[Record, RenderableType]:
    """What changed from ``a`` to ``b``, as JSON values and for a person. ``worse`` of it lists what got worse.

    Worse counts only where it is beyond noise: where the whole 95% interval of a loss lies on the wrong side.
    ``incomparable`` lists what must be the same of both, "network" and "images", and is not.
    """
    left, right = Side.open(a), Side.open(b)
    other = {"network": other_network(left, right), "images": other_images(left, right)}
    value: Record = {
        "format": FORMAT,
        "a": left.path,
        "b": right.path,
        "accuracy": accuracy(left, right),
        "latency": latency(left, right),
        "fidelity": fidelity(left, right),
        "energy": energy(left, right),
        "size_bytes": _pair(left, right, "size_bytes") or _pair(left, right, "engine", "size_bytes"),
        "layers": layers(left, right),
        "versions": dict(_changes(_versions(left), _versions(right))),
        "made_from": dict(_changes(_made_from(left), _made_from(right))),
    }
    parts = {"top-1": value["accuracy"], "p50": value["latency"]}
    value["worse"] = [name for name, part in parts.items() if part["change"] == "worse"]
    value["incomparable"] = [name for name, why in other.items() if why]
    return value, shown(value)


def other_network(a: Side, b: Side) -> str:
    """How B is made from another network than A, as far as is known; empty if it is not.

    The same weights are the same network, however they were exported.
    """
    models = [_digest(side, "model") or side.value("made_from", "model") for side in (a, b)]
    weights = [side.value("provenance", "digests", "weights", "sha256") for side in (a, b)]
    if None in models or models[0] == models[1] or (weights[0] and weights[0] == weights[1]):
        return ""
    return f"the FP32 models differ: {models[0][:12]} and {models[1][:12]}"


def other_images(a: Side, b: Side) -> str:
    """How B was validated on other images than A, which may be easier; empty if it was not, or there is no accuracy."""
    if _top1(a) is None or _top1(b) is None or not a.result or not b.result:
        return ""
    if _digest(a, "images") != _digest(b, "images"):
        return "the images differ, and others may be easier; validate both on the same"
    if a.outcomes and b.outcomes:
        some = np.intersect1d(a.outcomes.index, b.outcomes.index).size
        return "" if some else "A and B are parts of one set, without an image in common"
    if any(a.result[key] != b.result[key] for key in ("shard", "images", "skipped")):
        return "A and B are parts of one set; to compare what both have, the outcomes.npz of both would be needed"
    return ""


def accuracy(a: Side, b: Side) -> Record:
    """Top-1 of both, the drop from A to B with its interval, and ``change``: worse, better, none, or unknown."""
    top1 = [_top1(a), _top1(b)]
    unknown = {"top1": top1, "drop": None, "interval": None, "p_value": None, "how": None, "change": "unknown"}
    if top1[0] is None or top1[1] is None:
        without = " and ".join(name for name, value in zip("AB", top1, strict=True) if value is None)
        return {**unknown, "note": f"there is no accuracy of {without}"}
    assert a.result
    assert b.result
    if obstacle := other_network(a, b) or other_images(a, b):
        return {**unknown, "note": f"not judged: {obstacle}"}
    if (rows := _digest(a, "outcomes")) and rows == _digest(b, "outcomes"):  # also where they are not at hand
        n = a.result["images"]
        judged = _judged(0.0, paired(0, 0, n), 0.0) | {"lost": 0, "won": 0, "images": n, "p_value": 1.0}
        return {**unknown, **judged, "how": "paired by image", "note": "every answer of B is A's to the last bit"}
    if a.outcomes and b.outcomes:
        same, i, j = np.intersect1d(a.outcomes.index, b.outcomes.index, return_indices=True)
        before = a.outcomes.hits(a.outcomes.engine_top)[0][i]
        after = b.outcomes.hits(b.outcomes.engine_top)[0][j]
        lost, won, n = int((before & ~after).sum()), int((~before & after).sum()), len(same)
        counts = {"lost": lost, "won": won, "images": n, "p_value": mcnemar(lost, won)}
        judged = _judged(100 * (lost - won) / n, paired(lost, won, n), 0.0)
        of = [s["images"] for s in (a.result, b.result)]
        note = f"compared on the {n:,} images of both; A has {of[0]:,}, B {of[1]:,}" if of != [n, n] else None
        return {**unknown, **counts, **judged, "how": "paired by image", "note": note}
    hits = [(round(s["engine"]["top1"] * s["images"] / 100), s["images"]) for s in (a.result, b.result)]
    note = "not paired image by image: the outcomes.npz of both would be needed, so only a large loss shows"
    drop = 100 * (hits[0][0] / hits[0][1] - hits[1][0] / hits[1][1])
    return {**unknown, **_judged(drop, unpaired(*hits), 0.0), "how": "not paired", "note": note}


def _judged(value: float, ends: tuple[float, float] | list[float], nothing: float) -> Record:
    """A loss with its interval, and what it means: more than ``nothing`` is worse."""
    change = "worse" if ends[0] > nothing else "better" if ends[1] < nothing else "none"
    return {"drop": value, "interval": list(ends), "change": change}


def _top1(side: Side) -> float | None:
    return side.result["engine"]["top1"] if side.result else None


def latency(a: Side, b: Side) -> Record:
    """p50 of both and the ratio B to A with its interval; ``change`` as in `accuracy`, if both can be compared.

    The interval reaches from the ends of one to the other's, which for two independent measurements is cautious. Where
    FP32 of the same model and executor was measured beside both, a loss counts only if it is one against that too:
    otherwise it is the machine that got slower.
    """
    columns = a.column, b.column
    p50 = [c.p50 if c else None for c in columns]
    ends = [c.p50_interval if c else None for c in columns]
    ratio = p50[1] / p50[0] if p50[0] and p50[1] else None
    found: Record = {"p50": p50, "ratio": ratio, "interval": None, "against_fp32": None, "change": "unknown"}
    if ratio is None:
        return {**found, "note": "not measured on both sides"}
    if not ends[0] or not ends[1]:
        return {**found, "note": "not judged: there is no interval without a benchmark of both"}
    interval = [ends[1][0] / ends[0][1], ends[1][1] / ends[0][0]]
    found |= {"interval": interval}
    if obstacle := other_network(a, b) or next(_incomparable(a, b), None):
        return {**found, "note": f"not judged: {obstacle}"}
    judged = _judged(ratio, interval, 1.0)
    found |= {"change": judged["change"], "note": None, "against_fp32": _against_fp32(a, b)}
    if found["change"] == "worse" and found["against_fp32"] and found["against_fp32"][0] <= 1:
        return {**found, "change": "none", "note": "FP32 got slower too: it is the machine"}
    return found


def _incomparable(a: Side, b: Side) -> Iterator[str]:
    assert a.result
    assert b.result
    one, two = a.result["latency"], b.result["latency"]
    for key in ("batch", "streams", "preset"):
        if one[key] != two[key]:
            yield f"{key} is {one[key]} and {two[key]}"
    # where the benchmark ran; the validation may have run elsewhere
    machines = [r["latency"].get("machine") or r["provenance"]["machine"] for r in (a.result, b.result)]
    for key in ("cpu", "cores", "gpus", "jetson"):
        x, y = (machine.get(key) for machine in machines)
        if x != y:
            yield f"the machines differ: {key} {plain(x)} and {plain(y)}"
    for name, side in (("A", a), ("B", b)):
        runner = side.column.runner if side.column else None
        if runner and runner.get("stable") is False:
            yield f"{name} was not measured under stable conditions"


def _against_fp32(a: Side, b: Side) -> list[float] | None:
    """Interval of how many times as slow B is as A, both against FP32 beside them; None if that says nothing."""
    executor = a.value("executor") or "onnxruntime"
    same = all(a.value(*key) == b.value(*key) for key in (("provenance", "built_with", executor), ("target",)))
    if not same or _digest(a, "model") != _digest(b, "model") or not a.result or not b.result:
        return None
    (_, before), (_, after) = speedup(a.result), speedup(b.result)
    return [before[0] / after[1], before[1] / after[0]] if before and after else None


def fidelity(a: Side, b: Side) -> Record | None:
    """SQNR and agreement with FP32 of both, and the layers whose fidelity changed; None without both results."""
    if not a.result or not b.result:
        return None
    before, after = ({la["name"]: la["sqnr_db"] for la in s.result["layers"] or []} for s in (a, b) if s.result)
    rows = [
        {"layer": name, "sqnr_db": [before[name], after[name]]}
        for name in before
        if None not in (before[name], after.get(name)) and abs(after[name] - before[name]) >= FAINTER
    ]
    return {
        "sqnr_db": [a.result["sqnr_db"], b.result["sqnr_db"]],
        "agreement": [a.result["agreement"]["top1"], b.result["agreement"]["top1"]],
        "layers": sorted(rows, key=lambda row: row["sqnr_db"][1] - row["sqnr_db"][0]),
    }


def energy(a: Side, b: Side) -> Record | None:
    """Joules per image of both; None unless both were measured."""
    found = [((s.column.runner if s.column else None) or {}).get("energy") for s in (a, b)]
    if not found[0] or not found[1]:
        return None
    return {key: [found[0].get(key), found[1].get(key)] for key in ("joules_per_image", "rails", "source")}


def layers(a: Side, b: Side) -> Record | None:
    """Layers that changed in precision or time, and those of one side alone; None without layers.json of both."""
    if a.layers is None or b.layers is None:
        return None
    total = max(sum(ms or 0 for _, ms in side.values()) for side in (a.layers, b.layers))
    changed: list[tuple[float, Record]] = []
    for name in a.layers:
        if name not in b.layers:
            continue
        (before, x), (after, y) = a.layers[name], b.layers[name]
        slower = x is not None and y is not None and abs(y - x) > max(SLOWER * x, SHARE * total)
        if before != after or slower:
            row = {"layer": name, "types": [before, after], "ms": [x, y]}
            changed.append((abs((y or 0) - (x or 0)), row))
    changed.sort(key=lambda item: -item[0])
    only = {"only_a": [n for n in a.layers if n not in b.layers], "only_b": [n for n in b.layers if n not in a.layers]}
    return {"changed": [row for _, row in changed], **only}


def _versions(side: Side) -> Record:
    built = side.value("provenance", "built_with") or side.value("built_with") or {}
    found = {**(side.value("provenance", "versions") or {}), **built}
    return dict(_flat(found)) | {"cpu": side.value("provenance", "machine", "cpu")}


def _made_from(side: Side) -> Record:
    keys = ("precision", "target", "quantization", "preprocess", "options")
    found = {key: side.value(key) or side.value("provenance", key) for key in keys}
    digests = side.value("provenance", "digests") or {"model": side.value("made_from", "model")}
    found["digest"] = {**digests, "engine": digests.get("engine") or side.value("sha256"), "outcomes": None}
    return dict(_flat(found))


def _flat(record: Record, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", value


def _changes(a: Record, b: Record) -> Iterator[tuple[str, list[Any]]]:
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key):
            yield key, [a.get(key), b.get(key)]


def _pair(a: Side, b: Side, *keys: str) -> list[Any] | None:
    found = [a.value(*keys), b.value(*keys)]
    return None if None in found else found


def _digest(side: Side, key: str) -> Any:
    return side.value("provenance", "digests", key)
