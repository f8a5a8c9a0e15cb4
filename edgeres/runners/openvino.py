"""OpenVINO on the CPU."""

from __future__ import annotations

import functools
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np

from edgeres.errors import BuildError, need
from edgeres.fusion import Fusion
from edgeres.graph import INPUT, OUTPUT
from edgeres.runners import Runner, refuse_settings

PRECISIONS = {"f32": "fp32", "f16": "fp16", "u8": "int8", "i8": "int8"}
"""What OpenVINO calls the precision that a layer is executed in -> what edgeres calls it."""
SIZED = ("aarch64", "arm64")
"""Machines where a graph for any batch is compiled for each size that comes. Compiled for any, its INT8 classifier
rescales every class like the first there (OpenVINO 2026.4.1): ResNet-50's logits have 12 dB instead of 36."""


class OpenVinoRunner(Runner):
    """Runs an ONNX file in normal form, FP32 or INT8, with ``threads``, of which there are at most as many as cores.

    None is for one on each physical core that the process may use.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        model = _read(path)
        batch, _, size, _ = model.input(INPUT).partial_shape
        self.batch = batch.get_length() if batch.is_static else None
        self.input_size = size.get_length()
        self.dtype = np.dtype(model.input(INPUT).element_type.to_dtype())
        self._sized = _sized(model)
        # two are kept: for the usual batch, and for what is left at the end
        self._request: Any = functools.lru_cache(maxsize=2)(
            lambda images: _compiled(path, model, threads, images).create_infer_request()
        )
        self._request(1)

    def _run(self, pixels: np.ndarray) -> np.ndarray:
        request = self._request(len(pixels) if self._sized else 1)
        # inputs are read where they are; outputs come as copies
        return np.asarray(request.infer({INPUT: pixels}, share_inputs=True)[OUTPUT])

    def close(self) -> None:
        self._request = None


def load(path: Path, threads: int | None = None, **settings: Any) -> OpenVinoRunner:
    """Load ``path`` to compute with ``threads``; there are no other settings."""
    refuse_settings("openvino", settings)
    return OpenVinoRunner(path, threads)


def version() -> str:
    """Version of the package, with its build."""
    return str(_openvino().__version__)


def audit(path: Path, precision: str) -> Fusion:
    """Load ``path`` as the runner does and count what its compiled graph is made of, by layer and precision."""
    layers = [node for node in compile_model(path).get_runtime_model().get_ordered_ops() if _executed(node)]
    counts = Counter(f"{_info(layer, 'layerType')} {_computed_in(layer)}" for layer in layers)
    convolutions = [layer for layer in layers if _info(layer, "layerType") == "Convolution"]
    other = [layer for layer in convolutions if _computed_in(layer) != precision]
    notes = []
    if other:
        first = _info(other[0], "originalLayersNames").partition(",")[0].removesuffix("/WithoutBiases")
        kinds = " and ".join(sorted({_computed_in(layer).upper() for layer in other}))
        notes.append(f"{len(other)} of {len(convolutions)} convolutions are computed in {kinds}, first {first}")
    return Fusion(dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))), notes)


def _executed(layer: Any) -> bool:
    """Whether ``layer`` of a runtime model is work at run time: neither a constant nor made of constants alone."""
    return _info(layer, "layerType") not in ("Const", "Input", "Output") and any(
        _info(value.get_node(), "layerType") != "Const" for value in layer.input_values()
    )


def _computed_in(layer: Any) -> str:
    name = _info(layer, "runtimePrecision")
    return PRECISIONS.get(name, name)


def _info(layer: Any, key: str) -> str:
    return str(layer.get_rt_info()[key].astype(str))


def compile_model(path: Path, threads: int | None = None) -> Any:
    """A CompiledModel for ``path``. What is not INT8 is computed in FP32, also where the CPU has BF16."""
    return _compiled(path, _read(path), threads, 1)


def _compiled(path: Path, model: Any, threads: int | None, images: int) -> Any:
    """``model``, which was read from ``path``, compiled; for batches of ``images`` if it must be for a size."""
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        # whoever counts threads shares the machine: pinned, two such models would meet on the same cores
        config |= {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
    with _loading(path):
        if _sized(model):
            model = model.clone()
            model.reshape({INPUT: [images, *model.input(INPUT).partial_shape[1:]]})
        return _core().compile_model(model, "CPU", config)


def _sized(model: Any) -> bool:
    return platform.machine().lower() in SIZED and model.is_dynamic()


def _read(path: Path) -> Any:
    core = _core()
    with _loading(path):
        return core.read_model(os.fspath(path))


@contextmanager
def _loading(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # RuntimeError, and whatever its frontends raise
        raise BuildError(f"OpenVINO cannot load {path}", evidence=str(error).strip()) from error


@functools.cache
def _core() -> Any:
    return _openvino().Core()


def _openvino() -> Any:
    # openvino reports its import to Google Analytics, unless it does not find its telemetry package
    sys.modules.setdefault("openvino_telemetry", cast(Any, None))
    return need("openvino", "openvino")
