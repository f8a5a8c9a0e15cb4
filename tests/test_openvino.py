from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import CLASSES, tiny_resnet

from edgeres import graph, runners
from edgeres.build import RECORD, Engine, build
from edgeres.calibrate import calibrate
from edgeres.cli import cli
from edgeres.errors import BuildError, MissingDependency
from edgeres.export import export_onnx
from edgeres.fidelity import decibels, squares
from edgeres.files import sha256_file
from edgeres.loader import Batch
from edgeres.quantize import int8
from edgeres.recipe import Preprocess
from edgeres.runners import open_runner
from edgeres.runners.openvino import OpenVinoRunner, audit, compile_model, version
from edgeres.targets import load_target, scheme_for

PIXELS = np.random.default_rng(0).standard_normal((9, 3, 32, 32), dtype=np.float32)
TARGET = load_target("cpu-openvino")
ON_X86 = pytest.mark.skipif(
    platform.machine().lower() in runners.openvino.SIZED, reason="OpenVINO computes fewer convolutions in INT8 on Arm"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, preprocess: Preprocess) -> dict[str, Path]:
    """The tiny model as FP32 and INT8, for any batch and for batches of exactly 4."""
    folder = tmp_path_factory.mktemp("openvino")
    model = graph.load(tiny_path)
    fixed = export_onnx(tiny_resnet(), preprocess, {}, batch=4)
    paths = {}
    for name, fp32 in {"": model, "-fixed": fixed}.items():
        table = calibrate(model, [Batch(PIXELS, None, np.arange(9))], {"model": graph.digest(fp32)})
        for precision, typed in {"fp32": fp32, "int8": int8(fp32, table, scheme_for(TARGET), "minmax")}.items():
            paths[precision + name] = folder / f"{precision}{name}.onnx"
            graph.save(typed, paths[precision + name])
    return paths


@pytest.fixture(scope="module")
def expected(tiny_path: Path) -> np.ndarray:
    """Logits of `PIXELS`, in FP32 by ONNX Runtime."""
    with open_runner(tiny_path, "onnxruntime") as runner:
        return runner.infer(PIXELS)


def infer(path: Path, images: int = len(PIXELS)) -> np.ndarray:
    with open_runner(path, "openvino") as runner:
        return runner.infer(PIXELS[:images])


def test_a_runner_knows_its_batch_and_input_size(files: dict[str, Path]) -> None:
    with open_runner(files["fp32"], "openvino") as dynamic, open_runner(files["int8-fixed"], "openvino") as fixed:
        assert (dynamic.batch, dynamic.input_size) == (None, 32)
        assert (fixed.batch, fixed.input_size) == (4, 32)


@pytest.mark.parametrize("images", [1, 4, 9])
@pytest.mark.parametrize("kind", ["fp32", "fp32-fixed"])
def test_fp32_is_what_onnx_runtime_computes(
    files: dict[str, Path], expected: np.ndarray, kind: str, images: int
) -> None:
    logits = infer(files[kind], images)
    assert (logits.dtype, logits.shape) == (np.float32, (images, CLASSES))
    np.testing.assert_allclose(logits, expected[:images], rtol=1e-4, atol=1e-4)


def test_fp32_is_not_left_to_bf16(files: dict[str, Path]) -> None:
    assert compile_model(files["fp32"]).get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"


@pytest.mark.parametrize("kind", ["int8", "int8-fixed"])
def test_int8_is_close_to_fp32_and_to_onnx_runtime_on_the_same_file(
    files: dict[str, Path], expected: np.ndarray, kind: str
) -> None:
    logits = infer(files[kind])
    assert 25 < decibels(*squares(expected, logits)) < 60
    with open_runner(files[kind], "onnxruntime") as runner:
        assert decibels(*squares(runner.infer(PIXELS), logits)) > 28


