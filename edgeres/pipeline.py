"""The whole flow on one screen. Each step makes its artifact, or says why the one that is there will do."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeres import build, graph, lineup, machine, validate, verdict
from edgeres.answers import About, Answers
from edgeres.baseline import ensure_model, preprocess_of
from edgeres.benchmark import Plan
from edgeres.data import ImageSet, Manifest
from edgeres.errors import InputError, StaleError, UsageError
from edgeres.files import require_writable, write_json
from edgeres.fleet import Fleet
from edgeres.job import BATCH, Job
from edgeres.layouts import open_images
from edgeres.loader import Loader
from edgeres.outcomes import beside
from edgeres.progress import say
from edgeres.ranges import calibration_images, hashed
from edgeres.recipe import ON_DEVICE, Preprocess
from edgeres.result import measured
from edgeres.result import result as make_result
from edgeres.runners import executor, open_runner
from edgeres.targets import Target
from edgeres.trt.calibrator import Calibration
from edgeres.typed import quantize_model, target_of
from edgeres.validate import Found, Network, Question, Shard
from edgeres.verdict import Accepted

COPIES = "copies of others: they count as new evidence and are none, so that intervals are too narrow"


def run(job: Job, precisions: tuple[str, ...]) -> list[dict[str, Any]]:
    """Weights to verdict, for each of ``precisions`` -> one result each."""
    validation_images(job)  # before the minutes that the rest takes
    refuse_overwriting(job, [_result_file(job.with_engine(precision=p).folder) for p in precisions])
    engines = [ensure_engine(job.with_engine(precision=p)) for p in precisions]
    return validate_engines(job, engines)


def ensure_engine(job: Job, output: Path | None = None) -> build.Engine:
    """The engine for the recipe's precision and target, with everything it is made from."""
    name, target = job.recipe.engine.target, target_of(job)
    same = f"--target {name} --precision {job.recipe.engine.precision}"
    there = "this command belongs on the device, where `edgeres doctor` says what is missing;\n"
    if target.runs_edgeres:
        there += f"here `edgeres bundle {same}` packs what `edgeres selftest` builds and judges there, and\n"
    there += f"`edgeres quantize {same}` writes the graph and prints the trtexec call"
    version = build.installed(name, target, there)  # before the minutes that the rest takes
    if target.executor == "tensorrt" and job.recipe.engine.tensorrt is None:
        job = job.with_engine(tensorrt=version)  # the graph is to fit the TensorRT that is here
        target = target_of(job)
    typed = quantize_model(job)
    folder = output or job.folder
    if engine := build.up_to_date(folder, typed, version, target):
        say(f"{job.show(folder)} is up to date")
        return engine
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


def validate_engines(
    job: Job, engines: list[build.Engine], shard: Shard | None = None, fleet: Fleet | None = None
) -> list[dict[str, Any]]:
    """Engines against the FP32 baseline on the recipe's validation images -> one result each, written beside each.

    A run that was cut short goes on. A ``shard`` is neither timed nor judged; `merge` makes one result of all of them.
    A ``fleet`` of machines gives the result that this one would have given, and is not timed.
    """
    files = [_result_file(engine.path.parent, shard) for engine in engines]
    refuse_overwriting(job, files)
    for file in files:
        require_writable(
            file, "results lie beside the engine: copy its folder to a disk where you may write, with room"
        )
    if timed := shard is None and fleet is None:
        lineup.refuse_twins(engines)
    fp32 = ensure_model(job)
    model = graph.load(fp32)
    record = graph.normal_form(model, fp32)
    network = graph.digest(model)  # takes a while: once
    _refuse_other_models(job, engines, fp32, network, record["preprocess"])
    images = images_to_judge(job, record["classes"])
    accepted = [_accepted(job, engine) for engine in engines]  # before the minutes that the rest takes
    calibrated = calibrated_on(job, engines)
    question = Question(
        fp32, network, record["classes"], preprocess_of(model), engines, images, calibrated, job.skip_bad
    )
    found = fleet.find(question) if fleet else _find(job, question, shard)
    for place in sorted({place for rows in found.rows for place in rows.skipped.tolist()}):
        say(f"skipped {images.paths[place]}: {found.bad.get(place, validate.UNREADABLE)}")
    times = lineup.run(job, engines, Plan(tail=False)) if timed else None
    digests = {"model": network, "images": found.digest, "weights": record["weights"]}
    notes = [f"{found.copies:,} of {len(images):,} images are {COPIES}"] if found.copies else []
    results = []
    for i, (engine, rows) in enumerate(zip(engines, found.rows, strict=True)):
        path = _result_file(engine.path.parent, shard)
        result = make_result(
            job.stem,
            engine.record,
            measured(rows, images.paths.__getitem__, dict(enumerate(images.classes)).get),
            verdict.judge(job.recipe.budget, accepted[i], rows, digests["images"], whole=shard is None),
            [
                {**lineup.of_baseline(times, engine), "size_bytes": fp32.stat().st_size},
                {**lineup.of_engine(times, engine), "size_bytes": engine.record["size_bytes"]},
            ],
            [*(path for path, _ in images.left_out), *(images.paths[place] for place in rows.skipped)],
            {**digests, "outcomes": rows.save(beside(path))},
            len(images),
            shard,
            times,
        )
        result["notes"] = [*result["notes"], *notes]
        if found.fleet:
            result["provenance"]["fleet"] = found.fleet
        write_json(path, result)
        results.append(result)
    for store in found.stores:
        store.remove()
    return results


