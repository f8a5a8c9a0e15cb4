"""TensorRT and TensorRT-RTX as executors. One code path from TensorRT 8.6 to 11, as in `edgeres.trt`."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from edgeres.errors import BuildError, InputError, UsageError
from edgeres.runners import Fusion, Runner
from edgeres.runners.cuda import Cuda, CudaPython, open_cuda
from edgeres.trt import EXECUTORS, load_library, logger

DTYPES = {"FLOAT": np.float32, "HALF": np.float16, "UINT8": np.uint8}
"""What goes into and comes out of a plan: member of the library's DataType -> numpy's type."""
PARTS = ("copy_in", "compute", "copy_out")
"""What a call of the GPU consists of."""
PRECISIONS = {"float": "fp32", "fp32": "fp32", "half": "fp16", "fp16": "fp16", "int8": "int8", "uint8": "uint8"}
"""Words for a tensor's type in the engine inspector's JSON -> what edgeres calls it."""


@dataclass
class _Slot:
    """What one piece of a batch needs from its arrival to its result, so that two pieces can be under way.

    ``marks`` are events: before the copy in, after it, after the computation, and after the copy out.
    """

    stream: Any
    marks: list[Any]
    source: np.ndarray
    result: np.ndarray
    source_address: int
    result_address: int
    graph: Any = None


class TensorRtRunner(Runner):
    """Runs a plan on device 0. A batch above the largest of the plan's profile goes through in pieces.

    Copies of a piece overlap the computation of the one before. Threads may share a runner; they take turns. With
    ``cuda_graph``, which needs cuda-python, calls after the first of a batch size replay what that one queued.
    """

    def __init__(self, path: Path, executor: str = "tensorrt", cuda_graph: bool = False) -> None:
        self._trt = load_library(executor)
        self._log = logger(self._trt)
        self._lock = threading.RLock()
        self._cuda_graph = cuda_graph
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._slots: list[_Slot] = []
        self._images = 0  # the batch size that the execution context is set to
        self._split: dict[str, float] | None = None
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
        self._runtime.engine_host_code_allowed = True  # plans for later versions bring their own runtime
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
        if len(rest) != 3 or rest[0] != 3 or rest[1] != rest[2] or min(*rest, *self._logits) < 1:
            raise BuildError(f"{path} is no classifier", evidence=f"{(images, *rest)} -> (N, {self._logits})")
        self.input_size = rest[1]
        self.batch = None if images < 0 else images
        # profile 0 is the only one that edgeres builds, and what a first context starts with
        shapes = engine.get_tensor_profile_shape(self._input, 0) if self.batch is None else [[images]] * 3
        self._smallest, self._largest = shapes[0][0], shapes[2][0]
        self._context = self._given(engine.create_execution_context(), "create an execution context")
        for _ in range(2 if self.batch is None else 1):
            source = cuda.host((self._largest, *self._image), self.dtype)
            result = cuda.host((self._largest, *self._logits), result_dtype)
            addresses = [cuda.device(array.nbytes) for array in (source, result)]
            self._slots.append(_Slot(cuda.stream(), [cuda.event() for _ in range(4)], source, result, *addresses))

    def _dtype(self, tensor: str) -> np.dtype[Any]:
        found = self._engine.get_tensor_dtype(tensor)
        for name, dtype in DTYPES.items():
            if found == getattr(self._trt.DataType, name):
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
        """Milliseconds that the GPU takes over the parts of ``infer(pixels)``, one piece after the other."""
        with self._lock:
            self._split = dict.fromkeys(PARTS, 0.0)
            try:
                self.infer(pixels)
                return self._split
            finally:
                self._split = None

    def inspect(self) -> dict[str, Any]:
        """What the library tells about the layers of the plan; details as `Options` of the build asked for."""
        with self._lock:
            cuda = self._opened()
            with cuda.current():
                inspector = self._given(self._engine.create_engine_inspector(), "create an inspector")
                return json.loads(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

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
        slots = self._slots[:1] if self._split is not None else self._slots
        queued: deque[tuple[_Slot, np.ndarray]] = deque()
        for i, start in enumerate(range(0, len(pixels), self._largest)):
            if len(queued) == len(slots):
                self._collect(cuda, *queued.popleft())
            slot, piece = slots[i % len(slots)], slice(start, start + self._largest)
            self._queue(cuda, slot, pixels[piece])
            queued.append((slot, logits[piece]))
        while queued:
            self._collect(cuda, *queued.popleft())
        return logits

    def _queue(self, cuda: Cuda, slot: _Slot, piece: np.ndarray) -> None:
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

    def _mark(self, cuda: Cuda, event: Any, slot: _Slot) -> None:
        if self._split is not None:
            cuda.record(event, slot.stream)

    def _compute(self, cuda: Cuda, slot: _Slot, first: bool) -> None:
        """Run what was copied in. ``first``: of this batch size."""
        context = self._context
        for name, address in ((self._input, slot.source_address), (self._output, slot.result_address)):
            self._given(context.set_tensor_address(name, address), f"take the address of {name}")
        handle = cuda.handle(slot.stream)

        def enqueue() -> None:
            self._given(context.execute_async_v3(handle), "run")

        # TensorRT finishes its setting up in the first call of a shape; TensorRT-RTX may say that it has not yet
        if not self._cuda_graph or first or not getattr(context, "is_stream_capturable", lambda _: True)(handle):
            enqueue()
            return
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

    def _collect(self, cuda: Cuda, slot: _Slot, logits: np.ndarray) -> None:
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

    def load(self, path: Path) -> TensorRtRunner:
        return TensorRtRunner(path, self.name)

    def version(self) -> str:
        return str(load_library(self.name).__version__)

    def audit(self, path: Path, precision: str) -> Fusion:
        runner = self.load(path)
        with runner:
            return fusion(runner.inspect()["Layers"], precision)


def fusion(layers: list[Any], precision: str) -> Fusion:
    """What the engine inspector's ``layers`` say: names only, or objects with types, as TensorRT 10 or 11 writes them.

    A convolution that reads a second tensor adds it to its result: that is how a residual connection is fused.
    """
    known = [layer for layer in layers if isinstance(layer, dict)]
    if not known:
        return Fusion({"layer": len(layers)}, ["the plan holds the names of its layers, not what they run in"])
    counts = Counter(f"{layer.get('LayerType', '?')} {_computed_in(layer)}".strip() for layer in known)
    convolutions = [layer for layer in known if _is_convolution(layer)]
    copies = [layer for layer in known if "reformat" in f"{layer.get('LayerType')} {layer.get('Name')}".lower()]
    fused = sum(len(layer.get("Inputs", [])) > 1 for layer in convolutions)
    other = [layer for layer in convolutions if _computed_in(layer) != precision]
    notes = [
        f"{len(convolutions) - len(other)} of {len(convolutions)} convolutions are computed in {precision.upper()}, "
        f"{fused} of them add a residual; {len(copies)} reformats"
    ]
    if other:
        kinds = " and ".join(sorted({_computed_in(layer).upper() or "an unknown type" for layer in other}))
        notes.append(f"{len(other)} of {len(convolutions)} convolutions are computed in {kinds}, first {_name(other)}")
    # what reads FP32 computes in it, except for a copy that turns it into something else
    single = [layer for layer in known if layer not in [*convolutions, *copies] and _computed_in(layer) == "fp32"]
    if precision != "fp32" and single:
        notes.append(f"{len(single)} other layers are computed in FP32, first {_name(single)}")
    if len(known) < len(layers):
        notes.append(f"{len(layers) - len(known)} layers are known by name only")
    return Fusion(dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))), notes)


def _is_convolution(layer: dict[str, Any]) -> bool:
    return layer.get("ParameterType") == "Convolution" or "conv" in str(layer.get("LayerType")).lower()


def _computed_in(layer: dict[str, Any]) -> str:
    """Type of a layer's first input, or output if it has none: "Datatype" in TensorRT 11, in words before."""
    tensor: dict[str, Any] = next(iter([*layer.get("Inputs", []), *layer.get("Outputs", [])]), {})
    keys = sorted(tensor, key=lambda key: "format" in key.lower())  # the type itself before a format that mentions one
    text = " ".join(str(tensor[key]) for key in keys if re.search("format|datatype", key, re.IGNORECASE))
    words = re.findall(r"\w+", text.lower())
    return next((PRECISIONS[word] for word in words if word in PRECISIONS), "")


def _name(layers: list[dict[str, Any]]) -> str:
    return str(layers[0].get("Name", "?"))
