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


def residual(shortcut: list[Any], inputs: list[str]) -> Any:
    """Convolutions "a" and "b", one after the other, and the Add "sum" of ``inputs``; ``shortcut`` comes before."""
    nodes = [
        *shortcut,
        helper.make_node("Conv", [graph.INPUT, "w"], ["a"], name="a"),
        helper.make_node("Relu", ["a"], ["r"], name="r"),
        helper.make_node("Conv", ["r", "w"], ["b"], name="b"),
        helper.make_node("Add", inputs, ["sum"], name="sum"),
        helper.make_node("Relu", ["sum"], [graph.OUTPUT], name="last"),
    ]
    ends = [helper.make_tensor_value_info(name, 1, ["N", 2, 4, 4]) for name in (graph.INPUT, graph.OUTPUT)]
    weight = numpy_helper.from_array(np.ones((2, 2, 1, 1), np.float32), "w")
    return helper.make_model(helper.make_graph(nodes, "residual", ends[:1], ends[1:], [weight]))


def main_branch(model: Any) -> str | None:
    return graph.main_branch(model, next(n for n in model.graph.node if n.name == "sum"))


@pytest.mark.parametrize("order", [1, -1])
def test_the_main_branch_comes_bare_from_a_convolution(order: int) -> None:
    assert main_branch(residual([], ["b", graph.INPUT][::order])) == "b"
    relu = helper.make_node("Relu", [graph.INPUT], ["s"])
    assert main_branch(residual([relu], ["s", "b"][::order])) == "b"


@pytest.mark.parametrize("order", [1, -1])
def test_the_longer_of_two_branches_is_the_main_one(order: int) -> None:
    side = helper.make_node("Conv", [graph.INPUT, "w"], ["s"])
    assert main_branch(residual([side], ["s", "b"][::order])) == "b"
    longer = [
        helper.make_node("Conv", [graph.INPUT, "w"], ["s1"]),
        helper.make_node("Conv", ["s1", "w"], ["s2"]),
        helper.make_node("Conv", ["s2", "w"], ["s"]),
    ]
    assert main_branch(residual(longer, ["s", "b"][::order])) == "s"


def test_an_add_without_a_bare_convolution_has_no_main_branch() -> None:
    assert main_branch(residual([], ["r", graph.INPUT])) is None


def test_what_others_read_too_is_no_main_branch() -> None:
    model = residual([], ["b", graph.INPUT])
    model.graph.node.append(helper.make_node("Neg", ["b"], ["other"]))
    assert main_branch(model) is None


def test_nodes_without_inputs_and_inputs_left_out_do_not_matter() -> None:
    constant = helper.make_node("Constant", [], ["most"], value=numpy_helper.from_array(np.float32(6)))
    clip = helper.make_node("Clip", [graph.INPUT, "", "most"], ["s"])
    assert main_branch(residual([constant, clip], ["s", "b"])) == "b"


def test_the_main_branches_of_a_resnet_are_its_last_convolutions(tiny: Any) -> None:
    found = [graph.main_branch(tiny, n) for n in tiny.graph.node if n.op_type == "Add"]
    assert found == [f"{b}.conv3" for b in BLOCKS]


@pytest.mark.parametrize(("opset", "became", "ir"), [(13, 17, 8), (17, 17, 8), (19, 19, 9), (21, 21, 10)])
def test_the_opset_is_raised_and_never_lowered(tiny: Any, opset: int, became: int, ir: int) -> None:
    tiny.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    graph.raise_opset(tiny, opset)
    assert [(o.domain, o.version) for o in tiny.opset_import] == [("", became), ("com.microsoft", 1)]
    assert tiny.ir_version == ir


@pytest.mark.parametrize("opset", [13, 19, 21, 22])
def test_a_raised_model_is_valid_and_computes_the_same(opset: int) -> None:
    nodes = [helper.make_node("Relu", [graph.INPUT], [graph.OUTPUT], name="r")]
    model = small(nodes)
    graph.raise_opset(model, opset)
    onnx.checker.check_model(model, full_check=True)
    assert model.graph == small(nodes).graph


def test_an_ir_newer_than_needed_stays(tiny: Any) -> None:
    tiny.ir_version = 10
    graph.raise_opset(tiny, 19)
    assert tiny.ir_version == 10
