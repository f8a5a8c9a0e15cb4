"""TensorRT and TensorRT-RTX as builders: typed ONNX -> plan. One code path from TensorRT 8.6 to 11.

What a library can do is asked of the library, never of its version: enum members are looked up by name, and every
``None`` or ``False`` that it returns becomes an error with what its logger and parser said.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from edgeres.errors import BuildError, MissingDependency, UsageError, need
from edgeres.files import atomic
from edgeres.progress import busy, say

EXECUTORS = {"tensorrt": ("tensorrt", "tensorrt"), "tensorrt-rtx": ("tensorrt_rtx", "rtx")}
"""Executor -> the module that is imported, and edgeres' extra that brings it."""
HARMLESS = ("Thread context has not been set",)
"""What TensorRT-RTX logs as fatal on machines without a GPU, and then goes on."""
UNIMPLEMENTED = "could not find any implementation for node"  # of memory and workspace alike
MEMORY = ("out of memory", "outofmemory", "insufficient memory", "could not be allocated", UNIMPLEMENTED)
WORKSPACE = ("workspace limit", "sufficient workspace", "requested size was", UNIMPLEMENTED)
CAUSES = (
    (MEMORY, "too little memory: close other programs, or build with a smaller workspace or batch"),
    (WORKSPACE, "a workspace too small for some layer: allow more, or leave it to TensorRT"),
    (("cuda_success", "cudaerror 35"), "no NVIDIA GPU here, or a driver too old for this TensorRT"),
    (("nvinfer_lean",), "version-compatible plans need TensorRT's lean runtime, which is not installed here"),
    (("for turing",), "compute capability 7.5 lacks kernels for FP32: leave it out, or build FP16 or INT8"),
)
"""What TensorRT logs, in lower case -> what is likely behind it and what to do. Several may fit."""


@dataclass(frozen=True)
class Options:
    """How a plan is built; None leaves TensorRT's default.

    ``profile``: smallest, usual and largest batch of a model with dynamic batch. ``workspace``: bytes that kernels may
    use. ``level``: optimization level, 0 to 5. ``capabilities``: compute capabilities that a TensorRT-RTX plan is for,
    such as "8.6". ``hardware_compatible``: runs on every GPU from Ampere on; ``version_compatible``: on later versions
    of TensorRT. ``strip``: leave out weights, to be refitted; ``refit``: let weights be replaced. ``sparse``: permit
    2:4 kernels. ``tf32``: let FP32 layers round to TF32. ``timing_cache``: file that keeps what kernels took; unused by
    TensorRT-RTX, which measures nothing while it builds. Raises `UsageError` for numbers that make no sense.
    """

    profile: tuple[int, int, int] = (1, 8, 32)
    workspace: int | None = None
    level: int | None = None
    aux_streams: int | None = None
    capabilities: tuple[str, ...] = ()
    tf32: bool = False
    hardware_compatible: bool = False
    version_compatible: bool = False
    strip: bool = False
    refit: bool = False
    sparse: bool = False
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        low, usual, high = self.profile
        for sound, what in (
            (1 <= low <= usual <= high, f"batches {self.profile} are not smallest, usual and largest"),
            (self.workspace is None or self.workspace > 0, f"a workspace of {self.workspace} bytes"),
            (self.level is None or 0 <= self.level <= 5, f"optimization level {self.level} is not 0 to 5"),
            (self.aux_streams is None or self.aux_streams >= 0, f"{self.aux_streams} auxiliary streams"),
        ):
            if not sound:
                raise UsageError(what)


class OutOfMemory(BuildError):
    """Memory ran short. ``limited``: ``workspace`` bytes were too few for some layer; ``dynamic``: batches vary."""

    def __init__(self, cause: str, *, evidence: str, hint: str, workspace: int, dynamic: bool) -> None:
        super().__init__(cause, evidence=evidence, hint=hint)
        self.workspace, self.dynamic = workspace, dynamic
        needed = max((int(n) for n in re.findall(r"Requested size was (\d+) bytes", evidence)), default=0)
        self.limited = needed > workspace or "workspace limit" in evidence


def load_library(executor: str) -> Any:
    """The module of ``executor``. Raises `MissingDependency` naming the extra, or what its own libraries lack."""
    module, extra = EXECUTORS[executor]
    try:
        return need(module, extra)
    except OSError as error:  # from the bindings, which load the shared libraries themselves
        hint = f"reinstall it, all parts of one version: {module}, its libs and bindings, CUDA"
        raise MissingDependency(f"{module} does not load", evidence=str(error), hint=hint) from error


