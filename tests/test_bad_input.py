"""Input that is odd, broken or too little, from one end to the other: a right result, or an error that says which."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import CLASSES, batch, measure
from onnx import helper, numpy_helper
from test_quantize import logits, quantizers

from edgeres import graph, pipeline, ranges
from edgeres.build import Engine
from edgeres.cli import cli
from edgeres.errors import InputError
from edgeres.fidelity import decibels, squares
from edgeres.fp16 import fp16
from edgeres.job import Job
from edgeres.layouts import open_images
from edgeres.lint import lint
from edgeres.loader import Loader
from edgeres.model import resnet
from edgeres.quantize import SCHEMES, int8
from edgeres.recipe import load_recipe
from edgeres.runners import open_runner
from edgeres.tune import Held

EVERY = pytest.mark.parametrize("name", SCHEMES)


@pytest.fixture
def model(tiny_path: Path) -> Any:
    return graph.load(tiny_path)


def change(model: Any, name: str, value: Any) -> None:
    """Let constant ``name`` be what ``value`` makes of it."""
    tensor = next(t for t in model.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor).copy()
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(value(array), array.dtype), name))


def spoiled(array: np.ndarray, value: float) -> np.ndarray:
    """``array`` with ``value`` at its first place."""
    array.flat[0] = value
    return array


def job(workspace: Path, model: Any, **sections: dict[str, Any]) -> Job:
    """A job on ``model``, saved beside the workspace."""
    path = workspace / "odd.onnx"
    graph.save(model, path)
    return Job(load_recipe(workspace, flags=sections), workspace, path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["layer1.1.conv2.weight", "layer1.1.conv2.bias"])
@pytest.mark.parametrize("equalize", [True, False])
def test_weights_that_are_not_finite_make_no_model(
    workspace: Path, model: Any, name: str, value: float, equalize: bool
) -> None:
    change(model, name, lambda a: spoiled(a, value))
    work = job(workspace, model, calibration={"equalize": equalize})
    with pytest.raises(InputError, match="NaN or infinity") as caught:
        pipeline.quantize_model(work)
    assert "layer1.1" in caught.value.cause + caught.value.evidence
    assert not work.folder.exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_said_to_be_those_of_the_fp32_model(
    workspace: Path, model: Any, value: float
) -> None:
    change(model, "fc.bias", lambda a: spoiled(a, value))
    work = job(workspace, model)
    with pytest.raises(InputError, match="the FP32 model computes NaN or infinity"):
        pipeline.quantize_model(work)
    assert not work.folder.exists()


def test_activations_that_overflow_are_named_and_nothing_is_left(workspace: Path, model: Any) -> None:
    change(model, "layer2.0.conv1.weight", lambda a: np.sign(a) * 3e38)
    work = job(workspace, model)
    with pytest.raises(InputError, match=r"tensor layer2\.0\..* holds NaN or infinity") as caught:
        pipeline.quantize_model(work)
    assert "of the calibration set" in caught.value.evidence
    assert not work.folder.exists()
    assert not work.table.exists()


@EVERY
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_constant_that_is_not_finite_is_named_where_no_range_shows_it(name: str, model: Any, value: float) -> None:
    table = measure(model, batch(2))
    change(model, "fc.weight", lambda a: spoiled(a, value))
    table.made_from["model"] = graph.digest(model)
    with pytest.raises(InputError, match="cannot quantize Gemm fc") as caught:
        int8(model, table, SCHEMES[name], "minmax")
    assert caught.value.evidence == "fc.weight holds NaN or infinity"


@EVERY
@pytest.mark.parametrize("rule", ["absmax", "mse"])
def test_dead_channels_and_a_tensor_that_is_always_zero(name: str, rule: str, model: Any) -> None:
    def dead(array: np.ndarray) -> np.ndarray:
        array[:3] = 0
        return array

    for constant in ("layer1.0.conv2.weight", "layer1.0.conv2.bias"):
        change(model, constant, dead)
    for constant in ("layer2.1.conv1.weight", "layer2.1.conv1.bias"):
        change(model, constant, np.zeros_like)
    scheme = replace(SCHEMES[name], weights=rule)
    table = measure(model, batch(16))
    assert table.tensors["layer2.1.relu1"].max == 0
    quantized = int8(model, table, scheme, "mse")
    assert lint(quantized, scheme) == []
    scales = quantizers(quantized)
    assert scales["layer2.1.relu1"][0] == 1
    constants = graph.initializers(quantized)
    assert (constants["layer1.0.conv2.weight.scale"][:3] == 1).all()
    assert (constants["layer1.0.conv2.weight.scale"][3:] < 0.1).all()
    pixels = batch(16).pixels
    for typed in (quantized, fp16(quantized) if scheme.signed else quantized):
        result = logits(typed, pixels, optimize=False)
        assert decibels(*squares(logits(model, pixels), result)) > 20


def weight_only(model: Any) -> None:
    """Store one weight as int8, dequantized by a node, as tools for weights alone do."""
    name = "layer1.0.conv2.weight"
    tensor = next(t for t in model.graph.initializer if t.name == name)
    weight = numpy_helper.to_array(tensor)
    scale = np.float32(np.abs(weight).max() / 127)
    tensor.CopyFrom(numpy_helper.from_array(np.rint(weight / scale).astype(np.int8), name))
    model.graph.initializer.append(numpy_helper.from_array(scale, "s"))
    node = next(n for n in model.graph.node if name in n.input)
    node.input[1] = "restored"
    dequantize = helper.make_node("DequantizeLinear", [name, "s"], ["restored"], name="restored")
    graph.set_nodes(model, [dequantize, *model.graph.node])


@pytest.mark.parametrize("origin", ["foreign", "quantized"])
def test_only_an_fp32_model_of_ours_is_calibrated(workspace: Path, model: Any, origin: str) -> None:
    work = job(workspace, model)
    if origin == "quantized":
        work = replace(work, model=pipeline.quantize_model(work))
        work.table.unlink(missing_ok=True)
    else:
        del model.metadata_props[:]
        work = job(workspace, model)
    with pytest.raises(InputError, match="is not an FP32 model made by edgeres"):
        ranges.calibrate_model(work)
    assert not work.table.exists()


def test_weights_that_are_quantized_already_are_refused(model: Any) -> None:
    table = measure(model, batch(2))
    weight_only(model)
    table.made_from["model"] = graph.digest(model)
    with pytest.raises(InputError, match="quantized already") as caught:
        int8(model, table, SCHEMES["onnxruntime"], "minmax")
    assert "restored" in caught.value.evidence


@EVERY
def test_weights_that_are_computed_are_refused(name: str, model: Any) -> None:
    table = measure(model, batch(2))
    weight_only(model)
    model.graph.node[0].CopyFrom(helper.make_node("Cast", ["layer1.0.conv2.weight"], ["restored"], to=1))
    table.made_from["model"] = graph.digest(model)
    with pytest.raises(InputError, match=r"cannot quantize Conv layer1\.0\.conv2") as caught:
        int8(model, table, SCHEMES[name], "minmax")
    assert caught.value.evidence == "its input restored is no constant"


@pytest.mark.parametrize("target", ["cpu", "cpu-openvino", "desktop"])
def test_an_operator_that_nobody_quantizes_stays_in_floating_point(workspace: Path, model: Any, target: str) -> None:
    relu = next(n for n in model.graph.node if n.name == "layer1.1.relu2")
    relu.op_type = "Sigmoid"
    work = job(workspace, model, engine={"target": target})
    typed = graph.load(pipeline.quantize_model(work))
    assert graph.count_ops(typed)["Sigmoid"] == 1
    assert graph.metadata(typed)["chosen"]["held_out"]["sqnr_db"] > 15


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "18.pth"
    torch.save(resnet(18, "v1.5", CLASSES).state_dict(), path)
    return path


def edgeres(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output + result.stderr
    return result


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_a_fixed_batch_of_raw_pixels_from_checkpoint_to_verdict(
    workspace: Path, checkpoint: Path, val_folder: Path, precision: str
) -> None:
    network = ("--depth", 18)
    exported = edgeres("export", *network, "--weights", checkpoint, "--input-size", 32, "--batch", 4)
    fp32 = Path(exported.stdout.strip())
    chosen = (*network, "--precision", precision)
    built = edgeres("build-engine", *chosen, "--io", "uint8")
    engine = Engine.load(Path(built.stdout.strip()))
    assert (engine.record["batch"], engine.record["io"]) == (4, "uint8")

    preprocess = pipeline.preprocess_of(graph.load(fp32))
    images = open_images(val_folder)
    with open_runner(fp32, "onnxruntime") as baseline, engine.open() as runner:
        assert (runner.batch, runner.dtype) == (4, np.uint8)
        for count in (1, 3, 4, 6):  # less than a batch, a batch, more
            (six,) = Loader(images.take(range(count)), preprocess, 32)
            reference, found = baseline.infer(six.pixels), runner.infer(six.pixels)
            assert found.shape == (count, CLASSES)
            assert decibels(*squares(reference, found)) > 15
            if count == 6:
                one_by_one = np.concatenate([runner.infer(six.pixels[i : i + 1]) for i in range(count)])
                np.testing.assert_allclose(found, one_by_one, atol=1e-5)

    judged = json.loads(edgeres("validate", *chosen, "--limit", 6, "--json").stdout)
    assert judged["images"] == 6
    assert judged["sqnr_db"] > 15


def test_fidelity_is_refused_where_fp32_itself_is_not_finite(model: Any) -> None:
    good = batch(4)
    good.pixels[2, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="the FP32 model computes NaN or infinity") as caught:
        Held(model, [good])
    assert "1 of 4" in caught.value.evidence
