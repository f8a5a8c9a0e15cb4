from __future__ import annotations

import base64
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import weakref
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_resnet, write_images
from onnx import helper, numpy_helper
from PIL import Image
from rich.console import Console

import edgeres
from edgeres import calibrate as calibration
from edgeres import graph, probe, progress, ranges
from edgeres.calibrate import BINS, RangeTable, TensorRange, calibrate
from edgeres.counting import PIECE, SMALLEST
from edgeres.data import ImageSet
from edgeres.errors import InputError, StaleError
from edgeres.export import export_onnx
from edgeres.job import Job
from edgeres.layouts import open_images
from edgeres.loader import Batch, Loader
from edgeres.recipe import Preprocess, load_recipe

SUBNORMAL = 2.0**-149


def measured(*chunks: Any) -> TensorRange:
    r = TensorRange()
    for chunk in chunks:
        r.update(np.asarray(chunk, np.float32))
    return r


def assert_measures(r: TensorRange, values: np.ndarray) -> None:
    values = values.astype(np.float32).astype(np.float64).ravel()
    assert (r.min, r.max, r.count) == (values.min(), values.max(), values.size)
    assert r.zeros == np.sum(values == 0)
    assert np.abs(values).max() < r.limit
    expected, edges = np.histogram(values, 2 * BINS, (-r.limit, r.limit))
    np.testing.assert_array_equal(r.histogram, expected)
    np.testing.assert_array_equal(r.edges(), edges)


def batches(images: int, size: int, seed: int = 0, backwards: bool = False) -> list[Batch]:
    pixels = np.random.default_rng(seed).standard_normal((images, 3, 32, 32), dtype=np.float32)
    index = np.arange(images)
    if backwards:
        pixels, index = pixels[::-1].copy(), index[::-1]
    return [Batch(pixels[i : i + size], None, index[i : i + size]) for i in range(0, images, size)]


@pytest.fixture
def table(tiny: Any) -> RangeTable:
    return calibrate(tiny, batches(4, 2), {"model": graph.digest(tiny), "images": "i" * 64, "preprocess": "p" * 64})


def test_one_update_equals_numpy_histogram() -> None:
    values = np.random.default_rng(0).laplace(size=(7, 300, 50))  # more than one piece
    values[0, :20] = 0
    assert_measures(measured(values), values)


def test_values_on_and_beside_every_bin_edge_are_counted_in_their_bin() -> None:
    edges = np.linspace(-1, 1, 2 * BINS + 1, dtype=np.float32)[1:-1]
    below, above = np.nextafter(edges, np.float32(-2)), np.nextafter(edges, np.float32(2))
    values = np.concatenate([edges, below, above, [np.nextafter(np.float32(1), np.float32(0))]])
    r = measured(values)
    assert r.limit == 1
    assert_measures(r, values)


@pytest.mark.parametrize("power", [1, 2, 3, 10, 11, 12, 13, 40, 126])
def test_growth_by_any_factor_merges_into_the_final_bins(power: int) -> None:
    rng = np.random.default_rng(power)
    first = rng.uniform(-1, 1, 5000)
    second = rng.uniform(-1, 1, 5000) * 2.0**power
    r = measured(first, second)
    assert r.limit == 2.0**power
    assert_measures(r, np.concatenate([first, second]))


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([[0.0, 0.0]], id="all-zero"),
        pytest.param([[0.0, -0.0], [3.0, -1.0]], id="zero-first"),
        pytest.param([[-0.5, -3.0], [-100.0, -0.001]], id="negative-only"),
        pytest.param([[SUBNORMAL, -SUBNORMAL], [1.0]], id="subnormal-first"),
        pytest.param([[SUBNORMAL]], id="subnormal-only"),
        pytest.param([[1e-37], [-1e-36], [0.0]], id="tiny-only"),
        pytest.param([[1e-30, -1e-31], [1e-20], [1e30]], id="tiny-to-huge"),
        pytest.param([[3.4028235e38, -3.4028235e38, 1.0]], id="largest"),
        pytest.param([[1.0], [2.0], [4.0], [-4.0], [8.0]], id="powers-of-two"),
        pytest.param([[0.99999994], [-0.99999994]], id="just-below-a-power-of-two"),
    ],
)
def test_odd_values_are_counted_like_any_other(chunks: list[list[float]]) -> None:
    assert_measures(measured(*chunks), np.concatenate(chunks))


