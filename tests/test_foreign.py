from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import CLASSES, pytorch, tiny_resnet
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgeres import foreign, foreign_ops, graph, quantize
from edgeres.calibrate import calibrate
from edgeres.data import ImageSet
from edgeres.errors import BuildError, InputError
from edgeres.export import trace
from edgeres.files import sha256_file
from edgeres.foreign import depth_of, import_onnx, variant_of
from edgeres.loader import Loader
from edgeres.model import ResNet, resnet50
from edgeres.recipe import Preprocess

SIZE = 32
NORMAL = {"Conv", "Relu", "MaxPool", "Add", "GlobalAveragePool", "Flatten", "Gemm"}


def noise(n: int, seed: int = 11) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 3, SIZE, SIZE), dtype=np.float32)


def run(model: Any, images: np.ndarray, output: str | None = None) -> np.ndarray:
    content = model.read_bytes() if isinstance(model, Path) else model.SerializeToString()
    options = onnxruntime.SessionOptions()  # a witness must not fuse a Pad of zeros into a max pool
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run([output] if output else None, {session.get_inputs()[0].name: images})[0]


def torch_onnx(model: nn.Module, path: Path, dynamo: bool = False, **options: Any) -> Path:
    images = (torch.zeros(2, 3, SIZE, SIZE),)
    if dynamo:
        options = {"dynamic_shapes": ({0: torch.export.Dim("N")},), "external_data": False, "verbose": False} | options
    elif options.pop("dynamic", False):
        options |= {"input_names": ["x"], "dynamic_axes": {"x": {0: "N"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older exporter is deprecated, the newer one uses what is
        torch.onnx.export(model.eval(), images, path, dynamo=dynamo, **options)
    return path


def same(proto: Any, expected: np.ndarray, images: np.ndarray) -> None:
    np.testing.assert_allclose(run(proto, images), expected, rtol=1e-3, atol=1e-4)


def is_normal(proto: Any, classes: int = CLASSES, batch: int | str = "N") -> None:
    assert set(graph.count_ops(proto)) <= NORMAL
    assert [i.name for i in proto.graph.input] == ["input"]
    dims = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph_ends(proto)]
    assert dims == [[batch, 3, SIZE, SIZE], [batch, classes]]
    assert {t.data_type for t in proto.graph.initializer} == {TensorProto.FLOAT}
    names = [n.name for n in proto.graph.node]
    assert len(set(names)) == len(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") for name in names)
    graph.normal_form(proto, Path("any"))
    onnx.checker.check_model(proto, full_check=True)


def graph_ends(proto: Any) -> list[Any]:
    return [*proto.graph.input, *proto.graph.output]


# networks


class Basic(nn.Module):
    """Two 3x3 convolutions; a projection or, as in the CIFAR networks, a shortcut without parameters (option A)."""

    def __init__(self, c: int, k: int, stride: int, option_a: str | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, k, 3, stride, 1, bias=False), nn.BatchNorm2d(k)
        self.conv2, self.bn2 = nn.Conv2d(k, k, 3, 1, 1, bias=False), nn.BatchNorm2d(k)
        self.option_a, self.stride, self.extra = option_a, stride, k - c
        self.downsample = (
            nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))
            if option_a is None and (stride > 1 or c != k)
            else nn.Identity()
        )

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        if self.option_a is None or not self.extra:
            return self.downsample(x)
        x = x[:, :, :: self.stride, :: self.stride] if self.option_a != "pool" else nn.functional.avg_pool2d(x, 1, 2)
        if self.option_a == "cat":
            return torch.cat([x, torch.zeros_like(x)], 1)
        return nn.functional.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class BasicNet(nn.Module):
    def __init__(self, blocks: tuple[int, ...], option_a: str | None = None, head: str = "view") -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        layers: list[nn.Module] = []
        c = 4
        for stage, count in enumerate(blocks):
            for i in range(count):
                k = 4 * 2**stage
                layers.append(Basic(c, k, 2 if stage and not i else 1, option_a))
                c = k
        self.layers = nn.Sequential(*layers)
        self.head = head
        self.fc = nn.Conv2d(c, CLASSES, 1) if head == "conv" else nn.Linear(c, CLASSES)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.bias, std=0.2)
                module.running_mean.normal_(std=0.2)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers(torch.relu(self.bn1(self.conv1(x))))
        if self.head == "conv":
            return self.fc(nn.functional.adaptive_avg_pool2d(x, 1)).squeeze(3).squeeze(2)
        if self.head == "mean":
            return self.fc(x.mean((2, 3)))
        x = nn.functional.avg_pool2d(x, int(x.shape[3]))  # a tensor for older tracers
        return self.fc(x.view(x.shape[0], -1))


# what exporters write


@pytest.mark.parametrize("stride_on", ["1x1", "3x3"])
@pytest.mark.parametrize("dynamo", [False, True])
def test_our_own_network_from_both_exporters_of_pytorch(
    tmp_path: Path, preprocess: Preprocess, dynamo: bool, stride_on: str
) -> None:
    model = tiny_resnet(stride_on)
    proto = import_onnx(torch_onnx(model, tmp_path / "a.onnx", dynamo), preprocess)
    is_normal(proto)
    ours = trace(model, SIZE, 17, None)
    assert graph.count_ops(proto) == graph.count_ops(ours)
    assert {n.name for n in proto.graph.node} == {n.name for n in ours.graph.node}
    same(proto, pytorch(model, noise(5)), noise(5))
    assert graph.metadata(proto)["variant"] == {"1x1": "v1", "3x3": "v1.5"}[stride_on]


