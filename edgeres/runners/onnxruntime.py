"""ONNX Runtime on the CPU."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edgeres import graph
from edgeres.errors import BuildError, need
from edgeres.fusion import Fusion
from edgeres.graph import INPUT, OUTPUT
from edgeres.runners import Runner, refuse_settings

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


class OnnxRuntimeRunner(Runner):
    """Runs an ONNX file in normal form, of any precision, with ``threads``, None for one on each physical core.

    ``as_written``: without optimizing the graph, which simulates what another executor computes. The optimizer takes
    liberties with Q/DQ nodes that are not laid for it (DECISIONS.md).
    """

    def __init__(self, path: Path, as_written: bool = False, threads: int | None = None) -> None:
        self._session = open_session(path, as_written=as_written, threads=threads)
        (entry,) = self._session.get_inputs()
        self.batch = entry.shape[0] if isinstance(entry.shape[0], int) else None
        self.input_size = entry.shape[2]
        self.dtype = np.dtype(DTYPES[entry.type])

    def _run(self, pixels: np.ndarray) -> np.ndarray:
        return np.asarray(self._session.run([OUTPUT], {INPUT: pixels})[0])

    def close(self) -> None:
        self._session = None


def load(path: Path, threads: int | None = None, **settings: Any) -> OnnxRuntimeRunner:
    """Load ``path`` to compute with ``threads``; there are no other settings."""
    refuse_settings("onnxruntime", settings)
    return OnnxRuntimeRunner(path, threads=threads)


def version() -> str:
    """Version of the package."""
    return str(need("onnxruntime", "onnx").__version__)


def audit(path: Path, precision: str) -> Fusion:
    """Load ``path`` as the runner does and count what the optimized graph is made of."""
    onnx = need("onnx", "onnx")
    with tempfile.TemporaryDirectory() as scratch:
        optimized = Path(scratch) / "optimized.onnx"
        open_session(path, optimized)
        model = onnx.load(optimized)
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
    return Fusion(graph.count_ops(model), notes)


def open_session(
    path: Path, optimized: Path | None = None, as_written: bool = False, threads: int | None = None
) -> Any:
    """An InferenceSession for ``path``; the graph it really executes is written to ``optimized`` if given."""
    ort = need("onnxruntime", "onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; they come back as exceptions
    options.intra_op_num_threads = threads or 0  # 0: one on each physical core, and kept there
    # threads that keep spinning after a run would slow down the other engine of a comparison
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # planned in one piece, the memory of a call comes on top of what its first call took, and gains no time
    options.enable_mem_pattern = False
    if as_written:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized is not None:
        options.optimized_model_filepath = os.fspath(optimized)
    try:
        return ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exception types are not public
        raise BuildError(f"ONNX Runtime cannot load {path}", evidence=str(error).strip()) from error
