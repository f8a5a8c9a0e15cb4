from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import told
from onnx import numpy_helper
from PIL import Image

from edgeres import graph, pipeline, ranges, report, typed
from edgeres.benchmark import Plan
from edgeres.build import Engine
from edgeres.calibrate import RangeTable
from edgeres.errors import BuildError, EdgeresError, InputError, UsageError
from edgeres.job import Job
from edgeres.layouts import open_images
from edgeres.recipe import load_recipe
from edgeres.targets import Target, load_target, names
from edgeres.validate import Shard

Make = Callable[..., Job]


@pytest.fixture
def make(workspace: Path, tiny_path: Path) -> Make:
    """A job on the tiny model, with flags as section__key=value."""

    def job(**flags: Any) -> Job:
        layers: dict[str, dict[str, Any]] = {}
        for name, value in flags.items():
            section, key = name.split("__")
            layers.setdefault(section, {})[key] = value
        return Job(load_recipe(workspace, flags=layers), workspace, model=tiny_path)

    return job


CASES = [
    (n, p, i)
    for n in names()
    for p in load_target(n).precisions
    for i in (("fp32",) if (load_target(n).scheme, p) == ("implicit", "int8") else ("fp32", "fp16", "uint8"))
]


@pytest.mark.parametrize(("target", "precision", "kind"), CASES)
def test_every_target_precision_and_interface(make: Make, target: str, precision: str, kind: str) -> None:
    path = typed.quantize_model(make(engine__target=target, engine__precision=precision, engine__io=kind))
    model = graph.load(path)
    made = graph.metadata(model)
    assert (made["precision"], made["io"]) == (precision, kind)
    assert model.graph.input[0].type.tensor_type.elem_type == {"fp32": 1, "fp16": 10, "uint8": 2}[kind]
    assert model.graph.output[0].type.tensor_type.elem_type == (10 if kind == "fp16" else 1)
    operators = graph.count_ops(model)
    implicit = load_target(target).scheme == "implicit"
    assert ("QuantizeLinear" in operators) == (precision == "int8" and not implicit)
    assert (path.with_suffix(".cache").is_file()) == (precision == "int8" and implicit)
    if precision == "int8":
        assert made["quantization"]["scheme"] == load_target(target).scheme
        assert made["chosen"]["method"] == "mse"
        assert made["chosen"]["held_out"]["sqnr_db"] > 15
    else:
        assert "quantization" not in made


def test_another_tensorrt_takes_another_graph(make: Make) -> None:
    for version, precision in (("8.6.2", 1), ("10.3.0", 10), ("8.6.2", 1)):
        job = make(engine__target="jetson-agx-orin", engine__precision="fp16", engine__tensorrt=version)
        path, said = told(typed.quantize_model, job)
        assert {t.data_type for t in graph.load(path).graph.initializer} == {precision}
        assert "up to date" not in said
        assert "up to date" in told(typed.quantize_model, job)[1]


def test_another_tensorrt_takes_another_header_of_a_cache(make: Make) -> None:
    for version, header in (("10.3.0", "TRT-100300"), ("8.6.1", "TRT-8601")):
        path = typed.quantize_model(make(engine__target="desktop-implicit", engine__tensorrt=version))
        assert path.with_suffix(".cache").read_text().startswith(f"{header}-")


def test_a_typed_model_does_not_take_the_place_of_its_fp32_model(make: Make) -> None:
    job = make()
    before = job.fp32.read_bytes()
    with pytest.raises(UsageError, match="would take the place of what it is made from"):
        typed.quantize_model(job, job.fp32.parent / ".." / job.fp32.parent.name / job.fp32.name)
    assert job.fp32.read_bytes() == before


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_what_dla_cannot_take_is_refused_before_anything_is_made(make: Make, workspace: Path, precision: str) -> None:
    job = make(engine__target="jetson-agx-orin-dla", engine__precision=precision)
    model = graph.load(job.fp32)
    next(n for n in model.graph.node if n.op_type == "GlobalAveragePool").op_type = "Relu"  # the map goes to fc whole
    (weight,) = (t for t in model.graph.initializer if t.name == "fc.weight")
    weight.CopyFrom(numpy_helper.from_array(np.repeat(numpy_helper.to_array(weight), 16, 1), weight.name))
    graph.save(model, workspace / "whole.onnx")
    with pytest.raises(InputError, match="fc is no classifier after a pool"):
        typed.quantize_model(replace(job, model=workspace / "whole.onnx"))
    assert not (workspace / "engines").exists()
    assert not (workspace / "calibration").exists()


