"""The typed model of a job: FP32 ONNX -> FP16 or INT8 ONNX for its target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeres import calibration_cache, equalize, graph, tune
from edgeres.baseline import ensure_model, preprocess_of, recorded, sample_images
from edgeres.calibrate import RangeTable
from edgeres.dla import dla_form
from edgeres.errors import BuildError, UsageError
from edgeres.files import atomic, refuse_replacing, require_writable, sha256_file
from edgeres.fp16 import fp16, magnitudes
from edgeres.interface import interface
from edgeres.job import BATCH, Job
from edgeres.layouts import open_images
from edgeres.lint import require_clean
from edgeres.loader import Loader
from edgeres.progress import say
from edgeres.quantize import Scheme, float_operators, interval
from edgeres.ranges import calibration_images, calibration_source, ensure_table, hashed, report_skipped
from edgeres.recipe import AUTO, ON_DEVICE
from edgeres.targets import Target, load_target, scheme_for
from edgeres.thresholds import METHODS


def quantize_model(job: Job, output: Path | None = None) -> Path:
    """FP32 ONNX -> typed ONNX for the recipe's precision, target and interface."""
    engine, calibration = job.recipe.engine, job.recipe.calibration
    target = target_of(job)
    if engine.precision == "int8":
        _refuse_misfits(job, target)
        calibration_source(job)  # before the minutes that an export may take
    if output:
        refuse_replacing(output, job.fp32)
        require_writable(output)
    fp32 = ensure_model(job)
    model = graph.load(fp32)
    record = graph.normal_form(model, fp32)
    if target.dla:
        dla_form(model)  # what has none is refused before the minutes that calibration may take
    path = output or job.folder / "model.onnx"
    asked = {**record, "model": graph.digest(model), "precision": engine.precision, "io": engine.io}
    scheme, table = replace(scheme_for(target), weights=calibration.weights), None
    if engine.precision == "int8":
        asked["quantization"] = {
            "scheme": scheme.name,
            "method": calibration.method,
            "weights": scheme.weights,
            "weight_bits": scheme.weight_bits,
            "rest": scheme.rest,
        }
        if calibration.method in ON_DEVICE:
            manifest = hashed(calibration_images(job))
            asked["quantization"] |= {"images_digest": manifest.digest(), "images": len(manifest.paths)}
            with atomic(path.with_suffix(".txt")) as temporary:  # no table is made that would have it beside it
                temporary.write_text(manifest.to_text(), encoding="utf-8", errors="surrogateescape")
        else:
            table_path, table = ensure_table(job, model)
            asked["quantization"] |= {"table": sha256_file(table_path), "images": table.images}
    if target.dla:
        asked["dla"] = True
    if engine.precision == "fp16" and not target.typed:
        asked["typed"] = False  # the builder has a flag for FP16, and the graph is FP32
    caches = target.implicit and table is not None
    if caches:
        asked["quantization"]["tensorrt"] = target.tensorrt  # which the cache is headed with
    complete = path.is_file() and (not caches or path.with_suffix(".cache").is_file())
    have = recorded(path) if complete else {}
    if {k: v for k, v in have.items() if k not in MEASURED} == asked:
        say(f"{job.show(path)} is up to date")
        return path
    measured: dict[str, Any] = {}
    typed = model
    if table is not None:
        typed, found = _int8(job, model, table, scheme, path, target)
        measured |= found
    elif engine.precision == "fp16" and target.typed:
        typed = fp16(model, _magnitudes(job, model))
    if kept := graph.metadata(typed).get("kept_fp32"):
        measured["kept_fp32"] = kept
    typed = interface(dla_form(typed) if target.dla else typed, engine.io, preprocess_of(model))
    graph.set_metadata(typed, {**asked, **measured})
    graph.save(typed, path)
    chosen = measured.get("chosen")
    how = f", {chosen['method']}, scheme {scheme.name}" if chosen else ""
    held = chosen and chosen["held_out"]
    close = f": {held['sqnr_db']:.1f} dB, {held['agreement']:.1f}% as FP32 on {held['images']} images" if held else ""
    say(f"wrote {job.show(path)}: {engine.precision}{how}{close}")
    return path


def target_of(job: Job) -> Target:
    """The target that the recipe names, as the recipe wants it built."""
    engine = job.recipe.engine
    return load_target(engine.target, engine.precision, engine.tensorrt, job.recipe.build)


