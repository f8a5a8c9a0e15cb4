"""The whole flow on one screen. Each step makes its artifact, or says why the one that is there will do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeres import benchmark, build, calibration_cache, equalize, graph, report, tune, validate
from edgeres.baseline import ensure_model, preprocess_of, recorded, sample_images
from edgeres.calibrate import RangeTable, calibrate
from edgeres.data import ImageSet, Manifest
from edgeres.errors import BuildError, InputError, StaleError, UsageError
from edgeres.files import atomic, sha256_file, write_json
from edgeres.fp16 import fp16, magnitudes
from edgeres.interface import interface
from edgeres.job import BATCH, Job
from edgeres.layouts import open_images
from edgeres.lint import require_clean
from edgeres.loader import Loader
from edgeres.progress import busy, say, track
from edgeres.quantize import Scheme, float_operators
from edgeres.recipe import AUTO
from edgeres.runners import Runner, executor, open_runner
from edgeres.targets import Target, load_target, scheme_for


def run(job: Job, precisions: tuple[str, ...]) -> list[dict[str, Any]]:
    """Weights to verdict, for each of ``precisions`` -> one result each."""
    validation_images(job)  # before the minutes that the rest takes
    engines = [ensure_engine(job.at(p)) for p in precisions]
    return validate_engines(job, engines)


def calibration_source(job: Job) -> str:
    """What the recipe names for calibration: images, or a range table."""
    if job.recipe.calibration.images is None:
        raise UsageError(
            "INT8 needs calibration images, and none are named",
            hint='give --calibration DIR, or write images = "DIR" under [calibration] in edgeres.toml',
        )
    return job.recipe.calibration.images


def calibration_images(job: Job) -> ImageSet:
    """The images that the recipe names for calibration."""
    images = open_images(calibration_source(job)).subset(job.recipe.calibration.limit, job.recipe.seed)
    if len(images) < 2:
        say("one calibration image tells nothing about ranges; a few hundred do")
    return images


def hashed(images: ImageSet) -> Manifest:
    """The manifest of ``images``, which takes reading every file."""
    with busy(f"hash {len(images):,} images"):
        return Manifest.of(images)


def calibrate_model(job: Job, output: Path | None = None) -> Path:
    """FP32 ONNX + images -> range table, measured anew."""
    images = calibration_images(job)
    return make_table(job, graph.load(ensure_model(job)), images, hashed(images), output)


def make_table(job: Job, model: Any, images: ImageSet, manifest: Manifest, output: Path | None = None) -> Path:
    """Calibrate ``model`` on ``images`` -> range table, with the manifest of the images beside it."""
    preprocess = preprocess_of(model)
    loader = Loader(images, preprocess, BATCH, job.skip_bad)
    made_from = _inputs(job, model, manifest)
    path = output or job.table
    exponents = {}
    if job.recipe.calibration.equalize:
        few = Loader(images.take(range(min(equalize.IMAGES, len(images)))), preprocess, BATCH, job.skip_bad)
        exponents = equalize.measure(model, track(few, "even out channels", len(few)))
        model = equalize.equalize(model, exponents)
    table = calibrate(model, loader, made_from, path.with_name(path.name + ".part"))
    table.exponents = exponents
    _report_skipped(loader)
    with atomic(path.with_suffix(".txt")) as temporary:
        temporary.write_text(manifest.to_text(), encoding="utf-8", errors="surrogateescape")
    table.save(path)
    say(f"wrote {job.show(path)}: {len(table.tensors)} tensors over {table.images} images")
    return path


def _inputs(job: Job, model: Any, manifest: Manifest) -> dict[str, str]:
    """What a range table is made from."""
    return {
        "model": graph.digest(model),
        "images": manifest.digest(),
        "preprocess": preprocess_of(model).digest(),
        "channels": "evened out" if job.recipe.calibration.equalize else "as they are",
    }


def ensure_table(job: Job, model: Any) -> tuple[Path, RangeTable]:
    """The range table: the one given, the one that is there, or a new one."""
    source = calibration_source(job)
    if source.endswith(".json"):
        table = RangeTable.load(Path(source))
        table.require({"model": graph.digest(model), "preprocess": preprocess_of(model).digest()})
        return Path(source), table
    images = calibration_images(job)
    manifest = hashed(images)
    made_from = _inputs(job, model, manifest)
    reason = "missing"
    if job.table.is_file():
        try:
            table = RangeTable.load(job.table)
            if (was := table.made_from.get("channels")) != made_from["channels"]:
                raise StaleError(f"its channels are {was}, and are to be {made_from['channels']}")
            table.require(made_from)
            return job.table, table
        except (InputError, StaleError) as error:
            reason = error.cause
    say(f"calibrate {job.show(job.table)} ({reason})")
    path = make_table(job, model, images, manifest)
    return path, RangeTable.load(path)


def quantize_model(job: Job, output: Path | None = None) -> Path:
    """FP32 ONNX -> typed ONNX for the recipe's precision, target and interface."""
    engine = job.recipe.engine
    target = load_target(engine.target, engine.precision)
    if engine.precision == "int8" and target.scheme == "implicit" and engine.io != "fp32":
        raise UsageError(
            f"{engine.target} takes INT8 engines with --io fp32 only",
            hint="its calibration cache names the network's tensors, and others would come between",
        )
    if engine.precision == "int8":
        calibration_source(job)  # before the minutes that an export may take
    fp32 = ensure_model(job)
    model = graph.load(fp32)
    record = graph.normal_form(model, fp32)
    path = output or job.folder / "model.onnx"
    asked = {**record, "model": graph.digest(model), "precision": engine.precision, "io": engine.io}
    if engine.precision == "int8":
        table_path, table = ensure_table(job, model)
        scheme = scheme_for(target)
        asked["quantization"] = {
            "scheme": scheme.name,
            "method": job.recipe.calibration.method,
            "weight_bits": scheme.weight_bits,
            "rest": scheme.rest,
            "table": sha256_file(table_path),
            "images": table.images,
        }
    complete = path.is_file() and (target.scheme != "implicit" or path.with_suffix(".cache").is_file())
    have = recorded(path) if complete else {}
    if {k: v for k, v in have.items() if k not in MEASURED} == asked:
        say(f"{job.show(path)} is up to date")
        return path
    measured: dict[str, Any] = {}
    if engine.precision == "int8":
        typed, measured["chosen"] = _int8(job, model, table, scheme, path, target)
    else:
        typed = fp16(model, _magnitudes(job, model)) if engine.precision == "fp16" else model
    if kept := graph.metadata(typed).get("kept_fp32"):
        measured["kept_fp32"] = kept
    typed = interface(typed, engine.io, preprocess_of(model))
    graph.set_metadata(typed, {**asked, **measured})
    graph.save(typed, path)
    chosen = measured.get("chosen")
    how = f", {chosen['method']}, scheme {scheme.name}" if chosen else ""
    held = chosen and chosen["held_out"]
    close = f": {held['sqnr_db']:.1f} dB, {held['agreement']:.1f}% as FP32 on {held['images']} images" if held else ""
    say(f"wrote {job.show(path)}: {engine.precision}{how}{close}")
    return path


