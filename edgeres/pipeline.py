"""The whole flow on one screen. Each step makes its artifact, or says why the one that is there will do."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeres import benchmark, build, graph, quantize, report, validate
from edgeres.calibrate import RangeTable, calibrate
from edgeres.data import ImageSet, Manifest, open_images
from edgeres.errors import InputError, StaleError, UsageError, need
from edgeres.files import atomic, sha256_file, to_json, write_json
from edgeres.loader import Loader
from edgeres.progress import say, track
from edgeres.recipe import BASIC_DEPTHS, Preprocess, Recipe, one_of, with_defaults
from edgeres.runners import Runner, open_runner
from edgeres.targets import load_target, scheme_for

BATCH = 32
"""Images decoded and run at a time."""
SAMPLE = 64
"""Calibration images that a model is checked on: `identity` needs that many."""


@dataclass(frozen=True)
class Job:
    """A recipe in a workspace, and what the command line adds.

    ``model``: an FP32 file to use as it is. ``skip_bad``: leave out unreadable images. ``force``: use a checkpoint
    that seems to be of the other variant.
    """

    recipe: Recipe
    root: Path
    model: Path | None = None
    skip_bad: bool = False
    force: bool = False

    @property
    def stem(self) -> str:
        """First part of every file name made."""
        return self.recipe.name or (self.model.stem if self.model else self.recipe.model.network)

    @property
    def fp32(self) -> Path:
        """The FP32 model in normal form, baseline of everything."""
        return self.model or self.root / "engines" / "out" / f"{self.stem}.onnx"

    @property
    def table(self) -> Path:
        """Where calibration keeps what it measured."""
        return self.root / "calibration" / f"{self.stem}.json"

    @property
    def manifest(self) -> Path:
        """Which images the table was measured on; beside the table, also if that was given."""
        source = self.recipe.calibration.images or ""
        return (Path(source) if source.endswith(".json") else self.table).with_suffix(".txt")

    @property
    def folder(self) -> Path:
        """The engine's folder."""
        engine = self.recipe.engine
        return self.root / "engines" / "out" / f"{self.stem}-{engine.precision}-{engine.target}"

    def at(self, precision: str) -> Job:
        """The same job at another precision."""
        return replace(self, recipe=replace(self.recipe, engine=replace(self.recipe.engine, precision=precision)))

    def show(self, path: Path) -> str:
        """``path`` as a user in the workspace would write it."""
        return os.path.relpath(path, self.root) if path.is_relative_to(self.root) else str(path)


def run(job: Job, precisions: tuple[str, ...]) -> list[dict[str, Any]]:
    """Weights to verdict, for each of ``precisions`` -> one result each."""
    engines = [ensure_engine(job.at(p)) for p in precisions]
    return validate_engines(job, engines)


def export(job: Job, output: Path | None = None) -> Path:
    """Weights -> FP32 ONNX; parity and variant are checked on real images where there is a calibration set."""
    from edgeres import weights  # here and below: PyTorch takes seconds to import, and only export needs it
    from edgeres.export import export_onnx
    from edgeres.identity import identify

    section = job.recipe.model
    record = weights.published(section.weights, section.depth, section.variant)
    preprocess = with_defaults(job.recipe, record.preprocess) if record else job.recipe.preprocess
    path = weights.locate(section.weights, section.depth, section.variant)
    if path.suffix == ".onnx":  # published as ONNX only
        return import_model(job, path, preprocess, output)
    checkpoint = weights.load_checkpoint(path, Path(section.weights).name)
    model = weights.load_model(checkpoint, section.variant, section.classes, section.depth)
    pixels = sample_images(job, preprocess)
    fit = None
    if section.depth not in BASIC_DEPTHS:
        if checkpoint.variant not in (None, section.variant):
            message = f"config.json beside {path.name} says variant {checkpoint.variant}, not {section.variant}"
            _refuse(job, message, f"give --variant {checkpoint.variant}")
        if len(pixels):
            fit = identify(checkpoint, pixels, section.depth)
            say(f"variant: {fit}")
            if fit.variant not in (None, section.variant):
                message = f"{checkpoint.source} is of variant {fit.variant}, not {section.variant}"
                _refuse(job, message, f"give --variant {fit.variant}", str(fit))
        else:
            say("variant not checked: that takes images; name some with --calibration")
    proto = export_onnx(
        model,
        preprocess,
        {
            "depth": section.depth,
            "variant": section.variant,
            "variant_check": vars(fit) if fit else None,
            "weights": {"source": checkpoint.source, "sha256": checkpoint.sha256},
        },
        opset=section.opset,
        batch=section.batch,
        images=[_fill(pixels[:BATCH], section.batch)] if len(pixels) else [],
        seed=job.recipe.seed,
    )
    return _save_model(job, proto, output)


