"""The range table of a job: the one given, the one that is there, or one measured anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeres import equalize, graph
from edgeres.baseline import ensure_model, preprocess_of
from edgeres.calibrate import RangeTable, calibrate
from edgeres.data import ImageSet, Manifest
from edgeres.errors import InputError, StaleError, UsageError
from edgeres.files import atomic, refuse_replacing, require_writable
from edgeres.job import BATCH, Job
from edgeres.layouts import open_images
from edgeres.loader import Loader
from edgeres.progress import busy, say, track


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
    if output:
        if output.suffix != ".json":  # which is how a recipe tells a table from images
            raise UsageError(f"{output} is no name for a range table", hint=f"such as {output.with_suffix('.json')}")
        require_writable(output)
    images = calibration_images(job)
    fp32 = ensure_model(job)
    model = graph.load(fp32)
    graph.normal_form(model, fp32)
    return make_table(job, model, images, hashed(images), output)


def make_table(job: Job, model: Any, images: ImageSet, manifest: Manifest, output: Path | None = None) -> Path:
    """Calibrate ``model`` on ``images`` -> range table, with the manifest of the images beside it."""
    preprocess = preprocess_of(model)
    loader = Loader(images, preprocess, BATCH, job.skip_bad)
    made_from = _inputs(job, model, manifest)
    path = output or job.table
    refuse_replacing(path.with_suffix(".txt"), Path(calibration_source(job)))  # which may be a list of images
    exponents = {}
    if job.recipe.calibration.equalize:
        few = Loader(images.take(range(min(equalize.IMAGES, len(images)))), preprocess, BATCH, job.skip_bad)
        exponents = equalize.measure(model, track(few, "even out channels", len(few)))
        model = equalize.equalize(model, exponents)
    table = calibrate(model, loader, made_from, path.with_name(path.name + ".part"))
    table.exponents = exponents
    report_skipped(loader)
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


def report_skipped(loader: Loader) -> None:
    """Say which images were left out."""
    for path, reason in loader.skipped:
        say(f"skipped {path}: {reason}")
