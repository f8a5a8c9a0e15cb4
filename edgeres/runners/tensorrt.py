"""TensorRT and TensorRT-RTX as executors. One code path from TensorRT 8.6 to 11, as in `edgeres.trt`."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from edgeres import fusion
from edgeres.engine_layers import raw_layers
from edgeres.errors import BuildError, InputError, UsageError
from edgeres.runners import Runner
from edgeres.runners.calls import PARTS, Slot, back_to_back
from edgeres.runners.cuda import Cuda, CudaPython, open_cuda
from edgeres.trt import EXECUTORS, load_library, logger

DTYPES = {"FLOAT": np.float32, "HALF": np.float16, "UINT8": np.uint8}
"""What goes into and comes out of a plan: member of the library's DataType -> numpy's type."""


class TensorRtRunner(Runner):
    """Runs a plan on device 0. A batch above the largest of the plan's profile goes through in pieces.

    Copies of a piece overlap the computation of the one before. Threads may share a runner; they take turns. With
    ``cuda_graph``, which needs cuda-python, calls after the first of a batch size replay what that one queued.
    ``dla_core`` is where the parts of the plan that were built for DLA run. ``version_compatible`` lets the plan bring
    code of its own, the runtime of the version that built it: for plans from a source that is trusted.
    """

    def __init__(
        self,
        path: Path,
        executor: str = "tensorrt",
        cuda_graph: bool = False,
        dla_core: int | None = None,
        version_compatible: bool = False,
    ) -> None:
        self._trt = load_library(executor)
        self._log = logger(self._trt)
        self._lock = threading.RLock()
        self._cuda_graph, self._dla_core, self._version_compatible = cuda_graph, dla_core, version_compatible
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._slots: list[Slot] = []
        self._images = 0  # the batch size that the execution context is set to
        self._split: dict[str, float] | None = None
        self._profiled = False
        try:
            plan = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {path}", evidence=error.strerror or str(error)) from error
        self._cuda: Cuda | None = open_cuda(EXECUTORS[executor][1], cuda_graph)
        try:
            with self._cuda.current():
                self._load(self._cuda, path, plan)
        except BaseException:
            self.close()
            raise

    def _load(self, cuda: Cuda, path: Path, plan: bytes) -> None:
        trt = self._trt
        self._log.said.clear()
        try:
            self._runtime = trt.Runtime(self._log)
        except TypeError as error:  # what pybind11 makes of a constructor that returned nothing
            raise BuildError("TensorRT cannot start", evidence=self._log.errors() or str(error)) from error
        self._set_up(self._runtime)
        self._engine = engine = self._given(
            self._runtime.deserialize_cuda_engine(plan),
            f"load {path}",
            hint=f"a plan is for one version (here {trt.__version__}) and one model of GPU: build it again here",
        )
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs, outputs = (
            [n for n in names if engine.get_tensor_mode(n) == mode]
            for mode in (trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT)
        )
        if len(inputs) != 1 or len(outputs) != 1:
            raise BuildError(f"{path} is no classifier", evidence=f"inputs {inputs}, outputs {outputs}")
        self._input, self._output = inputs[0], outputs[0]
        self.dtype, result_dtype = self._dtype(self._input), self._dtype(self._output)
        images, *rest = engine.get_tensor_shape(self._input)
        self._image, self._logits = tuple(rest), tuple(engine.get_tensor_shape(self._output))[1:]
        pixels_alike = len(rest) == 3 and rest[0] == 3 and rest[1] == rest[2] and min(rest) > 0
        if not pixels_alike or self._logits[1:] not in ((), (1, 1)) or min(self._logits, default=0) < 1:
            raise BuildError(f"{path} is no classifier", evidence=f"{(images, *rest)} -> (N, {self._logits})")
        self.input_size = rest[1]
        self.batch = None if images < 0 else images
        # profile 0 is the only one that edgeres builds, and what a first context starts with
        shapes = engine.get_tensor_profile_shape(self._input, 0) if self.batch is None else [[images]] * 3
        self._smallest, self.usual, self.largest = (shape[0] for shape in shapes)
        self._context = self._new_context()
        for _ in range(2 if self.batch is None else 1):
            source = cuda.host((self.largest, *self._image), self.dtype)
            result = cuda.host((self.largest, *self._logits), result_dtype)
            addresses = [cuda.device(array.nbytes) for array in (source, result)]
            self._slots.append(Slot(cuda.stream(), [cuda.event() for _ in range(4)], source, result, *addresses))

    def _new_context(self) -> Any:
        """One whose kernels are final from the first call on: TensorRT-RTX swaps them later, but not in CUDA graphs."""
        config: list[Any] = []
        if strategies := getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None):
            config.append(self._given(self._engine.create_runtime_config(), "configure an execution context"))
            config[0].dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        made = self._engine.create_execution_context(*config)
        config.clear()  # it holds the engine, and an error below would hold it
        return self._given(made, "create an execution context")

    def _set_up(self, runtime: Any) -> None:
        """What must be said before a plan is loaded."""
        if self._version_compatible:
            try:
                runtime.engine_host_code_allowed = True
            except AttributeError as error:  # 8.5
                raise UsageError(f"TensorRT {self._trt.__version__} has no version-compatible plans") from error
        if self._dla_core is not None:
            cores = getattr(runtime, "num_DLA_cores", 0) or 0
            if not 0 <= self._dla_core < cores:
                raise BuildError(
                    f"there is no DLA core {self._dla_core}",
                    evidence=f"TensorRT {self._trt.__version__} sees {cores} of them here",
                    hint="Jetson AGX Orin, Orin NX and both Xavier have some; TensorRT 10.8 to 11.3 does not use them",
                )
            runtime.DLA_core = self._dla_core

    def _dtype(self, tensor: str) -> np.dtype[Any]:
        found = self._engine.get_tensor_dtype(tensor)
        for name, dtype in DTYPES.items():
            if found == getattr(self._trt.DataType, name, None):
                return np.dtype(dtype)
        raise BuildError(f"tensor {tensor} is of type {found}", hint=f"edgeres runs {', '.join(DTYPES)}")

    def _given(self, value: Any, what: str, hint: str = "") -> Any:
        """``value``, unless it is how TensorRT says no: None or False."""
        if value is None or value is False:
            evidence = self._log.errors()
            self._log.said.clear()  # the next failure has its own
            raise BuildError(f"TensorRT could not {what}", evidence=evidence, hint=hint)
        return value

    def split(self, pixels: np.ndarray) -> dict[str, float]:
        """Milliseconds that the GPU takes over the parts of ``infer(pixels)``, one piece after the other.

        ``enqueue`` is what the CPU takes to ask for the computation: more than a part of it, and the GPU waits.
        """
        with self._lock:
            self._split = dict.fromkeys((*PARTS, "enqueue"), 0.0)
            try:
                self.infer(pixels)
                return self._split
            finally:
                self._split = None

    def repeat(
        self, pixels: np.ndarray, go_on: Callable[[dict[str, float]], bool], transfers: bool = True, spin: bool = False
    ) -> None:
        """Calls of ``infer(pixels)``, which fit one piece, `back_to_back` until ``go_on`` says no."""
        if len(pixels) > self.largest:
            raise UsageError(f"this plan takes {self.largest} images at a time", evidence=f"got {len(pixels)}")
        with self._lock:
            self.infer(pixels)  # the first slot has pixels and shape then, and kernels are loaded
            cuda, slot = self._opened(), self._slots[0]
            with cuda.current(), cuda.borrowed():
                back_to_back(cuda, slot, self._images, lambda: self._enqueue(cuda, slot, False), go_on, transfers, spin)

    def inspect(self) -> list[Any]:
        """The plan's layers as the library tells them, at the usual batch; details if the build asked for them."""
        with self._lock:
            cuda = self._opened()
            with cuda.current():
                if not self._images:  # without shapes, formats are "N/A due to dynamic shapes"
                    self._set_images(cuda, self.usual)
                inspector = self._given(self._engine.create_engine_inspector(), "create an inspector")
                inspector.execution_context = self._context
                text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
                del inspector  # it holds the engine, and an error below would hold it
        try:
            return raw_layers(json.loads(text or "", strict=False), "what TensorRT tells of this plan")
        except (ValueError, InputError) as error:  # 9.0 writes broken JSON (trex, known issues)
            raise BuildError("TensorRT does not tell the plan's layers", evidence=str(error)) from error

    def profile(self, pixels: np.ndarray, runs: int = 20) -> dict[str, float]:
        """Median milliseconds of each layer over ``runs`` of ``infer(pixels)``; in all more than without looking.

        Empty if the library tells nothing. Every layer is waited for, so this says what a layer costs beside others,
        not how fast the engine is.
        """
        if runs < 1:
            raise UsageError(f"{runs} runs to profile")
        with self._lock:
            cuda = self._opened()
            try:
                self._profiled = True
                self.infer(pixels)  # memory, and kernels that load when they are first used
                profiler = _profiler(self._trt)
                self._context.profiler = profiler
                passes = []
                for _ in range(runs):
                    profiler.ms = {}
                    self.infer(pixels)
                    passes.append(profiler.ms)
            finally:
                self._profiled = False
                with cuda.current():
                    self._renew_context(cuda)
        return {name: statistics.median(ms[name] for ms in passes if name in ms) for name in passes[0]}

    def _renew_context(self, cuda: Cuda) -> None:
        """A context keeps its profiler: take another. The old one goes first, as TensorRT 8 shares no profile."""
        self._drop_graphs(cuda)
        self._images, self._context = 0, None
        try:
            self._context = self._new_context()
        except BuildError:
            self.close()
            raise

    def close(self) -> None:
        with self._lock:
            if self._cuda is None:
                return
            cuda, self._cuda = self._cuda, None
            try:
                with cuda.current():
                    self._drop_graphs(cuda)
                    self._slots = []
                    self._context = None
                    self._engine = None
                    self._runtime = None
            finally:
                cuda.close()

    def _opened(self) -> Cuda:
        if self._cuda is None:
            raise UsageError("this engine is closed")
        return self._cuda

    def _run(self, pixels: np.ndarray) -> np.ndarray:
        if not len(pixels):
            raise UsageError("there are no images to run")
        with self._lock:
            cuda = self._opened()
            with cuda.current():
                try:
                    return self._pieces(cuda, pixels)
                except BaseException:  # buffers must not be in use when the next call comes
                    for slot in self._slots:
                        with suppress(BuildError):
                            cuda.synchronize(slot.stream)
                    raise

    def _pieces(self, cuda: Cuda, pixels: np.ndarray) -> np.ndarray:
        logits = np.empty((len(pixels), *self._logits), self._slots[0].result.dtype)
        slots = self._slots[:1] if self._split is not None or self._profiled else self._slots
        queued: deque[tuple[Slot, np.ndarray]] = deque()
        for i, start in enumerate(range(0, len(pixels), self.largest)):
            if len(queued) == len(slots):
                self._collect(cuda, *queued.popleft())
            slot, piece = slots[i % len(slots)], slice(start, start + self.largest)
            self._queue(cuda, slot, pixels[piece])
            queued.append((slot, logits[piece]))
        while queued:
            self._collect(cuda, *queued.popleft())
        return logits

    def _queue(self, cuda: Cuda, slot: Slot, piece: np.ndarray) -> None:
        """Copy in, compute, copy out, none of them waited for."""
        images = max(len(piece), self._smallest)
        if first := images != self._images:
            self._set_images(cuda, images)
        slot.source[: len(piece)] = piece
        slot.source[len(piece) : images] = 0
        begin, copied, computed, done = slot.marks
        self._mark(cuda, begin, slot)
        cuda.copy_in(slot.source_address, slot.source[:images], slot.stream)
        for other in self._slots:
            if other is not slot:  # the one execution context computes one piece at a time
                cuda.wait(slot.stream, other.marks[2])
        self._mark(cuda, copied, slot)
        self._compute(cuda, slot, first)
        cuda.record(computed, slot.stream)
        cuda.copy_out(slot.result[:images], slot.result_address, slot.stream)
        self._mark(cuda, done, slot)

    def _mark(self, cuda: Cuda, event: Any, slot: Slot) -> None:
        if self._split is not None:
            cuda.record(event, slot.stream)

    def _compute(self, cuda: Cuda, slot: Slot, first: bool) -> None:
        """Run what was copied in. ``first``: of this batch size."""
        context = self._context
        for name, address in ((self._input, slot.source_address), (self._output, slot.result_address)):
            self._given(context.set_tensor_address(name, address), f"take the address of {name}")
        start = time.perf_counter()
        self._enqueue(cuda, slot, first)
        if self._split is not None:
            self._split["enqueue"] += 1e3 * (time.perf_counter() - start)

    def _enqueue(self, cuda: Cuda, slot: Slot, first: bool) -> None:
        """Queue the computation in the slot's stream, at the addresses that are set."""
        context, handle = self._context, cuda.handle(slot.stream)

        def enqueue() -> None:
            self._given(context.execute_async_v3(handle), "run")

        # TensorRT finishes its setting up in the first call of a shape; TensorRT-RTX may say that it has not yet
        plain = first or self._profiled or not self._cuda_graph
        if plain or not getattr(context, "is_stream_capturable", lambda _: True)(handle):
            enqueue()
        else:
            graphs = cast(CudaPython, cuda)
            if slot.graph is None:
                slot.graph = graphs.capture(slot.stream, enqueue)
            graphs.launch(slot.graph, slot.stream)

    def _set_images(self, cuda: Cuda, images: int) -> None:
        """Set the batch size, with nothing under way that depends on it."""
        context = self._context
        for slot in self._slots:
            cuda.synchronize(slot.stream)
        self._drop_graphs(cuda)
        self._images = 0  # until all below went well
        if self.batch is None:
            shape = (images, *self._image)
            self._given(context.set_input_shape(self._input, shape), f"take images of {shape}")
        if missing := context.infer_shapes():
            raise BuildError("TensorRT lacks shapes", evidence=", ".join(missing))
        if (shape := tuple(context.get_tensor_shape(self._output))) != (images, *self._logits):
            raise BuildError(f"{images} images give {self._output} of {shape}", evidence=self._log.errors())
        self._images = images

    def _collect(self, cuda: Cuda, slot: Slot, logits: np.ndarray) -> None:
        """Wait for what is in ``slot`` and copy it to where the caller has it."""
        cuda.synchronize(slot.stream)
        logits[:] = slot.result[: len(logits)]
        if self._split is not None:
            for part, start, end in zip(PARTS, slot.marks, slot.marks[1:], strict=False):
                self._split[part] += cuda.elapsed(start, end)

    def _drop_graphs(self, cuda: Cuda) -> None:
        for slot in self._slots:
            if slot.graph is not None:
                cast(CudaPython, cuda).drop(slot.graph)
                slot.graph = None


