"""Engines: do they start, build, run and compute what they should, in which precision, and how fast."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import nets
import numpy as np
from outcome import NOT_HERE, Skip, record_of, so_far, under_way
from parts import BATCHES, PRECISIONS, plan_of

from edgeres import build, devices, engine_layers, trt
from edgeres.benchmark import Plan, measure
from edgeres.errors import BuildError, EdgeresError
from edgeres.fidelity import decibels, squares
from edgeres.fusion import audit
from edgeres.runners.cuda import open_cuda
from edgeres.runners.tensorrt import TensorRt, TensorRtRunner
from edgeres.targets import load_target

LEAST_DB = {"fp32": 80.0, "fp16": 50.0}
"""Signal to noise of logits against ONNX Runtime's in FP32, as the tests of the project have it."""
FURTHER_DB = 3.0
"""INT8 may be this much further from FP32 than its graph says. The two take different steps where a sum lies between
them, and those differences grow from layer to layer: logit by logit they need not be near one another."""
NAMED = {"8.6", "8.9", "12.0", "12.1"}
"""Compute capabilities that TensorRT-RTX names as supported (its documentation, support matrix), beside 7.5."""
TRIED = ("8.0", "8.6", "8.9", "12.0")
"""Compute capabilities that plans are built for where the usual plan is not valid, to see which would be."""
SHOWN = 3
RUN = "run"


def folder_of(work: Path, target: str, variant: str, precision: str) -> Path:
    """The engine folder that `make` leaves."""
    return work / plan_of(target, variant, precision).replace(" ", "-")


def usable(work: Path, target: str, precision: str) -> bool:
    """Whether `make` built the v1.5 engine and it ran: one that crashed would do so again."""
    return bool(record_of(work, plan_of(target, "v1.5", precision)).get("usable"))


def start(work: Path, executor: str) -> dict[str, Any]:
    """Build, load and run one small plan. Says what TensorRT-RTX thinks of this GPU, which it may not know."""
    library = trt.load_library(executor)
    gpus = devices.gpus()
    if not gpus:
        raise Skip(devices.why_no_gpu())
    gpu = gpus[0]
    record: dict[str, Any] = {"version": library.__version__, "gpu": gpu.name, "capability": gpu.capability}
    open_cuda(trt.EXECUTORS[executor][1]).close()  # where CUDA itself does not work, no plan would
    if not trt.strongly_typed(library):
        raise Skip(f"{executor} {library.__version__} takes precision from flags; the kit is for TensorRT 10 and later")
    try:
        found = ran(work, executor, library, record)
    except EdgeresError as error:
        if not trt.ahead_of_time(library) or record.get("validity", "INVALID") != "INVALID" or gpu.capability in NAMED:
            raise
        tried = record.get("validity_built_for") or {name: validity(library, name) for name in TRIED}
        told = "no plan" if "validity" not in record else f"validity INVALID, diagnostics {record['diagnostics']}"
        what = f"{executor} {library.__version__} {NOT_HERE} {gpu.capability}: {told}; built for: {tried}; "
        raise Skip(what + " ".join(str(error).split())) from error
    right = bool(np.allclose(found, 27.0, rtol=1e-3))
    return {**record, "usable": right, "checks": {"a small plan computes what it should": right}}


def ran(work: Path, executor: str, library: Any, record: dict[str, Any]) -> np.ndarray:
    """Logits of two images of ones, of a plan that is built here. ``record`` gets what the library thinks of it."""
    under_way(work, "build")
    plan = work / f"{executor}.plan"
    plan.write_bytes(trt.build_plan(library, small(), "fp32", trt.Options(profile=(1, 1, 2))).plan)
    if hasattr(library.Runtime, "get_engine_validity"):
        under_way(work, "validity")
        record |= judged(library, plan.read_bytes())
        if record["validity"] != "VALID":
            record["validity_built_for"] = {name: validity(library, name) for name in TRIED}
    # also what is not valid is run: that is how it is found out
    under_way(work, f"run, validity {record.get('validity', 'not known')}")
    with TensorRtRunner(plan, executor) as runner:
        return runner.infer(np.ones((2, 3, 8, 8), np.float32))


def judged(library: Any, plan: bytes) -> dict[str, Any]:
    """What TensorRT-RTX thinks of ``plan`` on this GPU."""
    found, why = library.Runtime(trt.logger(library)).get_engine_validity(plan)
    return {"validity": getattr(found, "name", str(found)), "diagnostics": int(why)}


def validity(library: Any, capability: str) -> str:
    """The same of a small plan for GPUs of ``capability``; or why there is none."""
    options = trt.Options(profile=(1, 1, 2), capabilities=(capability,))
    try:
        found = judged(library, trt.build_plan(library, small(), "fp32", options).plan)
    except EdgeresError as error:
        return " ".join(str(error).split())[:200]
    return f"{found['validity']} ({found['diagnostics']})"