def test_the_result_depends_neither_on_order_nor_on_batch_size() -> None:
    rng = np.random.default_rng(5)
    values = np.concatenate([rng.normal(0, 0.01, 3000), rng.normal(0, 1, 3000), rng.normal(0, 50, 50), np.zeros(99)])
    # the values that rounding is most likely to put into different bins at different limits
    values = np.concatenate([values, np.nextafter(np.arange(-50, 51) / BINS, -1, dtype=np.float32)])
    values = np.concatenate([values, [SUBNORMAL, -SUBNORMAL, -0.0, 2e4]])
    whole = measured(values).to_json()
    for seed, size in ((1, 7), (2, 64), (3, 1000)):
        shuffled = np.random.default_rng(seed).permutation(values)
        assert measured(*(shuffled[i : i + size] for i in range(0, len(values), size))).to_json() == whole
    assert measured(*([v] for v in np.sort(np.abs(values[:50])))).to_json() == measured(np.abs(values[:50])).to_json()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 3])
def test_every_size_is_counted_to_the_last_value(size: int) -> None:
    values = np.random.default_rng(size).normal(size=size) * np.geomspace(1, 1e6, size)
    values[-1] = 3e6  # the limit grows within, and the largest stands last
    assert_measures(measured(values), values)


@pytest.mark.parametrize("zeros", [[0.0, -0.0], [-0.0, 0.0], [-0.0]])
def test_the_sign_of_a_zero_is_not_kept(zeros: list[float]) -> None:
    r = measured(zeros)
    assert math.copysign(1, r.min) == math.copysign(1, r.max) == 1
    assert (r.zeros, r.count) == (len(zeros), len(zeros))


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 7, PIECE, -1])
def test_values_that_are_not_finite_are_refused_wherever_they_stand(bad: float, place: int) -> None:
    values = np.ones(PIECE + 9, np.float32)
    values[place] = bad
    with pytest.raises(FloatingPointError):
        measured(values)


