"""The library that builds and runs plans: which module it is, what kind it is of, and what it has said."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from edgeres.errors import BuildError, MissingDependency, need

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
    (("no scaling factors",), "a calibration cache of another graph: make the two together, by `edgeres quantize`"),
)
"""What TensorRT logs, in lower case -> what is likely behind it and what to do. Several may fit."""


@dataclass(frozen=True)
class Parts:
    """The library, its log, and what it has made for one build, all of which must live as long. ``tensor``: input."""

    trt: Any
    log: Any
    builder: Any
    network: Any
    parser: Any
    tensor: Any
    config: Any


def load_library(executor: str) -> Any:
    """The module of ``executor``. Raises `MissingDependency` naming the extra, or what its own libraries lack."""
    module, extra = EXECUTORS[executor]
    try:
        return need(module, extra)
    except OSError as error:  # from the bindings, which load the shared libraries themselves
        hint = f"reinstall it, all parts of one version: {module}, its libs and bindings, CUDA"
        raise MissingDependency(f"{module} does not load", evidence=str(error), hint=hint) from error


def strongly_typed(trt: Any) -> bool:
    """Whether precision can live in the graph alone: TensorRT 10 on, where FP16 and INT8 need no flag."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") or not hasattr(trt.BuilderFlag, "FP16")


def ahead_of_time(trt: Any) -> bool:
    """Whether plans are for GPUs that need not be here (TensorRT-RTX), or for the one at hand."""
    return hasattr(trt, "ComputeCapability")


def title(trt: Any) -> str:
    """What messages call the library."""
    return f"{'TensorRT-RTX' if ahead_of_time(trt) else 'TensorRT'} {trt.__version__}"


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

        def messages(self, least: str = "ERROR") -> list[str]:
            """What was said at ``least`` so severely, each once, oldest first."""
            level = int(getattr(trt.ILogger.Severity, least))
            return list(dict.fromkeys(message for severity, message in self.said if severity <= level))

        def errors(self, least: str = "ERROR") -> str:
            """`messages` as one text."""
            return "\n".join(self.messages(least))

    return Log()


def given(value: Any, what: str, log: Any) -> Any:
    """``value``, unless it is None: then `BuildError` with what the log says."""
    if value is None:
        raise BuildError(f"TensorRT could not {what}", evidence=log.errors(), hint=advice(log.errors("WARNING")))
    return value


def advice(log: str, *more: str) -> str:
    """The next step: all that may be behind what TensorRT said, and ``more``."""
    fit = [*more, *(cause for signs, cause in CAUSES if any(sign in log.lower() for sign in signs))]
    if len(fit) < 2:
        return f"likely {fit[0]}" if fit else "the messages above are TensorRT's own"
    return "\n".join(["likely one of:", *(f"{i}. {cause}" for i, cause in enumerate(fit, 1))])
