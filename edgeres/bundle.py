"""What travels to a device: one sealed file with all that a self-test there needs, and nothing of this machine.

    manifest.json     what the rest is, and what a device without onnx cannot look up in the graph
    model.onnx        the typed model; beside it model.cache where INT8 is implicit
    images.pack       the images, preprocessed
    reference.f32     FP32's logits on them, raw little-endian float32 (images, classes)
    recipe.json       the recipe with all defaults; what it reads is named as it is called in here
    target.toml       the target
    labels.txt        class names, where there are any
    accepted.json     the accepted result, where the budget names one; its outcomes are accepted.outcomes.npz
    LICENSES.txt      whose weights and images are, as far as that is known

The same inputs give the same bytes: nothing in it tells a time, a user, a folder or a number of cores.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import edgeres
from edgeres import graph, machine, manifest, pipeline, validate
from edgeres.answers import LOGITS, Answers
from edgeres.baseline import ensure_model, preprocess_of
from edgeres.build import Engine, Typed
from edgeres.data import ImageSet
from edgeres.errors import InputError, StaleError, UsageError
from edgeres.files import alone, require_writable, to_json
from edgeres.job import BATCH, Job
from edgeres.outcomes import beside
from edgeres.pack import Pack, open_pack, write_pack
from edgeres.progress import say
from edgeres.ranges import hashed
from edgeres.recipe import ON_DEVICE, Budget, Preprocess, Recipe, from_dict, read_record
from edgeres.runners import open_runner
from edgeres.sealed import Sealed, write
from edgeres.signature import require_key
from edgeres.statistics import apart, paired
from edgeres.targets import Target
from edgeres.trt import Options
from edgeres.typed import quantize_model, target_of
from edgeres.validate import Network, Question
from edgeres.verdict import Accepted, enough

FORMAT = "edgeres bundle 1"
MANIFEST, MODEL, CACHE, PACK, REFERENCE = "manifest.json", "model.onnx", "model.cache", "images.pack", "reference.f32"
RECIPE, TARGET, LABELS, LICENSES, ACCEPTED = "recipe.json", "target.toml", "labels.txt", "LICENSES.txt", "accepted.json"
MEASURED = ("parity", "variant_check")
"""What a model says that was measured where it was exported: another number of cores gives other last digits."""
IMAGES = 256
"""In a bundle, unless told otherwise: a self-test takes seconds."""
TEXT = 16 << 20
"""Bytes of a member that is read whole and parsed, at most."""


@dataclass(frozen=True)
class Bundle:
    """A bundle that was opened: its manifest, the target it is for, as it is to be built, and the budget."""

    sealed: Sealed
    manifest: dict[str, Any]
    target: Target
    budget: Budget

    @classmethod
    def open(cls, path: Path, signed_by: Path | None = None) -> Bundle:
        """Open the file at ``path``; what is in it is checked as far as that takes no reading of large members."""
        sealed = Sealed.open(path, signed_by)
        hint = "give the file that `edgeres bundle` wrote"
        if missing := [n for n in (MANIFEST, MODEL, PACK, REFERENCE, TARGET) if n not in sealed.members]:
            raise InputError(f"{path} is no bundle", evidence=f"it holds no {', '.join(missing)}", hint=hint)
        for name in (MANIFEST, TARGET, CACHE, ACCEPTED):
            if name in sealed.members and (size := sealed.members[name].size) > TEXT:
                evidence = f"{name} has {size:,} bytes, of at most {TEXT:,}"
                raise InputError(f"{path} is no bundle", evidence=evidence, hint=hint)
        try:
            record = json.loads(sealed.read(MANIFEST))
            if record["format"] != FORMAT:
                made = record.get("made_with", {}).get("edgeres")
                raise InputError(
                    f"{path} is not of a format that this edgeres reads",
                    evidence=f"format {record['format']!r}, made with edgeres {made}; this is {edgeres.__version__}",
                    hint="use the same edgeres on both machines",
                )
            target = read_record(Target, sealed.read(TARGET).decode(), f"{TARGET} of {path}")
            target = replace(target, tensorrt=record["tensorrt"], build=from_dict(Options, record["build"]))
            Preprocess.from_json(record["typed"]["preprocess"])
            manifest.check(record)
            budget = from_dict(Budget, record["budget"])
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError, UsageError) as error:
            what = f"{type(error).__name__}: {error}"
            raise InputError(f"{path} has a damaged {MANIFEST}", evidence=what, hint=hint) from error
        return cls(sealed, record, target, budget)

    def typed(self, folder: Path) -> Typed:
        """The typed model, where the bundle was unpacked to ``folder``."""
        counts = self.manifest["graph"]
        made, digest = self.manifest["typed"], self.manifest["model"]["digest"]
        return Typed(folder / MODEL, made, digest, counts["convolutions"], counts["residuals"])


def make(
    job: Job, limit: int | None = IMAGES, sign_with: Path | None = None, output: Path | None = None
) -> dict[str, Any]:
    """Write the bundle of a job, with everything in it that is missing -> what was written.

    ``limit``: images, None for all that the recipe judges on. ``sign_with``: an SSH key (see `sealed`).
    """
    _refuse_unfit(job)
    path = output or job.folder.with_name(f"{job.folder.name}.bundle")
    require_writable(path)
    if sign_with:
        require_key(sign_with)
    most = job.recipe.validation.limit
    limit = min((n for n in (limit, most) if n is not None), default=None)
    job = replace(job, recipe=replace(job.recipe, validation=replace(job.recipe.validation, limit=limit)))
    whole = _whole(job)  # before the minutes that the rest takes
    typed = Typed.read(quantize_model(job))
    typed = replace(typed, made={key: value for key, value in typed.made.items() if key not in MEASURED})
    fp32 = ensure_model(job)
    preprocess = preprocess_of(graph.load(fp32))
    images, accepted = _images(job, typed, fp32, preprocess), _accepted(job)
    with alone(typed.path.parent, f"makes a bundle in {typed.path.parent}"):  # without locks: see StaleError below
        pack = typed.path.with_name(PACK)  # there, one that was interrupted is continued
        images = _portable(images)
        packed = write_pack(images, preprocess, pack, skip_bad=job.skip_bad)
        digest = hashed(packed).digest()
        bad = {path for path, _ in packed.skipped}
        skipped = [i for i, path in enumerate(images.paths) if path in bad]
        asked = hashed(images).digest() if skipped else digest
        with _answers(job, fp32, typed, packed, digest) as answers:
            top1 = _top1(answers, packed)
        record = {
            "format": FORMAT,
            "name": job.stem,
            "target": job.recipe.engine.target,
            "precision": job.recipe.engine.precision,
            "tensorrt": target_of(job).tensorrt,
            "build": target_of(job).asked,
            "made_with": {"edgeres": edgeres.__version__},
            "typed": typed.made,
            "graph": {"convolutions": typed.convolutions, "residuals": typed.residuals},
            "model": {"digest": typed.model, "size_bytes": len(_unmeasured(fp32))},
            "images": {
                "count": len(packed),
                "asked": len(images),
                "of": whole,
                "digest": digest,
                "set": asked,
                "skipped": skipped,
                "left_out": [Path(p).name if os.path.isabs(p) else p for p, _ in (*images.left_out, *packed.left_out)],
            },
            "budget": {**asdict(job.recipe.budget), "accepted": ACCEPTED if accepted else None},
            "reference": machine.versions("numpy", "onnxruntime", "pillow"),
        }
        files = {PACK: pack, REFERENCE: answers.folder / LOGITS}
        members = _members(job, typed, packed, files, record, accepted)
        if open_pack(pack) != packed:
            hint = "make the bundle again, with no other process that makes one in this folder"
            raise StaleError(f"{job.show(pack)} changed while the bundle was made", hint=hint)
        sealed = write(path, members, sign_with)
        signer = Sealed.open(path).signer
        size = path.stat().st_size
        pack.unlink(missing_ok=True)
    say(f"wrote {job.show(path)}: {len(packed):,} of {whole:,} images, {size / 1e6:.1f} MB")
    say(f"digest {sealed}{f', signed by {signer}' if signer else ', not signed'}")
    notes = list(shows(job.recipe.budget, accepted, len(packed), whole, top1, asked))
    if not target_of(job).runs_edgeres:
        notes.append("JetPack 5 has a Python too old for a self-test: `edgeres quantize` prints the trtexec call")
    for note in notes:
        say(f"note: {note}")
    return {
        "bundle": str(path),
        "digest": sealed,
        "signer": signer,
        "size_bytes": size,
        "members": list(members),
        "images": record["images"],
        "budget": record["budget"],
        "notes": notes,
    }


def _refuse_unfit(job: Job) -> None:
    """Raise `UsageError` for a recipe whose engine takes more to build than travels."""
    method = job.recipe.calibration.method
    if job.recipe.engine.precision == "int8" and method in ON_DEVICE and target_of(job).implicit:
        raise UsageError(
            f"--method {method} takes the calibration images while TensorRT builds, and a bundle holds none",
            hint="give --method mse",
        )


def _whole(job: Job) -> int:
    """Number of images that the recipe names; `UsageError` if it has a budget, and they cannot be judged."""
    images, given = pipeline.validation_images(job), job.recipe.budget.given
    if images.labels is None and given:
        raise UsageError(
            f"{images.root} has no labels, so that no device could ever meet the budget",
            evidence=f"the budget has {', '.join(given)}, from the command line or [budget] of the recipe",
            hint="give their labels (--labels), or leave the budget out: `edgeres bundle RECIPE` takes another recipe",
        )
    return len(images)


def _images(job: Job, typed: Typed, fp32: Path, preprocess: Preprocess) -> ImageSet:
    """The images of the bundle; `InputError` if one was calibrated on."""
    classes = typed.made["classes"]
    images = pipeline.images_to_judge(job, classes)
    calibrated = pipeline.calibrated_on(job, [Engine(typed.path, {})])
    question = Question(fp32, typed.model, classes, preprocess, [], images, calibrated, job.skip_bad)
    question.refuse_overlap(images.hashes())
    return images


def _accepted(job: Job) -> Accepted | None:
    """The result that the budget names, which then travels too."""
    path, engine = job.recipe.budget.accepted, job.recipe.engine
    about = {"precision": engine.precision, "target": engine.target}
    return Accepted.load(Path(path), job.show(Path(path)), about) if path else None


def _portable(images: ImageSet) -> ImageSet:
    """``images`` under names that tell nothing of this machine, as those of a list file may."""
    if not (isinstance(images.root, Path) and any(map(os.path.isabs, images.paths))):
        return images
    files = [os.path.join(os.path.abspath(images.root), path) for path in images.paths]
    root = os.path.commonpath([os.path.dirname(file) for file in files])
    names = tuple(os.path.relpath(file, root) for file in files)
    if isinstance(images, Pack):  # whose root is the pack itself
        return replace(images, paths=names)
    return replace(images, root=Path(root), paths=names)


def _answers(job: Job, fp32: Path, typed: Typed, images: Pack, digest: str) -> Answers:
    """FP32's logits on ``images``, in the store and in the batches of a validation: so they are the same to the bit."""
    about = pipeline.about_fp32(typed.model, images.preprocess, digest, len(images), typed.made["classes"])
    answers = Answers(job.root / "engines" / "out" / "answers", about)
    try:
        with open_runner(fp32, "onnxruntime") as runner:
            network = Network(validate.BASELINE, runner, answers)
            validate.answer([network], images, images.preprocess, validate.grid(about.images, BATCH), skip_bad=False)
        answers.flush()
    except BaseException:
        answers.close()
        raise
    return answers


