"""From typed ONNX to a plan, in as many attempts as memory asks for."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeres.errors import BuildError
from edgeres.files import atomic
from edgeres.progress import busy, say
from edgeres.trt.bindings import (
    EXECUTORS,
    MEMORY,
    WORKSPACE,
    Parts,
    advice,
    ahead_of_time,
    given,
    logger,
    strongly_typed,
    title,
)
from edgeres.trt.calibrator import Calibration, calibrator
from edgeres.trt.configure import (
    NAMED,
    calibration_shape,
    check,
    configure,
    require_dla,
    set_batches,
    use_dla,
    weakly_typed,
)
from edgeres.trt.options import MIB, Options

if TYPE_CHECKING:
    from edgeres.runners.cuda import Cuda

UNSCALED = re.compile(r"Missing scale and zero-point for tensor (.+?)(?:, expect .*)?$", re.MULTILINE)
"""TensorRT's warning about a tensor that calibration says nothing of: layers at it are not INT8."""


@dataclass(frozen=True)
class Built:
    """A plan, and how it came to be.

    ``options`` made it: less than was asked for where memory ran short. ``notes`` say what else a record should keep,
    and the user was told. ``on_gpu`` names layers that DLA does not run. ``calibration_cache`` holds the scales of
    implicit INT8. ``warnings``: what TensorRT found worth one, in its words; the user was told the first.
    """

    plan: bytes
    options: Options
    notes: list[str]
    on_gpu: list[str]
    calibration_cache: bytes | None
    warnings: list[str]


class OutOfMemory(BuildError):
    """Memory ran short. ``limited``: ``workspace`` bytes were too few for some layer; ``dynamic``: batches vary.

    ``calibrated``: what was calibrated before, to be used again, and ``notes`` about it.
    """

    def __init__(self, cause: str, *, evidence: str, hint: str, workspace: int, dynamic: bool) -> None:
        super().__init__(cause, evidence=evidence, hint=hint)
        self.workspace, self.dynamic = workspace, dynamic
        needed = max((int(n) for n in re.findall(r"Requested size was (\d+) bytes", evidence)), default=0)
        self.limited = needed > workspace or "workspace limit" in evidence
        self.calibrated: bytes | None = None
        self.notes: list[str] = []


def build(trt: Any, onnx: bytes, precision: str, options: Options, calibration: Calibration | None = None) -> Built:
    """`build_plan`, again with lesser demands while memory runs short.

    Raises `BuildError` of the last attempt; no other error is worth another.
    """
    steps: Iterator[tuple[str, Options]] | None = None
    notes: list[str] = []
    while True:
        try:
            built = build_plan(trt, onnx, precision, options, calibration)
            return replace(built, notes=notes + built.notes)
        except OutOfMemory as error:
            if steps is None:
                if error.limited and options.workspace is not None:
                    raise  # by the user, not by the memory there is
                steps = _lesser(options, error.workspace, error.dynamic)
            if (step := next(steps, None)) is None:
                raise
            if calibration and error.calibrated:  # once is enough
                calibration = Calibration(error.calibrated.decode(), algorithm=calibration.algorithm)
            what, options = step
            notes += [*error.notes, f"memory ran short: again with {what}"]
            say(notes[-1])