def strongly_typed(trt: Any) -> bool:
    """Whether precision lives in the graph alone: TensorRT 10 on, where FP16 and INT8 need no flag."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") or not hasattr(trt.BuilderFlag, "FP16")


def ahead_of_time(trt: Any) -> bool:
    """Whether plans are for GPUs that need not be here (TensorRT-RTX), or for the one at hand."""
    return hasattr(trt, "ComputeCapability")


def build(trt: Any, onnx: bytes, precision: str, options: Options) -> tuple[bytes, Options]:
    """`build_plan`, again with lesser demands while memory runs short -> the plan, and the options that made it.

    Raises `BuildError` of the last attempt; no other error is worth another.
    """
    steps: Iterator[tuple[str, Options]] | None = None
    while True:
        try:
            return build_plan(trt, onnx, precision, options), options
        except OutOfMemory as error:
            if steps is None:
                if error.limited and options.workspace is not None:
                    raise  # by the user, not by the memory there is
                steps = _lesser(options, error.workspace, error.dynamic)
            if (step := next(steps, None)) is None:
                raise
            what, options = step
            say(f"memory ran short: again with {what}")


def _lesser(options: Options, workspace: int, dynamic: bool) -> Iterator[tuple[str, Options]]:
    """Options that ask for less, each on top of those before. What is so already is no step."""
    changes: list[tuple[str, dict[str, Any]]] = [
        ("half the workspace", {"workspace": max(1, workspace // 2)}),
        ("a quarter of the workspace", {"workspace": max(1, workspace // 4)}),
        ("optimization level 1", {"level": 1 if options.level is None else min(1, options.level)}),
        ("no auxiliary streams", {"aux_streams": 0}),
        ("batch 1 only", {"profile": (1, 1, 1)} if dynamic else {}),
    ]
    for what, change in changes:
        if (lesser := replace(options, **change)) != options:
            options = lesser
            yield what, options


def build_plan(trt: Any, onnx: bytes, precision: str, options: Options) -> bytes:
    """Build ``onnx`` with library ``trt`` -> the serialized plan. Raises `BuildError` with all that went wrong."""
    log = logger(trt)
    log.said.clear()
    try:
        builder = trt.Builder(log)
    except TypeError as error:  # what pybind11 makes of a constructor that returned nothing
        hint = "see whether the NVIDIA driver works (`nvidia-smi`) and is new enough"
        hint += "" if ahead_of_time(trt) else "; --target rtx builds without a GPU"
        raise BuildError(f"{_name(trt)} cannot start", evidence=log.errors() or str(error), hint=hint) from error
    flags = 0
    for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED"):  # the one must be said in 8.6, the other in 10
        if (member := getattr(trt.NetworkDefinitionCreationFlag, name, None)) is not None:
            flags |= 1 << int(member)
    network = _given(builder.create_network(flags), "create a network", log)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(onnx):
        errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        raise BuildError(
            f"{_name(trt)} does not read this ONNX file",
            evidence="\n".join(errors) or log.errors(),
            hint=f"make it for this target again: `edgeres {'quantize' if precision == 'int8' else 'export'}`",
        )
    config = _given(builder.create_builder_config(), "create a configuration", log)
    _configure(trt, builder, network, config, precision, options, log)
    timings = None if ahead_of_time(trt) else options.timing_cache
    if timings:
        _timing_cache(config, timings)
    plan = _run(trt, builder, network, config)
    if plan is None:
        refits = ahead_of_time(trt) and (options.strip or options.refit)  # fails without a GPU, for reasons that vary
        more = ("stripping and refitting need a GPU here, also with TensorRT-RTX",) if refits else ()
        parts = {"evidence": log.errors(), "hint": _advice(log.errors("WARNING"), *more)}
        if not any(sign in log.errors().lower() for sign in MEMORY + WORKSPACE):
            raise BuildError(f"{_name(trt)} built no engine", **parts)
        workspace = config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
        dynamic = config.num_optimization_profiles > 0
        raise OutOfMemory(f"{_name(trt)} ran short of memory", **parts, workspace=workspace, dynamic=dynamic)
    if timings:
        _save_timing_cache(config, timings)
    return bytes(plan)


def _name(trt: Any) -> str:
    return f"{'TensorRT-RTX' if ahead_of_time(trt) else 'TensorRT'} {trt.__version__}"


def _configure(trt: Any, builder: Any, network: Any, config: Any, precision: str, options: Options, log: Any) -> None:
    """Everything between a network and its build."""
    flags = {
        "TF32": options.tf32,
        "VERSION_COMPATIBLE": options.version_compatible,
        "STRIP_PLAN": options.strip,
        "REFIT": options.refit,
        "SPARSE_WEIGHTS": options.sparse,
    }
    if not strongly_typed(trt):  # INT8 alone would leave the rest in FP32
        flags |= {"FP16": precision in ("fp16", "int8"), "INT8": precision == "int8"}
    for name, on in flags.items():
        if (member := getattr(trt.BuilderFlag, name, None)) is not None:
            (config.set_flag if on else config.clear_flag)(member)
        elif on:
            raise UsageError(f"{_name(trt)} has no {name.lower().replace('_', ' ')}")
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.level is not None:
        config.builder_optimization_level = options.level
    if options.aux_streams is not None:
        config.max_aux_streams = options.aux_streams
    if options.hardware_compatible:
        if ahead_of_time(trt):  # takes the setting, and makes the same plan
            raise UsageError(f"{_name(trt)} has no hardware compatibility", hint="name compute capabilities instead")
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    # layer names and what they run in, for the fusion audit; no cost at run time
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.capabilities:
        _capabilities(trt, config, options.capabilities)
    tensor = _given(network.get_input(0), "find an input in this ONNX file", log)
    shape = tuple(tensor.shape)
    if shape[0] < 0:
        profile = builder.create_optimization_profile()
        # returns nothing in Python; what is wrong with it comes out when it is added
        profile.set_shape(tensor.name, *((n, *shape[1:]) for n in options.profile))
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(
                f"{_name(trt)} takes no batches {options.profile} of {shape[1:]}",
                evidence=log.errors(),
                hint="choose others, or export with a fixed batch",
            )


def _capabilities(trt: Any, config: Any, wanted: tuple[str, ...]) -> None:
    """Choose what GPUs a plan is for, where the library builds for others than the one at hand."""
    if not ahead_of_time(trt):
        raise UsageError(f"{_name(trt)} builds for the GPU at hand only", hint="--target rtx takes a choice")
    known = {f"{n[2:-1]}.{n[-1]}": n for n in dir(trt.ComputeCapability) if n.startswith("SM")}
    wanted = tuple(dict.fromkeys(wanted))  # one named twice would be built twice
    if missing := [name for name in wanted if name not in known]:
        raise UsageError(
            f"{_name(trt)} does not build for compute capability {', '.join(missing)}",
            hint=f"choose from: {', '.join(sorted(known, key=float))}",
        )
    config.num_compute_capabilities = len(wanted)
    for i, name in enumerate(wanted):
        if not config.set_compute_capability(getattr(trt.ComputeCapability, known[name]), i):
            raise BuildError(f"{_name(trt)} refused compute capability {name}", hint="name fewer of them")


def _given(value: Any, what: str, log: Any) -> Any:
    if value is None:
        raise BuildError(f"TensorRT could not {what}", evidence=log.errors(), hint=_advice(log.errors("WARNING")))
    return value


def _parser_error(error: Any) -> str:
    """One line: node, operator, and what is wrong with it. TensorRT 8 knows the node's number only."""
    name = getattr(error, "node_name", str)() or (f"node {error.node()}" if error.node() >= 0 else "")
    operator = getattr(error, "node_operator", str)()
    return f"{name}{f' ({operator})' if operator else ''}{': ' if name else ''}{error.desc()}"


