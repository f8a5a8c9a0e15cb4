"""PyCUDA and cuda-python on a real GPU, without TensorRT: ``pytest -m gpu``. Elsewhere every test is skipped."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeres.errors import EdgeresError
from edgeres.runners.cuda import Cuda, CudaPython, PyCuda

pytestmark = pytest.mark.gpu

MANY = 64 << 20
"""Bytes of a copy that takes a millisecond and more."""
MOST = 1e12
"""Bytes per second that no copy to or from a host reaches."""


@pytest.fixture(params=[PyCuda, CudaPython])
def cuda(request: pytest.FixtureRequest) -> Iterator[Cuda]:
    try:
        backend: Cuda = request.param()
    except (ImportError, EdgeresError) as error:
        pytest.skip(f"{request.param.__name__}: {error}")
    yield backend
    backend.close()


def noise(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def test_bytes_go_there_and_back_and_memory_is_given_back(cuda: Cuda) -> None:
    with cuda.current():
        free = cuda.free_bytes()
        with cuda.borrowed():
            there, back = (cuda.host((MANY,), np.dtype(np.uint8)) for _ in range(2))
            there[:], back[:] = noise(MANY), 0
            address, stream = cuda.device(MANY), cuda.stream()
            assert free - cuda.free_bytes() >= MANY
            start, arrived, left = (cuda.event() for _ in range(3))
            cuda.record(start, stream)
            cuda.copy_in(address, there, stream)
            cuda.record(arrived, stream)
            cuda.copy_out(back, address, stream)
            cuda.record(left, stream)
            cuda.finish(left)
            np.testing.assert_array_equal(back, there)
            assert min(cuda.elapsed(start, arrived), cuda.elapsed(arrived, left)) > 1e3 * MANY / MOST
        assert cuda.free_bytes() >= free - (4 << 20)


def test_the_host_goes_on_while_a_copy_is_under_way(cuda: Cuda) -> None:
    with cuda.current():
        source, address, stream = cuda.host((MANY,), np.dtype(np.uint8)), cuda.device(MANY), cuda.stream()
        start, end = cuda.event(), cuda.event(blocking=True)
        source[:] = 1
        for _ in range(2):  # the first call may be slow
            began = time.perf_counter()
            cuda.record(start, stream)
            for _ in range(8):
                cuda.copy_in(address, source, stream)
            cuda.record(end, stream)
            queued = 1e3 * (time.perf_counter() - began)
            cuda.finish(end)
        assert queued < 0.5 * cuda.elapsed(start, end)


def test_a_stream_waits_for_an_event_of_another_and_for_none_that_was_never_recorded(cuda: Cuda) -> None:
    with cuda.current():
        there, back = (cuda.host((MANY,), np.dtype(np.uint8)) for _ in range(2))
        address, first, second, event, never = (
            cuda.device(MANY),
            cuda.stream(),
            cuda.stream(),
            cuda.event(),
            cuda.event(),
        )
        for seed in range(3):
            there[:], back[:] = noise(MANY, seed), 0
            cuda.wait(first, never)
            cuda.copy_in(address, there, first)
            cuda.record(event, first)
            cuda.wait(second, event)
            cuda.copy_out(back, address, second)
            cuda.synchronize(second)
            np.testing.assert_array_equal(back, there)


def test_threads_share_a_backend(cuda: Cuda) -> None:
    wrong: list[str] = []

    def work(seed: int) -> None:
        try:
            with cuda.current():
                there, back = (cuda.host((1 << 20,), np.dtype(np.uint8)) for _ in range(2))
                address, stream = cuda.device(1 << 20), cuda.stream()
            for turn in range(20):
                there[:] = noise(1 << 20, 100 * seed + turn)
                with cuda.current():
                    cuda.copy_in(address, there, stream)
                    cuda.copy_out(back, address, stream)
                    cuda.synchronize(stream)
                if not np.array_equal(back, there):
                    wrong.append(f"thread {seed}, turn {turn}")
        except EdgeresError as error:
            wrong.append(str(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_graph_does_its_copies_at_every_launch_and_not_before() -> None:
    try:
        cuda = CudaPython()
    except (ImportError, EdgeresError) as error:
        pytest.skip(f"CudaPython: {error}")
    with cuda.current():
        there, back = (cuda.host((1 << 20,), np.dtype(np.uint8)) for _ in range(2))
        there[:], back[:] = noise(1 << 20), 0
        address, stream = cuda.device(1 << 20), cuda.stream()

        def queue() -> None:
            cuda.copy_in(address, there, stream)
            cuda.copy_out(back, address, stream)

        with pytest.raises(ZeroDivisionError):
            cuda.capture(stream, lambda: (queue(), 1 // 0))  # type: ignore[arg-type,return-value]
        graph = cuda.capture(stream, queue)
        cuda.synchronize(stream)
        assert not back.any()
        for seed in range(3):
            there[:] = noise(1 << 20, seed)
            cuda.launch(graph, stream)
            cuda.synchronize(stream)
            np.testing.assert_array_equal(back, there)
        cuda.drop(graph)
    cuda.close()


@pytest.mark.parametrize("package", ["PyCuda", "CudaPython"])
def test_a_process_that_leaves_everything_open_ends_without_a_word(package: str) -> None:
    code = f"""
import sys
import numpy as np
from edgeres.errors import EdgeresError
from edgeres.runners.cuda import {package}
try:
    cuda = {package}()
except (ImportError, EdgeresError) as error:
    sys.exit(f"skip {{error}}")
with cuda.current():
    kept = cuda.host((4,), np.dtype(np.float32)), cuda.device(4), cuda.stream(), cuda.event()
"""
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    if done.stderr.startswith("skip"):
        pytest.skip(done.stderr)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
