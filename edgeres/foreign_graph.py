"""A foreign ONNX graph, read from input to logits into the few operators of the normal form.

Nothing is rewritten in place. Each node is read once, with concrete sizes, and becomes an `Op` over (N, C, H, W), or
only another view of one: layout changes, squeezes and reshapes are labels on a `Value` until a classifier needs the
features flat. Whatever has no activation among its inputs is computed, and is a constant from then on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgeres.errors import BuildError, need
from edgeres.foreign_ops import LETTERS, Op, Sizes, Value, name_of
from edgeres.foreign_shapes import Unreadable, extents, per_channel, view, window_of

HEADS = {"Softmax", "LogSoftmax", "ArgMax", "TopK", "ReduceMax"}
"""What turns logits into an answer; it is cut off."""
AFTER_HEADS = HEADS | {"Log", "Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose"}
FLOATS = (1, 10, 11, 16)  # TensorProto.FLOAT, FLOAT16, DOUBLE, BFLOAT16
DYNAMIC_BATCH = 17
"""Stands for an open batch size where shapes are computed: a prime, so that it is told from a layer's width."""


class Reader:
    """Reads the nodes of one graph into `ops`; `values` and `constants` hold what is known about each tensor."""

    def __init__(self, opset: int, constants: dict[str, np.ndarray], source: Value) -> None:
        self.opset, self.constants = opset, constants
        self.values: dict[str, Value] = {source.tensor: source}
        self.unreadable: list[str] = []
        self.unknown: set[str] = set()
        self.ops: list[Op] = []

    def read(self, nodes: Iterable[Any]) -> None:
        """Read all ``nodes``. Raises one `BuildError` that lists every node it cannot read."""
        for node in nodes:
            inputs = [n for n in node.input if n]
            if self.unknown.intersection(inputs):  # of an operator that is supported nothing can be said
                if not hasattr(self, f"_on_{node.op_type.lower()}") and node.op_type not in HEADS | {"Shape", "Size"}:
                    self.unreadable.append(f"{node.op_type} {node.name or node.output[0]}: not supported")
                self.unknown.update(node.output)
                continue
            try:
                self._node(node, [self.values[n] for n in inputs if n in self.values])
            except (Unreadable, ArithmeticError, LookupError, TypeError, ValueError) as error:
                # the checker looks at no values: strides of 0, axes that are not there, sizes that do not fit
                why = error if isinstance(error, Unreadable) else f"is malformed, {error}"
                self.unreadable.append(f"{node.op_type} {node.name or node.output[0]}: {why}")
                self.unknown.update(node.output)
        if self.unreadable:
            more = [f"and {len(self.unreadable) - 20} more"] if len(self.unreadable) > 20 else []
            raise BuildError(
                f"cannot read {len(self.unreadable)} of the file's nodes",
                evidence="\n".join(self.unreadable[:20] + more),
                hint="import knows what a ResNet is made of: Conv, BatchNormalization, Relu, MaxPool, mean pools, Add, "
                "Gemm or MatMul, and what exporters put around them",
            )

    def _node(self, node: Any, values: list[Value]) -> None:
        self.node = node
        self.attributes = {a.name: need("onnx.helper", "onnx").get_attribute_value(a) for a in node.attribute}
        handler: Callable[[Value], Value] | None = getattr(self, f"_on_{node.op_type.lower()}", None)
        if node.domain not in ("", "ai.onnx"):
            raise Unreadable(f"an operator of {node.domain}")
        if strange := {n for n in node.input if n} - self.values.keys() - self.constants.keys():
            raise Unreadable(f"nothing is known of its input {min(strange)}")
        if not values and node.op_type != "If" and not node.op_type.startswith(("Random", "Bernoulli", "Multinomial")):
            self.constants.update(zip(node.output, evaluate(node, self.constants, self.opset), strict=False))
        elif not values:
            raise Unreadable("not supported")
        elif values[0].head or node.op_type in HEADS:
            if node.op_type not in AFTER_HEADS or len(values) > 1:
                raise Unreadable("works on probabilities, so they are not the end of the network")
            self.values.update({name: replace(values[0], head=True) for name in node.output if name})
        elif node.op_type in ("Shape", "Size"):
            shape = np.array(values[0].shape, np.int64)
            shape = shape[self.attributes.get("start", 0) : self.attributes.get("end", None)]
            self.constants[node.output[0]] = shape if node.op_type == "Shape" else shape.prod()
        elif handler is None:
            raise Unreadable("not supported")
        elif len(values) > 1 and node.op_type not in ("Add", "Sum"):
            raise Unreadable("more than one input is computed from images")
        else:
            first = node.op_type in ("Add", "Sum", "Mul", "Concat") or node.input[0] in self.values
            if not first and node.op_type not in ("Sub",):
                raise Unreadable("its first input is a constant")
            self.values[node.output[0]] = replace(handler(values[0]), tensor=node.output[0])

    def _argument(self, index: int, attribute: str, default: Any = None) -> Any:
        """An argument that was an attribute in older opsets and is an input in newer ones."""
        if attribute in self.attributes:
            return self.attributes[attribute]
        name = self.node.input[index] if index < len(self.node.input) else ""
        return self.constants[name] if name else default

    def _constant(self, index: int) -> np.ndarray:
        """Input ``index``, which must be a constant, in FP64."""
        name = self.node.input[index] if index < len(self.node.input) else ""
        if name not in self.constants:
            raise Unreadable(f"input {index} is no constant")
        return self.constants[name].astype(np.float64)

    def _emit(self, kind: str, x: Value, sizes: Sizes, axes: Sequence[str] | None = None, **fields: Any) -> Value:
        if x.op.flat and kind not in ("Relu", "Affine", "Add", "Select", "Gemm"):
            raise Unreadable("follows the classifier")
        fields = {"name": name_of(self.node, kind), **fields}
        op = Op(kind, [x.op], sizes, **{"flat": x.op.flat, **fields})
        self.ops.append(op)
        return Value(op, tuple(LETTERS if axes is None else axes), "")

    # the same numbers under another shape

    def _on_identity(self, x: Value) -> Value:
        return x

    _on_dropout = _on_identity

    def _on_cast(self, x: Value) -> Value:
        if self.attributes["to"] not in FLOATS:
            raise Unreadable("turns activations into integers")
        return x

    def _on_transpose(self, x: Value) -> Value:
        order = self.attributes.get("perm", range(len(x.axes))[::-1])
        return replace(x, axes=tuple(x.axes[i] for i in order))

    def _on_squeeze(self, x: Value) -> Value:
        axes = self._argument(1, "axes")
        gone = [i for i, n in enumerate(x.shape) if n == 1] if axes is None else [int(a) % len(x.axes) for a in axes]
        return replace(x, axes=tuple(group for i, group in enumerate(x.axes) if i not in gone))

    def _on_unsqueeze(self, x: Value) -> Value:
        new = self._argument(1, "axes")
        axes, rank = list(x.axes), len(x.axes) + len(new)
        for i in sorted(int(a) % rank for a in new):
            axes.insert(i, "")
        return replace(x, axes=tuple(axes))

    def _on_flatten(self, x: Value) -> Value:
        axis = self.attributes.get("axis", 1)  # -1 counts from the end, as in a slice
        return view(x, [math.prod(x.shape[:axis]), math.prod(x.shape[axis:])])

    def _on_reshape(self, x: Value) -> Value:
        shape = [int(n) for n in self._argument(1, "shape")]
        if not self.attributes.get("allowzero"):
            shape = [x.shape[i] if n == 0 else n for i, n in enumerate(shape)]
        if -1 in shape:
            shape[shape.index(-1)] = math.prod(x.shape) // -math.prod(shape)
        return view(x, shape)

    # layers

    def _want_nchw(self, x: Value) -> None:
        if not x.like(LETTERS):
            raise Unreadable(f"reads {x.shape} as (N, C, H, W), but its axes hold {x.axes}")

    def _on_conv(self, x: Value) -> Value:
        self._want_nchw(x)
        weight = self._constant(1)
        if weight.ndim != 4 or len(x.axes) != 4:
            raise Unreadable("convolves in other than two dimensions")
        bias = self._constant(2) if len(self.node.input) > 2 and self.node.input[2] else np.zeros(len(weight))
        kernel, group = list(weight.shape[2:]), self.attributes.get("group", 1)
        window = window_of(x, kernel, self.attributes)
        if _pooled(x.op) and kernel == [1, 1] and group == 1 and not any(window["pads"]):
            features = replace(x, axes=("N", "C"))
            return replace(self._gemm_op(features, weight[:, :, 0, 0], bias), axes=tuple(LETTERS))
        sizes = (x.size["N"], len(weight), *extents(x, window))
        return self._emit("Conv", x, sizes, weight=weight, bias=bias, attributes={**window, "group": group})

    def _on_batchnormalization(self, x: Value) -> Value:
        if self.attributes.get("training_mode", 0) or not self.attributes.get("spatial", 1):
            raise Unreadable("is in training mode, or not per channel")
        if x.layout[1] not in ("C", ""):
            raise Unreadable("normalizes another axis than the channels")
        gain, offset, mean, variance = (self._constant(i) for i in range(1, 5))
        return self._affine(x, mean, gain / np.sqrt(variance + self.attributes.get("epsilon", 1e-5)), offset)

    def _on_relu(self, x: Value) -> Value:
        return self._emit("Relu", x, x.op.sizes, x.axes)

    def _on_clip(self, x: Value) -> Value:
        low = float(self._argument(1, "min", -math.inf))
        high = float(self._argument(2, "max", math.inf))
        if low != 0 or high < 3e38:
            raise Unreadable(f"clips to [{low:g}, {high:g}]; only [0, inf] is a Relu")
        return self._on_relu(x)

    def _on_maxpool(self, x: Value) -> Value:
        self._want_nchw(x)
        window = window_of(x, self.attributes["kernel_shape"], self.attributes)
        if window.pop("dilations") != [1, 1] or len([n for n in self.node.output if n]) > 1:
            raise Unreadable("is dilated, or gives indices")
        return self._emit("MaxPool", x, (*x.op.sizes[:2], *extents(x, window)), attributes=window)

    def _on_averagepool(self, x: Value) -> Value:
        self._want_nchw(x)
        kernel = list(self.attributes["kernel_shape"])
        window = window_of(x, kernel, self.attributes)
        if kernel == list(x.op.sizes[2:]) and not any(window["pads"]):
            return self._on_globalaveragepool(x)
        if any(window["pads"]) and (not self.attributes.get("count_include_pad") or self.attributes.get("ceil_mode")):
            raise Unreadable("averages fewer values at the border")
        sizes = (*x.op.sizes[:2], *extents(x, window))
        if kernel == [1, 1]:
            return self._select(x, range(sizes[1]), window["strides"])
        weight = np.full((sizes[1], 1, *kernel), 1 / math.prod(kernel))  # a convolution, channel by channel
        attributes = {**window, "group": sizes[1]}
        return self._emit("Conv", x, sizes, weight=weight, bias=np.zeros(sizes[1]), attributes=attributes)

    def _on_globalaveragepool(self, x: Value) -> Value:
        self._want_nchw(x)
        return x if x.op.flat else self._emit("GlobalAveragePool", x, (*x.op.sizes[:2], 1, 1))

    def _on_reducemean(self, x: Value) -> Value:
        axes = self._argument(1, "axes")
        if axes is None:
            raise Unreadable("averages over everything")
        over = {int(a) % len(x.axes) for a in axes}
        left = "".join(group for i, group in enumerate(x.layout) if i not in over)
        if not set(left) <= {"N", "C"} or not set("".join(x.layout[i] for i in over)) <= {"H", "W"}:
            raise Unreadable(f"averages over other axes than height and width of {x.shape}")
        kept = [
            "" if i in over else g for i, g in enumerate(x.axes) if i not in over or self.attributes.get("keepdims", 1)
        ]
        pooled = x if x.op.flat else self._emit("GlobalAveragePool", x, (*x.op.sizes[:2], 1, 1))
        return replace(pooled, axes=tuple(kept))

    def _on_gemm(self, x: Value) -> Value:
        weight = self._constant(1) * self.attributes.get("alpha", 1.0)
        weight = weight if self.attributes.get("transB", 0) else weight.T
        bias = self._constant(2) if len(self.node.input) > 2 and self.node.input[2] else np.zeros(1)
        if self.attributes.get("transA", 0) or bias.size not in (1, len(weight)):
            raise Unreadable("has transA, or a bias per image")
        return self._gemm_op(x, weight, bias.reshape(-1) * self.attributes.get("beta", 1.0))

    def _on_matmul(self, x: Value) -> Value:
        weight = self._constant(1)
        if weight.ndim != 2:
            raise Unreadable("multiplies by more than one matrix")
        result = self._gemm_op(x, weight.T, np.zeros(1))
        return replace(result, axes=(*x.axes[:-1], "C"))

    def _gemm_op(self, x: Value, weight: np.ndarray, bias: np.ndarray) -> Value:
        """``weight`` (K, F) on the features of ``x``, whose columns are put in the order that Flatten gives."""
        letters = x.layout[-1]
        if "".join(x.layout[:-1]) != "N":
            raise Unreadable(f"multiplies along one axis of {x.shape}")
        if (features := math.prod(x.size[letter] for letter in letters)) != weight.shape[1]:
            raise Unreadable(f"takes {weight.shape[1]} features and gets {features}: is the input size the network's?")
        if not x.op.flat:
            order = [letters.index(letter) + 1 for letter in "CHW" if letter in letters]
            weight = weight.reshape(-1, *(x.size[i] for i in letters)).transpose(0, *order).reshape(len(weight), -1)
            flat = Op("Flatten", [x.op], (x.size["N"], weight.shape[1], 1, 1), "flatten", True)
            self.ops.append(flat)
            x = Value(flat, ("N", "C"), "")
        bias = np.broadcast_to(bias, len(weight))
        return self._emit("Gemm", x, (x.size["N"], len(weight), 1, 1), ("N", "C"), weight=weight, bias=bias)

    # arithmetic

    def _on_add(self, x: Value) -> Value:
        others = [self.values[n] for n in self.node.input if n in self.values]
        if len(self.node.input) > 2:
            raise Unreadable("adds more than two tensors")
        if len(others) < 2:
            return self._affine(x, 0, 1, self._other())
        a, b = others
        if a.layout != b.layout or a.op.sizes != b.op.sizes or a.op.flat != b.op.flat:
            raise Unreadable(f"adds tensors of unlike shapes {a.shape} and {b.shape}")
        result = self._emit("Add", a, a.op.sizes, a.axes)
        result.op.inputs = [a.op, b.op]
        return result

    _on_sum = _on_add

    def _on_sub(self, x: Value) -> Value:
        if self.node.input[0] in self.values:
            return self._affine(x, self._other(), 1, 0)
        return self._affine(x, 0, -1, self._other())

    def _on_mul(self, x: Value) -> Value:
        return self._affine(x, 0, self._other(), 0)

    def _on_div(self, x: Value) -> Value:
        return self._affine(x, 0, 1 / self._other(), 0)

    def _other(self) -> np.ndarray:
        """The constant operand of two, in FP64."""
        return self._constant(int(self.node.input[0] in self.values))

    def _affine(self, x: Value, *terms: Any) -> Value:
        """(x - center) * gain + offset, each a number, a vector over channels, or what broadcasts to that."""
        is_norm = self.node.op_type == "BatchNormalization"
        arrays = [np.asarray(t, np.float64) for t in terms]
        channels = [np.broadcast_to(t, x.size["C"]) if is_norm else per_channel(x, t) for t in arrays]
        return self._emit("Affine", x, x.op.sizes, x.axes, attributes={"terms": channels})

    # parts and paddings

    def _on_slice(self, x: Value) -> Value:
        starts, ends = self._argument(1, "starts"), self._argument(2, "ends")
        axes, steps = self._argument(3, "axes", range(len(starts))), self._argument(4, "steps", [1] * len(starts))
        channels, strides = range(x.size["C"]), {"H": 1, "W": 1}
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            extent, letter = x.shape[axis], x.layout[axis] or x.axes[axis]
            part = range(extent)[slice(int(start), int(end), int(step))]
            if letter == "C":
                channels = part
            elif letter in strides and part == range(0, extent, int(step)):
                strides[letter] = int(step)
            elif part != range(extent):
                raise Unreadable(f"takes {part} of {extent} along axis {axis}")
        return self._select(x, channels, list(strides.values()))

    def _on_pad(self, x: Value) -> Value:
        mode, value = self.attributes.get("mode", b"constant"), float(self._argument(2, "value", 0))
        pads = [int(p) for p in self._argument(1, "pads")]
        axes = [int(a) for a in self._argument(3, "axes", range(len(x.axes)))]
        ends = zip(pads[: len(axes)], pads[len(axes) :], strict=True)
        around = {x.axes[a]: pair for a, pair in zip(axes, ends, strict=True) if any(pair)}
        if mode != b"constant" or min(pads) < 0 or not set(around) <= {"C", "H", "W"}:
            raise Unreadable(f"pads {pads} of {x.shape}, mode {mode.decode()}")
        if channels := around.pop("C", None):
            if value != 0:
                raise Unreadable(f"pads channels with {value:g}")
            x = self._select(x, [-1] * channels[0] + [*range(x.size["C"])] + [-1] * channels[1], [1, 1])
        if not around:
            return x
        (top, bottom), (left, right) = around.get("H", (0, 0)), around.get("W", (0, 0))
        N, C, H, W = x.op.sizes
        attributes = {"pads": [top, left, bottom, right], "value": value}
        return self._emit("Pad", x, (N, C, H + top + bottom, W + left + right), x.axes, attributes=attributes)

    def _on_concat(self, x: Value) -> Value:
        """Zeros before or after the channels: the shortcut of a CIFAR ResNet."""
        channels: list[int] = []
        for name in self.node.input:
            if name in self.values:
                channels += range(x.size["C"])
            elif not np.any(self.constants[name]):
                channels += [-1] * self.constants[name].shape[self.attributes["axis"]]
            else:
                raise Unreadable("joins constants other than zero")
        if x.layout[self.attributes["axis"]] != "C":
            raise Unreadable("joins along another axis than the channels")
        return self._select(x, channels, [1, 1])

    def _select(self, x: Value, channels: Sequence[int], strides: list[int]) -> Value:
        """Some channels of every stride-th pixel; what was selected from a selection is one selection."""
        axes, picked = x.axes, list(channels)
        if picked == [*range(x.size["C"])] and strides == [1, 1]:
            return x
        N, _, H, W = x.op.sizes
        if x.op.kind == "Select":
            before = x.op.attributes
            picked = [before["channels"][c] if c >= 0 else -1 for c in picked]
            strides = [a * b for a, b in zip(before["strides"], strides, strict=True)]
            x = Value(x.op.inputs[0], axes, "")
            H, W = x.op.sizes[2:]
        sizes = (N, len(picked), -(-H // strides[0]), -(-W // strides[1]))
        return self._emit("Select", x, sizes, axes, attributes={"channels": picked, "strides": strides})


def evaluate(node: Any, constants: dict[str, np.ndarray], opset: int) -> list[np.ndarray]:
    """Results of ``node``, all of whose inputs are ``constants``, by ONNX Runtime."""
    helper, numpy_helper, ort = (
        need("onnx.helper", "onnx"),
        need("onnx.numpy_helper", "onnx"),
        need("onnxruntime", "onnx"),
    )
    outputs = [need("onnx", "onnx").ValueInfoProto(name=name) for name in node.output if name]
    inputs = [numpy_helper.from_array(constants[name], name) for name in dict.fromkeys(node.input) if name]
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(helper.make_graph([node], "constant", [], outputs, inputs), opset_imports=opsets)
    model.ir_version = helper.find_min_ir_version_for(opsets)
    try:
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        found = dict(zip([o.name for o in outputs], session.run(None, {}), strict=True))
    except Exception as error:  # ONNX Runtime raises many kinds
        raise Unreadable(str(error).strip().splitlines()[0]) from error
    return [np.asarray(found.get(name, 0)) for name in node.output]


def _pooled(op: Op) -> bool:
    """Whether this is what a classifier reads: pooled features, not a map that happens to have one pixel."""
    if op.kind in ("Relu", "Affine"):
        return _pooled(op.inputs[0])
    return op.flat or op.kind == "GlobalAveragePool"
