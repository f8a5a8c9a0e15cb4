from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from test_quantize import quantizers

from edgeres import graph
from edgeres.calibrate import RangeTable
from edgeres.errors import BuildError
from edgeres.fp16 import fp16
from edgeres.lint import lint, require_clean, without_pairs
from edgeres.quantize import SCHEMES, Scheme, float_operators, int8

TENSORRT, ONNXRUNTIME = SCHEMES["tensorrt"], SCHEMES["onnxruntime"]
WEIGHT, TENSOR = "layer1.0.conv1.weight", "layer1.0.relu1"


@pytest.fixture
def clean(tiny: Any, table: RangeTable) -> Any:
    return int8(tiny, table, TENSORRT, "minmax")


def put(model: Any, name: str, value: np.ndarray) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(value), name))


def find(model: Any, name: str) -> Any:
    return next(n for n in model.graph.node if n.name == name)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_what_int8_makes_is_clean(tiny: Any, table: RangeTable, scheme: Scheme) -> None:
    quantized = int8(tiny, table, scheme, "minmax")
    assert lint(quantized, scheme) == []
    require_clean(quantized, scheme)


def test_what_fp16_makes_of_it_is_clean(clean: Any) -> None:
    assert lint(fp16(clean), TENSORRT) == []


def both(found: list[str], tensor: str, words: str) -> None:
    """Both nodes of the pair on ``tensor`` break the rule with ``words``, and no other node does."""
    assert [line.partition(": ")[0] for line in found] == [f"{tensor}.q", f"{tensor}.dq"]
    assert all(words in line for line in found), found


def test_weight_scales_along_the_input_channels(clean: Any) -> None:
    for end in ("q", "dq"):
        find(clean, f"{WEIGHT}.{end}").attribute[0].i = 1
    both(lint(clean, TENSORRT), WEIGHT, "axis 1")


def test_weight_scales_without_an_axis_lie_along_axis_1(clean: Any) -> None:
    for end in ("q", "dq"):
        del find(clean, f"{WEIGHT}.{end}").attribute[:]
    both(lint(clean, TENSORRT), WEIGHT, "axis 1")


def test_as_many_weight_scales_as_there_are_input_channels(clean: Any) -> None:
    inputs = graph.initializers(clean)["layer1.0.conv3.weight"].shape[1]
    put(clean, "layer1.0.conv3.weight.scale", np.ones(inputs, np.float32))
    put(clean, "layer1.0.conv3.weight.zero_point", np.zeros(inputs, np.int8))
    both(lint(clean, TENSORRT), "layer1.0.conv3.weight", "output channels")


def test_one_scale_per_channel_of_an_activation(clean: Any) -> None:
    put(clean, f"{TENSOR}.scale", np.ones(8, np.float32))
    put(clean, f"{TENSOR}.zero_point", np.zeros(8, np.int8))
    for end in ("q", "dq"):
        find(clean, f"{TENSOR}.{end}").attribute.append(helper.make_attribute("axis", 1))
    both(lint(clean, TENSORRT), TENSOR, "8 scales on an activation")


@pytest.mark.parametrize(
    ("zero", "words"),
    [(np.int8(3), "zero point 3"), (np.uint8(0), "uint8"), (np.uint8(128), "uint8 with zero point 128")],
)
def test_zero_points_that_tensorrt_refuses(clean: Any, zero: np.generic, words: str) -> None:
    put(clean, f"{TENSOR}.zero_point", zero)
    both(lint(clean, TENSORRT), TENSOR, words)


def test_asymmetry_is_no_fault_where_the_scheme_has_it(clean: Any) -> None:
    put(clean, f"{TENSOR}.zero_point", np.uint8(128))
    assert lint(clean, replace(ONNXRUNTIME, main_branch=False)) == []


def test_one_weight_zero_point_of_many(clean: Any) -> None:
    zeros = graph.initializers(clean)[f"{WEIGHT}.zero_point"].copy()
    zeros[-1] = 1
    put(clean, f"{WEIGHT}.zero_point", zeros)
    both(lint(clean, TENSORRT), WEIGHT, "symmetric")


@pytest.mark.parametrize("scheme", [TENSORRT, ONNXRUNTIME], ids=lambda s: s.name)
@pytest.mark.parametrize("value", [0.0, -0.5, np.nan, np.inf, 1e-39])
def test_scales_that_are_no_positive_normal_numbers(tiny: Any, table: RangeTable, scheme: Scheme, value: float) -> None:
    model = int8(tiny, table, scheme, "minmax")
    put(model, f"{TENSOR}.scale", np.float32(value))
    both(lint(model, scheme), TENSOR, "zero, negative, subnormal, infinite or NaN")