def test_threads_count_without_each_other(tiny: Any) -> None:
    values = [np.random.default_rng(i).normal(size=50_000).astype(np.float32) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for chunk, r in zip(values, pool.map(measured, values), strict=True):
            assert_measures(r, chunk)


def test_it_counts_where_nothing_can_be_cached(tmp_path: Path) -> None:
    package = tmp_path / "site" / "edgeres"
    shutil.copytree(Path(edgeres.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import numpy, edgeres.counting as c\n"
        f"assert c.__file__.startswith({str(tmp_path)!r})\n"
        "h = numpy.zeros(2 * c.BINS, numpy.int64)\n"
        "print(c.count(numpy.float32([1, -2, 0]), h, c.SMALLEST), h.sum())\n"
    )
    # where a folder should be there is a file: neither beside the package nor in the user's cache can one be made
    (package / "__pycache__").write_text("")
    (tmp_path / "home").write_text("")
    home = str(tmp_path / "home")
    places = {
        "PYTHONPATH": str(tmp_path / "site"),
        "HOME": home,
        "XDG_CACHE_HOME": home,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **places}, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["(-2.0,", "1.0,", "1,", "4.0)", "3"], done.stderr


def test_the_table_does_not_grow_with_the_images() -> None:
    rng = np.random.default_rng(0)
    r = measured(rng.normal(size=10))
    before = {name: np.size(value) for name, value in vars(r).items()}
    for scale in range(1, 60):
        r.update(rng.normal(0, scale, 1000).astype(np.float32))
    assert {name: np.size(value) for name, value in vars(r).items()} == before
    assert r.histogram.shape == (2 * BINS,)
    assert r.histogram.sum() == r.count == 10 + 59 * 1000


def test_images_are_let_go_after_their_batch(tiny: Any) -> None:
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def stream() -> Iterator[Batch]:
        nonlocal most
        for i in range(6):
            pixels = np.full((1, 3, 32, 32), i, np.float32)
            alive.append(weakref.ref(pixels))
            yield Batch(pixels, None, np.asarray([i]))
            del pixels
            most = max(most, sum(ref() is not None for ref in alive))

    assert calibrate(tiny, stream(), {}).images == 6
    assert most <= 1


def test_every_tensor_is_measured_as_pytorch_computes_it(table: RangeTable, tiny: Any) -> None:
    model = tiny_resnet()
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: seen.setdefault(name, []).append(output.clone())

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("relu", "relu1", "relu2", "relu3", "maxpool", "avgpool", "bn3"):
            module.register_forward_hook(keep(name.replace("bn3", "conv3")))
        elif name.endswith("downsample"):
            module.register_forward_hook(keep(f"{name}.0"))
    pixels = np.concatenate([b.pixels for b in batches(4, 2)])
    with torch.inference_mode():
        model(torch.from_numpy(pixels))
    assert set(table.tensors) == {graph.INPUT, *seen}
    assert_measures(table.tensors[graph.INPUT], pixels)
    for name, outputs in seen.items():
        values, r = outputs[0].numpy(), table.tensors[name]
        assert r.count == values.size
        np.testing.assert_allclose([r.min, r.max], [values.min(), values.max()], rtol=1e-4, atol=1e-5, err_msg=name)
    assert table.images == 4


def test_a_network_without_an_inner_tensor_has_the_range_of_its_input() -> None:
    weight = numpy_helper.from_array(np.ones((2, 3072), np.float32), "weight")
    nodes = [
        helper.make_node("Flatten", [graph.INPUT], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight"], [graph.OUTPUT], transB=1),
    ]
    model = graph.assemble(nodes, [weight], "linear", (3, 32, 32), 2, 17, None)
    table = calibrate(model, images := batches(5, 2), {"model": graph.digest(model)})
    largest = max(b.pixels.max() for b in images)
    assert {name: r.max for name, r in table.tensors.items()} == {graph.INPUT: largest}


def test_tensors_come_in_graph_order(table: RangeTable, tiny: Any) -> None:
    assert list(table.tensors) == graph.activations(tiny)


def test_the_order_of_images_does_not_change_the_table(tiny: Any, tmp_path: Path) -> None:
    for name, backwards in (("a.json", False), ("b.json", True)):
        calibrate(tiny, batches(5, 1, backwards=backwards), {"model": "m"}).save(tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("size", [2, 5])
def test_the_batch_size_does_not_change_what_is_measured(tiny: Any, size: int) -> None:
    one, other = (calibrate(tiny, batches(5, s), {}) for s in (1, size))
    assert (one.images, other.images) == (5, 5)
    for name, r in one.tensors.items():
        s = other.tensors[name]
        assert s.count == r.count
        # a convolution may add in another order for another batch size: the last bits of a value may differ
        np.testing.assert_allclose([s.min, s.max], [r.min, r.max], rtol=1e-5, atol=1e-6)
        assert np.abs(s.histogram - r.histogram).sum() <= 2 + r.count // 1000


def test_a_model_of_fixed_batch_is_measured_with_any_batch(
    tiny: Any, preprocess: Preprocess, capfd: pytest.CaptureFixture[str]
) -> None:
    fixed = export_onnx(tiny_resnet(), preprocess, {}, batch=4)
    tables = [calibrate(m, batches(3, 3), {}) for m in (fixed, tiny)]
    assert tables[0].tensors["maxpool"].to_json() == tables[1].tensors["maxpool"].to_json()
    assert capfd.readouterr().err == ""


def test_the_model_is_not_modified(tiny: Any) -> None:
    before = tiny.SerializeToString(deterministic=True)
    calibrate(tiny, batches(1, 1), {})
    assert tiny.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf]])
def test_an_input_that_is_not_finite_is_refused(tiny: Any, bad: list[float]) -> None:
    good, broken = batches(4, 2)
    broken.pixels[1, 0, 3, 3 : 3 + len(bad)] = bad
    with pytest.raises(InputError, match="tensor input holds NaN or infinity") as caught:
        calibrate(tiny, [good, broken], {})
    assert caught.value.evidence == "in image 3 of the calibration set"


@pytest.mark.parametrize("room", [1, probe.ROOM])
def test_an_image_that_is_not_finite_is_found_behind_others_left_out(
    tiny: Any, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "ROOM", room)  # one image at a time, or all three
    pixels = batches(3, 3)[0].pixels
    pixels[2, 1, 0, 0] = np.nan
    with pytest.raises(InputError) as caught:
        calibrate(tiny, [Batch(pixels, None, np.asarray([4, 6, 9]))], {})
    assert caught.value.evidence == "in image 9 of the calibration set"


def test_a_tensor_that_overflows_inside_is_named(tiny_path: Path) -> None:
    model = graph.load(tiny_path)
    weight = next(t for t in model.graph.initializer if t.name == "layer2.0.conv1.weight")
    weight.CopyFrom(numpy_helper.from_array(np.sign(numpy_helper.to_array(weight)) * np.float32(3e38), weight.name))
    with pytest.raises(InputError, match=r"tensor layer2\.0\.relu1 holds NaN or infinity"):
        calibrate(model, batches(2, 2), {})


def test_no_images_is_an_error_not_an_empty_table(tiny: Any) -> None:
    with pytest.raises(InputError, match="no images"):
        calibrate(tiny, [], {})


def test_a_saved_table_loads_exactly(table: RangeTable, tmp_path: Path) -> None:
    table.skipped = ["class0/broken.png"]
    table.save(tmp_path / "t.json")
    loaded = RangeTable.load(tmp_path / "t.json")
    assert (loaded.made_from, loaded.images, loaded.skipped) == (table.made_from, 4, ["class0/broken.png"])
    assert list(loaded.tensors) == list(table.tensors)
    for name, r in table.tensors.items():
        s = loaded.tensors[name]
        assert (s.min, s.max, s.count, s.zeros, s.limit) == (r.min, r.max, r.count, r.zeros, r.limit)
        assert s.histogram.dtype == np.int64
        np.testing.assert_array_equal(s.histogram, r.histogram)
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "t.json").read_bytes()


