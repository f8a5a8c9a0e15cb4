from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgeres.devices import Jetson
from edgeres.errors import BuildError, MissingDependency
from edgeres.runners import cuda
from edgeres.runners.cuda import CudaPython, PyCuda, open_cuda


class Driver(ModuleType):
    """What edgeres uses of ``pycuda.driver``. It insists on a current context; ``log`` has what was called."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pycuda.driver")
        self.log: list[str] = []
        self.fails: set[str] = set()
        self.flags: list[int] = []  # of the events
        self.contexts = threading.local()  # as CUDA's, one stack per thread
        self.Device, self.Stream, self.Event = self.device, self.stream, self.event

    def call(self, name: str, context: bool = True) -> None:
        if context and not self.stack():
            raise self.Error(f"{name} failed: invalid device context")
        if name in self.fails:
            raise self.Error(f"{name} failed: out of memory")
        self.log.append(name)

    def destroyed(self, name: str) -> None:
        self.log.append(name if self.stack() else f"{name} without a context")

    def stack(self) -> list[Any]:
        return vars(self.contexts).setdefault("stack", [])

    def init(self) -> None:
        self.call("cuInit", context=False)

    def device(self, number: int) -> Any:
        assert number == 0
        context = Context(self)

        def retain() -> Any:
            self.call("cuDevicePrimaryCtxRetain", context=False)
            return context

        return SimpleNamespace(retain_primary_context=retain)

    def mem_alloc(self, size: int) -> Any:
        self.call("cuMemAlloc")
        return Memory(self, size)

    def pagelocked_empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        self.call("cuMemHostAlloc")
        return np.ndarray(shape, dtype, buffer=Locked(self, int(np.prod(shape)) * np.dtype(dtype).itemsize))

    def stream(self, flags: int) -> Any:
        assert flags == 1
        self.call("cuStreamCreate")
        return Stream(self)

    def event(self, flags: int) -> Any:
        self.call("cuEventCreate")
        self.flags.append(flags)
        return Event(self)

    def memcpy_htod_async(self, address: int, source: np.ndarray, stream: Any) -> None:
        assert isinstance(stream, Stream)
        self.call("cuMemcpyHtoDAsync")
        ctypes.memmove(address, source.ctypes.data, source.nbytes)

    def memcpy_dtoh_async(self, target: np.ndarray, address: int, stream: Any) -> None:
        assert isinstance(stream, Stream)
        self.call("cuMemcpyDtoHAsync")
        ctypes.memmove(target.ctypes.data, address, target.nbytes)

    def mem_get_info(self) -> tuple[int, int]:
        self.call("cuMemGetInfo")
        return 7, 11


class Context:
    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def push(self) -> None:
        self.driver.stack().append(self)

    def pop(self) -> None:
        self.driver.stack().pop()

    def __del__(self) -> None:
        self.driver.log.append("cuCtxDetach")


class Memory:
    def __init__(self, driver: Driver, size: int) -> None:
        self.driver, self.bytes = driver, ctypes.create_string_buffer(size)

    def __int__(self) -> int:
        return ctypes.addressof(self.bytes)

    def free(self) -> None:
        self.driver.call("cuMemFree")


class Locked(bytearray):
    def __init__(self, driver: Driver, size: int) -> None:
        super().__init__(size)
        self.driver = driver

    def free(self) -> None:
        self.driver.call("cuMemFreeHost")


class Stream:
    handle = 4711

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def synchronize(self) -> None:
        self.driver.call("cuStreamSynchronize")

    def wait_for_event(self, event: Any) -> None:
        assert isinstance(event, Event)
        self.driver.call("cuStreamWaitEvent")

    def __del__(self) -> None:
        self.driver.destroyed("cuStreamDestroy")


class Event:
    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def record(self, stream: Any) -> None:
        assert isinstance(stream, Stream)
        self.driver.call("cuEventRecord")

    def synchronize(self) -> None:
        self.driver.call("cuEventSynchronize")

    def time_till(self, end: Any) -> float:
        assert isinstance(end, Event)
        self.driver.call("cuEventElapsedTime")
        return 1.5

    def __del__(self) -> None:
        self.driver.destroyed("cuEventDestroy")


SUCCESS, OUT_OF_MEMORY = 0, 2


class Runtime(ModuleType):
    """What edgeres uses of ``cuda.bindings.runtime``: functions that answer (code, result...)."""

    def __init__(self, name: str = "cuda.bindings.runtime") -> None:
        super().__init__(name)
        self.log: list[str] = []
        self.fails: set[str] = set()
        self.memory: dict[int, Any] = {}
        self.device: list[int] = []
        self.live: list[int] = []
        self.flags: list[int] = []  # of the events
        self.cudaError_t = SimpleNamespace(cudaSuccess=SUCCESS)
        self.cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
        self.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if not name.startswith("cuda"):
            raise AttributeError(name)
        return lambda *args: self.answer(name, *args)

    def answer(self, name: str, *args: Any) -> tuple[Any, ...]:
        if name == "cudaGetErrorString":
            return SUCCESS, b"out of memory"
        if name in self.fails:
            return (OUT_OF_MEMORY, None)
        self.log.append(name)
        if name in ("cudaMalloc", "cudaMallocHost"):
            memory = ctypes.create_string_buffer(args[0])
            self.memory[ctypes.addressof(memory)] = memory
            if name == "cudaMalloc":
                self.device.append(ctypes.addressof(memory))
            return SUCCESS, ctypes.addressof(memory)
        if name in ("cudaFree", "cudaFreeHost"):
            del self.memory[args[0]]
        if name == "cudaEventCreateWithFlags":
            self.flags.append(args[0])
        if name in ("cudaStreamCreateWithFlags", "cudaEventCreateWithFlags", "cudaStreamEndCapture"):
            self.live.append(100 + len(self.log))
            return SUCCESS, self.live[-1]
        if name == "cudaGraphInstantiateWithFlags":
            assert args[0] in self.live
            self.live.append(100 + len(self.log))
            return SUCCESS, self.live[-1]
        if name.endswith("Destroy"):
            self.live.remove(args[0])
        if name == "cudaMemcpyAsync":
            target, source, size, kind, _ = args
            assert (target if kind == 1 else source) in self.device
            ctypes.memmove(target, source, size)
        if name == "cudaEventElapsedTime":
            return SUCCESS, 1.5
        if name == "cudaMemGetInfo":
            return SUCCESS, 7, 11
        return (SUCCESS,)


@pytest.fixture(autouse=True)
def _no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither package, whatever is installed here."""
    for name in ("pycuda", "pycuda.driver", "cuda", "cuda.bindings", "cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)
    cuda._primary_context.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> Any:
    parts = module.__name__.split(".")
    for i in range(1, len(parts)):
        name = ".".join(parts[:i])
        if sys.modules.get(name) is None:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture(params=[Driver, Runtime])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Fake of one of the packages, installed."""
    return install(monkeypatch, request.param())


def test_pycuda_is_taken_where_it_is_and_cuda_python_elsewhere_or_for_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = install(monkeypatch, Runtime())
    assert isinstance(open_cuda("tensorrt"), CudaPython)
    install(monkeypatch, Driver())
    assert isinstance(open_cuda("tensorrt"), PyCuda)
    assert isinstance(open_cuda("tensorrt", graphs=True), CudaPython)
    monkeypatch.setitem(sys.modules, runtime.__name__, None)
    with pytest.raises(MissingDependency, match="CUDA graphs need the package cuda-python") as error:
        open_cuda("tensorrt", graphs=True)
    assert error.value.hint == 'pip install "edgeres[tensorrt]" cuda-python'


def test_the_older_name_of_cuda_python_is_known_too(monkeypatch: pytest.MonkeyPatch) -> None:
    old = install(monkeypatch, Runtime("cuda.cudart"))
    with open_cuda("tensorrt").current():
        assert set(old.log) == {"cudaSetDevice"}


def test_neither_package_names_the_extra_and_what_was_tried() -> None:
    with pytest.raises(MissingDependency) as error:
        open_cuda("rtx")
    assert error.value.hint == 'pip install "edgeres[rtx]"'
    assert "pycuda" in error.value.evidence
    assert "cuda" in error.value.evidence.splitlines()[1]


def test_on_a_jetson_the_remedy_is_not_the_tensorrt_of_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeres.devices.jetson", lambda: Jetson("Jetson AGX Orin", "36.4.3", "6.2"))
    with pytest.raises(MissingDependency) as error:
        open_cuda("tensorrt")
    assert error.value.hint == "PATH=/usr/local/cuda/bin:$PATH pip install pycuda"


def test_bytes_go_to_the_device_and_back(library: Any) -> None:
    backend = open_cuda("tensorrt")
    with backend.current():
        there, back = (backend.host((2, 3), np.dtype(np.float16)) for _ in range(2))
        assert (there.shape, there.dtype, there.flags.c_contiguous, there.flags.writeable) == ((2, 3), "f2", True, True)
        there[:] = np.arange(6).reshape(2, 3)
        back[:] = 0
        address, stream = backend.device(there.nbytes), backend.stream()
        backend.copy_in(address, there, stream)
        backend.copy_out(back[:1], address, stream)
        backend.synchronize(stream)
        np.testing.assert_array_equal(back, [[0, 1, 2], [0, 0, 0]])
        assert isinstance(backend.handle(stream), int)
        assert backend.free_bytes() == 7
        start, end = backend.event(), backend.event()
        backend.record(start, stream)
        backend.record(end, stream)
        backend.wait(stream, end)
        backend.finish(end)
        assert backend.elapsed(start, end) == 1.5


FREES = {
    Driver: ["cuMemFreeHost", "cuMemFree", "cuEventDestroy", "cuStreamDestroy"],
    Runtime: ["cudaFreeHost", "cudaFree", "cudaEventDestroy", "cudaStreamDestroy"],
}


def test_all_is_freed_once_and_the_last_taken_first(library: Any) -> None:
    backend = open_cuda("tensorrt")
    with backend.current():
        backend.stream(), backend.event(), backend.device(4), backend.host((1,), np.dtype(np.uint8))
    library.log.clear()
    backend.close()
    backend.close()
    assert [name for name in library.log if name != "cudaSetDevice"] == FREES[type(library)]


def test_an_event_blocks_who_waits_for_it_if_it_is_asked_to(library: Any) -> None:
    backend = open_cuda("tensorrt")
    with backend.current():
        backend.event(), backend.event(blocking=True), backend.event(blocking=False)
    assert library.flags == [0, 1, 0]


def test_what_is_borrowed_goes_back_at_the_end_of_its_block(library: Any) -> None:
    backend = open_cuda("tensorrt")
    with backend.current():
        backend.stream()
        for error in (None, KeyError):
            library.log.clear()
            with suppress(KeyError), backend.borrowed():
                backend.device(4), backend.host((1,), np.dtype(np.uint8))
                if error:
                    raise error
            assert [name for name in library.log if "Free" in name] == FREES[type(library)][:2]
        backend.event()
    library.log.clear()
    backend.close()
    assert [name for name in library.log if name != "cudaSetDevice"] == FREES[type(library)][2:]


def test_what_cannot_be_freed_does_not_keep_the_rest(library: Any) -> None:
    backend = open_cuda("tensorrt")
    with backend.current():
        backend.device(4), backend.host((1,), np.dtype(np.uint8)), backend.device(4)
    library.fails |= {"cuMemFreeHost", "cudaFreeHost"}
    library.log.clear()
    with pytest.raises(BuildError, match="FreeHost failed"):
        backend.close()
    assert [name for name in library.log if name != "cudaSetDevice"] == FREES[type(library)][1:2] * 2
    library.fails.clear()
    library.log.clear()
    backend.close()
    assert set(library.log) <= {"cudaSetDevice"}


OPERATIONS: dict[str, tuple[str, Callable[[Any, Any, Any], Any]]] = {
    "cuMemAlloc": ("cudaMalloc", lambda b, s, e: b.device(8)),
    "cuMemHostAlloc": ("cudaMallocHost", lambda b, s, e: b.host((8,), np.dtype(np.uint8))),
    "cuStreamCreate": ("cudaStreamCreateWithFlags", lambda b, s, e: b.stream()),
    "cuEventCreate": ("cudaEventCreateWithFlags", lambda b, s, e: b.event()),
    "cuMemcpyHtoDAsync": ("cudaMemcpyAsync", lambda b, s, e: b.copy_in(8, np.zeros(1), s)),
    "cuMemcpyDtoHAsync": ("cudaMemcpyAsync", lambda b, s, e: b.copy_out(np.zeros(1), 8, s)),
    "cuEventRecord": ("cudaEventRecord", lambda b, s, e: b.record(e, s)),
    "cuStreamWaitEvent": ("cudaStreamWaitEvent", lambda b, s, e: b.wait(s, e)),
    "cuEventSynchronize": ("cudaEventSynchronize", lambda b, s, e: b.finish(e)),
    "cuStreamSynchronize": ("cudaStreamSynchronize", lambda b, s, e: b.synchronize(s)),
    "cuEventElapsedTime": ("cudaEventElapsedTime", lambda b, s, e: b.elapsed(e, e)),
    "cuMemGetInfo": ("cudaMemGetInfo", lambda b, s, e: b.free_bytes()),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_error_names_the_call(library: Any, name: str) -> None:
    runtime_name, operation = OPERATIONS[name]
    name = name if isinstance(library, Driver) else runtime_name
    backend = open_cuda("tensorrt")
    with backend.current():
        stream, event = backend.stream(), backend.event()
        library.fails.add(name)
        with pytest.raises(BuildError) as error:
            operation(backend, stream, event)
    assert (error.value.cause, error.value.evidence) == (f"{name} failed", "out of memory")


@pytest.mark.parametrize("name", ["cuInit", "cuDevicePrimaryCtxRetain", "cudaSetDevice"])
def test_a_driver_that_does_not_start_is_no_missing_package(library: Any, name: str) -> None:
    library.fails.add(name)
    if name.startswith("cuda") == isinstance(library, Runtime):
        with pytest.raises(BuildError, match=f"{name} failed"):
            open_cuda("tensorrt")


def test_pycuda_retains_the_primary_context_once_and_lends_it_to_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = install(monkeypatch, Driver())
    backends = [open_cuda("tensorrt") for _ in range(3)]
    assert driver.log.count("cuDevicePrimaryCtxRetain") == 1
    sizes: list[int] = []

    def work() -> None:
        for backend in backends:
            with backend.current():
                backend.device(8)
            sizes.append(len(driver.stack()))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [0] * 9
    for backend in backends:
        backend.close()
    assert (driver.log.count("cuMemFree"), driver.stack()) == (9, [])


def test_the_primary_context_is_never_left_to_pycuda(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = install(monkeypatch, Driver())
    open_cuda("tensorrt").close()
    cuda._primary_context.cache_clear()  # as at the end of the process
    gc.collect()
    assert "cuDevicePrimaryCtxRetain" in driver.log
    assert "cuCtxDetach" not in driver.log


def test_cuda_python_without_the_drivers_library_is_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = install(monkeypatch, Runtime())

    def lazily(*_: Any) -> Any:
        raise RuntimeError("Failed to dlopen libcuda.so.1")  # of cuda-bindings 12.8

    monkeypatch.setattr(runtime, "answer", lazily)
    with pytest.raises(MissingDependency) as error:
        open_cuda("rtx")
    assert "cuda-python: Failed to dlopen libcuda.so.1" in error.value.evidence


def test_a_context_is_taken_off_the_thread_after_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = install(monkeypatch, Driver())
    with pytest.raises(KeyError), open_cuda("tensorrt").current():
        raise KeyError
    assert driver.stack() == []


def test_a_graph_is_what_was_queued_and_frees_what_it_was_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = install(monkeypatch, Runtime())
    backend = CudaPython()
    stream = backend.stream()
    runtime.log.clear()
    graph = backend.capture(stream, lambda: runtime.log.append("work"))
    backend.launch(graph, stream)
    backend.drop(graph)
    assert runtime.log == [
        *("cudaStreamBeginCapture", "work", "cudaStreamEndCapture"),
        *("cudaGraphInstantiateWithFlags", "cudaGraphDestroy", "cudaGraphLaunch", "cudaGraphExecDestroy"),
    ]
    assert runtime.live == [stream]


@pytest.mark.parametrize("fails", ["work", "cudaStreamEndCapture", "cudaGraphInstantiateWithFlags"])
def test_a_failed_capture_is_ended_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    runtime = install(monkeypatch, Runtime())
    backend = CudaPython()
    stream = backend.stream()
    runtime.fails.add(fails)

    def work() -> None:
        if fails == "work":
            raise BuildError("work failed")

    with pytest.raises(BuildError, match=f"{fails} failed"):
        backend.capture(stream, work)
    assert fails == "cudaStreamEndCapture" or "cudaStreamEndCapture" in runtime.log
    assert runtime.live == [stream]