@dataclass(frozen=True)
class TensorRt:
    """The executor "tensorrt" or "tensorrt-rtx"."""

    name: str

    def load(self, path: Path, threads: int | None = None, **settings: Any) -> TensorRtRunner:
        """Load the plan at ``path``; ``settings`` are those of `TensorRtRunner`.

        ``threads`` are for a CPU to compute with: they mean nothing here, where one thread feeds the GPU.
        """
        return TensorRtRunner(path, self.name, **settings)

    def version(self) -> str:
        return str(load_library(self.name).__version__)

    def audit(self, path: Path, precision: str, **settings: Any) -> fusion.Fusion:
        runner = self.load(path, **settings)
        with runner:
            return fusion.audit(runner.inspect(), precision).fusion()

    def examine(self, path: Path, **settings: Any) -> tuple[list[Any], dict[str, float]]:
        """The plan's layers, and milliseconds that each takes for the usual batch of zeros. Raises `BuildError`."""
        runner = self.load(path, **settings)
        with runner:
            pixels = np.zeros((runner.usual, 3, runner.input_size, runner.input_size), runner.dtype)
            return runner.inspect(), runner.profile(pixels)


def _profiler(trt: Any) -> Any:
    """An IProfiler: ``ms`` has the time of each layer since it was emptied, in the order of execution."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        """What TensorRT calls."""

        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.ms: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.ms[layer_name] = self.ms.get(layer_name, 0.0) + ms

    return Profiler()