def _top1(answers: Answers, images: Pack) -> float | None:
    """FP32's accuracy on ``images`` in percent; None without labels."""
    if images.labels is None:
        return None
    hits = 0
    for batch in range(answers.batches):
        labels = [images.labels[i] for i in answers.places(batch)]
        hits += int((answers.read(batch).argmax(1) == labels).sum())
    return 100 * hits / len(images)


def _members(
    job: Job,
    typed: Typed,
    images: Pack,
    files: dict[str, Path],
    record: dict[str, Any],
    accepted: Accepted | None,
) -> dict[str, Path | bytes]:
    """Name -> content, the manifest first."""
    target = resources.files("edgeres") / "targets" / f"{job.recipe.engine.target}.toml"
    members: dict[str, Path | bytes] = {MANIFEST: _json(record), MODEL: _unmeasured(typed.path)}
    if target_of(job).implicit and job.recipe.engine.precision == "int8":
        members[CACHE] = typed.path.with_suffix(".cache")
    members |= {
        **files,
        RECIPE: _json(_recipe(job.recipe, typed.made)),
        TARGET: target.read_bytes(),
    }
    if images.classes:
        members[LABELS] = "".join(f"{name}\n" for name in images.classes).encode("utf-8", "surrogateescape")
    if accepted:
        members[ACCEPTED] = _json(accepted.record)
        if accepted.outcomes is not None:
            members[beside(Path(ACCEPTED)).name] = beside(Path(job.recipe.budget.accepted or ""))
    members[LICENSES] = licenses(typed.made.get("weights") or {}, len(images)).encode()
    return members


