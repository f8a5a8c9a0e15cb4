"""Typed ONNX + target -> an engine folder: the plain engine file, and engine.json that says what it is."""

from __future__ import annotations

import platform
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import edgeres
from edgeres import graph, trt
from edgeres.errors import BuildError, InputError, MissingDependency, StaleError
from edgeres.files import atomic, cache_folder, read_json, sha256_file, write_json
from edgeres.progress import busy
from edgeres.recipe import Preprocess
from edgeres.runners import Executor, Fusion, Runner, executor, open_runner
from edgeres.targets import Target

FORMAT = "edgeres engine 1"
RECORD = "engine.json"
COPIED = ("depth", "variant", "classes", "batch", "preprocess", "io", "quantization", "chosen", "kept_fp32")
"""What an engine's record says as the typed model's metadata do."""


@dataclass(frozen=True)
class Engine:
    """An engine file and its record: what it runs on, what it was made from, what its graph fused to."""

    path: Path
    record: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Engine:
        """Open an engine folder (or a file in it), after checking that the engine is the one its record describes."""
        folder = path.parent if path.is_file() else path
        if not (folder / RECORD).is_file():
            raise InputError(
                f"no engine at {path}",
                evidence=f"there is no {RECORD} in {folder}",
                hint="give an engine folder; `edgeres build-engine` with the same options makes one",
            )
        record = read_json(folder / RECORD, "engine record")
        if record.get("format") != FORMAT:
            raise InputError(f"{folder / RECORD} is not an engine record", evidence=f"format {record.get('format')!r}")
        if missing := [k for k in ("file", "sha256", "executor") if not isinstance(record.get(k), str)]:
            raise InputError(
                f"engine record {folder / RECORD} is damaged",
                evidence=f"without {', '.join(missing)}",
                hint="build the engine again",
            )
        engine = cls(folder / Path(record["file"]).name, record)
        if (found := sha256_file(engine.path)) != record["sha256"]:
            raise StaleError(
                f"{engine.path} is not the file that was built",
                evidence=f"SHA-256 {found[:12]}, its record says {record['sha256'][:12]}",
                hint="it was changed or cut short; build it again",
            )
        return engine

    def open(self) -> Runner:
        """Load the engine into its executor."""
        runner = open_runner(self.path, self.record["executor"])
        runner.preprocess = Preprocess.from_json(self.record["preprocess"])
        return runner


def build(typed: Path, folder: Path, target_name: str, target: Target) -> Engine:
    """Build the engine for ``typed``, an FP32, FP16 or INT8 ONNX file made by edgeres, into ``folder``."""
    start = time.perf_counter()
    model = graph.load(typed)
    made = graph.metadata(model)
    if "precision" not in made:
        raise InputError(f"{typed} was not made by edgeres", hint="give the file that `edgeres quantize` wrote")
    tool = executor(target.executor)
    options: dict[str, Any] = {}
    if target.executor in trt.EXECUTORS:
        path = folder / "engine.plan"
        cache = cache_folder() / "timing" / f"{target.executor}.cache"
        asked = replace(target.build, timing_cache=cache)
        plan, used = trt.build(trt.load_library(target.executor), typed.read_bytes(), made["precision"], asked)
        with atomic(path) as temporary:
            temporary.write_bytes(plan)
        fusion = _audit(tool, path, made["precision"])
        options = {k: v for k, v in asdict(used).items() if k != "timing_cache"}
    else:
        with busy("look at what fuses"):
            fusion = tool.audit(typed, made["precision"])
        path = folder / "engine.onnx"
        # optimized at load, for the CPU that is found: the portable file is the engine
        with atomic(path) as temporary:
            shutil.copyfile(typed, temporary)
    record = {
        "format": FORMAT,
        "file": path.name,
        "sha256": sha256_file(path),
        "size_bytes": path.stat().st_size,
        "target": target_name,
        "executor": target.executor,
        "precision": made["precision"],
        **dict.fromkeys(("depth", "variant", "classes", "batch", "preprocess")),
        **{k: v for k, v in made.items() if k in COPIED},
        **({"options": options} if options else {}),
        "fusion": asdict(fusion),
        "made_from": {"onnx": sha256_file(typed), "model": made.get("model", graph.digest(model))},
        "built_with": {
            "edgeres": edgeres.__version__,
            target.executor: tool.version(),
            "machine": platform.machine(),
        },
        "build_seconds": round(time.perf_counter() - start, 3),
    }
    write_json(folder / RECORD, record)
    return Engine(path, record)


def _audit(tool: Executor, path: Path, precision: str) -> Fusion:
    """What the plan at ``path`` runs, if this machine can load it: TensorRT-RTX also builds where there is no GPU."""
    try:
        return tool.audit(path, precision)
    except (BuildError, MissingDependency) as error:
        return Fusion({}, [f"what the engine runs in was not looked at: {error.cause}"])