def test_one_weight_scale_of_many(clean: Any) -> None:
    scales = graph.initializers(clean)[f"{WEIGHT}.scale"].copy()
    scales[2] = 0
    put(clean, f"{WEIGHT}.scale", scales)
    both(lint(clean, TENSORRT), WEIGHT, "zero, negative")


def test_a_scale_normal_in_fp32_and_subnormal_in_fp16(clean: Any) -> None:
    put(clean, f"{TENSOR}.scale", np.float32(1e-5))
    assert lint(clean, TENSORRT) == []
    both(lint(fp16(clean), TENSORRT), TENSOR, "subnormal")


@pytest.mark.parametrize("scheme", [TENSORRT, ONNXRUNTIME], ids=lambda s: s.name)
def test_a_missing_zero_point(tiny: Any, table: RangeTable, scheme: Scheme) -> None:
    model = int8(tiny, table, scheme, "minmax")
    for end in ("q", "dq"):
        del find(model, f"{TENSOR}.{end}").input[2]
    both(lint(model, scheme), TENSOR, "no constant zero point")


def test_a_zero_point_of_another_shape_than_the_scale(clean: Any) -> None:
    put(clean, f"{WEIGHT}.zero_point", np.int8(0))
    both(lint(clean, TENSORRT), WEIGHT, "differ in shape")


def test_a_scale_that_is_computed(clean: Any) -> None:
    for end in ("q", "dq"):
        find(clean, f"{TENSOR}.{end}").input[1] = "layer1.0.conv1"
    both(lint(clean, TENSORRT), TENSOR, "the scale is no constant")


def test_int32_biases(tiny: Any, table: RangeTable) -> None:
    model = int8(tiny, table, replace(TENSORRT, int32_bias=True), "minmax")
    found = lint(model, TENSORRT)
    assert len(found) == 16
    assert found[0].startswith("conv1.bias.dq: int32")


def test_a_pair_on_the_main_branch(tiny: Any, table: RangeTable) -> None:
    model = int8(tiny, table, replace(TENSORRT, main_branch=True), "minmax")
    found = lint(model, TENSORRT)
    adds = [n.name for n in tiny.graph.node if n.op_type == "Add"]
    assert [line.partition(": ")[0] for line in found] == adds
    assert "main branch layer1.0.conv3" in found[0]
    assert lint(model, replace(TENSORRT, main_branch=True)) == []


def test_a_scheme_of_other_rules_finds_all_that_its_executor_refuses(tiny: Any, table: RangeTable) -> None:
    found = lint(int8(tiny, table, ONNXRUNTIME, "minmax"), TENSORRT)
    biases = [line for line in found if ".bias.dq: int32" in line]
    activations = [line for line in found if "uint8" in line]
    assert len(biases) == 16
    assert len(activations) == 2 * len(quantizers(int8(tiny, table, ONNXRUNTIME, "minmax")))


@pytest.mark.parametrize("broken", [3, 12])
def test_require_clean_lists_what_is_found(clean: Any, broken: int) -> None:
    nodes = [n for n in clean.graph.node if n.op_type == "QuantizeLinear"][:broken]
    for node in nodes:
        del node.input[2]
    with pytest.raises(BuildError, match=f"breaks {broken} rules of scheme tensorrt") as caught:
        require_clean(clean, TENSORRT)
    lines = caught.value.evidence.splitlines()
    assert lines[:8] == [f"{n.name}: no constant zero point" for n in nodes[:8]]
    assert lines[8:] == (["and 4 more"] if broken == 12 else [])
    assert caught.value.hint


@pytest.mark.parametrize("name", ["tensorrt", "implicit"])
def test_without_pairs_gives_back_the_float_graph(tiny: Any, table: RangeTable, name: str) -> None:
    plain = without_pairs(int8(tiny, table, SCHEMES[name], "minmax"))
    assert [*plain.graph.node] == [*tiny.graph.node]


def test_without_pairs_does_not_touch_its_argument(clean: Any) -> None:
    before = clean.SerializeToString(deterministic=True)
    without_pairs(clean)
    lint(clean, TENSORRT)
    assert clean.SerializeToString(deterministic=True) == before


def test_float_operators_are_those_nobody_quantizes(tiny: Any) -> None:
    assert float_operators(tiny) == {}
    nodes: list[Callable[..., Any]] = [
        helper.make_node("Sigmoid", [graph.INPUT], ["a"]),
        helper.make_node("Sigmoid", ["a"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("HardSwish", ["c"], [graph.OUTPUT]),
    ]
    ends = [onnx.helper.make_tensor_value_info(n, 1, ["N", 2]) for n in (graph.INPUT, graph.OUTPUT)]
    assert float_operators(helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]))) == {
        "Sigmoid": 2,
        "HardSwish": 1,
    }