def import_model(job: Job, path: Path, preprocess: Preprocess, output: Path | None = None) -> Path:
    """A foreign ONNX file -> FP32 ONNX in normal form, its output compared with the original's."""
    from edgeres.foreign import import_onnx

    section = job.recipe.model
    pixels = sample_images(job, preprocess)[:BATCH]
    images = [_fill(pixels, section.batch)] if len(pixels) else []
    proto = import_onnx(path, preprocess, opset=section.opset, batch=section.batch, images=images, seed=job.recipe.seed)
    return _save_model(job, proto, output)


def _save_model(job: Job, proto: Any, output: Path | None) -> Path:
    path = output or job.fp32
    graph.save(proto, path)
    parity = {k: p for k, p in graph.metadata(proto)["parity"].items() if p}
    measured = [f"{'exact' if p['db'] is None else str(round(p['db'])) + ' dB'} on {k}" for k, p in parity.items()]
    largest = max(p["max_abs"] for p in parity.values())
    say(f"wrote {job.show(path)}: parity {', '.join(measured)}, largest difference {largest:.1e}")
    return path


def preprocess_like(recipe: Recipe, like: str | None, default: bool = False) -> Preprocess:
    """The preprocessing named by ``like`` (a preset, or an ONNX file made by edgeres), under what the recipe says.

    Without ``like`` the recipe must say it, unless ``default`` lets torchvision's stand.
    """
    from edgeres.images import PRESETS

    if like is None:
        if default or "preprocess" in recipe.said:
            return recipe.preprocess
        raise UsageError(
            "how images are prepared for this model is not known",
            hint=f"give --like with one of {', '.join(PRESETS)} or an ONNX file made by edgeres, or write [preprocess]",
        )
    if like.endswith(".onnx"):
        model = graph.load(Path(like))
        if "preprocess" not in graph.metadata(model):
            raise InputError(f"{like} does not say how its images are prepared", hint="give a file made by edgeres")
        return with_defaults(recipe, _preprocess(model))
    one_of("preprocessing", like, tuple(PRESETS))
    return with_defaults(recipe, PRESETS[like])


def sample_images(job: Job, preprocess: Preprocess) -> np.ndarray:
    """A few calibration images (n, 3, crop, crop) to check a model on; none where no image set is named."""
    source = job.recipe.calibration.images
    if source is None or source.endswith(".json"):
        return np.zeros((0, 3, preprocess.crop, preprocess.crop), np.float32)
    images = open_images(source).subset(SAMPLE, job.recipe.seed)
    return np.concatenate([b.pixels for b in Loader(images, preprocess, BATCH, job.skip_bad)])


def _fill(pixels: np.ndarray, batch: int | None) -> np.ndarray:
    """``pixels`` at a model's fixed batch size, if it has one: cut, or repeated until full."""
    return pixels if batch is None else np.resize(pixels, (batch, *pixels.shape[1:]))


def _refuse(job: Job, message: str, hint: str, evidence: str = "") -> None:
    """Raise `InputError`, or with --force only say so."""
    if not job.force:
        raise InputError(message, evidence=evidence, hint=f"{hint}; --force goes on all the same")
    say(f"forced: {message}")


def ensure_model(job: Job) -> Path:
    """The FP32 model, exported if it is missing or was made from something else."""
    if job.model is not None:
        return job.model
    if reason := _why_export(job):
        say(f"export {job.show(job.fp32)} ({reason})")
        return export(job)
    return job.fp32


def _why_export(job: Job) -> str | None:
    """What speaks against the FP32 model that is there. Only what a file or a flag said counts, not defaults."""
    if not job.fp32.is_file():
        return "missing"
    have, recipe = _recorded(job.fp32), job.recipe
    said, prepared = recipe.said.get("model", {}), recipe.said.get("preprocess", {})
    changed = [k for k in said if k != "weights" and have.get(k) != getattr(recipe.model, k)]
    record = json.loads(to_json(recipe.preprocess.to_json()))
    changed += [f"preprocess.{k}" for k in prepared if have.get("preprocess", {}).get(k) != record[k]]
    if "weights" in said:
        source, recorded = Path(recipe.model.weights), have.get("weights", {})
        same = (
            sha256_file(source) == recorded.get("sha256") if source.is_file() else source.name == recorded.get("source")
        )
        changed += [] if same else ["weights"]
    return f"made with another {' and '.join(changed)}" if changed else None


