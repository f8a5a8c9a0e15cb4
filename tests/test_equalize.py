from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import tiny_resnet
from onnx import helper, numpy_helper

from edgeres import equalize, graph
from edgeres.calibrate import RangeTable, TensorRange, calibrate
from edgeres.equalize import Channels, measure
from edgeres.errors import InputError
from edgeres.export import trace
from edgeres.loader import Batch
from edgeres.model import resnet
from edgeres.quantize import SCHEMES, int8
from edgeres.tune import Held

PIXELS = np.random.default_rng(0).standard_normal((12, 3, 32, 32), dtype=np.float32)


def batches(size: int = 12, pixels: np.ndarray = PIXELS) -> list[Batch]:
    return [
        Batch(pixels[i : i + size], None, np.arange(len(pixels))[i : i + size]) for i in range(0, len(pixels), size)
    ]


def small(kind: str) -> Any:
    if kind != "resnet18":
        return trace(tiny_resnet({"v1": "1x1", "v1.5": "3x3"}[kind]), 32, opset=17, batch=None)
    torch.manual_seed(0)
    return trace(resnet(18, "v1.5", 10).eval(), 32, opset=17, batch=None)


def network(nodes: list[Any], weights: dict[str, np.ndarray], channels: int = 3) -> Any:
    """A model in normal form, of these nodes."""
    constants = [numpy_helper.from_array(np.asarray(w, np.float32), name) for name, w in weights.items()]
    return graph.assemble(nodes, constants, "net", (channels, 8, 8), 4, 17, None)


def node(op: str, inputs: str, out: str, **attributes: Any) -> Any:
    return helper.make_node(op, inputs.split(), [out], name=out, **attributes)


def chain(*middle: Any, spread: float = 1.0, **extra: np.ndarray) -> Any:
    """conv `a` (3 -> 8 channels, the later the smaller, 1 to 1/``spread``), ``middle`` from a to z, pool, fc."""
    rng = np.random.default_rng(1)
    factors = np.geomspace(1, 1 / spread, 8)
    weights = {
        "wa": rng.standard_normal((8, 3, 3, 3)) * factors[:, None, None, None],
        "ba": rng.standard_normal(8) * factors,
        "wf": rng.standard_normal((4, 8)) / factors,
    }
    nodes = [
        node("Conv", "input wa ba", "a", pads=[1] * 4),
        *(middle or (node("Relu", "a", "z"),)),
        node("GlobalAveragePool", "z", "pool"),
        node("Flatten", "pool", "flat"),
        node("Gemm", "flat wf", "logits", transB=1),
    ]
    return network(nodes, weights | extra)


def small_batches() -> list[Batch]:
    return batches(pixels=np.ascontiguousarray(PIXELS[:, :, :8, :8]))


def int8_db(model: Any, exponents: dict[str, list[int]], pixels: np.ndarray) -> float:
    made_from = {"model": graph.digest(model)}
    table = calibrate(equalize.equalize(model, exponents), batches(pixels=pixels), made_from)
    table.exponents = exponents
    return Held(model, batches(pixels=pixels)).fidelity(int8(model, table, SCHEMES["onnxruntime"], "minmax")).sqnr_db


@pytest.mark.parametrize("kind", ["v1", "v1.5", "resnet18"])
def test_the_model_computes_the_same(kind: str) -> None:
    model = small(kind)
    exponents = measure(model, batches())
    assert any(len(set(powers)) > 1 for powers in exponents.values())
    before = model.SerializeToString()
    even = equalize.equalize(model, exponents)
    assert model.SerializeToString() == before
    assert graph.digest(even) != graph.digest(model)
    assert Held(model, batches()).fidelity(even).sqnr_db > 120


def test_a_stage_of_residual_blocks_is_one_group() -> None:
    channels = Channels(small("v1.5"))
    stream = {channels.of(t) for t in ("layer1.0.conv3", "layer1.0.downsample.0", "layer1.0.relu3", "layer1.1.relu3")}
    assert len(stream) == 1
    assert stream != {channels.of("layer2.0.relu3")}
    assert channels.of("layer1.0.relu1") != channels.of("layer1.0.relu2")
    # stem, two stages, and two inside each of four bottlenecks
    assert len(channels.free) == 1 + 2 + 2 * 4


