"""ONNX Runtime on the CPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from edgeres.errors import BuildError, need
from edgeres.graph import INPUT, OUTPUT
from edgeres.runners import Runner


class OnnxRuntimeRunner(Runner):
    """Runs an ONNX file in normal form, of any precision, on all physical cores."""

    def __init__(self, path: Path) -> None:
        self._session = open_session(path)
        (entry,) = self._session.get_inputs()
        self.batch = entry.shape[0] if isinstance(entry.shape[0], int) else None
        self.input_size = entry.shape[2]

    def _run(self, pixels: np.ndarray) -> np.ndarray:
        return np.asarray(self._session.run([OUTPUT], {INPUT: pixels})[0])

    def close(self) -> None:
        self._session = None


def open_session(path: Path, optimized: Path | None = None) -> Any:
    """An InferenceSession for ``path``; the graph it really executes is written to ``optimized`` if given."""
    ort = need("onnxruntime", "onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; they come back as exceptions
    # threads that keep spinning after a run would slow down the other engine of a comparison
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimized is not None:
        options.optimized_model_filepath = os.fspath(optimized)
    try:
        return ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exception types are not public
        raise BuildError(f"ONNX Runtime cannot load {path}", evidence=str(error).strip()) from error
