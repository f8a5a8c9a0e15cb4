from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgeres import graph
from edgeres.errors import InputError

BLOCKS = [f"layer{stage}.{block}" for stage in (1, 2) for block in (0, 1)]


@pytest.fixture
def tiny(tiny_path: Path) -> Any:
    return graph.load(tiny_path)


def small(nodes: list[Any], outputs: tuple[str, ...] = (graph.OUTPUT,)) -> Any:
    """Elementwise ``nodes`` on an input of (N, 2)."""
    ends = [helper.make_tensor_value_info(name, 1, ["N", 2]) for name in outputs]
    body = helper.make_graph(nodes, "small", [helper.make_tensor_value_info(graph.INPUT, 1, ["N", 2])], ends)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_saved_model_loads_as_it_was(tiny: Any, tmp_path: Path) -> None:
    graph.save(tiny, tmp_path / "new" / "copy.onnx")
    copy = graph.load(tmp_path / "new" / "copy.onnx")
    assert copy == tiny
    assert graph.digest(copy) == graph.digest(tiny)


def test_an_invalid_model_is_not_written(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"what was there")
    tiny.graph.node[3].op_type = "Convolute"
    with pytest.raises(onnx.checker.ValidationError):
        graph.save(tiny, path)
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_loading_what_is_not_there_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no ONNX file") as caught:
        graph.load(tmp_path / "none.onnx")
    assert "export" in caught.value.hint


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped"])
def test_a_damaged_file_is_refused_by_name(tiny_path: Path, tmp_path: Path, damage: str) -> None:
    whole = tiny_path.read_bytes()
    path = tmp_path / "damaged.onnx"
    path.write_bytes({"cut": whole[:-100], "empty": b"", "text": b"not a model", "flipped": whole[::-1]}[damage])
    with pytest.raises(InputError, match=r"damaged\.onnx is not a valid ONNX file") as caught:
        graph.load(path)
    assert caught.value.evidence


def test_the_digest_is_of_what_is_computed_not_of_the_metadata(tiny: Any) -> None:
    before = graph.digest(tiny)
    graph.set_metadata(tiny, {"precision": "fp32", "parity": 123.4})
    tiny.producer_version = "another"
    assert graph.digest(tiny) == before


@pytest.mark.parametrize("change", ["weight", "attribute", "opset"])
def test_the_digest_sees_every_change_of_what_is_computed(tiny: Any, change: str) -> None:
    before = graph.digest(tiny)
    if change == "weight":
        values = numpy_helper.to_array(tiny.graph.initializer[0]).copy()
        values.flat[0] = np.nextafter(values.flat[0], np.float32(9))
        tiny.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, tiny.graph.initializer[0].name))
    elif change == "attribute":
        next(a for a in tiny.graph.node[0].attribute if a.name == "strides").ints[0] += 1
    else:
        tiny.opset_import[0].version += 1
    assert graph.digest(tiny) != before


def test_metadata_is_replaced_and_that_of_others_kept(tiny: Any) -> None:
    tiny.metadata_props.add(key="author", value="someone")
    graph.set_metadata(tiny, {"a": 1})
    graph.set_metadata(tiny, {"b": [2.5, None]})
    assert graph.metadata(tiny) == {"b": [2.5, None]}
    assert [(e.key, e.value) for e in tiny.metadata_props if e.key != "edgeres"] == [("author", "someone")]


def test_normal_form_gives_the_record(tiny: Any, tiny_path: Path) -> None:
    record = graph.normal_form(tiny, tiny_path)
    assert record["precision"] == "fp32"
    assert record["variant"] == "v1.5"


@pytest.mark.parametrize(
    ("change", "seen"), [("precision", "precision int8"), ("metadata", "not recorded"), ("input", "inputs .'data'.")]
)
def test_what_is_not_in_normal_form_is_refused_with_what_was_seen(tiny: Any, change: str, seen: str) -> None:
    if change == "precision":
        graph.set_metadata(tiny, {**graph.metadata(tiny), "precision": "int8"})
    elif change == "metadata":
        del tiny.metadata_props[:]
    else:
        tiny.graph.input[0].name = "data"
    with pytest.raises(InputError, match=seen):
        graph.normal_form(tiny, Path("m.onnx"))


def test_only_what_an_int8_executor_holds_is_measured(tiny: Any) -> None:
    inside = [f"{b}.{t}" for b in BLOCKS for t in ("relu1", "relu2", "conv3", "relu3")]
    names = {graph.INPUT, "relu", "maxpool", "avgpool", *inside, "layer1.0.downsample.0", "layer2.0.downsample.0"}
    assert set(graph.activations(tiny)) == names


def test_activations_come_in_graph_order_and_once(tiny: Any) -> None:
    order = [graph.INPUT, *(out for node in tiny.graph.node for out in node.output)]
    names = graph.activations(tiny)
    assert names == sorted(set(names), key=order.index)


def test_nothing_between_a_producer_and_its_relu_no_flatten_and_no_logits(tiny: Any) -> None:
    names = set(graph.activations(tiny))
    for node in tiny.graph.node:
        if node.op_type == "Relu":
            assert node.input[0] not in names
        if node.op_type == "Flatten":
            assert node.output[0] not in names
    assert graph.OUTPUT not in names


def test_what_a_relu_and_another_node_read_is_measured() -> None:
    nodes = [
        helper.make_node("Neg", [graph.INPUT], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Add", ["a", "b"], [graph.OUTPUT]),
    ]
    assert graph.activations(small(nodes)) == [graph.INPUT, "a", "b"]


def test_what_nobody_reads_is_not_measured() -> None:
    nodes = [helper.make_node("Neg", [graph.INPUT], ["unused"]), helper.make_node("Abs", [graph.INPUT], [graph.OUTPUT])]
    assert graph.activations(small(nodes)) == [graph.INPUT]


def test_consumers_lists_every_reader_in_order() -> None:
    nodes = [
        helper.make_node("Neg", [graph.INPUT], ["a"], name="first"),
        helper.make_node("Add", ["a", graph.INPUT], [graph.OUTPUT], name="second"),
    ]
    readers = {name: [n.name for n in found] for name, found in graph.consumers(small(nodes)).items()}
    assert readers == {graph.INPUT: ["first", "second"], "a": ["second"]}


def test_operators_are_counted_most_frequent_first(tiny: Any) -> None:
    counts = graph.count_ops(tiny)
    assert list(counts) == ["Conv", "Relu", "Add", "Flatten", "Gemm", "GlobalAveragePool", "MaxPool"]
    assert list(counts.values()) == [15, 13, 4, 1, 1, 1, 1]


def test_initializers_are_arrays_by_name(tiny: Any) -> None:
    constants = graph.initializers(tiny)
    assert constants["conv1.weight"].shape == (8, 3, 7, 7)
    assert len(constants) == 2 * 16