def test_batch_norm_that_the_file_still_has_is_folded_as_export_does(tmp_path: Path, preprocess: Preprocess) -> None:
    model = tiny_resnet()
    path = torch_onnx(model, tmp_path / "a.onnx", do_constant_folding=False, training=torch.onnx.TrainingMode.PRESERVE)
    assert graph.count_ops(onnx.load(path))["BatchNormalization"] == 15
    proto = import_onnx(path, preprocess)
    theirs, ours = graph.initializers(proto), graph.initializers(trace(model, SIZE, 17, None))
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize(
    ("blocks", "option_a", "head", "depth"),
    [
        ((2, 2, 2, 2), None, "view", 18),
        ((3, 4, 6, 3), None, "mean", 34),
        ((3, 3, 3), "pad", "view", None),
        ((1, 1, 1), "cat", "conv", None),
        ((1, 1, 1), "pool", "mean", None),
    ],
)
def test_basic_blocks(
    tmp_path: Path,
    preprocess: Preprocess,
    blocks: tuple[int, ...],
    option_a: str | None,
    head: str,
    depth: int | None,
    dynamo: bool,
) -> None:
    if dynamo and sum(blocks) > 8:
        blocks = blocks[:2]  # that exporter takes its time
        depth = None
    model = BasicNet(blocks, option_a, head)
    path = torch_onnx(model, tmp_path / "a.onnx", dynamo, **({} if dynamo else {"dynamic": True}))
    proto = import_onnx(path, preprocess)
    is_normal(proto)
    same(proto, pytorch(model, noise(3)), noise(3))
    assert (variant_of(proto), depth_of(proto)) == (None, depth)
    projections = 0 if blocks == (3, 3, 3) and option_a is None else len(blocks) - 1
    assert graph.count_ops(proto)["Conv"] == 1 + 2 * sum(blocks) + projections
    assert graph.count_ops(proto)["Gemm"] == 1


@pytest.mark.parametrize(("opset", "ir_version"), [(13, 7), (17, 8), (19, 9)])
@pytest.mark.parametrize("written", [9, 18])
def test_any_opset_becomes_the_one_asked_for(
    tmp_path: Path, preprocess: Preprocess, written: int, opset: int, ir_version: int
) -> None:
    path = torch_onnx(
        BasicNet((1, 1), "pad" if written > 9 else None, "mean"), tmp_path / "a.onnx", opset_version=written
    )
    proto = import_onnx(path, preprocess, opset=opset)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", opset)]
    assert proto.ir_version == ir_version


# graphs made by hand


class Graph:
    """Nodes written one below the other; each method returns the name of what it adds."""

    def __init__(self, shape: list[Any], dtype: int = TensorProto.FLOAT, name: str = "images") -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs = [helper.make_tensor_value_info(name, dtype, shape)]
        self.rng = np.random.default_rng(3)

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def random(self, *shape: int) -> str:
        return self.constant(self.rng.standard_normal(shape) / np.sqrt(max(np.prod(shape[1:]), 1)))

    def add(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        name = attributes.pop("name", "")
        results = [f"t{len(self.nodes)}", *(f"t{len(self.nodes)}_{i}" for i in range(1, outputs))]
        self.nodes.append(helper.make_node(kind, inputs, results, name=name, **attributes))
        return results[0]

    def conv(self, x: str, c: int, k: int, size: int = 3, **attributes: Any) -> str:
        return self.add("Conv", x, self.random(k, c, size, size), **attributes)

    def norm(self, x: str, k: int) -> str:
        variance = self.constant(self.rng.uniform(0.5, 2, k))
        return self.add("BatchNormalization", x, self.random(k), self.random(k), self.random(k), variance)

    def model(self, *outputs: str, opset: int = 12, as_inputs: bool = False) -> Any:
        if as_inputs:
            self.inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in self.constants]
        ends = [onnx.ValueInfoProto(name=name) for name in outputs]
        for end in ends:
            kinds = {n.output[0]: n.op_type for n in self.nodes}
            end.type.tensor_type.elem_type = (
                7 if kinds[end.name] == "ArgMax" else self.inputs[0].type.tensor_type.elem_type
            )
        proto = helper.make_model(
            helper.make_graph(self.nodes, "theirs", self.inputs, ends, self.constants),
            opset_imports=[helper.make_opsetid("", opset)],
        )
        proto.ir_version = 3 if as_inputs else 8
        return proto

    def save(self, path: Path, *outputs: str, **options: Any) -> Path:
        path.write_bytes(self.model(*outputs, **options).SerializeToString())
        return path


def simple(g: Graph, channels: int = 3) -> str:
    """Input to pooled features (N, 8, 1, 1)."""
    x = g.add("Relu", g.conv("images", channels, 8, pads=[1, 1, 1, 1], strides=[2, 2]))
    return g.add("GlobalAveragePool", x)


def gemm(g: Graph, x: str, c: int = 8, **options: Any) -> str:
    return g.add("Gemm", g.add("Flatten", x), g.random(c, CLASSES), g.random(CLASSES), **options)