def _find(job: Job, question: Question, shard: Shard | None) -> Found:
    """Answer ``question``, or a shard of it, on this machine. Answers of the FP32 model stay, for the next engine."""
    images = question.images
    manifest = hashed(images)
    question.refuse_overlap(manifest.hashes)
    about = about_fp32(question.network, question.preprocess, manifest.digest(), len(images), question.classes)
    batches = validate.grid(len(images), BATCH, shard)
    abouts = [about, *(_about(about, engine, shard) for engine in question.engines)]
    root = job.root / "engines" / "out" / "answers"
    with ExitStack() as stack:
        keep = stack.enter_context
        runners = [keep(open_runner(question.fp32, "onnxruntime"))]
        runners += [keep(engine.open()) for engine in question.engines]
        stores = [keep(Answers(root, about)) for about in abouts]
        networks = [Network(*each) for each in zip(question.names, runners, stores, strict=True)]
        bad = validate.answer(networks, images, question.preprocess, batches, question.skip_bad)
        rows = [validate.outcomes(stores[0], store, images, batches) for store in stores[1:]]
    copies = len(images) - len(set(manifest.hashes))
    return Found(rows, bad, about.manifest, stores=stores[1:], copies=copies)


def about_fp32(network: str, preprocess: Preprocess, manifest: str, images: int, classes: int) -> About:
    """What the answers of the FP32 model with digest ``network`` depend on, on images with digest ``manifest``."""
    return About(
        network=network,
        executor="onnxruntime",
        version=executor("onnxruntime").version(),
        preprocess=preprocess.digest(),
        manifest=manifest,
        read_by={package: version for package, version in machine.versions("pillow").items() if package != "python"},
        images=images,
        classes=classes,
        batch=BATCH,
    )


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


def images_to_judge(job: Job, classes: int) -> ImageSet:
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
        unmet = ", and the budget cannot be met" if job.recipe.budget.given else ""
        say(f"the images have no labels: fidelity is measured, accuracy is not{unmet}")
    return images


def _result_file(folder: Path, shard: Shard | None = None) -> Path:
    """Where the result of the engine in ``folder`` is written, or that of a shard of it."""
    return folder / (f"result-{shard.index}of{shard.of}.json" if shard else "result.json")


def refuse_overwriting(job: Job, results: list[Path]) -> None:
    """Raise `UsageError` if the accepted result is one of those that a run writes: the next would be judged by this."""
    if job.recipe.budget.accepted:
        verdict.refuse_overwriting(Path(job.recipe.budget.accepted), results, job.show)


def _accepted(job: Job, engine: build.Engine) -> Accepted | None:
    """The result that ``engine`` is not to fall behind, if the recipe names one."""
    path = job.recipe.budget.accepted
    return Accepted.load(Path(path), job.show(Path(path)), engine.record) if path else None


def _about(baseline: About, engine: build.Engine, shard: Shard | None) -> About:
    """What an engine's answers depend on. They go with its result, so those of a shard are its own."""
    name = engine.record["executor"]
    own = {"network": engine.record["sha256"], "executor": name, "version": executor(name).version()}
    return replace(baseline, **own, shard=str(shard) if shard else None)


def calibrated_on(job: Job, engines: list[build.Engine]) -> dict[str, frozenset[str]]:
    """The images that the engines were calibrated on: by the list's path, their SHA-256 digests."""
    # TensorRT's own calibrators make no table: their images are listed beside the engine
    own = [e.path for e in engines if e.record.get("quantization", {}).get("method") in ON_DEVICE]
    lists = {path for path in (job.manifest, *(path.with_name(build.LISTED) for path in own)) if path.is_file()}
    texts = {job.show(path): path.read_text(encoding="utf-8", errors="surrogateescape") for path in sorted(lists)}
    return {name: frozenset(Manifest.from_text(text).hashes) for name, text in texts.items()}
