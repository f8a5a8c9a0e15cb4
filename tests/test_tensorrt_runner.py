from __future__ import annotations

import json
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import VERSIONS, fake

from edgeres.errors import BuildError, InputError, UsageError
from edgeres.fusion import audit
from edgeres.runners import open_runner, tensorrt
from edgeres.runners.cuda import Cuda
from edgeres.runners.tensorrt import TensorRt, TensorRtRunner

SIZE, CLASSES, LARGEST = 8, 10, 4
WEIGHTS = np.random.default_rng(1).standard_normal((3 * SIZE * SIZE, CLASSES), np.float32)
PIXELS = np.random.default_rng(2).standard_normal((11, 3, SIZE, SIZE), np.float32)


def logits(pixels: np.ndarray) -> np.ndarray:
    return pixels.reshape(len(pixels), -1).astype(np.float32) @ WEIGHTS


class Simulated(Cuda):
    """Streams that do nothing before they have to, and other streams first: any order that was not asked for shows.

    A copy reads its source when it is done, not when it is queued. ``history`` has what was done, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.streams: dict[int, deque[tuple[str, Callable[[], bool]]]] = {}
        self.memory: dict[int, np.ndarray] = {}
        self.recorded: dict[str, int] = {}
        self.happened: dict[str, list[float]] = {}
        self.history: list[str] = []
        self.freed: list[str] = []
        self.fails = ""
        self.inside = threading.local()
        self.users: list[int] = []
        self.clock = 0.0
        self.names = iter(range(1000))
        self.graphs: dict[str, deque[tuple[str, Callable[[], bool]]]] = {}
        self.blocking: dict[str, bool] = {}
        self.finished: list[str] = []

    @contextmanager
    def current(self) -> Iterator[None]:
        depth = vars(self.inside).setdefault("depth", 0)
        self.inside.depth = depth + 1
        self.users.append(threading.get_ident())
        yield
        assert len({*self.users}) == 1, "two threads at once"
        self.users.pop()
        self.inside.depth = depth

    def _take(self, kind: str) -> str:
        assert vars(self.inside).get("depth"), "no current context"
        if self.fails == kind:
            raise BuildError(f"{kind} failed")
        name = f"{kind}{next(self.names)}"
        self._taken.callback(self.freed.append, name)
        return name

    def device(self, size: int) -> int:
        self._take("device")
        address = (len(self.memory) + 1) << 20
        self.memory[address] = np.full(size, 0xAB, np.uint8)
        return address

    def host(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        self._take("host")
        return np.full(shape, 99, dtype)

    def stream(self) -> int:
        self._take("stream")
        self.streams[len(self.streams) + 1] = deque()
        return len(self.streams)

    def handle(self, stream: int) -> int:
        return stream

    def event(self, blocking: bool = False) -> str:
        self.blocking[name := self._take("event")] = blocking
        return name

    def put(self, stream: int, name: str, work: Callable[[], bool]) -> None:
        assert vars(self.inside).get("depth"), "no current context"
        if self.fails == name:
            raise BuildError(f"{name} failed")
        self.streams[stream].append((name, work))

    def copy_in(self, address: int, source: np.ndarray, stream: int) -> None:
        def work() -> bool:
            self.memory[address][: source.nbytes] = np.frombuffer(source.tobytes(), np.uint8)
            self.clock += 1
            return True

        self.put(stream, "copy in", work)

    def copy_out(self, target: np.ndarray, address: int, stream: int) -> None:
        def work() -> bool:
            target[:] = np.frombuffer(self.memory[address][: target.nbytes].tobytes(), target.dtype).reshape(
                target.shape
            )
            self.clock += 3
            return True

        self.put(stream, "copy out", work)

    def record(self, event: str, stream: int) -> None:
        self.recorded[event] = self.recorded.get(event, 0) + 1
        self.put(stream, "record", lambda: self.happened.setdefault(event, []).append(self.clock) is None)

    def wait(self, stream: int, event: str) -> None:
        until = self.recorded.get(event, 0)
        self.put(stream, "wait", lambda: len(self.happened.get(event, [])) >= until)

    def done(self, event: str) -> bool:
        """Whether ``event`` has happened as often as it was recorded."""
        return len(self.happened.get(event, [])) == self.recorded[event]

    def go(self, stream: int, until: Callable[[], bool] = lambda: False) -> bool:
        """Do what ``stream`` can do now, and no more."""
        queue, some = self.streams[stream], False
        while queue and not until():
            name, work = queue[0]
            if not work():
                break
            queue.popleft()
            self.history.append(name)
            some = True
        return some

    def finish(self, event: str) -> None:
        self.finished.append(event)
        while not self.done(event):
            progress = [self.go(s, lambda: self.done(event)) for s in self.streams]
            assert any(progress), "streams wait for one another"

    def synchronize(self, stream: int) -> None:
        if self.fails == "synchronize":
            raise BuildError("synchronize failed")
        others = sorted(self.streams, key=lambda s: s == stream)
        while self.streams[stream]:
            progress = [self.go(s) for s in others]
            assert any(progress), "streams wait for one another"

    def elapsed(self, start: str, end: str) -> float:
        assert self.done(start), "not ready"
        assert self.done(end), "not ready"
        return self.happened[end][-1] - self.happened[start][-1]

    def free_bytes(self) -> int:
        return 0

    def capture(self, stream: int, work: Callable[[], None]) -> str:
        kept, self.streams[stream] = self.streams[stream], deque()
        work()
        self.graphs[name := f"graph{next(self.names)}"], self.streams[stream] = self.streams[stream], kept
        return name

    def launch(self, graph: str, stream: int) -> None:
        self.history.append("launch")
        self.streams[stream].extend(self.graphs[graph])

    def drop(self, graph: str) -> None:
        del self.graphs[graph]
        self.freed.append("graph")


class Bench:
    """A fake library whose plans compute `logits` on a simulated device."""

    def __init__(self, version: str, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.lib, self.cuda, self.path = fake(version), Simulated(), path
        self.executor = "tensorrt-rtx" if version.startswith("rtx") else "tensorrt"
        self.images = self.set_to = -1
        self.types = {"input": "FLOAT", "output": "FLOAT"}
        self.profile = (1, 2, LARGEST)
        self.ran: list[int] = []
        self.issued = 0
        self.tail: tuple[int, ...] = ()  # what follows the classes in the shape of the logits
        self.layers: Callable[[int], dict[str, float]] = lambda images: {"conv1": 1.0 * images, "fc": 0.25}
        self.lib.script |= {
            "Runtime.deserialize_cuda_engine": self.engine,
            "ICudaEngine.create_execution_context": self.context,
            "ICudaEngine.create_engine_inspector": lambda _: self.lib.make("EngineInspector"),
            "ICudaEngine.get_tensor_shape": lambda _, name: self.shape(name),
            "ICudaEngine.get_tensor_dtype": lambda _, name: getattr(self.lib.DataType, self.types[name]),
            "ICudaEngine.get_tensor_profile_shape": lambda _, name, i: [self.shape(name, n) for n in self.profile],
            "IExecutionContext.set_input_shape": self.set_images,
            "IExecutionContext.get_tensor_shape": lambda _, name: self.shape(name, self.batch()),
            "IExecutionContext.execute_async_v3": self.execute,
        }
        monkeypatch.setattr(tensorrt, "load_library", lambda name: self.lib)
        monkeypatch.setattr(tensorrt, "open_cuda", lambda extra, graphs: self.cuda)
        path.write_bytes(b"plan")

    def shape(self, name: str, images: int | None = None) -> tuple[int, ...]:
        images = self.images if images is None else images
        return (images, 3, SIZE, SIZE) if name == "input" else (images, CLASSES, *self.tail)

    def batch(self) -> int:
        return self.set_to if self.images < 0 else self.images

    def engine(self, runtime: Any, plan: bytes) -> Any:
        assert bytes(plan) == b"plan"
        engine = self.lib.make("ICudaEngine")
        for made, name in ((runtime, "runtime"), (engine, "engine")):
            weakref.finalize(made, self.cuda.freed.append, name)
        return engine

    def context(self, engine: Any, *_: Any) -> Any:
        context = self.lib.make("IExecutionContext")
        weakref.finalize(context, self.cuda.freed.append, "context")
        return context

    def set_images(self, context: Any, name: str, shape: tuple[int, ...]) -> bool:
        assert not any(self.cuda.streams.values()), "the shape changed under work that is not done"
        if not self.profile[0] <= shape[0] <= self.profile[2]:
            self.lib.say("ERROR", f"{shape} is out of the profile")
            return False
        self.set_to = shape[0]
        return True

    def execute(self, context: Any, handle: int) -> bool:
        source, result = (context.get_tensor_address(name) for name in ("input", "output"))
        images, number = self.batch(), self.issued
        self.issued += 1
        if context.profiler is not None:
            for layer, ms in self.layers(images).items():
                context.profiler.report_layer_time(layer, ms)

        def work() -> bool:
            kinds = {"FLOAT": np.float32, "HALF": np.float16, "UINT8": np.uint8}
            dtype = np.dtype(kinds[self.types["input"]])
            raw = self.cuda.memory[source][: images * 3 * SIZE * SIZE * dtype.itemsize]
            computed = logits(np.frombuffer(raw.tobytes(), dtype).reshape(images, -1))
            out = computed.astype(kinds[self.types["output"]]).tobytes()
            self.cuda.memory[result][: len(out)] = np.frombuffer(out, np.uint8)
            self.ran.append(number)
            self.cuda.clock += 2
            return True

        self.cuda.put(handle, "compute", work)
        return True

    def open(self, **options: Any) -> TensorRtRunner:
        return TensorRtRunner(self.path, self.executor, **options)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    return Bench("10.3.0", monkeypatch, tmp_path / "model.plan")


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_runs_with_what_its_bindings_have(
    version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = Bench(version, monkeypatch, tmp_path / "model.plan")
    for cuda_graph in (False, True):
        bench.cuda = Simulated()
        with bench.open(cuda_graph=cuda_graph) as runner:
            assert (runner.batch, runner.input_size, runner.dtype) == (None, SIZE, np.float32)
            for _ in range(3):
                np.testing.assert_allclose(runner.infer(PIXELS), logits(PIXELS), rtol=1e-5)
            assert runner.profile(PIXELS[:2], 3) == {"conv1": 2, "fc": 0.25}
            bench.lib.script["EngineInspector.get_engine_information"] = '{"Layers": ["conv1", "fc"]}'
            assert runner.inspect() == ["conv1", "fc"]
            np.testing.assert_allclose(runner.infer(PIXELS), logits(PIXELS), rtol=1e-5)
    assert not bench.lib.called("Runtime.engine_host_code_allowed=")  # a plan brings no code unless it is asked to
    assert not bench.lib.called("Runtime.DLA_core=")
    assert TensorRt(bench.executor).version() == version.removeprefix("rtx-")


@pytest.mark.parametrize("images", [1, 3, 4, 5, 8, 11])
def test_images_above_the_largest_batch_go_in_pieces(bench: Bench, images: int) -> None:
    with bench.open() as runner:
        result = runner.infer(PIXELS[:images])
    assert (result.dtype, result.shape) == (np.float32, (images, CLASSES))
    np.testing.assert_allclose(result, logits(PIXELS[:images]), rtol=1e-5)
    assert bench.ran == [*range(-(-images // LARGEST))]  # one after the other, as they came


def test_the_next_piece_is_queued_before_the_one_under_way_is_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[list[int]] = []
    synchronize = bench.cuda.synchronize

    def watch(stream: int) -> None:
        waits.append([sum(name == "compute" for name, _ in queue) for queue in bench.cuda.streams.values()])
        synchronize(stream)

    monkeypatch.setattr(bench.cuda, "synchronize", watch)
    with bench.open() as runner:
        runner.infer(PIXELS[:8])
        assert waits == [[0, 0], [0, 0], [1, 1], [0, 1]]  # two before the shape is set, then one for each result
        assert bench.lib.called("IExecutionContext.execute_async_v3") == [(1,), (2,)]
        # the device itself may copy the second piece in while it computes the first
        assert [n for n in bench.cuda.history if n.startswith("co")][:3] == ["copy in", "copy in", "compute"]


def repeated(runner: TensorRtRunner, calls: int, images: int = 2, **how: bool) -> list[dict[str, float]]:
    """What so many calls back to back split up to."""
    found: list[dict[str, float]] = []
    runner.repeat(PIXELS[:images], lambda split: found.append(split) or len(found) < calls, **how)
    return found


@pytest.mark.parametrize("transfers", [True, False])
@pytest.mark.parametrize("graph", [True, False])
def test_calls_back_to_back_are_two_at_a_time(bench: Bench, transfers: bool, graph: bool) -> None:
    queued: list[int] = []
    pending: list[int] = []
    finish = bench.cuda.finish

    def watch(event: str) -> None:
        computed = bench.cuda.history.count("compute")
        queued.append(computed + sum(name == "compute" for queue in bench.cuda.streams.values() for name, _ in queue))
        finish(event)
        pending.append(queued[-1] - bench.cuda.history.count("compute"))
        assert bench.cuda.history.count("copy out") == 1 + transfers * len(queued)  # that of the call waited for

    with bench.open(cuda_graph=graph) as runner:
        bench.cuda.finish = watch  # type: ignore[method-assign]
        found = repeated(runner, 4, transfers=transfers)
        assert queued == [3, 4, 5, 6]  # the one to fill the slot, those that are done, and one more than waited for
        assert max(pending) <= 1
        copies = {"copy_in": 1 * transfers, "compute": 2, "copy_out": 3 * transfers}
        for split in found:
            assert split.pop("enqueue") >= 0
            assert split == copies
        assert not any(bench.cuda.streams.values())  # the last call is over too
        names, done = ["copy in", "copy out"], bench.cuda.history
        for i in [i for i, name in enumerate(done) if name == "compute"]:  # none began before its pixels were there
            assert done[:i].count("copy in") > done[:i].count("compute") * transfers
        assert [bench.cuda.history.count(name) for name in names] == [1 + 5 * transfers] * 2
        assert bench.cuda.history.count("launch") == (5 if graph else 0)
        bench.cuda.finish = finish  # type: ignore[method-assign]
        np.testing.assert_allclose(runner.infer(PIXELS), logits(PIXELS), rtol=1e-5)


@pytest.mark.parametrize("spin", [True, False])
def test_calls_back_to_back_are_waited_for_as_asked_and_give_back_what_they_took(bench: Bench, spin: bool) -> None:
    with bench.open() as runner:
        before = set(bench.cuda.blocking)
        repeated(runner, 3, spin=spin)
        assert {bench.cuda.blocking[event] for event in bench.cuda.finished} == {not spin}
        taken = [name for name in bench.cuda.blocking if name not in before]
        assert {name.rstrip("0123456789") for name in bench.cuda.freed} == {"event", "stream"}
        assert set(taken) < set(bench.cuda.freed)
        assert len(bench.cuda.freed) == len(taken) + 2


def test_calls_back_to_back_of_a_fixed_batch_are_padded(bench: Bench) -> None:
    bench.images = 3
    with bench.open() as runner:
        assert len(repeated(runner, 2, images=2)) == 2
        np.testing.assert_allclose(runner.infer(PIXELS), logits(PIXELS), rtol=1e-5)


def test_more_images_than_one_call_takes_are_not_repeated(bench: Bench) -> None:
    with bench.open() as runner:
        with pytest.raises(UsageError, match="takes 4 images at a time"):
            repeated(runner, 1, images=5)
        runner.close()
        with pytest.raises(UsageError, match="closed"):
            repeated(runner, 1)


@pytest.mark.parametrize("wrong", ["compute", "go on"])
def test_calls_back_to_back_that_fail_leave_nothing_under_way(bench: Bench, wrong: str) -> None:
    calls = iter(range(3))

    def go_on(split: dict[str, float]) -> bool:
        if next(calls) < 2:
            return True
        if wrong == "go on":
            raise KeyboardInterrupt
        bench.cuda.fails = "compute"
        return True

    with bench.open() as runner:
        with pytest.raises(KeyboardInterrupt if wrong == "go on" else BuildError):
            runner.repeat(PIXELS[:2], go_on)
        assert not any(bench.cuda.streams.values())
        assert sum(name.startswith("stream") for name in bench.cuda.freed) == 2
        bench.cuda.fails = ""
        np.testing.assert_allclose(runner.infer(PIXELS), logits(PIXELS), rtol=1e-5)


def test_results_belong_to_the_caller(bench: Bench) -> None:
    with bench.open() as runner:
        first = runner.infer(PIXELS[:4])
        kept = first.copy()
        runner.infer(-PIXELS)
        np.testing.assert_array_equal(first, kept)
        assert first.flags.owndata
        assert not any(np.shares_memory(first, slot.result) for slot in runner._slots)


def test_a_call_leaves_the_pixels_as_they_are(bench: Bench) -> None:
    pixels = PIXELS.copy()
    with bench.open() as runner:
        runner.infer(pixels)
        runner.infer(pixels[:2])
    np.testing.assert_array_equal(pixels, PIXELS)


@pytest.mark.parametrize(("kind", "dtype"), [("FLOAT", np.float32), ("HALF", np.float16), ("UINT8", np.uint8)])
def test_pixels_go_in_as_the_plan_takes_them_and_logits_come_out_as_float32(
    bench: Bench, kind: str, dtype: type
) -> None:
    bench.types = {"input": kind, "output": "HALF" if kind == "HALF" else "FLOAT"}
    pixels = (PIXELS * 40 + 100).clip(0, 255).astype(dtype)
    with bench.open() as runner:
        assert runner.dtype == dtype
        result = runner.infer(pixels)
    assert result.dtype == np.float32
    np.testing.assert_allclose(
        result, logits(pixels), rtol=2e-3 if kind == "HALF" else 1e-5, atol=20 * (kind == "HALF")
    )


def test_a_fixed_batch_needs_one_slot_and_no_profile(bench: Bench) -> None:
    bench.images = 3
    with bench.open() as runner:
        assert (runner.batch, len(runner._slots)) == (3, 1)
        np.testing.assert_allclose(runner.infer(PIXELS), logits(PIXELS), rtol=1e-5)
    assert not bench.lib.called("ICudaEngine.get_tensor_profile_shape")
    assert not bench.lib.called("IExecutionContext.set_input_shape")


def test_fewer_images_than_the_smallest_batch_are_padded_with_zeros(bench: Bench) -> None:
    bench.profile = (3, 3, LARGEST)
    with bench.open() as runner:
        np.testing.assert_allclose(runner.infer(PIXELS[:5]), logits(PIXELS[:5]), rtol=1e-5)
        shapes = [args[1][0] for args in bench.lib.called("IExecutionContext.set_input_shape")]
        assert shapes == [4, 3]
        assert not any(slot.source[1:3].any() for slot in runner._slots[1:])


def test_no_images_are_refused(bench: Bench) -> None:
    with bench.open() as runner, pytest.raises(UsageError, match="takes images of"):
        runner.infer(PIXELS[:0])


def test_the_shape_is_set_when_it_changes_only(bench: Bench) -> None:
    with bench.open() as runner:
        for images in (4, 4, 8, 2, 2):
            runner.infer(PIXELS[:images])
    assert [args[1][0] for args in bench.lib.called("IExecutionContext.set_input_shape")] == [4, 2]


def test_a_graph_is_captured_after_a_first_plain_call_and_replayed_for_its_batch_size_only(bench: Bench) -> None:
    with bench.open(cuda_graph=True) as runner:
        for images, enqueued, launched in [(2, 1, 0), (2, 2, 1), (2, 2, 2), (2, 2, 3), (3, 3, 3), (3, 4, 4)]:
            np.testing.assert_allclose(runner.infer(PIXELS[:images]), logits(PIXELS[:images]), rtol=1e-5)
            assert len(bench.lib.called("IExecutionContext.execute_async_v3")) == enqueued
            assert bench.cuda.history.count("launch") == launched
        assert len(bench.cuda.graphs) == 1  # that of the other size is gone
    assert not bench.cuda.graphs


def test_each_slot_has_a_graph_of_its_own(bench: Bench) -> None:
    with bench.open(cuda_graph=True) as runner:
        for sign in (1, -1, 2):
            np.testing.assert_allclose(runner.infer(sign * PIXELS[:8]), logits(sign * PIXELS[:8]), rtol=1e-5)
        assert len(bench.cuda.graphs) == 2


def test_tensorrt_rtx_says_when_a_graph_can_be_captured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = Bench("rtx-1.7.1.116", monkeypatch, tmp_path / "model.plan")
    answers = iter([False, False, True])
    bench.lib.script["IExecutionContext.is_stream_capturable"] = lambda *_: next(answers)
    with bench.open(cuda_graph=True) as runner:
        launched = []
        for _ in range(4):
            np.testing.assert_allclose(runner.infer(PIXELS[:2]), logits(PIXELS[:2]), rtol=1e-5)
            launched.append(bench.cuda.history.count("launch"))
    assert launched == [0, 0, 0, 1]


def test_split_takes_the_pieces_one_by_one(bench: Bench) -> None:
    with bench.open() as runner:
        first, all_ = runner.split(PIXELS[:4]), runner.split(PIXELS)
        assert 0 < first.pop("enqueue") < 1000  # of the CPU's clock, not of the fake's
        assert 0 < all_.pop("enqueue") < 1000
        assert first == {"copy_in": 1, "compute": 2, "copy_out": 3}
        assert all_ == {"copy_in": 3, "compute": 6, "copy_out": 9}
        before = bench.cuda.history.count("record")
        runner.infer(PIXELS[:4])
        assert bench.cuda.history.count("record") == before + 1  # nothing is timed unless asked for


def test_threads_take_turns(bench: Bench) -> None:
    wrong: list[str] = []
    with bench.open() as runner:

        def work(k: int) -> None:
            try:
                for _ in range(5):
                    images = PIXELS[k : k + 6] * (k + 1)
                    np.testing.assert_allclose(runner.infer(images), logits(images), rtol=1e-4, atol=1e-3)
            except AssertionError as error:
                wrong.append(f"{k}: {error}")

        real = bench.lib.script["IExecutionContext.execute_async_v3"]
        bench.lib.script["IExecutionContext.execute_async_v3"] = lambda *args: time.sleep(1e-3) or real(*args)
        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert len(bench.ran) == 40
    assert bench.cuda.users == []


def test_close_frees_all_once_in_order(bench: Bench) -> None:
    runner = bench.open(cuda_graph=True)
    for _ in range(2):
        runner.infer(PIXELS[:8])
    runner.close()
    runner.close()
    assert bench.cuda.freed[:5] == ["graph", "graph", "context", "engine", "runtime"]
    rest = [name.rstrip("0123456789") for name in bench.cuda.freed[5:]]
    slot = ["event"] * 4 + ["stream", "device", "device", "host", "host"]
    assert rest == slot * 2
    assert len({*bench.cuda.freed[5:]}) == 18
    with pytest.raises(UsageError, match="closed"):
        runner.infer(PIXELS)


NONE = {
    "Runtime.deserialize_cuda_engine": "load",
    "ICudaEngine.create_execution_context": "create an execution context",
}
FALSE = {
    "IExecutionContext.set_input_shape": "take images of (4, 3, 8, 8)",
    "IExecutionContext.set_tensor_address": "take the address of input",
    "IExecutionContext.execute_async_v3": "run",
}


def refuse(bench: Bench, call: str, answer: Any, why: str = "because") -> None:
    """Let ``call`` say ``why``, and return ``answer``."""

    def script(*_: Any) -> Any:
        bench.lib.say("ERROR", why)
        return answer

    bench.lib.script[call] = script


@pytest.mark.parametrize(("call", "what"), NONE.items())
def test_what_cannot_be_loaded_says_why_and_leaves_nothing(bench: Bench, call: str, what: str) -> None:
    bench.open().close()
    bench.lib.say("ERROR", "of something else, long ago")
    refuse(bench, call, None)
    with pytest.raises(BuildError) as error:
        bench.open()
    assert error.value.cause.startswith(f"TensorRT could not {what}")
    assert error.value.evidence == "because"
    assert not bench.cuda._taken.pop_all()._exit_callbacks  # type: ignore[attr-defined]
    assert what != "load" or "one version (here 10.3.0)" in error.value.hint


@pytest.mark.parametrize(("call", "what"), FALSE.items())
def test_what_cannot_be_run_says_why_and_the_runner_goes_on(bench: Bench, call: str, what: str) -> None:
    with bench.open() as runner:
        real = bench.lib.script.get(call)
        for why in ("one", "another"):
            refuse(bench, call, False, why)
            with pytest.raises(BuildError) as error:
                runner.infer(PIXELS)
            assert (error.value.cause, error.value.evidence) == (f"TensorRT could not {what}", why)
        bench.lib.script.pop(call)
        bench.lib.script |= {call: real} if real else {}
        np.testing.assert_allclose(runner.infer(PIXELS), logits(PIXELS), rtol=1e-5)


def test_a_piece_that_fails_leaves_no_other_under_way(bench: Bench) -> None:
    with bench.open() as runner:
        real, calls = bench.lib.script["IExecutionContext.execute_async_v3"], iter([True, False])
        bench.lib.script["IExecutionContext.execute_async_v3"] = lambda *args: next(calls) and real(*args)
        with pytest.raises(BuildError, match="could not run"):
            runner.infer(PIXELS)
        assert not any(bench.cuda.streams.values())
        bench.lib.script["IExecutionContext.execute_async_v3"] = real
        np.testing.assert_allclose(runner.infer(PIXELS), logits(PIXELS), rtol=1e-5)


@pytest.mark.parametrize("fails", ["stream", "event", "device", "host"])
def test_memory_that_is_not_there_leaves_nothing(bench: Bench, fails: str) -> None:
    bench.cuda.fails = fails
    with pytest.raises(BuildError, match=f"{fails} failed"):
        bench.open()
    assert not any(name.startswith(fails) for name in bench.cuda.freed)
    assert len({*bench.cuda.freed}) == len(bench.cuda.freed)
    assert not bench.cuda._taken.pop_all()._exit_callbacks  # type: ignore[attr-defined]


@pytest.mark.parametrize("fails", ["copy in", "copy out", "record", "wait", "synchronize"])
def test_errors_of_the_device_come_out_and_the_runner_closes(bench: Bench, fails: str) -> None:
    runner = bench.open()
    bench.cuda.fails = fails
    with pytest.raises(BuildError, match=f"{fails} failed"):
        runner.infer(PIXELS)
    runner.close()
    assert bench.cuda.freed[:3] == ["context", "engine", "runtime"]
    assert len(bench.cuda.freed) == 21


def test_a_library_that_does_not_start_says_so(bench: Bench) -> None:
    def script(runtime: Any, log: Any) -> None:
        bench.lib.used.append(log)
        bench.lib.say("ERROR", "no driver")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    bench.lib.script["Runtime.__init__"] = script
    with pytest.raises(BuildError, match="cannot start") as error:
        bench.open()
    assert error.value.evidence == "no driver"


def test_shapes_that_do_not_follow_are_errors(bench: Bench) -> None:
    with bench.open() as runner:
        bench.lib.script["IExecutionContext.infer_shapes"] = lambda _: ["elsewhere"]
        with pytest.raises(BuildError, match="lacks shapes") as error:
            runner.infer(PIXELS)
        assert error.value.evidence == "elsewhere"
        bench.lib.script["IExecutionContext.infer_shapes"] = lambda _: []
        bench.lib.script["IExecutionContext.get_tensor_shape"] = lambda _, name: (1, CLASSES)
        with pytest.raises(BuildError, match=r"4 images give output of \(1, 10\)"):
            runner.infer(PIXELS)


def test_a_shape_that_was_refused_is_not_taken_for_the_one_before(bench: Bench) -> None:
    with bench.open() as runner:
        runner.infer(PIXELS[:2])
        bench.lib.script["IExecutionContext.infer_shapes"] = lambda _: ["elsewhere"]
        with pytest.raises(BuildError, match="lacks shapes"):
            runner.infer(PIXELS[:4])
        del bench.lib.script["IExecutionContext.infer_shapes"]
        np.testing.assert_allclose(runner.infer(PIXELS[:2]), logits(PIXELS[:2]), rtol=1e-5)
        assert [args[1][0] for args in bench.lib.called("IExecutionContext.set_input_shape")] == [2, 4, 2]


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ("ICudaEngine.get_tensor_mode", lambda self, name: self.lib.TensorIOMode.INPUT),
        ("ICudaEngine.get_tensor_shape", lambda self, name: (-1, 4, 8, 8) if name == "input" else (-1, 10)),
        ("ICudaEngine.get_tensor_shape", lambda self, name: (-1, 3, 8, 6) if name == "input" else (-1, 10)),
        ("ICudaEngine.get_tensor_shape", lambda self, name: (-1, 3, -1, -1) if name == "input" else (-1, 10)),
        ("ICudaEngine.get_tensor_shape", lambda self, name: (-1, 3, 8, 8) if name == "input" else (-1, -1)),
    ],
)
def test_what_is_no_classifier_is_refused(bench: Bench, call: str, answer: Any) -> None:
    bench.lib.script[call] = answer
    with pytest.raises(BuildError, match="no classifier"):
        bench.open()


def test_other_types_and_missing_files_are_refused(bench: Bench) -> None:
    bench.types["input"] = "INT8"
    with pytest.raises(BuildError, match=r"tensor input is of type .*INT8"):
        bench.open()
    bench.path.unlink()
    with pytest.raises(InputError, match="cannot read"):
        bench.open()


def order(bench: Bench, *names: str) -> list[str]:
    """Which of ``names`` was called when."""
    return [called for called, _ in bench.lib.calls if called in names]


def test_a_plan_brings_code_only_if_it_may(bench: Bench) -> None:
    load = "Runtime.deserialize_cuda_engine"
    bench.open(version_compatible=True).close()
    assert bench.lib.called("Runtime.engine_host_code_allowed=") == [(True,)]
    assert order(bench, "Runtime.engine_host_code_allowed=", load) == ["Runtime.engine_host_code_allowed=", load]


def test_a_library_without_version_compatible_plans_says_so(bench: Bench) -> None:
    bench.lib = fake("8.6.1", without=("Runtime.engine_host_code_allowed",))  # as 8.5
    with pytest.raises(UsageError, match=r"8\.6\.1 has no version-compatible plans"):
        bench.open(version_compatible=True)
    assert not bench.cuda._taken.pop_all()._exit_callbacks  # type: ignore[attr-defined]


def test_a_dla_core_is_chosen_before_the_plan_is_loaded(bench: Bench) -> None:
    bench.lib.script["Runtime.num_DLA_cores"] = 2
    load = "Runtime.deserialize_cuda_engine"
    for core in (0, 1):
        bench.open(dla_core=core).close()
    assert bench.lib.called("Runtime.DLA_core=") == [(0,), (1,)]
    assert order(bench, "Runtime.DLA_core=", load) == ["Runtime.DLA_core=", load] * 2


@pytest.mark.parametrize(("cores", "core"), [(0, 0), (2, 2), (2, -1), (None, 0)])
def test_a_dla_core_that_is_not_there_is_refused(bench: Bench, cores: int | None, core: int) -> None:
    bench.lib.script["Runtime.num_DLA_cores"] = cores
    with pytest.raises(BuildError, match=f"there is no DLA core {core}") as error:
        bench.open(dla_core=core)
    assert error.value.evidence == f"TensorRT 10.3.0 sees {cores or 0} of them here"
    assert "Orin" in error.value.hint
    assert not bench.lib.called("Runtime.deserialize_cuda_engine")
    assert not bench.cuda._taken.pop_all()._exit_callbacks  # type: ignore[attr-defined]


def test_a_library_without_some_types_or_dla_still_loads(bench: Bench) -> None:
    types = bench.lib.DataType
    bench.lib.DataType = SimpleNamespace(FLOAT=types.FLOAT, HALF=types.HALF)
    bench.types["input"] = "HALF"
    with bench.open() as runner:
        assert runner.dtype == np.float16
    found = bench.lib.script["ICudaEngine.get_tensor_dtype"]
    bench.lib.script["ICudaEngine.get_tensor_dtype"] = lambda engine, name: types.INT8
    with pytest.raises(BuildError, match="is of type"):
        bench.open()
    bench.lib.script["ICudaEngine.get_tensor_dtype"] = found
    delattr(bench.lib.Runtime, "num_DLA_cores")
    with pytest.raises(BuildError, match="there is no DLA core 0"):
        bench.open(dla_core=0)


def test_settings_reach_the_runner(bench: Bench) -> None:
    bench.lib.script["Runtime.num_DLA_cores"] = 2
    settings = {"dla_core": 1, "cuda_graph": True, "version_compatible": True}
    with open_runner(bench.path, "tensorrt", **settings) as runner:
        for _ in range(2):
            runner.infer(PIXELS[:2])
        assert bench.cuda.history.count("launch") == 1
    assert bench.lib.set_to("Runtime.DLA_core") == 1
    assert bench.lib.set_to("Runtime.engine_host_code_allowed") is True


def test_threads_mean_nothing_to_a_gpu(bench: Bench) -> None:
    with open_runner(bench.path, "tensorrt", threads=3) as runner:
        np.testing.assert_allclose(runner.infer(PIXELS), logits(PIXELS), rtol=1e-5)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_other_executors_refuse_settings_but_take_those_that_ask_nothing(tiny_path: Path, name: str) -> None:
    for settings in ({"dla_core": 0}, {"cuda_graph": True}):
        with pytest.raises(UsageError, match=f"executor {name} has no setting {next(iter(settings))}"):
            open_runner(tiny_path, name, **settings)
    with open_runner(tiny_path, name, dla_core=None, cuda_graph=False) as runner:
        assert runner.input_size == 32


@pytest.mark.parametrize("images", [-1, 3])
def test_logits_of_four_dimensions_come_back_in_two(bench: Bench, images: int) -> None:
    bench.tail, bench.images = (1, 1), images
    with bench.open() as runner:
        result = runner.infer(PIXELS)
        assert (result.dtype, result.shape) == (np.float32, (11, CLASSES))
        np.testing.assert_allclose(result, logits(PIXELS), rtol=1e-5)


@pytest.mark.parametrize("tail", [(2, 2), (1,), (1, 2), (1, 1, 1)])
def test_a_result_of_another_shape_is_no_classifiers(bench: Bench, tail: tuple[int, ...]) -> None:
    bench.tail = tail
    with pytest.raises(BuildError, match="no classifier"):
        bench.open()


def test_a_profile_has_the_median_of_each_layer(bench: Bench) -> None:
    scale = iter([5, 5, 1, 1, 3, 3])  # for two pieces in each of three runs; the call before them is not timed

    def layers(images: int) -> dict[str, float]:
        factor = next(scale)
        return {"conv1": images * factor, "fc": 1.0}

    bench.layers = layers
    with bench.open() as runner:
        assert runner.profile(PIXELS[:6], 3) == {"conv1": 18, "fc": 2}
        assert len(bench.lib.called("IExecutionContext.execute_async_v3")) == 8
        assert {args[0] for args in bench.lib.called("IExecutionContext.execute_async_v3")} == {1}  # one by one
        assert next(scale, None) is None


def test_layers_that_are_not_told_each_time_count_when_they_are(bench: Bench) -> None:
    told = iter([{"a": 1.0}, {"a": 3.0, "b": 7.0}, {"a": 2.0}])
    bench.layers = lambda images: next(told)
    with bench.open() as runner:
        assert runner.profile(PIXELS[:1], 3) == {"a": 2}
    bench.layers = lambda images: {}
    with bench.open() as runner:
        assert runner.profile(PIXELS[:1], 3) == {}


def test_after_a_profile_nothing_is_timed_and_everything_is_as_before(bench: Bench) -> None:
    with bench.open(cuda_graph=True) as runner:
        for _ in range(2):
            runner.infer(PIXELS[:2])
        assert bench.cuda.history.count("launch") == 1
        runner.profile(PIXELS[:2], 2)
        assert bench.cuda.history.count("launch") == 1  # a graph would not tell its layers
        assert bench.cuda.freed == ["graph", "context"]
        bench.layers = lambda images: pytest.fail("timed")  # type: ignore[assignment]
        for images in (2, 2):
            np.testing.assert_allclose(runner.infer(PIXELS[:images]), logits(PIXELS[:images]), rtol=1e-5)
        assert bench.cuda.history.count("launch") == 2
    assert bench.cuda.freed.count("context") == 2


def test_a_profile_that_fails_leaves_a_runner_that_works(bench: Bench) -> None:
    with bench.open() as runner:
        real = bench.lib.script["IExecutionContext.execute_async_v3"]
        refuse(bench, "IExecutionContext.execute_async_v3", False)
        with pytest.raises(BuildError, match="could not run"):
            runner.profile(PIXELS[:2])
        bench.lib.script["IExecutionContext.execute_async_v3"] = real
        with pytest.raises(UsageError, match="takes images of"):
            runner.profile(PIXELS[:0])
        with pytest.raises(UsageError, match="0 runs to profile"):
            runner.profile(PIXELS, 0)
        bench.layers = lambda images: pytest.fail("timed")  # type: ignore[assignment]
        np.testing.assert_allclose(runner.infer(PIXELS), logits(PIXELS), rtol=1e-5)
    with pytest.raises(UsageError, match="closed"):
        runner.profile(PIXELS)


def test_a_context_that_does_not_come_back_closes_the_runner(bench: Bench) -> None:
    runner = bench.open()
    refuse(bench, "ICudaEngine.create_execution_context", None, "out of memory")
    with pytest.raises(BuildError, match="could not create an execution context") as error:
        runner.profile(PIXELS[:2])
    assert error.value.evidence == "out of memory"
    with pytest.raises(UsageError, match="closed"):
        runner.infer(PIXELS)
    assert bench.cuda.freed[:3] == ["context", "engine", "runtime"]
    assert len(bench.cuda.freed) == 21


def tell(bench: Bench, text: str) -> None:
    """What the inspector says."""
    bench.lib.script["EngineInspector.get_engine_information"] = lambda _, form: text


LAYER = {
    "Name": "conv1",
    "LayerType": "CaskConvolution",
    "Metadata": "[ONNX Layer: conv1]\x1e[ONNX Layer: relu]",
    "Inputs": [{"Name": "input", "Dimensions": [2, 3, 8, 8], "Datatype": "Int8"}],
    "Outputs": [{"Name": "output", "Dimensions": [2, 10], "Datatype": "Int8"}],
}


def test_layers_are_told_for_the_usual_batch_unless_another_is_set(bench: Bench) -> None:
    tell(bench, json.dumps({"Layers": [LAYER], "Bindings": ["input"]}))
    with bench.open() as runner:
        assert runner.inspect() == [LAYER]
        assert [args[1][0] for args in bench.lib.called("IExecutionContext.set_input_shape")] == [2]
        (context,) = bench.lib.called("EngineInspector.execution_context=")[-1]
        assert context is runner._context
        assert bench.lib.called("EngineInspector.get_engine_information") == [(bench.lib.LayerInformationFormat.JSON,)]
        runner.infer(PIXELS[:3])
        runner.inspect()
        assert [args[1][0] for args in bench.lib.called("IExecutionContext.set_input_shape")] == [2, 3]
        del context
        bench.lib.calls.clear()  # which hold the context too
    assert bench.cuda.freed[:3] == ["context", "engine", "runtime"]


@pytest.mark.parametrize("text", [None, "", "{", "{}", '{"Layers": []}', '{"Layers": [1]}'])
def test_layers_that_are_not_told_are_an_error(bench: Bench, text: str | None) -> None:
    tell(bench, text)
    with bench.open() as runner:
        with pytest.raises(BuildError, match="does not tell the plan's layers") as error:
            runner.inspect()
        np.testing.assert_allclose(runner.infer(PIXELS), logits(PIXELS), rtol=1e-5)
        bench.lib.calls.clear()
    assert error.value.evidence  # an error that is kept keeps nothing of the plan
    assert bench.cuda.freed[:3] == ["context", "engine", "runtime"]


def test_control_characters_in_layers_are_read(bench: Bench) -> None:
    tell(bench, '{"Layers": [{"Name": "a", "Metadata": "b\x1ec"}]}')
    with bench.open() as runner:
        assert runner.inspect() == [{"Name": "a", "Metadata": "b\x1ec"}]


def test_the_audit_is_that_of_the_layers(bench: Bench) -> None:
    tell(bench, json.dumps({"Layers": [LAYER]}))
    bench.lib.script["Runtime.num_DLA_cores"] = 1
    found = TensorRt("tensorrt").audit(bench.path, "int8", dla_core=0)
    assert found == audit([LAYER], "int8").fusion()
    assert found.notes[0].startswith("1 of 1 convolution INT8 in and out")
    assert bench.lib.set_to("Runtime.DLA_core") == 0
    assert bench.cuda.freed[:2] == ["engine", "runtime"]


def test_an_examination_has_layers_and_times_of_the_usual_batch(bench: Bench) -> None:
    tell(bench, json.dumps({"Layers": [LAYER]}))
    bench.types["input"] = "UINT8"  # takes raw pixels, which need no preprocessing here
    layers, times = TensorRt("tensorrt").examine(bench.path, version_compatible=True)
    assert (layers, times) == ([LAYER], {"conv1": 2, "fc": 0.25})
    assert bench.lib.set_to("Runtime.engine_host_code_allowed") is True
    assert [args[1][0] for args in bench.lib.called("IExecutionContext.set_input_shape")] == [2]
    assert bench.cuda.freed.count("engine") == 1
    refuse(bench, "Runtime.deserialize_cuda_engine", None)
    with pytest.raises(BuildError, match="could not load"):
        TensorRt("tensorrt").examine(bench.path)


def test_audit_without_an_inspector_is_an_error(bench: Bench) -> None:
    refuse(bench, "ICudaEngine.create_engine_inspector", None)
    with pytest.raises(BuildError, match="create an inspector") as error:
        TensorRt("tensorrt").audit(bench.path, "int8")
    assert error.value.evidence == "because"


def test_the_real_library_says_why_it_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    cuda, path = Simulated(), tmp_path / "model.plan"
    monkeypatch.setattr(tensorrt, "open_cuda", lambda extra, graphs: cuda)
    path.write_bytes(b"no plan" * 100)
    with pytest.raises(BuildError, match="TensorRT could not load") as error:
        TensorRtRunner(path, "tensorrt-rtx")
    assert "incompatible serialization version" in error.value.evidence


def test_the_real_library_has_no_dla_core_and_takes_the_profiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(tensorrt, "open_cuda", lambda extra, graphs: Simulated())
    (tmp_path / "model.plan").write_bytes(b"no plan")
    with pytest.raises(BuildError, match="there is no DLA core 0"):
        TensorRtRunner(tmp_path / "model.plan", "tensorrt-rtx", dla_core=0)
    profiler = tensorrt._profiler(library)
    for ms in (1.0, 2.0):
        profiler.report_layer_time("conv1", ms)
    assert isinstance(profiler, library.IProfiler)
    assert profiler.ms == {"conv1": 3}


def test_kernels_of_tensorrt_rtx_are_final_from_the_first_call_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = Bench("rtx-1.7.1.116", monkeypatch, tmp_path / "model.plan")
    with bench.open() as runner:
        runner.profile(PIXELS[:2])
    name, eager = (
        "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
        "DynamicShapesKernelSpecializationStrategy",
    )
    assert bench.lib.called(f"{name}=") == [(getattr(bench.lib, eager).EAGER,)] * 2
    configs = [config for (config,) in bench.lib.called("ICudaEngine.create_execution_context")]
    assert None not in configs
    assert len(configs) == 2