MEASURED = ("chosen", "kept_fp32")
"""What a typed model records beside what was asked for."""


def _int8(
    job: Job, model: Any, table: RangeTable, scheme: Scheme, path: Path, target: Target
) -> tuple[Any, dict[str, Any]]:
    """The quantized model for ``scheme``, and a record of how it was chosen."""
    if stay := float_operators(model):
        say(f"in {scheme.rest.upper()}: {', '.join(f'{n} {op}' for op, n in stay.items())}, which INT8 does not cover")
    method = job.recipe.calibration.method
    held = held_out(job, model)
    if held is None and method == AUTO:
        raise UsageError("auto measures fidelity on images, and only a range table is given", hint="give --method mse")
    choice = tune.choose(model, table, scheme, method, held)
    tried = {name: vars(fidelity) for name, fidelity in choice.tried.items()}
    record = {"method": choice.method, "kept": choice.kept, "held_out": tried.get(choice.method), "tried": tried}
    if scheme.name == "implicit":
        scales = calibration_cache.scales(model, table, choice.method, choice.kept)
        text = calibration_cache.write(scales, target.tensorrt or "")
        with atomic(path.with_suffix(".cache")) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return equalize.equalize(model, table.exponents), record
    require_clean(choice.model, scheme)
    if scheme.rest != "fp16":
        return choice.model, record
    typed = fp16(choice.model, _magnitudes(job, equalize.equalize(model, table.exponents)))
    if held:  # the methods were compared before; this is the file that is written
        found = held.fidelity(typed)
        record["held_out"] = vars(found)
        if found.collapsed:
            raise BuildError(
                f"with the rest in FP16, INT8 does not hold what FP32 computes: {found}",
                evidence=f"{choice.method} with the rest in FP32: {choice.tried[choice.method]}",
                hint="build with --precision fp32",
            )
    return typed, record


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
    return tune.Held(model, Loader(rest, preprocess_of(model), BATCH, skip_bad=True))


def _magnitudes(job: Job, model: Any) -> dict[str, float]:
    """What the tensors of ``model`` reach on a few calibration images, to see what would overflow FP16."""
    pixels = sample_images(job, preprocess_of(model))[:BATCH]
    if len(pixels):
        return magnitudes(model, pixels)
    say("activations not checked for FP16 overflow: that takes images; name some with --calibration")
    return {}


def ensure_engine(job: Job, output: Path | None = None) -> build.Engine:
    """The engine for the recipe's precision and target, with everything it is made from."""
    name = job.recipe.engine.target
    target = load_target(name, job.recipe.engine.precision)
    if target.scheme == "implicit":
        raise UsageError(
            f"edgeres builds no engine for {name} yet",
            hint="`edgeres quantize` writes model.onnx and model.cache, for `trtexec --int8 --calib` on the device",
        )
    tool = executor(target.executor)  # before the minutes that the rest takes
    typed = quantize_model(job)
    folder = output or job.folder
    try:
        engine = build.Engine.load(folder)
        if (
            engine.record["made_from"]["onnx"] == sha256_file(typed)
            and engine.record["built_with"][target.executor] == tool.version()
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


def _report_skipped(loader: Loader) -> None:
    for path, reason in loader.skipped:
        say(f"skipped {path}: {reason}")
