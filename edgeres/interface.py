"""What an engine takes and gives: FP32, FP16, or raw uint8 pixels that the graph normalizes itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeres import graph
from edgeres.errors import need
from edgeres.fp16 import HALF, SINGLE
from edgeres.recipe import Preprocess

UINT8 = 2
"""onnx.TensorProto.UINT8."""


def interface(model: Any, io: str, preprocess: Preprocess) -> Any:
    """Give ``model``, whose input and output are FP32, those of ``io`` -> ModelProto.

    fp16: input (N, 3, H, W) and output (N, classes) in FP16. uint8: input (N, 3, H, W) in uint8, pixels as decoded, in
    the network's channel order; output in FP32. The graph then takes the steps of `loader.normalizer`, so that the
    numbers are the same to the last bit.
    """
    out = type(model)()
    out.CopyFrom(model)
    if io == "fp16":
        _input(out, HALF, [("Cast", {"to": SINGLE}, None)])
        _output(out)
        _drop_cast_pairs(out)
    elif io == "uint8":
        mean, std = (np.asarray(v, np.float32).reshape(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))
        if preprocess.channel_order == "BGR":
            mean, std = mean[:, ::-1], std[:, ::-1]
        steps = [("Cast", {"to": SINGLE}, None), ("Div", {}, np.float32(255)), ("Sub", {}, mean), ("Div", {}, std)]
        _input(out, UINT8, steps)
    graph.set_metadata(out, {**graph.metadata(model), "io": io})
    return out


def _input(model: Any, kind: int, steps: list[tuple[str, dict[str, int], Any]]) -> None:
    """Make the input of type ``kind``; its readers get it through ``steps`` (operator, attributes, constant)."""
    helper, numpy_helper = need("onnx.helper", "onnx"), need("onnx.numpy_helper", "onnx")
    name, nodes = graph.INPUT, []
    for i, (op, attributes, constant) in enumerate(steps):
        inputs, out = [name], f"{graph.INPUT}.{op.lower()}{i}"
        if constant is not None:
            inputs.append(f"{out}.by")
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(constant), inputs[1]))
        nodes.append(helper.make_node(op, inputs, [out], name=out, **attributes))
        name = out
    rest = list(model.graph.node)
    for node in rest:
        node.input[:] = [name if i == graph.INPUT else i for i in node.input]
    model.graph.input[0].type.tensor_type.elem_type = kind
    graph.set_nodes(model, [*nodes, *rest])


def _output(model: Any) -> None:
    """Make the FP32 output FP16, by a Cast at the end."""
    helper = need("onnx.helper", "onnx")
    inner = f"{graph.OUTPUT}.single"
    nodes = list(model.graph.node)
    for node in nodes:
        node.output[:] = [inner if o == graph.OUTPUT else o for o in node.output]
    model.graph.output[0].type.tensor_type.elem_type = HALF
    graph.set_nodes(model, [*nodes, helper.make_node("Cast", [inner], [graph.OUTPUT], name=graph.OUTPUT, to=HALF)])


def _drop_cast_pairs(model: Any) -> None:
    """Take out FP16 -> FP32 -> FP16, at both ends of an FP16 graph."""
    casts = {n.output[0]: (n.input[0], n.attribute[0].i) for n in model.graph.node if n.op_type == "Cast"}
    same = {
        out: casts[source][0]
        for out, (source, kind) in casts.items()
        if kind == HALF and source in casts and casts[source][1] == SINGLE
    }
    nodes: list[Any] = []
    for node in model.graph.node:
        if node.output[0] in same and node.output[0] != graph.OUTPUT:
            continue
        if node.output[0] in same:  # the output keeps its name: its producer takes it
            producer = next(n for n in nodes if same[graph.OUTPUT] in n.output)
            producer.output[:] = [graph.OUTPUT]
            continue
        node.input[:] = [same.get(i, i) for i in node.input]
        nodes.append(node)
    read = {i for n in nodes for i in n.input} | {graph.OUTPUT}
    graph.set_nodes(model, [n for n in nodes if read & set(n.output)])
