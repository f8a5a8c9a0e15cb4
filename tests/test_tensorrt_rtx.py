"""TensorRT's own parser and builder as judge of the graphs, on any machine: TensorRT-RTX builds without a GPU."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import batch, measure

from edgeres import graph
from edgeres.calibrate import RangeTable
from edgeres.export import trace
from edgeres.fp16 import fp16
from edgeres.interface import interface
from edgeres.model import resnet50
from edgeres.quantize import SCHEMES, int8
from edgeres.recipe import Preprocess

WHEEL = sys.platform in ("linux", "win32") and platform.machine() in ("x86_64", "AMD64")
if not WHEEL:
    pytest.skip(f"no tensorrt-rtx wheel for {sys.platform} {platform.machine()}", allow_module_level=True)

import tensorrt_rtx as trt  # noqa: E402

SIZE = 64
MIXED = SCHEMES["tensorrt"]
SINGLE = replace(MIXED, rest="fp32")


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps errors, but for a word about the GPU that is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.ERROR and "Thread context" not in message:
            self.lines.append(message)


LOG = Log()
"""One for all: TensorRT keeps the first it is given."""


@dataclass(frozen=True)
class Built:
    """Element types of input and output, and the size of the plan in MB."""

    ends: tuple[Any, Any]
    megabytes: float


def parse(model: Any) -> tuple[Any, Any, list[str]]:
    """Builder, network (both must live), and what the parser has against ``model``."""
    builder = trt.Builder(LOG)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, LOG)
    parser.parse(model.SerializeToString())
    return builder, network, [parser.get_error(i).desc() for i in range(parser.num_errors)]


def build(model: Any) -> Built:
    """A plan for batches of 1 to 4."""
    LOG.lines.clear()
    builder, network, errors = parse(model)
    assert errors == []
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape(graph.INPUT, *((n, 3, SIZE, SIZE) for n in (1, 2, 4)))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, LOG.lines
    assert LOG.lines == []
    return Built((network.get_input(0).dtype, network.get_output(0).dtype), plan.nbytes / 1e6)


@pytest.fixture(scope="module", params=["v1", "v1.5"])
def measured(request: pytest.FixtureRequest) -> tuple[Any, RangeTable]:
    torch.manual_seed(0)
    model = trace(resnet50(request.param, classes=10).eval(), SIZE, opset=17, batch=None)
    return model, measure(model, batch(2, SIZE))


@pytest.fixture(scope="module")
def models(measured: tuple[Any, RangeTable]) -> dict[str, Any]:
    model, table = measured
    mixed = fp16(int8(model, table, MIXED, "minmax"))
    return {"fp32": model, "fp16": fp16(model), "int8": int8(model, table, SINGLE, "minmax"), "int8 and fp16": mixed}


def test_every_precision_builds_and_the_plan_is_as_large_as_its_weights(models: dict[str, Any]) -> None:
    built = {name: build(model) for name, model in models.items()}
    assert {b.ends for b in built.values()} == {(trt.float32, trt.float32)}
    size = {name: b.megabytes for name, b in built.items()}
    million = 23.5  # weights without the 1000-class layer: 4 bytes each, 2, or 1
    assert size["fp32"] == pytest.approx(4 * million, rel=0.05)
    assert size["fp16"] == pytest.approx(2 * million, rel=0.05)
    assert size["int8 and fp16"] < 0.75 * size["fp16"]
    assert size["int8"] < 0.75 * size["fp16"]


@pytest.mark.parametrize("measured", ["v1.5"], indirect=True)
@pytest.mark.parametrize(
    ("io", "ends"),
    [("fp16", (trt.float16, trt.float16)), ("uint8", (trt.uint8, trt.float32))],
)
def test_every_interface_builds(models: dict[str, Any], io: str, ends: tuple[Any, Any]) -> None:
    assert build(interface(models["int8 and fp16"], io, Preprocess(crop=SIZE))).ends == ends


@pytest.mark.parametrize("measured", ["v1.5"], indirect=True)
def test_the_graph_for_onnxruntime_is_refused_for_its_zero_points(measured: tuple[Any, RangeTable]) -> None:
    *_, errors = parse(int8(*measured, SCHEMES["onnxruntime"], "minmax"))
    assert "zero point is not supported" in " ".join(errors)


@pytest.mark.parametrize("measured", ["v1.5"], indirect=True)
def test_int32_biases_are_refused(measured: tuple[Any, RangeTable]) -> None:
    *_, errors = parse(int8(*measured, replace(SINGLE, int32_bias=True), "minmax"))
    assert "bias.dq: input has type Int32" in " ".join(errors)


@pytest.mark.parametrize("measured", ["v1.5"], indirect=True)
def test_a_graph_with_layers_in_fp32_and_fp16_builds(measured: tuple[Any, RangeTable]) -> None:
    model, table = measured
    mixed = fp16(int8(model, table, MIXED, "minmax", ["layer2.1.conv2"]), {"layer3.0.relu1": 1e5})
    assert graph.metadata(mixed)["kept_fp32"] == ["layer3.0.relu1", "layer3.0.conv2"]
    build(mixed)
