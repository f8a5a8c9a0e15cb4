"""The self-test of a bundle: build its engine here, replay its images against FP32's shipped answers, judge.

Needs the base dependencies and the executor: no PyTorch, no onnx, no image library.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeres import benchmark, build, devices, lineup, validate, verdict
from edgeres.answers import About, Answers
from edgeres.benchmark import Plan
from edgeres.build import Engine
from edgeres.bundle import ACCEPTED, CACHE, PACK, REFERENCE, Bundle
from edgeres.data import Manifest
from edgeres.diagnosis import board_of
from edgeres.errors import BuildError, InputError, StaleError
from edgeres.files import cache_folder, require_writable, write_json
from edgeres.job import BATCH
from edgeres.latency import in_short
from edgeres.outcomes import Outcomes, beside, join, measure
from edgeres.pack import Pack, open_pack
from edgeres.progress import say
from edgeres.recipe import Preprocess, one_of
from edgeres.result import measured
from edgeres.result import result as make_result
from edgeres.runners import Runner
from edgeres.targets import names, scheme_for
from edgeres.trt import EXECUTORS
from edgeres.trt.calibrator import Calibration
from edgeres.validate import Network
from edgeres.verdict import Accepted

NO_BASELINE = "FP32 does not run here: its answers came in the bundle, so it has no latency"


def run(
    path: Path,
    target: str | None = None,
    signed_by: Path | None = None,
    work: Path | None = None,
    seconds: float | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Test the bundle at ``path`` on this machine -> its result, as `validate` gives it, also written to ``output``.

    Raises what keeps it from being tested here: another ``target``, not ``signed_by`` that key, a changed byte. The
    work folder keeps what can be used again: the files, the engine, answers of a test that was cut short. ``seconds``:
    that the engine works for its latency, at least.
    """
    plan = Plan((1,), seconds=seconds, tail=False)
    bundle = Bundle.open(path, signed_by)
    version = require_fit(bundle, target)
    if output:
        require_writable(output)  # before the minutes that the rest takes
    folder = work or cache_folder() / "bundles" / bundle.sealed.digest[:16]
    files = folder / "bundle"
    bundle.sealed.unpack(files)
    images = open_pack(files / PACK)
    reference = Reference(files / REFERENCE, bundle, images)
    accepted = None
    if bundle.budget.accepted:
        accepted = Accepted.load(files / ACCEPTED, f"{ACCEPTED} of the bundle", bundle.manifest)
    engine = ensure_engine(bundle, files, folder / "engine", version)
    with engine.open() as runner, Answers(folder / "answers", _about(engine, version, images, reference)) as answers:
        rows = _replay(Network("the engine", runner, answers), images, reference)
        times = _measure(bundle, engine, runner, plan)
    output = output or folder / "result.json"
    record = _result(bundle, engine, images, reference, rows, times, accepted, output)
    write_json(output, record)
    answers.remove()
    say(f"wrote {output}")
    return record


def require_fit(bundle: Bundle, target: str | None) -> str:
    """Version of the executor here. Raises what keeps the engine of ``bundle`` from being built and judged here."""
    name, path = bundle.manifest["target"], bundle.sealed.path
    if target is not None and target != name:
        one_of("target", target, names())
        raise InputError(
            f"{path} is for {name}, not for {target}", hint=f"`edgeres bundle --target {target}` makes one"
        )
    elsewhere = f"`edgeres doctor` says what this device is, and lacks; the bundle is for {name}"
    version = build.installed(name, bundle.target, elsewhere)
    jetson = devices.jetson()
    board = board_of(jetson)
    if jetson and board and name.startswith("jetson-") and not name.startswith(board):
        raise BuildError(f"{path} is for {name}", evidence=f"this is {board}: {jetson.model}", hint=elsewhere)
    if bundle.target.executor == "tensorrt" and bundle.manifest["precision"] != "fp32":
        here = replace(bundle.target, tensorrt=version)
        if (here.typed, here.implicit) != (bundle.target.typed, bundle.target.implicit):
            raise StaleError(
                f"the graph in {path} is made for TensorRT {bundle.target.tensorrt or '10 and later'}",
                evidence=f"here is TensorRT {version}, which takes another",
                hint=f"`edgeres bundle --target {name} --tensorrt {version}` makes one",
            )
    return version


class Reference:
    """FP32's logits as they came: float32 (images, classes), read in pieces, so that memory does not grow with them.

    ``places`` int64 (images,) and ``skipped``: where in the set that was asked for the images are, and the unreadable.
    """

    def __init__(self, path: Path, bundle: Bundle, images: Pack) -> None:
        self.path, self.classes = path, int(bundle.manifest["typed"]["classes"])
        made, digest = bundle.manifest, Manifest.of(images).digest()
        wanted, found = 4 * len(images) * self.classes, path.stat().st_size
        wrong = ""
        if found != wanted:
            wrong = f"{path.name} has {found:,} bytes; {len(images):,} images of {self.classes} classes take {wanted:,}"
        elif digest != made["images"]["digest"]:
            wrong = "the images are not those of the manifest"
        elif images.preprocess != Preprocess.from_json(made["typed"]["preprocess"]):
            wrong = "the images are prepared for another model"
        elif len(images) != made["images"]["count"]:
            wrong = f"the pack has {len(images):,} images, and the manifest {made['images']['count']:,}"
        if wrong:
            cause = f"what {bundle.sealed.path} holds does not belong together"
            raise InputError(cause, evidence=wrong, hint="make the bundle again: `edgeres bundle`")
        self.digest = digest
        self.skipped = np.asarray(made["images"]["skipped"], np.int64)
        self.places = np.delete(np.arange(made["images"]["asked"]), self.skipped)
        validate.check_labels(images.labels, self.classes)

    def read(self, places: range) -> np.ndarray:
        """Logits (n, classes) of the images at ``places``."""
        count, offset = len(places) * self.classes, 4 * self.classes * places.start
        logits = np.fromfile(self.path, "<f4", count, offset=offset).reshape(len(places), self.classes)
        if not np.isfinite(logits).all():
            raise InputError(f"{self.path} holds NaN or infinity", hint="make the bundle again: `edgeres bundle`")
        return logits