def test_input_and_logits_stay_as_they_are() -> None:
    channels = Channels(small("v1.5"))
    assert not {channels.of(t) for t in (graph.INPUT, graph.OUTPUT)} & {*channels.free}


@pytest.mark.parametrize(
    "middle",
    [
        [node("Sigmoid", "a", "z")],
        [node("Relu", "a", "r"), node("Conv", "r wg", "z", group=8)],
        [node("Mul", "a two", "z")],
        [node("Add", "a two", "z")],  # a constant does not scale with its channel
    ],
    ids=["sigmoid", "depthwise", "mul", "constant add"],
)
def test_what_an_operator_touches_that_is_not_scaled_per_channel_stays(middle: list[Any]) -> None:
    model = chain(*middle, spread=30, wg=np.ones((8, 1, 1, 1)), two=np.full((1, 1, 1, 1), 2.0))
    channels = Channels(model)
    assert channels.of("a") not in channels.free
    assert channels.of("z") not in channels.free
    assert measure(model, small_batches()) == {}


@pytest.mark.parametrize("behind", [[], [node("Relu", "flat", "features")]], ids=["gemm", "relu"])
def test_maps_of_several_pixels_that_are_flattened_stay(behind: list[Any]) -> None:
    rng = np.random.default_rng(2)
    weights = {"wa": rng.standard_normal((8, 3, 3, 3)), "wb": rng.standard_normal((6, 8, 3, 3))}
    nodes = [
        node("Conv", "input wa", "a", strides=[2, 2]),
        node("Relu", "a", "r"),
        node("Conv", "r wb", "b"),
        node("Flatten", "b", "flat"),
        *behind,
        node("Gemm", f"{'features' if behind else 'flat'} wf", "logits", transB=1),
    ]
    model = network(nodes, weights | {"wf": rng.standard_normal((4, 6))})  # one pixel is left
    assert {*measure(model, small_batches())} == {"a", "b"}
    nodes[2].attribute.append(helper.make_attribute("pads", [1, 1, 1, 1]))
    model = network(nodes, weights | {"wf": rng.standard_normal((4, 54))})  # nine pixels
    assert {*(exponents := measure(model, small_batches()))} == {"a"}
    assert Held(model, small_batches()).fidelity(equalize.equalize(model, exponents)).sqnr_db > 120


def test_uneven_channels_become_even_and_int8_gains_many_decibels() -> None:
    model = chain(node("Relu", "a", "z"), spread=200)
    exponents = measure(model, small_batches())
    assert [*exponents] == ["a"]
    pixels = np.ascontiguousarray(PIXELS[:, :, :8, :8])
    held = Held(equalize.equalize(model, exponents), small_batches())
    assert held.reference.shape == (12, 4)

    def spread(m: Any) -> float:
        weights = graph.initializers(m)["wa"]
        reach = np.abs(weights).max((1, 2, 3))
        return float(reach.max() / reach.min())

    assert spread(equalize.equalize(model, exponents)) < 2 * spread(model) ** 0.5 < spread(model) / 5
    assert int8_db(model, exponents, pixels) > int8_db(model, {}, pixels) + 8


def test_factors_are_half_way_to_full_use_and_centered() -> None:
    """A channel 16 times smaller is made 4 times larger against the largest."""
    weights = {"wa": np.ones((2, 1, 1, 1)) * np.array([16.0, 1.0]).reshape(2, 1, 1, 1), "wf": np.ones((4, 2))}
    nodes = [
        node("Conv", "input wa", "a"),
        node("GlobalAveragePool", "a", "pool"),
        node("Flatten", "pool", "flat"),
        node("Gemm", "flat wf", "logits", transB=1),
    ]
    model = network(nodes, weights, channels=1)
    exponents = measure(model, batches(pixels=np.ones((2, 1, 8, 8), np.float32)))
    assert exponents == {"a": [-equalize.PER_OCTAVE, equalize.PER_OCTAVE]}
    even = graph.initializers(equalize.equalize(model, exponents))
    np.testing.assert_array_equal(even["wa"].ravel(), [8, 2])
    np.testing.assert_array_equal(even["wf"], [[2, 0.5]] * 4)


