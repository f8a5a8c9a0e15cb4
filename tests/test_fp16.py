from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import batch, measure
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from rich.console import Console
from test_quantize import logits

from edgeres import graph, progress
from edgeres.fidelity import decibels, squares
from edgeres.fp16 import LARGEST, MARGIN, SCALES_OPSET, fp16, magnitudes, rounding
from edgeres.quantize import SCHEMES, int8

BLOCK = "layer1.1"


@pytest.fixture
def tiny(tiny_path: Path) -> Any:
    return graph.load(tiny_path)


def put(model: Any, name: str, value: np.ndarray) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(value, np.float32), name))


def scale_up(model: Any, factor: float) -> None:
    """Let what `BLOCK`'s first layer gives be ``factor`` squared times as large; the logits stay the same."""
    constants = graph.initializers(model)
    factors = {"conv1.weight": factor**2, "conv1.bias": factor**2, "conv2.bias": factor}
    for name, by in {**factors, "conv2.weight": 1 / factor, "conv3.weight": 1 / factor}.items():
        put(model, f"{BLOCK}.{name}", constants[f"{BLOCK}.{name}"] * np.float32(by))


def in_half(model: Any, pixels: np.ndarray) -> np.ndarray:
    """Logits with every FP16 operator computed in FP16, which ONNX Runtime does in FP32 on most CPUs."""
    with np.errstate(all="ignore"):
        return np.asarray(ReferenceEvaluator(model).run([graph.OUTPUT], {graph.INPUT: pixels})[0])


def valid(model: Any) -> None:
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def said(model: Any, found: dict[str, float] | None = None) -> tuple[Any, str]:
    out = io.StringIO()
    with progress.to(Console(file=out, width=500)):
        return fp16(model, found), out.getvalue()


def test_every_constant_is_half_and_the_ends_are_float(tiny: Any) -> None:
    half, words = said(tiny)
    valid(half)
    assert words == ""
    assert {t.data_type for t in half.graph.initializer} == {TensorProto.FLOAT16}
    ends = (*half.graph.input, *half.graph.output)
    assert [(e.name, e.type.tensor_type.elem_type) for e in ends] == [("input", 1), ("logits", 1)]
    assert graph.count_ops(half) == {**graph.count_ops(tiny), "Cast": 2}
    assert graph.metadata(half) == graph.metadata(tiny)
    assert (half.opset_import, half.ir_version) == (tiny.opset_import, tiny.ir_version)
    for name, array in graph.initializers(tiny).items():
        np.testing.assert_array_equal(graph.initializers(half)[name], array.astype(np.float16))


def test_it_computes_what_fp32_computes(tiny: Any) -> None:
    pixels = batch().pixels
    assert 50 < decibels(*squares(logits(tiny, pixels), logits(fp16(tiny), pixels))) < 100


def test_the_source_is_not_modified(tiny: Any) -> None:
    put(tiny, "fc.bias", np.full(4, 1e6))
    before = tiny.SerializeToString(deterministic=True)
    fp16(tiny, magnitudes(tiny, batch(2).pixels))
    assert tiny.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("value", [65505.0, -70000.0, np.inf])
def test_an_operator_with_a_weight_beyond_fp16_stays_in_fp32(tiny: Any, value: float) -> None:
    name = f"{BLOCK}.conv2.bias"
    put(tiny, name, np.full(8, value))
    mixed, words = said(tiny)
    assert "1 operators stay in FP32" in words
    assert f"{BLOCK}.conv2\n" in words
    assert graph.metadata(mixed) == {**graph.metadata(tiny), "kept_fp32": [f"{BLOCK}.conv2"]}
    valid(mixed)
    single = {t.name: t for t in mixed.graph.initializer if t.data_type == TensorProto.FLOAT}
    assert set(single) == {f"{name}.fp32", f"{BLOCK}.conv2.weight.fp32"}
    np.testing.assert_array_equal(numpy_helper.to_array(single[f"{name}.fp32"]), np.full(8, value, np.float32))
    assert graph.count_ops(mixed)["Cast"] == 4


