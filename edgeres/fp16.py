"""FP32 or INT8 ONNX -> the same with FP16 in place of FP32, typed in the graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgeres import graph
from edgeres.errors import need
from edgeres.probe import Probe
from edgeres.progress import say

LARGEST = float(np.finfo(np.float16).max)
"""65504."""
MARGIN = 2.0
"""Activations of other images may exceed those seen by this factor before a value overflows."""
SCALES_OPSET = 19
"""The first opset whose QuantizeLinear and DequantizeLinear take FP16 (ONNX, Operators.md)."""
HALF, SINGLE = 10, 1
"""onnx.TensorProto.FLOAT16 and FLOAT."""


def magnitudes(model: Any, pixels: np.ndarray) -> dict[str, float]:
    """Largest magnitude of each tensor of an FP32 ``model`` over ``pixels`` (N, 3, H, W)."""
    probe = Probe(model, [o for n in model.graph.node for o in n.output])
    found: dict[str, float] = {}
    for _, tensors in probe.run(pixels):
        for name, values in tensors.items():
            found[name] = max(found.get(name, 0.0), float(values.max()), -float(values.min()))
    return found


def fp16(model: Any, magnitudes: Mapping[str, float] | None = None) -> Any:
    """Convert ``model`` to FP16 -> ModelProto. Input and output stay FP32, behind a Cast each.

    Operators with a weight beyond FP16's range stay in FP32, and so do those that read or write a tensor whose largest
    magnitude, as far as ``magnitudes`` knows it, times `MARGIN` is. Q/DQ nodes get FP16 scales, which takes
    `SCALES_OPSET`.
    """
    helper, numpy_helper = need("onnx.helper", "onnx"), need("onnx.numpy_helper", "onnx")
    too_large = {t for t, most in (magnitudes or {}).items() if most * MARGIN > LARGEST}
    arrays = graph.initializers(model)
    # a scale may be small, but what it scales must be representable
    too_large |= {n for n, a in arrays.items() if a.dtype == np.float32 and np.abs(a).max(initial=0) > LARGEST}
    pairs = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in pairs:  # these hand on values as large as they get
        if too_large & {*node.input}:
            too_large |= {*node.output}
    nodes: list[Any] = []
    constants: dict[str, np.ndarray] = {}
    types: dict[str, int] = {graph.INPUT: SINGLE}  # of the floating point tensors
    cast: dict[tuple[str, int], str] = {}

    def as_type(name: str, kind: int) -> str:
        """The name under which tensor or constant ``name`` is there in ``kind``."""
        if name in arrays:
            if arrays[name].dtype != np.float32:
                constants[name] = arrays[name]
                return name
            typed = name if kind == HALF else f"{name}.fp32"
            constants[typed] = arrays[name].astype(np.float16) if kind == HALF else arrays[name]
            return typed
        if types.get(name, kind) == kind:
            return name
        if (name, kind) not in cast:
            out = cast[name, kind] = f"{name}.fp{16 if kind == HALF else 32}"
            nodes.append(helper.make_node("Cast", [name], [out], name=out, to=kind))
        return cast[name, kind]

    kept = []
    for node in model.graph.node:
        single = too_large & {*node.input, *node.output}
        if single and node not in pairs:
            kept.append(node.name)
        kind = SINGLE if single else HALF
        new = type(node)()
        new.CopyFrom(node)
        new.input[:] = [as_type(name, kind) for name in node.input]
        if node.op_type != "QuantizeLinear":
            types.update(dict.fromkeys(node.output, kind))
        if graph.OUTPUT in node.output and kind == HALF:
            new.output[:] = [f"{graph.OUTPUT}.fp16"]
        nodes.append(new)
    if types[graph.OUTPUT] == HALF:
        nodes.append(helper.make_node("Cast", [f"{graph.OUTPUT}.fp16"], [graph.OUTPUT], name=graph.OUTPUT, to=SINGLE))
    if kept:
        say(f"{len(kept)} operators stay in FP32, their values do not fit FP16: {', '.join(kept[:5])}")
    out = type(model)()
    out.CopyFrom(model)
    if pairs:
        graph.raise_opset(out, SCALES_OPSET)
    del out.graph.node[:], out.graph.initializer[:], out.graph.value_info[:]
    out.graph.node.extend(nodes)
    out.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in constants.items())
    graph.set_metadata(out, {**graph.metadata(model), "kept_fp32": kept} if kept else graph.metadata(model))
    return out


def rounding(model: Any) -> Any:
    """``model``, changed in place so that ONNX Runtime rounds what it quantizes from FP16.

    To 1.23, the newest for Python 3.10, its QuantizeLinear cuts FP16 off towards zero. The same values and scales in
    FP32 give the integers that later versions give.
    """
    helper = need("onnx.helper", "onnx")
    half = {t.name for t in model.graph.initializer if t.data_type == HALF}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[1] in half:
            for i, name in enumerate(node.input[:2]):
                node.input[i] = f"{node.output[0]}.fp32.{i}"
                nodes.append(helper.make_node("Cast", [name], [node.input[i]], to=SINGLE))
        nodes.append(node)
    graph.set_nodes(model, nodes)
    return model