def _unmeasured(path: Path) -> bytes:
    """The model at ``path`` without `MEASURED`."""
    model = graph.load(path)
    graph.set_metadata(model, {key: value for key, value in graph.metadata(model).items() if key not in MEASURED})
    return bytes(model.SerializeToString(deterministic=True))


def _json(value: Any) -> bytes:
    return (to_json(value, indent=1) + "\n").encode()


def _recipe(recipe: Recipe, made: dict[str, Any]) -> dict[str, Any]:
    """Every key of ``recipe``, and of the network what its file says: a given model may be another than the recipe's.

    Files have the names of members; others are left out: digests say which they were.
    """
    inside = {"images": PACK, "labels": LABELS, "accepted": ACCEPTED}
    values = {key: value for key, value in asdict(recipe).items() if key != "said"}
    for section in fields(recipe):
        record = getattr(recipe, section.name)
        for f in fields(record) if is_dataclass(record) else ():
            if f.metadata.get("path") and (said := values[section.name][f.name]):
                here = Path(said).name if f.name == "weights" else inside[f.name]
                values[section.name][f.name] = None if section.name == "calibration" else here
    values["model"] |= {key: made[key] for key in values["model"].keys() & made.keys() - {"weights"}}
    values["model"]["weights"] = (made.get("weights") or {}).get("source") or values["model"]["weights"]
    return {**values, "preprocess": made["preprocess"]}


