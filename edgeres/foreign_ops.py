"""What a foreign graph was read into: folding it to the operators of the normal form, and writing those."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from edgeres import graph
from edgeres.errors import BuildError, need

LETTERS = "NCHW"
Sizes = tuple[int, int, int, int]
POINT = {"kernel_shape": [1, 1], "strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1]}
"""A 1x1 convolution."""
TENSORFLOW = (
    "Conv2D",
    "BiasAdd",
    "MatMul",
    "FusedBatchNorm",
    "FusedBatchNormV3",
    "AddV2",
    "MaxPool",
    "MaxPool2d",
    "Mean",
)
SAID_BY = {"Relu": ("relu", "act"), "MaxPool": ("pool",), "GlobalAveragePool": ("pool", "mean"), "Add": ("add",)}
"""Words in the name of a layer that make the operator's own unnecessary."""


@dataclass(eq=False)
class Op:
    """One node to be written. Its result has ``sizes`` in NCHW; it is (N, C) where ``flat``.

    ``kind`` is an ONNX operator, or one of three that folding removes again: ``Pad`` (H and W), ``Affine``
    ((x - center) * gain + offset per channel), ``Select`` (output channel k is input channel channels[k], or zero for
    -1, at every stride-th place). ``weight`` and ``bias`` stay FP64 until they are written.
    """

    kind: str
    inputs: list[Op]
    sizes: Sizes
    name: str = ""
    flat: bool = False
    weight: np.ndarray = field(default_factory=lambda: np.empty(0))
    bias: np.ndarray = field(default_factory=lambda: np.empty(0))
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Value:
    """The foreign ``tensor``: what ``op`` computes, each of its own axes holding the ``axes`` letters ("" for size 1).

    NHWC is ("N", "H", "W", "C"), flattened features are ("N", "CHW"). ``head``: past a softmax or the like.
    """

    op: Op
    axes: tuple[str, ...]
    tensor: str
    head: bool = False

    @property
    def size(self) -> dict[str, int]:
        """Letter -> extent."""
        return dict(zip(LETTERS, self.op.sizes, strict=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """The foreign tensor's own shape."""
        return tuple(math.prod(self.size[letter] for letter in group) for group in self.axes)

    @property
    def layout(self) -> tuple[str, ...]:
        """``axes`` without the letters of size 1, which say nothing."""
        return tuple("".join(x for x in group if x == "N" or self.size[x] > 1) for group in self.axes)

    def like(self, axes: Iterable[str]) -> bool:
        """Whether the tensor has these axes, up to those of size 1."""
        return self.layout == replace(self, axes=tuple(axes)).layout


def fold(ops: Sequence[Op], last: Op) -> list[Op]:
    """Those of ``ops`` that ``last`` needs, folded: what cannot join a convolution becomes one of its own."""
    end = Op("End", [last], last.sizes)
    needed = [end]
    for op in needed:
        needed += [i for i in op.inputs if i not in needed]
    live = [op for op in ops if op in needed] + [end]
    for op in list(live):
        if op.kind in FOLDS and FOLDS[op.kind](op, live):
            live.remove(op)
            for reader in live:
                reader.inputs = [op.inputs[0] if i is op else i for i in reader.inputs]
    return live[:-1]


def _fold_affine(op: Op, live: list[Op]) -> bool:
    """Into the layer before; else, of flat features, into the one behind; else a convolution channel by channel."""
    center, gain, offset = op.attributes["terms"]
    before, readers = op.inputs[0], _readers(op, live)
    if before.kind in ("Conv", "Gemm") and _readers(before, live) == [op]:
        before.weight = before.weight * gain.reshape(-1, *[1] * (before.weight.ndim - 1))
        before.bias = (before.bias - center) * gain + offset
        return True
    if not op.flat:
        op.kind, op.attributes = "Conv", {**POINT, "group": op.sizes[1]}
        op.weight, op.bias = gain.reshape(-1, 1, 1, 1), (0 - center) * gain + offset
        return False
    if {r.kind for r in readers} != {"Gemm"}:
        raise BuildError(f"cannot fold {op.name or 'arithmetic'}: it follows {before.kind} {before.name}")
    for reader in readers:  # sums are exact, so that they are the same on every machine
        products = reader.weight * ((0 - center) * gain + offset)
        reader.bias = reader.bias + np.array([math.fsum(row) for row in products])
        reader.weight = reader.weight * gain
    return True


def _fold_select(op: Op, live: list[Op]) -> bool:
    """Into the rows of the layer before; else a 1x1 convolution of zeros and ones."""
    before, channels, strides = op.inputs[0], op.attributes["channels"], op.attributes["strides"]
    pick = np.eye(before.sizes[1] + 1, before.sizes[1])[channels]  # row -1 is zero
    plain = before.kind in ("Conv", "Gemm") and before.attributes.get("group", 1) == 1
    if plain and strides == [1, 1] and _readers(before, live) == [op]:
        before.weight = np.concatenate([before.weight, 0 * before.weight[:1]])[channels]
        before.bias = np.append(before.bias, 0)[channels]
        before.sizes = op.sizes
        return True
    if op.flat:
        raise BuildError(f"cannot fold {op.name or 'a slice'}: it follows {before.kind} {before.name}")
    op.kind, op.attributes = "Conv", {**POINT, "strides": strides, "group": 1}
    op.weight, op.bias = pick[:, :, None, None], np.zeros(len(pick))
    return False


def _fold_pad(op: Op, live: list[Op]) -> bool:
    """Into everything that reads it; else, of zeros, a convolution that changes nothing but has this padding."""
    value, readers = op.attributes["value"], _readers(op, live)
    if not all(_takes_pad(reader, op) for reader in readers):
        if value != 0:
            raise BuildError(
                f"cannot fold {op.name or 'a Pad'} with {value:g} into {readers[0].kind} {readers[0].name}"
            )
        op.kind, op.attributes = "Conv", {**POINT, "pads": op.attributes["pads"], "group": op.sizes[1]}
        op.weight, op.bias = np.ones((op.sizes[1], 1, 1, 1)), np.zeros(op.sizes[1])
        return False
    for reader in readers:
        pads = [a + b for a, b in zip(op.attributes["pads"], reader.attributes["pads"], strict=True)]
        reader.attributes = {**reader.attributes, "pads": pads}
    return True


def _takes_pad(reader: Op, pad: Op) -> bool:
    """A max pool pads with -inf, which a zero equals where nothing is negative and every window holds a pixel."""
    value = pad.attributes["value"]
    if reader.kind == "MaxPool":
        pads = np.add(pad.attributes["pads"], reader.attributes["pads"])
        inside = (pads < np.tile(reader.attributes["kernel_shape"], 2)).all()
        return bool(inside) and (value == -math.inf or (value == 0 and _never_negative(pad.inputs[0])))
    return (reader.kind == "Conv" and value == 0) or (reader.kind == "Pad" and value == reader.attributes["value"])


FOLDS = {"Affine": _fold_affine, "Select": _fold_select, "Pad": _fold_pad}


def _readers(op: Op, live: list[Op]) -> list[Op]:
    return [reader for reader in live if op in reader.inputs]


def _never_negative(op: Op) -> bool:
    return op.kind == "Relu" or (op.kind in ("MaxPool", "Pad", "Select") and _never_negative(op.inputs[0]))


def write(ops: Sequence[Op], source: Op, opset: int, batch: int | None, title: str) -> Any:
    """``ops`` in normal form -> ModelProto; the last one's result is the logits."""
    helper, numpy_helper = need("onnx.helper", "onnx"), need("onnx.numpy_helper", "onnx")
    names = {source: graph.INPUT, **_names(ops)}
    results = {**names, ops[-1]: graph.OUTPUT}
    nodes, constants = [], []
    for op in ops:
        inputs = [results[i] for i in op.inputs]
        if op.kind in ("Conv", "Gemm"):
            for part, array in (("weight", op.weight), ("bias", op.bias)):
                inputs.append(f"{names[op]}.{part}")
                constants.append(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), inputs[-1]))
        attributes = {"Flatten": {"axis": 1}, "Gemm": {"transB": 1}}.get(op.kind, op.attributes)
        nodes.append(helper.make_node(op.kind, inputs, [results[op]], name=names[op], **attributes))
    return graph.assemble(nodes, constants, title, tuple(source.sizes[1:]), ops[-1].sizes[1], opset, batch)


