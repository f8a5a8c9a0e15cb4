from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console, RenderableType

from edgeres import graph
from edgeres.build import Engine, build
from edgeres.calibrate import RangeTable, TensorRange, calibrate
from edgeres.errors import InputError, StaleError, UsageError
from edgeres.files import to_json
from edgeres.inspect import artifact, network
from edgeres.loader import Batch
from edgeres.recipe import ModelSection
from edgeres.targets import load_target
from edgeres.thresholds import METHODS


def text(renderable: RenderableType, width: int = 500) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def table_path(tiny_path: Path, tmp_path: Path) -> Path:
    model = graph.load(tiny_path)
    pixels = np.random.default_rng(0).standard_normal((3, 3, 32, 32), dtype=np.float32)
    table = calibrate(model, [Batch(pixels, None, np.arange(3))], {"model": graph.digest(model)})
    table.save(tmp_path / "ranges.json")
    return tmp_path / "ranges.json"


@pytest.fixture
def engine(tiny_path: Path, tmp_path: Path) -> Engine:
    return build(tiny_path, tmp_path / "engine", "cpu", load_target("cpu"))


def multiply_adds(variant: str, classes: int, size: int) -> int:
    """From table 1 of the paper: one product per weight of a filter and output value."""
    size = -(-size // 2)
    total = 7 * 7 * 3 * 64 * size * size
    size = -(-size // 2)
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            before = size
            size = -(-size // 2) if stage and not block else size
            inside = size if variant == "v1" else before  # what the first 1x1 convolution puts out
            total += channels * width * inside * inside
            total += (9 * width * width + width * 4 * width) * size * size
            total += channels * 4 * width * size * size if not block else 0
            channels = 4 * width
    return total + channels * classes


@pytest.mark.parametrize("variant", ["v1", "v1.5"])
@pytest.mark.parametrize(("classes", "size"), [(1000, 224), (10, 32), (37, 225)])
def test_the_totals_are_those_of_the_paper(variant: str, classes: int, size: int) -> None:
    value, shown = network(ModelSection(variant=variant, classes=classes), size)
    assert value["macs"] == multiply_adds(variant, classes, size) == sum(row["macs"] for row in value["stages"])
    assert value["parameters"] == 25_557_032 - 2049 * (1000 - classes)
    assert value["parameters"] == sum(row["parameters"] for row in value["stages"])
    assert (value["depth"], value["variant"]) == (50, variant)
    assert (value["classes"], value["input_size"]) == (classes, size)
    to_json(value)
    assert f"{value['macs'] / 1e9:.2f} G" in text(shown)
    assert f"{value['parameters'] / 1e6:.2f} M" in text(shown)


def test_v1_and_v1_5_differ_by_what_is_often_quoted() -> None:
    assert network(ModelSection(variant="v1"), 224)[0]["macs"] == pytest.approx(3.86e9, rel=0.002)
    assert network(ModelSection(variant="v1.5"), 224)[0]["macs"] == pytest.approx(4.09e9, rel=0.002)


# parameters and multiply-adds that torchvision's model pages give
@pytest.mark.parametrize(
    ("depth", "name", "parameters", "macs", "layers"),
    [
        (18, "resnet18", "11.69 M", "1.81 G", "2 basic blocks"),
        (34, "resnet34", "21.80 M", "3.66 G", "6 basic blocks"),
        (50, "resnet50-v1.5", "25.56 M", "4.09 G", "6 bottlenecks"),
        (101, "resnet101-v1.5", "44.55 M", "7.80 G", "23 bottlenecks"),
        (152, "resnet152-v1.5", "60.19 M", "11.51 G", "36 bottlenecks"),
    ],
)
def test_every_depth_has_its_table(depth: int, name: str, parameters: str, macs: str, layers: str) -> None:
    value, shown = network(ModelSection(depth=depth), 224)
    lines = text(shown).splitlines()
    assert lines[0].strip() == f"{name}, 1000 classes, input 3 x 224 x 224"
    (total,) = (line for line in lines if line.startswith("total"))
    assert parameters in total
    assert macs in total
    (row,) = (line for line in lines if line.startswith("layer3"))
    assert f" {layers} " in row
    assert (value["depth"], value["classes"]) == (depth, 1000)
    to_json(value)


@pytest.mark.parametrize("depth", [18, 34])
def test_networks_without_variants_count_the_same_as_either(depth: int) -> None:
    v1, v15 = (network(ModelSection(depth=depth, variant=v), 97)[0] for v in ("v1", "v1.5"))
    assert v1["stages"] == v15["stages"]


def test_the_stage_table_fits_80_columns() -> None:
    shown = text(network(ModelSection(), 224)[1], width=80)
    for part in ("conv1", "layer1", "layer4", "fc", "total", "2048 x 7 x 7", "14,964,736", "4.09 G"):
        assert part in shown
    assert "…" not in shown


def test_an_onnx_file_shows_operators_and_origin(tiny_path: Path) -> None:
    value, shown = artifact(tiny_path)
    assert value["operators"]["Conv"] == 15
    assert value["opset"] == {"ai.onnx": 17}
    assert value["digest"] == graph.digest(graph.load(tiny_path))
    assert value["edgeres"]["variant"] == "v1.5"
    assert value["digest"] in text(shown)
    to_json(value)


def test_an_onnx_file_of_others_can_be_inspected(tiny_path: Path, tmp_path: Path) -> None:
    model = graph.load(tiny_path)
    del model.metadata_props[:]
    graph.save(model, tmp_path / "foreign.onnx")
    value, _ = artifact(tmp_path / "foreign.onnx")
    assert value["edgeres"] == {}
    assert value["operators"]["Conv"] == 15


def test_a_range_table_shows_every_method(table_path: Path) -> None:
    value, shown = artifact(table_path)
    table = RangeTable.load(table_path)
    assert value["images"] == 3
    assert value["made_from"] == table.made_from
    assert list(value["tensors"]) == list(table.tensors)
    for name, r in table.tensors.items():
        row = value["tensors"][name]
        assert (row["min"], row["max"], row["count"], row["zeros"]) == (r.min, r.max, r.count, r.zeros)
        assert row["thresholds"] == {m: f(r, 255) for m, f in METHODS.items()}
        (line,) = (line for line in text(shown).splitlines() if line.split()[:1] == [name])
        ends = [max(-lo, hi) for m, (lo, hi) in row["thresholds"].items() if m != "minmax"]
        assert line.split()[1:] == [f"{x:.3f}" for x in (r.min, r.max, *ends)]
    (header,) = (line.split() for line in text(shown).splitlines() if line.startswith("tensor"))
    assert header[3:] == ["entropy", "p99.9", "p99.99", "p99.999", "mse"]
    to_json(value)


@pytest.fixture
def shown(tiny_path: Path, tmp_path: Path, engine: Engine) -> dict[str, RenderableType]:
    """Everything that can be inspected; the range table has the names and magnitudes of a real one."""
    r = TensorRange()
    r.update(np.float32([-13.389, 8.383, 20.874]))
    RangeTable({}, 512, tensors={"layer1.0.downsample.0": r}).save(tmp_path / "t.json")
    return {
        "network": network(ModelSection(), 224)[1],
        "table": artifact(tmp_path / "t.json")[1],
        "onnx": artifact(tiny_path)[1],
        "engine": artifact(engine.path.parent)[1],
    }


@pytest.mark.parametrize("kind", ["network", "table", "onnx", "engine"])
def test_no_line_ends_in_blanks(shown: dict[str, RenderableType], kind: str) -> None:
    lines = text(shown[kind], 120).splitlines()
    assert lines
    assert [line for line in lines if line != line.rstrip()] == []


@pytest.mark.parametrize("kind", ["table", "onnx", "engine"])
def test_80_columns_are_enough(shown: dict[str, RenderableType], kind: str) -> None:
    def without_prose(width: int) -> list[str]:
        lines = text(shown[kind], width).splitlines()
        return [line for line in lines if "/" not in line and len(line.split("  ")) > 1]

    assert len(without_prose(80)) > 1
    assert without_prose(80) == without_prose(500)
    assert max(map(len, without_prose(80))) <= 80


def test_a_record_within_a_record_stands_further_in(tiny_path: Path, tmp_path: Path) -> None:
    model = graph.load(tiny_path)
    record = {
        "a": {"long name": 1, "b": {"c": [0.25, 1 / 3], "empty": {}}},
        "list": [],
        "none": None,
        "pairs": [[1, 2]],
    }
    graph.set_metadata(model, record)
    graph.save(model, tmp_path / "m.onnx")
    lines = text(artifact(tmp_path / "m.onnx")[1]).splitlines()
    assert lines[lines.index("edgeres") :] == [
        "edgeres",
        "  a",
        "    long name  1",
        "    b",
        "      c      0.25, 0.333333",
        "      empty  none",
        "  list   none",
        "  none   none",
        "  pairs  [[1, 2]]",
    ]


def test_a_long_value_goes_on_below_itself(tiny_path: Path, tmp_path: Path) -> None:
    model = graph.load(tiny_path)
    graph.set_metadata(model, {"source": "x" * 100})
    graph.save(model, tmp_path / "m.onnx")
    assert text(artifact(tmp_path / "m.onnx")[1], 60).splitlines()[-2:] == [
        "  source  " + "x" * 50,
        " " * 10 + "x" * 50,
    ]


@pytest.mark.parametrize("name", ["", "engine.json"])
def test_an_engine_shows_its_record(engine: Engine, name: str) -> None:
    value, shown = artifact(engine.path.parent / name)
    assert value["sha256"] == engine.record["sha256"]
    assert engine.record["sha256"] in text(shown)


def test_an_engine_that_was_changed_is_refused(engine: Engine) -> None:
    engine.path.write_bytes(engine.path.read_bytes() + b"\0")
    with pytest.raises(StaleError, match="is not the file that was built"):
        artifact(engine.path.parent)


@pytest.mark.parametrize("name", ["[bold]tiny.onnx", "[/x].onnx", "v[1.5].onnx"])
def test_brackets_in_a_name_are_shown_as_they_are(tiny_path: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "[red]" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(tiny_path.read_bytes())
    assert str(path) in text(artifact(path)[1])


def test_brackets_in_a_record_are_shown_as_they_are(tiny_path: Path, tmp_path: Path) -> None:
    model = graph.load(tiny_path)
    graph.set_metadata(model, {"weights": {"source": "[bold]w[/bold].pth"}})
    graph.save(model, tmp_path / "m.onnx")
    assert "[bold]w[/bold].pth" in text(artifact(tmp_path / "m.onnx")[1])


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no ONNX file"):
        artifact(tmp_path / "none.onnx")
    with pytest.raises(InputError, match=r"cannot read .*none\.json"):
        artifact(tmp_path / "none.json")
    with pytest.raises(InputError, match="no engine at"):
        artifact(tmp_path)


@pytest.mark.parametrize("name", ["notes.txt", "weights.pth", "none"])
def test_another_kind_of_file_is_wrong_usage(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("hello")
    with pytest.raises(UsageError, match="cannot inspect") as caught:
        artifact(tmp_path / name)
    assert "engine folder" in caught.value.hint


@pytest.mark.parametrize("content", ["{}", '{"format": "edgeres result 1"}', '{"format": null}'])
def test_another_json_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match="is no range table"):
        artifact(tmp_path / "x.json")


def test_a_damaged_range_table_is_refused(table_path: Path) -> None:
    table_path.write_text(table_path.read_text().replace('"count": ', '"count": 1'))
    with pytest.raises(InputError, match="is damaged"):
        artifact(table_path)


def test_a_damaged_onnx_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"\x08")
    with pytest.raises(InputError, match="is not a valid ONNX file"):
        artifact(tmp_path / "x.onnx")
