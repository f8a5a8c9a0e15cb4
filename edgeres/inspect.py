"""What is inside an artifact: (plain JSON values, what a person reads)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from edgeres import engine_layers
from edgeres.errors import InputError, StaleError, UsageError, need
from edgeres.files import read_json, to_json
from edgeres.fusion import Audit, audit, lowest
from edgeres.recipe import ModelSection
from edgeres.tables import Trimmed, plain_table


def network(section: ModelSection, input_size: int) -> tuple[dict[str, Any], RenderableType]:
    """The stage table of the network that ``section`` describes, with 1000 classes unless it says otherwise."""
    torch = need("torch", "torch")
    from edgeres.model import MAC_RULE, describe, resnet

    classes = section.classes or 1000
    with torch.device("meta"):  # counting needs shapes, not weights
        rows = describe(resnet(section.depth, section.variant, classes), input_size)
    parameters, macs = sum(r.parameters for r in rows), sum(r.macs for r in rows)
    title = f"{section.network}, {classes} classes, input 3 x {input_size} x {input_size}"
    out = plain_table("stage", "layers", "output", "parameters", "multiply-adds", title=title, right=3)
    for r in rows:
        out.add_row(r.name, r.layers, " x ".join(map(str, r.output)), f"{r.parameters:,}", f"{r.macs:,}")
    out.add_row("total", "", "", f"{parameters / 1e6:.2f} M", f"{macs / 1e9:.2f} G", style="bold")
    value = {
        "depth": section.depth,
        "variant": section.variant,
        "classes": classes,
        "input_size": input_size,
        "parameters": parameters,
        "macs": macs,
        "mac_rule": MAC_RULE,
        "stages": [vars(r) for r in rows],
    }
    return value, Trimmed(out, Text(f"Counted: {MAC_RULE}. ResNet-50's often quoted 3.8e9 is v1 at 224.", style="dim"))


def targets() -> tuple[dict[str, Any], RenderableType]:
    """Every known target."""
    from edgeres.targets import load_target, names

    value = {name: vars(load_target(name)) | {"build": load_target(name).asked} for name in names()}
    out = plain_table("target", "precisions", "TensorRT", "", title="Targets")
    for name, t in value.items():
        out.add_row(name, " ".join(t["precisions"]), t["tensorrt"] or "", t["description"])
    note = "TensorRT: the version that graphs are made for, unless --tensorrt says another or it is installed here."
    return value, Trimmed(out, Text(note, style="dim"))


def artifact(path: Path, profile: Path | None = None) -> tuple[dict[str, Any], RenderableType]:
    """An ONNX file, a range table, an engine folder, or layers as `trtexec --exportLayerInfo` writes them.

    ``profile`` has times of the layers, as `trtexec --exportProfile` writes them.
    """
    times = None if profile is None else engine_layers.read_times(engine_layers.read_file(profile), str(profile))
    if path.is_dir() or path.name == "engine.json":
        return _engine(path, times)
    if path.suffix == ".json":
        content = engine_layers.read_file(path)
        form = content.get("format", "") if isinstance(content, dict) else ""
        if isinstance(content, list) or (isinstance(content, dict) and "Layers" in content):
            return _layers(path, content, times)
        if not str(form).startswith("edgeres range table"):
            hint = "for an engine, name its folder; `trtexec --exportLayerInfo=FILE` writes layers to look at"
            raise InputError(f"{path} is no range table", hint=hint)
        if profile is None:
            return _range_table(path)
    if profile is not None:
        raise UsageError(f"{path} has no layers that a profile belongs to", hint="give an engine's folder or layers")
    if path.suffix == ".onnx":
        return _onnx(path)
    raise UsageError(f"cannot inspect {path}", hint="give an .onnx file, a range table, layers, or an engine folder")


def _engine(path: Path, times: dict[str, float] | None) -> tuple[dict[str, Any], RenderableType]:
    """The record of an engine, and the audit of its layers if they were written down."""
    from edgeres.build import Engine

    engine = Engine.load(path)
    title, record, beside = f"engine {path}", engine.record, engine.path.parent / engine_layers.FILE
    # what was used says what was asked; layers and ranges are for a report
    shown = {key: value for key, value in record.items() if key not in ("asked", "layers", "ranges")}
    if options := record.get("options"):
        shown["options"] = {k: v for k, v in options.items() if v not in (None, False, [])}
    if not beside.is_file():
        if times is not None:
            raise UsageError(f"the layers of {path} are not known", evidence=f"there is no {beside.name} in its folder")
        return record, _record(title, shown)
    kept = read_json(beside, "the layers of an engine")
    if kept.get("sha256", record["sha256"]) != record["sha256"]:
        raise StaleError(f"{beside} is of another engine", hint="build this one again, or delete the file")
    raw, measured, *numbers = engine_layers.read_kept(kept, str(beside))
    found = audit(raw, str(record.get("precision", lowest(raw))), times or measured, *numbers)
    shown.pop("fusion", None)
    return {**record, "audit": found.to_json()}, Trimmed(_record(title, shown), Text(), fused("fused to", found))


def _layers(path: Path, content: Any, times: dict[str, float] | None) -> tuple[dict[str, Any], RenderableType]:
    raw = engine_layers.raw_layers(content, str(path))
    found = audit(raw, lowest(raw), times)
    return found.to_json(), fused(str(path), found)


def fused(title: str, found: Audit) -> RenderableType:
    """The summary of an audit, and a table of its layers, the slowest first. Fits 80 columns."""
    timed = found.total_ms is not None
    layers = [la for la in found.layers if la.ms or la.kind not in engine_layers.IDLE]
    layers.sort(key=lambda la: -(la.ms or 0))
    columns = ["kind", "in -> out", "ms", "%"] if timed else ["kind", "in -> out"]
    out = plain_table("layer", *columns, title="", right=3)
    for la in layers:
        row = [la.kind or "not known", la.types]
        if timed and found.total_ms:
            row += ["", ""] if la.ms is None else [f"{la.ms:.3f}", f"{100 * la.ms / found.total_ms:.1f}"]
        # the names, which are the longest, give way
        out.add_row(Text(la.label, no_wrap=True, overflow="ellipsis"), *map(Text, row))
    return Trimmed(Text(title, style="bold"), *map(Text, found.summary()), Text(), out)


def _onnx(path: Path) -> tuple[dict[str, Any], RenderableType]:
    from edgeres import graph

    model = graph.load(path)
    value = {
        "opset": {o.domain or "ai.onnx": o.version for o in model.opset_import},
        "ir_version": model.ir_version,
        "operators": graph.count_ops(model),
        "digest": graph.digest(model),
        "edgeres": graph.metadata(model),
    }
    return value, _record(str(path), value)


def _range_table(path: Path) -> tuple[dict[str, Any], RenderableType]:
    from edgeres.calibrate import RangeTable
    from edgeres.thresholds import METHODS, PERCENTILE

    table = RangeTable.load(path)
    tensors: dict[str, dict[str, Any]] = {}
    shown = [m for m in METHODS if m != "minmax"]  # is to be seen in min and max
    columns = (m.replace("percentile-", "p").replace("percentile", f"p{PERCENTILE}") for m in shown)
    out = plain_table("tensor", "min", "max", *columns, title=f"{path}: {table.images} images", right=1)
    for name, r in table.tensors.items():
        thresholds = {m: f(r, 255) for m, f in METHODS.items()}
        tensors[name] = {"min": r.min, "max": r.max, "count": r.count, "zeros": r.zeros, "thresholds": thresholds}
        ends = (max(-lo, hi) for lo, hi in (thresholds[m] for m in shown))
        out.add_row(Text(name), f"{r.min:.3f}", f"{r.max:.3f}", *(f"{e:.3f}" for e in ends))
    note = "Under each method (p99.9: percentile): the largest magnitude that uint8 with a zero point represents."
    value = {"images": table.images, "skipped": table.skipped, "made_from": table.made_from, "tensors": tensors}
    return value, Trimmed(out, Text(note, style="dim"))


def plot(path: Path, tensor: str, output: Path) -> None:
    """Draw ``tensor`` of the range table at ``path``."""
    from edgeres.calibrate import RangeTable
    from edgeres.plot import histogram

    histogram(RangeTable.load(path), tensor, output)


def _record(title: str, value: dict[str, Any]) -> RenderableType:
    return Trimmed(Text(title, style="bold"), *_rows(value, ""))


def _rows(value: dict[str, Any], indent: str) -> Iterator[RenderableType]:
    """One row per key, those of a record within a record below its name and further in."""
    width = max((len(key) for key, item in value.items() if not (item and isinstance(item, dict))), default=0)
    for key, item in value.items():
        if item and isinstance(item, dict):
            yield Text(indent + key)
            yield from _rows(item, indent + "  ")
        else:
            row = Table.grid(padding=(0, 2, 0, 0))
            row.add_column(width=len(indent) + width)
            row.add_column(overflow="fold")
            row.add_row(Text(indent + key), Text(_shown(item)))
            yield row


def _shown(item: Any) -> str:
    if isinstance(item, list) and not any(isinstance(i, dict | list) for i in item):
        return ", ".join(map(_shown, item)) or "none"
    if item is None or item == {}:
        return "none"
    return item if isinstance(item, str) else f"{item:.6g}" if isinstance(item, float) else to_json(item)