def test_the_largest_fp16_value_is_kept(tiny: Any) -> None:
    put(tiny, "fc.bias", np.full(4, -LARGEST))
    half, words = said(tiny)
    assert words == ""
    np.testing.assert_array_equal(graph.initializers(half)["fc.bias"], np.full(4, -65504, np.float16))


def test_a_last_layer_in_fp32_gives_the_logits_without_a_cast(tiny: Any) -> None:
    put(tiny, "fc.bias", np.full(4, 1e5))
    mixed = fp16(tiny)
    valid(mixed)
    (last,) = [n for n in mixed.graph.node if graph.OUTPUT in n.output]
    assert last.op_type == "Gemm"
    assert [n.name for n in mixed.graph.node if n.op_type == "Cast"] == ["input.fp16", "flatten.fp32"]


def test_logits_that_overflow_come_out_whole(tiny: Any) -> None:
    constants, pixels = graph.initializers(tiny), batch().pixels
    for name in ("fc.weight", "fc.bias"):
        put(tiny, name, constants[name] * np.float32(60_000 / np.abs(constants["fc.weight"]).max()))
    assert np.abs(logits(tiny, pixels)).max() > LARGEST
    for model in (tiny, int8(tiny, measure(tiny, batch()), SCHEMES["tensorrt"], "minmax")):
        mixed = fp16(model, magnitudes(tiny, pixels))
        assert graph.metadata(mixed)["kept_fp32"] == ["fc"]
        valid(mixed)
        assert decibels(*squares(logits(tiny, pixels), in_half(mixed, pixels))) > 25


def test_magnitudes_are_the_largest_of_every_tensor(tiny: Any) -> None:
    pixels = batch(6).pixels
    found = magnitudes(tiny, pixels)
    assert set(found) == {o for n in tiny.graph.node for o in n.output} | {graph.INPUT}
    table = measure(tiny, batch(6))
    for name, r in table.tensors.items():
        assert found[name] == pytest.approx(max(-r.min, r.max), rel=1e-5)


def test_activations_that_overflow_stay_in_fp32(tiny: Any) -> None:
    pixels = batch(2).pixels
    reference = logits(tiny, pixels)
    scale_up(tiny, 200.0)
    mixed, words = said(tiny, magnitudes(tiny, pixels))
    kept = [f"{BLOCK}.{part}" for part in ("conv1", "relu1", "conv2")]
    assert graph.metadata(mixed)["kept_fp32"] == kept
    assert f"3 operators stay in FP32, their values do not fit FP16: {', '.join(kept)}" in words
    valid(mixed)
    for run in (logits, in_half):
        assert decibels(*squares(reference, run(mixed, pixels))) > 50
    assert not np.isfinite(in_half(fp16(tiny), pixels)).all()


@pytest.mark.parametrize(("most", "kept"), [(LARGEST / MARGIN, 0), (LARGEST / MARGIN + 1, 2)])
def test_the_margin_is_for_images_not_seen(tiny: Any, most: float, kept: int) -> None:
    names = graph.metadata(fp16(tiny, {"layer1.0.conv1": most})).get("kept_fp32", [])
    assert names == ["layer1.0.conv1", "layer1.0.relu1"][:kept]


@pytest.fixture
def quantized(tiny: Any) -> Any:
    return int8(tiny, measure(tiny, batch()), SCHEMES["tensorrt"], "minmax")