def _refuse_misfits(job: Job, target: Target) -> None:
    """Raise `UsageError` for what does not go together in INT8."""
    engine, method = job.recipe.engine, job.recipe.calibration.method
    if target.implicit and job.recipe.calibration.weights != "absmax":
        raise UsageError(
            f"{engine.target} takes no --weight-scales {job.recipe.calibration.weights}",
            hint="leave it out: with a calibration cache, TensorRT quantizes the weights by itself",
        )
    if target.implicit and engine.io != "fp32":
        raise UsageError(
            f"{engine.target} takes INT8 engines with --io fp32 only",
            hint="its calibration cache names the network's tensors, and others would come between",
        )
    if method in ON_DEVICE and not target.implicit:
        raise UsageError(
            f"--method {method} is for implicit INT8, which {engine.target} has not",
            hint="TensorRT calibrates by itself up to 10.16: --target desktop-implicit, or a DLA",
        )
    if method in ON_DEVICE and calibration_source(job).endswith(".json"):
        raise UsageError(f"--method {method} takes images, and a range table is given", hint="give --method mse")


MEASURED = ("chosen", "layers", "ranges", "kept_fp32")
"""What a typed model records beside what was asked for."""
WORST, BARS = 4, 48
"""Layers whose ranges are kept for a report, and bars of a histogram on each side of zero."""


def _int8(
    job: Job, model: Any, table: RangeTable, scheme: Scheme, path: Path, target: Target
) -> tuple[Any, dict[str, Any]]:
    """The quantized model for ``scheme``, how it was chosen, and what it is like inside."""
    if stay := float_operators(model):
        say(f"in {scheme.rest.upper()}: {', '.join(f'{n} {op}' for op, n in stay.items())}, which INT8 does not cover")
    method = job.recipe.calibration.method
    held = held_out(job, model)
    if held is None and method == AUTO:
        raise UsageError("auto measures fidelity on images, and only a range table is given", hint="give --method mse")
    choice = tune.choose(model, table, scheme, method, held)
    tried = {name: vars(fidelity) for name, fidelity in choice.tried.items()}
    record = {"method": choice.method, "kept": choice.kept, "held_out": tried.get(choice.method), "tried": tried}
    even = equalize.equalize(model, table.exponents)
    found = {"chosen": record, **(_inside(even, choice, table, scheme, held) if held else {})}
    if target.implicit:
        scales = calibration_cache.scales(model, table, choice.method, choice.kept)
        text = calibration_cache.write(scales, target.tensorrt or "")
        with atomic(path.with_suffix(".cache")) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return even, found
    require_clean(choice.model, scheme)
    if scheme.rest != "fp16":
        return choice.model, found
    typed = fp16(choice.model, _magnitudes(job, even))
    if held:  # the methods were compared before; this is the file that is written
        fidelity = held.fidelity(typed)
        record["held_out"] = vars(fidelity)
        if fidelity.collapsed:
            raise BuildError(
                f"with the rest in FP16, INT8 does not hold what FP32 computes: {fidelity}",
                evidence=f"{choice.method} with the rest in FP32: {choice.tried[choice.method]}",
                hint="build with --precision fp32",
            )
    return typed, found


def _inside(even: Any, choice: tune.Choice, table: RangeTable, scheme: Scheme, held: tune.Held) -> dict[str, Any]:
    """Fidelity of every layer's output, and of the worst layers the range of what they read."""
    fidelity = tune.tensor_fidelity(even, choice.model, held)
    layers = [n for n in even.graph.node if n.op_type in graph.LAYERS]
    inputs = {n.name: n.input[0] for n in layers}
    worst = [t for name in tune.worst_layers(even, fidelity) if (t := inputs[name]) in table.tensors]
    ranges = []
    for tensor in list(dict.fromkeys(worst))[:WORST]:
        r = table.tensors[tensor]
        counts, edges = r.bars(BARS)
        thresholds = {method: list(interval(r, scheme, method)) for method in METHODS}
        used = thresholds[choice.method]
        bars = {"edges": edges.tolist(), "counts": counts.tolist()}
        ranges.append({"tensor": tensor, **bars, "thresholds": thresholds, "used": used})
    return {"layers": {n.name: round(fidelity[n.output[0]], 2) for n in layers}, "ranges": ranges}


def held_out(job: Job, model: Any) -> tune.Held | None:
    """Calibration images that were not calibrated on, with FP32's answers; None if only a table is given."""
    source = calibration_source(job)
    if source.endswith(".json"):
        return None
    images, limit, seed = open_images(source), job.recipe.calibration.limit, job.recipe.seed
    rest = images.subset(limit + tune.HELD_OUT, seed).without(images.subset(limit, seed))
    if len(rest) < tune.HELD_OUT // 4:
        say(f"fidelity is measured on calibration images: the set has only {len(images)}")
        rest = images.subset(tune.HELD_OUT, seed)
    loader = Loader(rest, preprocess_of(model), BATCH, job.skip_bad)
    held = tune.Held(model, loader)
    report_skipped(loader)
    return held


def _magnitudes(job: Job, model: Any) -> dict[str, float]:
    """What the tensors of ``model`` reach on a few calibration images, to see what would overflow FP16."""
    pixels = sample_images(job, preprocess_of(model))[:BATCH]
    if len(pixels):
        return magnitudes(model, pixels)
    say("activations not checked for FP16 overflow: that takes images; name some with --calibration")
    return {}
