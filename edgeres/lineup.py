"""Which runners an engine is measured beside, so that no comparison flatters it; and the benchmark of those."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeres import benchmark, graph
from edgeres.benchmark import PRESETS, Plan
from edgeres.build import RECORD, Engine
from edgeres.errors import EdgeresError, InputError, StaleError, UsageError
from edgeres.job import Job
from edgeres.latency import in_short
from edgeres.loader import normalizer
from edgeres.machine import cores
from edgeres.recipe import Preprocess
from edgeres.runners import Runner, open_runner
from edgeres.sysfs import text
from edgeres.targets import load_target
from edgeres.trt import EXECUTORS

KINDS = ("FP32", "FP32 TF32", "FP16", "INT8")
"""What a runner computes in, baselines first. FP32 is FP32: TF32 off."""
TF32_FROM = 8.0
"""Compute capability that has TF32 (Ampere)."""
CPUS = Path("/sys/devices/system/cpu")
"""Where Linux tells of processors."""


@dataclass(frozen=True)
class Entry:
    """One runner to measure; ``open`` loads it, for a CUDA graph or not, for so many threads on a CPU."""

    kind: str
    target: str
    folder: str
    open: Callable[[bool, int | None], Runner]


def kind(engine: Engine) -> str:
    """Which of `KINDS` an engine is."""
    record = engine.record
    return "FP32 TF32" if record["precision"] == "fp32" and _tf32(engine) else record["precision"].upper()


def _tf32(engine: Engine) -> bool:
    return bool(engine.record.get("options", {}).get("tf32"))


def lineup(job: Job, engines: list[Engine]) -> tuple[list[Entry], list[str]]:
    """``engines`` and what they are to be compared with, baselines first; and what is missing, in words.

    Each meets FP32 of its own executor: on a CPU the FP32 model itself, with TensorRT an engine, as FP32 and as TF32,
    which is what TensorRT computes unless told otherwise. INT8 meets FP16 too. Nothing is built for that: engines lie
    beside each other, and of those that are made from the same model for the same target the first of a kind counts.
    """
    entries, notes = [], []
    for target in dict.fromkeys(engine.record["target"] for engine in engines):
        asked = [engine for engine in engines if engine.record["target"] == target]
        first, have = asked[0], {kind(engine) for engine in asked}
        entries += [_entry(engine) for engine in asked]
        beside = {kind(engine): engine for engine in reversed(_beside(first))}
        for missing in [k for k in _wanted(first, have) if k not in have]:
            if missing in beside:
                entries.append(_entry(beside[missing]))
            elif missing == "FP32" and first.record["executor"] not in EXECUTORS:
                entry, note = _model(job, first)
                entries += [entry] if entry else []
                notes += [note] if note else []
            elif missing[:4].lower() in load_target(target).precisions:
                notes.append(f"no {missing} engine to compare with; to build it: {_how(missing, target, first)}")
    return sorted(entries, key=lambda entry: KINDS.index(entry.kind)), notes


def names(entries: list[Entry]) -> list[str]:
    """What each entry is called: its kind; with its target, and then its folder, where that names several."""
    for name in (
        lambda e: e.kind,
        lambda e: f"{e.kind} {e.target}",
        lambda e: f"{e.kind} {e.folder}",
    ):
        found = [name(entry) for entry in entries]
        if len(set(found)) == len(found):
            return found
    hint = "name each engine once; those of one kind lie in folders of different names"
    raise UsageError("an engine is named twice, or two have one name", evidence=", ".join(found), hint=hint)


def refuse_twins(engines: list[Engine]) -> None:
    """Raise `UsageError` for engines that `run` could not tell apart."""
    names([_entry(engine) for engine in engines])


def run(job: Job, engines: list[Engine], plan: Plan) -> dict[str, Any]:
    """The benchmark record of ``engines`` and their `lineup`, on random pixels.

    Without batches in ``plan`` it is at the fixed batch of an engine that has one, else at 1. The streams of a CPU
    executor have a session each, with its share of the cores; those of a GPU share one. Of each runner ``sources`` tell
    the folder or model, ``kinds`` what it computes in, ``targets`` for what.
    """
    if not plan.batches:
        plan = replace(plan, batches=(next((b for e in engines if (b := e.record.get("batch"))), 1),))
    entries, notes = lineup(job, engines)
    notes += [note for engine in engines if (note := _in_pieces(engine, max(plan.batches)))]
    share = None
    if plan.streams > 1 and any(e.record["executor"] not in EXECUTORS for e in engines):
        share = max(1, (found := physical_cores()) // plan.streams)
        threads = "1 thread" if share == 1 else f"{share} threads"
        notes.append(f"{plan.streams} sessions on {found} core{'s' * (found > 1)} of the CPU, each with {threads}")
    preset, opened = PRESETS[plan.preset], dict[str, list[Runner]]()
    try:
        called = dict(zip(names(entries), entries, strict=True))
        for name, entry in called.items():
            side = opened[name] = [entry.open(bool(preset and preset.cuda_graph), share)]
            if not hasattr(side[0], "split"):
                side += [entry.open(False, share) for _ in range(plan.streams - 1)]
        size, preprocess = engines[0].record["preprocess"]["crop"], engines[0].record["preprocess"]
        pixels = random_pixels(max(plan.batches), Preprocess.from_json(preprocess), job.recipe.seed)
        shared = {name: side if len(side) > 1 else side[0] for name, side in opened.items()}
        record = benchmark.measure(shared, pixels, plan)
    finally:
        for side in opened.values():
            for runner in side:
                runner.close()
    first = engines[0].record
    known = f"resnet{first['depth']} {first['variant'] or ''}".strip() if first.get("depth") else ""
    where = " and ".join(dict.fromkeys(entry.target for entry in entries))
    return {
        **record,
        "sources": {name: entry.folder for name, entry in called.items()},
        "kinds": {name: entry.kind for name, entry in called.items()},
        "targets": {name: entry.target for name, entry in called.items()},
        "title": f"{known or engines[0].path.parent.name} on {where}, {size} x {size}",
        "notes": notes,
    }


def of_baseline(record: dict[str, Any] | None, engine: Engine) -> dict[str, Any]:
    """What a result says of the latency of FP32 on the target of ``engine``: its name in what `run` gives, and times.

    They are None where FP32 was not measured there.
    """
    return _side(record, kinds="FP32", targets=engine.record["target"])


def of_engine(record: dict[str, Any] | None, engine: Engine) -> dict[str, Any]:
    """The same of ``engine``."""
    return _side(record, kinds=kind(engine), targets=engine.record["target"], sources=engine.path.parent.name)


def _side(record: dict[str, Any] | None, **wanted: str) -> dict[str, Any]:
    if record:
        for name in record["runners"]:
            if all(record[key][name] == value for key, value in wanted.items()):
                return {"name": name, "latency_ms": in_short(record, name)}
    return {"latency_ms": None}


def random_pixels(images: int, preprocess: Preprocess, seed: int = 0) -> np.ndarray:
    """Noise as it comes out of preprocessing: float32 (images, 3, crop, crop)."""
    shape = (preprocess.crop, preprocess.crop, 3)
    rng, fill = np.random.default_rng(seed), normalizer(preprocess)
    pixels = np.empty((images, 3, *shape[:2]), np.float32)
    for row in pixels:
        fill(row, rng.integers(0, 256, shape, np.uint8))
    return pixels


def physical_cores() -> int:
    """Cores that this process may use, two threads of one counted once where Linux tells, as executors count them."""
    if not hasattr(os, "sched_getaffinity"):
        return cores()
    folders = [CPUS / f"cpu{i}" / "topology" for i in os.sched_getaffinity(0)]
    return len({text(folder / "thread_siblings_list") or str(folder) for folder in folders})


def _in_pieces(engine: Engine, batch: int) -> str:
    """What to know of a batch that is more than a plan takes."""
    *_, largest = engine.record.get("options", {}).get("profile") or [batch]
    return f"{kind(engine)} takes {largest} images at a time: {batch} go through in pieces" * (batch > largest)


def _wanted(engine: Engine, have: set[str]) -> list[str]:
    """What these kinds are to be compared with."""
    wanted = ["FP32"]
    if engine.record["executor"] in EXECUTORS:
        capability = load_target(engine.record["target"]).capability
        if capability is None or float(capability) >= TF32_FROM:
            wanted.append("FP32 TF32")
    return [*wanted, "FP16"] if "INT8" in have else wanted


def _beside(engine: Engine) -> list[Engine]:
    """Engines in the folders beside ``engine``'s: for its target, from its model."""
    found = []
    for record in sorted(engine.path.parent.parent.glob(f"*/{RECORD}")):
        if record.parent == engine.path.parent:
            continue
        try:
            other = Engine.load(record.parent)
        except EdgeresError:  # one that nobody asked for and that is damaged
            continue
        mine, theirs = ((e.record.get("target"), e.record.get("made_from", {}).get("model")) for e in (engine, other))
        if mine == theirs:
            found.append(other)
    return found