def test_a_tensorflow_graph_with_background_class(tmp_path: Path, preprocess: Preprocess) -> None:
    """NHWC, a Transpose pair around every convolution, SAME and explicit padding, MatMul + BiasAdd, two outputs."""
    g = Graph(["unk__1", SIZE, SIZE, 3])

    def convolve(x: str, c: int, k: int, size: int = 3, **attributes: Any) -> str:
        x = g.conv(g.add("Transpose", x, perm=[0, 3, 1, 2]), c, k, size, **attributes)
        return g.add("Add", g.add("Transpose", x, perm=[0, 2, 3, 1]), g.random(k))

    padded = g.add("Pad", "images", g.constant([0, 3, 3, 0, 0, 3, 3, 0], np.int64))
    x = g.add("Relu", convolve(padded, 3, 8, 7, strides=[2, 2], auto_pad="VALID", name="resnet50/conv1_conv/Conv2D"))
    x = g.add("Pad", x, g.constant([0, 1, 1, 0, 0, 1, 1, 0], np.int64))
    x = g.add("Transpose", x, perm=[0, 3, 1, 2])
    x = g.add("Transpose", g.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2]), perm=[0, 2, 3, 1])
    y = g.add("Relu", convolve(x, 8, 4, 1, auto_pad="SAME_UPPER"))
    y = g.add("Relu", convolve(y, 4, 4, 3, strides=[2, 2], auto_pad="SAME_UPPER"))  # (0, 0, 1, 1) here
    y = convolve(y, 4, 8, 1)
    y = g.add("Mul", y, g.constant(np.linspace(0.5, 1.5, 8)))
    x = g.add("Relu", g.add("Add", y, convolve(x, 8, 8, 1, strides=[2, 2])))
    x = g.add("Squeeze", g.add("ReduceMean", x, axes=[1, 2], keepdims=1), axes=[1, 2])
    x = g.add("Add", g.add("MatMul", x, g.random(8, 1001)), g.random(1001))
    path = g.save(tmp_path / "tf.onnx", g.add("Softmax", x, axis=1), g.add("ArgMax", x, axis=1))
    proto = import_onnx(path, preprocess)
    is_normal(proto, 1000)
    assert graph.metadata(proto)["classes"] == 1000
    pads = [list(a.ints) for n in proto.graph.node for a in n.attribute if a.name == "pads" and n.op_type == "Conv"]
    assert pads == [[3, 3, 3, 3], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert proto.graph.node[0].name == "resnet50.conv1_conv"
    assert variant_of(proto) == "v1.5"
    their = run(path, np.ascontiguousarray(noise(3).transpose(0, 2, 3, 1)))[:, 1:]
    logits = run(proto, noise(3))
    np.testing.assert_allclose(
        np.exp(logits) / np.exp(logits).sum(1, keepdims=True), their / their.sum(1, keepdims=True), rtol=1e-3
    )


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_same_padding_is_written_out(tmp_path: Path, preprocess: Preprocess, mode: str, stride: int) -> None:
    g = Graph(["N", 3, SIZE, SIZE])
    x = g.conv("images", 3, 8, 4, auto_pad=mode, strides=[stride] * 2)
    x = g.add("MaxPool", g.add("Relu", x), kernel_shape=[2, 2], strides=[2, 2], auto_pad=mode)
    path = g.save(tmp_path / "a.onnx", gemm(g, g.add("GlobalAveragePool", x)))
    same(import_onnx(path, preprocess), run(path, noise(2)), noise(2))


def test_a_pool_that_rounds_up(tmp_path: Path, preprocess: Preprocess) -> None:
    g = Graph(["N", 3, SIZE, SIZE])
    x = g.add("MaxPool", g.conv("images", 3, 8), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    path = g.save(tmp_path / "a.onnx", gemm(g, g.add("GlobalAveragePool", x)))
    proto = import_onnx(path, preprocess)
    same(proto, run(path, noise(2)), noise(2))
    (pads,) = [
        list(a.ints) for n in proto.graph.node for a in n.attribute if a.name == "pads" and n.op_type == "MaxPool"
    ]
    assert pads == [0, 0, 1, 1]


def test_features_flattened_from_nhwc_keep_their_order(tmp_path: Path, preprocess: Preprocess) -> None:
    g = Graph(["N", 3, SIZE, SIZE])
    x = g.add("MaxPool", g.conv("images", 3, 8, strides=[4, 4]), kernel_shape=[2, 2], strides=[3, 3])
    x = g.add("Transpose", x, perm=[0, 2, 3, 1])  # (N, 3, 3, 8)
    x = g.add("Reshape", x, g.constant([-1, 72], np.int64))
    path = g.save(tmp_path / "a.onnx", g.add("MatMul", x, g.random(72, CLASSES)))
    proto = import_onnx(path, preprocess)
    is_normal(proto)
    same(proto, run(path, noise(2)), noise(2))


HEADS: dict[str, Callable[[Graph, str], list[str]]] = {
    "softmax": lambda g, x: [g.add("Softmax", x, axis=1)],
    "log of it": lambda g, x: [g.add("Log", g.add("Softmax", x, axis=1))],
    "log-softmax": lambda g, x: [g.add("LogSoftmax", x, axis=1)],
    "class": lambda g, x: [g.add("ArgMax", x, axis=1)],
    "both": lambda g, x: [g.add("ArgMax", x, axis=1), g.add("Softmax", x, axis=1)],
    "logits too": lambda g, x: [x, g.add("Softmax", x, axis=1)],
    "best": lambda g, x: [g.add("TopK", g.add("Softmax", x, axis=1), g.constant([2], np.int64), outputs=2)],
    "features too": lambda g, x: ["t2", g.add("Softmax", x, axis=1)],
}


@pytest.mark.parametrize("head", HEADS)
def test_the_end_is_cut_to_the_logits(tmp_path: Path, preprocess: Preprocess, head: str) -> None:
    g = Graph(["N", 3, SIZE, SIZE])
    logits = gemm(g, simple(g))
    path = g.save(tmp_path / "a.onnx", *HEADS[head](g, logits))
    proto = import_onnx(path, preprocess)
    is_normal(proto)
    assert graph.count_ops(proto) == {"Conv": 1, "Flatten": 1, "Gemm": 1, "GlobalAveragePool": 1, "Relu": 1}
    theirs = onnx.load(path)
    theirs.graph.output.add(name=logits)
    same(proto, run(theirs, noise(3), logits), noise(3))


def reshape_by_shape(g: Graph, x: str) -> str:
    n = g.add("Gather", g.add("Shape", x), g.constant(0, np.int64), axis=0)
    parts = [g.add("Unsqueeze", n, axes=[0]), g.constant([-1], np.int64)]
    return g.add("Reshape", x, g.add("Concat", *parts, axis=0))


CLASSIFIERS: dict[str, Callable[[Graph, str], str]] = {
    "gemm": gemm,
    "alpha and beta": lambda g, x: gemm(g, x, alpha=0.5, beta=2.0),
    "no bias": lambda g, x: g.add("Gemm", g.add("Flatten", x), g.random(CLASSES, 8), transB=1),
    "one bias": lambda g, x: g.add("Gemm", g.add("Flatten", x), g.random(8, CLASSES), g.constant([0.5])),
    "matmul": lambda g, x: g.add("MatMul", g.add("Squeeze", x, axes=[2, 3]), g.random(8, CLASSES)),
    "bias first": lambda g, x: g.add(
        "Add", g.random(CLASSES), g.add("MatMul", g.add("Squeeze", x, axes=[-1, -2]), g.random(8, CLASSES))
    ),
    "convolution": lambda g, x: g.add("Flatten", g.conv(x, 8, CLASSES, 1)),
    "convolution, no flatten": lambda g, x: g.conv(x, 8, CLASSES, 1),
    "shapes": lambda g, x: g.add("Gemm", reshape_by_shape(g, x), g.random(8, CLASSES)),
    "zero and -1": lambda g, x: g.add("Gemm", g.add("Reshape", x, g.constant([0, -1], np.int64)), g.random(8, CLASSES)),
    "dropout": lambda g, x: gemm(g, g.add("Identity", g.add("Dropout", x, outputs=2))),
    "norm behind": lambda g, x: g.norm(gemm(g, x), CLASSES),
    "norm before": lambda g, x: g.add("Gemm", g.norm(g.add("Flatten", x), 8), g.random(8, CLASSES)),
    "two layers": lambda g, x: gemm(g, g.add("Relu", g.add("Gemm", g.add("Flatten", x), g.random(8, 6))), 6),
    "a constant node": lambda g, x: g.add(
        "MatMul",
        g.add("Flatten", x),
        g.add("Constant", value=numpy_helper.from_array(np.ones((8, CLASSES), np.float32) / 8)),
    ),
    "minus and scaled": lambda g, x: g.add(
        "Sub", g.random(CLASSES), g.add("Div", g.add("Mul", gemm(g, x), g.constant(3.0)), g.constant(7.0))
    ),
}


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_every_way_to_write_a_classifier_is_a_gemm(tmp_path: Path, preprocess: Preprocess, classifier: str) -> None:
    g = Graph(["N", 3, SIZE, SIZE])
    path = g.save(tmp_path / "a.onnx", CLASSIFIERS[classifier](g, simple(g)))
    proto = import_onnx(path, preprocess)
    is_normal(proto)
    same(proto, run(path, noise(3)).reshape(3, -1), noise(3))
    last = proto.graph.node[-1]
    assert last.op_type == "Gemm"
    assert {a.name: a.i for a in last.attribute} == {"transB": 1}
    assert graph.initializers(proto)[last.input[1]].shape[0] == CLASSES
    assert graph.initializers(proto)[last.input[2]].shape == (CLASSES,)


@pytest.mark.parametrize("shape", [None, [-1], [0, 1]])
@pytest.mark.parametrize("batch", ["N", 1])
def test_a_single_class(tmp_path: Path, preprocess: Preprocess, batch: int | str, shape: list[int] | None) -> None:
    g = Graph([batch, 3, SIZE, SIZE])
    x = g.add("Gemm", g.add("Flatten", simple(g)), g.random(8, 1))
    path = g.save(tmp_path / "a.onnx", x if shape is None else g.add("Reshape", x, g.constant(shape, np.int64)))
    proto = import_onnx(path, preprocess)
    is_normal(proto, classes=1)
    same(proto, run(path, noise(1)).reshape(1, 1), noise(1))


def test_arithmetic_that_joins_no_layer_becomes_a_convolution(tmp_path: Path, preprocess: Preprocess) -> None:
    g = Graph(["N", 3, SIZE, SIZE])
    x = g.add("Sub", "images", g.constant(np.full((1, 3, 1, 1), 0.4)))
    x = g.add("Div", x, g.constant(np.full((3, 1, 1), 0.2)))
    x = g.conv(x, 3, 8, pads=[1, 1, 1, 1])
    y = g.conv(g.add("Relu", g.norm(x, 8)), 8, 8, pads=[1, 1, 1, 1])  # before activation, as in a ResNet v2
    x = g.add("AveragePool", g.add("Sum", x, y), kernel_shape=[2, 2], strides=[2, 2])
    path = g.save(tmp_path / "a.onnx", gemm(g, g.add("AveragePool", x, kernel_shape=[16, 16])))
    proto = import_onnx(path, preprocess)
    is_normal(proto)
    assert graph.count_ops(proto)["Conv"] == 5
    same(proto, run(path, noise(3)), noise(3))


def test_weights_listed_as_inputs(tmp_path: Path, preprocess: Preprocess) -> None:
    g = Graph([1, 3, SIZE, SIZE])
    x = g.norm(g.conv("images", 3, 8), 8)
    x = g.add("Relu", g.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]))
    path = g.save(tmp_path / "a.onnx", gemm(g, g.add("GlobalAveragePool", x)), opset=7, as_inputs=True)
    proto = import_onnx(path, preprocess)
    is_normal(proto)
    same(proto, np.concatenate([run(path, noise(3)[i : i + 1]) for i in range(3)]), noise(3))


