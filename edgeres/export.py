"""PyTorch model -> FP32 ONNX in normal form, with the parity that was measured.

The graph is read off the module itself by torch.fx and written node by node. That keeps PyTorch's layer names, the
opset that was asked for, and GlobalAveragePool; torch.onnx's two exporters give up one or another of these
(DECISIONS.md, "Export").
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

import edgeres
from edgeres import graph
from edgeres.errors import BuildError, need
from edgeres.fidelity import MIN_PARITY_DB, decibels, squares
from edgeres.recipe import Preprocess


@dataclass(frozen=True)
class Parity:
    """PyTorch against ONNX Runtime on the same ``images``: largest logit difference, and SQNR of the logits in dB."""

    images: int
    max_abs: float
    db: float


def export_onnx(
    model: nn.Module,
    preprocess: Preprocess,
    record: dict[str, Any],
    *,
    opset: int = 17,
    batch: int | None = None,
    images: Iterable[np.ndarray] = (),
    seed: int = 0,
) -> Any:
    """Export ``model`` for (N, 3, crop, crop) FP32 input -> ModelProto with parity and ``record`` in its metadata.

    ``batch`` None gives a dynamic N. ``images`` are batches (N, 3, crop, crop) on which parity is measured, besides
    random ones drawn with ``seed``. Raises `BuildError` for a layer it does not know and for a parity below
    `MIN_PARITY_DB`.
    """
    model = model.eval()
    proto = trace(model, preprocess.crop, opset, batch)
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((batch or 8, 3, preprocess.crop, preprocess.crop), dtype=np.float32)
    parity = {"random": measure_parity(model, proto, [noise]), "images": measure_parity(model, proto, images)}
    for kind, p in parity.items():
        if p is not None and not p.db >= MIN_PARITY_DB:
            raise BuildError(
                f"the ONNX graph does not compute what PyTorch computes: {p.db:.1f} dB on {kind}",
                evidence=f"largest difference {p.max_abs:.3g} over {p.images} images",
                hint=f"at least {MIN_PARITY_DB:.0f} dB is expected of FP32; nothing was written",
            )
    graph.set_metadata(
        proto,
        {
            **record,
            "edgeres": edgeres.__version__,
            "precision": "fp32",
            "classes": proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value,
            "opset": opset,
            "batch": batch,
            "preprocess": preprocess.to_json(),
            "parity": {kind: None if p is None else vars(p) for kind, p in parity.items()},
        },
    )
    return proto


def trace(model: nn.Module, input_size: int, opset: int, batch: int | None) -> Any:
    """Write ``model`` as ONNX, batch norm folded -> ModelProto. Layers are named as in PyTorch (layer1.0.conv1)."""
    helper, numpy_helper = need("onnx.helper", "onnx"), need("onnx.numpy_helper", "onnx")
    traced = fx.symbolic_trace(model)
    modules = dict(traced.named_modules())
    nodes: list[Any] = []
    constants: list[Any] = []
    value: dict[fx.Node, str] = {}  # fx node -> the ONNX tensor that carries its result
    classes = 0

    def constant(name: str, array: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name))
        return name

    def emit(op: str, node: fx.Node, name: str, extra: Iterable[str] = (), **attributes: Any) -> None:
        inputs = [value[n] for n in node.all_input_nodes]
        nodes.append(helper.make_node(op, [*inputs, *extra], [name], name=name, **attributes))
        value[node] = name

    for node in traced.graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        name = str(node.target) if module is not None else _scoped(node)
        if node.op == "placeholder":
            value[node] = graph.INPUT
        elif node.op == "output":
            value[node] = value[node.args[0]]
        elif isinstance(module, nn.Conv2d):
            follower = next(iter(node.users))
            norm = modules.get(str(follower.target)) if len(node.users) == 1 else None
            weight, bias = fold(module, norm if isinstance(norm, nn.BatchNorm2d) else None)
            emit(
                "Conv",
                node,
                name,
                [constant(f"{name}.weight", weight), constant(f"{name}.bias", bias)],
                kernel_shape=list(module.kernel_size),
                strides=list(module.stride),
                pads=[*_pair(module.padding), *_pair(module.padding)],
                dilations=list(module.dilation),
                group=module.groups,
            )
        elif isinstance(module, nn.BatchNorm2d) and _is_conv(node.args[0], modules) and len(node.args[0].users) == 1:
            value[node] = value[node.args[0]]  # folded into the convolution above
        elif isinstance(module, nn.ReLU):
            emit("Relu", node, name)
        elif isinstance(module, nn.MaxPool2d) and not module.ceil_mode and module.dilation == 1:
            pads = [*_pair(module.padding), *_pair(module.padding)]
            emit("MaxPool", node, name, kernel_shape=_pair(module.kernel_size), strides=_pair(module.stride), pads=pads)
        elif isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
            emit("GlobalAveragePool", node, name)
        elif node.target in (operator.add, torch.add) and len(node.all_input_nodes) == 2:
            emit("Add", node, name)
        elif node.target is torch.flatten and node.args[1:] == (1,):
            emit("Flatten", node, name, axis=1)
        elif isinstance(module, nn.Linear):
            classes = module.out_features
            bias = module.bias.detach().numpy() if module.bias is not None else np.zeros(classes)
            parameters = [constant(f"{name}.weight", module.weight.detach().numpy()), constant(f"{name}.bias", bias)]
            emit("Gemm", node, name, parameters, transB=1)
        else:
            raise BuildError(
                f"cannot export layer {name} ({type(module).__name__ if module else node.target})",
                hint="export knows what a ResNet is made of: Conv2d, BatchNorm2d after it, ReLU, MaxPool2d, "
                "AdaptiveAvgPool2d(1), add, flatten, Linear",
            )
    nodes[-1].output[0] = graph.OUTPUT  # only the last node's result leaves the graph
    return graph.assemble(nodes, constants, type(model).__name__, (3, input_size, input_size), classes, opset, batch)


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[np.ndarray, np.ndarray]:
    """Weight (K, C, R, S) and bias (K) of ``conv`` with ``norm`` folded in, FP32.

    Computed in FP64 with correctly rounded operations only, so that the result is the same on every machine.
    """
    weight = conv.weight.detach().double().numpy()
    bias = conv.bias.detach().double().numpy() if conv.bias is not None else np.zeros(len(weight))
    if norm is not None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        gain = norm.weight.detach().double().numpy() / np.sqrt(norm.running_var.double().numpy() + norm.eps)
        bias = (bias - norm.running_mean.double().numpy()) * gain + norm.bias.detach().double().numpy()
        weight = weight * gain[:, None, None, None]
    return weight.astype(np.float32), bias.astype(np.float32)


def measure_parity(model: nn.Module, proto: Any, batches: Iterable[np.ndarray]) -> Parity | None:
    """Run both on ``batches`` of (N, 3, H, W); None without a batch."""
    ort = need("onnxruntime", "onnx")
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    expected: list[np.ndarray] = []
    actual: list[np.ndarray] = []
    for images in batches:
        with torch.inference_mode():
            expected.append(model(torch.from_numpy(images)).numpy())
        actual.append(session.run(None, {graph.INPUT: images})[0])
    if not expected:
        return None
    reference, result = np.concatenate(expected), np.concatenate(actual)
    return Parity(len(reference), float(np.abs(reference - result).max()), decibels(*squares(reference, result)))


def _scoped(node: fx.Node) -> str:
    """Name for a function call: the module it happens in, then the function (layer1.0.add)."""
    stack = list(node.meta.get("nn_module_stack") or {"": None})
    function = getattr(node.target, "__name__", str(node.target))
    return f"{stack[-1]}.{function}" if stack[-1] else function


def _is_conv(node: Any, modules: dict[str, nn.Module]) -> bool:
    return isinstance(modules.get(str(node.target)), nn.Conv2d)


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
