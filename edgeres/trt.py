"""TensorRT and TensorRT-RTX as builders: typed ONNX -> plan. One code path from TensorRT 8.6 to 11.

What a library can do is asked of the library, never of its version: enum members are looked up by name, and every
``None`` or ``False`` that it returns becomes an error with what its logger and parser said.
"""

from __future__ import annotations

from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeres.errors import BuildError, UsageError, need
from edgeres.files import atomic
from edgeres.progress import busy, say

EXECUTORS = {"tensorrt": ("tensorrt", "tensorrt"), "tensorrt-rtx": ("tensorrt_rtx", "rtx")}
"""Executor -> the module that is imported, and edgeres' extra that brings it."""
HARMLESS = ("Thread context has not been set",)
"""What TensorRT-RTX logs as fatal on machines without a GPU, and then goes on."""


@dataclass(frozen=True)
class Options:
    """How a plan is built; None leaves TensorRT's default.

    ``profile``: smallest, usual and largest batch of a model with dynamic batch. ``workspace``: bytes that kernels may
    use. ``level``: optimization level, 0 to 5. ``capabilities``: compute capabilities that a TensorRT-RTX plan is for,
    such as "8.6". ``hardware_compatible``: runs on every GPU from Ampere on; ``version_compatible``: on later versions
    of TensorRT. ``strip``: leave out weights, to be refitted; ``refit``: let weights be replaced. ``sparse``: permit
    2:4 kernels. ``tf32``: let FP32 layers round to TF32. ``timing_cache``: file that keeps what kernels took.
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


def library(executor: str) -> Any:
    """The module of ``executor``. Raises `MissingDependency` naming the extra."""
    return need(*EXECUTORS[executor])


def strongly_typed(trt: Any) -> bool:
    """Whether precision lives in the graph alone: TensorRT 10 on, where FP16 and INT8 need no flag."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def build_plan(trt: Any, onnx: bytes, precision: str, options: Options) -> bytes:
    """Build ``onnx`` with library ``trt`` -> the serialized plan. Raises `BuildError` with all that went wrong."""
    log = _logger(trt)
    try:
        builder = trt.Builder(log)
    except TypeError as error:  # what pybind11 makes of a constructor that returned nothing
        hint = "TensorRT builds where the NVIDIA driver works (`nvidia-smi`); --target rtx builds without a GPU"
        raise BuildError("TensorRT cannot start", evidence=log.errors() or str(error), hint=hint) from error
    flags = 0
    for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED"):  # the one must be said up to 8.6, the other in 10
        if (member := getattr(trt.NetworkDefinitionCreationFlag, name, None)) is not None:
            flags |= 1 << int(member)
    network = _given(builder.create_network(flags), "create a network", log)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(onnx):
        errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        raise BuildError(
            f"TensorRT {trt.__version__} does not read this ONNX file",
            evidence="\n".join(errors) or log.errors(),
            hint="quantize for this target again with `edgeres quantize`",
        )
    config = _given(builder.create_builder_config(), "create a configuration", log)
    _configure(trt, builder, network, config, precision, options, log)
    cache = _timing_cache(config, options.timing_cache)
    plan = _run(trt, builder, network, config)
    if plan is None:
        raise BuildError("TensorRT built no engine", evidence=log.errors(), hint=_advice(log.errors()))
    if cache and options.timing_cache:
        _save_timing_cache(config, options.timing_cache)
    return bytes(plan)


def _configure(trt: Any, builder: Any, network: Any, config: Any, precision: str, options: Options, log: Any) -> None:
    """Everything between a network and its build."""
    if not strongly_typed(trt):
        # INT8 alone would leave the rest in FP32
        _flag(trt, config, "FP16", precision in ("fp16", "int8"))
        _flag(trt, config, "INT8", precision == "int8")
    _flag(trt, config, "TF32", options.tf32)
    _flag(trt, config, "VERSION_COMPATIBLE", options.version_compatible)
    _flag(trt, config, "STRIP_PLAN", options.strip)
    _flag(trt, config, "REFIT", options.refit)
    _flag(trt, config, "SPARSE_WEIGHTS", options.sparse)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.level is not None:
        _set(config, "builder_optimization_level", options.level)
    if options.aux_streams is not None:
        _set(config, "max_aux_streams", options.aux_streams)
    if options.hardware_compatible:
        _set(config, "hardware_compatibility_level", trt.HardwareCompatibilityLevel.AMPERE_PLUS)
    # layer names and what they run in, for the fusion audit; no cost at run time
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.capabilities:
        _capabilities(trt, config, options.capabilities)
    tensor = network.get_input(0)
    shape = tuple(tensor.shape)
    if shape[0] < 0:
        profile = builder.create_optimization_profile()
        # returns nothing in Python; a shape out of order is an error when the profile is added
        profile.set_shape(tensor.name, *((n, *shape[1:]) for n in options.profile))
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"batches {options.profile} make no profile", evidence=log.errors(), hint="min, opt, max")