def test_int8_gets_fp16_scales_and_the_opset_that_takes_them(quantized: Any) -> None:
    half = fp16(quantized)
    valid(half)
    assert [(o.domain, o.version) for o in half.opset_import] == [("", 19)]
    assert half.ir_version == 9
    arrays, constants = graph.initializers(quantized), graph.initializers(half)
    assert {a.dtype for a in constants.values()} == {np.dtype(np.float16), np.dtype(np.int8)}
    for name, array in constants.items():
        np.testing.assert_array_equal(array, arrays[name].astype(array.dtype))
    assert graph.count_ops(half) == {**graph.count_ops(quantized), "Cast": 2}
    assert graph.metadata(half)["precision"] == "int8"


def test_an_opset_beyond_19_is_left_alone(quantized: Any) -> None:
    graph.raise_opset(quantized, 21)
    half = fp16(quantized)
    assert [o.version for o in half.opset_import] == [21]
    valid(half)


@pytest.mark.parametrize("optimize", [False, True])
def test_int8_with_fp16_is_as_close_as_int8_with_fp32(tiny: Any, quantized: Any, optimize: bool) -> None:
    pixels = batch().pixels
    reference = logits(tiny, pixels)
    single, half = (
        decibels(*squares(reference, logits(m, pixels, optimize=optimize))) for m in (quantized, fp16(quantized))
    )
    assert single > 20
    assert abs(half - single) < 3
    assert half != single


def test_int8_whose_activations_overflow_fp16(tiny: Any) -> None:
    pixels = batch(2).pixels
    reference = logits(tiny, pixels)
    scale_up(tiny, 200.0)
    # scales fit FP16, what they scale does not
    quantized = int8(tiny, measure(tiny, batch(2)), replace(SCHEMES["tensorrt"], rest="fp32"), "minmax")
    assert max(float(a.max()) for n, a in graph.initializers(quantized).items() if n.endswith(".scale")) < LARGEST
    mixed = fp16(quantized, magnitudes(tiny, pixels))
    valid(mixed)
    assert graph.metadata(mixed)["kept_fp32"] == [f"{BLOCK}.{part}" for part in ("conv1", "relu1", "conv2")]
    pair = [n for n in mixed.graph.node if n.name in (f"{BLOCK}.relu1.q", f"{BLOCK}.relu1.dq")]
    assert {n.input[1] for n in pair} == {f"{BLOCK}.relu1.scale.fp32"}
    assert np.isfinite(in_half(mixed, pixels)).all()
    assert decibels(*squares(reference, logits(mixed, pixels))) > 20


def test_int8_weights_and_biases_convert_too(tiny: Any) -> None:
    scheme = replace(SCHEMES["openvino"], rest="fp16")
    half = fp16(int8(tiny, measure(tiny, batch()), scheme, "minmax"))
    valid(half)
    assert {t.data_type for t in half.graph.initializer} == {
        TensorProto.FLOAT16,
        TensorProto.INT8,
        TensorProto.UINT8,
    }
    assert np.isfinite(logits(half, batch().pixels)).all()


def test_what_is_quantized_from_fp16_is_rounded() -> None:
    """Whatever the version of ONNX Runtime: 1.18 to 1.23 do not by themselves."""
    values = np.asarray([0.4, 0.6, 1.5, 2.5, -0.6, -1.9, 300, -300], np.float16)
    constants = [
        numpy_helper.from_array(np.float16(1), "scale"),
        numpy_helper.from_array(np.int8(0), "zero"),
    ]
    made = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, values.shape)],
        [helper.make_tensor_value_info("y", TensorProto.INT8, values.shape)],
        constants,
    )
    model = rounding(helper.make_model(made, opset_imports=[helper.make_opsetid("", SCALES_OPSET)], ir_version=9))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": values})[0].tolist() == [0, 1, 2, 2, -1, -2, 127, -128]
    assert graph.count_ops(model) == {"Cast": 2, "QuantizeLinear": 1}


def test_rounding_leaves_fp32_as_it_is(tiny: Any) -> None:
    quantized = int8(tiny, measure(tiny, batch()), SCHEMES["tensorrt"], "minmax")
    before = quantized.SerializeToString()
    assert rounding(quantized).SerializeToString() == before
