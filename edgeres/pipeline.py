"""The whole flow on one screen. Each step makes its artifact, or says why the one that is there will do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeres import benchmark, build, graph, report, validate
from edgeres.baseline import ensure_model, preprocess_of
from edgeres.data import ImageSet, Manifest
from edgeres.errors import InputError, StaleError, UsageError
from edgeres.files import sha256_file, write_json
from edgeres.job import BATCH, Job
from edgeres.layouts import open_images
from edgeres.loader import Loader
from edgeres.progress import say, track
from edgeres.ranges import calibration_images, hashed, report_skipped
from edgeres.recipe import ON_DEVICE
from edgeres.runners import Runner, executor, open_runner
from edgeres.targets import Target
from edgeres.trt.calibrator import Calibration
from edgeres.typed import quantize_model, target_of


def run(job: Job, precisions: tuple[str, ...]) -> list[dict[str, Any]]:
    """Weights to verdict, for each of ``precisions`` -> one result each."""
    validation_images(job)  # before the minutes that the rest takes
    engines = [ensure_engine(job.with_engine(precision=p)) for p in precisions]
    return validate_engines(job, engines)


def ensure_engine(job: Job, output: Path | None = None) -> build.Engine:
    """The engine for the recipe's precision and target, with everything it is made from."""
    name, target = job.recipe.engine.target, target_of(job)
    tool = executor(target.executor)  # before the minutes that the rest takes
    version = tool.version()
    if target.executor == "tensorrt" and job.recipe.engine.tensorrt is None:
        job = job.with_engine(tensorrt=version)  # the graph is to fit the TensorRT that is here
        target = target_of(job)
    typed = quantize_model(job)
    folder = output or job.folder
    try:
        engine = build.Engine.load(folder)
        engine.check_gpu()
        made_from, built_with = engine.record["made_from"], engine.record["built_with"]
        asked = engine.record.get("asked", {})
        if (made_from["onnx"], built_with[target.executor], asked) == (sha256_file(typed), version, target.asked):
            say(f"{job.show(folder)} is up to date")
            return engine
    except (InputError, StaleError, KeyError):
        pass
    engine = build.build(typed, folder, name, target, calibration(job, typed, target))
    say(f"built {job.show(engine.path)}: {engine.record['size_bytes'] / 1e6:.1f} MB")
    for note in engine.record["fusion"]["notes"]:
        say(f"note: {note}")
    return engine


def calibration(job: Job, typed: Path, target: Target) -> Calibration | None:
    """What implicit INT8 takes its ranges from: the cache beside the graph, or the images."""
    if job.recipe.engine.precision != "int8" or not target.implicit:
        return None
    method = job.recipe.calibration.method
    if method not in ON_DEVICE:
        return Calibration(cache=typed.with_suffix(".cache").read_text(encoding="utf-8"))
    loader = Loader(calibration_images(job), preprocess_of(graph.load(typed)), BATCH, job.skip_bad)
    algorithm = method.removeprefix("tensorrt-")
    return Calibration(batches=lambda: (b.pixels for b in loader), batch_size=BATCH, algorithm=algorithm)


def validation_images(job: Job, classes: int | None = None) -> ImageSet:
    """The images that the recipe names for validation; ``classes`` is the model's number, if known."""
    section = job.recipe.validation
    if section.images is None:
        raise UsageError(
            "no validation images are named",
            hint='give --data DIR, or write images = "DIR" under [validation] in edgeres.toml',
        )
    return open_images(section.images, section.labels, classes)


def validate_engines(job: Job, engines: list[build.Engine]) -> list[dict[str, Any]]:
    """Engines against the FP32 baseline on the recipe's validation images -> one result each, written beside each."""
    fp32 = ensure_model(job)
    model = graph.load(fp32)
    record = graph.normal_form(model, fp32)
    preprocess = preprocess_of(model)
    for engine in engines:
        if (
            engine.record["made_from"]["model"] != graph.digest(model)
            or engine.record["preprocess"] != record["preprocess"]
        ):
            raise StaleError(
                f"{job.show(engine.path)} was built from another model than {job.show(fp32)}",
                hint="build it again, or name its FP32 model with --model",
            )
    images = validation_images(job, record["classes"])
    if images.classes and len(images.classes) != record["classes"]:
        raise InputError(
            f"the model has {record['classes']} classes, {images.root} has {len(images.classes)}",
            hint="give --labels FILE with one class name per line, in the model's order",
        )
    images = images.subset(job.recipe.validation.limit, job.recipe.seed)
    manifest = hashed(images)
    _refuse_overlap(job, manifest)
    loader = Loader(images, preprocess, BATCH, job.skip_bad)
    names = [engine.path.parent.name for engine in engines]
    runners: dict[str, Runner] = {}
    try:
        baseline = runners["baseline"] = open_runner(fp32, "onnxruntime")
        runners |= {name: engine.open() for name, engine in zip(names, engines, strict=True)}
        batches = track(loader, "validate", len(loader))
        comparisons = validate.compare(baseline, {n: runners[n] for n in names}, batches)
        report_skipped(loader)
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
        result = report.result(
            job.stem, engine.record, comparison, sides, budget, [*images.left_out, *loader.skipped], digests
        )
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