def test_a_loaded_table_can_be_measured_further(tmp_path: Path) -> None:
    RangeTable({}, 1, tensors={"x": measured([1.0, -2.0])}).save(tmp_path / "t.json")
    r = RangeTable.load(tmp_path / "t.json").tensors["x"]
    r.update(np.asarray([50.0], np.float32))
    assert_measures(r, np.asarray([1.0, -2.0, 50.0]))


def test_a_truncated_table_is_refused(table: RangeTable, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    table.save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"cannot read range table .*t\.json"):
        RangeTable.load(path)


@pytest.mark.parametrize("text", ["{}", '{"format": "edgeres engine 1"}', '{"tensors": {}}'])
def test_another_json_file_is_refused_as_such(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(InputError, match="is not a range table") as caught:
        RangeTable.load(tmp_path / "t.json")
    assert "edgeres range table 1" in caught.value.evidence


def test_json_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("[1, 2]")
    with pytest.raises(InputError, match="is not range table"):
        RangeTable.load(tmp_path / "t.json")


def packed(histogram: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(histogram.astype("<u8").tobytes())).decode()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda v: v.pop("tensors"), id="no-tensors"),
        pytest.param(lambda v: v.pop("made_from"), id="no-made-from"),
        pytest.param(lambda v: v.update(made_from=None), id="made-from-null"),
        pytest.param(lambda v: v.update(tensors=[1]), id="tensors-a-list"),
        pytest.param(lambda v: v["tensors"].update(input=7), id="tensor-a-number"),
        pytest.param(lambda v: v["tensors"]["input"].pop("min"), id="no-min"),
        pytest.param(lambda v: v["tensors"]["input"].update(min=None), id="min-null"),
        pytest.param(lambda v: v["tensors"]["input"].update(max="9"), id="max-a-string"),
        pytest.param(lambda v: v["tensors"]["input"].update(min=1e9), id="min-above-max"),
        pytest.param(lambda v: v["tensors"]["input"].update(max=1e9), id="max-beyond-limit"),
        pytest.param(lambda v: v["tensors"]["input"].update(count=1), id="another-count"),
        pytest.param(lambda v: v["tensors"]["input"].update(more=1), id="unknown-key"),
        pytest.param(lambda v: v["tensors"]["input"].update(histogram="?"), id="no-base64"),
        pytest.param(lambda v: v["tensors"]["input"].update(histogram="AAAA"), id="no-zlib"),
        pytest.param(
            lambda v: v["tensors"]["input"].update(histogram=packed(np.full(1, v["tensors"]["input"]["count"]))),
            id="too-few-bins",
        ),
    ],
)
def test_a_damaged_table_is_refused_by_name(
    table: RangeTable, tmp_path: Path, damage: Callable[[dict[str, Any]], object]
) -> None:
    path = tmp_path / "t.json"
    table.save(path)
    value = json.loads(path.read_text())
    damage(value)
    path.write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"range table .*t\.json is damaged") as caught:
        RangeTable.load(path)
    assert caught.value.evidence


