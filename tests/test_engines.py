"""From an FP32 model to a TensorRT engine folder, with each version of the library as far as its bindings tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner
from fake_tensorrt import VERSIONS, fake

from edgeres import build, calibration_cache, devices, graph, trt
from edgeres.build import Engine
from edgeres.cli import cli
from edgeres.devices import Gpu, Jetson
from edgeres.errors import BuildError, MissingDependency
from edgeres.runners.tensorrt import TensorRt

HALF = onnx.TensorProto.FLOAT16
ORIN = Gpu("Orin", "8.7", 8 << 30, True)
Install = Callable[..., Any]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """A machine with a given TensorRT and an Orin, where plans cannot be looked into."""

    def refuse(*_: Any, **__: Any) -> None:
        raise BuildError("no inspector here")

    def machine(version: str, **script: Any) -> Any:
        library = fake(version)
        library.script |= script
        monkeypatch.setattr(trt, "load_library", lambda _: library)
        monkeypatch.setattr(TensorRt, "version", lambda _: version)
        monkeypatch.setattr(TensorRt, "examine", refuse)
        monkeypatch.setattr(devices, "gpus", lambda: [ORIN])
        return library

    return machine


def run(model: Path, *arguments: str, code: int = 0, command: str = "build-engine") -> Any:
    result = CliRunner().invoke(cli, [command, "--model", str(model), "--method", "minmax", *arguments])
    assert result.exit_code == code, result.output
    return result


def types(path: Path) -> set[int]:
    return {t.data_type for t in graph.load(path).graph.initializer}


@pytest.mark.parametrize("version", [v for v in VERSIONS if "rtx" not in v])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_graph_fits_the_tensorrt_that_is_here(
    workspace: Path, tiny_path: Path, install: Install, version: str, precision: str
) -> None:
    library = install(version)
    run(tiny_path, "--target", "jetson-agx-orin", "--precision", precision)
    folder = workspace / "engines" / "out" / f"tiny-{precision}-jetson-agx-orin"
    old = version.startswith("8.")
    assert (HALF in types(folder / "model.onnx")) == (precision != "fp32" and not old)
    flags = {"fp32": set(), "fp16": {"FP16"}, "int8": {"FP16", "INT8"}}[precision]
    assert library.flags() & {"FP16", "INT8"} == (flags if old else set())
    opset = next(o.version for o in graph.load(folder / "model.onnx").opset_import)
    assert opset == (19 if precision == "int8" and not old else 17)
    record = Engine.load(folder).record
    assert record["built_with"]["tensorrt"] == version
    assert record["built_with"]["gpu"] == {"name": "Orin", "capability": "8.7", "memory_bytes": 8 << 30} | {
        "integrated": True
    }
    assert ("table" in record["made_from"]) == (precision == "int8")
    assert record["warnings"] == []


def test_what_is_there_is_built_again_only_for_a_reason(
    workspace: Path, tiny_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("10.3.0")
    asked = ["--target", "desktop", "--precision", "fp32"]
    assert "is up to date" not in run(tiny_path, *asked).stderr.splitlines()[-2]
    done = "tiny-fp32-desktop is up to date"
    assert done in run(tiny_path, *asked).stderr
    assert done not in run(tiny_path, *asked, "--build", "tf32=true").stderr
    assert done in run(tiny_path, *asked, "--build", "tf32=true").stderr
    install("10.13.3.9")
    assert done not in run(tiny_path, *asked, "--build", "tf32=true").stderr
    monkeypatch.setattr(devices, "gpus", lambda: [Gpu("RTX", "8.9", 8 << 30, False)])
    assert done not in run(tiny_path, *asked, "--build", "tf32=true").stderr


def test_dla_takes_a_cache_and_one_batch_size(workspace: Path, tiny_path: Path, install: Install) -> None:
    library = install("10.3.0", **{"Builder.num_DLA_cores": 2})
    run(tiny_path, "--target", "jetson-agx-orin-dla")
    folder = workspace / "engines" / "out" / "tiny-int8-jetson-agx-orin-dla"
    assert {"Gemm", "Flatten", "GlobalAveragePool", "QuantizeLinear"} & set(
        graph.count_ops(graph.load(folder / "model.onnx"))
    ) == set()
    calibrator = library.set_to("IBuilderConfig.int8_calibrator")
    header, scales = calibration_cache.read(bytes(calibrator.read_calibration_cache()).decode())
    assert header == "TRT-100300-EntropyCalibration2"
    assert scales == calibration_cache.read((folder / "model.cache").read_text())[1]
    assert {"FP16", "INT8", "GPU_FALLBACK"} <= library.flags()
    record = Engine.load(folder).record
    assert (record["options"]["dla_core"], record["dla"]) == (0, True)


def test_dla_from_11_on_takes_types(workspace: Path, tiny_path: Path, install: Install) -> None:
    library = install("11.4.0.106", **{"Builder.num_DLA_cores": 1})
    run(tiny_path, "--target", "jetson-agx-orin-dla")
    folder = workspace / "engines" / "out" / "tiny-int8-jetson-agx-orin-dla"
    operators = graph.count_ops(graph.load(folder / "model.onnx"))
    assert "QuantizeLinear" in operators
    assert "Gemm" not in operators
    assert not (folder / "model.cache").exists()
    assert "GPU_FALLBACK" in library.flags()


def test_a_jetsons_engine_is_built_on_the_jetson(
    workspace: Path, tiny_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("10.3.0")
    monkeypatch.setattr(devices, "gpus", lambda: [Gpu("RTX 4090", "8.9", 24 << 30, False)])
    result = run(tiny_path, "--target", "jetson-agx-orin", code=1)
    assert "jetson-agx-orin is for compute capability 8.7" in result.stderr
    assert "RTX 4090 here has 8.9" in result.stderr
    for command in ("bundle", "quantize"):
        assert f"`edgeres {command} --target jetson-agx-orin --precision int8`" in result.stderr

    def missing(_: Any) -> str:
        raise MissingDependency("this needs the package 'tensorrt'", hint='pip install "edgeres[tensorrt]"')

    monkeypatch.setattr(TensorRt, "version", missing)
    result = run(tiny_path, "--target", "jetson-agx-orin", code=1)
    assert "this command belongs on the device" in result.stderr
    assert "pip install" not in result.stderr
    assert "pip install" in run(tiny_path, "--target", "desktop", code=1).stderr
    monkeypatch.setattr(devices, "gpus", list)
    result = run(tiny_path, "--target", "desktop", "--precision", "fp16", code=1)  # gigabytes that would not start
    assert "pip install" not in result.stderr
    assert "`edgeres bundle --target desktop --precision fp16`" in result.stderr
    result = run(tiny_path, "--target", "jetson-xavier-nx", code=1)  # its Python is too old for a self-test
    assert "bundle" not in result.stderr
    assert "`edgeres quantize --target jetson-xavier-nx --precision int8`" in result.stderr
    assert not list(workspace.rglob("*.onnx"))


def test_dla_where_there_is_none_is_refused(workspace: Path, tiny_path: Path, install: Install) -> None:
    install("10.13.3.9", **{"Builder.num_DLA_cores": 0})
    result = run(tiny_path, "--target", "jetson-orin-nx-dla", code=2)
    assert "has no DLA core 0 here" in result.stderr
    assert "Orin Nano and Thor have no DLA" in result.stderr
    assert not list(workspace.rglob("engine.*"))


def test_tensorrt_may_calibrate_by_itself(workspace: Path, tiny_path: Path, install: Install) -> None:
    install("10.3.0")
    command = ["--target", "desktop-implicit", "--method", "tensorrt-entropy"]
    result = run(tiny_path, *command, code=1)  # up to where the images go to the GPU, which is not here
    assert "pycuda" in result.stderr.lower() or "CUDA" in result.stderr
    made = graph.metadata(graph.load(workspace / "engines" / "out" / "tiny-int8-desktop-implicit" / "model.onnx"))
    assert made["quantization"]["method"] == "tensorrt-entropy"
    assert "table" not in made["quantization"]
    assert made["quantization"]["images"] == 32
    run(tiny_path, *command, "--limit", "8", code=1)
    less = graph.metadata(graph.load(workspace / "engines" / "out" / "tiny-int8-desktop-implicit" / "model.onnx"))
    assert less["quantization"]["images"] == 8
    assert less["quantization"]["images_digest"] != made["quantization"]["images_digest"]
    assert not list(workspace.rglob("*.cache"))


def test_trtexec_is_given_what_a_build_is(workspace: Path, tiny_path: Path) -> None:
    asked = ["--target", "jetson-agx-orin", "--build", "level=5", "--build", "profile=2,2,2"]
    result = run(tiny_path, *asked, command="quantize")
    assert "--builderOptimizationLevel=5" in result.stderr
    assert "--maxShapes=input:2x3" in result.stderr
    assert "alone" not in result.stderr


def test_trtexec_is_not_left_to_calibrate_on_noise(workspace: Path, tiny_path: Path) -> None:
    asked = ["--target", "desktop-implicit", "--tensorrt", "10.3.0"]
    result = run(tiny_path, *asked, command="quantize")
    assert "--calib=model.cache" in result.stderr
    assert "with TensorRT 10.3.0 alone: another skips the cache" in result.stderr
    assert "trtexec" not in run(tiny_path, *asked, "--method", "tensorrt-entropy", command="quantize").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "desktop", "--method", "tensorrt-minmax"], "is for implicit INT8"),
        (["--target", "desktop-implicit", "--io", "fp16"], "--io fp32 only"),
        (["--target", "desktop-implicit", "--weight-scales", "mse"], "takes no --weight-scales"),
        (["--target", "desktop", "--build", "workspac=1"], "did you mean 'workspace'?"),
        (["--target", "desktop", "--build", "workspace"], "is no KEY=VALUE"),
        (["--target", "desktop", "--build", "profile=1,2,x"], "'profile' must be int"),
        (["--target", "desktop", "--build", "profile=8,2,1"], "are not smallest, usual and largest"),
        (["--target", "desktop", "--build", "tf32=1"], "'tf32' must be bool"),
        (["--target", "desktop", "--tensorrt", "ten"], "is no TensorRT version"),
        (["--target", "rtx", "--tensorrt", "10.3.0"], "no TensorRT version to choose"),
    ],
)
def test_what_does_not_go_together_is_refused_at_once(
    workspace: Path, tiny_path: Path, install: Install, arguments: list[str], message: str
) -> None:
    install("10.3.0")
    assert message in run(tiny_path, *arguments, code=2).stderr
    assert not (workspace / "engines").exists()


def test_a_table_is_nothing_for_tensorrts_own_calibrators(workspace: Path, tiny_path: Path, install: Install) -> None:
    install("10.3.0")
    command = ["--target", "desktop-implicit", "--method", "tensorrt-entropy", "--calibration", "table.json"]
    assert "takes images, and a range table is given" in run(tiny_path, *command, code=2).stderr


def test_options_come_from_workspace_and_flags(workspace: Path, tiny_path: Path, install: Install) -> None:
    install("10.3.0")
    with open(workspace / "edgeres.toml", "a") as file:
        file.write("[build]\nworkspace = 256\nlevel = 2\nprofile = [1, 2, 4]\n")
    result = run(
        tiny_path,
        *(
            "--target",
            "desktop",
            "--precision",
            "fp32",
            "--build",
            "level=4",
            "--build",
            "hardware=ampere-plus",
            "--json",
        ),
    )
    options = json.loads(result.stdout)["options"]
    assert (options["workspace"], options["level"], options["profile"]) == (256.0, 4, [1, 2, 4])
    assert options["hardware"] == "ampere-plus"


@pytest.mark.parametrize(("asked", "given"), [(None, 768.0), (512.0, 512.0), (4096.0, 768.0)])
def test_a_jetson_has_no_more_workspace_than_memory(
    monkeypatch: pytest.MonkeyPatch, asked: float | None, given: float
) -> None:
    monkeypatch.setattr(devices, "jetson", lambda: Jetson("NVIDIA Jetson Orin Nano", "36.4.3", "6.2"))
    monkeypatch.setattr(devices, "free_memory", lambda: 1 << 30)
    assert build._within_memory(trt.Options(workspace=asked)).workspace == given
    monkeypatch.setattr(devices, "jetson", lambda: None)
    assert build._within_memory(trt.Options(workspace=asked)).workspace == asked
