from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize(
    "content", ["{}", '{"format": "edgeres result 1"}', '{"format": null}', "7", '"Layers"', "null"]
)
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


def layers() -> list[dict[str, Any]]:
    """A convolution, one with a residual add, and FP32 pooling, as TensorRT 10 tells them."""
    words = {"int8": "Thirty-two wide channel vectorized row major Int8 format", "fp32": "Row major linear FP32"}

    def layer(name: str, kind: str, reads: list[tuple[str, str]], writes: tuple[str, str]) -> dict[str, Any]:
        inputs, outputs = (
            [{"Name": n, "Dimensions": [8, 64, 56, 56], "Format/Datatype": words[t]} for n, t in tensors]
            for tensors in (reads, [writes])
        )
        return {"Name": name, "LayerType": kind, "Inputs": inputs, "Outputs": outputs}

    x, y, z = ("x", "int8"), ("y", "int8"), ("z", "fp32")
    long = "layer1.0.conv3.weight + layer1.0.conv3 + layer1.0.add + layer1.0.relu3"
    return [
        layer("conv1.weight + conv1 + relu", "CaskConvolution", [x], y),
        layer(long, "CaskConvolution", [y, x], z),
        layer("nothing", "NoOp", [z], z),
        layer("[avgpool]", "CudaPooling", [z], ("p", "fp32")),
    ]


PROFILE = [
    {"count": 20},
    {"name": "conv1.weight + conv1 + relu", "timeMs": 2, "averageMs": 0.1, "medianMs": 0.25, "percentage": 25},
    {"name": "[avgpool]", "timeMs": 2, "averageMs": 0.1, "medianMs": 0.75, "percentage": 75},
]