def test_require_accepts_the_inputs_it_was_made_from(table: RangeTable) -> None:
    table.require(dict(table.made_from))
    table.require({"images": "i" * 64})


@pytest.mark.parametrize("changed", ["model", "images", "preprocess"])
def test_require_names_the_input_that_changed(table: RangeTable, changed: str) -> None:
    with pytest.raises(StaleError, match=f"not of the same {changed}\n") as caught:
        table.require({**table.made_from, changed: "f" * 64})
    assert caught.value.evidence == f"{changed}: table {table.made_from[changed][:12]}, here ffffffffffff"


def test_require_names_every_input_that_changed(table: RangeTable) -> None:
    with pytest.raises(StaleError, match="not of the same model and images"):
        table.require({"model": "x", "images": "y", "preprocess": "p" * 64})


def test_require_refuses_an_input_that_was_not_recorded() -> None:
    with pytest.raises(StaleError, match="not of the same model") as caught:
        RangeTable({}).require({"model": "a" * 64})
    assert "table none" in caught.value.evidence


@pytest.fixture
def spoiled(tmp_path: Path) -> ImageSet:
    """20 images; with batches of 4 the last one of the first is bad, the whole third, and the whole last."""
    root = tmp_path / "spoiled"
    write_images(root, 5, seed=3)
    images = open_images(root)
    for place in (3, 8, 9, 10, 11, 16, 17, 18, 19):
        (root / images.paths[place]).write_bytes(b"no image")
    return images


MADE = {"model": "m" * 64, "images": "i" * 64}


def interrupt(after: int, function: Callable[..., Any], *arguments: Any, error: Any = KeyboardInterrupt) -> None:
    """Call ``function``, which calibrates, and raise ``error`` in the middle of the batch after that many others."""
    real, calls = calibration._measure, iter(range(100))

    def measure(table: RangeTable, *rest: Any) -> None:
        real(table, *rest)  # what it added must not be kept
        if next(calls) == after:
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_measure", measure)
        with pytest.raises(error):
            function(*arguments)


def heard(function: Callable[[], Any]) -> tuple[Any, str]:
    """What ``function`` returns, and what it said on the way."""
    console = Console(file=io.StringIO(), width=200)
    with progress.to(console):
        result = function()
    return result, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize(("batch", "resumed"), [(0, None), (1, 4), (2, 8)])
