from __future__ import annotations

import io
import json
import platform
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner
from rich.console import Console

import edgeres
from edgeres import graph, progress
from edgeres.build import LISTED, RECORD, Engine, Typed, build, up_to_date
from edgeres.calibrate import calibrate
from edgeres.cli import cli
from edgeres.devices import Gpu
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


@pytest.mark.parametrize("method", ["tensorrt-entropy", "mse"])
def test_the_list_of_images_that_tensorrt_calibrates_on_goes_with_the_engine(
    typed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = replace(Typed.read(typed["int8"]), path=tmp_path / "model.onnx")
    shutil.copyfile(typed["int8"], model.path)
    (tmp_path / "model.txt").write_text("a.png\t0\t00\n")
    model.made["quantization"] = {"method": method}
    for folder in (tmp_path / "elsewhere", Path(".")):
        build(model, folder, "cpu", load_target("cpu"))
    assert (tmp_path / "elsewhere" / LISTED).is_file() == (method != "mse")
    assert (tmp_path / LISTED).read_text() == "a.png\t0\t00\n"


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


def test_an_engine_is_built_without_onnx_from_what_is_known_of_the_file(
    typed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Typed.read(typed["int8"])
    assert (known.model, known.convolutions, known.residuals) == ("d" * 64, 15, 4)
    before = build(known, tmp_path / "a", "cpu", load_target("cpu")).record
    monkeypatch.setitem(sys.modules, "onnx", None)
    after = build(known, tmp_path / "b", "cpu", load_target("cpu")).record
    assert after["fusion"] == {
        "operators": {},
        "notes": ["what the graph fused to was not looked at: this needs the package 'onnx'"],
    }
    differ = {"fusion", "build_seconds"}
    assert {k: v for k, v in after.items() if k not in differ} == {k: v for k, v in before.items() if k not in differ}
    with pytest.raises(MissingDependency, match="'onnx'"):
        build(typed["int8"], tmp_path / "c", "cpu", load_target("cpu"))


def test_an_engine_is_up_to_date_if_it_would_be_built_so_again(engine: Engine, typed: dict[str, Path]) -> None:
    target, folder = load_target("cpu"), engine.path.parent
    version = onnxruntime.__version__
    found = up_to_date(folder, typed["int8"], version, target)
    assert found is not None
    assert found.path == engine.path
    assert up_to_date(folder, typed["fp32"], version, target) is None
    assert up_to_date(folder, typed["int8"], "1.0", target) is None
    assert up_to_date(folder / "elsewhere", typed["int8"], version, target) is None
    engine.path.write_bytes(b"changed")
    assert up_to_date(folder, typed["int8"], version, target) is None


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


@pytest.mark.parametrize("change", ["edited", "longer", "swapped"])
def test_an_engine_that_is_not_the_one_built_is_refused(engine: Engine, typed: dict[str, Path], change: str) -> None:
    content = bytearray(engine.path.read_bytes())
    if change == "edited":
        content[len(content) // 2] ^= 1
    elif change == "longer":
        content += b"x"
    else:
        content[:] = typed["fp32"].read_bytes()
    engine.path.write_bytes(content)
    with pytest.raises(StaleError, match="is not the file that was built") as caught:
        Engine.load(engine.path.parent)
    assert engine.record["sha256"][:12] in caught.value.evidence


@pytest.mark.parametrize("left", [0, 1000])
def test_an_engine_that_was_cut_short_is_called_so(engine: Engine, left: int) -> None:
    engine.path.write_bytes(engine.path.read_bytes()[:left])
    with pytest.raises(StaleError, match="is cut short") as caught:
        Engine.load(engine.path.parent)
    assert f"{left:,} of {engine.record['size_bytes']:,} bytes" in caught.value.evidence


def plan(executor: str = "tensorrt", **options: object) -> Engine:
    on = {"name": "Orin", "capability": "8.7"}
    built = {"tensorrt": "10.3.0", "tensorrt-rtx": "1.7.1.116", "gpu": on}
    record = {"executor": executor, "precision": "int8", "target": "jetson-agx-orin", "options": options}
    return Engine(Path("engine.plan"), {**record, "built_with": built})


@pytest.mark.parametrize(
    ("version", "compatible", "loads"),
    [
        ("10.3.0", False, True),
        ("10.3.1", False, False),
        ("10.3.1", True, True),
        ("10.13.3.9", True, True),
        ("10.2.0", True, False),
        ("11.4.0.106", True, True),
        ("12.0.0", True, False),
        ("8.6.1", True, False),
    ],
)
def test_a_plan_is_for_its_version_or_later_ones_if_built_so(version: str, compatible: bool, loads: bool) -> None:
    engine = plan(version_compatible=compatible)
    if loads:
        engine.check_version(version)
        return
    with pytest.raises(StaleError, match=r"is for tensorrt 10\.3\.0") as caught:
        engine.check_version(version)
    assert version in caught.value.evidence
    assert "edgeres build-engine --precision int8 --target jetson-agx-orin" in caught.value.hint
    assert ("version_compatible" in caught.value.hint) is not compatible


def test_a_plan_is_for_one_kind_of_machine_whatever_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, gpus = plan(hardware="ampere-plus"), [Gpu("Orin", "8.7", 1, True)]
    engine.record["built_with"]["machine"] = "x86_64"
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    engine.check_gpu(gpus)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(StaleError, match=r"engine\.plan is for x86_64\nthis is aarch64"):
        engine.check_gpu(gpus)


def test_what_would_not_help_is_not_advised() -> None:
    for engine, version in ((plan(), "10.2.0"), (plan(), "12.0.0"), (plan("tensorrt-rtx"), "1.8.0.1")):
        with pytest.raises(StaleError) as caught:
            engine.check_version(version)
        assert "version_compatible" not in caught.value.hint


@pytest.mark.parametrize(
    ("executor", "options", "capability", "fits"),
    [
        ("tensorrt", {"hardware": "none"}, "8.7", True),
        ("tensorrt", {"hardware": "none"}, "8.6", False),
        ("tensorrt", {"hardware": "ampere-plus"}, "12.0", True),
        ("tensorrt", {"hardware": "ampere-plus"}, "7.5", False),
        ("tensorrt", {"hardware": "same-compute-capability"}, "8.7", True),
        ("tensorrt", {"hardware": "same-compute-capability"}, "8.9", False),
        ("tensorrt-rtx", {"capabilities": ["8.6", "8.9"]}, "8.9", True),
        ("tensorrt-rtx", {"capabilities": ["8.6", "8.9"]}, "12.0", False),
        ("tensorrt-rtx", {"capabilities": []}, "12.0", True),
        ("tensorrt-rtx", {"capabilities": []}, "7.5", False),
    ],
)
def test_a_plan_is_for_the_gpus_it_was_built_for(
    executor: str, options: dict[str, object], capability: str, fits: bool
) -> None:
    engine, gpu = plan(executor, **options), Gpu("Orin", capability, 1 << 33, True)
    if fits:
        engine.check_gpu([gpu])
        return
    with pytest.raises(StaleError, match="is for compute capability") as caught:
        engine.check_gpu([gpu])
    assert capability in caught.value.evidence


def test_another_model_of_gpu_is_noted() -> None:
    out = Console(file=io.StringIO(), width=200)
    with progress.to(out):
        plan(hardware="none").check_gpu([Gpu("Orin Nano", "8.7", 1 << 33, True)])
        plan(hardware="none").check_gpu([Gpu("Orin", "8.7", 1 << 33, True)])
    assert out.file.getvalue().count("was built on Orin; built again for this Orin Nano") == 1  # type: ignore[attr-defined]


def test_what_cannot_be_known_is_no_obstacle() -> None:
    plan().check_gpu([])
    Engine(Path("engine.onnx"), {"executor": "onnxruntime", "built_with": {}}).check_gpu([Gpu("a", "7.5", 1, False)])


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


@pytest.mark.parametrize(("key", "value"), [("size_bytes", "much"), ("options", [1]), ("made_from", None)])
def test_a_record_with_a_field_of_another_kind_is_damaged(engine: Engine, key: str, value: Any) -> None:
    (engine.path.parent / RECORD).write_text(json.dumps({**engine.record, key: value}))
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
def test_a_plan_is_built_without_onnx(typed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Typed.read(typed["fp32"])
    monkeypatch.setitem(sys.modules, "onnx", None)
    engine = build(known, tmp_path / "e", "rtx", load_target("rtx"))
    assert Engine.load(engine.path).record["made_from"] == {"onnx": sha256_file(typed["fp32"]), "model": "d" * 64}


@rtx
def test_an_engine_that_cannot_be_looked_into_here_says_so(
    workspace: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MissingDependency("this needs one of the packages pycuda, cuda-python")

    monkeypatch.setattr(TensorRt, "examine", refuse)
    result = CliRunner().invoke(
        cli, ["build-engine", "--model", str(tiny_path), "--target", "rtx", "--precision", "fp32"]
    )
    assert result.exit_code == 0, result.stderr
    assert "note: what the engine runs in was not looked at: this needs one of the packages" in result.stderr
