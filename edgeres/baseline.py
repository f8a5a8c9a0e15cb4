"""The FP32 model that everything is compared with: from weights, from a foreign ONNX file, or the one that is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeres import graph
from edgeres.errors import InputError, UsageError
from edgeres.files import refuse_replacing, sha256_file, to_json
from edgeres.images import PRESETS, preset
from edgeres.job import BATCH, Job
from edgeres.layouts import open_images
from edgeres.loader import Loader
from edgeres.progress import busy, say
from edgeres.recipe import BASIC_DEPTHS, Preprocess, Recipe, with_defaults

if TYPE_CHECKING:
    from edgeres.identity import Identity
    from edgeres.weights import Checkpoint

SAMPLE = 64
"""Calibration images that a model is checked on: `identity` needs that many."""


def export(job: Job, output: Path | None = None) -> Path:
    """Weights -> FP32 ONNX; parity and variant are checked on real images where there is a calibration set."""
    from edgeres import weights  # here and below: PyTorch takes seconds to import, and only export needs it
    from edgeres.export import export_onnx

    section = job.recipe.model
    record = weights.published(section.weights, section.depth, section.variant)
    preprocess = with_defaults(job.recipe, record.preprocess) if record else job.recipe.preprocess
    path = weights.locate(section.weights, section.depth, section.variant)
    refuse_replacing(output or job.fp32, path)
    if path.suffix == ".onnx":  # published as ONNX only
        return import_model(job, path, preprocess, output, section.weights, record.license if record else None)
    with busy(f"load {path.name}"):
        checkpoint = weights.load_checkpoint(path, Path(section.weights).name)
        model = weights.load_model(checkpoint, section.variant, section.classes, section.depth)
        pixels = sample_images(job, preprocess)
    fit = check_variant(job, checkpoint, pixels)
    with busy("export, and compare with PyTorch"):
        proto = export_onnx(
            model,
            preprocess,
            {
                "depth": section.depth,
                "variant": section.variant,
                "variant_check": vars(fit) if fit else None,
                "weights": {
                    "source": checkpoint.source,
                    "sha256": checkpoint.sha256,
                    **({"license": record.license} if record else {}),
                },
            },
            opset=section.opset,
            batch=section.batch,
            images=[_fill(pixels[:BATCH], section.batch)] if len(pixels) else [],
            seed=job.recipe.seed,
        )
    return _save_model(job, proto, output)


def check_variant(job: Job, checkpoint: Checkpoint, pixels: np.ndarray) -> Identity | None:
    """Refuse a checkpoint that is of the other variant, as far as its configuration or ``pixels`` tell."""
    from edgeres.identity import identify

    section = job.recipe.model
    if section.depth in BASIC_DEPTHS:
        return None
    if checkpoint.variant not in (None, section.variant):
        message = f"config.json beside {checkpoint.source} says variant {checkpoint.variant}, not {section.variant}"
        _refuse(job, message, f"give --variant {checkpoint.variant}")
    if not len(pixels):
        say("variant not checked: that takes images; name some with --calibration")
        return None
    with busy("check the variant"):
        fit = identify(checkpoint, pixels, section.depth)
    say(f"variant: {fit}")
    if fit.variant not in (None, section.variant):
        message = f"{checkpoint.source} is of variant {fit.variant}, not {section.variant}"
        _refuse(job, message, f"give --variant {fit.variant}", str(fit))
    return fit


def import_model(
    job: Job,
    path: Path,
    preprocess: Preprocess,
    output: Path | None = None,
    source: str | None = None,
    license_: str | None = None,
) -> Path:
    """A foreign ONNX file -> FP32 ONNX in normal form, its output compared with the original's.

    ``source`` is what the user calls the weights, if not by the file's name; ``license_`` what they are under.
    """
    from edgeres.foreign import import_onnx

    refuse_replacing(output or job.fp32, path)
    section = job.recipe.model
    pixels = sample_images(job, preprocess)[:BATCH]
    images = [_fill(pixels, section.batch)] if len(pixels) else []
    with busy(f"read {path.name}, and compare with it"):
        proto = import_onnx(
            path, preprocess, opset=section.opset, batch=section.batch, images=images, seed=job.recipe.seed
        )
    record = graph.metadata(proto)
    known = {"source": source or path.name, **({"license": license_} if license_ else {})}
    graph.set_metadata(proto, {**record, "weights": {**record["weights"], **known}})
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
        return with_defaults(recipe, preprocess_of(model))
    return with_defaults(recipe, preset(like))


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
    have, recipe = recorded(job.fp32), job.recipe
    said, prepared = recipe.said.get("model", {}), recipe.said.get("preprocess", {})
    changed = [k for k in said if k != "weights" and have.get(k) != getattr(recipe.model, k)]
    record = json.loads(to_json(recipe.preprocess.to_json()))
    changed += [f"preprocess.{k}" for k in prepared if have.get("preprocess", {}).get(k) != record[k]]
    if "weights" in said:
        source, kept = Path(recipe.model.weights), have.get("weights", {})
        same = sha256_file(source) == kept.get("sha256") if source.is_file() else source.name == kept.get("source")
        changed += [] if same else ["weights"]
    return f"made with another {' and '.join(changed)}" if changed else None


def preprocess_of(model: Any) -> Preprocess:
    """The preprocessing that a model made by edgeres expects."""
    return Preprocess.from_json(graph.metadata(model)["preprocess"])


def recorded(path: Path) -> dict[str, Any]:
    """edgeres' metadata of an ONNX file; {} if it cannot be read, so that it is made again."""
    try:
        return graph.metadata(graph.load(path))
    except InputError:
        return {}