@pytest.mark.parametrize("open_shape", [[None, None, None, None], None])
@pytest.mark.parametrize("nhwc", [False, True])
def test_an_input_without_extents(tmp_path: Path, preprocess: Preprocess, open_shape: Any, nhwc: bool) -> None:
    g = Graph(open_shape)
    if nhwc:
        g.add("Transpose", g.add("Identity", "images"), perm=[0, 3, 1, 2])
        x = g.add("Relu", g.conv("t1", 3, 8))
    else:
        x = g.add("Relu", g.conv("images", 3, 8))
    path = g.save(tmp_path / "a.onnx", gemm(g, g.add("GlobalAveragePool", x)))
    images = noise(2).transpose(0, 2, 3, 1) if nhwc else noise(2)
    same(import_onnx(path, preprocess), run(path, np.ascontiguousarray(images)), noise(2))


def halved(path: Path, kind: Any) -> Path:
    """The file with every tensor of another float type."""
    proto = onnx.load(path)
    for t in proto.graph.initializer:
        if t.data_type == TensorProto.FLOAT:
            t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(t).astype(kind), t.name))
    for v in graph_ends(proto):
        v.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    del proto.graph.value_info[:]
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_other_float_types_become_fp32(tmp_path: Path, preprocess: Preprocess, kind: Any) -> None:
    path = torch_onnx(BasicNet((1, 1)), tmp_path / "a.onnx")
    exact = run(import_onnx(path, preprocess), noise(4))
    proto = import_onnx(halved(path, kind), preprocess)
    is_normal(proto)
    np.testing.assert_allclose(run(proto, noise(4)), exact, rtol=0.01, atol=0.01)


