"""Typed ONNX + target -> an engine folder: the plain engine file, and engine.json that says what it is."""

from __future__ import annotations

import platform
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import edgeres
from edgeres import graph
from edgeres.errors import InputError, StaleError, need
from edgeres.files import atomic, read_json, sha256_file, write_json
from edgeres.runners import Runner, open_runner
from edgeres.targets import Target

FORMAT = "edgeres engine 1"
RECORD = "engine.json"


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
        return open_runner(self.path, self.record["executor"])


def build(typed: Path, folder: Path, target_name: str, target: Target) -> Engine:
    """Build the engine for ``typed``, an FP32, FP16 or INT8 ONNX file made by edgeres, into ``folder``."""
    start = time.perf_counter()
    model = graph.load(typed)
    made = graph.metadata(model)
    if "precision" not in made:
        raise InputError(f"{typed} was not made by edgeres", hint="give the file that `edgeres quantize` wrote")
    fusion = audit(typed, made["precision"])
    path = folder / "engine.onnx"
    # ONNX Runtime optimizes at load, for the CPU it finds: the portable file is the engine
    with atomic(path) as temporary:
        shutil.copyfile(typed, temporary)
    record = {
        "format": FORMAT,
        "file": path.name,
        "sha256": sha256_file(path),
        "size_bytes": path.stat().st_size,
        "target": target_name,
        "executor": target.executor,
        **{k: made.get(k) for k in ("precision", "depth", "variant", "classes", "batch", "preprocess", "quantization")},
        "fusion": asdict(fusion),
        "made_from": {"onnx": sha256_file(typed), "model": made.get("model", graph.digest(model))},
        "built_with": {
            "edgeres": edgeres.__version__,
            target.executor: need(target.executor, "onnx").__version__,
            "machine": platform.machine(),
        },
        "build_seconds": round(time.perf_counter() - start, 3),
    }
    write_json(folder / RECORD, record)
    return Engine(path, record)


@dataclass(frozen=True)
class Fusion:
    """What ONNX Runtime really executes: operators and their number, and ``notes`` on what is not as asked."""

    operators: dict[str, int]
    notes: list[str]


def audit(typed: Path, precision: str) -> Fusion:
    """Load ``typed`` as the runner does and count what the optimized graph is made of."""
    from edgeres.runners.onnxruntime import open_session

    onnx = need("onnx", "onnx")
    with tempfile.TemporaryDirectory() as scratch:
        optimized = Path(scratch) / "optimized.onnx"
        open_session(typed, optimized)
        model = onnx.load(optimized)
    counts = graph.count_ops(model)
    half = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16}
    convolutions = [n for n in model.graph.node if "Conv" in n.op_type]
    slow = [n.name for n in convolutions if n.input[1] not in half and "QLinear" not in n.op_type]
    notes = []
    if precision == "fp16" and slow:
        notes.append(
            f"{len(slow)} of {len(convolutions)} convolutions are computed in FP32: ONNX Runtime has no FP16 kernels "
            "for this CPU, so FP16 halves the file and gains no speed"
        )
    if precision == "int8" and slow:
        notes.append(f"{len(slow)} of {len(convolutions)} convolutions stay in FP32, first {slow[0]}")
    return Fusion(counts, notes)