@pytest.mark.parametrize("kind", ["fp16", "uint8"])
def test_a_calibration_cache_is_for_the_fp32_interface(make: Make, kind: str) -> None:
    job = make(engine__target="jetson-agx-orin-dla", engine__io=kind)
    with pytest.raises(UsageError, match="--io fp32 only"):
        typed.quantize_model(job)
    assert not job.folder.exists()


def test_fidelity_is_that_of_the_file_written(make: Make, tiny: Any) -> None:
    job = make(engine__target="desktop")
    written = graph.load(typed.quantize_model(job))
    held = typed.held_out(job, tiny)
    assert held is not None
    assert graph.metadata(written)["chosen"]["held_out"] == vars(held.fidelity(written))


@pytest.mark.parametrize("target", ["cpu", "desktop"])
def test_a_quantized_model_says_what_it_is_like_inside(make: Make, tiny: Any, target: str) -> None:
    job = make(engine__target=target, calibration__method="percentile-99.9")
    made = graph.metadata(graph.load(typed.quantize_model(job)))
    layers = [n.name for n in tiny.graph.node if n.op_type in graph.LAYERS]
    assert list(made["layers"]) == layers
    assert all(10 < db <= 60 for db in made["layers"].values())
    table = RangeTable.load(job.table)
    assert len(made["ranges"]) == typed.WORST
    for shown in made["ranges"]:
        r = table.tensors[shown["tensor"]]
        assert sum(shown["counts"]) == r.count
        assert len(shown["edges"]) == len(shown["counts"]) + 1 <= 2 * typed.BARS + 1
        assert shown["edges"][0] <= r.min <= r.max <= shown["edges"][-1]
        assert shown["used"] == shown["thresholds"]["percentile-99.9"] != shown["thresholds"]["minmax"]
        assert (shown["used"][0] == -shown["used"][1]) == (target == "desktop")


def test_an_fp16_rest_that_breaks_the_model_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, _: Any) -> Any:
        last = next(t for t in model.graph.initializer if t.name == "fc.bias")
        last.CopyFrom(numpy_helper.from_array(1e9 * np.ones(last.dims, np.float32), last.name))
        return model

    monkeypatch.setattr(typed, "fp16", broken)
    job = make(engine__target="desktop")
    with pytest.raises(BuildError, match="with the rest in FP16, INT8 does not hold"):
        typed.quantize_model(job)
    assert not (job.folder / "model.onnx").exists()


@pytest.mark.parametrize("kind", ["fp32", "fp16", "uint8"])
def test_engines_of_every_interface_are_as_faithful(make: Make, kind: str) -> None:
    job = make(engine__io=kind)
    (result,) = pipeline.validate_engines(job, [pipeline.ensure_engine(job)])
    assert result["sqnr_db"] > 20
    assert result["agreement"]["top1"] > 90


