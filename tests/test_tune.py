from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper
from rich.console import Console

from edgeres import graph, progress, quantize, tune
from edgeres.calibrate import RangeTable, calibrate
from edgeres.errors import BuildError
from edgeres.loader import Batch
from edgeres.quantize import SCHEMES, int8
from edgeres.recipe import AUTO, METHODS
from edgeres.tune import Choice, Held, choose, tensor_fidelity, worst_layers

EVERY = pytest.mark.parametrize("scheme", ["onnxruntime", "openvino", "tensorrt", "implicit"])


def batches(seed: int, images: int = 40) -> list[Batch]:
    pixels = np.random.default_rng(seed).standard_normal((images, 3, 32, 32), dtype=np.float32)
    return [Batch(pixels, None, np.arange(images))]


@pytest.fixture(scope="module")
def table(tiny: Any) -> RangeTable:
    return calibrate(tiny, batches(0), {"model": graph.digest(tiny)})


@pytest.fixture(scope="module")
def held(tiny: Any) -> Held:
    return Held(tiny, batches(1))


def ruined(table: RangeTable, tensor: str) -> RangeTable:
    """``table``, as if ``tensor`` reached a hundred thousand times as far."""
    out = copy.deepcopy(table)
    r = out.tensors[tensor]
    r.min, r.max, r.limit = r.min * 1e5, r.max * 1e5, r.limit * 1e5
    return out


def told(*arguments: Any) -> tuple[Choice, list[str]]:
    console = Console(file=io.StringIO(), width=300)
    with progress.to(console):
        choice = choose(*arguments)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return choice, [line for line in lines if not line.startswith("measure fidelity")]


@EVERY
def test_a_method_that_works_is_taken_as_it_is(tiny: Any, table: RangeTable, held: Held, scheme: str) -> None:
    choice, lines = told(tiny, table, SCHEMES[scheme], "minmax", held)
    assert (choice.method, choice.kept, [*choice.tried], lines) == ("minmax", [], ["minmax"], [])
    assert choice.tried["minmax"] == held.fidelity(choice.model)
    assert choice.tried["minmax"].sqnr_db > 20
    assert choice.tried["minmax"].images == 40


def test_auto_takes_the_most_faithful_of_all(tiny: Any, table: RangeTable, held: Held) -> None:
    choice, lines = told(tiny, table, SCHEMES["onnxruntime"], AUTO, held)
    assert set(choice.tried) == set(METHODS)
    decibels = [f.sqnr_db for f in choice.tried.values()]
    assert decibels == sorted(decibels, reverse=True)
    assert choice.method == next(iter(choice.tried))
    assert held.fidelity(choice.model).sqnr_db == max(decibels)
    assert lines == [f"{choice.method} is the most faithful: {choice.tried[choice.method]}"]


def test_without_images_nothing_is_measured(tiny: Any, table: RangeTable) -> None:
    choice, lines = told(tiny, table, SCHEMES["onnxruntime"], "mse", None)
    assert (choice.method, choice.kept, choice.tried, lines) == ("mse", [], {}, [])


def test_a_method_that_collapses_gives_way_to_the_others(
    tiny: Any, table: RangeTable, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(quantize.METHODS, "mse", lambda r, steps: (r.min * 1e5, r.max * 1e5))
    choice, lines = told(tiny, table, SCHEMES["onnxruntime"], "mse", held)
    assert choice.method != "mse"
    assert list(choice.tried)[-1] == "mse"
    assert set(choice.tried) == set(METHODS)
    assert not held.fidelity(choice.model).collapsed
    assert choice.tried["mse"].agreement == 100  # these images all are of one class to the tiny model: decibels decide
    assert lines[0].startswith("mse collapses (")
    assert lines[0].endswith("): try the other methods")
    assert lines[1:] == [f"{choice.method} is the most faithful: {choice.tried[choice.method]}"]


@EVERY
def test_where_every_method_collapses_the_guilty_layers_stay_in_floating_point(
    tiny: Any, table: RangeTable, held: Held, scheme: str
) -> None:
    """A tensor's range is ruined: the layers that read it are guilty, and no pair may be left on it."""
    choice, lines = told(tiny, ruined(table, "layer1.1.relu3"), SCHEMES[scheme], "mse", held)
    assert {"layer2.0.conv1", "layer2.0.downsample.0"} <= {*choice.kept}
    assert len(choice.kept) <= 3
    assert held.fidelity(choice.model) == choice.tried[choice.method]
    assert not choice.tried[choice.method].collapsed
    assert next(iter(choice.tried)) == choice.method
    assert set(choice.tried) == set(METHODS)
    assert "layer1.1.relu3" not in {n.input[0] for n in choice.model.graph.node if n.op_type == "QuantizeLinear"}
    rest = SCHEMES[scheme].rest.upper()
    assert lines[0].startswith("mse collapses")
    assert lines[1].startswith("every method collapses, ")
    assert lines[1].endswith(f"keep the worst layers in {rest}")
    assert lines[-1] == f"{', '.join(choice.kept)} in {rest}: {choice.tried[choice.method]}"


def test_the_layer_whose_weights_are_ruined_is_the_worst(tiny: Any, table: RangeTable, held: Held) -> None:
    quantized = int8(tiny, table, SCHEMES["onnxruntime"], "minmax")
    broken = [t for t in quantized.graph.initializer if t.name == "layer2.0.conv2.weight.int"]
    for tensor in broken:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[::-1].copy(), tensor.name))
    assert broken
    names = worst_layers(tiny, tensor_fidelity(tiny, quantized, held))
    assert names[0] == "layer2.0.conv2"
    assert sorted(names) == sorted(n.name for n in tiny.graph.node if n.op_type in graph.LAYERS)


def test_where_nothing_helps_it_is_an_error_with_every_attempt(
    tiny: Any, table: RangeTable, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "COLLAPSED", 100.1)
    monkeypatch.setattr(tune, "STEPS", (1, 2))
    with pytest.raises(BuildError, match="INT8 does not hold what FP32 computes") as caught:
        choose(tiny, table, SCHEMES["onnxruntime"], "mse", held)
    assert all(f"{m}: " in caught.value.evidence for m in METHODS)
    assert "layers in FP32" in caught.value.evidence
    assert "--precision fp16" in caught.value.hint


def test_logits_that_are_not_finite_agree_with_nothing(tiny: Any, held: Held) -> None:
    broken = copy.deepcopy(tiny)
    for tensor in broken.graph.initializer:
        if tensor.name == "fc.bias":
            bias = numpy_helper.to_array(tensor).copy()
            bias[:] = np.nan
            tensor.CopyFrom(numpy_helper.from_array(bias, tensor.name))
    found = held.fidelity(broken)
    assert (found.agreement, found.sqnr_db) == (0, -np.inf)
    assert held.fidelity(tiny).agreement == 100