def test_the_result_is_the_callers(files: dict[str, Path]) -> None:
    with open_runner(files["fp32"], "openvino") as runner:
        first = runner.infer(PIXELS[:4])
        kept = first.copy()
        second = runner.infer(-PIXELS[:4])
        np.testing.assert_array_equal(first, kept)
        second[:] = 0
        np.testing.assert_array_equal(runner.infer(PIXELS[:4]), kept)
        assert not (kept == 0).any()
    np.testing.assert_array_equal(first, kept)


def test_pixels_are_neither_modified_nor_need_be_contiguous(files: dict[str, Path], expected: np.ndarray) -> None:
    pixels = np.ascontiguousarray(PIXELS.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    pixels.flags.writeable = False
    with open_runner(files["fp32"], "openvino") as runner:
        np.testing.assert_allclose(runner.infer(pixels), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(pixels, PIXELS)


def test_two_runners_do_not_disturb_each_other(files: dict[str, Path], expected: np.ndarray) -> None:
    with open_runner(files["fp32"], "openvino") as one, open_runner(files["int8"], "openvino") as other:
        kept = other.infer(PIXELS)
        np.testing.assert_allclose(one.infer(PIXELS), expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(other.infer(PIXELS), kept)


@pytest.mark.parametrize(("machine", "sized"), [("x86_64", False), ("aarch64", True), ("ARM64", True)])
def test_on_arm_a_graph_for_any_batch_is_compiled_for_each_that_comes(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, machine: str, sized: bool
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    shapes, compiled = [], runners.openvino._compiled

    def watched(*arguments: Any) -> Any:
        model = compiled(*arguments)
        shapes.append(str(model.input().partial_shape))
        return model

    monkeypatch.setattr(runners.openvino, "_compiled", watched)
    with open_runner(files["int8"], "openvino") as runner, open_runner(files["int8-fixed"], "openvino") as fixed:
        kept = fixed.infer(PIXELS)
        assert (runner.batch, fixed.batch) == (None, 4)
        for n in (4, 4, 2, 4, 2, 9):  # the usual batch and what is left at the end are compiled once
            assert decibels(*squares(kept[:n], runner.infer(PIXELS[:n]))) > 30
    first, *later = (1, 4, 2, 9) if sized else ("?",)
    assert shapes == [f"[{n},3,32,32]" for n in (first, 4, *later)]  # the fixed graph is the second


def test_a_runner_closes_twice(files: dict[str, Path]) -> None:
    runner = OpenVinoRunner(files["fp32"])
    runner.close()
    runner.close()
    with pytest.raises(TypeError):
        runner.infer(PIXELS)


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_a_corrupt_file_is_a_build_error_that_names_it(tiny_path: Path, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "engine.onnx"
    path.write_bytes(tiny_path.read_bytes()[:20_000] if content is None else content)
    with pytest.raises(BuildError, match=r"OpenVINO cannot load .*engine\.onnx") as caught:
        open_runner(path, "openvino")
    assert caught.value.evidence


def test_a_missing_file_is_a_build_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"cannot load .*none\.onnx"):
        open_runner(tmp_path / "none.onnx", "openvino")


def test_a_missing_package_is_named_with_its_extra(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    runners.openvino._core.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependency, match="package 'openvino'") as caught:
        open_runner(files["fp32"], "openvino")
    assert caught.value.hint == 'pip install "edgeres[openvino]"'


def test_nothing_is_reported_to_anybody(files: dict[str, Path], tmp_path: Path) -> None:
    code = (
        "import socket, sys, time\n"
        "from pathlib import Path\n"
        "def refuse(*_, **__):\n"
        "    print('asks the network')\n"
        "    raise OSError\n"
        "socket.getaddrinfo = socket.socket.connect = refuse\n"
        "from edgeres.runners import open_runner\n"
        f"open_runner(Path({os.fspath(files['fp32'])!r}), 'openvino').close()\n"
        "time.sleep(0.5)\n"  # telemetry is sent by a thread
        "print('openvino' in sys.modules)\n"
    )
    ci = ("CI", "TF_BUILD", "JENKINS_URL")  # where openvino stays quiet anyway
    home = {k: v for k, v in os.environ.items() if k not in ci} | {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=home)
    assert done.stdout == "True\n", done.stderr
    assert list(tmp_path.iterdir()) == []


def strip_pair(model: Any, tensor: str) -> None:
    """Take the Q/DQ pair off ``tensor``."""
    for node in model.graph.node:
        node.input[:] = [tensor if name == f"{tensor}.dq" else name for name in node.input]
    for node in [n for n in model.graph.node if n.name in (f"{tensor}.q", f"{tensor}.dq")]:
        model.graph.node.remove(node)


@ON_X86
def test_the_audit_counts_layers_by_precision(files: dict[str, Path]) -> None:
    fp32, quantized = audit(files["fp32"], "fp32"), audit(files["int8"], "int8")
    assert fp32.operators["Convolution fp32"] == quantized.operators["Convolution int8"] == 15
    assert fp32.operators["FullyConnected fp32"] == quantized.operators["FullyConnected int8"] == 1
    assert {name.partition(" ")[2] for name in fp32.operators} == {"fp32"}
    # residual sums are part of convolutions; what is done once at load is not counted, like the reshaping of biases
    assert not {"Eltwise", "Const", "Input", "Output"} & {name.partition(" ")[0] for name in fp32.operators}
    assert fp32.operators["Reshape fp32"] == 1
    assert fp32.notes == quantized.notes == []


@ON_X86
def test_the_audit_notes_convolutions_that_are_not_in_int8(files: dict[str, Path], tmp_path: Path) -> None:
    model = graph.load(files["int8"])
    strip_pair(model, "input")
    graph.save(model, tmp_path / "m.onnx")
    fusion = audit(tmp_path / "m.onnx", "int8")
    assert fusion.operators["Convolution int8"] == 14
    assert fusion.notes == ["1 of 15 convolutions are computed in FP32, first conv1"]
    assert audit(files["int8"], "fp32").notes == ["15 of 15 convolutions are computed in INT8, first conv1"]


def test_the_target_runs_what_the_executor_has() -> None:
    assert (TARGET.executor, TARGET.scheme, TARGET.precisions) == ("openvino", "openvino", ["fp32", "int8"])


@pytest.mark.parametrize("precision", ["fp32", pytest.param("int8", marks=ON_X86)])
def test_the_record_says_what_the_engine_is(files: dict[str, Path], tmp_path: Path, precision: str) -> None:
    engine = build(files[precision], tmp_path / "e", "cpu-openvino", TARGET)
    record = json.loads((tmp_path / "e" / RECORD).read_text())
    assert (record["target"], record["executor"], record["precision"]) == ("cpu-openvino", "openvino", precision)
    assert record["fusion"]["operators"][f"Convolution {precision}"] == 15
    assert record["built_with"].pop("edgeres")
    assert record["built_with"] == {"openvino": version(), "machine": platform.machine()}
    assert record["sha256"] == sha256_file(files[precision])
    with Engine.load(tmp_path / "e").open() as runner:
        assert isinstance(runner, OpenVinoRunner)
        assert runner.infer(PIXELS).shape == (9, CLASSES)
    assert engine.record["size_bytes"] == files[precision].stat().st_size


@ON_X86
def test_from_images_to_verdict(workspace: Path, tiny_path: Path) -> None:
    for command in ("build-engine", "validate"):
        done = CliRunner().invoke(
            cli, [command, "--model", str(tiny_path), "--target", "cpu-openvino", "--precision", "int8"]
        )
        assert done.exit_code == 0, done.output + done.stderr
    (path,) = workspace.rglob("result.json")
    result = json.loads(path.read_text())
    assert (result["target"], result["precision"], result["images"], result["notes"]) == (
        "cpu-openvino",
        "int8",
        24,
        [],
    )
    assert 20 < result["sqnr_db"] < 60
    assert result["provenance"]["built_with"]["openvino"] == version()
