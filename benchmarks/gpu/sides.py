"""Who is compared: PyTorch as people run it, ONNX Runtime on CUDA, and edgeres' engines. All answer the same pixels.

A side has two clocks. ``compute``: milliseconds of one call on pixels that lie in the GPU's memory. ``whole``:
milliseconds by the wall from FP32 pixels in plain host memory to FP32 logits there, as an application would wait.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from outcome import Skip
from roofline import cuda

WARM_UP = 3
CUDA = "CUDAExecutionProvider"


class Side(ABC):
    """One way to compute the logits of ``pixels`` (N, 3, H, W)."""

    @abstractmethod
    def compute(self) -> float:
        """Milliseconds on the GPU."""

    @abstractmethod
    def whole(self) -> float:
        """Milliseconds with transfers. What came out is in ``logits``, float32 (N, classes)."""

    logits: np.ndarray

    @abstractmethod
    def close(self) -> None:
        """Free what it holds."""


class TorchSide(Side):
    """PyTorch. ``how``: "eager", "graph" (a CUDA graph) or "compiled" (torch.compile, which makes CUDA graphs too)."""

    def __init__(
        self, model: Any, pixels: np.ndarray, half: bool, channels_last: bool, how: str, device: str = "cuda"
    ) -> None:
        torch = self.torch = cuda()
        layout = torch.channels_last if channels_last else torch.contiguous_format
        dtype = torch.float16 if half else torch.float32
        self.model = model.to(device=device, dtype=dtype, memory_format=layout)
        self.source = torch.from_numpy(pixels)
        self.staging = torch.empty(pixels.shape, pin_memory=device == "cuda")
        self.input = torch.empty(pixels.shape, dtype=dtype, device=device, memory_format=layout)
        self.input.copy_(self.source)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.graph: Any = None
        if how == "compiled":
            self.model = torch.compile(self.model, mode="reduce-overhead")
        if how == "graph":
            self._capture()
        for _ in range(WARM_UP):
            self._run()
        torch.cuda.synchronize()

    def _capture(self) -> None:
        """Record one call, to be replayed (PyTorch documentation, "CUDA Graphs")."""
        torch, stream = self.torch, self.torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(WARM_UP):
                self.model(self.input)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph), torch.inference_mode():
            self.result = self.model(self.input)

    def _run(self) -> Any:
        if self.graph is not None:
            self.graph.replay()
            return self.result
        with self.torch.inference_mode():
            return self.model(self.input)

    def compute(self) -> float:
        self.start.record()
        self._run()
        self.end.record()
        self.end.synchronize()
        return float(self.start.elapsed_time(self.end))

    def whole(self) -> float:
        start = time.perf_counter()
        self.staging.copy_(self.source)
        self.input.copy_(self.staging, non_blocking=True)  # in FP32, and made FP16 there
        self.logits = self._run().float().cpu().numpy()
        return 1e3 * (time.perf_counter() - start)

    def close(self) -> None:
        self.model = self.graph = self.result = self.input = None
        self.torch.compiler.reset()
        self.torch.cuda.empty_cache()


def session(model: Path | bytes, provider: str = CUDA) -> Any:
    """``model`` in ONNX Runtime, by ``provider`` and in FP32 that is FP32, not TF32; or why it cannot be."""
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        raise Skip(f"onnxruntime {onnxruntime.__version__} has no {provider}")
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA's libraries, where they are packages of Python
    options = {"use_tf32": "0"} if provider == CUDA else {}
    could_not = f"onnxruntime {onnxruntime.__version__} could not start {provider}"
    try:
        made = onnxruntime.InferenceSession(model, providers=[(provider, options)])
    except Exception as error:  # its errors have no class in common
        raise Skip(f"{could_not}: {' '.join(str(error).split())[:200]}") from error
    if provider not in made.get_providers():
        raise Skip(could_not)
    return made


class OrtSide(Side):
    """ONNX Runtime on CUDA. Its own streams cannot be timed from outside: ``compute`` is by the clock on the wall."""

    def __init__(self, path: Path, pixels: np.ndarray, provider: str = CUDA) -> None:
        import onnxruntime

        from edgeres import graph

        self.session = session(path, provider)
        device = "cuda" if provider == CUDA else "cpu"
        self.pixels, self.feed = pixels, {graph.INPUT: pixels}
        self.binding = self.session.io_binding()
        self.held = onnxruntime.OrtValue.ortvalue_from_numpy(pixels, device, 0)
        self.binding.bind_ortvalue_input(graph.INPUT, self.held)
        self.binding.bind_output(graph.OUTPUT, device)
        for _ in range(WARM_UP):
            self.session.run_with_iobinding(self.binding)

    def compute(self) -> float:
        start = time.perf_counter()
        self.session.run_with_iobinding(self.binding)  # returns when the GPU is done
        return 1e3 * (time.perf_counter() - start)

    def whole(self) -> float:
        start = time.perf_counter()
        (self.logits,) = self.session.run(None, self.feed)
        return 1e3 * (time.perf_counter() - start)

    def close(self) -> None:
        self.binding = self.held = self.session = None


class EngineSide(Side):
    """An engine of edgeres."""

    def __init__(self, folder: Path, pixels: np.ndarray, cuda_graph: bool) -> None:
        from edgeres.build import Engine

        self.runner: Any = Engine.load(folder).open(cuda_graph)
        self.pixels = self.runner.prepare(pixels)
        for _ in range(WARM_UP):
            self.runner.infer(self.pixels)
        if cuda_graph and not any(slot.graph is not None for slot in self.runner._slots):
            self.close()  # it ran without one, which is the other side
            raise Skip("the library says that its work cannot be captured")

    def compute(self) -> float:
        return float(self.runner.split(self.pixels)["compute"])

    def whole(self) -> float:
        start = time.perf_counter()
        self.logits = self.runner.infer(self.pixels)
        return 1e3 * (time.perf_counter() - start)

    def close(self) -> None:
        self.runner.close()
