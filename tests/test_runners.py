from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, tiny_resnet

from edgeres import graph
from edgeres.errors import BuildError, InputError, UsageError
from edgeres.export import export_onnx
from edgeres.loader import normalizer
from edgeres.machine import cores
from edgeres.recipe import Preprocess
from edgeres.runners import Runner, open_runner
from edgeres.runners.onnxruntime import OnnxRuntimeRunner
from edgeres.runners.openvino import OpenVinoRunner

CPU = ["onnxruntime", "openvino"]
PIXELS = np.random.default_rng(0).standard_normal((9, 3, 32, 32), dtype=np.float32)


@pytest.fixture(scope="module")
def fixed_path(tmp_path_factory: pytest.TempPathFactory, preprocess: Preprocess) -> Path:
    """`tiny_path` for batches of exactly 4."""
    path = tmp_path_factory.mktemp("fixed") / "fixed.onnx"
    graph.save(export_onnx(tiny_resnet(), preprocess, {}, batch=4), path)
    return path


@pytest.fixture(scope="module")
def expected(tiny_path: Path) -> np.ndarray:
    """Logits of `PIXELS`, one image at a time."""
    with open_runner(tiny_path, "onnxruntime") as runner:
        return np.concatenate([runner.infer(image[None]) for image in PIXELS])


class Recorder(Runner):
    """Keeps what reaches the executor, and answers with the sum of each image."""

    def __init__(self, batch: int | None) -> None:
        self.batch, self.input_size, self.calls = batch, 2, list[np.ndarray]()

    def _run(self, pixels: np.ndarray) -> np.ndarray:
        self.calls.append(pixels)
        return pixels.sum((1, 2, 3), keepdims=True)[:, :, 0, 0]

    def close(self) -> None:
        self.batch = 0


def test_a_runner_knows_its_batch_and_input_size(tiny_path: Path, fixed_path: Path) -> None:
    with open_runner(tiny_path, "onnxruntime") as dynamic, open_runner(fixed_path, "onnxruntime") as fixed:
        assert (dynamic.batch, dynamic.input_size) == (None, 32)
        assert (fixed.batch, fixed.input_size) == (4, 32)