def test_tensors_beside_the_file_are_brought_in(tmp_path: Path, preprocess: Preprocess) -> None:
    model = onnx.load(torch_onnx(tiny_resnet(), tmp_path / "whole.onnx"))
    path = tmp_path / "a.onnx"
    onnx.save(model, path, save_as_external_data=True, location="a.data", size_threshold=0)
    proto = import_onnx(path, preprocess)
    assert graph.digest(proto) == graph.digest(import_onnx(tmp_path / "whole.onnx", preprocess))
    assert not any(t.external_data for t in proto.graph.initializer)
    (tmp_path / "a.data").rename(tmp_path / "b.data")
    with pytest.raises(InputError, match=r"misses its data file a\.data"):
        import_onnx(path, preprocess)


def test_tensors_from_elsewhere_are_refused(tmp_path: Path, preprocess: Preprocess) -> None:
    (tmp_path / "in").mkdir()
    path = torch_onnx(tiny_resnet(), tmp_path / "in" / "a.onnx")
    (tmp_path / "secret").write_bytes(bytes(1 << 16))
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    for place in ("../secret", str(tmp_path / "secret"), "link"):
        model = onnx.load(path, load_external_data=False)
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=place)
        (tmp_path / "in" / "b.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(InputError, match="wants data from outside its folder") as error:
            import_onnx(tmp_path / "in" / "b.onnx", preprocess)
        assert place in error.value.evidence


# records and parity


def test_the_record_says_where_the_file_comes_from(tmp_path: Path, preprocess: Preprocess) -> None:
    path = torch_onnx(tiny_resnet("1x1"), tmp_path / "theirs.onnx")
    record = graph.metadata(import_onnx(path, preprocess, opset=13, images=[noise(4), noise(3)]))
    assert record["weights"] == {"source": "theirs.onnx", "sha256": sha256_file(path)}
    assert {k: record[k] for k in ("precision", "variant", "depth", "classes", "opset", "batch")} == {
        "precision": "fp32",
        "variant": "v1",
        "depth": None,
        "classes": CLASSES,
        "opset": 13,
        "batch": None,
    }
    stored = {k: tuple(v) if isinstance(v, list) else v for k, v in record["preprocess"].items()}
    assert Preprocess(**stored) == preprocess
    parity = record["parity"]
    assert (parity["random"]["images"], parity["images"]["images"]) == (8, 7)
    assert all(p["db"] is None or p["db"] > 100 for p in parity.values())


@pytest.mark.parametrize("theirs", [1, 3])
@pytest.mark.parametrize("batch", [None, 1, 4])
def test_either_side_may_have_a_fixed_batch(
    tmp_path: Path, preprocess: Preprocess, theirs: int, batch: int | None
) -> None:
    g = Graph([theirs, 3, SIZE, SIZE])
    x = g.add("Reshape", simple(g), g.constant([theirs, 8], np.int64))
    path = g.save(tmp_path / "a.onnx", g.add("Gemm", x, g.random(8, CLASSES)))
    proto = import_onnx(path, preprocess, batch=batch, images=[noise(5)])
    is_normal(proto, batch=batch or "N")
    assert graph.metadata(proto)["parity"]["images"]["images"] == 5


def test_a_wrong_graph_is_found_by_parity(
    tmp_path: Path, preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = torch_onnx(tiny_resnet(), tmp_path / "a.onnx")

    def shifted(ops: Any, last: Any) -> Any:
        live = foreign_ops.fold(ops, last)
        live[0].bias = live[0].bias + 0.05
        return live

    monkeypatch.setattr(foreign, "fold", shifted)
    with pytest.raises(BuildError, match=r"does not compute what the file computes: .* dB on random") as error:
        import_onnx(path, preprocess)
    assert "over 8 images" in error.value.evidence


def test_images_count_for_themselves(tmp_path: Path, preprocess: Preprocess) -> None:
    images = noise(2)
    images[1, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="NaN or infinity") as error:
        import_onnx(torch_onnx(tiny_resnet(), tmp_path / "a.onnx"), preprocess, images=[images])
    assert error.value.evidence == "for 1 of 2 images"


def test_import_is_the_same_each_time_and_of_its_own_result(tmp_path: Path, preprocess: Preprocess) -> None:
    path = torch_onnx(tiny_resnet(), tmp_path / "a.onnx")
    first, second = import_onnx(path, preprocess), import_onnx(path, preprocess, seed=1)
    assert graph.digest(first) == graph.digest(second)
    graph.save(first, tmp_path / "b.onnx")
    assert graph.digest(import_onnx(tmp_path / "b.onnx", preprocess)) == graph.digest(first)


# through the rest of edgeres


@pytest.mark.parametrize("network", ["basic", "option a", "bottleneck"])
def test_what_was_imported_can_be_quantized_with_no_float_convolution_left(
    tmp_path: Path, preprocess: Preprocess, train_images: ImageSet, network: str
) -> None:
    nets = {"basic": BasicNet((1, 1)), "option a": BasicNet((1, 1), "pad"), "bottleneck": tiny_resnet()}
    path = torch_onnx(nets[network], tmp_path / "a.onnx", dynamo=network == "basic")
    images = [b.pixels for b in Loader(train_images, preprocess, 8)]
    proto = import_onnx(path, preprocess, images=images)
    made = {"model": graph.digest(proto), "preprocess": preprocess.digest()}
    table = calibrate(proto, Loader(train_images, preprocess, 8), made)
    typed = quantize.int8(proto, table, quantize.Scheme("test", weight_bits=7), "minmax")
    graph.save(typed, tmp_path / "int8.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "executed.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx", options, providers=["CPUExecutionProvider"])
    counts = graph.count_ops(onnx.load(tmp_path / "executed.onnx"))
    assert counts["QLinearConv"] == graph.count_ops(proto)["Conv"]
    assert not {"Conv", "FusedConv", "Gemm", "MatMul"} & counts.keys()
    expected, found = run(proto, images[0]), session.run(None, {"input": images[0]})[0]
    noise_power = np.square(expected - found).sum()
    assert 10 * np.log10(np.square(expected).sum() / noise_power) > 20


# variant and depth


def test_variant_and_depth_of_whole_networks() -> None:
    for variant in ("v1", "v1.5"):
        proto = trace(resnet50(variant), 224, 17, None)
        assert (variant_of(proto), depth_of(proto)) == (variant, 50)


@pytest.mark.parametrize(("blocks", "depth"), [((3, 4, 23, 3), 101), ((3, 8, 36, 3), 152), ((2, 2), None)])
def test_depth_of_bottlenecks(blocks: tuple[int, ...], depth: int | None) -> None:
    proto = trace(ResNet(2, "3x3", blocks=blocks, width=1), SIZE, 17, None)
    assert (variant_of(proto), depth_of(proto)) == ("v1.5", depth)


def test_variant_and_depth_of_any_graph(tiny_path: Path) -> None:
    empty = helper.make_model(helper.make_graph([], "empty", [], []))
    assert (variant_of(empty), depth_of(empty)) == (None, None)
    g = Graph(["N", 3, SIZE, SIZE])
    g.add("Add", "images", "images")
    g.add("Conv", "images", "t0")
    g.add("Add", "t1", "nobody")
    proto = g.model("t2")
    assert (variant_of(proto), depth_of(proto)) == (None, None)
    mixed = onnx.load(tiny_path)
    (first,) = [n for n in mixed.graph.node if n.name == "layer1.0.conv1"]
    (strides,) = [a for a in first.attribute if a.name == "strides"]
    strides.ints[:] = [2, 2]  # v1 here, v1.5 in layer2
    assert variant_of(mixed) is None


# what is refused


def refused(path: Path, preprocess: Preprocess, cause: str, kind: type = InputError) -> Any:
    with pytest.raises(kind, match=cause) as error:
        import_onnx(path, preprocess)
    return error.value


def test_a_file_that_onnxruntime_cannot_run(tmp_path: Path, preprocess: Preprocess) -> None:
    g = Graph(["N", 3, SIZE, SIZE])
    x = g.conv("images", 3, 8, auto_pad="SAME_UPPER", dilations=[2, 2])  # ONNX has it, ONNX Runtime has not
    path = g.save(tmp_path / "a.onnx", gemm(g, g.add("GlobalAveragePool", x)))
    with pytest.raises(BuildError, match="cannot run") as error:
        import_onnx(path, preprocess)
    assert "SAME_UPPER" in error.value.evidence


MALFORMED: dict[str, Callable[[Graph, str], str]] = {
    "stride 0": lambda g, x: g.add("MaxPool", x, kernel_shape=[2, 2], strides=[0, 0]),
    "one stride": lambda g, x: g.conv(x, 8, 8, strides=[2]),
    "axis 7": lambda g, x: g.add("Transpose", x, perm=[0, 1, 2, 7]),
    "step 0": lambda g, x: g.add("Slice", x, *(g.constant([n], np.int64) for n in (0, 9, 1, 0))),
    "pads of two axes": lambda g, x: g.add("Pad", x, g.constant([0, 0, 1, 1], np.int64)),
    "norm of 5 channels": lambda g, x: g.norm(x, 5),
    "5 channels": lambda g, x: g.add("Add", x, g.random(5, 1, 1)),
    "kept axis 5": lambda g, x: g.add("Reshape", x, g.constant([0, 0, 0, 0, 0], np.int64)),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_nodes_that_make_no_sense_are_named(tmp_path: Path, preprocess: Preprocess, kind: str) -> None:
    g = Graph(["N", 3, SIZE, SIZE])
    x = MALFORMED[kind](g, g.conv("images", 3, 8))
    path = g.save(tmp_path / "a.onnx", gemm(g, g.add("GlobalAveragePool", g.add("Relu", x))))
    with pytest.raises(BuildError, match="cannot read 1 of the file's nodes") as error:
        import_onnx(path, preprocess)
    assert f" {x}: is malformed" in error.value.evidence


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_network_that_computes_no_numbers(tmp_path: Path, preprocess: Preprocess, value: float) -> None:
    g = Graph(["N", 3, SIZE, SIZE])
    path = g.save(tmp_path / "a.onnx", g.add("Add", gemm(g, simple(g)), g.constant([value, 0, 0, 0])))
    with pytest.raises(InputError, match="own network computes NaN or infinity") as error:
        import_onnx(path, preprocess)
    assert error.value.evidence == "for 8 of 8 images"


def test_a_missing_file_and_a_cut_one(tmp_path: Path, preprocess: Preprocess) -> None:
    refused(tmp_path / "absent.onnx", preprocess, r"no ONNX file .*absent\.onnx")
    whole = torch_onnx(tiny_resnet(), tmp_path / "a.onnx").read_bytes()
    for content in (b"", b"<html>not found</html>", whole[:-100], whole[:2000]):
        (tmp_path / "cut.onnx").write_bytes(content)
        assert refused(tmp_path / "cut.onnx", preprocess, r"cut\.onnx is not a valid ONNX file").evidence


def test_an_old_opset(tmp_path: Path, preprocess: Preprocess) -> None:
    g = Graph([1, 3, SIZE, SIZE])
    path = g.save(tmp_path / "a.onnx", gemm(g, simple(g)), opset=6)
    assert "version_converter" in refused(path, preprocess, "has opset 6; the oldest .* is 7").hint


def test_a_quantized_file(tmp_path: Path, preprocess: Preprocess) -> None:
    g = Graph(["N", 3, SIZE, SIZE])
    scale, zero = g.constant(0.1), g.constant(0, np.uint8)
    g.add("DequantizeLinear", g.add("QuantizeLinear", "images", scale, zero), scale, zero)
    path = g.save(tmp_path / "a.onnx", "t1")
    error = refused(path, preprocess, "already quantized")
    assert "QuantizeLinear" in error.evidence
    assert "import the FP32 model" in error.hint


def test_a_classifier_for_another_input_size(tmp_path: Path) -> None:
    g = Graph(["N", 3, None, None])
    x = g.add("AveragePool", g.conv("images", 3, 8), kernel_shape=[30, 30])
    path = g.save(tmp_path / "a.onnx", gemm(g, x))
    import_onnx(path, Preprocess(crop=SIZE))
    with pytest.raises(BuildError) as caught:
        import_onnx(path, Preprocess(crop=SIZE + 1))
    assert "takes 8 features and gets 32: is the input size the network's?" in caught.value.evidence


def test_an_input_that_is_turned_around_whole(tmp_path: Path, preprocess: Preprocess) -> None:
    g = Graph([None] * 4)
    x = g.conv(g.add("Transpose", "images"), 3, 8)
    with pytest.raises(BuildError, match="cannot read"):
        import_onnx(g.save(tmp_path / "a.onnx", gemm(g, g.add("GlobalAveragePool", x))), preprocess)


def test_all_unsupported_operators_in_one_error(tmp_path: Path, preprocess: Preprocess) -> None:
    g = Graph(["N", 3, SIZE, SIZE])
    x = g.add("Sigmoid", g.conv("images", 3, 8), name="gate")
    x = g.add("Elu", g.add("Mul", x, x), name="swish")
    y = g.add("LeakyRelu", g.conv("images", 3, 8), name="leaky")
    z = g.add("Clip", g.conv("images", 3, 8), g.constant(0.0), g.constant(6.0))
    path = g.save(tmp_path / "a.onnx", g.add("Sum", x, y, z))
    error = refused(path, preprocess, "cannot read 4 of the file's nodes", BuildError)
    lines = error.evidence.splitlines()
    assert [line.split(":")[0] for line in lines] == ["Sigmoid gate", "Elu swish", "LeakyRelu leaky", "Clip t7"]


def test_what_no_output_needs_may_be_anything(tmp_path: Path, preprocess: Preprocess) -> None:
    g = Graph(["N", 3, SIZE, SIZE])
    g.add("Elu", "images")
    path = g.save(tmp_path / "a.onnx", gemm(g, simple(g)))
    is_normal(import_onnx(path, preprocess))


def test_two_inputs(tmp_path: Path, preprocess: Preprocess) -> None:
    g = Graph(["N", 3, SIZE, SIZE])
    g.inputs.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))
    path = g.save(tmp_path / "a.onnx", gemm(g, simple(g)))
    assert refused(path, preprocess, "has 2 inputs").evidence == "images, mask"


def test_inputs_that_are_no_such_images(tmp_path: Path, preprocess: Preprocess) -> None:
    def made(shape: list[Any], **options: Any) -> Path:
        g = Graph(shape, **options)
        return g.save(tmp_path / "a.onnx", gemm(g, simple(g, channels=1 if 1 in shape[1:] else 3)))

    assert "--input-size 48" in refused(made(["N", 3, 48, 48]), preprocess, "does not take").hint
    refused(made(["N", 1, SIZE, SIZE]), preprocess, "does not take")
    refused(made(["N", 3, SIZE, 2 * SIZE]), preprocess, "does not take")
    refused(made(["N", 3, SIZE, SIZE], dtype=TensorProto.UINT8), preprocess, "takes uint8 images|not a valid")


def test_outputs_that_are_two_classifiers_or_none(tmp_path: Path, preprocess: Preprocess) -> None:
    g = Graph(["N", 3, SIZE, SIZE])
    x = simple(g)
    path = g.save(tmp_path / "a.onnx", gemm(g, x), gemm(g, x))
    refused(path, preprocess, "not the logits of one classifier")
    g = Graph(["N", 3, SIZE, SIZE])
    path = g.save(tmp_path / "a.onnx", g.conv("images", 3, 8))
    assert "(17, 8, 30, 30)" in refused(path, preprocess, r"does not end in \(N, classes\)").evidence


@pytest.mark.parametrize("before", ["Relu", "Identity"])
@pytest.mark.parametrize("value", [0.0, 1.0, -np.inf])
def test_padding_before_a_max_pool(tmp_path: Path, preprocess: Preprocess, value: float, before: str) -> None:
    g = Graph(["N", 3, SIZE, SIZE])
    pads = g.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64)
    x = g.add("Pad", g.add(before, g.conv("images", 3, 8)), pads, g.constant(value), name="pool_pad")
    x = g.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2])
    path = g.save(tmp_path / "a.onnx", gemm(g, g.add("GlobalAveragePool", x)))
    if value == 1:
        refused(path, preprocess, "cannot fold pool_pad", BuildError)
        return
    proto = import_onnx(path, preprocess)
    is_normal(proto)
    same(proto, run(path, noise(2)), noise(2))
    as_convolution = value == 0 and before == "Identity"  # a zero beside negative values is no -inf
    assert graph.count_ops(proto)["Conv"] == 1 + as_convolution