def _how(missing: str, target: str, beside: Engine) -> str:
    command = f"edgeres build-engine --precision {missing[:4].lower()} --target {target}"
    if missing == "FP32 TF32":
        folder = beside.path.parent
        other = folder.with_name(folder.name.replace(f"-{beside.record['precision']}-", "-fp32-tf32-"))
        command += f" --build tf32=true -o {other}"
    return command


def _model(job: Job, engine: Engine) -> tuple[Entry | None, str]:
    """The FP32 model, in the engine's own executor; or why not. One that the user named must be the right one.

    Else it is the one of the workspace or one beside the engine's folder, whichever has the engine's digest.
    """
    record, folder = engine.record, engine.path.parent
    usual = folder.with_name(folder.name.removesuffix(f"-{record['precision']}-{record['target']}") + ".onnx")
    for path in [job.model] if job.model else dict.fromkeys([job.fp32, usual, *sorted(folder.parent.glob("*.onnx"))]):
        try:
            if graph.digest(graph.load(path)) == record["made_from"]["model"]:
                return Entry("FP32", record["target"], path.name, _opener(path, record["executor"])), ""
        except InputError:  # one that is not there, or that nobody asked for and that is damaged
            if job.model:
                raise
    if job.model:
        raise StaleError(f"{job.show(engine.path)} was built from another model than {job.show(job.model)}")
    return None, f"no FP32 model to compare {folder.name} with; name it with --model"


def _opener(path: Path, executor_name: str) -> Callable[[bool, int | None], Runner]:
    return lambda _, threads: open_runner(path, executor_name, threads)


def _entry(engine: Engine) -> Entry:
    return Entry(kind(engine), engine.record["target"], engine.path.parent.name, engine.open)
