"""One runner per executor: ``with open_runner(path) as runner: logits = runner.infer(pixels)``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from edgeres.errors import InputError, UsageError
from edgeres.fusion import Fusion
from edgeres.recipe import Preprocess
from edgeres.trt import EXECUTORS


class Runner(ABC):
    """A loaded network. ``batch`` is its fixed batch size, or None if it takes any; ``input_size`` is H and W.

    ``dtype`` is what it takes: float32, float16, or uint8. The last it normalizes itself, by ``preprocess``.
    """

    batch: int | None
    input_size: int
    dtype: np.dtype[Any] = np.dtype(np.float32)
    preprocess: Preprocess | None = None

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """Normalized float32 pixels (N, 3, H, W) -> the same in ``dtype``, as an application would have them ready."""
        if self.dtype != np.uint8:
            return pixels.astype(self.dtype, copy=False)
        if self.preprocess is None:
            raise UsageError("how this engine's pixels are normalized is not known", hint="open it from its folder")
        mean, std = (np.asarray(v, np.float32).reshape(3, 1, 1) for v in (self.preprocess.mean, self.preprocess.std))
        if self.preprocess.channel_order == "BGR":
            mean, std = mean[::-1], std[::-1]
        return np.rint((pixels * std + mean) * 255).astype(np.uint8)

    def infer(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (N, 3, H, W), normalized float32 or `prepare`d -> logits float32 (N, classes), N from 1.

        The result is the caller's. A network of fixed batch gets N in pieces, the last one padded with zeros. One that
        ends in a convolution, as DLA wants it, gives (N, classes, 1, 1), which comes back like any other's.
        """
        if not len(pixels) or pixels.shape[1:] != (3, self.input_size, self.input_size):
            raise UsageError(
                f"this engine takes images of (N, 3, {self.input_size}, {self.input_size})",
                evidence=f"got {pixels.shape}",
            )
        if pixels.dtype != self.dtype:
            pixels = self.prepare(pixels)
        logits = self._run(pixels) if self.batch is None else self._in_pieces(self.batch, pixels)
        if logits.shape[2:] == (1, 1):
            logits = logits.reshape(logits.shape[:2])
        return logits.astype(np.float32, copy=False)

    def _in_pieces(self, batch: int, pixels: np.ndarray) -> np.ndarray:
        pieces = []
        for start in range(0, len(pixels), batch):
            piece = pixels[start : start + batch]
            padding = np.zeros((batch - len(piece), *piece.shape[1:]), piece.dtype)
            pieces.append(self._run(np.concatenate([piece, padding]) if len(padding) else piece)[: len(piece)])
        return np.concatenate(pieces)

    @abstractmethod
    def _run(self, pixels: np.ndarray) -> np.ndarray:
        """One call of the executor, at a batch size and in the type it takes."""

    @abstractmethod
    def close(self) -> None:
        """Free what the executor holds. Safe to call twice."""

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Executor(Protocol):
    """What the module of an executor has."""

    def load(self, path: Path, threads: int | None = None, **settings: Any) -> Runner:
        """Load the engine file at ``path``, as `open_runner` says. Raises `BuildError`, `UsageError`."""

    def audit(self, path: Path, precision: str) -> Fusion:
        """Load the engine file at ``path``, of ``precision``, and look at what is executed."""

    def version(self) -> str:
        """The installed version, which engines are recorded with."""


def executor(name: str) -> Executor:
    """The module that drives executor ``name``."""
    if name == "onnxruntime":
        from edgeres.runners import onnxruntime

        return onnxruntime
    if name == "openvino":
        from edgeres.runners import openvino

        return openvino
    if name in EXECUTORS:
        from edgeres.runners import tensorrt

        return tensorrt.TensorRt(name)
    raise InputError(
        f"no runner for executor {name!r}",
        evidence=f"this version of edgeres builds and runs engines of onnxruntime, openvino, {', '.join(EXECUTORS)}",
        hint="`edgeres quantize` with the same options writes the typed ONNX file for any target",
    )


def open_runner(path: Path, name: str, threads: int | None = None, **settings: Any) -> Runner:
    """Load the engine file at ``path`` with executor ``name``.

    ``threads`` compute on a CPU, None for all its physical cores. TensorRT computes on the GPU and takes the setting,
    so that a caller need not ask what he opens, but it changes nothing there. TensorRT takes ``settings``:
    ``dla_core``, ``cuda_graph`` and ``version_compatible`` (see `TensorRtRunner`); the others refuse any that is
    neither None nor False.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads to compute with", hint="give 1 or more, or None for all cores")
    return executor(name).load(path, threads, **settings)


def refuse_settings(name: str, settings: dict[str, Any]) -> None:
    """Raise `UsageError` if ``settings`` ask anything of executor ``name``, which has none."""
    if asked := [key for key, value in settings.items() if value is not None and value is not False]:
        raise UsageError(
            f"executor {name} has no setting {', '.join(asked)}", hint="it is for TensorRT: choose such a target"
        )