def written(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


@pytest.mark.parametrize("alone", [False, True])
def test_layers_of_trtexec_are_audited_at_the_lowest_precision(tmp_path: Path, alone: bool) -> None:
    path = written(tmp_path / "layers.json", layers() if alone else {"Layers": layers(), "Bindings": ["x"]})
    value, shown = artifact(path)
    assert (value["precision"], value["convolutions"], value["in_and_out"], value["adds_fused"]) == ("int8", 2, 1, 1)
    assert value["fp32"] == ["layer1.0.conv3 + layer1.0.add + layer1.0.relu3", "[avgpool]"]
    lines = text(shown).splitlines()
    assert lines[:3] == [
        str(path),
        "1 of 2 convolutions INT8 in and out; 1 of 1 residual add fused; 0 reformats; "
        "FP32: layer1.0.conv3 + layer1.0.add + layer1.0.relu3, [avgpool]",
        "convolutions INT8 in only: layer1.0.conv3 + layer1.0.add + layer1.0.relu3",
    ]
    assert [line.split("  ")[0] for line in lines[4:]] == [
        "layer",
        "conv1 + relu",
        "layer1.0.conv3 + layer1.0.add + layer1.0.relu3",
        "[avgpool]",
    ]
    to_json(value)


def test_a_profile_puts_the_slowest_layer_first(tmp_path: Path) -> None:
    path, profile = written(tmp_path / "layers.json", layers()), written(tmp_path / "profile.json", PROFILE)
    value, shown = artifact(path, profile)
    assert value["total_ms"] == 1
    rows = text(shown).splitlines()
    assert "1.000 ms in all layers, one after the other" in rows
    table = [line.split("  ") for line in rows[rows.index("") + 1 :]]
    assert [[cell.strip() for cell in row if cell] for row in table] == [
        ["layer", "kind", "in -> out", "ms", "%"],
        ["[avgpool]", "pooling", "FP32 -> FP32", "0.750", "75.0"],
        ["conv1 + relu", "convolution", "INT8 -> INT8", "0.250", "25.0"],
        ["layer1.0.conv3 + layer1.0.add + layer1.0.relu3", "convolution, add", "INT8 -> FP32"],
    ]


def test_a_profile_is_read_from_the_median_of_each_layer(tmp_path: Path) -> None:
    path, profile = written(tmp_path / "layers.json", ["a", "b"]), written(tmp_path / "p.json", PROFILE[:2])
    value, shown = artifact(path, profile)
    assert value["total_ms"] == 0.25
    assert [row["name"] for row in value["layers"]] == ["a", "b", "conv1.weight + conv1 + relu"]
    assert "the plan holds the names of its layers, not what they run in" in text(shown)
    assert text(shown).count("not known") == 3


@pytest.mark.parametrize("timed", [False, True])
def test_an_audit_fits_80_columns(tmp_path: Path, timed: bool) -> None:
    wide = layers()
    wide[1]["Inputs"][1]["Format/Datatype"] = "Channel major FP16 format where channel % 8 == 0"
    wide[1]["Name"] = " + ".join(f"layer1.{i}.conv1" for i in range(9))
    path, profile = written(tmp_path / "layers.json", wide), written(tmp_path / "profile.json", PROFILE)
    lines = text(artifact(path, profile if timed else None)[1], 80).splitlines()
    table = lines[lines.index("") + 1 :]
    assert len(table) == 4  # no row goes on below itself
    assert max(map(len, lines)) <= 80
    assert all(line == line.rstrip() for line in lines)
    (long,) = (line for line in table if "…" in line)
    assert "…  convolution, add  INT8,FP16 -> FP32" in long


@pytest.fixture
def examined(engine: Engine) -> Path:
    """An engine with what was written down of its layers when it was built."""
    kept = {"sha256": engine.record["sha256"], "layers": layers(), "times_ms": {"[avgpool]": 0.5}}
    return written(engine.path.parent / "layers.json", {**kept, "convolutions": 53, "residuals": 16})


def test_an_engine_whose_layers_are_known_shows_its_audit(engine: Engine, examined: Path) -> None:
    value, shown = artifact(engine.path.parent)
    assert {k: v for k, v in value.items() if k != "audit"} == engine.record
    found = value["audit"]
    assert (found["precision"], found["graph_convolutions"], found["graph_adds"]) == ("fp32", 53, 16)
    assert (found["in_and_out"], found["total_ms"]) == (0, 0.5)
    lines = text(shown).splitlines()
    assert lines[0] == f"engine {engine.path.parent}"
    assert any(line.split() == ["sha256", engine.record["sha256"]] for line in lines)
    assert "fusion" not in lines
    assert lines[lines.index("fused to") + 1].startswith("0 of 53 convolutions FP32 in and out; 1 of 16 residual adds")
    to_json(value)


def test_a_profile_goes_before_what_was_measured_at_the_build(engine: Engine, examined: Path, tmp_path: Path) -> None:
    profile = written(tmp_path / "profile.json", PROFILE)
    assert artifact(engine.path.parent, profile)[0]["audit"]["total_ms"] == 1


def test_layers_of_another_engine_are_refused(engine: Engine, examined: Path) -> None:
    kept = json.loads(examined.read_text())
    written(examined, {**kept, "sha256": "0" * 64})
    with pytest.raises(StaleError, match="is of another engine"):
        artifact(engine.path.parent)
    del kept["sha256"]
    written(examined, kept)
    assert "audit" in artifact(engine.path.parent)[0]


@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"layers": ["a"], "times_ms": 1}'])
def test_damaged_layers_of_an_engine_are_refused(engine: Engine, examined: Path, content: str) -> None:
    examined.write_text(content)
    with pytest.raises(InputError, match="layers"):
        artifact(engine.path.parent)


def test_a_profile_without_layers_is_wrong_usage(
    engine: Engine, tiny_path: Path, table_path: Path, tmp_path: Path
) -> None:
    profile = written(tmp_path / "profile.json", PROFILE)
    for path in (tiny_path, table_path, tmp_path / "none"):
        with pytest.raises(UsageError, match="has no layers that a profile belongs to"):
            artifact(path, profile)
    with pytest.raises(UsageError, match=r"the layers of .* are not known") as error:
        artifact(engine.path.parent, profile)
    assert "layers.json" in error.value.evidence


def test_what_is_no_profile_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "layers.json", layers())
    with pytest.raises(InputError, match=r"layers\.json holds no times of layers"):
        artifact(path, path)
    with pytest.raises(InputError, match=r"cannot read .*none\.json"):
        artifact(path, tmp_path / "none.json")
    with pytest.raises(InputError, match=r"profile\.json holds no layers"):
        artifact(written(tmp_path / "profile.json", PROFILE))