def test_held_out_images_are_not_calibration_images(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeres.tune.HELD_OUT", 16)
    monkeypatch.setattr("edgeres.tune.Held", lambda model, batches: batches)
    job = make(calibration__limit=12)
    loader, said = told(typed.held_out, job, graph.load(job.fp32))
    assert (len(loader.images), said) == (16, "")
    assert not {*loader.images.paths} & {*ranges.calibration_images(job).paths}


def test_held_out_images_that_are_unreadable_stop_the_run_or_are_named(
    make: Make, workspace: Path, train_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeres.tune.HELD_OUT", 16)
    images = shutil.copytree(train_folder, workspace / "images")
    job = make(calibration__limit=12, calibration__images=str(images))
    calibrated = ranges.calibration_images(job).paths
    bad = next(p for p in open_images(images).subset(28, job.recipe.seed).paths if p not in calibrated)
    (images / bad).write_bytes(b"")
    typed.ensure_table(job, graph.load(job.fp32))  # no bad one among those
    with pytest.raises(InputError, match="1 unreadable image") as error:
        pipeline.quantize_model(job)
    assert bad in error.value.evidence
    assert not job.folder.exists()
    _, said = told(pipeline.quantize_model, replace(job, skip_bad=True))
    assert f"skipped {bad}: the file is empty" in said
    assert "on 15 images" in said


def test_a_set_with_none_to_spare_is_said(make: Make) -> None:
    job = make()
    held, said = told(typed.held_out, job, graph.load(job.fp32))
    assert said == "fidelity is measured on calibration images: the set has only 32\n"
    assert len(held.reference) == 32


def test_what_is_asked_again_is_up_to_date_and_what_changes_is_made_anew(make: Make) -> None:
    path, said = told(typed.quantize_model, make())
    assert f"wrote engines/out/tiny-int8-cpu/{path.name}: int8, mse, scheme onnxruntime: " in said
    before = path.read_bytes()
    _, said = told(typed.quantize_model, make())
    assert said == "engines/out/tiny-int8-cpu/model.onnx is up to date\n"
    for change in ({"calibration__method": "minmax"}, {"engine__io": "uint8"}, {"calibration__equalize": False}):
        path, said = told(typed.quantize_model, make(**change))
        assert "wrote" in said
        assert path.read_bytes() != before
    path, said = told(typed.quantize_model, make())
    assert path.read_bytes() == before


def test_without_equalize_a_table_has_no_factors_and_the_old_one_is_stale(make: Make) -> None:
    job = make()
    typed.quantize_model(job)
    assert RangeTable.load(job.table).exponents
    _, said = told(typed.quantize_model, make(calibration__equalize=False))
    assert "(its channels are evened out, and are to be as they are)" in said
    assert RangeTable.load(job.table).exponents == {}


def test_a_lost_calibration_cache_is_made_anew(make: Make) -> None:
    job = make(engine__target="jetson-agx-orin-dla")
    cache = typed.quantize_model(job).with_suffix(".cache")
    text = cache.read_text()
    assert text.startswith("TRT-")
    cache.unlink()
    typed.quantize_model(job)
    assert cache.read_text() == text


def test_auto_needs_images(make: Make, tmp_path: Path) -> None:
    table = shutil.copy(ranges.calibrate_model(make()), tmp_path / "table.json")
    job = make(calibration__images=str(table), calibration__method="auto")
    with pytest.raises(UsageError, match="auto measures fidelity on images") as caught:
        typed.quantize_model(job)
    assert "--method mse" in caught.value.hint
    path = typed.quantize_model(make(calibration__images=str(table)))
    assert graph.metadata(graph.load(path))["chosen"]["tried"] == {}


def test_auto_records_every_method(make: Make) -> None:
    chosen = graph.metadata(graph.load(typed.quantize_model(make(calibration__method="auto"))))["chosen"]
    assert next(iter(chosen["tried"])) == chosen["method"]
    assert len(chosen["tried"]) == 6


def test_fp16_without_images_says_what_was_not_checked(workspace: Path, make: Make) -> None:
    (workspace / "edgeres.toml").write_text("", encoding="utf-8")
    _, said = told(typed.quantize_model, make(engine__precision="fp16"))
    assert "activations not checked for FP16 overflow" in said
    assert "--calibration" in said


def test_a_target_that_cannot_be_built_here_is_refused_at_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "target_of", lambda *_: Target("", "abacus", "tensorrt", ["int8"]))
    with pytest.raises(InputError, match="no runner for executor 'abacus'") as caught:
        pipeline.ensure_engine(make(engine__target="desktop"))
    assert "`edgeres quantize`" in caught.value.hint
    assert not (make().root / "engines").exists()


def test_a_quantized_model_is_not_quantized_again(make: Make, workspace: Path) -> None:
    path = typed.quantize_model(make())
    job = Job(load_recipe(workspace), workspace, model=path)
    with pytest.raises(InputError, match="is not an FP32 model made by edgeres") as caught:
        typed.quantize_model(job)
    assert "precision int8" in caught.value.evidence


def test_one_image_is_enough_and_is_said_to_tell_nothing(make: Make, tmp_path: Path, train_folder: Path) -> None:
    (tmp_path / "one" / "a").mkdir(parents=True)
    shutil.copy(train_folder / "class0" / "0.png", tmp_path / "one" / "a")
    path, said = told(typed.quantize_model, make(calibration__images=str(tmp_path / "one")))
    assert "one calibration image tells nothing about ranges" in said
    assert graph.metadata(graph.load(path))["quantization"]["images"] == 1


def test_gray_images_and_an_empty_set(make: Make, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / "gray" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 50), 60 * i, np.uint8)).save(tmp_path / "gray" / "a" / f"{i}.png")
    path = typed.quantize_model(make(calibration__images=str(tmp_path / "gray")))
    assert graph.metadata(graph.load(path))["quantization"]["images"] == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(EdgeresError, match="no images in"):
        typed.quantize_model(make(calibration__images=str(tmp_path / "empty")))


def test_the_engine_record_says_how_it_was_chosen(make: Make) -> None:
    engine = pipeline.ensure_engine(make(engine__io="uint8"))
    record = Engine.load(engine.path.parent).record
    assert (record["io"], record["chosen"]["method"]) == ("uint8", "mse")
    _, said = told(pipeline.ensure_engine, make(engine__io="uint8"))
    assert "built" not in said