@pytest.mark.parametrize("images", [1, 2, 4, 7, 9])
@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_any_number_of_images_gives_the_same_logits(
    tiny_path: Path, fixed_path: Path, expected: np.ndarray, kind: str, images: int
) -> None:
    with open_runner(tiny_path if kind == "dynamic" else fixed_path, "onnxruntime") as runner:
        logits = runner.infer(PIXELS[:images])
    assert (logits.dtype, logits.shape) == (np.float32, (images, CLASSES))
    np.testing.assert_allclose(logits, expected[:images], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("images", "calls"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_a_fixed_batch_is_split_and_the_last_piece_padded_with_zeros(images: int, calls: int) -> None:
    runner = Recorder(4)
    pixels = np.arange(images * 12, dtype=np.float32).reshape(images, 3, 2, 2) + 1
    np.testing.assert_array_equal(runner.infer(pixels)[:, 0], pixels.sum((1, 2, 3)))
    assert [c.shape for c in runner.calls] == [(4, 3, 2, 2)] * calls
    sent = np.concatenate(runner.calls)
    np.testing.assert_array_equal(sent[:images], pixels)
    assert not sent[images:].any()
    assert sent.dtype == np.float32


def test_a_dynamic_batch_goes_through_in_one_call() -> None:
    runner = Recorder(None)
    pixels = np.ones((7, 3, 2, 2), np.float32)
    runner.infer(pixels)
    assert [c.shape for c in runner.calls] == [(7, 3, 2, 2)]


@pytest.mark.parametrize(
    "shape", [(3, 32, 32), (1, 3, 16, 16), (1, 1, 32, 32), (1, 32, 32, 3), (1, 3, 32, 31), (0, 3, 32, 32)]
)
@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_another_shape_is_refused_with_both(
    tiny_path: Path, fixed_path: Path, kind: str, shape: tuple[int, ...]
) -> None:
    with open_runner(tiny_path if kind == "dynamic" else fixed_path, "onnxruntime") as runner:
        with pytest.raises(UsageError, match=r"takes images of \(N, 3, 32, 32\)") as caught:
            runner.infer(np.zeros(shape, np.float32))
        assert caught.value.evidence == f"got {shape}"


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_the_result_is_the_callers(tiny_path: Path, fixed_path: Path, kind: str) -> None:
    with open_runner(tiny_path if kind == "dynamic" else fixed_path, "onnxruntime") as runner:
        first = runner.infer(PIXELS[:4])
        kept = first.copy()
        second = runner.infer(-PIXELS[:4])
        np.testing.assert_array_equal(first, kept)  # not overwritten by a later call
        second[:] = 0  # nor does the caller disturb the runner
        np.testing.assert_array_equal(runner.infer(PIXELS[:4]), kept)
        assert not (kept == 0).any()
    np.testing.assert_array_equal(first, kept)


def test_the_pixels_are_not_modified(fixed_path: Path) -> None:
    pixels = PIXELS.copy()
    pixels.flags.writeable = False
    with open_runner(fixed_path, "onnxruntime") as runner:
        runner.infer(pixels)
    np.testing.assert_array_equal(pixels, PIXELS)


def test_a_runner_closes_twice(tiny_path: Path) -> None:
    runner = OnnxRuntimeRunner(tiny_path)
    runner.close()
    runner.close()
    with pytest.raises(AttributeError):
        runner.infer(PIXELS)


def test_a_block_closes_its_runner_even_after_an_error() -> None:
    runner = Recorder(4)

    def fail() -> None:
        with runner:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert runner.batch == 0


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_a_corrupt_file_is_a_build_error_that_names_it(tiny_path: Path, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "engine.onnx"
    path.write_bytes(tiny_path.read_bytes()[:20_000] if content is None else content)
    with pytest.raises(BuildError, match=r"cannot load .*engine\.onnx") as caught:
        open_runner(path, "onnxruntime")
    assert caught.value.evidence


def test_a_missing_file_is_a_build_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"cannot load .*none\.onnx"):
        open_runner(tmp_path / "none.onnx", "onnxruntime")


@pytest.mark.parametrize("name", CPU)
def test_any_number_of_threads_computes_the_same_digits(tiny_path: Path, fixed_path: Path, name: str) -> None:
    for path in (tiny_path, fixed_path):
        with open_runner(path, name) as runner:
            expected = runner.infer(PIXELS)
        for threads in (1, 2, 3):
            with open_runner(path, name, threads) as runner:
                np.testing.assert_array_equal(runner.infer(PIXELS), expected)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_to_compute_with_are_refused(tiny_path: Path, name: str, threads: int) -> None:
    with pytest.raises(UsageError, match=f"{threads} threads to compute with"):
        open_runner(tiny_path, name, threads=threads)


def test_onnxruntime_gets_its_number_of_threads(tiny_path: Path) -> None:
    for asked, given in ((None, 0), (1, 1), (3, 3)):
        with open_runner(tiny_path, "onnxruntime", threads=asked) as runner:
            assert isinstance(runner, OnnxRuntimeRunner)
            assert runner._session.get_session_options().intra_op_num_threads == given


def test_openvino_gets_its_number_of_threads_on_no_cores_of_their_own(tiny_path: Path) -> None:
    for asked in (1, 2):
        with open_runner(tiny_path, "openvino", asked) as runner:
            assert isinstance(runner, OpenVinoRunner)
            model = runner._request(1).get_compiled_model()
        assert model.get_property("INFERENCE_NUM_THREADS") == min(asked, cores())
        assert model.get_property("ENABLE_CPU_PINNING") is False


def test_an_unknown_executor_is_refused(tiny_path: Path) -> None:
    with pytest.raises(InputError, match="no runner for executor 'abacus'"):
        open_runner(tiny_path, "abacus")


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_uint8_pixels_come_back_from_normalized_ones_exactly(order: str) -> None:
    runner = Recorder(None)
    runner.dtype, runner.input_size = np.dtype(np.uint8), 16
    runner.preprocess = Preprocess(crop=16, channel_order=order)
    rng = np.random.default_rng(0)
    decoded = np.stack([rng.permutation(256).reshape(16, 16) for _ in range(3)], axis=2).astype(np.uint8)  # (H, W, RGB)
    pixels = np.empty((3, 16, 16), np.float32)
    normalizer(runner.preprocess)(pixels, decoded)
    raw = decoded.transpose(2, 0, 1)[:: 1 if order == "RGB" else -1]
    np.testing.assert_array_equal(runner.prepare(pixels[None])[0], raw)
    runner.infer(pixels[None])
    runner.infer(raw[None])  # prepared already
    assert [c.dtype for c in runner.calls] == [np.uint8] * 2
    np.testing.assert_array_equal(*runner.calls)


def test_a_uint8_runner_without_its_preprocess_refuses_normalized_pixels() -> None:
    runner = Recorder(None)
    runner.dtype = np.dtype(np.uint8)
    with pytest.raises(UsageError, match="how this engine's pixels are normalized is not known"):
        runner.infer(np.zeros((1, 3, 2, 2), np.float32))
    assert runner.infer(np.ones((1, 3, 2, 2), np.uint8))[0, 0] == 12


def test_float16_is_rounded_once_and_answers_come_in_float32() -> None:
    runner = Recorder(None)
    runner.dtype = np.dtype(np.float16)
    pixels = PIXELS[:2, :, :2, :2]
    assert runner.infer(pixels).dtype == np.float32
    np.testing.assert_array_equal(runner.calls[0], pixels.astype(np.float16))


def test_a_fixed_batch_of_uint8_is_padded_in_its_own_type() -> None:
    runner = Recorder(4)
    runner.dtype = np.dtype(np.uint8)
    runner.infer(np.ones((5, 3, 2, 2), np.uint8))
    assert [(c.dtype, c.shape) for c in runner.calls] == [(np.uint8, (4, 3, 2, 2))] * 2
    assert runner.calls[1].sum() == 12
