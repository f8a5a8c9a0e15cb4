from __future__ import annotations

import base64
import json
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_resnet
from onnx import numpy_helper

from edgeres import graph
from edgeres.calibrate import BINS, RangeTable, TensorRange, calibrate
from edgeres.errors import InputError, StaleError
from edgeres.export import export_onnx
from edgeres.loader import Batch
from edgeres.recipe import Preprocess

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


@pytest.fixture(scope="module")
def tiny(tiny_path: Path) -> Any:
    return graph.load(tiny_path)


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
    whole = measured(values).to_json()
    for seed, size in ((1, 7), (2, 64), (3, 1000)):
        shuffled = np.random.default_rng(seed).permutation(values)
        assert measured(*(shuffled[i : i + size] for i in range(0, len(values), size))).to_json() == whole
    assert measured(*([v] for v in np.sort(np.abs(values[:50])))).to_json() == measured(np.abs(values[:50])).to_json()


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
    assert "images 2 to 3" in caught.value.evidence


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
    with pytest.raises(StaleError, match=f"made from another {changed}\n") as caught:
        table.require({**table.made_from, changed: "f" * 64})
    assert caught.value.evidence == f"{changed}: table {table.made_from[changed][:12]}, here ffffffffffff"


def test_require_names_every_input_that_changed(table: RangeTable) -> None:
    with pytest.raises(StaleError, match="another model and another images"):
        table.require({"model": "x", "images": "y", "preprocess": "p" * 64})


def test_require_refuses_an_input_that_was_not_recorded() -> None:
    with pytest.raises(StaleError, match="another model") as caught:
        RangeTable({}).require({"model": "a" * 64})
    assert "table none" in caught.value.evidence
