"""TensorRT and TensorRT-RTX on a real GPU: ``pytest -m gpu``. Elsewhere every test says why it is skipped."""

from __future__ import annotations

import importlib.util
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import tiny_resnet

from edgeres import graph, trt
from edgeres.calibrate import calibrate
from edgeres.errors import BuildError, EdgeresError
from edgeres.export import export_onnx
from edgeres.fidelity import decibels, squares
from edgeres.fp16 import fp16
from edgeres.fusion import audit
from edgeres.loader import Batch
from edgeres.model import resnet50
from edgeres.quantize import SCHEMES, int8
from edgeres.recipe import Preprocess
from edgeres.runners import calls
from edgeres.runners.calls import PARTS
from edgeres.runners.cuda import Cuda, CudaPython, PyCuda, open_cuda
from edgeres.runners.tensorrt import TensorRt, TensorRtRunner

pytestmark = pytest.mark.gpu

SIZES = {"tiny": 32, "resnet50": 224}
LARGEST = 8
GRAPHS = pytest.mark.skipif(importlib.util.find_spec("cuda") is None, reason="CUDA graphs need cuda-python")


def pixels(net: str, images: int, seed: int = 0) -> np.ndarray:
    """Smooth images: noise of few pixels, enlarged, as INT8 ranges and sums of noise would say little."""
    coarse = np.random.default_rng(seed).standard_normal((images, 3, 8, 8), np.float32)
    return np.ascontiguousarray(coarse.repeat(SIZES[net] // 8, 2).repeat(SIZES[net] // 8, 3))


def model(net: str) -> torch.nn.Module:
    """The tiny net, or a ResNet-50 whose batch norm statistics are those of such images.

    Branches count little beside the shortcut, as they do in a trained network: else rounding would grow from block to
    block, and no two executors would agree in INT8.
    """
    if net == "tiny":
        return tiny_resnet()
    torch.manual_seed(0)
    made = resnet50(classes=100).train()
    for name, module in made.named_modules():
        if name.endswith("bn3"):
            torch.nn.init.constant_(module.weight, 0.1)
    with torch.no_grad():
        for seed in range(10):
            made(torch.from_numpy(pixels(net, 8, 100 + seed)))
    return made.eval()


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(net, precision) -> its ONNX file, as `edgeres export` and `edgeres quantize` type it."""
    folder, made = tmp_path_factory.mktemp("onnx"), dict[str, Any]()

    def path(net: str, precision: str) -> Path:
        if net not in made:
            crop = SIZES[net]
            made[net] = fp32 = export_onnx(model(net), Preprocess(crop=crop, resize=crop), {})
            batches = [Batch(pixels(net, 8, seed), None, np.arange(8)) for seed in range(4)]
            table = calibrate(fp32, batches, {"model": graph.digest(fp32)})
            quantized = int8(fp32, table, SCHEMES["tensorrt"], "minmax")
            for name, proto in {"fp32": fp32, "fp16": fp16(fp32), "int8": quantized}.items():
                graph.save(proto, folder / f"{net}-{name}.onnx")
        return folder / f"{net}-{precision}.onnx"

    return path


@dataclass
class Gpu:
    """A library that runs here, and plans that it built."""

    executor: str
    folder: Path
    typed: Callable[[str, str], Path]

    def plan(self, net: str, precision: str) -> Path:
        path = self.folder / f"{net}-{precision}.plan"
        if not path.exists():
            options = trt.Options(profile=(1, 4, LARGEST))
            library, onnx = trt.load_library(self.executor), self.typed(net, precision).read_bytes()
            path.write_bytes(trt.build_plan(library, onnx, precision, options).plan)
        return path

    def open(self, net: str, precision: str, **settings: Any) -> TensorRtRunner:
        return TensorRtRunner(self.plan(net, precision), self.executor, **settings)

    def expected(self, net: str, precision: str, images: np.ndarray) -> np.ndarray:
        """What ONNX Runtime computes, Q/DQ in FP32 as they are written: its INT8 kernels are not exact on every CPU."""
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        path = self.typed(net, precision)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return np.asarray(session.run([graph.OUTPUT], {graph.INPUT: images})[0])


@pytest.fixture(scope="module", params=trt.EXECUTORS)
def gpu(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, typed: Callable[[str, str], Path]
) -> Gpu:
    executor = request.param
    try:
        library = trt.load_library(executor)
        open_cuda(trt.EXECUTORS[executor][1]).close()
    except EdgeresError as error:
        pytest.skip(str(error))
    found = Gpu(executor, tmp_path_factory.mktemp(executor), typed)
    if hasattr(library.Runtime, "get_engine_validity"):  # TensorRT-RTX knows fewer GPUs, and says so
        plan = found.plan("tiny", "fp32").read_bytes()
        validity, why = library.Runtime(trt.logger(library)).get_engine_validity(plan)
        if validity == library.EngineValidity.INVALID:  # it may run all the same
            try:
                with found.open("tiny", "fp32") as runner:
                    runner.infer(pixels("tiny", 1))
            except EdgeresError as error:
                pytest.skip(f"{executor} does not run on this GPU: diagnostics {why}; {error}")
    return found


def quality(expected: np.ndarray, found: np.ndarray) -> float:
    """Signal to noise in dB."""
    return decibels(*squares(expected, found))


@pytest.mark.parametrize("net", SIZES)
@pytest.mark.parametrize(("precision", "least"), [("fp32", 80), ("fp16", 50)])
def test_fp32_and_fp16_are_what_onnx_runtime_computes_in_fp32(gpu: Gpu, net: str, precision: str, least: float) -> None:
    images = pixels(net, 2 * LARGEST + 3, 50)
    with gpu.open(net, precision) as runner:
        found = runner.infer(images)
    expected = gpu.expected(net, "fp32", images)
    assert (found.shape, found.dtype) == (expected.shape, np.float32)
    assert quality(expected, found) > least


@pytest.mark.parametrize("net", SIZES)
def test_int8_is_what_onnx_runtime_computes_in_int8(gpu: Gpu, net: str) -> None:
    images = pixels(net, 4 * LARGEST, 50)
    with gpu.open(net, "int8") as runner:
        found = runner.infer(images)
    expected = gpu.expected(net, "int8", images)
    common = expected.mean(0)  # what random weights answer to every image
    found, expected, single = (values - common for values in (found, expected, gpu.expected(net, "fp32", images)))
    assert len({*expected.argmax(1)}) > 2
    # they differ where a sum lies between two steps, so both are held against FP32: 3 dB is half again the noise
    assert quality(single, found) > quality(single, expected) - 3
    assert quality(expected, found) > quality(single, expected) - 3


@pytest.mark.parametrize("images", [1, LARGEST - 1, LARGEST, LARGEST + 1, 5 * LARGEST + 2])
def test_pieces_make_the_same_logits(gpu: Gpu, images: int) -> None:
    inputs = pixels("tiny", images, 60)
    with gpu.open("tiny", "fp32") as runner:
        one_by_one = np.concatenate([runner.infer(image[None]) for image in inputs])
        for _ in range(3):
            assert quality(one_by_one, runner.infer(inputs)) > 80


@pytest.mark.parametrize("package", [PyCuda, CudaPython])
def test_both_cuda_packages_do_the_same(gpu: Gpu, package: type[Cuda], monkeypatch: pytest.MonkeyPatch) -> None:
    images = pixels("tiny", 3 * LARGEST)
    with gpu.open("tiny", "fp32") as runner:
        expected = runner.infer(images)
    try:
        package().close()
    except ImportError as error:
        pytest.skip(str(error))
    monkeypatch.setattr("edgeres.runners.tensorrt.open_cuda", lambda extra, graphs: package())
    with gpu.open("tiny", "fp32") as runner:
        assert isinstance(runner._cuda, package)
        np.testing.assert_array_equal(runner.infer(images), expected)


@GRAPHS
@pytest.mark.parametrize("net", SIZES)
def test_a_cuda_graph_gives_what_plain_calls_give(gpu: Gpu, net: str) -> None:
    batches = [pixels(net, images, images) for images in (4, 4, 2, 2, 2, 3 * LARGEST, 3 * LARGEST, 3 * LARGEST)]
    with gpu.open(net, "fp32") as plain, gpu.open(net, "fp32", cuda_graph=True) as graphed:
        captured = 0
        for images in batches:
            np.testing.assert_array_equal(graphed.infer(images), plain.infer(images))
            captured += any(slot.graph is not None for slot in graphed._slots)
    assert captured > 0


def test_threads_share_a_runner_and_have_their_own(gpu: Gpu) -> None:
    with gpu.open("tiny", "fp32") as shared:
        inputs = [pixels("tiny", LARGEST + k, 70 + k) for k in range(4)]
        expected = [shared.infer(images) for images in inputs]
        wrong: list[str] = []

        def work(k: int) -> None:
            try:
                with gpu.open("tiny", "fp32") as own:
                    for _ in range(20):
                        for runner in (shared, own):
                            if quality(expected[k], runner.infer(inputs[k])) < 80:
                                wrong.append(f"thread {k}")
            except EdgeresError as error:
                wrong.append(str(error))

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_whatever_was_done_closing_gives_all_memory_back(gpu: Gpu) -> None:
    def cycle() -> None:
        with gpu.open("resnet50", "fp32") as runner:
            runner.infer(pixels("resnet50", 2))
            runner.profile(pixels("resnet50", 2), runs=2)
            runner.inspect()

    def free() -> int:
        cuda = open_cuda(trt.EXECUTORS[gpu.executor][1])
        with cuda.current():
            return cuda.free_bytes()

    for _ in range(2):  # what is loaded once for the process
        cycle()
    before = free()
    for _ in range(4):  # TensorRT-RTX compiles for seconds in each
        cycle()
    assert before - free() < 16 << 20  # a single engine left behind holds 100 MB of weights


def test_the_parts_of_a_call_add_up_to_the_whole(gpu: Gpu) -> None:
    images = pixels("resnet50", LARGEST)
    locked = np.empty_like(images)
    with gpu.open("resnet50", "fp32") as runner:
        for _ in range(10):
            runner.infer(images)
        whole, parts, staging = list[float](), list[float](), list[float]()
        for _ in range(50):
            start = time.perf_counter()
            runner.infer(images)
            whole.append(1e3 * (time.perf_counter() - start))
            split = runner.split(images)
            assert tuple(split) == (*PARTS, "enqueue")
            assert min(split.values()) > 0
            parts.append(sum(split[part] for part in PARTS))
            start = time.perf_counter()
            locked[:] = images  # what the host does first, before the device has anything to do
            staging.append(1e3 * (time.perf_counter() - start))
    on_device = statistics.median(whole) - statistics.median(staging)
    assert statistics.median(parts) == pytest.approx(on_device, rel=0.2)


@dataclass
class Repeated:
    """What calls back to back took each: of the wall clock, of this thread's processor time, of the GPU; in ms."""

    wall: float
    cpu: float
    parts: dict[str, float]


def repeated(runner: TensorRtRunner, images: np.ndarray, transfers: bool = True, spin: bool = False) -> Repeated:
    splits, clocks, count = list[dict[str, float]](), list[tuple[float, float]](), 200

    def go_on(split: dict[str, float]) -> bool:
        splits.append(split)
        clocks.append((time.perf_counter(), time.thread_time()))
        return len(splits) < count

    runner.repeat(images, go_on, transfers, spin)
    (wall, cpu), (wall_end, cpu_end) = clocks[count // 4], clocks[-1]  # the first quarter warms up
    measured, ms = splits[count // 4 + 1 :], 1e3 / (count - 1 - count // 4)
    parts = {part: statistics.median(split[part] for split in measured) for part in splits[0]}
    return Repeated((wall_end - wall) * ms, (cpu_end - cpu) * ms, parts)


@pytest.mark.parametrize("graph", [False, pytest.param(True, marks=GRAPHS)])
def test_two_calls_under_way_take_no_longer_than_one(gpu: Gpu, graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pixels("resnet50", LARGEST)
    with gpu.open("resnet50", "fp32", cuda_graph=graph) as runner:
        expected = runner.infer(images)
        monkeypatch.setattr(calls, "UNDER_WAY", 1)
        one = repeated(runner, images)
        monkeypatch.setattr(calls, "UNDER_WAY", 2)
        two, bare = repeated(runner, images), repeated(runner, images, transfers=False)
        np.testing.assert_array_equal(runner.infer(images), expected)
        alone = statistics.median(runner.split(images)["compute"] for _ in range(20))
    assert two.wall < 1.02 * one.wall  # and less by what copies and the host take
    assert two.wall < 1.1 * max(two.parts[part] for part in PARTS)  # all but the longest part is hidden
    assert bare.wall < 1.05 * bare.parts["compute"]
    for each in (one, two, bare):
        assert each.parts["compute"] == pytest.approx(alone, rel=0.2)
    assert min(two.parts.values()) > 0
    assert (bare.parts["copy_in"], bare.parts["copy_out"]) == (0, 0)
    assert one.parts["copy_in"] == pytest.approx(two.parts["copy_in"], rel=0.5)


@pytest.mark.parametrize("package", [PyCuda, CudaPython])
def test_a_thread_that_sleeps_until_a_call_is_done_takes_less_than_one_that_spins(
    gpu: Gpu, package: type[Cuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        package().close()
    except ImportError as error:
        pytest.skip(str(error))
    monkeypatch.setattr("edgeres.runners.tensorrt.open_cuda", lambda extra, graphs: package())
    images = pixels("resnet50", LARGEST)
    with gpu.open("resnet50", "fp32") as runner:
        spins, sleeps = (repeated(runner, images, spin=spin) for spin in (True, False))
    assert spins.cpu > 0.8 * spins.wall
    assert sleeps.cpu < 0.8 * spins.cpu
    assert sleeps.wall < 1.2 * spins.wall


def test_layers_add_up_to_about_the_computation(gpu: Gpu) -> None:
    images = pixels("resnet50", LARGEST)
    with gpu.open("resnet50", "fp32") as runner:
        for _ in range(10):
            runner.infer(images)
        times = runner.profile(images)
        computed = statistics.median(runner.split(images)["compute"] for _ in range(20))
    assert len(times) > 10
    assert min(times.values()) >= 0
    # each layer is waited for: in all it takes longer, by some microseconds a layer
    assert 0.7 * computed < sum(times.values()) < 2 * computed + 0.02 * len(times)


@GRAPHS
def test_a_profile_leaves_results_and_speed_as_they_were(gpu: Gpu) -> None:
    images = pixels("resnet50", LARGEST)

    def compute(runner: TensorRtRunner) -> float:
        return statistics.median(runner.split(images)["compute"] for _ in range(20))

    with gpu.open("resnet50", "fp32", cuda_graph=True) as runner:
        for _ in range(3):
            expected = runner.infer(images)
        before = compute(runner)
        runner.profile(images, runs=5)
        for _ in range(3):
            np.testing.assert_array_equal(runner.infer(images), expected)
        assert any(slot.graph is not None for slot in runner._slots)
        assert compute(runner) < 1.5 * before


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_examination_tells_types_and_times(gpu: Gpu, precision: str) -> None:
    layers, times = TensorRt(gpu.executor).examine(gpu.plan("resnet50", precision))
    found = audit(layers, precision, times, convolutions=53, residuals=16)
    assert found.total_ms is not None
    assert found.total_ms > 0
    timed = [layer for layer in found.layers if layer.type and layer.ms]
    assert sum(layer.ms or 0 for layer in timed) > 0.9 * found.total_ms  # names in both are the same
    assert found.by_name < 0.2 * len(found.layers)
    if gpu.executor == "tensorrt":
        assert found.convolutions == 53
        assert found.other == {}  # each reads the precision that was asked for
        assert found.adds_fused + len(found.adds_own) == 16
    assert TensorRt(gpu.executor).audit(gpu.plan("resnet50", precision), precision).operators


def test_a_dla_core_is_refused_where_there_is_none(gpu: Gpu) -> None:
    library = trt.load_library(gpu.executor)
    cores = library.Runtime(trt.logger(library)).num_DLA_cores
    with pytest.raises(BuildError, match=f"there is no DLA core {cores}"):
        gpu.open("tiny", "fp32", dla_core=cores)


def test_a_damaged_plan_is_refused_with_what_tensorrt_says(gpu: Gpu, tmp_path: Path) -> None:
    plan = gpu.plan("tiny", "fp32").read_bytes()
    damaged = tmp_path / "damaged.plan"
    damaged.write_bytes(b"\0" * 64 + plan[64:])
    with pytest.raises(BuildError, match="TensorRT could not load") as error:
        TensorRtRunner(damaged, gpu.executor)
    assert error.value.evidence
