"""FP32 ONNX + range table + scheme -> INT8 as Q/DQ nodes.

Precision lives in the graph: whoever loads the file needs no flag to know what was meant.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import numpy as np

from edgeres import graph
from edgeres.calibrate import BINS, RangeTable, TensorRange
from edgeres.equalize import equalize
from edgeres.errors import InputError, need
from edgeres.thresholds import METHODS, WEIGHTS

SAME_VALUES = ("MaxPool", "Flatten")
"""Operators whose outputs are some of their inputs: no rescaling is needed if both sides share one scale."""
POOLS = ("GlobalAveragePool", "AveragePool")
INTEGER = (*graph.LAYERS, *SAME_VALUES, *POOLS, "Add", "Relu", "Clip")
"""Operators that executors compute on integers. What a graph has besides stays in floating point."""


@dataclass(frozen=True)
class Scheme:
    """How Q/DQ is laid for an executor (docs/schemes.md says why).

    Activations have one scale per tensor, (): ``signed`` int8, symmetric, zero point 0, scale = threshold / 127; else
    uint8 with a zero point. ``everywhere``: a pair on both sides of every integer operator; else only on what a layer,
    a pool or an Add reads. ``main_branch``: also on the input of an Add that comes bare from a convolution. Weights are
    int8, symmetric, one scale per output channel (K,) by the rule ``weights``, with ``weight_bits`` of the 8 used;
    ``int8_weights``: stored so, else FP32 through Q and DQ. ``int32_bias``: biases as int32 at activation scale *
    weight scale, else float. ``rest``: precision of what is not INT8, and of scales, unless they go into a ``cache``.
    """

    name: str
    _: KW_ONLY
    signed: bool = False
    everywhere: bool = True
    main_branch: bool = True
    int8_weights: bool = True
    int32_bias: bool = True
    weights: str = "absmax"
    weight_bits: int = 8
    rest: str = "fp32"
    cache: bool = False

    @property
    def smallest(self) -> float:
        """The smallest scale that is no subnormal number in the type in which scales are stored."""
        half = self.rest == "fp16" and not self.cache  # a calibration cache has float32 scales
        return float(np.finfo(np.float16 if half else np.float32).tiny)


SCHEMES = {
    s.name: s
    for s in (
        Scheme("onnxruntime"),
        Scheme("openvino", main_branch=False, int32_bias=False),
        Scheme(
            "tensorrt",
            signed=True,
            everywhere=False,
            main_branch=False,
            int8_weights=False,
            int32_bias=False,
            rest="fp16",
        ),
        # no graph of its own: ranges in a calibration cache, beside the FP32 graph. This one simulates it
        Scheme("implicit", signed=True, int8_weights=False, int32_bias=False, rest="fp16", cache=True),
    )
}


def int8(model: Any, table: RangeTable, scheme: Scheme, method: str, keep: Collection[str] = ()) -> Any:
    """Quantize a model in normal form -> ModelProto, INT8 and FP32.

    ``keep`` names nodes that stay in floating point. Raises `StaleError` if ``table`` is of another model.
    """
    helper, numpy_helper = need("onnx.helper", "onnx"), need("onnx.numpy_helper", "onnx")
    if done := [n.name for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]:
        raise InputError("the model is quantized already", evidence=f"node {done[0]}", hint="give the FP32 model")
    table.require({"model": graph.digest(model)})
    out = equalize(model, table.exponents)
    g = out.graph
    weights, readers = graph.initializers(out), graph.consumers(out)
    for node in g.node:
        if node.op_type in graph.LAYERS and node.name not in keep:
            _check_layer(node, weights, readers)
    tensors = pairs(model, scheme, keep)
    scales = activation_scales(model, table, scheme, method, tensors)
    nodes: list[Any] = []
    constants: dict[str, np.ndarray] = {}
    held: dict[str, str] = {}  # tensor -> its dequantized name, once it has been through a Q/DQ pair

    def pair(tensor: str, scale: np.ndarray, zero: np.ndarray, **axis: int) -> str:
        """Quantize and dequantize ``tensor`` -> the dequantized name."""
        parts = [f"{tensor}.scale", f"{tensor}.zero_point"]
        constants.update(zip(parts, (scale, zero), strict=True))
        q, dq = f"{tensor}.q", f"{tensor}.dq"
        nodes.append(helper.make_node("QuantizeLinear", [tensor, *parts], [q], name=q, **axis))
        nodes.append(helper.make_node("DequantizeLinear", [q, *parts], [dq], name=dq, **axis))
        return dq

    def constant(name: str, integers: np.ndarray, scale: np.ndarray) -> str:
        """Store ``integers`` with ``scale`` (K,) along axis 0, dequantized by a node of its own."""
        parts = [f"{name}.int", f"{name}.scale", f"{name}.zero_point"]
        constants.update(zip(parts, (integers, scale, np.zeros(len(scale), integers.dtype)), strict=True))
        nodes.append(helper.make_node("DequantizeLinear", parts, [f"{name}.dq"], name=f"{name}.dq", axis=0))
        return f"{name}.dq"

    if graph.INPUT in tensors:
        held[graph.INPUT] = pair(graph.INPUT, *scales[graph.INPUT])
    for node in g.node:
        new = type(node)()
        new.CopyFrom(node)
        if node.op_type in graph.LAYERS and node.name not in keep and node.input[0] in held:
            data, weight, *bias = node.input
            w, x_scale = weights[weight], scales[data][0] if scheme.int32_bias else np.ones((), np.float32)
            b = weights[bias[0]] if bias and scheme.int32_bias else np.zeros(len(w), np.float32)
            integers, w_scale = quantize_weight(w, scheme, b, x_scale)
            if scheme.int8_weights:
                new.input[1] = constant(weight, integers, w_scale)
            else:
                new.input[1] = pair(weight, w_scale, np.zeros(len(w_scale), np.int8), axis=0)
            if bias and scheme.int32_bias:
                b_scale = x_scale * w_scale
                new.input[2] = constant(bias[0], np.rint(b / b_scale).astype(np.int32), b_scale)
        for i, name in enumerate(new.input):
            new.input[i] = held.get(name, name)
        nodes.append(new)
        for tensor in node.output:
            if tensor in tensors:
                held[tensor] = pair(tensor, *scales[tensor])
    kept = {name for node in nodes for name in node.input}
    del g.node[:], g.initializer[:], g.value_info[:]
    g.node.extend(nodes)
    g.initializer.extend(numpy_helper.from_array(a, name) for name, a in (weights | constants).items() if name in kept)
    graph.set_metadata(out, {**graph.metadata(model), "precision": "int8"})
    return out


def pairs(model: Any, scheme: Scheme, keep: Collection[str] = ()) -> set[str]:
    """Tensors that go through a Q/DQ pair under ``scheme``."""
    readers = graph.consumers(model)
    nodes = [n for n in model.graph.node if n.name not in keep]
    if scheme.everywhere:
        tensors = {name for n in nodes if n.op_type in INTEGER for name in (*n.input, *n.output)}
        # what only a ReLU reads is fused into its producer; what nobody reads is the output
        tensors = {t for t in tensors if not {r.op_type for r in readers.get(t, [])} <= {"Relu", "Clip"}}
    else:
        tensors = {n.input[0] for n in nodes if n.op_type in (*graph.LAYERS, *POOLS)}
        tensors |= {name for n in nodes if n.op_type == "Add" for name in n.input}
    if not scheme.main_branch:
        tensors -= {graph.main_branch(model, n) for n in nodes if n.op_type == "Add"}
    others = (*model.graph.initializer, *model.graph.output)
    return tensors - {"", *(t.name for t in others)}  # "" is an optional input left out


def float_operators(model: Any) -> dict[str, int]:
    """Operators of an FP32 ``model`` that no scheme quantizes, and how many there are of each."""
    return {op: n for op, n in graph.count_ops(model).items() if op not in INTEGER}


def activation_scales(
    model: Any, table: RangeTable, scheme: Scheme, method: str, tensors: Collection[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tensor -> (scale float32 (), zero point int8 or uint8 ()), so that real = (integer - zero point) * scale."""
    scales = {}
    for name in sorted(tensors):
        source = _source(model, name, SAME_VALUES if scheme.everywhere else ("Flatten",))
        if source not in table.tensors:
            raise InputError(f"the range table does not cover tensor {source}", hint="calibrate this model again")
        lo, hi = interval(table.tensors[source], scheme, method)
        if scheme.signed:
            scale = hi / 127
            zero = np.asarray(0, np.int8)
        else:
            scale = (hi - lo) / 255
            zero = np.asarray(np.clip(np.rint(-lo / scale) if scale else 0, 0, 255), np.uint8)
        scales[name] = _normal(np.asarray(scale), scheme), zero
    return scales


