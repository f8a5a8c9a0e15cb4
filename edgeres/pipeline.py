"""The whole flow on one screen. Each step makes its artifact, or says why the one that is there will do."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeres import build, devices, graph, lineup, machine, validate, verdict
from edgeres.answers import About, Answers
from edgeres.baseline import ensure_model, preprocess_of
from edgeres.benchmark import Plan
from edgeres.data import ImageSet, Manifest
from edgeres.errors import BuildError, InputError, MissingDependency, StaleError, UsageError
from edgeres.files import sha256_file, write_json
from edgeres.job import BATCH, Job
from edgeres.layouts import open_images
from edgeres.loader import Loader
from edgeres.outcomes import beside
from edgeres.progress import say
from edgeres.ranges import calibration_images, hashed
from edgeres.recipe import ON_DEVICE
from edgeres.result import measured
from edgeres.result import result as make_result
from edgeres.runners import executor, open_runner
from edgeres.targets import Target
from edgeres.trt.calibrator import Calibration
from edgeres.typed import quantize_model, target_of
from edgeres.validate import Network, Shard
from edgeres.verdict import Accepted


def run(job: Job, precisions: tuple[str, ...]) -> list[dict[str, Any]]:
    """Weights to verdict, for each of ``precisions`` -> one result each."""
    validation_images(job)  # before the minutes that the rest takes
    engines = [ensure_engine(job.with_engine(precision=p)) for p in precisions]
    return validate_engines(job, engines)


def ensure_engine(job: Job, output: Path | None = None) -> build.Engine:
    """The engine for the recipe's precision and target, with everything it is made from."""
    name, target = job.recipe.engine.target, target_of(job)
    version = installed(name, target)  # before the minutes that the rest takes
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


def installed(name: str, target: Target) -> str:
    """Version of the executor that builds for ``target`` here. Raises what keeps it from being built here."""
    there = f"`edgeres quantize --target {name}` works here; this command belongs on the device"
    try:
        version = executor(target.executor).version()
    except MissingDependency as error:
        if target.capability is None:
            raise
        raise BuildError(f"no engine for {name} can be built here", evidence=str(error.cause), hint=there) from error
    found = devices.gpus()
    if target.capability and found and found[0].capability != target.capability:
        raise BuildError(
            f"{name} is for compute capability {target.capability}",
            evidence=f"{found[0].name} here has {found[0].capability}",
            hint=there,
        )
    return version


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


def validate_engines(job: Job, engines: list[build.Engine], shard: Shard | None = None) -> list[dict[str, Any]]:
    """Engines against the FP32 baseline on the recipe's validation images -> one result each, written beside each.

    A run that was cut short goes on. A ``shard`` is neither timed nor judged; `merge` makes one result of all of them.
    """
    fp32 = ensure_model(job)
    model = graph.load(fp32)
    record = graph.normal_form(model, fp32)
    preprocess = preprocess_of(model)
    network = graph.digest(model)  # takes a while: once
    _refuse_other_models(job, engines, fp32, network, record["preprocess"])
    images = _images_to_judge(job, record["classes"])
    manifest = hashed(images)
    _refuse_overlap(job, engines, manifest)
    accepted = [_accepted(job, engine) for engine in engines]  # before the minutes that the rest takes
    digests = {"model": network, "images": manifest.digest(), "weights": record["weights"]}
    about = About(
        network=network,
        executor="onnxruntime",
        version=executor("onnxruntime").version(),
        preprocess=preprocess.digest(),
        manifest=digests["images"],
        read_by={package: version for package, version in machine.versions("pillow").items() if package != "python"},
        images=len(images),
        classes=record["classes"],
        batch=BATCH,
    )
    batches = validate.grid(about, shard)
    root = job.root / "engines" / "out" / "answers"
    with ExitStack() as stack:
        keep = stack.enter_context
        baseline = Network("the FP32 baseline", keep(open_runner(fp32, "onnxruntime")), keep(Answers(root, about)))
        networks = [
            Network(f"engine {e.path.parent.name}", keep(e.open()), keep(Answers(root, _about(about, e, shard))))
            for e in engines
        ]
        bad = validate.answer([baseline, *networks], images, preprocess, batches, job.skip_bad)
        rows = [validate.outcomes(baseline.answers, each.answers, images, batches) for each in networks]
        for place in sorted({place for found in rows for place in found.skipped.tolist()}):
            say(f"skipped {images.paths[place]}: {bad.get(place, validate.UNREADABLE)}")
    times = lineup.run(job, engines, Plan()) if shard is None else None
    results = []
    for i, (engine, found) in enumerate(zip(engines, rows, strict=True)):
        path = engine.path.with_name(f"result-{shard.index}of{shard.of}.json" if shard else "result.json")
        result = make_result(
            job.stem,
            engine.record,
            measured(found, images.paths.__getitem__, dict(enumerate(images.classes)).get),
            verdict.judge(job.recipe.budget, accepted[i], found, digests["images"], whole=shard is None),
            [
                {"latency_ms": lineup.of_baseline(times), "size_bytes": fp32.stat().st_size},
                {"latency_ms": lineup.of_engine(times, engine), "size_bytes": engine.record["size_bytes"]},
            ],
            [*(path for path, _ in images.left_out), *(images.paths[place] for place in found.skipped)],
            {**digests, "outcomes": found.save(beside(path))},
            len(images),
            shard,
            times,
        )
        write_json(path, result)
        networks[i].answers.remove()  # those of the baseline stay, for the next engine
        results.append(result)
    return results