def test_an_engine_is_not_judged_against_the_result_that_it_overwrites(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = pipeline.ensure_engine(make())
    pipeline.validate_engines(make(), [engine])
    own = engine.path.with_name("result.json")
    before, link = own.read_bytes(), tmp_path / "link.json"
    link.symlink_to(own)
    kept = shutil.copy(own, tmp_path / "NAME.result.json")
    shutil.copy(own.with_name("outcomes.npz"), tmp_path / "NAME.outcomes.npz")
    with monkeypatch.context() as idle:
        for work in ("ensure_model", "ensure_engine"):
            idle.setattr(pipeline, work, lambda _: pytest.fail("this is work"))
        for path in (own, link, Path("engines/out/tiny-int8-cpu/result.json")):
            job = make(budget__accepted=str(path))
            with pytest.raises(UsageError, match="is what this run writes") as caught:
                pipeline.validate_engines(job, [engine])
            assert "engines/out/tiny-int8-cpu/result.json" in caught.value.cause
            assert "copy it and outcomes.npz to engines/NAME.result.json" in caught.value.hint
            with pytest.raises(UsageError, match="is what this run writes"):
                pipeline.run(job, ("int8",))
    assert own.read_bytes() == before
    (result,) = pipeline.validate_engines(make(budget__accepted=str(kept)), [engine])
    assert result["reasons"][0].startswith("every answer is that of the accepted engine")


def test_a_validation_does_not_wait_for_the_tail_of_latency(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr(pipeline.lineup, "run", lambda job, engines, plan: plans.append(plan))
    job = make()
    pipeline.validate_engines(job, [pipeline.ensure_engine(job)])
    assert plans == [Plan(tail=False)]


def test_engines_of_one_kind_have_the_intervals_of_their_own_latency(make: Make, tmp_path: Path) -> None:
    engines = [pipeline.ensure_engine(make(calibration__method=m), tmp_path / m) for m in ("minmax", "mse")]
    results = pipeline.validate_engines(make(), engines)
    assert [r["engine"]["name"] for r in results] == ["INT8 minmax", "INT8 mse"]
    assert [r["baseline"]["name"] for r in results] == ["FP32 tiny.onnx"] * 2
    for r in results:
        baseline, engine = report.columns([r])
        assert baseline.p50_interval
        assert engine.p50_interval
        assert engine.runner == r["latency"]["runners"][r["engine"]["name"]]
        assert report.speedup(r)[1]


def test_engines_of_one_name_are_refused_before_the_work(make: Make, tmp_path: Path) -> None:
    job = make()
    engines = [pipeline.ensure_engine(job, tmp_path / run / "net") for run in ("one", "two")]
    for twins in (engines, engines[:1] * 2):
        with pytest.raises(UsageError, match="named twice, or two have one name"):
            pipeline.validate_engines(job, twins)
    assert not (job.root / "engines" / "out" / "answers").exists()


def test_copies_of_images_are_said_and_judged(make: Make, tmp_path: Path, val_folder: Path) -> None:
    images = shutil.copytree(val_folder, tmp_path / "copied")
    for i in range(3):
        shutil.copy(images / "class1" / "0.png", images / "class1" / f"again{i}.png")
    shutil.copy(images / "class2" / "1.jpg", images / "class3" / "other.jpg")  # under another label too
    job = make(validation__images=str(images))
    engine = pipeline.ensure_engine(job)
    words = f"4 of 28 images are {pipeline.COPIES}"
    (result,) = pipeline.validate_engines(job, [engine])
    assert (result["images"], result["notes"], engine.record["fusion"]["notes"]) == (28, [words], [])
    (part,) = pipeline.validate_engines(job, [engine], Shard(1, 1))
    assert part["notes"] == [words]
    assert pipeline.validate_engines(make(), [engine])[0]["notes"] == []


def test_images_that_tensorrt_calibrated_on_may_not_judge(make: Make) -> None:
    job = make()
    engine = pipeline.ensure_engine(job)
    job.manifest.unlink()
    pipeline.validate_engines(job, [engine])
    listed = engine.path.with_name("model.txt")
    listed.write_text(ranges.hashed(pipeline.validation_images(job)).to_text(), encoding="utf-8")
    pipeline.validate_engines(job, [engine])  # of an earlier engine: this one was calibrated by a table
    engine.record["quantization"]["method"] = "tensorrt-entropy"
    with pytest.raises(InputError, match="24 validation images are calibration images too") as caught:
        pipeline.validate_engines(job, [engine])
    assert "model.txt" in caught.value.evidence