def small() -> bytes:
    """ONNX: 8 x 8 pixels -> the mean of a 3 x 3 convolution of ones, 27 for an image of ones; 4 classes."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "weights")
    nodes = [
        helper.make_node("Conv", ["input", "weights"], ["y"], kernel_shape=[3, 3]),
        helper.make_node("GlobalAveragePool", ["y"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["output"]),
    ]
    ends: dict[str, list[str | int | None]] = {"input": ["N", 3, 8, 8], "output": ["N", 4]}
    first, last = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ends.items())
    made = helper.make_graph(nodes, "small", [first], [last], [weights])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def make(
    work: Path, target: str, variant: str, precision: str, without: tuple[str, ...] | list[str] = ()
) -> dict[str, Any]:
    """Build, load, run, compare with ONNX Runtime on the CPU, and look at what became of the graph.

    ``without``: what it died over. An engine that cannot be looked into can be of use.
    """
    if RUN in without:
        raise Skip("nothing can be done with an engine that does not run")
    onnx, folder = nets.onnx_file(work, variant, precision), folder_of(work, target, variant, precision)
    shutil.rmtree(folder, ignore_errors=True)
    profile = [BATCHES[0], 8, BATCHES[-1]]
    under_way(work, "build, and a look into the engine")
    died = mock.patch.object(TensorRt, "examine", side_effect=BuildError("a process died over it"))
    with died if without else nullcontext():
        engine = build.build(onnx, folder, target, load_target(target, precision, build={"profile": profile}))
    under_way(work, RUN)
    with np.load(work / "models" / f"{variant}.npz") as kept:
        pixels, single, simulated = kept["pixels"], kept["fp32"], kept["int8"]
    start = time.perf_counter()
    with engine.open() as runner:
        found = runner.infer(pixels)
        ready = time.perf_counter() - start
    record = {
        "usable": True,
        "first_logits_s": ready,
        "build_s": engine.record["build_seconds"],
        "size_bytes": engine.record["size_bytes"],
        "profile": profile,
        "notes": engine.record.get("notes", []),
        **quality(precision, found, single, simulated),
    }
    layers = folder / engine_layers.FILE
    if layers.exists():
        record["inspector"] = inspected(json.loads(layers.read_text(encoding="utf-8")), precision)
    else:
        record["inspector"] = {"summary": engine.record["fusion"]["notes"]}
    return record


def quality(precision: str, found: np.ndarray, single: np.ndarray, simulated: np.ndarray) -> dict[str, Any]:
    """How near ``found`` is to FP32 (``single``), and INT8 to what its graph says (``simulated``); logits (N, classes).

    Of INT8, what random weights answer to every image is taken off first: it would hide the difference.
    """
    checks = {"logits are finite": bool(np.isfinite(found).all())}
    same = float((found.argmax(1) == single.argmax(1)).mean())
    record: dict[str, Any] = {"db": decibels(*squares(single, found)), "same_answer": same, "checks": checks}
    if precision in LEAST_DB:
        least = LEAST_DB[precision]
        checks[f"{precision} logits are FP32's within {least:.0f} dB"] = record["db"] >= least
        return record
    common = simulated.mean(0)
    found, single, simulated = (values - common for values in (found, single, simulated))
    record["db_to_graph"] = decibels(*squares(simulated, found))
    record["graph_db"] = decibels(*squares(single, simulated))
    record["db"] = decibels(*squares(single, found))
    near = record["db"] >= record["graph_db"] - FURTHER_DB
    checks[f"INT8 logits are as near to FP32 as the graph says, within {FURTHER_DB:.0f} dB"] = near
    return record


def inspected(kept: dict[str, Any], precision: str) -> dict[str, Any]:
    """What the library's inspector says of a plan, in short, and its first layers as it says them."""
    raw, times = kept["layers"], kept["times_ms"]
    found = audit(raw, precision, times, kept["convolutions"], kept["residuals"])
    return {
        "summary": found.summary(),
        "layers": len(raw),
        "by_name": found.by_name,
        "convolutions": found.convolutions,
        "in_and_out": found.in_and_out,
        "in_only": len(found.in_only),
        "other": {kind: len(names) for kind, names in found.other.items()},
        "adds_fused": found.adds_fused,
        "adds": kept["residuals"],
        "reformats": len(found.reformats),
        "fp32": len(found.fp32),
        "total_ms": found.total_ms,
        "first_layers": raw[:SHOWN],
        "slowest_ms": dict(sorted(times.items(), key=lambda item: -item[1])[:SHOWN]),
    }


def benchmark(work: Path, target: str, seconds: float = 1.0) -> dict[str, Any]:
    """`edgeres benchmark` of the v1.5 engines of ``target``, without and with CUDA graphs."""
    record: dict[str, Any] = {"skipped": {}}
    for how, graphs in (("plain", False), ("cuda_graph", True)):
        under_way(work, f"benchmark, {how}")
        runners: dict[str, Any] = {}
        try:
            for precision in sorted(PRECISIONS):  # FP16 first: what INT8 has to be measured against
                if usable(work, target, precision):
                    folder = folder_of(work, target, "v1.5", precision)
                    runners[precision] = build.Engine.load(folder).open(graphs)
            crop = next(iter(runners.values())).input_size
            batches = tuple(batch for batch in BATCHES if batch <= 32)
            found = measure(runners, nets.pixels(max(batches), crop), Plan(batches, seconds=seconds))
        except EdgeresError as error:
            if not graphs:
                raise
            record["skipped"]["with CUDA graphs"] = " ".join(str(error).split())
            continue
        finally:
            for runner in runners.values():
                runner.close()
        for runner in found["runners"].values():
            runner.pop("histogram")
        record[how] = {key: found[key] for key in ("batch", "runners", "speedup", "sweep", "conditions")}
        so_far(work, f"{target} benchmark", record)
    return record
