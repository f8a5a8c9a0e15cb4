"""Implicit INT8: TensorRT's calibrators, served from a cache or from images. Fakes call them as TensorRT does."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import VERSIONS, calibrate, fake, header

from edgeres import calibration_cache
from edgeres.errors import BuildError, InputError, UsageError
from edgeres.runners import cuda as cuda_module
from edgeres.runners.cuda import Cuda
from edgeres.trt import Calibration, Options, OutOfMemory, build, build_plan, builder
from edgeres.trt.calibrator import ALGORITHMS

IMPLICIT = [v for v in VERSIONS if v.startswith(("8", "10"))]
every = pytest.mark.parametrize("version", VERSIONS)
implicit = pytest.mark.parametrize("version", IMPLICIT)
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)
SIZE = (3, 64, 64)
LINES = "input: 3caa1d13\n(Unnamed Layer* 64) [Shuffle]_output: 3d2f0c1a\n"
CACHE = calibration_cache.write({"input": 0.01, "conv1": 0.5}, "8.5.2")
UNSCALED = "Missing scale and zero-point for tensor {}, expect fall back to non-int8 implementation for any layer"


class Device(Cuda):
    """Device memory as arrays, by address. It insists on a current context, and copies when it synchronizes."""

    fails = 0  # the next copies

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[int, np.ndarray] = {}
        self.queued: list[tuple[int, np.ndarray]] = []
        self.inside, self.closed = threading.local(), False

    @contextmanager
    def current(self) -> Iterator[None]:
        self.inside.yes = True
        yield
        self.inside.yes = False

    def check(self) -> None:
        assert getattr(self.inside, "yes", False), "no current context"

    def device(self, size: int) -> int:
        self.check()
        self.memory[4096] = np.zeros(size, np.uint8)
        self._taken.callback(self.memory.clear)
        return 4096

    def host(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        self.check()
        return np.zeros(shape, dtype)

    def stream(self) -> Any:
        self.check()
        return "stream"

    def copy_in(self, address: int, source: np.ndarray, stream: Any) -> None:
        self.check()
        assert stream == "stream"
        if self.fails:
            self.fails -= 1
            raise BuildError("cudaMemcpyAsync failed")
        self.queued.append((address, source))

    def synchronize(self, stream: Any) -> None:
        self.check()
        for address, source in self.queued:
            self.memory[address][:] = np.frombuffer(source.tobytes(), np.uint8)
        self.queued.clear()

    def close(self) -> None:
        self.closed = True
        super().close()

    handle = event = copy_out = record = wait = finish = elapsed = free_bytes = None  # no calibration needs these


class Bench:
    """A fake library with a device, and what its calibrator was served."""

    def __init__(self, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lib, self.device, self.batches = fake(version), Device(), []
        self.lib.script["batch"] = self.look
        self.opened: list[str] = []
        self.said: list[str] = []
        monkeypatch.setattr(cuda_module, "open_cuda", self.open)
        monkeypatch.setattr(builder, "say", self.said.append)

    def open(self, extra: str) -> Device:
        self.opened.append(extra)
        self.device = Device()
        return self.device

    def look(self, addresses: list[int]) -> None:
        [address] = addresses
        pixels = self.device.memory[address].tobytes()
        self.batches.append(np.frombuffer(pixels, np.float32).reshape(-1, *SIZE)[:, 0, 0, 0].tolist())


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench("10.3.0", monkeypatch)


def images(*sizes: int) -> Callable[[], Iterator[np.ndarray]]:
    """Batches of ``sizes``; each image is full of its number."""

    def batches() -> Iterator[np.ndarray]:
        number = 0
        for size in sizes:
            batch = np.zeros((size, *SIZE), np.float32)
            batch += np.arange(number, number + size, dtype=np.float32)[:, None, None, None]
            number += size
            yield batch

    return batches


# the cache


@implicit
@algorithms
def test_a_cache_is_given_with_the_header_that_this_version_takes(
    version: str, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(version, monkeypatch)
    built = build(bench.lib, b"onnx", "int8", Options(), Calibration("TRT-1-x\n" + LINES, algorithm=algorithm))
    first = header(bench.lib, {"entropy": "EntropyCalibration2", "minmax": "MinMaxCalibration"}[algorithm])
    assert built.plan == b"plan"
    assert built.calibration_cache == f"{first}\n{LINES}".encode()
    assert (bench.opened, bench.batches, built.notes) == ([], [], [])  # no image, no device


@implicit
def test_int8_by_calibration_is_typed_weakly(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lib = Bench(version, monkeypatch).lib
    build(lib, b"onnx", "int8", Options(), Calibration(CACHE))
    assert lib.flags() == {"FP16", "INT8"}
    [(flags,)] = lib.called("Builder.create_network")
    kind = lib.NetworkDefinitionCreationFlag
    assert flags == 1 << int(kind.EXPLICIT_BATCH)
    assert isinstance(lib.set_to("IBuilderConfig.int8_calibrator"), lib.IInt8EntropyCalibrator2)


@every
def test_what_ends_with_10_16_is_refused_after(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lib = Bench(version, monkeypatch).lib
    if version in IMPLICIT:
        assert build(lib, b"onnx", "int8", Options(), Calibration(CACHE)).plan == b"plan"
        return
    with pytest.raises(UsageError, match=r"has no implicit INT8\n.*ended with TensorRT 10\.16\nquantize explicitly"):
        build(lib, b"onnx", "int8", Options(), Calibration(CACHE))
    assert not lib.called("Builder.__init__")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_calibration_is_for_int8(precision: str) -> None:
    with pytest.raises(UsageError, match=f"calibration is for INT8, not {precision.upper()}"):
        build(fake("10.3.0"), b"onnx", precision, Options(), Calibration(CACHE))


@pytest.mark.parametrize("text", ["", "input: 3caa1d13\n", "TRT-8502-EntropyCalibration2\ninput: xyz\n"])
def test_a_cache_that_is_none(text: str, bench: Bench) -> None:
    with pytest.raises(InputError, match="calibration cache"):
        build(bench.lib, b"onnx", "int8", Options(), Calibration(text))
    assert not bench.lib.called("Builder.build_serialized_network")


@implicit
def test_a_cache_that_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lib = Bench(version, monkeypatch).lib

    def build_all_the_same(builder: Any, network: Any, config: Any) -> Any:
        config.int8_calibrator.read_calibration_cache()
        assert config.int8_calibrator.get_batch(["input"]) is None
        return lib.make("IHostMemory")

    lib.script["Builder.build_serialized_network"] = build_all_the_same
    with pytest.raises(BuildError, match="refused the calibration cache"):
        build(lib, b"onnx", "int8", Options(), Calibration(CACHE))


def test_a_cache_that_is_refused_by_a_build_that_fails(bench: Bench) -> None:
    def fail(builder: Any, network: Any, config: Any) -> None:
        config.int8_calibrator.get_batch(["input"])
        bench.lib.say("ERROR", "Calibration failure occurred with no scaling factors detected.")

    bench.lib.script["Builder.build_serialized_network"] = fail
    with pytest.raises(BuildError, match=r"built no engine\n.*\nlikely a calibration cache of another graph"):
        build(bench.lib, b"onnx", "int8", Options(), Calibration(CACHE))


@implicit
@pytest.mark.parametrize("calibration", [Calibration(CACHE), Calibration(batches=images(8))], ids=["cache", "images"])
def test_a_graph_that_is_quantized_already(
    version: str, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    lib = Bench(version, monkeypatch).lib
    lib.script["Builder.build_serialized_network"] = lambda *_: lib.make("IHostMemory")  # looks at no calibrator
    with pytest.raises(
        BuildError, match=r"(did not read the calibration cache|asked for no calibration images)\n.*Q/DQ"
    ):
        build(lib, b"onnx", "int8", Options(), calibration)


@implicit
def test_tensors_without_a_scale_are_counted(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(version, monkeypatch)
    lib = bench.lib

    def warn(builder: Any, network: Any, config: Any) -> Any:
        config.int8_calibrator.read_calibration_cache()
        for name in ("fc", "fc", "(Unnamed Layer* 64) [Shuffle]_output"):
            lib.say("WARNING", UNSCALED.format(name))
        return lib.make("IHostMemory")

    lib.script["Builder.build_serialized_network"] = warn
    built = build(lib, b"onnx", "int8", Options(), Calibration(CACHE))
    note = "2 tensors have no scale, and layers there are not INT8: fc, (Unnamed Layer* 64) [Shuffle]_output"
    assert built.notes == bench.said == [note]


def test_many_tensors_without_a_scale_are_named_in_part(bench: Bench) -> None:
    def warn(builder: Any, network: Any, config: Any) -> Any:
        config.int8_calibrator.read_calibration_cache()
        for i in range(13):
            bench.lib.say("WARNING", UNSCALED.format(f"t{i}"))
        return bench.lib.make("IHostMemory")

    bench.lib.script["Builder.build_serialized_network"] = warn
    [note] = build(bench.lib, b"onnx", "int8", Options(), Calibration(CACHE)).notes
    assert note.startswith("13 tensors have no scale")
    assert note.endswith("t8, t9 and 3 more")


# images


@implicit
@algorithms
def test_images_go_to_the_device_batch_by_batch(version: str, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(version, monkeypatch)
    calibration = Calibration(batches=images(3, 5, 4), batch_size=4, algorithm=algorithm)
    built = build(bench.lib, b"onnx", "int8", Options(), calibration)
    assert bench.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert built.plan == b"plan"
    assert built.notes == bench.said == []
    assert bench.opened == ["tensorrt"]
    assert bench.device.closed
    assert not bench.device.memory
    assert isinstance(bench.lib.set_to("IBuilderConfig.int8_calibrator"), getattr(bench.lib, ALGORITHMS[algorithm][0]))
    name = header(bench.lib, ALGORITHMS[algorithm][1])
    assert built.calibration_cache == f"{name}\ninput: 3c000000\n".encode()  # what the fake writes


@implicit
def test_dynamic_batch_gets_a_profile_for_calibration(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lib = Bench(version, monkeypatch).lib
    for calibration, batch in ((Calibration(batches=images(5), batch_size=5), 5), (Calibration(CACHE), 4)):
        lib.calls.clear()
        build(lib, b"onnx", "int8", Options(profile=(1, 4, 8)), calibration)
        shapes = [[shape[0] for shape in args[1:]] for args in lib.called("IOptimizationProfile.set_shape")]
        assert shapes == [[1, 4, 8], [batch] * 3]
        assert len(lib.called("IBuilderConfig.set_calibration_profile")) == 1
        assert lib.set_to("IBuilderConfig.int8_calibrator").get_batch_size() == batch


@implicit
@pytest.mark.parametrize("profile", [(4, 4, 4), (1, 8, 32)])
def test_a_network_of_fixed_batch_calibrates_with_it(
    version: str, profile: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(version, monkeypatch)
    if profile != (4, 4, 4):
        bench.lib.script["ITensor.shape"] = (4, *SIZE)
    build(bench.lib, b"onnx", "int8", Options(profile=profile), Calibration(batches=images(8), batch_size=3))
    assert bench.batches == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert not bench.lib.called("IBuilderConfig.set_calibration_profile")
    assert bench.lib.set_to("IBuilderConfig.int8_calibrator").get_batch_size() == 4


@implicit
def test_a_profile_that_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(version, monkeypatch)
    bench.lib.script["IBuilderConfig.set_calibration_profile"] = lambda *_: bool(bench.lib.say("ERROR", "not valid"))
    with pytest.raises(BuildError, match="does not calibrate with batches of 8\nnot valid"):
        build(bench.lib, b"onnx", "int8", Options(), Calibration(batches=images(8)))
    assert bench.device.closed


@implicit
def test_images_that_fill_no_batch_are_told(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(version, monkeypatch)
    built = build(bench.lib, b"onnx", "int8", Options(), Calibration(batches=images(8, 8, 3), batch_size=8))
    assert bench.batches == [[*range(8)], [*range(8, 16)]]
    assert built.notes == bench.said == ["3 calibration images were left out: they fill no batch of 8"]


@pytest.mark.parametrize("sizes", [(), (3,), (0,)])
def test_fewer_images_than_one_batch(sizes: tuple[int, ...], bench: Bench) -> None:
    def careless(builder: Any, network: Any, config: Any) -> Any:
        assert config.int8_calibrator.get_batch(["input"]) is None
        return bench.lib.make("IHostMemory")

    bench.lib.script["Builder.build_serialized_network"] = careless
    with pytest.raises(InputError, match=f"{sum(sizes)} calibration images fill no batch of 8"):
        build(bench.lib, b"onnx", "int8", Options(), Calibration(batches=images(*sizes)))


@implicit
@pytest.mark.parametrize("taken", [1, 2])
def test_batches_that_were_not_asked_for(version: str, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(version, monkeypatch)
    left = iter(range(taken - 1, -1, -1))
    bench.lib.script["batch"] = lambda addresses: bool(next(left))
    with pytest.raises(BuildError, match=f"took {taken} calibration batches of 4, and there are more"):
        build(bench.lib, b"onnx", "int8", Options(), Calibration(batches=images(4, 4, 4), batch_size=4))


def unreadable() -> Iterator[np.ndarray]:
    yield np.zeros((8, *SIZE), np.float32)
    raise InputError("cat.jpg cannot be read")


@implicit
@pytest.mark.parametrize("built", [True, False])
def test_what_goes_wrong_with_images_comes_out_after_the_build(
    version: str, built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(version, monkeypatch)

    def go_on(builder: Any, network: Any, config: Any) -> Any:
        served = [config.int8_calibrator.get_batch(["input"]) for _ in range(4)]
        assert served == [[4096], None, None, None]
        return bench.lib.make("IHostMemory") if built else bench.lib.say("ERROR", "out of memory")

    bench.lib.script["Builder.build_serialized_network"] = go_on
    with pytest.raises(InputError, match=r"^cat\.jpg cannot be read$"):
        build(bench.lib, b"onnx", "int8", Options(), Calibration(batches=unreadable))
    assert len(bench.lib.called("Builder.build_serialized_network")) == 1
    assert bench.device.closed


@pytest.mark.parametrize("version", [v for v in IMPLICIT if v != "8.6.1"])
def test_a_build_with_bad_images_is_not_finished(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, steps = Bench(version, monkeypatch), []

    def slow(builder: Any, network: Any, config: Any) -> None:
        while config.int8_calibrator.get_batch(["input"]):
            pass
        config.progress_monitor.phase_start("Building", None, 1_000)
        pause = threading.Event()
        while len(steps) < 1_000 and config.progress_monitor.step_complete("Building", 0):
            steps.append(True)
            pause.wait(0.01)

    bench.lib.script["Builder.build_serialized_network"] = slow
    with pytest.raises(InputError, match=r"cat\.jpg"):
        build(bench.lib, b"onnx", "int8", Options(), Calibration(batches=unreadable))
    assert len(steps) < 1_000


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (np.zeros((2, 3, 32, 32), np.float32), r"float32 of \(3, 32, 32\)"),
        (np.zeros((2, *SIZE), np.uint8), r"uint8 of \(3, 64, 64\)"),
    ],
)
def test_images_of_another_kind(batch: np.ndarray, found: str, bench: Bench) -> None:
    with pytest.raises(
        InputError, match=rf"calibration images are {found}\nthe network takes float32 of \(3, 64, 64\)"
    ):
        build(bench.lib, b"onnx", "int8", Options(), Calibration(batches=lambda: iter([batch])))


def test_a_copy_that_fails_ends_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def go_on(builder: Any, network: Any, config: Any) -> None:
        assert [config.int8_calibrator.get_batch(["input"]) for _ in range(3)] == [None] * 3

    monkeypatch.setattr(Device, "fails", 1)
    bench.lib.script["Builder.build_serialized_network"] = go_on
    with pytest.raises(BuildError, match=r"^cudaMemcpyAsync failed$"):
        build(bench.lib, b"onnx", "int8", Options(), Calibration(batches=images(8, 8, 8)))


@implicit
def test_input_that_is_not_fp32(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(version, monkeypatch)
    bench.lib.script["ITensor.dtype"] = bench.lib.DataType.HALF
    with pytest.raises(UsageError, match="calibration needs a graph with FP32 input\nmake it with --io fp32"):
        build(bench.lib, b"onnx", "int8", Options(), Calibration(batches=images(8)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a cache or images"),
        ({"cache": CACHE, "batches": images(1)}, "either a cache or images"),
        ({"cache": CACHE, "batch_size": 0}, "calibration batch size is 0"),
        ({"cache": CACHE, "algorithm": "entropie"}, "did you mean 'entropy'"),
    ],
)
def test_calibration_without_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Calibration(**arguments)


# memory


@implicit
@algorithms
def test_less_memory_does_not_calibrate_twice(version: str, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(version, monkeypatch)
    left, calls = ["out of memory", "out of memory"], []

    def short(builder: Any, network: Any, config: Any) -> Any:
        calls.append(config.int8_calibrator)
        assert calibrate(bench.lib, config.int8_calibrator)
        return bench.lib.say("ERROR", left.pop()) if left else bench.lib.make("IHostMemory")

    bench.lib.script["Builder.build_serialized_network"] = short
    calibration = Calibration(batches=images(4, 4, 1), batch_size=4, algorithm=algorithm)
    built = build(bench.lib, b"onnx", "int8", Options(), calibration)
    assert bench.batches == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len({id(c) for c in calls}) == 3
    assert built.calibration_cache == f"{header(bench.lib, ALGORITHMS[algorithm][1])}\ninput: 3c000000\n".encode()
    assert built.notes == bench.said
    assert [note.partition(":")[0] for note in built.notes] == [
        "1 calibration images were left out",
        "memory ran short",
        "memory ran short",
    ]
    assert bench.opened == ["tensorrt"]


def test_memory_that_runs_short_before_calibration_is_done(bench: Bench) -> None:
    attempts: list[int] = []

    def short(builder: Any, network: Any, config: Any) -> Any:
        attempts.append(1)
        if len(attempts) == 1:
            config.int8_calibrator.get_batch(["input"])
            return bench.lib.say("ERROR", "out of memory")
        assert calibrate(bench.lib, config.int8_calibrator)
        return bench.lib.make("IHostMemory")

    bench.lib.script["Builder.build_serialized_network"] = short
    built = build(bench.lib, b"onnx", "int8", Options(), Calibration(batches=images(8)))
    assert built.plan == b"plan"
    assert bench.batches == [[*range(8)]]  # from the start again
    assert bench.opened == ["tensorrt"] * 2


def test_what_was_calibrated_in_part_is_not_used_again(bench: Bench) -> None:
    left = ["out of memory"]

    def short(builder: Any, network: Any, config: Any) -> Any:
        config.int8_calibrator.get_batch(["input"])
        config.int8_calibrator.write_calibration_cache(memoryview(b"of one batch"))
        return bench.lib.say("ERROR", left.pop()) if left else bench.lib.make("IHostMemory")

    bench.lib.script["Builder.build_serialized_network"] = short
    with pytest.raises(BuildError, match="took 1 calibration batches of 8, and there are more"):
        build(bench.lib, b"onnx", "int8", Options(), Calibration(batches=images(8, 8)))


def test_one_attempt_keeps_what_it_calibrated(bench: Bench) -> None:
    def short(builder: Any, network: Any, config: Any) -> None:
        calibrate(bench.lib, config.int8_calibrator)
        bench.lib.say("ERROR", "out of memory")

    bench.lib.script["Builder.build_serialized_network"] = short
    with pytest.raises(OutOfMemory) as caught:
        build_plan(bench.lib, b"onnx", "int8", Options(), Calibration(batches=images(8)))
    assert caught.value.calibrated == b"TRT-100300-EntropyCalibration2\ninput: 3c000000\n"


# progress and Ctrl-C


@implicit
def test_the_batch_that_is_calibrated_is_shown(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, shown, texts = Bench(version, monkeypatch), threading.Event(), []

    @contextmanager
    def busy(what: str) -> Iterator[Callable[[str], None]]:
        yield lambda text: (texts.append(text), shown.set() if "batch 2" in text else None)

    def look(addresses: list[int]) -> None:
        bench.look(addresses)
        assert len(bench.batches) < 2 or shown.wait(10)

    bench.lib.script["batch"] = look
    monkeypatch.setattr(builder, "busy", busy)
    build(bench.lib, b"onnx", "int8", Options(), Calibration(batches=images(8, 8)))
    assert "build calibration batch 2, 0 s" in texts


@implicit
def test_ctrl_c_ends_calibration(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, waiting, ended = Bench(version, monkeypatch), threading.Event(), []

    @contextmanager
    def busy(what: str) -> Iterator[Callable[[str], None]]:
        yield lambda text: waiting.set()

    def endless() -> Iterator[np.ndarray]:
        pause = threading.Event()
        for _ in range(1_000):
            yield np.zeros((8, *SIZE), np.float32)
            pause.wait(0.01)

    def slow(builder: Any, network: Any, config: Any) -> None:
        waiting.wait(10)
        _thread.interrupt_main()
        served = 0
        while config.int8_calibrator.get_batch(["input"]):
            served += 1
        ended.append(served)

    monkeypatch.setattr(builder, "busy", busy)
    bench.lib.script["Builder.build_serialized_network"] = slow
    with pytest.raises(KeyboardInterrupt):
        build(bench.lib, b"onnx", "int8", Options(), Calibration(batches=endless))
    assert ended[0] < 1_000
    assert bench.device.closed