def calibration_images(job: Job) -> ImageSet:
    """The images that the recipe names for calibration."""
    section = job.recipe.calibration
    if section.images is None:
        raise UsageError(
            "INT8 needs calibration images, and none are named",
            hint='give --calibration DIR, or write images = "DIR" under [calibration] in edgeres.toml',
        )
    images = open_images(section.images).subset(section.limit, job.recipe.seed)
    if len(images) < 2:
        say("one calibration image tells nothing about ranges; a few hundred do")
    return images


def calibrate_model(job: Job, output: Path | None = None) -> Path:
    """FP32 ONNX + images -> range table, measured anew."""
    images = calibration_images(job)
    return make_table(job, graph.load(ensure_model(job)), images, Manifest.of(images), output)


def make_table(job: Job, model: Any, images: ImageSet, manifest: Manifest, output: Path | None = None) -> Path:
    """Calibrate ``model`` on ``images`` -> range table, with the manifest of the images beside it."""
    preprocess = _preprocess(model)
    loader = Loader(images, preprocess, BATCH, job.skip_bad)
    made_from = {"model": graph.digest(model), "images": manifest.digest(), "preprocess": preprocess.digest()}
    table = calibrate(model, track(loader, "calibrate", len(loader)), made_from)
    table.skipped = [path for path, _ in loader.skipped]
    _report_skipped(loader)
    path = output or job.table
    with atomic(path.with_suffix(".txt")) as temporary:
        temporary.write_text(manifest.to_text(), encoding="utf-8", errors="surrogateescape")
    table.save(path)
    say(f"wrote {job.show(path)}: {len(table.tensors)} tensors over {table.images} images")
    return path


def ensure_table(job: Job, model: Any) -> tuple[Path, RangeTable]:
    """The range table: the one given, the one that is there, or a new one."""
    source = job.recipe.calibration.images
    if source is not None and source.endswith(".json"):
        table = RangeTable.load(Path(source))
        table.require({"model": graph.digest(model), "preprocess": _preprocess(model).digest()})
        return Path(source), table
    images = calibration_images(job)
    manifest = Manifest.of(images)
    made_from = {"model": graph.digest(model), "images": manifest.digest(), "preprocess": _preprocess(model).digest()}
    reason = "missing"
    if job.table.is_file():
        try:
            table = RangeTable.load(job.table)
            table.require(made_from)
            return job.table, table
        except (InputError, StaleError) as error:
            reason = error.cause
    say(f"calibrate {job.show(job.table)} ({reason})")
    path = make_table(job, model, images, manifest)
    return path, RangeTable.load(path)


def quantize_model(job: Job, output: Path | None = None) -> Path:
    """FP32 ONNX -> typed ONNX for the recipe's precision and target."""
    engine = job.recipe.engine
    target = load_target(engine.target, engine.precision)
    fp32 = ensure_model(job)
    model = graph.load(fp32)
    record = graph.normal_form(model, fp32)
    path = output or job.folder / "model.onnx"
    made: dict[str, Any] = {"model": graph.digest(model)}
    if engine.precision == "int8":
        table_path, table = ensure_table(job, model)
        scheme, method = scheme_for(target), job.recipe.calibration.method
        made["quantization"] = {
            "scheme": scheme.name,
            "method": method,
            "weight_bits": scheme.weight_bits,
            "table": sha256_file(table_path),
            "images": table.images,
        }
    if path.is_file() and _recorded(path) == {**record, **made, "precision": engine.precision}:
        say(f"{job.show(path)} is up to date")
        return path
    if engine.precision == "int8":
        typed = quantize.int8(model, table, scheme, method)
    else:
        typed = quantize.fp16(model) if engine.precision == "fp16" else model
    graph.set_metadata(typed, {**record, **made, "precision": engine.precision})
    graph.save(typed, path)
    say(
        f"wrote {job.show(path)}: {engine.precision}"
        + (f", {method}, scheme {scheme.name}" if "quantization" in made else "")
    )
    return path