def _lesser(options: Options, workspace: int, dynamic: bool) -> Iterator[tuple[str, Options]]:
    """Options that ask for less, each on top of those before. What is so already is no step."""
    changes: list[tuple[str, dict[str, Any]]] = [
        ("half the workspace", {"workspace": max(1, workspace // 2) / MIB}),
        ("a quarter of the workspace", {"workspace": max(1, workspace // 4) / MIB}),
        ("optimization level 1", {"level": 1 if options.level is None else min(1, options.level)}),
        ("no auxiliary streams", {"aux_streams": 0}),
        ("batch 1 only", {"profile": (1, 1, 1)} if dynamic else {}),
    ]
    for what, change in changes:
        if (lesser := replace(options, **change)) != options:
            options = lesser
            yield what, options


def build_plan(
    trt: Any, onnx: bytes, precision: str, options: Options, calibration: Calibration | None = None
) -> Built:
    """Build ``onnx`` with library ``trt``, in one attempt. Raises `BuildError` with all that went wrong.

    With ``calibration`` the graph is the FP32 one, and INT8 implicit; what goes wrong with its images is raised as it
    came.
    """
    check(trt, precision, options, calibration)
    weak = weakly_typed(trt, options, calibration)
    parts = _start(trt, onnx, precision, options, weak)
    configure(parts, precision, options, weak)
    dynamic = parts.tensor.shape[0] < 0
    set_batches(parts, options)
    notes: list[str] = []
    on_gpu: list[str] = []
    if options.dla_core is not None:
        on_gpu, words = use_dla(parts, options)
        _note(notes, words)
    timings = None if ahead_of_time(trt) else options.timing_cache
    if timings:
        _timing_cache(parts.config, timings)
    serving: Any = None
    with _device(calibration) as cuda:
        if calibration is not None:
            shape = calibration_shape(parts, options, calibration)
            parts.config.int8_calibrator = serving = calibrator(trt, calibration, cuda, shape)
        plan = _run(parts, serving)
    if serving is not None:
        if serving.error is not None:
            raise serving.error
        _note(notes, *serving.notes)
    if plan is None:
        error = _failed(parts, options, dynamic)
        if serving is not None and serving.done and isinstance(error, OutOfMemory):
            error.calibrated, error.notes = serving.cache, serving.notes
        raise error
    if serving is not None:
        serving.check()
        _note(notes, *_unscaled(parts.log))
    if timings:
        _save_timing_cache(parts.config, timings)
    warnings = parts.log.messages("WARNING")
    noted = serving is not None  # tensors without a scale
    if told := [words for words in warnings if not (noted and UNSCALED.search(words))]:
        more = f" (and {len(told) - 1} more, see engine.json)" if len(told) > 1 else ""
        say(f"{title(trt)} warns: {told[0]}{more}")
    return Built(bytes(plan), options, notes, on_gpu, serving.cache if serving is not None else None, warnings)


def _note(notes: list[str], *lines: str) -> None:
    for line in lines:
        say(line)
        notes.append(line)


def _start(trt: Any, onnx: bytes, precision: str, options: Options, weak: bool) -> Parts:
    """What a build begins with: ``onnx`` parsed, and a configuration with nothing in it."""
    log = logger(trt)
    log.said.clear()
    try:
        builder = trt.Builder(log)
    except TypeError as error:  # what pybind11 makes of a constructor that returned nothing
        hint = "see whether the NVIDIA driver works (`nvidia-smi`) and is new enough"
        hint += "" if ahead_of_time(trt) else "; --target rtx builds without a GPU"
        raise BuildError(f"{title(trt)} cannot start", evidence=log.errors() or str(error), hint=hint) from error
    if options.dla_core is not None:
        require_dla(trt, builder, options.dla_core)
    flags = 0
    for name in ("EXPLICIT_BATCH", *(() if weak else ("STRONGLY_TYPED",))):  # the one must be said in 8.6
        if (member := getattr(trt.NetworkDefinitionCreationFlag, name, None)) is not None:
            flags |= 1 << int(member)
    network = given(builder.create_network(flags), "create a network", log)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(onnx):
        errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        command = "export" if precision == "fp32" else "quantize"
        if precision != "fp32" and not strongly_typed(trt):  # reads FP32 scales only, and FP16 is a flag
            command += f" --tensorrt {trt.__version__}"
        raise BuildError(
            f"{title(trt)} does not read this ONNX file",
            evidence="\n".join(errors) or log.errors(),
            hint=f"make it for this target again: `edgeres {command}`",
        )
    tensor = given(network.get_input(0), "find an input in this ONNX file", log)
    config = given(builder.create_builder_config(), "create a configuration", log)
    return Parts(trt, log, builder, network, parser, tensor, config)


def _parser_error(error: Any) -> str:
    """One line: node, operator, and what is wrong with it. TensorRT 8 knows the node's number only."""
    name = getattr(error, "node_name", str)() or (f"node {error.node()}" if error.node() >= 0 else "")
    operator = getattr(error, "node_operator", str)()
    return f"{name}{f' ({operator})' if operator else ''}{': ' if name else ''}{error.desc()}"


def _device(calibration: Calibration | None) -> AbstractContextManager[Cuda | None]:
    """Device memory for calibration images, given back after the build."""
    if calibration is None or calibration.batches is None:
        return nullcontext()
    from edgeres.runners.cuda import open_cuda

    return closing(open_cuda(EXECUTORS["tensorrt"][1]))


def _failed(parts: Parts, options: Options, dynamic: bool) -> BuildError:
    """What to raise where there is no plan."""
    trt, log = parts.trt, parts.log
    refits = ahead_of_time(trt) and (options.strip or options.refit)  # fails without a GPU, for reasons that vary
    more = ("stripping and refitting need a GPU here, also with TensorRT-RTX",) if refits else ()
    said = {"evidence": log.errors(), "hint": advice(log.errors("WARNING"), *more)}
    if not any(sign in log.errors().lower() for sign in MEMORY + WORKSPACE):
        return BuildError(f"{title(trt)} built no engine", **said)
    workspace = parts.config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
    return OutOfMemory(f"{title(trt)} ran short of memory", **said, workspace=workspace, dynamic=dynamic)


def _unscaled(log: Any) -> list[str]:
    """A note about tensors without a scale, if there are any."""
    names = UNSCALED.findall(log.errors("WARNING"))
    if not names:
        return []
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    what = "1 tensor has" if len(names) == 1 else f"{len(names)} tensors have"
    return [f"{what} no scale, and layers there are not INT8: {', '.join(names[:NAMED])}{more}"]


def _timing_cache(config: Any, path: Path) -> None:
    """Give ``config`` what earlier builds measured. What does not fit is left aside: it only saves time."""
    try:
        kept = path.read_bytes()
    except OSError:
        kept = b""
    for content in dict.fromkeys((kept, b"")):
        timings = config.create_timing_cache(content)
        if timings is not None and config.set_timing_cache(timings, False):
            return
        if content:
            say(f"{path.name} is of another GPU or TensorRT: measured anew")


def _save_timing_cache(config: Any, path: Path) -> None:
    timings = config.get_timing_cache()
    if timings is None or (content := timings.serialize()) is None:
        return
    try:
        with atomic(path) as temporary:
            temporary.write_bytes(bytes(content))
    except OSError as error:
        say(f"{path.name} could not be kept: {error.strerror}")


def _run(parts: Parts, serving: Any) -> Any:
    """Build in a thread of its own: Ctrl-C reaches this one, and ends the build at its next step.

    ``serving`` is the calibrator, if there is one: it ends too, and a build whose images fail is not worth finishing.
    """
    trt, start = parts.trt, time.monotonic()
    monitor = _monitor(trt) if hasattr(trt, "IProgressMonitor") else None
    if monitor:
        parts.config.progress_monitor = monitor
    with busy("build") as update, futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(parts.builder.build_serialized_network, parts.network, parts.config)
        try:
            while not futures.wait([future], timeout=0.2).done:
                where = (serving.text if serving else "") or (monitor.text if monitor else "")
                update(f"build {where}{', ' if where else ''}{time.monotonic() - start:.0f} s")
                if monitor and serving and serving.error:
                    monitor.cancelled = True
        except BaseException:
            say("stopping" if monitor else f"{title(trt)} cannot stop in the middle: waiting for it to finish")
            if serving:
                serving.stop()
            if monitor:
                monitor.cancelled = True
            raise
        return future.result()


def _monitor(trt: Any) -> Any:
    """An IProgressMonitor: ``text`` says where the build is, ``cancelled`` ends it. Called from TensorRT's threads."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """What TensorRT calls."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.text, self.cancelled = "", False
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.text = f"{phase_name} {step + 1}/{self.steps.get(phase_name, 0)}"
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()
