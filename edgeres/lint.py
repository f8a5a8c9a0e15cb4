"""What a parser accepts and then silently runs slower, in higher precision, or wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgeres import graph
from edgeres.errors import BuildError
from edgeres.quantize import Scheme


def lint(model: Any, scheme: Scheme) -> list[str]:
    """Every violation of the rules of ``scheme`` in a Q/DQ ``model``, one line each, with the node's name."""
    constants = graph.initializers(model)
    producer = {out: node for node in model.graph.node for out in node.output}
    readers = graph.consumers(model)
    found: list[str] = []
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for rule in RULES if scheme.signed else RULES[:2]:
            found += rule(node, constants, producer)
    if not scheme.main_branch:
        plain = without_pairs(model)
        for add in (n for n in plain.graph.node if n.op_type == "Add"):
            main = graph.main_branch(plain, add)
            if any(r.op_type == "QuantizeLinear" for r in readers.get(main or "", [])):
                found.append(f"{add.name}: a Q/DQ pair on the main branch {main} keeps the Add from being fused")
    return found


def require_clean(model: Any, scheme: Scheme) -> None:
    """Raise `BuildError` listing what `lint` finds."""
    if found := lint(model, scheme):
        more = [f"and {len(found) - 8} more"] if len(found) > 8 else []
        raise BuildError(
            f"the Q/DQ graph breaks {len(found)} rules of scheme {scheme.name}",
            evidence="\n".join([*found[:8], *more]),
            hint="quantize with `edgeres quantize`, or choose a target whose executor takes this graph",
        )


Rule = Callable[[Any, dict[str, np.ndarray], dict[str, Any]], list[str]]


def _scale(node: Any, constants: dict[str, np.ndarray], producer: dict[str, Any]) -> list[str]:
    """Scales are constants, positive, finite and normal in their own type."""
    scale = constants.get(node.input[1])
    if scale is None:
        return [f"{node.name}: the scale is no constant"]
    if not np.all(np.isfinite(scale) & (scale >= np.finfo(scale.dtype).tiny)):
        return [f"{node.name}: a scale is zero, negative, subnormal, infinite or NaN"]
    return []


def _zero_point(node: Any, constants: dict[str, np.ndarray], producer: dict[str, Any]) -> list[str]:
    """Zero points are there (TensorRT 8 needs them), constant, and of the scale's shape."""
    if len(node.input) < 3 or node.input[2] not in constants:
        return [f"{node.name}: no constant zero point"]
    zero, scale = constants[node.input[2]], constants.get(node.input[1])
    if scale is not None and zero.shape != scale.shape:
        return [f"{node.name}: zero point {zero.shape} and scale {scale.shape} differ in shape"]
    return []


def _symmetric(node: Any, constants: dict[str, np.ndarray], producer: dict[str, Any]) -> list[str]:
    """int8 with zero point 0: TensorRT takes nothing else, and no int32 (biases stay float)."""
    zero = constants.get(node.input[2]) if len(node.input) > 2 else None
    if zero is not None and (zero.dtype != np.int8 or zero.any()):
        return [f"{node.name}: {zero.dtype} with zero point {zero.flat[0]}, only int8 with 0 is symmetric"]
    return []


def _granularity(node: Any, constants: dict[str, np.ndarray], producer: dict[str, Any]) -> list[str]:
    """One scale per activation; weights along their output channels, axis 0. Else INT8 is lost without a word."""
    scale = constants.get(node.input[1])
    if scale is None or scale.size == 1:
        return []
    source = producer.get(node.input[0])
    origin = source.input[0] if node.op_type == "DequantizeLinear" and source is not None else node.input[0]
    if origin not in constants:
        return [f"{node.name}: {scale.size} scales on an activation, which takes one"]
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    if axis != 0 or constants[origin].shape[0] != scale.size:
        return [f"{node.name}: weight scales along axis {axis}, INT8 needs the output channels, axis 0"]
    return []


RULES: list[Rule] = [_scale, _zero_point, _symmetric, _granularity]
"""The first two hold for every scheme."""


def without_pairs(model: Any) -> Any:
    """``model`` with every Q/DQ pair on an activation taken out: each reader reads the tensor itself."""
    out = type(model)()
    out.CopyFrom(model)
    quantized = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    held = {
        n.output[0]: quantized[n.input[0]]
        for n in model.graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in quantized
    }
    nodes = [n for n in out.graph.node if not (n.op_type == "QuantizeLinear" or n.output[0] in held)]
    for node in nodes:
        node.input[:] = [held.get(i, i) for i in node.input]
    graph.set_nodes(out, nodes)
    return out