def ensure_engine(job: Job, output: Path | None = None) -> build.Engine:
    """The engine for the recipe's precision and target, with everything it is made from."""
    name = job.recipe.engine.target
    target = load_target(name, job.recipe.engine.precision)
    typed = quantize_model(job)
    folder = output or job.folder
    try:
        engine = build.Engine.load(folder)
        version = need(target.executor, "onnx").__version__
        if (
            engine.record["made_from"]["onnx"] == sha256_file(typed)
            and engine.record["built_with"][target.executor] == version
        ):
            say(f"{job.show(folder)} is up to date")
            return engine
    except (InputError, StaleError, KeyError):
        pass
    engine = build.build(typed, folder, name, target)
    say(f"built {job.show(engine.path)}: {engine.record['size_bytes'] / 1e6:.1f} MB")
    for note in engine.record["fusion"]["notes"]:
        say(f"note: {note}")
    return engine


def validate_engines(job: Job, engines: list[build.Engine]) -> list[dict[str, Any]]:
    """Engines against the FP32 baseline on the recipe's validation images -> one result each, written beside each."""
    section = job.recipe.validation
    if section.images is None:
        raise UsageError(
            "no validation images are named",
            hint='give --data DIR, or write images = "DIR" under [validation] in edgeres.toml',
        )
    fp32 = ensure_model(job)
    model = graph.load(fp32)
    record = graph.normal_form(model, fp32)
    preprocess = _preprocess(model)
    for engine in engines:
        if (
            engine.record["made_from"]["model"] != graph.digest(model)
            or engine.record["preprocess"] != record["preprocess"]
        ):
            raise StaleError(
                f"{job.show(engine.path)} was built from another model than {job.show(fp32)}",
                hint="build it again, or name its FP32 model with --model",
            )
    images = open_images(section.images, section.labels)
    if images.classes and len(images.classes) != record["classes"]:
        raise InputError(
            f"the model has {record['classes']} classes, {section.images} has {len(images.classes)}",
            hint="give --labels FILE with one class name per line, in the model's order",
        )
    images = images.subset(section.limit, job.recipe.seed)
    manifest = Manifest.of(images)
    _refuse_overlap(job, manifest)
    loader = Loader(images, preprocess, BATCH, job.skip_bad)
    names = [engine.path.parent.name for engine in engines]
    runners: dict[str, Runner] = {}
    try:
        baseline = runners["baseline"] = open_runner(fp32, "onnxruntime")
        runners |= {name: engine.open() for name, engine in zip(names, engines, strict=True)}
        batches = track(loader, "validate", len(loader))
        comparisons = validate.compare(baseline, {n: runners[n] for n in names}, batches)
        _report_skipped(loader)
        probe = next(iter(Loader(images, preprocess, 1, skip_bad=True))).pixels
        times = benchmark.latency(runners, probe)
    finally:
        for runner in runners.values():
            runner.close()
    latencies = {n: benchmark.summary(t, len(probe)) for n, t in times.items()}
    results = []
    for name, engine in zip(names, engines, strict=True):
        sides = [
            {"latency_ms": latencies["baseline"], "size_bytes": fp32.stat().st_size},
            {"latency_ms": latencies[name], "size_bytes": engine.record["size_bytes"]},
        ]
        digests = {"model": graph.digest(model), "images": manifest.digest(), "weights": record["weights"]}
        comparison, budget = comparisons[name], job.recipe.budget.max_drop
        result = report.result(job.stem, engine.record, comparison, sides, budget, loader.skipped, digests)
        write_json(engine.path.parent / "result.json", result)
        results.append(result)
    return results


def _refuse_overlap(job: Job, validation: Manifest) -> None:
    """An engine judged on the images it was calibrated on looks better than it is."""
    if not job.manifest.is_file():
        return
    calibration = Manifest.from_text(job.manifest.read_text(encoding="utf-8", errors="surrogateescape"))
    if shared := set(calibration.hashes) & set(validation.hashes):
        path = next(p for p, h in zip(validation.paths, validation.hashes, strict=True) if h in shared)
        raise InputError(
            f"{len(shared)} validation images are calibration images too",
            evidence=f"the first is {path}, listed in {job.show(job.manifest)}",
            hint="calibrate on images of the training split",
        )


def _preprocess(model: Any) -> Preprocess:
    return Preprocess.from_json(graph.metadata(model)["preprocess"])


def _recorded(path: Path) -> dict[str, Any]:
    """edgeres' metadata of an ONNX file; {} if it cannot be read, so that it is made again."""
    try:
        return graph.metadata(graph.load(path))
    except InputError:
        return {}


def _report_skipped(loader: Loader) -> None:
    for path, reason in loader.skipped:
        say(f"skipped {path}: {reason}")