def licenses(weights: dict[str, Any], images: int) -> str:
    """LICENSES.txt: what is recorded of whose things are, and plainly what is not."""
    unknown = "not recorded: edgeres does not know it, and whoever passes this file on must"
    return (
        f"Weights ({MODEL}, {REFERENCE})\n"
        f"  source: {weights.get('source') or 'not recorded'}\n"
        f"  SHA-256: {weights.get('sha256') or 'not recorded'}\n"
        f"  license: {weights.get('license') or unknown}\n\n"
        f"Images ({PACK}: {images:,}, scaled and cropped)\n"
        f"  license: they keep the one that they have, which is {unknown}\n"
    )


def shows(
    budget: Budget, accepted: Accepted | None, images: int, whole: int, top1: float | None, digest: str
) -> Iterator[str]:
    """What a self-test on so many ``images`` of the ``whole`` set can show, a sentence each.

    ``top1``: FP32's on them in percent, None without labels. ``digest``: of the images that were asked for.
    """
    if top1 is None:
        yield "the images have no labels: no budget can be judged on them"
        return
    at_most = paired(0, 0, images)[1]
    yield f"if no right answer is lost, {images:,} images show a drop of at most {at_most:.2g} points"
    asked = {} if budget.max_drop is None else {f"max_drop {budget.max_drop:g}": budget.max_drop}
    if budget.min_relative is not None:
        asked[f"min_relative {budget.min_relative:g}"] = top1 * (1 - budget.min_relative / 100)
    if accepted and accepted.outcomes is not None and accepted.record["provenance"]["digests"]["images"] == digest:
        asked[f"max_loss {budget.max_loss:g}"] = budget.max_loss
    elif accepted:
        drop = accepted.record["drop"]
        if apart(0.0, paired(0, 0, images), drop["top1"], drop["interval"])[1] > budget.max_loss:
            yield (
                f"max_loss {budget.max_loss:g} would hardly be decided: the accepted result is of other images, or has "
                "no outcomes.npz beside it, and is compared image by image only with its own; bundle those (--limit "
                "all, where it is of the whole set)"
            )
    for name, allowed in asked.items():
        if images < (needed := enough(allowed)):
            where = f"--limit {needed}" if needed <= whole else f"and the set has {whole:,}"
            yield f"{name} takes {needed:,} images at least ({where}): with these it ends as NOT ENOUGH IMAGES"