def test_an_interrupted_run_goes_on_where_it_stopped(
    tiny: Any,
    preprocess: Preprocess,
    spoiled: ImageSet,
    tmp_path: Path,
    error: type[BaseException],
    batch: int,
    resumed: int | None,
) -> None:
    partial = tmp_path / "t.json.part"
    whole = Loader(spoiled, preprocess, 4, skip_bad=True)
    calibrate(tiny, whole, MADE).save(tmp_path / "whole.json")
    interrupt(batch, calibrate, tiny, Loader(spoiled, preprocess, 4, skip_bad=True), MADE, partial, error=error)
    assert partial.exists() == (resumed is not None)
    loader = Loader(spoiled, preprocess, 4, skip_bad=True)
    table, said = heard(lambda: calibrate(tiny, loader, MADE, partial))
    assert ("resume at image" in said) == (resumed is not None)
    assert resumed is None or f"resume at image {resumed}\n" in said
    table.save(tmp_path / "resumed.json")
    assert (tmp_path / "resumed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert loader.skipped == whole.skipped
    assert table.skipped == [spoiled.paths[i] for i in (3, 8, 9, 10, 11, 16, 17, 18, 19)]
    assert table.images == 11
    assert not partial.exists()


def test_a_run_can_be_interrupted_at_every_batch(
    tiny: Any, preprocess: Preprocess, train_images: ImageSet, tmp_path: Path
) -> None:
    partial = tmp_path / "t.json.part"
    calibrate(tiny, Loader(train_images, preprocess, 8), MADE).save(tmp_path / "whole.json")
    for after, done in ((0, None), (1, 8), (0, 8), (1, 16), (1, 24), (0, 24)):
        interrupt(after, calibrate, tiny, Loader(train_images, preprocess, 8), MADE, partial)
        assert (json.loads(partial.read_text())["done"] if done else None) == done
    table = calibrate(tiny, Loader(train_images, preprocess, 8), MADE, partial)
    table.save(tmp_path / "resumed.json")
    assert (tmp_path / "resumed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_what_was_left_out_is_known_after_two_interruptions(
    tiny: Any, preprocess: Preprocess, spoiled: ImageSet, tmp_path: Path
) -> None:
    partial = tmp_path / "t.json.part"
    for done in (4, 8):
        interrupt(1, calibrate, tiny, Loader(spoiled, preprocess, 4, skip_bad=True), MADE, partial)
        assert json.loads(partial.read_text())["done"] == done
    table = calibrate(tiny, Loader(spoiled, preprocess, 4, skip_bad=True), MADE, partial)
    assert table.skipped == [spoiled.paths[i] for i in (3, 8, 9, 10, 11, 16, 17, 18, 19)]


CHILD = """
import signal, sys, time
from pathlib import Path
from edgeres import calibrate as c, graph, loader
from edgeres.layouts import open_images
from edgeres.recipe import Preprocess

model, images, partial = map(Path, sys.argv[1:4])
c.SAVE_EVERY = float(sys.argv[4])
real = c._measure
signal.signal(signal.SIGINT, signal.default_int_handler)  # who started the tests may have it ignored

def measure(table, *rest):
    real(table, *rest)
    if table.images == 10:
        print("in the middle", flush=True)
        time.sleep(600)

c._measure = measure
c.calibrate(graph.load(model), loader.Loader(open_images(images), Preprocess(crop=32, resize=36), 2), {}, partial)
"""


@pytest.mark.parametrize(
    ("kill", "save_every"), [(signal.SIGKILL, 0.0), (signal.SIGINT, 1e9)], ids=["kill -9", "Ctrl-C"]
)
def test_a_killed_process_leaves_what_the_next_one_needs(
    tiny: Any,
    tiny_path: Path,
    preprocess: Preprocess,
    train_folder: Path,
    tmp_path: Path,
    kill: signal.Signals,
    save_every: float,
) -> None:
    partial = tmp_path / "t.json.part"
    arguments = [sys.executable, "-c", CHILD, str(tiny_path), str(train_folder), str(partial), str(save_every)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout
        assert child.stdout.readline() == "in the middle\n"
        child.send_signal(kill)
        left = child.communicate()[1]
    assert child.returncode, left
    images = open_images(train_folder)
    whole = calibrate(tiny, Loader(images, preprocess, 2), {})
    table, said = heard(lambda: calibrate(tiny, Loader(images, preprocess, 2), {}, partial))
    assert "resume at image 8\n" in said, left
    for name, t in (("whole", whole), ("resumed", table)):
        t.save(tmp_path / name)
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.fixture
def left(tiny: Any, preprocess: Preprocess, spoiled: ImageSet, tmp_path: Path) -> Path:
    """A partial table up to image 8 of `spoiled`, without image 3."""
    interrupt(2, calibrate, tiny, Loader(spoiled, preprocess, 4, skip_bad=True), MADE, tmp_path / "t.json.part")
    return tmp_path / "t.json.part"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda b: b[:-1000], id="cut short"),
        pytest.param(lambda b: b"", id="empty"),
        pytest.param(lambda b: b"[]", id="a list"),
        pytest.param(lambda b: b"{}", id="no keys"),
        pytest.param(lambda b: b"\xff" + b, id="no text"),
        pytest.param(lambda b: b.replace(b'"done": 8', b'"done": 4'), id="another position"),
        pytest.param(lambda b: b.replace(b'"zeros": ', b'"zeros": 1'), id="another count"),
    ],
)
def test_a_damaged_partial_table_is_ignored_and_said(
    tiny: Any, preprocess: Preprocess, spoiled: ImageSet, left: Path, damage: Callable[[bytes], bytes]
) -> None:
    content = left.read_bytes()
    left.write_bytes(damage(content))
    assert left.read_bytes() != content
    loader = Loader(spoiled, preprocess, 4, skip_bad=True)
    table, said = heard(lambda: calibrate(tiny, loader, MADE, left))
    assert "t.json.part is damaged: begin anew\n" in said
    assert "resume" not in said
    assert table.images == 11
    assert not left.exists()


