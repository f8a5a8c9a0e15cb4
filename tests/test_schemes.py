"""Where Q/DQ pairs lie, by counting, on real networks with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import batch, measure
from onnx import helper, numpy_helper
from test_quantize import logits, producer, quantizers

from edgeres import calibration_cache, graph
from edgeres.calibrate import RangeTable, TensorRange
from edgeres.errors import InputError
from edgeres.export import trace
from edgeres.fidelity import decibels, squares
from edgeres.lint import lint
from edgeres.model import ResNet, resnet
from edgeres.quantize import SCHEMES, Scheme, int8, magnitudes, pairs
from edgeres.runners.onnxruntime import audit
from edgeres.thresholds import METHODS, WEIGHTS

TENSORRT, OPENVINO, ONNXRUNTIME = SCHEMES["tensorrt"], SCHEMES["openvino"], SCHEMES["onnxruntime"]
QDQ = ("QuantizeLinear", "DequantizeLinear")
Net = tuple[ResNet, Any, RangeTable]


def network(depth: int, variant: str, size: int = 32) -> Net:
    """PyTorch module, FP32 model and range table of two random images."""
    torch.manual_seed(0)
    module = resnet(depth, variant, classes=10).eval()
    for name, part in module.named_modules():
        if name.endswith("bn3"):
            torch.nn.init.constant_(part.weight, 0.3)  # else the sum doubles at every block
    model = trace(module, size, opset=17, batch=None)
    return module, model, measure(model, batch(2, size))


@pytest.fixture(scope="module", params=["v1", "v1.5"])
def resnet50(request: pytest.FixtureRequest) -> Net:
    return network(50, request.param)


@pytest.fixture(scope="module")
def resnet18() -> Net:
    return network(18, "v1.5")


@pytest.fixture(scope="module")
def tensorrt(resnet50: Net) -> Any:
    return int8(*resnet50[1:], TENSORRT, "minmax")


def layers(model: Any) -> list[Any]:
    return [n for n in model.graph.node if n.op_type in graph.LAYERS]


def weight_pairs(model: Any) -> list[Any]:
    """QuantizeLinear nodes on constants."""
    constants = graph.initializers(model)
    return [n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] in constants]


def blocks() -> list[str]:
    return [f"layer{i + 1}.{j}" for i, n in enumerate((3, 4, 6, 3)) for j in range(n)]


def activation_pairs(model: Any) -> list[str]:
    """Tensors under a pair, once per pair."""
    constants = graph.initializers(model)
    nodes = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    return sorted(n.input[0] for n in nodes if n.input[0] not in constants)


def test_tensorrt_has_54_weight_pairs_from_fp32_along_the_output_channels(resnet50: Net, tensorrt: Any) -> None:
    constants, before = graph.initializers(tensorrt), graph.initializers(resnet50[1])
    quantized = weight_pairs(tensorrt)
    assert len(quantized) == 54
    assert {n.input[0] for n in quantized} == {n.input[1] for n in layers(resnet50[1])}
    for q in quantized:
        (dq,) = graph.consumers(tensorrt)[q.output[0]]
        weight, scale, zero = (constants[name] for name in q.input)
        np.testing.assert_array_equal(weight, before[q.input[0]])
        assert weight.dtype == scale.dtype == np.float32
        assert zero.dtype == np.int8
        assert scale.shape == zero.shape == weight.shape[:1]
        assert not zero.any()
        assert [(a.name, a.i) for a in (*q.attribute, *dq.attribute)] == [("axis", 0)] * 2
        assert list(q.input[1:]) == list(dq.input[1:])
        assert [n.op_type for n in graph.consumers(tensorrt)[dq.output[0]]] in (["Conv"], ["Gemm"])
        steps = np.abs(weight.reshape(len(weight), -1)).max(1) / scale
        np.testing.assert_allclose(steps, 127, rtol=1e-5)


def test_tensorrt_has_55_activation_pairs_and_they_are_the_ones_of_the_page(tensorrt: Any) -> None:
    expected = [graph.INPUT, "maxpool", "flatten"]
    expected += [f"{b}.{t}" for b in blocks() for t in ("relu1", "relu2", "relu3")]
    expected += [f"layer{i}.0.downsample.0" for i in (1, 2, 3, 4)]
    assert len(expected) == 55
    assert activation_pairs(tensorrt) == sorted(expected)
    for name, (scale, zero) in quantizers(tensorrt).items():
        if name in expected:
            assert (scale.shape, zero.shape, zero.dtype, int(zero)) == ((), (), np.int8, 0)


def test_tensorrt_scales_are_the_thresholds_over_127_of_the_tensor_itself(resnet50: Net) -> None:
    _, model, table = resnet50
    found = quantizers(int8(model, table, TENSORRT, "mse"))
    for name in ("maxpool", "layer3.2.relu2", "layer4.0.downsample.0"):
        assert found[name][0] == np.float32(METHODS["mse"](magnitudes(table.tensors[name]), 127)[1] / 127)
    assert found["maxpool"][0] != np.float32(METHODS["mse"](magnitudes(table.tensors["relu"]), 127)[1] / 127)


def test_tensorrt_every_layer_reads_pairs_and_float_biases(tensorrt: Any) -> None:
    constants = graph.initializers(tensorrt)
    assert len(layers(tensorrt)) == 54
    for node in layers(tensorrt):
        data, weight, bias = node.input
        assert producer(tensorrt, data).op_type == "DequantizeLinear"
        assert producer(tensorrt, weight).op_type == "DequantizeLinear"
        assert constants[bias].dtype == np.float32
    assert not [n for n, a in constants.items() if a.dtype == np.int32]


def test_tensorrt_the_main_branch_is_bare_and_the_shortcut_quantized(tensorrt: Any) -> None:
    adds = [n for n in tensorrt.graph.node if n.op_type == "Add"]
    assert len(adds) == 16
    before = dict(zip(blocks(), ["maxpool", *(f"{b}.relu3" for b in blocks())], strict=False))
    for add, block in zip(adds, blocks(), strict=True):
        shortcut = f"{block}.downsample.0" if block.endswith(".0") else before[block]
        assert set(add.input) == {f"{block}.conv3", f"{shortcut}.dq"}
        assert {n.op_type for n in graph.consumers(tensorrt)[f"{block}.conv3"]} == {"Add"}


def test_tensorrt_nothing_lies_between_a_producer_and_its_relu(tensorrt: Any) -> None:
    relus = [n for n in tensorrt.graph.node if n.op_type == "Relu"]
    assert len(relus) == 49
    assert {producer(tensorrt, n.input[0]).op_type for n in relus} == {"Conv", "Add"}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_one_pair_per_tensor_is_shared_and_the_names_are_the_modules(resnet50: Net, scheme: Scheme) -> None:
    module, model, table = resnet50
    quantized = int8(model, table, scheme, "minmax")
    read = [n.input[0] for n in quantized.graph.node if n.op_type == "QuantizeLinear"]
    assert len(read) == len(set(read))
    readers, original = graph.consumers(quantized), graph.consumers(model)
    for tensor in activation_pairs(quantized):
        assert [n.name for n in readers[f"{tensor}.q"]] == [f"{tensor}.dq"]
        bare = {n.name for n in readers[tensor]} - {f"{tensor}.q"}
        assert bare == set()
        assert {n.name for n in readers[f"{tensor}.dq"]} == {n.name for n in original[tensor]}
    convolutions = {name for name, part in module.named_modules() if isinstance(part, torch.nn.Conv2d)}
    assert {n.name for n in quantized.graph.node if n.op_type == "Conv"} == convolutions
    assert lint(quantized, scheme) == []
    onnx.checker.check_model(quantized, full_check=True)


def test_openvino_leaves_out_16_main_branches_and_int32_biases(resnet50: Net) -> None:
    _, model, table = resnet50
    main = {f"{b}.conv3" for b in blocks()}
    assert pairs(model, ONNXRUNTIME) - pairs(model, OPENVINO) == main
    assert pairs(model, OPENVINO) < pairs(model, ONNXRUNTIME)
    quantized = int8(model, table, OPENVINO, "minmax")
    assert set(activation_pairs(quantized)) == pairs(model, ONNXRUNTIME) - main
    assert {z.dtype for _, z in quantizers(quantized).values()} == {np.dtype(np.uint8)}
    constants = graph.initializers(quantized)
    for node in layers(quantized):
        dq = producer(quantized, node.input[1])
        assert (dq.op_type, constants[dq.input[0]].dtype) == ("DequantizeLinear", np.int8)
        assert constants[node.input[2]].dtype == np.float32
    assert weight_pairs(quantized) == []


def test_implicit_simulates_pairs_wherever_onnxruntime_has_them(resnet50: Net) -> None:
    _, model, table = resnet50
    quantized = int8(model, table, SCHEMES["implicit"], "minmax")
    assert set(activation_pairs(quantized)) == pairs(model, ONNXRUNTIME)
    assert {z.dtype for _, z in quantizers(quantized).values()} == {np.dtype(np.int8)}
    assert len(weight_pairs(quantized)) == 54


def test_resnet18_fuses_as_a_whole(resnet18: Net, tmp_path: Path) -> None:
    _, model, table = resnet18
    graph.save(int8(model, table, ONNXRUNTIME, "minmax"), tmp_path / "18.onnx")
    fusion = audit(tmp_path / "18.onnx", "int8")
    assert (fusion.operators["QLinearConv"], fusion.operators["QLinearAdd"]) == (20, 8)
    assert not fusion.operators.keys() & {"Conv", "FusedConv", "Gemm", "Relu", "Add"}
    assert fusion.notes == []


def test_resnet18_for_tensorrt_leaves_the_second_convolution_of_each_block_bare(resnet18: Net) -> None:
    _, model, table = resnet18
    quantized = int8(model, table, TENSORRT, "minmax")
    assert len(weight_pairs(quantized)) == 21
    names = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    expected = {graph.INPUT, "maxpool", "flatten", *(f"layer{i}.0.downsample.0" for i in (2, 3, 4))}
    expected |= {f"{n}.{t}" for n in names for t in ("relu1", "relu2")}
    assert set(activation_pairs(quantized)) == expected
    assert lint(quantized, TENSORRT) == []


def foreign(swap: bool, between: str) -> Any:
    """Convolutions on both branches of an Add, the one of ``trunk`` longer; then ``between``, which is not quantized.

    (N, 3, 16, 16) -> (N, 5).
    """
    rng = np.random.default_rng(5)
    shapes = {
        "stem": (8, 3, 3, 3),
        "up": (6, 8, 3, 3),
        "trunk": (8, 6, 3, 3),
        "side": (8, 8, 1, 1),
        "late": (8, 8, 3, 3),
    }
    constants = {f"{n}/W": rng.standard_normal(s) / np.sqrt(np.prod(s[1:])) for n, s in shapes.items()}
    constants |= {f"{n}/B": rng.standard_normal(s[0]) / 4 for n, s in shapes.items()}
    constants |= {"head/W": rng.standard_normal((5, 8)), "head/B": rng.standard_normal(5)}

    def conv(name: str, source: str) -> Any:
        pad = [shapes[name][2] // 2] * 4
        return helper.make_node("Conv", [source, f"{name}/W", f"{name}/B"], [f"{name}:0"], name=name, pads=pad)

    sides = ["side:0", "trunk:0"] if swap else ["trunk:0", "side:0"]
    nodes = [
        conv("stem", graph.INPUT),
        helper.make_node("Relu", ["stem:0"], ["a"], name="a"),
        conv("up", "a"),
        helper.make_node("Relu", ["up:0"], ["b"], name="b"),
        conv("trunk", "b"),
        conv("side", "a"),
        helper.make_node("Add", sides, ["sum"], name="sum"),
        helper.make_node(between, ["sum"], ["curved"], name="curved"),
        conv("late", "curved"),
        helper.make_node("GlobalAveragePool", ["late:0"], ["pool"], name="pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "head/W", "head/B"], [graph.OUTPUT], name="head", transB=1),
    ]
    arrays = [numpy_helper.from_array(a.astype(np.float32), name) for name, a in constants.items()]
    return graph.assemble(nodes, arrays, "foreign", (3, 16, 16), 5, 17, None)


@pytest.mark.parametrize("between", ["Sigmoid", "HardSwish"])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_graph_of_other_names_and_operators_quantizes_around_them(name: str, swap: bool, between: str) -> None:
    scheme = replace(SCHEMES[name], weight_bits=7 if not SCHEMES[name].signed else 8)
    model = foreign(swap, between)
    pixels = batch(8, 16).pixels
    quantized = int8(model, measure(model, batch(8, 16)), scheme, "minmax")
    onnx.checker.check_model(quantized, full_check=True)
    assert lint(quantized, scheme) == []
    assert {producer(quantized, i).op_type for n in layers(quantized) for i in n.input[:2]} == {"DequantizeLinear"}
    assert graph.count_ops(quantized)[between] == 1
    assert {"side:0", "curved"} <= set(activation_pairs(quantized))
    assert ("trunk:0" in activation_pairs(quantized)) == scheme.main_branch
    assert ("sum" in activation_pairs(quantized)) == scheme.everywhere  # float reads it: for TensorRT a pair would cost
    assert 25 < decibels(*squares(logits(model, pixels), logits(quantized, pixels))) < 60


@pytest.mark.parametrize("scheme", [TENSORRT, ONNXRUNTIME, OPENVINO], ids=lambda s: s.name)
def test_kept_layers_stay_in_float(resnet50: Net, scheme: Scheme) -> None:
    _, model, table = resnet50
    keep = ["layer2.1.conv2", "fc"]
    quantized = int8(model, table, scheme, "minmax", keep)
    constants, before = graph.initializers(quantized), graph.initializers(model)
    for node in layers(quantized):
        is_constant = node.input[1] in constants
        assert is_constant == (node.name in keep), node.name
        if is_constant:
            for name in node.input[1:]:
                np.testing.assert_array_equal(constants[name], before[name])
    if scheme is TENSORRT:
        assert "layer2.1.relu1" not in activation_pairs(quantized)
    assert lint(quantized, scheme) == []
    assert np.isfinite(logits(quantized, batch(1).pixels)).all()


def test_what_is_quantized_already_is_refused(resnet18: Net) -> None:
    _, model, table = resnet18
    once = int8(model, table, TENSORRT, "minmax")
    with pytest.raises(InputError, match="quantized already") as caught:
        int8(once, table, TENSORRT, "minmax")
    assert "input.q" in caught.value.evidence


def stem(weight: np.ndarray) -> Any:
    """Convolution 1x1, pool, classifier."""
    arrays = {"w": weight.reshape(-1, 3, 1, 1), "b": np.zeros(len(weight)), "fc": np.eye(len(weight))}
    nodes = [
        helper.make_node("Conv", [graph.INPUT, "w", "b"], ["c"], name="c"),
        helper.make_node("GlobalAveragePool", ["c"], ["p"], name="p"),
        helper.make_node("Flatten", ["p"], ["f"], name="f"),
        helper.make_node("Gemm", ["f", "fc"], [graph.OUTPUT], name="g", transB=1),
    ]
    constants = [numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()]
    return graph.assemble(nodes, constants, "stem", (3, 4, 4), len(weight), 17, None)


def test_an_average_pool_of_fixed_size_is_quantized_as_a_global_one() -> None:
    model = stem(np.eye(2, 3))
    pool = model.graph.node[1]
    pool.op_type = "AveragePool"
    pool.attribute.append(helper.make_attribute("kernel_shape", [4, 4]))
    assert pairs(model, TENSORRT) == {graph.INPUT, "c", "f"}
    assert pairs(model, ONNXRUNTIME) == {graph.INPUT, "c", "p", "f"}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_channel_of_zeros_gets_scale_1_in_the_graph(scheme: Scheme) -> None:
    model = stem(np.asarray([[0, 0, 0], [0.5, -1, 0.25]]))
    quantized = int8(model, measure(model, batch(2, 4)), scheme, "minmax")
    constants = graph.initializers(quantized)
    np.testing.assert_array_equal(constants["w.scale"], np.asarray([1, 1 / 127], np.float32))


@pytest.mark.parametrize("rule", WEIGHTS)
@pytest.mark.parametrize("rest", ["fp32", "fp16"])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-39, 1e-30, 1e-6])
def test_no_scale_is_subnormal_in_the_precision_of_the_rest(size: float, rest: str, rule: str) -> None:
    scheme = replace(TENSORRT, rest=rest, weights=rule)
    model = stem(np.asarray([[size, 0, 0], [size, size, 0]]))
    table = measure(model, batch(2, 4))
    faint = TensorRange()
    faint.update(np.asarray([size, 0], np.float32))
    table.tensors["c"] = faint
    constants = graph.initializers(int8(model, table, scheme, "minmax"))
    kind = np.float16 if rest == "fp16" else np.float32
    scales = np.concatenate([np.ravel(a.astype(kind)) for n, a in constants.items() if n.endswith(".scale")])
    assert len(scales) == 2 + 2 + 3
    assert (scales >= np.finfo(kind).tiny).all()


def test_what_is_faint_but_there_keeps_as_many_steps_as_fp16_scales_allow() -> None:
    model = stem(np.asarray([[1e-3, 0, 0], [0, 1e-3, 0]]))  # activations up to 0.004: scales of 3e-5
    pixels = batch(4, 4).pixels
    table = measure(model, batch(4, 4))
    scale, _ = quantizers(int8(model, table, TENSORRT, "minmax"))["c"]
    assert scale == np.finfo(np.float16).tiny
    result = logits(int8(model, table, TENSORRT, "minmax"), pixels)
    assert decibels(*squares(logits(model, pixels), result)) > 15


def test_a_cache_has_float32_scales_however_small() -> None:
    model = stem(np.asarray([[1e-3, 0, 0], [0, 1e-3, 0]]))
    table = measure(model, batch(4, 4))
    scheme, r = SCHEMES["implicit"], table.tensors["c"]
    faint = np.float32(max(-r.min, r.max) / 127)
    assert faint < np.finfo(np.float16).tiny
    assert calibration_cache.scales(model, table, "minmax")["c"] == faint
    constants = graph.initializers(int8(model, table, scheme, "minmax"))
    assert constants["c.scale"] == faint
    np.testing.assert_array_equal(constants["w.scale"], np.full(2, 1e-3, np.float32) / 127)
    assert (scheme.smallest, TENSORRT.smallest) == (np.finfo(np.float32).tiny, np.finfo(np.float16).tiny)


def test_mse_scales_of_tensorrt_clip_where_absmax_does_not(resnet50: Net) -> None:
    _, model, table = resnet50
    scheme = replace(TENSORRT, weights="mse", rest="fp32")
    quantized = int8(model, table, scheme, "minmax")
    constants, before = graph.initializers(quantized), graph.initializers(model)
    assert lint(quantized, scheme) == []
    clipped = 0
    for q in weight_pairs(quantized):
        weight, scale, _ = (constants[name] for name in q.input)
        np.testing.assert_array_equal(weight, before[q.input[0]])
        steps = np.abs(weight.reshape(len(weight), -1)).max(1) / scale
        assert (steps >= 126.99).all()
        assert (steps <= 254.1).all()
        clipped += (steps > 127.5).sum()
    assert clipped > 1000