def _advice(log: str, *more: str) -> str:
    """The next step: all that may be behind what TensorRT said, and ``more``."""
    fit = [*more, *(cause for signs, cause in CAUSES if any(sign in log.lower() for sign in signs))]
    if len(fit) < 2:
        return f"likely {fit[0]}" if fit else "the messages above are TensorRT's own"
    return "\n".join(["likely one of:", *(f"{i}. {cause}" for i, cause in enumerate(fit, 1))])


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


def _run(trt: Any, builder: Any, network: Any, config: Any) -> Any:
    """Build in a thread of its own: Ctrl-C reaches this one, and ends the build at its next step."""
    monitor = _monitor(trt) if hasattr(trt, "IProgressMonitor") else None
    if monitor:
        config.progress_monitor = monitor
    with busy("build") as update, futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(builder.build_serialized_network, network, config)
        try:
            while not futures.wait([future], timeout=0.2).done:
                update(f"build {monitor.text}" if monitor else "build")
        except BaseException:
            say("stopping" if monitor else f"{_name(trt)} cannot stop in the middle: waiting for it to finish")
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


@cache
def logger(trt: Any) -> Any:
    """The ILogger of library ``trt``: one, since it ignores any other as long as something made with the first lives.

    Keeps warnings and errors in ``said``.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        """What TensorRT says."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.said: list[tuple[int, str]] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.WARNING) and not any(h in message for h in HARMLESS):
                self.said.append((int(severity), message.strip()))

        def errors(self, least: str = "ERROR") -> str:
            """What was said at ``least`` so severely, each once, oldest first."""
            level = int(getattr(trt.ILogger.Severity, least))
            return "\n".join(dict.fromkeys(message for severity, message in self.said if severity <= level))

    return Log()