@pytest.mark.parametrize(
    ("made_from", "batch"),
    [
        ({**MADE, "model": "n" * 64}, 4),
        ({**MADE, "images": "j" * 64}, 4),
        pytest.param(MADE, 5, id="another batch size, at which a convolution may round otherwise"),
    ],
)
def test_a_partial_table_of_other_inputs_is_ignored_and_said(
    tiny: Any, preprocess: Preprocess, spoiled: ImageSet, left: Path, made_from: dict[str, str], batch: int
) -> None:
    loader = Loader(spoiled, preprocess, batch, skip_bad=True)
    table, said = heard(lambda: calibrate(tiny, loader, made_from, left))
    assert "t.json.part was measured on other inputs: begin anew\n" in said
    assert "resume" not in said
    assert (table.images, table.made_from) == (11, made_from)


def test_a_partial_table_without_its_bad_images_is_of_no_use_to_a_run_that_refuses_them(
    tiny: Any, preprocess: Preprocess, spoiled: ImageSet, left: Path
) -> None:
    with pytest.raises(InputError, match="1 unreadable image "):
        calibrate(tiny, Loader(spoiled, preprocess, 4), MADE, left)


def test_a_partial_table_is_saved_every_few_seconds(
    tiny: Any, preprocess: Preprocess, train_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, real, seen = tmp_path / "t.json.part", calibration._measure, []

    def measure(*arguments: Any) -> None:
        seen.append(json.loads(partial.read_text())["done"] if partial.exists() else None)
        real(*arguments)

    monkeypatch.setattr(calibration, "_measure", measure)
    for every in (0.0, 1e9):
        monkeypatch.setattr(calibration, "SAVE_EVERY", every)
        calibrate(tiny, Loader(train_images, preprocess, 8), MADE, partial)
    assert seen == [None, 8, 16, 24] + [None] * 4


def test_the_command_resumes_too(workspace: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(load_recipe(workspace), workspace, tiny_path)
    monkeypatch.setattr(ranges, "BATCH", 8)
    ranges.calibrate_model(job, workspace / "whole.json")
    interrupt(2, ranges.calibrate_model, job, workspace / "t.json")
    assert not (workspace / "t.json").exists()
    path, said = heard(lambda: ranges.calibrate_model(job, workspace / "t.json"))
    assert "resume at image 16\n" in said
    assert path.read_bytes() == (workspace / "whole.json").read_bytes()
    assert sorted(p.name for p in workspace.glob("t.json*")) == ["t.json"]


def test_a_bad_image_is_named_by_its_path_also_after_resuming(
    tiny_path: Path, preprocess: Preprocess, train_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "t.json.part"
    tiny, read = graph.load(tiny_path), calibration.Loader.__iter__

    def broken(self: Loader) -> Iterator[Batch]:
        for batch in read(self):
            for pixels, place in zip(batch.pixels, batch.index, strict=True):
                if self.images.paths[place] == train_images.paths[21]:
                    pixels[0, 0, 0] = np.inf
            yield batch

    monkeypatch.setattr(calibration.Loader, "__iter__", broken)
    for _ in range(2):
        with pytest.raises(InputError, match="tensor input holds") as caught:
            calibrate(tiny, Loader(train_images, preprocess, 8), MADE, partial)
        assert caught.value.evidence == f"in image 21, {train_images.paths[21]} of the calibration set"


def test_an_empty_set_is_refused(tiny: Any, preprocess: Preprocess, train_images: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images to calibrate on"):
        calibrate(tiny, Loader(train_images.take([]), preprocess, 8), {}, tmp_path / "p")


@pytest.mark.parametrize(("images", "batch"), [(1, 1), (1, 64), (3, 64)])
def test_a_batch_may_be_larger_than_the_set(
    tiny: Any, preprocess: Preprocess, train_images: ImageSet, images: int, batch: int
) -> None:
    table = calibrate(tiny, Loader(train_images.take(range(images)), preprocess, batch), {})
    assert table.images == images
    assert table.tensors[graph.INPUT].count == images * 3 * 32 * 32


def test_a_batch_larger_than_the_memory_for_activations_is_measured_in_parts(
    tiny: Any, preprocess: Preprocess, train_images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "ROOM", 500_000)  # the tiny model has 94 kB of activations per image
    batches = list(Loader(train_images.take(range(11)), preprocess, 11))
    model = probe.Probe(tiny, graph.activations(tiny))
    parts = [(start, {n: v.copy() for n, v in tensors.items()}) for start, tensors in model.run(batches[0].pixels)]
    assert [start for start, _ in parts] == [0, 5, 10]
    for name in graph.activations(tiny):
        (expected,) = (
            model.session.run([name], {"input": batches[0].pixels}) if name != "input" else (batches[0].pixels,)
        )
        np.testing.assert_allclose(np.concatenate([t[name] for _, t in parts]), expected, rtol=1e-4, atol=1e-5)


def test_gray_images_are_measured_as_three_equal_channels(tiny: Any, preprocess: Preprocess, tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / "gray" / label).mkdir(parents=True)
        pixels = np.random.default_rng(ord(label)).integers(0, 256, (36, 36), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "gray" / label / "0.png")
    plain = replace(preprocess, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    table = calibrate(tiny, Loader(open_images(tmp_path / "gray"), plain, 2), {})
    assert table.images == 2
    assert (table.tensors["input"].histogram % 3 == 0).all()


def test_a_tensor_that_is_always_zero_is_measured(tiny_path: Path) -> None:
    model = graph.load(tiny_path)
    for tensor in model.graph.initializer:
        if tensor.name.startswith("layer1.0.conv1."):
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(tuple(tensor.dims), np.float32), tensor.name))
    r = calibrate(model, batches(2, 2), {}).tensors["layer1.0.relu1"]
    assert (r.min, r.max, r.zeros, r.limit) == (0, 0, r.count, SMALLEST)
    assert r.histogram[BINS] == r.count > 0