def interval(r: TensorRange, scheme: Scheme, method: str) -> tuple[float, float]:
    """What the integers of ``scheme`` cover of ``r``, by ``method``."""
    if not scheme.signed:
        return METHODS[method](r, 255)
    threshold = METHODS[method](magnitudes(r), 127)[1]
    return -threshold, threshold


def magnitudes(r: TensorRange) -> TensorRange:
    """The range of |x|: what a symmetric scheme divides into 127 steps."""
    counts = np.zeros_like(r.histogram)
    counts[BINS:] = r.histogram[BINS:] + r.histogram[BINS - 1 :: -1]
    return replace(r, min=0.0, max=max(-r.min, r.max, 0.0), histogram=counts)


def quantize_weight(
    weight: np.ndarray, scheme: Scheme, bias: np.ndarray | float = 0, x_scale: np.ndarray | float = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Weight (K, ...) -> int8 (K, ...) and scale float32 (K,): threshold / (2^(bits-1) - 1) per output channel.

    A channel of zeros gets scale 1, and so does one whose products with the input, of ``x_scale``, vanish in FP32. A
    scale so small that ``bias`` (K,) would not fit int32 is raised until it does.
    """
    top = 2 ** (scheme.weight_bits - 1) - 1
    threshold = WEIGHTS[scheme.weights](weight.reshape(len(weight), -1), top)
    scale = np.maximum(threshold / top, np.abs(bias) / (x_scale * np.float32(2**30)))
    scale = _normal(np.where(scale * x_scale > np.finfo(np.float32).tiny, scale, 0), scheme)
    integers = np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1)))
    return np.clip(integers, -top - 1, top).astype(np.int8), scale


def _normal(scale: np.ndarray, scheme: Scheme) -> np.ndarray:
    """``scale`` as executors take it, float32 and no subnormal number where it is stored.

    1 where it is as good as 0: what it scales is a constant 0, and any will do.
    """
    scale = np.where(scale > np.finfo(np.float32).tiny, scale, 1)
    return np.maximum(scale, scheme.smallest).astype(np.float32)


def _source(model: Any, name: str, same: tuple[str, ...]) -> str:
    """The tensor whose values ``name`` carries: back through operators of ``same`` to where they were computed."""
    for node in model.graph.node:
        if name in node.output and node.op_type in same:
            return _source(model, node.input[0], same)
    return name


def _check_layer(node: Any, constants: dict[str, np.ndarray], readers: dict[str, list[Any]]) -> None:
    """Weights must be finite constants of one layer, their output channels on axis 0, which for Gemm means transB."""
    for name in filter(None, node.input[1:]):
        if others := [n.name for n in readers[name] if n.name != node.name]:
            raise InputError(
                f"cannot quantize {node.op_type} {node.name}",
                evidence=f"it shares {name} with {others[0]}",
                hint="`edgeres import` gives every layer constants of its own",
            )
        if name not in constants:
            raise InputError(
                f"cannot quantize {node.op_type} {node.name}",
                evidence=f"its input {name} is no constant",
                hint="`edgeres import` folds what can be computed before",
            )
        if not np.isfinite(constants[name]).all():
            raise InputError(
                f"cannot quantize {node.op_type} {node.name}",
                evidence=f"{name} holds NaN or infinity",
                hint="the checkpoint is damaged, or its training went wrong",
            )
    attributes = {a.name: a.i for a in node.attribute if a.name in ("transA", "transB")}
    if node.op_type == "Gemm" and attributes != {"transB": 1}:
        raise InputError(
            f"cannot quantize Gemm {node.name}", evidence=f"attributes {attributes}", hint="needs transB=1"
        )
