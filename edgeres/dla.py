"""The form of a graph that a Jetson's DLA runs to the end: everything four-dimensional, pools of a given size.

DLA has neither GlobalAveragePool nor Flatten; AveragePool and a 1x1 convolution compute the same
(NVIDIA/Deep-Learning-Accelerator-SW: operators/README.md, scripts/prepare_models/resnet50.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeres import graph
from edgeres.errors import InputError, need

UNSHAPED = ("QuantizeLinear", "DequantizeLinear", "Cast")
"""Operators that leave shapes as they are, and may lie between Flatten and Gemm."""


def dla_form(model: Any) -> Any:
    """``model``, FP32 or typed, from which DLA need not go back to the GPU -> ModelProto.

    GlobalAveragePool becomes AveragePool, Flatten goes, and the Gemm that reads a pool becomes a 1x1 Conv: the logits
    are (N, classes, 1, 1). Raises `InputError` for a Gemm that reads something else.
    """
    helper, numpy_helper = need("onnx.helper", "onnx"), need("onnx.numpy_helper", "onnx")
    out = need("onnx.shape_inference", "onnx").infer_shapes(model)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in out.graph.value_info}
    weights = {t.name: t for t in out.graph.initializer}
    producer = {o: n for n in out.graph.node for o in n.output}
    same: dict[str, str] = {}  # what Flatten gave -> what it got
    single = {name for name, shape in shapes.items() if shape[2:] == [1, 1]}  # one pixel
    nodes: list[Any] = []
    for node in out.graph.node:
        node.input[:] = [same.get(i, i) for i in node.input]
        if node.op_type in UNSHAPED and node.input[0] in single:
            single.update(node.output)
        if node.op_type == "Flatten":
            same[node.output[0]] = node.input[0]
            continue
        if node.op_type == "GlobalAveragePool":
            size = shapes[node.input[0]][2:]
            node = helper.make_node("AveragePool", node.input, node.output, name=node.name, kernel_shape=size)
        elif node.op_type == "Gemm":
            if node.input[0] not in single:
                raise InputError(f"{node.name} is no classifier after a pool", hint="DLA takes ResNets only")
            tensor = weights[_stored(node.input[1], producer)]
            values = numpy_helper.to_array(tensor)
            if not any(a.name == "transB" and a.i for a in node.attribute):
                values = values.T
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values)[:, :, None, None], tensor.name))
            node = helper.make_node("Conv", node.input, node.output, name=node.name, kernel_shape=[1, 1])
        nodes.append(node)
    graph.set_nodes(out, nodes)
    del out.graph.value_info[:]
    for _ in range(2):
        out.graph.output[0].type.tensor_type.shape.dim.add(dim_value=1)
    return out


def _stored(name: str, producer: dict[str, Any]) -> str:
    """The constant that ``name`` is, or is made from by Q/DQ or Cast."""
    while name in producer:
        name = producer[name].input[0]
    return name
