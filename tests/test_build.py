from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner

import edgeres
from edgeres import graph
from edgeres.build import RECORD, Engine, build
from edgeres.calibrate import calibrate
from edgeres.cli import cli
from edgeres.errors import InputError, MissingDependency, StaleError
from edgeres.files import sha256_file
from edgeres.fp16 import fp16
from edgeres.loader import Batch
from edgeres.quantize import Scheme, int8
from edgeres.runners.onnxruntime import audit
from edgeres.runners.tensorrt import TensorRt
from edgeres.targets import load_target

PIXELS = np.random.default_rng(0).standard_normal((3, 3, 32, 32), dtype=np.float32)


@pytest.fixture(scope="module")
def typed(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model in every precision, as `edgeres quantize` writes it."""
    model = graph.load(tiny_path)
    table = calibrate(model, [Batch(PIXELS, None, np.arange(3))], {"model": graph.digest(model)})
    models = {"fp32": model, "fp16": fp16(model), "int8": int8(model, table, Scheme("onnxruntime"), "minmax")}
    folder = tmp_path_factory.mktemp("typed")
    for precision, typed in models.items():
        extra: dict[str, Any] = {"quantization": {"method": "minmax"}, "chosen": {}} if precision == "int8" else {}
        extra |= {"precision": precision, "io": "fp32", "model": "d" * 64}
        graph.set_metadata(typed, {**graph.metadata(typed), **extra})
        graph.save(typed, folder / f"{precision}.onnx")
    return {precision: folder / f"{precision}.onnx" for precision in models}


@pytest.fixture
def engine(typed: dict[str, Path], tmp_path: Path) -> Engine:
    return build(typed["int8"], tmp_path / "engine", "cpu", load_target("cpu"))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_record_says_what_the_engine_is(typed: dict[str, Path], tmp_path: Path, precision: str) -> None:
    engine = build(typed[precision], tmp_path / "e", "cpu", load_target("cpu"))
    record = json.loads((tmp_path / "e" / RECORD).read_text())
    assert record == json.loads(json.dumps(engine.record))
    assert record["format"] == "edgeres engine 1"
    assert (record["precision"], record["variant"], record["target"]) == (precision, "v1.5", "cpu")
    assert (record["classes"], record["batch"], record["executor"]) == (4, None, "onnxruntime")
    assert record["preprocess"]["crop"] == 32
    assert record["io"] == "fp32"
    assert record.get("quantization") == ({"method": "minmax"} if precision == "int8" else None)
    assert record.get("chosen") == ({} if precision == "int8" else None)
    assert record["sha256"] == sha256_file(engine.path) == sha256_file(tmp_path / "e" / record["file"])
    assert record["size_bytes"] == len(engine.path.read_bytes())
    assert record["made_from"] == {"onnx": sha256_file(typed[precision]), "model": "d" * 64}
    assert record["built_with"] == {
        "edgeres": edgeres.__version__,
        "onnxruntime": onnxruntime.__version__,
        "machine": platform.machine(),
    }
    assert record["fusion"]["operators"]
    assert record["build_seconds"] >= 0


def test_the_engine_of_an_unquantized_file_knows_its_model(tiny_path: Path, tmp_path: Path) -> None:
    engine = build(tiny_path, tmp_path / "e", "cpu", load_target("cpu"))
    assert engine.record["made_from"]["model"] == graph.digest(graph.load(tiny_path))


def test_nothing_but_engine_and_record_is_left(engine: Engine) -> None:
    assert sorted(p.name for p in engine.path.parent.iterdir()) == [RECORD, "engine.onnx"]


@pytest.mark.parametrize("name", ["", RECORD, "engine.onnx"])
def test_an_engine_opens_by_its_folder_or_a_file_in_it(engine: Engine, name: str) -> None:
    loaded = Engine.load(engine.path.parent / name)
    assert loaded.path == engine.path
    assert loaded.record == json.loads(json.dumps(engine.record))
    with loaded.open() as runner:
        assert runner.infer(PIXELS).shape == (3, 4)


def test_an_engine_folder_may_be_moved(engine: Engine, tmp_path: Path) -> None:
    folder = engine.path.parent.rename(tmp_path / "elsewhere")
    assert Engine.load(folder).path == folder / "engine.onnx"


@pytest.mark.parametrize("change", ["edited", "truncated", "swapped"])
def test_an_engine_that_is_not_the_one_built_is_refused(engine: Engine, typed: dict[str, Path], change: str) -> None:
    content = bytearray(engine.path.read_bytes())
    if change == "edited":
        content[len(content) // 2] ^= 1
    elif change == "truncated":
        del content[-1:]
    else:
        content[:] = typed["fp32"].read_bytes()
    engine.path.write_bytes(content)
    with pytest.raises(StaleError, match="is not the file that was built") as caught:
        Engine.load(engine.path.parent)
    assert engine.record["sha256"][:12] in caught.value.evidence


def test_a_missing_engine_file_is_named(engine: Engine) -> None:
    engine.path.unlink()
    with pytest.raises(InputError, match=r"cannot read .*engine\.onnx"):
        Engine.load(engine.path.parent)


def test_a_folder_without_a_record_is_no_engine(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no engine at") as caught:
        Engine.load(tmp_path)
    assert RECORD in caught.value.evidence
    assert "build-engine" in caught.value.hint


@pytest.mark.parametrize("text", ["{}", '{"format": "edgeres range table 1", "file": "engine.onnx"}'])
def test_a_foreign_record_is_refused(engine: Engine, text: str) -> None:
    (engine.path.parent / RECORD).write_text(text)
    with pytest.raises(InputError, match=r"engine\.json is not an engine record"):
        Engine.load(engine.path.parent)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_record_that_is_no_json_object_is_refused(engine: Engine, text: str) -> None:
    (engine.path.parent / RECORD).write_text(text)
    with pytest.raises(InputError, match="engine record"):
        Engine.load(engine.path.parent)


@pytest.mark.parametrize("key", ["file", "sha256", "executor"])
def test_a_record_that_lacks_what_loading_needs_is_damaged(engine: Engine, key: str) -> None:
    record = {k: v for k, v in engine.record.items() if k != key}
    (engine.path.parent / RECORD).write_text(json.dumps(record))
    with pytest.raises(InputError, match="is damaged") as caught:
        Engine.load(engine.path.parent)
    assert key in caught.value.evidence


def test_a_record_cannot_name_a_file_outside_its_folder(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "other.onnx").write_bytes(engine.path.read_bytes())
    record = {**engine.record, "file": "../other.onnx"}
    (engine.path.parent / RECORD).write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"cannot read .*engine/other\.onnx"):
        Engine.load(engine.path.parent)


def test_an_onnx_file_of_others_is_refused(typed: dict[str, Path], tmp_path: Path) -> None:
    model = graph.load(typed["fp32"])
    del model.metadata_props[:]
    graph.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(InputError, match=r"foreign\.onnx was not made by edgeres"):
        build(tmp_path / "foreign.onnx", tmp_path / "e", "cpu", load_target("cpu"))
    assert not (tmp_path / "e").exists()


def test_the_audit_counts_what_int8_fused_to(typed: dict[str, Path]) -> None:
    fusion = audit(typed["int8"], "int8")
    assert fusion.operators["QLinearConv"] == 15
    assert fusion.operators["QLinearAdd"] == 4
    assert not fusion.operators.keys() & {"Conv", "FusedConv", "Gemm", "Relu"}
    assert fusion.notes == []


def test_the_audit_counts_what_fp32_fused_to(typed: dict[str, Path]) -> None:
    fusion = audit(typed["fp32"], "fp32")
    assert sum(n for op, n in fusion.operators.items() if "Conv" in op) == 15
    assert "Relu" not in fusion.operators
    assert fusion.notes == []


def strip_pair(model: Any, tensor: str) -> None:
    """Take the Q/DQ pair off ``tensor``."""
    for node in model.graph.node:
        node.input[:] = [tensor if name == f"{tensor}.dq" else name for name in node.input]
    for name in (f"{tensor}.q", f"{tensor}.dq"):
        model.graph.node.remove(named(model, name))


def named(model: Any, name: str) -> Any:
    return next(n for n in model.graph.node if n.name == name)


def test_the_audit_notes_convolutions_that_did_not_fuse(typed: dict[str, Path], tmp_path: Path) -> None:
    model = graph.load(typed["int8"])
    strip_pair(model, "layer1.0.relu1")
    graph.save(model, tmp_path / "m.onnx")
    fusion = audit(tmp_path / "m.onnx", "int8")
    assert fusion.operators["QLinearConv"] == 13
    assert fusion.notes == ["2 of 15 convolutions stay in FP32, first layer1.0.conv1"]


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="Arm has FP16 kernels")
def test_the_audit_notes_that_fp16_gains_no_speed(typed: dict[str, Path]) -> None:
    (note,) = audit(typed["fp16"], "fp16").notes
    assert note.startswith("15 of 15 convolutions are computed in FP32")


def test_the_audit_counts_fp16_convolutions_that_stay_in_half(
    typed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep(path: Path, optimized: Path) -> None:  # an executor with FP16 kernels leaves the graph as it is
        optimized.write_bytes(path.read_bytes())

    monkeypatch.setattr("edgeres.runners.onnxruntime.open_session", keep)
    assert audit(typed["fp16"], "fp16").notes == []


rtx = pytest.mark.skipif(
    (sys.platform, platform.machine()) not in (("linux", "x86_64"), ("win32", "AMD64")),
    reason="tensorrt-rtx has wheels for Linux and Windows on x86-64",
)


@rtx
def test_a_plan_is_built_without_a_gpu_and_its_record_says_how(workspace: Path, tiny_path: Path) -> None:
    runner = CliRunner()
    command = ["build-engine", "--model", str(tiny_path), "--target", "rtx", "--json", "--method", "minmax"]
    first = runner.invoke(cli, command)
    assert first.exit_code == 0, first.stderr
    record = json.loads(first.stdout)
    engine = Engine.load(workspace / "engines" / "out" / "tiny-int8-rtx")
    assert engine.path.name == "engine.plan"
    assert engine.path.stat().st_size == record["size_bytes"] > 10_000
    assert (record["executor"], record["precision"]) == ("tensorrt-rtx", "int8")
    assert record["options"]["profile"] == [1, 8, 32]
    assert "timing_cache" not in record["options"]
    assert "tensorrt-rtx" in record["built_with"]
    again = runner.invoke(cli, command)
    assert again.exit_code == 0
    assert "tiny-int8-rtx is up to date" in again.stderr


@rtx
def test_an_engine_that_cannot_be_looked_into_here_says_so(
    workspace: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MissingDependency("this needs one of the packages pycuda, cuda-python")

    monkeypatch.setattr(TensorRt, "audit", refuse)
    result = CliRunner().invoke(
        cli, ["build-engine", "--model", str(tiny_path), "--target", "rtx", "--precision", "fp32"]
    )
    assert result.exit_code == 0, result.stderr
    assert "note: what the engine runs in was not looked at: this needs one of the packages" in result.stderr


def test_no_engine_for_dla_yet_but_what_to_do(workspace: Path, tiny_path: Path) -> None:
    result = CliRunner().invoke(cli, ["build-engine", "--model", str(tiny_path), "--target", "jetson-agx-orin-dla"])
    assert result.exit_code == 2
    assert "edgeres builds no engine for jetson-agx-orin-dla yet" in result.stderr
    assert "model.cache" in result.stderr