def _refuse_other_models(
    job: Job, engines: list[build.Engine], fp32: Path, network: str, preprocess: dict[str, Any]
) -> None:
    """An engine can be compared with the model that it was built from, with digest ``network``, and with no other."""
    for engine in engines:
        if engine.record["made_from"]["model"] != network or engine.record["preprocess"] != preprocess:
            raise StaleError(
                f"{job.show(engine.path)} was built from another model than {job.show(fp32)}",
                hint="build it again, or name its FP32 model with --model",
            )


def _images_to_judge(job: Job, classes: int) -> ImageSet:
    """The validation images as far as the recipe's limit goes, fit for a model of so many ``classes``."""
    images = validation_images(job, classes)
    if images.classes and len(images.classes) != classes:
        raise InputError(
            f"the model has {classes} classes, {images.root} has {len(images.classes)}",
            hint="give --labels FILE with one class name per line, in the model's order",
        )
    images = images.subset(job.recipe.validation.limit, job.recipe.seed)
    validate.check_labels(images.labels, classes)
    if images.labels is None:
        say("the images have no labels: fidelity is measured, accuracy is not")
    return images


def _accepted(job: Job, engine: build.Engine) -> Accepted | None:
    """The result that ``engine`` is not to fall behind, if the recipe names one."""
    path = job.recipe.budget.accepted
    return Accepted.load(Path(path), job.show(Path(path)), engine.record) if path else None


def _about(baseline: About, engine: build.Engine, shard: Shard | None) -> About:
    """What an engine's answers depend on. They go with its result, so those of a shard are its own."""
    name = engine.record["executor"]
    own = {"network": engine.record["sha256"], "executor": name, "version": executor(name).version()}
    return replace(baseline, **own, shard=str(shard) if shard else None)


def _refuse_overlap(job: Job, engines: list[build.Engine], validation: Manifest) -> None:
    """An engine judged on the images it was calibrated on looks better than it is."""
    # TensorRT's own calibrators make no table: their images are listed beside the graph
    for listed in (job.manifest, *(engine.path.with_name("model.txt") for engine in engines)):
        if not listed.is_file():
            continue
        calibration = Manifest.from_text(listed.read_text(encoding="utf-8", errors="surrogateescape"))
        if shared := set(calibration.hashes) & set(validation.hashes):
            path = next(p for p, h in zip(validation.paths, validation.hashes, strict=True) if h in shared)
            raise InputError(
                f"{len(shared)} validation images are calibration images too",
                evidence=f"the first is {path}, listed in {job.show(listed)}",
                hint="calibrate on images of the training split",
            )
