"""The little of CUDA that a runner needs, by PyCUDA or by cuda-python: memory, copies, streams, events, one graph.

Both work in the device's primary context, which TensorRT, PyTorch and ONNX Runtime share.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np

from edgeres import devices
from edgeres.errors import BuildError, MissingDependency

NON_BLOCKING = 1
"""Stream flag, the same in both interfaces: do not wait for the default stream."""
BLOCKING_SYNC = 1
"""Event flag, the same in both interfaces: a thread that waits for the event sleeps."""


class Cuda(ABC):
    """Device 0, and all that was taken from it: `close` gives it back, the last taken first.

    Streams, events and graphs are the backend's own objects, to be handed back to these methods; a stream's number is
    `handle`. Everything is to be called inside ``with cuda.current()``, from any thread. Every failed call raises
    `BuildError` with its name.
    """

    def __init__(self) -> None:
        self._taken = ExitStack()

    @abstractmethod
    def current(self) -> AbstractContextManager[Any]:
        """Make the primary context the one of this thread."""

    @abstractmethod
    def device(self, size: int) -> int:
        """Address of ``size`` bytes on the device."""

    @abstractmethod
    def host(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """A page-locked array: copies from and to it go on while Python does. Gone after `close`, with its views."""

    @abstractmethod
    def stream(self) -> Any:
        """A queue of work that waits for no other."""

    @abstractmethod
    def handle(self, stream: Any) -> int:
        """What TensorRT takes for ``stream``."""

    @abstractmethod
    def event(self, blocking: bool = False) -> Any:
        """A mark to put into a stream. ``blocking``: whoever waits for it by `finish` sleeps, else spins."""

    @abstractmethod
    def copy_in(self, address: int, source: np.ndarray, stream: Any) -> None:
        """Queue a copy of a page-locked, contiguous array to the device."""

    @abstractmethod
    def copy_out(self, target: np.ndarray, address: int, stream: Any) -> None:
        """Queue a copy of as many bytes as ``target``, page-locked and contiguous, holds."""

    @abstractmethod
    def record(self, event: Any, stream: Any) -> None:
        """Put ``event`` into ``stream``."""

    @abstractmethod
    def wait(self, stream: Any, event: Any) -> None:
        """Let what is queued in ``stream`` from now on wait for ``event``."""

    @abstractmethod
    def finish(self, event: Any) -> None:
        """Wait until ``event`` has happened."""

    @abstractmethod
    def synchronize(self, stream: Any) -> None:
        """Wait until all in ``stream`` is done. What went wrong in there is raised here."""

    @abstractmethod
    def elapsed(self, start: Any, end: Any) -> float:
        """Milliseconds between two events that have happened."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Memory of the device that nobody holds."""

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Give back at the end of a block what was taken in it."""
        kept, self._taken = self._taken, ExitStack()
        try:
            yield
        finally:
            taken, self._taken = self._taken, kept
            taken.close()

    def close(self) -> None:
        """Give everything back. Safe to call twice."""
        with self.current():
            self._taken.close()


class PyCuda(Cuda):
    """The driver interface, by PyCUDA. It cannot capture CUDA graphs."""

    def __init__(self) -> None:
        super().__init__()
        self._driver = importlib.import_module("pycuda.driver")
        self._context = self._named(_primary_context, self._driver)

    def _named(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except self._driver.Error as error:  # such as "cuMemAlloc failed: out of memory"
            routine, _, what = str(error).partition(" failed: ")
            raise _failed(routine, what) from error

    @contextmanager
    def current(self) -> Iterator[None]:
        self._named(self._context.push)
        try:
            yield
        finally:
            self._named(self._context.pop)

    def device(self, size: int) -> int:
        memory = self._named(self._driver.mem_alloc, size)
        self._taken.callback(self._named, memory.free)
        return int(memory)

    def host(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        array = self._named(self._driver.pagelocked_empty, shape, dtype)
        self._taken.callback(self._named, array.base.free)
        return array

    def stream(self) -> Any:
        stream = self._named(self._driver.Stream, NON_BLOCKING)
        self._taken.callback(id, stream)  # PyCUDA destroys it with the last reference, which is this one
        return stream

    def handle(self, stream: Any) -> int:
        return int(stream.handle)

    def event(self, blocking: bool = False) -> Any:
        event = self._named(self._driver.Event, BLOCKING_SYNC if blocking else 0)
        self._taken.callback(id, event)
        return event

    def copy_in(self, address: int, source: np.ndarray, stream: Any) -> None:
        self._named(self._driver.memcpy_htod_async, address, source, stream)

    def copy_out(self, target: np.ndarray, address: int, stream: Any) -> None:
        self._named(self._driver.memcpy_dtoh_async, target, address, stream)

    def record(self, event: Any, stream: Any) -> None:
        self._named(event.record, stream)

    def wait(self, stream: Any, event: Any) -> None:
        self._named(stream.wait_for_event, event)

    def finish(self, event: Any) -> None:
        self._named(event.synchronize)

    def synchronize(self, stream: Any) -> None:
        self._named(stream.synchronize)

    def elapsed(self, start: Any, end: Any) -> float:
        return float(self._named(start.time_till, end))

    def free_bytes(self) -> int:
        return int(self._named(self._driver.mem_get_info)[0])


class CudaPython(Cuda):
    """The runtime interface, by cuda-python. It uses the primary context of each thread by itself."""

    def __init__(self) -> None:
        super().__init__()
        try:
            self._runtime: Any = importlib.import_module("cuda.bindings.runtime")  # from 12.8 on
        except ImportError:
            self._runtime = importlib.import_module("cuda.cudart")
        try:
            self._call("cudaSetDevice", 0)
        except RuntimeError as error:  # up to 12.8, where the driver's library is not
            raise ImportError(f"cuda-python: {error}") from error

    def _call(self, name: str, *args: Any) -> Any:
        """Call ``name``, which answers with an error code and its results, of which the first counts here."""
        code, *results = getattr(self._runtime, name)(*args)
        if code != self._runtime.cudaError_t.cudaSuccess:
            text = self._runtime.cudaGetErrorString(code)[1]
            raise _failed(name, text.decode() if text else str(code))
        return results[0] if results else None

    def _take(self, free: str, name: str, *args: Any) -> Any:
        """Call ``name``, and ``free`` with what it gave in the end."""
        taken = self._call(name, *args)
        self._taken.callback(self._call, free, taken)
        return taken

    def current(self) -> AbstractContextManager[Any]:
        self._call("cudaSetDevice", 0)
        return nullcontext()

    def device(self, size: int) -> int:
        return int(self._take("cudaFree", "cudaMalloc", size))

    def host(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        size = math.prod(shape) * dtype.itemsize
        memory: Any = (ctypes.c_byte * size).from_address(self._take("cudaFreeHost", "cudaMallocHost", size))
        return np.frombuffer(memory, dtype).reshape(shape)

    def stream(self) -> Any:
        return self._take("cudaStreamDestroy", "cudaStreamCreateWithFlags", NON_BLOCKING)

    def handle(self, stream: Any) -> int:
        return int(stream)

    def event(self, blocking: bool = False) -> Any:
        return self._take("cudaEventDestroy", "cudaEventCreateWithFlags", BLOCKING_SYNC if blocking else 0)

    def copy_in(self, address: int, source: np.ndarray, stream: Any) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, source.ctypes.data, source.nbytes, kind, stream)

    def copy_out(self, target: np.ndarray, address: int, stream: Any) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target.ctypes.data, address, target.nbytes, kind, stream)

    def record(self, event: Any, stream: Any) -> None:
        self._call("cudaEventRecord", event, stream)

    def wait(self, stream: Any, event: Any) -> None:
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def finish(self, event: Any) -> None:
        self._call("cudaEventSynchronize", event)

    def synchronize(self, stream: Any) -> None:
        self._call("cudaStreamSynchronize", stream)

    def elapsed(self, start: Any, end: Any) -> float:
        return float(self._call("cudaEventElapsedTime", start, end))

    def free_bytes(self) -> int:
        return int(self._call("cudaMemGetInfo"))

    def capture(self, stream: Any, work: Callable[[], None]) -> Any:
        """What ``work`` queues in ``stream``, not run, as a graph to `launch` and, when done, to `drop`."""
        # work of other threads, such as their allocations, stays allowed meanwhile
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        try:
            work()
        except BaseException:
            _, graph = self._runtime.cudaStreamEndCapture(stream)  # a broken capture gives an error and no graph
            if graph:
                self._runtime.cudaGraphDestroy(graph)
            raise
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._call("cudaGraphInstantiateWithFlags", graph, 0)  # of CUDA 11.4 on, unlike the one without
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: Any) -> None:
        """Queue a captured graph."""
        self._call("cudaGraphLaunch", graph, stream)

    def drop(self, graph: Any) -> None:
        """Free a captured graph."""
        self._call("cudaGraphExecDestroy", graph)


def open_cuda(extra: str, graphs: bool = False) -> Cuda:
    """PyCUDA; or cuda-python, where PyCUDA is not or where CUDA graphs are wanted.

    Raises `MissingDependency` naming ``extra`` if what is wanted is not there, `BuildError` if CUDA does not start.
    """
    missing = []
    for backend in (CudaPython,) if graphs else (PyCuda, CudaPython):
        try:
            return backend()
        except ImportError as error:  # also where a package is, and the driver's library is not
            missing.append(str(error))
    remedy = f'pip install "edgeres[{extra}]"' + (" cuda-python" if graphs else "")
    if devices.jetson() and not graphs:  # whose TensorRT is not pip's, and whose CUDA PyCUDA is compiled against
        remedy = "PATH=/usr/local/cuda/bin:$PATH pip install pycuda"
    raise MissingDependency(
        "CUDA graphs need the package cuda-python" if graphs else "this needs one of the packages pycuda, cuda-python",
        evidence="\n".join(missing),
        hint=remedy,
    )


@functools.cache
def _primary_context(driver: Any) -> Any:
    """The primary context of device 0, kept for the life of the process, as the runtime interface keeps it.

    Giving it back with other users around would leave it on PyCUDA's stack of contexts, or destroy what they hold.
    """
    driver.init()
    context = driver.Device(0).retain_primary_context()
    # not even at the end: PyCUDA would take leave of it as of one that it made (cuCtxDetach), which is an error
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(context))
    return context


def _failed(call: str, what: str) -> BuildError:
    return BuildError(f"{call} failed", evidence=what, hint="`nvidia-smi` shows whether the GPU works and is free")
