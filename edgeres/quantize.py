"""FP32 ONNX + range table + scheme -> INT8 as Q/DQ nodes; FP32 ONNX -> FP16 as typed tensors.

Precision lives in the graph: whoever loads the file needs no flag to know what was meant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeres import graph
from edgeres.calibrate import RangeTable
from edgeres.errors import InputError, need
from edgeres.thresholds import METHODS

SAME_VALUES = ("MaxPool", "Flatten")
"""Operators whose outputs are some of their inputs: both sides share one scale, so that no rescaling is needed."""


@dataclass(frozen=True)
class Scheme:
    """How Q/DQ is laid for an executor.

    Activations: one scale and zero point per tensor, uint8, on every operator's input and output. Weights: int8,
    symmetric, one scale per output channel, shape (K,), with ``weight_bits`` of the 8 used. Biases: int32 at
    activation scale * weight scale.
    """

    name: str
    weight_bits: int = 8


def int8(model: Any, table: RangeTable, scheme: Scheme, method: str) -> Any:
    """Quantize a model in normal form -> ModelProto. Raises `StaleError` if ``table`` is of another model."""
    table.require({"model": graph.digest(model)})
    helper, numpy_helper = need("onnx.helper", "onnx"), need("onnx.numpy_helper", "onnx")
    out = type(model)()
    out.CopyFrom(model)
    g = out.graph
    weights = graph.initializers(model)
    scales = activation_scales(model, table, method)
    nodes: list[Any] = []
    constants: dict[str, np.ndarray] = {}
    held: dict[str, str] = {}  # tensor -> its dequantized name, once it has been through a Q/DQ pair

    def pair(tensor: str) -> None:
        """Quantize and dequantize ``tensor``; its readers then read the dequantized one."""
        scale, zero = f"{tensor}.scale", f"{tensor}.zero_point"
        constants[scale], constants[zero] = scales[tensor]
        q, held[tensor] = f"{tensor}.q", f"{tensor}.dq"
        nodes.append(helper.make_node("QuantizeLinear", [tensor, scale, zero], [q], name=q))
        nodes.append(helper.make_node("DequantizeLinear", [q, scale, zero], [held[tensor]], name=held[tensor]))

    def constant(name: str, integers: np.ndarray, scale: np.ndarray) -> str:
        """Store ``integers`` with ``scale`` (K,) along axis 0, dequantized by a node of its own."""
        parts = [f"{name}.int", f"{name}.scale", f"{name}.zero_point"]
        constants.update(zip(parts, (integers, scale, np.zeros(len(scale), integers.dtype)), strict=True))
        nodes.append(helper.make_node("DequantizeLinear", parts, [f"{name}.dq"], name=f"{name}.dq", axis=0))
        return f"{name}.dq"

    if graph.INPUT in scales:
        pair(graph.INPUT)
    for node in g.node:
        new = type(node)()
        new.CopyFrom(node)
        if node.op_type in ("Conv", "Gemm") and node.input[1] in weights and node.input[0] in scales:
            _check_gemm(node)
            data, weight, bias = node.input
            w, w_scale = quantize_weight(weights[weight], weights[bias], scales[data][0], scheme.weight_bits)
            b_scale = scales[data][0] * w_scale
            new.input[1] = constant(weight, w, w_scale)
            new.input[2] = constant(bias, np.rint(weights[bias] / b_scale).astype(np.int32), b_scale)
        for i, name in enumerate(new.input):
            new.input[i] = held.get(name, name)
        nodes.append(new)
        for tensor in node.output:
            if tensor in scales:
                pair(tensor)
    kept = {name for node in nodes for name in node.input}
    del g.node[:], g.initializer[:]
    g.node.extend(nodes)
    g.initializer.extend(numpy_helper.from_array(a, name) for name, a in (weights | constants).items() if name in kept)
    graph.set_metadata(out, {**graph.metadata(model), "precision": "int8"})
    return out


def activation_scales(model: Any, table: RangeTable, method: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tensor -> (scale float32 (), zero point uint8 ()), so that real = (integer - zero point) * scale."""
    scales: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    wanted = set(graph.activations(model))
    if missing := wanted - table.tensors.keys():
        raise InputError(f"the range table does not cover tensor {min(missing)}", hint="calibrate this model again")
    for name in (graph.INPUT, *(o for node in model.graph.node for o in node.output)):
        source = _source(model, name)
        if source != name and source in scales:
            scales[name] = scales[source]
        elif name in wanted:
            lo, hi = METHODS[method](table.tensors[name], 255)
            scale = np.float32((hi - lo) / 255)
            scale = scale if scale > np.finfo(np.float32).tiny else np.float32(1)  # a constant zero: any scale will do
            scales[name] = np.asarray(scale), np.asarray(np.clip(np.rint(-lo / scale), 0, 255), np.uint8)
    return scales


