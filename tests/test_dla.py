from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from conftest import CLASSES, batch, tiny_resnet
from onnx import numpy_helper

from edgeres import graph
from edgeres.calibrate import RangeTable
from edgeres.dla import dla_form
from edgeres.errors import InputError
from edgeres.export import trace
from edgeres.fp16 import fp16
from edgeres.lint import lint
from edgeres.quantize import SCHEMES, int8


def run(model: Any, pixels: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([graph.OUTPUT], {graph.INPUT: pixels})[0])


def typed(tiny: Any, table: RangeTable, kind: str) -> Any:
    if kind == "fp32":
        return tiny
    model = int8(tiny, table, SCHEMES["tensorrt"], "mse") if kind.startswith("int8") else tiny
    return fp16(model) if kind.endswith("fp16") else model


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8", "int8 fp16"])
def test_it_computes_the_same_without_what_dla_lacks(tiny: Any, table: RangeTable, kind: str) -> None:
    model = typed(tiny, table, kind)
    made = dla_form(model)
    was, now = graph.count_ops(model), graph.count_ops(made)
    assert not {"GlobalAveragePool", "Flatten", "Gemm"} & set(now)
    assert now["AveragePool"] == 1
    assert now["Conv"] == was["Conv"] + 1
    pixels = batch(5).pixels
    logits = run(made, pixels)
    assert logits.shape == (5, CLASSES, 1, 1)
    # FP16 kernels sum in another order
    np.testing.assert_allclose(logits[:, :, 0, 0], run(model, pixels), rtol=0, atol=2e-2 if "fp16" in kind else 1e-5)
    assert [d.dim_value for d in made.graph.output[0].type.tensor_type.shape.dim][1:] == [CLASSES, 1, 1]


def test_quantized_it_is_as_clean_as_before(tiny: Any, table: RangeTable) -> None:
    made = dla_form(int8(tiny, table, SCHEMES["tensorrt"], "mse"))
    assert lint(made, SCHEMES["tensorrt"]) == []
    weight = next(t for t in made.graph.initializer if t.name == "fc.weight")
    assert numpy_helper.to_array(weight).shape[2:] == (1, 1)


def test_the_pool_is_as_large_as_its_input() -> None:
    for size, pool in ((32, [4, 4]), (96, [12, 12])):
        made = dla_form(trace(tiny_resnet(), size, 17, None))
        (node,) = [n for n in made.graph.node if n.op_type == "AveragePool"]
        assert next(list(a.ints) for a in node.attribute if a.name == "kernel_shape") == pool


def test_the_model_given_stays_as_it_was(tiny: Any) -> None:
    before = tiny.SerializeToString(deterministic=True)
    dla_form(tiny)
    assert tiny.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("transposed", [0, 1])
def test_weights_may_lie_either_way(tiny: Any, transposed: int) -> None:
    model = type(tiny).FromString(tiny.SerializeToString())
    gemm = next(n for n in model.graph.node if n.op_type == "Gemm")
    if not transposed:
        weight = next(t for t in model.graph.initializer if t.name == gemm.input[1])
        weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(weight).T), weight.name))
        next(a for a in gemm.attribute if a.name == "transB").i = 0
    pixels = batch(2).pixels
    np.testing.assert_allclose(run(dla_form(model), pixels)[:, :, 0, 0], run(tiny, pixels), rtol=0, atol=1e-5)


def test_a_gemm_over_an_image_is_refused(tiny: Any) -> None:
    model = type(tiny).FromString(tiny.SerializeToString())
    pool = next(n for n in model.graph.node if n.op_type == "GlobalAveragePool")
    pool.op_type = "Relu"
    next(v for v in model.graph.input).type.tensor_type.shape.dim[2].dim_value = 64
    with pytest.raises(InputError, match="fc is no classifier after a pool"):
        dla_form(model)
