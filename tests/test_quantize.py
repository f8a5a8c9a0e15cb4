from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import batch, measure, tiny_resnet
from onnx import TensorProto, helper, numpy_helper

from edgeres import graph, pipeline
from edgeres.calibrate import RangeTable, TensorRange
from edgeres.errors import InputError, StaleError, UsageError
from edgeres.export import export_onnx, trace
from edgeres.fidelity import decibels, squares
from edgeres.fp16 import rounding
from edgeres.job import Job
from edgeres.loader import Batch
from edgeres.model import resnet50
from edgeres.quantize import SCHEMES, int8, quantize_weight
from edgeres.recipe import Preprocess, load_recipe
from edgeres.runners.onnxruntime import audit
from edgeres.thresholds import METHODS, WEIGHTS

SCHEME = SCHEMES["onnxruntime"]
NARROW = replace(SCHEME, weight_bits=7)


def logits(model: Any, pixels: np.ndarray, *, optimize: bool = True) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = rounding(copy.deepcopy(model)).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([graph.OUTPUT], {graph.INPUT: pixels})[0])


@pytest.fixture(scope="module")
def quantized(tiny: Any, table: RangeTable) -> Any:
    return int8(tiny, table, SCHEME, "minmax")


@pytest.fixture(scope="module")
def heavy(tiny_path: Path) -> tuple[Any, RangeTable]:
    """The tiny network with weights of a heavy-tailed distribution, and its range table."""
    model = graph.load(tiny_path)
    rng = np.random.default_rng(5)
    for tensor in model.graph.initializer:
        weight = numpy_helper.to_array(tensor)
        if weight.ndim > 1:
            tails = rng.standard_t(2.5, weight.shape) * weight.std()
            tensor.CopyFrom(numpy_helper.from_array(tails.astype(np.float32), tensor.name))
    return model, measure(model, batch(16))


def producer(model: Any, name: str) -> Any:
    return next(n for n in model.graph.node if name in n.output)