def quantize_weight(
    weight: np.ndarray, bias: np.ndarray, input_scale: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weight (K, ...) -> int8 (K, ...) and scale float32 (K,): absmax / (2^(bits-1) - 1) per output channel.

    A channel of zeros gets scale 1, and so does one whose products with the input vanish in float32. A scale so small
    that its bias would not fit int32 is raised until it does.
    """
    top = 2 ** (bits - 1) - 1
    scale = np.abs(weight.reshape(len(weight), -1)).max(1) / top
    scale = np.maximum(scale, np.abs(bias) / (input_scale * np.float32(2**30)))
    scale = np.where(np.minimum(scale, scale * input_scale) > np.finfo(np.float32).tiny, scale, 1).astype(np.float32)
    integers = np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1)))
    return np.clip(integers, -top - 1, top).astype(np.int8), scale


def _check_gemm(node: Any) -> None:
    """Output channels must lie on axis 0 of the weight, which for Gemm means transB."""
    attributes = {a.name: a.i for a in node.attribute if a.name in ("transA", "transB")}
    if node.op_type == "Gemm" and attributes != {"transB": 1}:
        raise InputError(
            f"cannot quantize Gemm {node.name}", evidence=f"attributes {attributes}", hint="needs transB=1"
        )


def _source(model: Any, name: str) -> str:
    """The tensor whose values ``name`` carries: through max pools and flattens, back to where they were computed."""
    for node in model.graph.node:
        if name in node.output and node.op_type in SAME_VALUES:
            return _source(model, node.input[0])
    return name


def fp16(model: Any) -> Any:
    """Convert a model in normal form to FP16 tensors -> ModelProto. Input and output stay FP32 behind a Cast each."""
    helper, numpy_helper = need("onnx.helper", "onnx"), need("onnx.numpy_helper", "onnx")
    out = type(model)()
    out.CopyFrom(model)
    g = out.graph
    constants = []
    for name, array in graph.initializers(model).items():
        if array.dtype == np.float32:
            if not np.abs(array).max(initial=0) <= np.finfo(np.float16).max:
                raise InputError(
                    f"{name} does not fit FP16",
                    evidence=f"largest magnitude {np.abs(array).max():.4g}, FP16 ends at 65504",
                    hint="build this model with --precision fp32 or int8",
                )
            array = array.astype(np.float16)
        constants.append(numpy_helper.from_array(array, name))
    half, single = 10, 1  # onnx.TensorProto.FLOAT16, FLOAT
    inner_in, inner_out = f"{graph.INPUT}.fp16", f"{graph.OUTPUT}.fp16"
    for node in g.node:
        node.input[:] = [inner_in if n == graph.INPUT else n for n in node.input]
        node.output[:] = [inner_out if n == graph.OUTPUT else n for n in node.output]
    first = helper.make_node("Cast", [graph.INPUT], [inner_in], name=inner_in, to=half)
    last = helper.make_node("Cast", [inner_out], [graph.OUTPUT], name=graph.OUTPUT, to=single)
    nodes = [first, *g.node, last]
    del g.initializer[:], g.value_info[:]
    g.initializer.extend(constants)
    g.ClearField("node")
    g.node.extend(nodes)
    graph.set_metadata(out, {**graph.metadata(model), "precision": "fp16"})
    return out