def test_a_dead_channel_asks_for_a_bounded_factor() -> None:
    dead = chain(node("Relu", "a", "z"))
    for tensor in dead.graph.initializer:
        if tensor.name in ("wa", "ba"):
            array = numpy_helper.to_array(tensor).copy()
            array[3] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    exponents = measure(dead, small_batches())
    # the span's square root at most, whatever the reach
    assert max(exponents["a"]) - min(exponents["a"]) == equalize.PER_OCTAVE * np.log2(equalize.SPAN) / 2
    even = equalize.equalize(dead, exponents)
    assert Held(dead, small_batches()).fidelity(even).sqnr_db > 120


def test_a_group_that_is_zero_everywhere_is_left_alone() -> None:
    model = chain(node("Relu", "a", "z"))
    for tensor in model.graph.initializer:
        if tensor.name == "wa":
            tensor.CopyFrom(numpy_helper.from_array(np.zeros((8, 3, 3, 3), np.float32), "wa"))
        elif tensor.name == "ba":
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(8, np.float32), "ba"))
    assert measure(model, small_batches()) == {}


def test_exponents_are_plain_numbers_the_same_whatever_the_batch_size() -> None:
    model = small("v1.5")
    exponents = measure(model, batches(12))
    assert exponents == measure(model, batches(5)) == measure(model, batches(1))
    assert json.loads(json.dumps(exponents)) == exponents
    assert all(type(p) is int for powers in exponents.values() for p in powers)


def test_one_odd_image_does_not_decide() -> None:
    model = chain(node("Relu", "a", "z"), spread=10)
    rng = np.random.default_rng(3)
    pixels = rng.standard_normal((200, 3, 8, 8), dtype=np.float32)
    odd = pixels.copy()
    odd[7, 0] *= 1000
    difference = np.subtract(measure(model, batches(pixels=odd))["a"], measure(model, batches(pixels=pixels))["a"])
    assert np.abs(difference).max() <= 1


def test_a_table_keeps_the_exponents(tmp_path: Path) -> None:
    exponents = {"a": [1, -1, 0], "b": [2]}
    table = RangeTable({"model": "m"}, 3, [], exponents, {"x": TensorRange()})
    table.tensors["x"].update(np.ones(3, np.float32))
    table.save(tmp_path / "t.json")
    assert RangeTable.load(tmp_path / "t.json").exponents == exponents


@pytest.mark.parametrize(
    "exponents",
    [{"a": [1]}, {"a": [0] * 9}, {"nowhere": [0] * 8}, {"z": [0] * 8}, {"a": ["1"] * 8}, {"a": None}, {"a": [0.5] * 8}],
    ids=["short", "long", "unknown group", "not a group's name", "words", "nothing", "fractions"],
)
def test_exponents_that_do_not_fit_the_model_are_refused(exponents: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="range table's channel factors do not fit the model") as caught:
        equalize.equalize(chain(node("Relu", "a", "z")), exponents)
    assert repr(next(iter(exponents))) in caught.value.evidence
    assert "calibrate" in caught.value.hint


def test_an_int8_model_knows_the_factors_of_its_table() -> None:
    """The quantized graph holds the scaled weights: with a table of other factors it is another graph."""
    model = chain(node("Relu", "a", "z"))
    exponents = {"a": [4, -4, *[0] * 6]}
    table = calibrate(equalize.equalize(model, exponents), small_batches(), {"model": graph.digest(model)})
    scales = [
        graph.initializers(int8(model, replace(table, exponents=e), SCHEMES["onnxruntime"], "minmax"))["wa.scale"]
        for e in ({}, exponents)
    ]
    np.testing.assert_allclose(scales[1] / scales[0], [2, 0.5, *[1] * 6], rtol=1e-6)


def test_activations_are_in_reach_also_where_convolutions_have_no_layout_of_x86(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on Arm. ONNX Runtime tells of a session that failed on stdout, and tries again otherwise."""
    real = onnxruntime.InferenceSession

    def as_on_arm(*arguments: Any, disabled_optimizers: tuple[str, ...] = (), **more: Any) -> Any:
        return real(*arguments, disabled_optimizers=[*disabled_optimizers, "NchwcTransformer"], **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", as_on_arm)
    assert measure(tiny, batches())
    assert "EP Error" not in capsys.readouterr().out
