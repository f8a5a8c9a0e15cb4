"""What became of a graph in its engine: what fused, what runs in which precision, and what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgeres.engine_layers import COPIES, IDLE, Layer, read

LOW = ("int8", "fp8", "fp16", "bf16")
"""Precisions below FP32, lowest first."""
SHOWN, LENGTH = 3, 50
"""Names that a line of the summary gives before it counts the rest, and letters of each."""


@dataclass(frozen=True)
class Fusion:
    """What an executor really executes: operators and their number, and ``notes`` on what is not as asked."""

    operators: dict[str, int]
    notes: list[str]


@dataclass(frozen=True)
class Audit:
    """What a TensorRT engine executes. Names are labels of layers; of convolutions, one layer may hold two.

    ``in_and_out``: how many convolutions have all inputs and outputs in ``precision``; ``in_only``: those that read it
    and add or write something else; ``other``: the rest, by the type they read ("" if not known). ``graph_*``: numbers
    in the ONNX graph, None if not known. ``adds_own``: residual adds that are layers of their own. ``quantizers``:
    Q/DQ nodes that were fused into nothing. ``fp32``: layers, other than copies, with FP32 that is not input or output
    of the engine; none in an FP32 engine. ``by_name``: number of layers of which only the name is known.
    """

    precision: str
    convolutions: int
    in_and_out: int
    in_only: list[str]
    other: dict[str, list[str]]
    graph_convolutions: int | None
    adds_fused: int
    adds_own: list[str]
    graph_adds: int | None
    reformats: list[str]
    quantizers: list[str]
    fp32: list[str]
    dla: list[str]
    gpu: int
    by_name: int
    total_ms: float | None
    layers: list[Layer]

    def summary(self) -> list[str]:
        """What a person should know, what matters most first, a line each."""
        lines = self._details() if len(self.dla) + self.gpu > self.by_name else self._names_only()
        if self.total_ms is not None:
            lines.append(f"{self.total_ms:.3f} ms in all layers, one after the other")
        return lines

    def _names_only(self) -> list[str]:
        known = f"{_count(self.by_name, 'layer')}, of them at most {_count(len(self.reformats), 'reformat')}"
        return [known, "the plan holds the names of its layers, not what they run in"]

    def _details(self) -> list[str]:
        asked = self.precision.upper()
        convolutions = self.convolutions if self.graph_convolutions is None else self.graph_convolutions
        seen = self.adds_fused + len(self.adds_own)
        adds = seen if self.graph_adds is None else self.graph_adds
        parts = [f"{self.in_and_out} of {_count(convolutions, 'convolution')} {asked} in and out"]
        if adds:
            parts.append(f"{self.adds_fused} of {_count(adds, 'residual add')} fused")
        parts.append(_count(len(self.reformats), "reformat"))
        if self.precision != "fp32":
            parts.append(f"FP32: {_names(self.fp32)}")
        lines = ["; ".join(parts)]
        if self.in_only:
            lines.append(f"convolutions {asked} in only: {_names(self.in_only)}")
        for kind, names in self.other.items():
            lines.append(f"convolutions {f'in {kind.upper()}' if kind else 'of unknown type'}: {_names(names)}")
        if self.convolutions != convolutions:
            lines.append(f"the engine shows {_count(self.convolutions, 'convolution')}, the graph has {convolutions}")
        if self.adds_own:
            lines.append(f"residual adds in layers of their own: {_names(self.adds_own)}")
        if seen != adds:
            lines.append(f"the engine shows {_count(seen, 'residual add')}, the graph has {adds}")
        if self.quantizers:
            lines.append(f"{_count(len(self.quantizers), 'Q/DQ layer')} fused into nothing: {_names(self.quantizers)}")
        if self.dla:
            lines.append(f"{_count(len(self.dla), 'layer')} on DLA, not shown inside; {self.gpu} on the GPU")
        if self.by_name:
            lines.append(f"{_count(self.by_name, 'layer')} known by name only")
        return lines

    def fusion(self) -> Fusion:
        """The small record, for engine.json."""
        known = [layer for layer in self.layers if layer.type and layer.kind not in IDLE]
        if not known:
            return Fusion({"layer": self.by_name}, self.summary())
        counts = Counter(f"{la.type} {next(filter(None, la.reads + la.writes), '')}".strip() for la in known)
        return Fusion(dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))), self.summary())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: the summary, and every field."""
        return {"summary": self.summary(), **asdict(self)}


def audit(
    layers: list[Any],
    precision: str,
    times: Mapping[str, float] | None = None,
    convolutions: int | None = None,
    residuals: int | None = None,
) -> Audit:
    """Look at ``layers``, as `raw_layers` gives them, of an engine of ``precision``.

    ``times`` is milliseconds by layer name; ``convolutions`` and ``residuals`` are how many the ONNX graph has.
    """
    found = read(layers, times)
    executed = [layer for layer in found if layer.kind not in IDLE]
    kernels = [layer for layer in executed if layer.kind.startswith("convolution")]
    in_and_out, in_only, other = 0, list[str](), dict[str, list[str]]()
    for layer in kernels:
        if {*layer.reads, *layer.writes} == {precision}:
            in_and_out += len(layer.parts)
        elif layer.reads[:1] == [precision]:
            in_only += layer.parts
        else:
            other.setdefault(next(iter(layer.reads), ""), []).extend(layer.parts)

    def of(*kinds: str) -> list[str]:
        return [layer.label for layer in executed if layer.kind in kinds]

    return Audit(
        precision=precision,
        convolutions=sum(len(layer.parts) for layer in kernels),
        in_and_out=in_and_out,
        in_only=in_only,
        other=dict(sorted(other.items())),
        graph_convolutions=convolutions,
        adds_fused=len(of("convolution, add")),
        adds_own=of("add"),
        graph_adds=residuals,
        reformats=of("reformat"),
        quantizers=of("quantize", "dequantize"),
        fp32=[la.label for la in executed if la.fp32 and la.kind not in COPIES and precision != "fp32"],
        dla=of("DLA"),
        gpu=sum(layer.kind not in ("DLA", "copy") for layer in executed),
        by_name=sum(not layer.type and layer.kind not in ("DLA", "copy") for layer in executed),
        total_ms=sum(times.values()) if times else None,
        layers=found,
    )


def lowest(layers: list[Any]) -> str:
    """The lowest precision that a convolution among ``layers`` reads, or any layer if there is none; else "fp32"."""
    found = read(layers)
    known = [la for la in found if la.kind.startswith("convolution")] or found
    types = {t for la in known for t in la.reads[:1]}
    return next((name for name in LOW if name in types), "fp32")


def _names(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    short = (n if len(n) <= LENGTH else f"{n[: LENGTH // 2 - 1]}…{n[-LENGTH // 2 :]}" for n in names[:SHOWN])
    return (", ".join(short) or "none") + more


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