def _names(ops: Sequence[Op]) -> dict[Op, str]:
    """A name for each, none twice: the file's own, or the operator's; numbered from the second on."""
    taken, out = {graph.INPUT, graph.OUTPUT}, {}
    for op in ops:
        stem, number = op.name or op.kind.lower(), 0
        name = stem
        while {name, f"{name}.weight", f"{name}.bias"} & taken:
            number += 1
            name = f"{stem}_{number}"
        taken |= {name, f"{name}.weight", f"{name}.bias"}
        out[op] = name
    return out


def name_of(node: Any, kind: str) -> str:
    """The node's own name in PyTorch's manner (layer1.0.conv1), or "" where the file has none."""
    weight = node.input[1] if kind in ("Conv", "Gemm") and len(node.input) > 1 else ""
    if weight.endswith(".weight"):
        return str(weight).removesuffix(".weight")
    # torch.onnx.export numbers its nodes and notes the modules beside them, the innermost before the function
    scopes = next((e.value for e in getattr(node, "metadata_props", ()) if e.key == "pkg.torch.onnx.name_scopes"), "")
    if scopes:
        parts = [scopes.strip("[]").replace("'", "").split(", ")[-2], kind]
    else:
        parts = []
        for part in filter(None, node.name.split("/")):  # /layer1/layer1.0/conv1/Conv repeats what it is inside of
            parts[-1:] = [part] if parts and part.startswith(f"{parts[-1]}.") else [*parts[-1:], part]
    parts = [*filter(None, parts)]
    if len(parts) > 1 and parts[-1].split("_")[0] in (node.op_type, kind, *TENSORFLOW):
        parts.pop()
        if not any(word in parts[-1].rpartition(".")[2].lower() for word in SAID_BY.get(kind, ("",))):
            parts.append(kind.lower())
    clean = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in ".".join(parts))
    return clean.strip("._")