def _flag(trt: Any, config: Any, name: str, on: bool) -> None:
    """Switch a builder flag; asking for one that this library lacks is an error, leaving it off is not."""
    member = getattr(trt.BuilderFlag, name, None)
    if member is None:
        if on:
            raise UsageError(f"TensorRT {trt.__version__} has no {name.lower().replace('_', ' ')}")
        return
    (config.set_flag if on else config.clear_flag)(member)


def _set(config: Any, name: str, value: Any) -> None:
    if not hasattr(config, name):
        raise UsageError(f"this TensorRT has no {name.replace('_', ' ')}")
    setattr(config, name, value)


def _capabilities(trt: Any, config: Any, wanted: tuple[str, ...]) -> None:
    """Choose what GPUs a plan is for, where the library builds for others than the one at hand."""
    if not hasattr(config, "set_compute_capability"):
        raise UsageError(
            f"TensorRT {trt.__version__} builds for the GPU at hand only", hint="--target rtx takes a choice"
        )
    known = {f"{n[2:-1]}.{n[-1]}": n for n in dir(trt.ComputeCapability) if n.startswith("SM")}
    config.num_compute_capabilities = len(wanted)
    for i, name in enumerate(wanted):
        if name not in known:
            raise UsageError(
                f"{trt.__name__} {trt.__version__} does not build for compute capability {name}",
                hint=f"choose from: {', '.join(sorted(known, key=lambda v: [int(p) for p in v.split('.')]))}",
            )
        if not config.set_compute_capability(getattr(trt.ComputeCapability, known[name]), i):
            raise BuildError(f"compute capability {name} was refused", hint="name fewer of them")


def _given(value: Any, what: str, log: Any) -> Any:
    if value is None:
        raise BuildError(f"TensorRT could not {what}", evidence=log.errors())
    return value


def _parser_error(error: Any) -> str:
    """One line: node, operator, and what is wrong with it."""
    name = getattr(error, "node_name", lambda: "")() or f"node {error.node()}"
    operator = getattr(error, "node_operator", lambda: "")()
    return f"{name}{f' ({operator})' if operator else ''}: {error.desc()}"


def _advice(errors: str) -> str:
    """The next step. Running out of memory has several disguises."""
    memory = ("out of memory", "outofmemory", "could not find any implementation for node", "insufficient memory")
    if any(sign in errors.lower() for sign in memory):
        return "this is often too little memory: close other programs, or build with a smaller workspace or batch"
    return "the messages above are TensorRT's own"


def _timing_cache(config: Any, path: Path | None) -> bool:
    """Give ``config`` what earlier builds measured. A cache that does not fit is left aside: it only saves time."""
    if path is None or not hasattr(config, "create_timing_cache"):
        return False
    try:
        kept = path.read_bytes()
    except OSError:
        kept = b""
    cache = config.create_timing_cache(kept)
    if kept and (cache is None or not config.set_timing_cache(cache, False)):
        say(f"{path.name} is of another GPU or TensorRT: begin anew")
        cache = config.create_timing_cache(b"")
        kept = b""
    return cache is not None and (bool(kept) or bool(config.set_timing_cache(cache, False)))


def _save_timing_cache(config: Any, path: Path) -> None:
    cache = config.get_timing_cache()
    if cache is None:  # TensorRT-RTX has none
        return
    try:
        with atomic(path) as temporary:
            temporary.write_bytes(bytes(cache.serialize()))
    except OSError as error:
        say(f"{path.name} could not be kept: {error.strerror}")


def _run(trt: Any, builder: Any, network: Any, config: Any) -> Any:
    """Build in a thread of its own: Ctrl-C reaches this one, and ends the build at its next step."""
    state = _State()
    if hasattr(trt, "IProgressMonitor") and hasattr(config, "progress_monitor"):
        config.progress_monitor = _monitor(trt, state)
    with busy("build") as update, futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(builder.build_serialized_network, network, config)
        try:
            while True:
                try:
                    return future.result(timeout=0.2)
                except futures.TimeoutError:
                    update(f"build: {state.text}" if state.text else "build")
        except BaseException:
            state.cancelled = True
            raise


@dataclass
class _State:
    """Where a build is, and whether it is to end."""

    text: str = ""
    cancelled: bool = False


def _monitor(trt: Any, state: _State) -> Any:
    """An IProgressMonitor that keeps ``state``. TensorRT calls it from threads of its own."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """What TensorRT calls."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            state.text = f"{phase_name} {step + 1}/{self.steps.get(phase_name, 0)}"
            return not state.cancelled

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _logger(trt: Any) -> Any:
    """An ILogger that keeps warnings and errors. TensorRT uses the first logger of a process for everything."""

    class Log(trt.ILogger):  # type: ignore[misc]
        """What TensorRT says."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.said: list[tuple[int, str]] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.WARNING) and not any(h in message for h in HARMLESS):
                self.said.append((int(severity), message.strip()))

        def errors(self) -> str:
            """Errors so far, each once, oldest first."""
            bad = [m for s, m in self.said if s <= int(trt.ILogger.Severity.ERROR)]
            return "\n".join(dict.fromkeys(bad))

    return Log()
