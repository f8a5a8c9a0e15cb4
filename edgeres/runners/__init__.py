"""One runner per executor: ``with open_runner(path) as runner: logits = runner.infer(pixels)``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType

import numpy as np

from edgeres.errors import InputError, UsageError


class Runner(ABC):
    """A loaded network. ``batch`` is its fixed batch size, or None if it takes any; ``input_size`` is H and W."""

    batch: int | None
    input_size: int

    def infer(self, pixels: np.ndarray) -> np.ndarray:
        """float32 (N, 3, H, W) -> float32 (N, classes), for any N from 1; the result is the caller's.

        A network of fixed batch gets N in pieces, the last one padded with zeros.
        """
        if pixels.ndim != 4 or pixels.shape[1:] != (3, self.input_size, self.input_size):
            raise UsageError(
                f"this engine takes images of (N, 3, {self.input_size}, {self.input_size})",
                evidence=f"got {pixels.shape}",
            )
        if self.batch is None:
            return self._run(pixels)
        pieces = []
        for start in range(0, len(pixels), self.batch):
            piece = pixels[start : start + self.batch]
            padding = np.zeros((self.batch - len(piece), *piece.shape[1:]), np.float32)
            pieces.append(self._run(np.concatenate([piece, padding]) if len(padding) else piece)[: len(piece)])
        return np.concatenate(pieces)

    @abstractmethod
    def _run(self, pixels: np.ndarray) -> np.ndarray:
        """One call of the executor, at a batch size it takes."""

    @abstractmethod
    def close(self) -> None:
        """Free what the executor holds. Safe to call twice."""

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def open_runner(path: Path, executor: str) -> Runner:
    """Load the engine file at ``path`` with ``executor``."""
    if executor != "onnxruntime":
        raise InputError(f"no runner for executor {executor!r}", hint="this version of edgeres runs onnxruntime")
    from edgeres.runners.onnxruntime import OnnxRuntimeRunner

    return OnnxRuntimeRunner(path)