def ensure_engine(bundle: Bundle, files: Path, folder: Path, version: str) -> Engine:
    """The engine of ``bundle``, whose ``files`` are unpacked, in ``folder``: the one that is there, or a new one."""
    typed, target = bundle.typed(files), bundle.target
    if engine := build.up_to_date(folder, typed.path, version, target):
        say(f"the engine in {folder} is up to date")
        return engine
    calibration = None
    if (cache := files / CACHE).is_file():
        try:
            calibration = Calibration(cache=cache.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            cause = f"{CACHE} of {bundle.sealed.path} is no calibration cache"
            raise InputError(cause, evidence=str(error), hint="make the bundle again: `edgeres bundle`") from error
    engine = build.build(typed, folder, bundle.manifest["target"], target, calibration)
    say(f"built {engine.path}: {engine.record['size_bytes'] / 1e6:.1f} MB")
    return engine


def _about(engine: Engine, version: str, images: Pack, reference: Reference) -> About:
    """What the engine's answers depend on, for a test that was cut short and goes on."""
    return About(
        network=engine.record["sha256"],
        executor=engine.record["executor"],
        version=version,
        preprocess=images.preprocess.digest(),
        manifest=reference.digest,
        read_by={},
        images=len(images),
        classes=reference.classes,
        batch=BATCH,
    )


def _replay(network: Network, images: Pack, reference: Reference) -> Outcomes:
    """The rows of all images, in the batches of a validation, at their places in the set that was asked for."""
    answers = network.answers
    batches = validate.grid(len(images), BATCH)
    validate.answer([network], images, images.preprocess, batches, skip_bad=False)
    parts = []
    for batch in batches:
        places = answers.places(batch)
        labels = None if images.labels is None else np.asarray(images.labels[places.start : places.stop], np.int64)
        parts.append(measure(reference.read(places), answers.read(batch), labels, reference.places[places]))
    return replace(join(parts), skipped=reference.skipped)


def _measure(bundle: Bundle, engine: Engine, runner: Runner, plan: Plan) -> dict[str, Any]:
    """The benchmark record of the engine alone, at the batch it has, else at 1."""
    record, batch = engine.record, engine.record["batch"] or 1
    pixels = lineup.random_pixels(batch, Preprocess.from_json(record["preprocess"]))
    times = benchmark.measure({_name(engine): runner}, pixels, replace(plan, batches=(batch,)))
    size = record["preprocess"]["crop"]
    return {
        **times,
        "sources": {_name(engine): engine.path.parent.name},
        "title": f"{bundle.manifest['name']} on {record['target']}, {size} x {size}",
        "notes": [NO_BASELINE],
    }


def _name(engine: Engine) -> str:
    """What the engine is called. One of FP32 is not the FP32 that it is compared with, which has no latency."""
    precision = engine.record["precision"].upper()
    return f"{precision} engine" if precision == "FP32" else precision


def _result(
    bundle: Bundle,
    engine: Engine,
    images: Pack,
    reference: Reference,
    rows: Outcomes,
    times: dict[str, Any],
    accepted: Accepted | None,
    output: Path,
) -> dict[str, Any]:
    """The record of this test; the outcomes are written beside ``output``."""
    made, record = bundle.manifest, engine.record
    # a device without onnx cannot look into a graph for the CPU, and loses nothing by it
    looked = record["fusion"]["notes"] if record["fusion"]["operators"] or record["executor"] in EXECUTORS else []
    fusion = {**record["fusion"], "notes": [*looked, *notes(bundle), NO_BASELINE]}
    digests = {
        "model": made["model"]["digest"],
        "images": made["images"]["set"],
        "weights": made["typed"].get("weights"),
        "outcomes": rows.save(beside(output)),
    }
    paths = dict(zip(reference.places.tolist(), images.paths, strict=True))
    sides: list[dict[str, Any]] = [
        {"latency_ms": None, "size_bytes": made["model"]["size_bytes"]},
        {"name": _name(engine), "latency_ms": in_short(times, _name(engine)), "size_bytes": record["size_bytes"]},
    ]
    found = make_result(
        made["name"],
        {**record, "fusion": fusion},
        measured(rows, paths.__getitem__, dict(enumerate(images.classes)).get),
        verdict.judge(bundle.budget, accepted, rows, digests["images"]),
        sides,
        made["images"]["left_out"],
        digests,
        made["images"]["asked"],
        latency=times,
    )
    found["provenance"]["bundle"] = {
        "digest": bundle.sealed.digest,
        "signer": bundle.sealed.signer,
        "made_with": made["made_with"],
        "reference": made["reference"],
    }
    return found


def notes(bundle: Bundle) -> list[str]:
    """What a person should know of this machine and this graph."""
    bits = (bundle.manifest["typed"].get("quantization") or {}).get("weight_bits")
    if bits is None or bits <= scheme_for(bundle.target).weight_bits:
        return []
    return [f"weights have {bits} bits, and this CPU has no VNNI: sums may overflow; make the bundle on such a CPU"]
