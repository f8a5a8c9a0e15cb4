from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import batch, measure
from onnx import TensorProto, numpy_helper
from test_quantize import logits

from edgeres import graph
from edgeres.fidelity import decibels, squares
from edgeres.fp16 import fp16
from edgeres.interface import interface
from edgeres.loader import normalizer
from edgeres.quantize import SCHEMES, int8
from edgeres.recipe import Preprocess

PRECISIONS = ("fp32", "fp16", "int8", "int8 and fp16")


@pytest.fixture(scope="module")
def models(tiny_path: Path) -> dict[str, Any]:
    """The tiny network in every precision."""
    fp32 = graph.load(tiny_path)
    table = measure(fp32, batch())
    cpu = int8(fp32, table, replace(SCHEMES["onnxruntime"], weight_bits=7), "minmax")
    gpu = fp16(int8(fp32, table, SCHEMES["tensorrt"], "minmax"))
    return dict(zip(PRECISIONS, (fp32, fp16(fp32), cpu, gpu), strict=True))


def types(model: Any) -> tuple[int, int]:
    """Element types of input and output."""
    (entry,), (result,) = model.graph.input, model.graph.output
    assert (entry.name, result.name) == (graph.INPUT, graph.OUTPUT)
    return entry.type.tensor_type.elem_type, result.type.tensor_type.elem_type


def valid(model: Any) -> None:
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    assert len({n.name for n in model.graph.node}) == len(model.graph.node)


def casts(model: Any) -> list[str]:
    return [n.name for n in model.graph.node if n.op_type == "Cast"]


def images(preprocess: Preprocess) -> tuple[np.ndarray, np.ndarray]:
    """Random images as planes in the network's channel order, uint8, and as the loader normalizes them, float32."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    normal = np.empty((8, 3, 32, 32), np.float32)
    for row, image in zip(normal, pixels, strict=True):
        normalizer(preprocess)(row, image)
    order = slice(None, None, -1) if preprocess.channel_order == "BGR" else slice(None)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)[:, order]), normal


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("order", ["RGB", "BGR"])
@pytest.mark.parametrize("optimize", [False, True])
def test_uint8_gives_the_logits_of_normalized_floats_to_the_last_bit(
    models: dict[str, Any], preprocess: Preprocess, precision: str, order: str, optimize: bool
) -> None:
    preprocess = replace(preprocess, channel_order=order)
    model = models[precision]
    raw = interface(model, "uint8", preprocess)
    valid(raw)
    assert types(raw) == (TensorProto.UINT8, TensorProto.FLOAT)
    assert graph.metadata(raw) == {**graph.metadata(model), "io": "uint8"}
    integers, floats = images(preprocess)
    expected = logits(model, floats, optimize=optimize)
    np.testing.assert_array_equal(logits(raw, integers, optimize=optimize), expected)
    assert np.ptp(expected) > 0.1


def test_the_channel_order_matters(models: dict[str, Any], preprocess: Preprocess) -> None:
    integers, _ = images(preprocess)
    rgb, bgr = (
        logits(interface(models["fp32"], "uint8", replace(preprocess, channel_order=o)), integers)
        for o in ("RGB", "BGR")
    )
    assert not np.array_equal(rgb, bgr)


@pytest.mark.parametrize("precision", ["fp16", "int8 and fp16"])
def test_a_graph_of_fp16_has_no_cast_left_at_either_end(
    models: dict[str, Any], preprocess: Preprocess, precision: str
) -> None:
    model = models[precision]
    half = interface(model, "fp16", preprocess)
    valid(half)
    assert types(half) == (TensorProto.FLOAT16, TensorProto.FLOAT16)
    assert len(casts(model)) == 2
    assert casts(half) == []
    assert len(half.graph.node) == len(model.graph.node) - 2
    assert half.graph.node[-1].op_type == "Gemm"


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_graph_of_fp32_gets_a_cast_at_each_end(
    models: dict[str, Any], preprocess: Preprocess, precision: str
) -> None:
    half = interface(models[precision], "fp16", preprocess)
    valid(half)
    assert types(half) == (TensorProto.FLOAT16, TensorProto.FLOAT16)
    assert len(casts(half)) == 2
    assert half.graph.node[0].op_type == half.graph.node[-1].op_type == "Cast"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fp16_computes_the_same_of_pixels_that_fp16_holds(
    models: dict[str, Any], preprocess: Preprocess, precision: str
) -> None:
    model = models[precision]
    half = interface(model, "fp16", preprocess)
    assert graph.metadata(half) == {**graph.metadata(model), "io": "fp16"}
    pixels = batch().pixels.astype(np.float16)
    result = logits(half, pixels)
    assert result.dtype == np.float16
    assert decibels(*squares(logits(model, pixels.astype(np.float32)), result)) > 60


def test_an_operator_kept_in_fp32_keeps_its_casts(models: dict[str, Any], preprocess: Preprocess) -> None:
    fp32 = type(models["fp32"]).FromString(models["fp32"].SerializeToString())
    bias = next(t for t in fp32.graph.initializer if t.name == "fc.bias")
    bias.CopyFrom(numpy_helper.from_array(np.asarray([1e5, 2, 3, 4], np.float32), bias.name))
    mixed = fp16(fp32)
    half = interface(mixed, "fp16", preprocess)
    valid(half)
    assert casts(half) == ["flatten.fp32", graph.OUTPUT]
    assert np.isfinite(logits(half, batch().pixels.astype(np.float16))[:, 1:]).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fp32_changes_nothing_but_what_is_said(models: dict[str, Any], preprocess: Preprocess, precision: str) -> None:
    model = models[precision]
    same = interface(model, "fp32", preprocess)
    assert same.graph == model.graph
    assert graph.metadata(same) == {**graph.metadata(model), "io": "fp32"}


@pytest.mark.parametrize("io", ["fp32", "fp16", "uint8"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_source_is_not_modified(models: dict[str, Any], preprocess: Preprocess, precision: str, io: str) -> None:
    before = models[precision].SerializeToString(deterministic=True)
    interface(models[precision], io, preprocess)
    assert models[precision].SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("io", ["fp16", "uint8"])
def test_the_batch_stays_free(models: dict[str, Any], preprocess: Preprocess, io: str) -> None:
    model = interface(models["fp32"], io, preprocess)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    kind = np.float16 if io == "fp16" else np.uint8
    for n in (1, 3):
        (result,) = session.run([graph.OUTPUT], {graph.INPUT: np.zeros((n, 3, 32, 32), kind)})
        assert result.shape == (n, 4)