def dequantized(model: Any, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Integers, scale, zero point and axis of the constant that ``name`` dequantizes."""
    node, constants = producer(model, name), graph.initializers(model)
    assert node.op_type == "DequantizeLinear"
    integers, scale, zero = (constants[n] for n in node.input)
    return integers, scale, zero, next(a.i for a in node.attribute if a.name == "axis")


def quantizers(model: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Quantized tensor -> its scale and zero point."""
    constants = graph.initializers(model)
    nodes = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    return {n.input[0]: (constants[n.input[1]], constants[n.input[2]]) for n in nodes}


@pytest.mark.parametrize("variant", ["v1", "v1.5"])
def test_all_of_resnet50_fuses_into_integer_operators(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = trace(resnet50(variant, classes=10).eval(), 64, opset=17, batch=None)
    quantized = int8(model, measure(model, batch(2, 64)), SCHEME, "minmax")
    graph.save(quantized, tmp_path / "model.onnx")
    assert graph.count_ops(quantized)["QuantizeLinear"] == 73
    fusion = audit(tmp_path / "model.onnx", "int8")
    assert fusion.operators["QLinearConv"] == 53
    assert fusion.operators["QLinearAdd"] == 16
    assert fusion.operators["QGemm"] == 1
    assert not fusion.operators.keys() & {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "Relu", "Add"}
    assert "DequantizeLinear" not in fusion.operators
    assert fusion.notes == []


def test_weights_are_int8_symmetric_per_output_channel(tiny: Any, quantized: Any) -> None:
    weights = graph.initializers(tiny)
    nodes = [n for n in quantized.graph.node if n.op_type in ("Conv", "Gemm")]
    assert len(nodes) == 16
    for node in nodes:
        integers, scale, zero, axis = dequantized(quantized, node.input[1])
        weight = weights[node.input[1].removesuffix(".dq")]
        assert axis == 0
        assert (integers.dtype, scale.dtype, zero.dtype) == (np.int8, np.float32, np.int8)
        assert scale.shape == zero.shape == (len(weight),)
        assert not zero.any()
        rows = integers.reshape(len(weight), -1)
        np.testing.assert_array_equal(np.abs(rows.astype(int)).max(1), 127)
        error = np.abs(rows * scale[:, None].astype(np.float64) - weight.reshape(len(weight), -1))
        assert (error <= scale[:, None] * 0.5001).all()


def test_biases_are_int32_at_the_product_of_the_scales(tiny: Any, quantized: Any) -> None:
    constants, activations = graph.initializers(tiny), quantizers(quantized)
    for node in quantized.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            data, weight, bias = node.input
            integers, scale, zero, axis = dequantized(quantized, bias)
            assert (integers.dtype, zero.dtype, axis) == (np.int32, np.int32, 0)
            assert not zero.any()
            x_scale, _ = activations[data.removesuffix(".dq")]
            np.testing.assert_array_equal(scale, x_scale * dequantized(quantized, weight)[1])
            error = np.abs(integers * scale.astype(np.float64) - constants[bias.removesuffix(".dq")])
            assert (error <= scale * 0.5001).all()


def test_activations_are_uint8_per_tensor_and_cover_the_measured_range(quantized: Any, table: RangeTable) -> None:
    pairs = quantizers(quantized)
    assert set(pairs) == {*table.tensors, "flatten"}
    for name, (scale, zero) in pairs.items():
        assert (scale.dtype, scale.shape) == (np.float32, ())
        assert (zero.dtype, zero.shape) == (np.uint8, ())
        assert np.float32(0) == (np.float32(zero) - zero) * scale
        if name in ("maxpool", "flatten"):
            continue
        r = table.tensors[name]
        # the zero point is an integer: the ends may move by half a step
        assert (0 - float(zero)) * scale <= min(r.min, 0) + 0.501 * scale
        assert (255 - float(zero)) * scale >= max(r.max, 0) - 0.501 * scale
        assert scale == pytest.approx((max(r.max, 0) - min(r.min, 0)) / 255, rel=1e-6)


def test_one_scale_on_both_sides_of_max_pool_and_flatten(quantized: Any) -> None:
    pairs = quantizers(quantized)
    assert pairs["maxpool"] == pairs["relu"]
    assert pairs["flatten"] == pairs["avgpool"]
    assert pairs["relu"] != pairs["avgpool"]


def test_every_operator_reads_quantized_tensors_only(quantized: Any) -> None:
    for node in quantized.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear", "Relu"):
            assert {producer(quantized, name).op_type for name in node.input} == {"DequantizeLinear"}, node.name


def test_the_value_before_a_relu_is_not_quantized(quantized: Any) -> None:
    relus = [n for n in quantized.graph.node if n.op_type == "Relu"]
    assert len(relus) == 13
    assert {producer(quantized, n.input[0]).op_type for n in relus} == {"Conv", "Add"}


def test_logits_stay_float(quantized: Any) -> None:
    assert producer(quantized, graph.OUTPUT).op_type == "Gemm"
    assert graph.OUTPUT not in quantizers(quantized)
    assert quantized.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


def test_the_quantized_model_is_valid_and_says_what_it_is(tiny: Any, quantized: Any) -> None:
    onnx.checker.check_model(quantized, full_check=True)
    assert graph.metadata(quantized) == {**graph.metadata(tiny), "precision": "int8"}
    names = [t.name for t in quantized.graph.initializer]
    assert len(set(names)) == len(names)
    assert set(names) == {i for n in quantized.graph.node for i in n.input} & set(names)


def test_source_and_table_are_not_modified(tiny_path: Path) -> None:
    model = graph.load(tiny_path)
    table = measure(model, batch(2))
    before, ranges = model.SerializeToString(deterministic=True), {n: r.to_json() for n, r in table.tensors.items()}
    for method in METHODS:
        for scheme in SCHEMES.values():
            int8(model, table, scheme, method)
    assert model.SerializeToString(deterministic=True) == before
    assert {n: r.to_json() for n, r in table.tensors.items()} == ranges


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_logits_close(tiny: Any, table: RangeTable, method: str) -> None:
    pixels = batch().pixels
    result = logits(int8(tiny, table, NARROW, method), pixels)
    assert decibels(*squares(logits(tiny, pixels), result)) > 20


def test_eight_weight_bits_are_more_faithful_than_seven(tiny: Any, table: RangeTable) -> None:
    pixels = batch().pixels
    reference = logits(tiny, pixels)
    noise = [
        decibels(*squares(reference, logits(int8(tiny, table, s, "minmax"), pixels, optimize=False)))
        for s in (SCHEME, NARROW)
    ]
    assert noise[0] > noise[1] + 1


def test_seven_weight_bits_stay_within_64(tiny: Any, table: RangeTable) -> None:
    constants = graph.initializers(int8(tiny, table, NARROW, "minmax"))
    values = np.concatenate([a.ravel() for name, a in constants.items() if name.endswith("weight.int")])
    assert values.min() >= -64
    assert np.abs(values.astype(int)).max() == 63


def test_a_channel_of_zeros_gets_scale_1() -> None:
    weight = np.asarray([[0, 0], [1, -0.5]], np.float32)
    integers, scale = quantize_weight(weight, SCHEME, np.zeros(2, np.float32), np.float32(0.02))
    np.testing.assert_array_equal(integers, [[0, 0], [127, -64]])
    assert scale[0] == 1
    assert scale[1] == np.float32(1 / 127)


@pytest.mark.parametrize("rule", WEIGHTS)
@pytest.mark.parametrize("bias", [100.0, -100.0, 1e-3])
@pytest.mark.parametrize("weight", [0.0, 1e-9])
def test_a_huge_bias_on_a_tiny_channel_fits_int32(weight: float, bias: float, rule: str) -> None:
    x_scale, scheme = np.float32(0.02), replace(SCHEME, weights=rule)
    integers, scale = quantize_weight(
        np.full((1, 4), weight, np.float32), scheme, np.asarray([bias], np.float32), x_scale
    )
    whole = np.rint(np.float64(bias) / (np.float64(x_scale) * scale[0]))
    assert abs(whole) <= 2**30 * 1.0001
    assert np.abs(integers * scale - weight).max() <= scale[0] / 2
    assert whole * x_scale * scale[0] == pytest.approx(bias, rel=1e-6)


@pytest.mark.parametrize("rule", WEIGHTS)
@pytest.mark.parametrize("weight", [1e-45, 1e-38, 2e-37, 1e-30])
@pytest.mark.parametrize("x_scale", [1e-20, 1e-12, 0.02, 50.0])
def test_a_vanishing_channel_never_divides_by_zero(weight: float, x_scale: float, rule: str) -> None:
    bias, scheme = np.asarray([0.0], np.float32), replace(SCHEME, weights=rule)
    integers, scale = quantize_weight(np.full((1, 4), weight, np.float32), scheme, bias, np.float32(x_scale))
    assert np.float32(x_scale) * scale[0] >= np.finfo(np.float32).tiny
    assert np.isfinite(bias / (np.float32(x_scale) * scale)).all()
    assert np.abs(integers).max() in (0, 127)


@pytest.mark.parametrize(("name", "bits"), [("onnxruntime", 8), ("onnxruntime", 7), ("openvino", 8), ("tensorrt", 8)])
def test_mse_scales_restore_every_channel_at_least_as_well(heavy: Any, name: str, bits: int) -> None:
    model, table = heavy
    schemes = [replace(SCHEMES[name], weights=rule, weight_bits=bits, rest="fp32") for rule in ("absmax", "mse")]
    plain, best = (graph.initializers(int8(model, table, s, "minmax")) for s in schemes)
    weights, gained = graph.initializers(model), 0
    for layer in (n for n in model.graph.node if n.op_type in graph.LAYERS):
        weight = weights[layer.input[1]].reshape(len(weights[layer.input[1]]), -1).astype(np.float64)
        errors = []
        for constants in (plain, best):
            scale = constants[f"{layer.input[1]}.scale"].astype(np.float64)[:, None]
            integers = np.clip(np.rint(weight / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            if schemes[0].int8_weights:
                np.testing.assert_array_equal(constants[f"{layer.input[1]}.int"].reshape(weight.shape), integers)
            errors.append(np.square(integers * scale - weight).sum(1))
        assert (errors[1] <= errors[0] * 1.001).all()
        gained += (errors[1] < 0.9 * errors[0]).sum()
    assert gained > 20


def test_mse_scales_keep_biases_at_the_product_of_the_scales(heavy: Any) -> None:
    model, table = heavy
    quantized = int8(model, table, replace(SCHEME, weights="mse"), "minmax")
    activations, constants = quantizers(quantized), graph.initializers(model)
    for node in quantized.graph.node:
        if node.op_type in graph.LAYERS:
            data, weight, bias = node.input
            integers, scale, _, _ = dequantized(quantized, bias)
            x_scale, _ = activations[data.removesuffix(".dq")]
            np.testing.assert_array_equal(scale, x_scale * dequantized(quantized, weight)[1])
            error = np.abs(integers * scale.astype(np.float64) - constants[bias.removesuffix(".dq")])
            assert (error <= scale * 0.5001).all()


@pytest.mark.parametrize("bits", [8, 7])
def test_mse_scales_of_heavy_tailed_weights_are_more_faithful(heavy: Any, bits: int) -> None:
    model, table = heavy
    pixels = batch(16).pixels
    reference = logits(model, pixels)
    schemes = [replace(SCHEME, weights=rule, weight_bits=bits) for rule in ("absmax", "mse")]
    plain, best = (logits(int8(model, table, s, "minmax"), pixels, optimize=False) for s in schemes)
    assert decibels(*squares(reference, best)) > decibels(*squares(reference, plain)) + 1


def test_a_rule_for_weights_is_recorded_and_another_one_quantizes_anew(workspace: Path, tiny_path: Path) -> None:
    models = []
    for rule in (*WEIGHTS, "absmax"):
        recipe = load_recipe(workspace, flags={"calibration": {"weights": rule}})
        path = pipeline.quantize_model(Job(recipe, workspace, tiny_path))
        models.append(path.read_bytes())
        assert graph.metadata(graph.load(path))["quantization"]["weights"] == rule
    assert models[0] == models[2] != models[1]


def test_a_rule_for_weights_that_tensorrt_quantizes_is_refused(workspace: Path, tiny_path: Path) -> None:
    flags = {"calibration": {"weights": "mse"}, "engine": {"target": "jetson-agx-orin-dla"}}
    job = Job(load_recipe(workspace, flags=flags), workspace, tiny_path)
    with pytest.raises(UsageError, match="jetson-agx-orin-dla takes no --weight-scales mse") as caught:
        pipeline.quantize_model(job)
    assert "leave it out" in caught.value.hint
    assert not job.folder.exists()


def test_absmax_is_what_a_scheme_has_unless_told(tiny: Any, table: RangeTable, quantized: Any) -> None:
    assert {s.weights for s in SCHEMES.values()} == {"absmax"}
    other = int8(tiny, table, replace(SCHEME, weights="mse"), "minmax")
    assert other.SerializeToString(deterministic=True) != quantized.SerializeToString(deterministic=True)


def chain(rng: np.random.Generator, bias: np.ndarray) -> Any:
    """3x3 convolution of stride 2, ReLU, 1x1 convolution: (N, 2, 9, 9) -> (N, 3, 5, 5)."""
    constants = {
        "first.weight": rng.standard_normal((len(bias), 2, 3, 3)),
        "first.bias": bias,
        "second.weight": rng.standard_normal((3, len(bias), 1, 1)),
        "second.bias": rng.standard_normal(3),
    }
    nodes = [
        helper.make_node(
            "Conv", [graph.INPUT, "first.weight", "first.bias"], ["first"], strides=[2, 2], pads=[1, 1, 1, 1]
        ),
        helper.make_node("Relu", ["first"], ["relu"]),
        helper.make_node("Conv", ["relu", "second.weight", "second.bias"], [graph.OUTPUT]),
    ]
    body = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info(graph.INPUT, 1, ["N", 2, 9, 9])],
        [helper.make_tensor_value_info(graph.OUTPUT, 1, ["N", 3, 5, 5])],
        [numpy_helper.from_array(a.astype(np.float32), name) for name, a in constants.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def convolve(x: np.ndarray, weight: np.ndarray, stride: int, pad: int) -> np.ndarray:
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], (2, 3))[:, :, ::stride, ::stride]
    return np.einsum("nchwrs,kcrs->nkhw", windows, weight)


def simulate(model: Any, pixels: np.ndarray, top: int) -> np.ndarray:
    """What a chip of integers computes for `chain` when every range is the smallest that holds its values."""
    constants = {name: a.astype(np.float64) for name, a in graph.initializers(model).items()}
    x, float_x = pixels.astype(np.float64), pixels.astype(np.float64)
    for layer, stride, pad in (("first", 2, 1), ("second", 1, 0)):
        weight, bias = constants[f"{layer}.weight"], constants[f"{layer}.bias"]
        lo, hi = min(float_x.min(), 0), max(float_x.max(), 0)
        step = (hi - lo) / 255
        zero = np.rint(-lo / step)
        integers = np.clip(np.rint(x / step) + zero, 0, 255)
        w_step = np.abs(weight).max((1, 2, 3), keepdims=True) / top
        sums = convolve(integers - zero, np.rint(weight / w_step), stride, pad)
        b_step = step * w_step.ravel()
        sums += np.rint(bias / b_step)[:, None, None]
        x = sums * b_step[:, None, None]
        float_x = convolve(float_x, weight, stride, pad) + bias[:, None, None]
        if layer == "first":
            x, float_x = np.maximum(x, 0), np.maximum(float_x, 0)
    return x


@pytest.mark.parametrize("optimize", [False, True])
def test_the_quantized_graph_computes_what_integers_compute(optimize: bool) -> None:
    rng = np.random.default_rng(3)
    model = chain(rng, rng.standard_normal(4))
    pixels = (rng.standard_normal((6, 2, 9, 9)) * 2 + 1).astype(np.float32)
    quantized = int8(model, measure(model, Batch(pixels, None, np.arange(6))), NARROW, "minmax")
    expected = simulate(model, pixels, top=63)
    result = logits(quantized, pixels, optimize=optimize)
    # a value halfway between two integers may go either way in FP32
    assert np.mean(np.abs(result - expected) < 1e-4) > 0.99
    assert decibels(*squares(expected, result)) > 55
    assert decibels(*squares(logits(model, pixels), result)) < 50  # it is quantized indeed


def test_a_huge_bias_survives_the_whole_way() -> None:
    rng = np.random.default_rng(4)
    model = chain(rng, np.asarray([1000.0, -1000.0, 0.0, 1e-6]))
    first = next(t for t in model.graph.initializer if t.name == "first.weight")
    weight = numpy_helper.to_array(first).copy()
    weight[0] *= np.float32(1e-9)
    weight[1:3] = 0
    first.CopyFrom(numpy_helper.from_array(weight, "first.weight"))
    pixels = rng.standard_normal((4, 2, 9, 9)).astype(np.float32)
    quantized = int8(model, measure(model, Batch(pixels, None, np.arange(4))), NARROW, "minmax")
    assert decibels(*squares(logits(model, pixels), logits(quantized, pixels))) > 30


@pytest.mark.parametrize("method", METHODS)
def test_tensors_that_are_always_zero_quantize(tiny: Any, method: str) -> None:
    table = measure(tiny, batch(2))
    dark = Batch(np.zeros((2, 3, 32, 32), np.float32), None, np.arange(2))
    table.tensors[graph.INPUT] = measure(tiny, dark).tensors[graph.INPUT]
    quantized = int8(tiny, table, SCHEME, method)
    scale, zero = quantizers(quantized)[graph.INPUT]
    assert (scale, zero) == (1, 0)
    assert np.isfinite(logits(quantized, dark.pixels)).all()


@pytest.mark.parametrize("value", [1e-45, -1e-38, 1e-36])
def test_a_scale_is_never_zero_or_subnormal(tiny: Any, value: float) -> None:
    table = measure(tiny, batch(2))
    faint = TensorRange()
    faint.update(np.asarray([value, 0], np.float32))
    table.tensors["relu"] = faint
    for scale, _ in quantizers(int8(tiny, table, SCHEME, "minmax")).values():
        assert scale >= np.finfo(np.float32).tiny


def test_a_table_of_another_model_is_refused(table: RangeTable, preprocess: Preprocess) -> None:
    other = export_onnx(tiny_resnet(seed=1), preprocess, {})
    with pytest.raises(StaleError, match="not of the same model"):
        int8(other, table, SCHEME, "minmax")


def test_a_missing_tensor_is_named(tiny: Any, table: RangeTable) -> None:
    tensors = {n: r for n, r in table.tensors.items() if n != "layer2.0.downsample.0"}
    partial = replace(table, tensors=tensors)
    with pytest.raises(InputError, match=r"does not cover tensor layer2\.0\.downsample\.0"):
        int8(tiny, partial, SCHEME, "minmax")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_constant_of_two_layers_is_refused(tiny_path: Path, scheme: str, part: str) -> None:
    model = graph.load(tiny_path)
    for node in model.graph.node:
        node.input[:] = [n.replace(f"layer1.1.conv2.{part}", f"layer1.0.conv2.{part}") for n in node.input]
    with pytest.raises(InputError, match=r"cannot quantize Conv layer1\.0\.conv2") as error:
        int8(model, measure(model, batch(2)), SCHEMES[scheme], "minmax")
    assert error.value.evidence == f"it shares layer1.0.conv2.{part} with layer1.1.conv2"


def test_a_fully_connected_layer_of_another_layout_is_refused(tiny_path: Path) -> None:
    model = graph.load(tiny_path)
    gemm = next(n for n in model.graph.node if n.op_type == "Gemm")
    del gemm.attribute[:]
    weight = next(t for t in model.graph.initializer if t.name == "fc.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).T.copy(), "fc.weight"))
    with pytest.raises(InputError, match="cannot quantize Gemm fc") as caught:
        int8(model, measure(model, batch(1)), SCHEME, "minmax")
    assert "transB=1" in caught.value.hint