def test_a_layer_behind_the_softmax(tmp_path: Path, preprocess: Preprocess) -> None:
    g = Graph(["N", 3, SIZE, SIZE])
    x = g.add("MatMul", g.add("Softmax", gemm(g, simple(g)), axis=1), g.random(CLASSES, 3))
    path = g.save(tmp_path / "a.onnx", x)
    assert "MatMul" in refused(path, preprocess, "cannot read 1 of", BuildError).evidence


def test_an_operator_of_another_domain(tmp_path: Path, preprocess: Preprocess) -> None:
    g = Graph(["N", 3, SIZE, SIZE])
    x = g.add("FusedConv", "images", g.random(8, 3, 3, 3), domain="com.microsoft")
    proto = g.model(gemm(g, g.add("GlobalAveragePool", x)))
    proto.opset_import.add(domain="com.microsoft", version=1)
    (tmp_path / "a.onnx").write_bytes(proto.SerializeToString())
    error = refused(tmp_path / "a.onnx", preprocess, "cannot read 1 of", BuildError)
    assert "FusedConv" in error.evidence
    assert "com.microsoft" in error.evidence


# names


@pytest.mark.parametrize(
    ("kind", "theirs", "ours"),
    [
        ("Conv", "/layer1/layer1.0/conv1/Conv", "layer1.0.conv1"),
        (
            "Conv",
            "/resnet/encoder/stages.0/layers.0/layer/layer.0/convolution/Conv",
            "resnet.encoder.stages.0.layers.0.layer.0.convolution",
        ),
        ("Relu", "/layer1/layer1.0/relu/Relu_1", "layer1.0.relu"),
        ("Relu", "/layer1/layer1.0/Relu", "layer1.0.relu"),
        ("Add", "/layer3/layer3.2/Add", "layer3.2.add"),
        ("GlobalAveragePool", "/avgpool/GlobalAveragePool", "avgpool"),
        ("Conv", "resnet50/conv1_conv/BiasAdd", "resnet50.conv1_conv"),
        ("Conv", "resnetv17_conv0_fwd", "resnetv17_conv0_fwd"),
        ("Conv", "a b:0", "a_b_0"),
        ("Conv", "", ""),
    ],
)
def test_names_are_the_files_own(kind: str, theirs: str, ours: str) -> None:
    assert foreign_ops.name_of(helper.make_node(kind, ["x", "w"], ["y"], name=theirs), kind) == ours


def test_nodes_without_names_are_numbered(tmp_path: Path, preprocess: Preprocess) -> None:
    g = Graph(["N", 3, SIZE, SIZE])
    x = g.add("Relu", g.conv(g.add("Relu", g.conv("images", 3, 8)), 8, 8))
    path = g.save(tmp_path / "a.onnx", gemm(g, g.add("GlobalAveragePool", x)))
    names = [n.name for n in import_onnx(path, preprocess).graph.node]
    assert names == ["conv", "relu", "conv_1", "relu_1", "globalaveragepool", "flatten", "gemm"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", [False, True])
def test_resnet_of_transformers(tmp_path: Path, preprocess: Preprocess, variant: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], num_labels=CLASSES, downsample_in_bottleneck=variant
    )
    model = transformers.ResNetForImageClassification(config)
    proto = import_onnx(torch_onnx(model, tmp_path / "a.onnx"), preprocess)
    is_normal(proto)
    assert variant_of(proto) == ("v1" if variant else "v1.5")
    assert "resnet.embedder.embedder.convolution" in {n.name for n in proto.graph.node}
