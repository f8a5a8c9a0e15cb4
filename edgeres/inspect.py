"""What is inside an artifact: (plain JSON values, what a person reads)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from edgeres.errors import InputError, UsageError, need
from edgeres.files import read_json, to_json
from edgeres.recipe import ModelSection


def network(section: ModelSection, input_size: int) -> tuple[dict[str, Any], RenderableType]:
    """The stage table of the network that ``section`` describes, with 1000 classes unless it says otherwise."""
    torch = need("torch", "torch")
    from edgeres.model import MAC_RULE, describe, resnet

    classes = section.classes or 1000
    with torch.device("meta"):  # counting needs shapes, not weights
        rows = describe(resnet(section.depth, section.variant, classes), input_size)
    parameters, macs = sum(r.parameters for r in rows), sum(r.macs for r in rows)
    title = f"{section.network}, {classes} classes, input 3 x {input_size} x {input_size}"
    out = _table("stage", "layers", "output", "parameters", "multiply-adds", title=title, right=3)
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


def artifact(path: Path) -> tuple[dict[str, Any], RenderableType]:
    """An ONNX file, a range table, or an engine folder."""
    if path.is_dir() or path.name == "engine.json":
        from edgeres.build import Engine

        record = Engine.load(path).record
        return record, _record(f"engine {path}", record)
    if path.suffix == ".onnx":
        return _onnx(path)
    if path.suffix == ".json":
        if str(read_json(path, "an edgeres artifact").get("format", "")).startswith("edgeres range table"):
            return _range_table(path)
        raise InputError(f"{path} is no range table", hint="for an engine, name its folder")
    raise UsageError(f"cannot inspect {path}", hint="give an .onnx file, a range table, or an engine folder")


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
    out = _table("tensor", "min", "max", *columns, title=f"{path}: {table.images} images", right=1)
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


class Trimmed:
    """Some renderables below each other, without the blanks that rich puts at the end of lines."""

    def __init__(self, *parts: RenderableType) -> None:
        self.parts = Group(*parts)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for line in console.render_lines(self.parts, options, pad=False):
            while line and not line[-1].text.strip():
                line.pop()
            if line:
                text, style, control = line.pop()
                line.append(Segment(text.rstrip(), style, control))
            yield from line
            yield Segment.line()


def _table(*columns: str, title: str, right: int = 99) -> Table:
    """``right``: the first column that is aligned to the right."""
    name = Text(title)  # brackets in a path are no markup
    out = Table(title=name, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        out.add_column(column, justify="right" if i >= right else "left")
    return out
