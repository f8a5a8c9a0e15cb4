"""Samples have the shape of what TensorRT and trtexec write, in both dialects of the engine inspector."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgeres.engine_layers import Layer, label, raw_layers, read, read_file, read_kept, read_times
from edgeres.errors import InputError
from edgeres.files import to_json
from edgeres.fusion import Audit, audit, lowest

OLD = {
    "int8": "Thirty-two wide channel vectorized row major Int8 format",
    "fp16": "Channel major FP16 format where channel % 8 == 0",
    "fp32": "Row major linear FP32",
    "int32": "Row major linear Int32",
    "?": "N/A due to dynamic shapes",
}
NEW = {"int8": "Int8", "fp16": "Half", "fp32": "Float", "int32": "Int32"}
SHAPE = [1, 64, 56, 56]


class Graph:
    """Layers one after the other, as the inspector writes them. ``new`` is the dialect of TensorRT 11."""

    def __init__(self, new: bool = False) -> None:
        self.new, self.layers, self.last = new, list[Any](), ("input", "fp32")

    def tensor(self, name: str, kind: str, shape: list[int] | None = None) -> dict[str, Any]:
        out: dict[str, Any] = {"Name": name, "Location": "Device", "Dimensions": shape or SHAPE}
        if self.new:
            return {**out, "Datatype": NEW[kind], "Format": "an FP32 layout that says nothing (kLINEAR)"}
        return {**out, "Format/Datatype": OLD[kind]}

    def add(
        self, name: str, layer: str, writes: str, second: tuple[str, str] | None = None, out: str = "", **more: Any
    ) -> Graph:
        """A layer that reads what the one before wrote, and ``second`` besides; it writes a tensor ``out``."""
        inputs = [self.tensor(*t) for t in (self.last, second) if t]
        self.last = (out or f"{name}.out", writes)
        parts = {"Name": name, "LayerType": layer, "Inputs": inputs, "Outputs": [self.tensor(*self.last)]}
        self.layers.append({**parts, **more})
        return self

    def conv(self, name: str, writes: str = "int8", second: tuple[str, str] | None = None, **more: Any) -> Graph:
        full = f"{name.split(' ')[0]}.weight + {name.split(' ')[0]}.weight.q + {name}"
        return self.add(full, "CaskConvolution", writes, second, ParameterType="Convolution", **more)


def network(new: bool = False) -> Graph:
    """Two bottlenecks, all that can be in INT8: 8 convolutions, 2 residual adds."""
    g = Graph(new).add("input.q", "Reformat", "int8", ParameterType="Reformat", Origin="QDQ")
    g.conv("conv1 + relu").add("maxpool", "CaskPooling", "int8", out="pooled", ParameterType="Pooling")
    g.conv("layer1.0.downsample.0")
    short, g.last = g.last, ("pooled", "int8")
    g.conv("layer1.0.conv1 + layer1.0.relu1").conv("layer1.0.conv2 + layer1.0.relu2")
    g.conv("layer1.0.conv3 + layer1.0.add + layer1.0.relu3", second=short)
    short = g.last
    g.conv("layer1.1.conv1 + layer1.1.relu1").conv("layer1.1.conv2 + layer1.1.relu2")
    g.conv("layer1.1.conv3 + layer1.1.add + layer1.1.relu3", second=short)
    g.add("Reformatting CopyNode for Input Tensor 0 to avgpool", "Reformat", "int8", Origin="REFORMAT")
    g.add("avgpool", "CudaPooling", "int8", ParameterType="Pooling")
    g.conv("fc + fc.bias + (Unnamed Layer* 9) [Shuffle] + unsqueeze_node_after_fc.bias", "fp32")
    return g.add("copied_squeeze_after_fc", "NoOp", "fp32")


def one(layer: Any, **options: Any) -> Layer:
    """What ``layer`` alone is read as."""
    return read([layer], **options)[0]


@pytest.mark.parametrize("new", [False, True])
def test_both_dialects_tell_the_same(new: bool) -> None:
    found = audit(network(new).layers, "int8", convolutions=8, residuals=2)
    assert (found.convolutions, found.in_and_out, found.in_only, found.other) == (8, 8, [], {})
    assert (found.adds_fused, found.adds_own, found.fp32) == (2, [], [])
    assert (found.reformats, found.quantizers) == (["avgpool (input 0)"], ["input.q"])
    assert (found.dla, found.gpu, found.by_name, found.total_ms) == ([], 13, 0, None)
    assert found.summary() == [
        "8 of 8 convolutions INT8 in and out; 2 of 2 residual adds fused; 1 reformat; FP32: none",
        "1 Q/DQ layer fused into nothing: input.q",
    ]
    assert [la.kind for la in found.layers if la.name.startswith("fc")] == ["fully connected"]
    assert found.layers[-1].kind == "no-op"
    to_json(found.to_json())


def test_without_numbers_of_the_graph_those_of_the_engine_stand() -> None:
    assert audit(network().layers, "int8").summary()[0].startswith("8 of 8 convolutions")
    assert "2 of 2 residual adds" in audit(network().layers, "int8").summary()[0]


def test_numbers_that_differ_from_the_graph_are_said() -> None:
    found = audit(network().layers, "int8", convolutions=9, residuals=4)
    assert found.summary()[0].startswith("8 of 9 convolutions INT8 in and out; 2 of 4 residual adds fused")
    assert "the engine shows 8 convolutions, the graph has 9" in found.summary()
    assert "the engine shows 2 residual adds, the graph has 4" in found.summary()


def test_convolutions_that_were_merged_count_each() -> None:
    g = Graph().conv("a || b.weight + b.weight.q + b", "int8")
    g.last = ("x", "int8")
    found = audit(g.conv("c.weight + c || d + relu", "fp16").layers, "int8")
    assert (found.convolutions, found.in_only, found.other) == (4, ["c", "d + relu"], {"fp32": ["a", "b"]})
    assert audit(Graph().conv("a || b", "fp32").layers, "fp32").in_and_out == 2


def test_convolutions_are_sorted_by_what_they_read_and_write() -> None:
    g = Graph()
    for name, reads, writes in (
        ("a", "int8", "int8"),
        ("b", "int8", "fp16"),
        ("c", "fp16", "int8"),
        ("d", "fp32", "fp32"),
    ):
        g.last = (name, reads)
        g.conv(name, writes)
    g.last = ("e", "int8")
    g.conv("e", "int8", second=("r", "fp16"))  # the residual costs twice the traffic
    found = audit(g.layers, "int8")
    assert (found.in_and_out, found.in_only, found.other) == (1, ["b", "e"], {"fp16": ["c"], "fp32": ["d"]})
    assert found.summary()[1:4] == [
        "convolutions INT8 in only: b, e",
        "convolutions in FP16: c",
        "convolutions in FP32: d",
    ]
    assert found.layers[4].types == "INT8,FP16 -> INT8"
    half = audit(g.layers, "fp16")
    assert (half.in_and_out, half.in_only, list(half.other)) == (0, ["c"], ["fp32", "int8"])


def test_long_lists_are_cut_and_long_names_elided() -> None:
    g = Graph()
    for name in ("a" * 60, "b", "c", "d", "e"):
        g.last = (name, "int8")
        g.conv(name, "fp16")
    line = audit(g.layers, "int8").summary()[1]
    assert line == f"convolutions INT8 in only: {'a' * 24}…{'a' * 25}, b, c and 2 more"


@pytest.mark.parametrize(
    ("name", "kind", "more", "expected"),
    [
        ("add", "ElementWise", {"ParameterType": "ElementWise", "ElementWiseOperation": "SUM"}, "add"),
        ("x", "ElementWise", {"ElementWiseOperation": "SUM"}, "add"),
        ("PWN(x, relu)", "PointWiseV2", {"Operations": ["const auto v = pwgen::iPlus(arg0, arg1);"]}, "add"),
        ("__myl_CastAddMax_fused", "kgen", {}, "add"),
        ("__myl_Fused", "kgen", {"Metadata": "[ONNX Layer: layer1.0.add]\x1e[ONNX Layer: layer1.0.relu3]"}, "add"),
        ("x", "ElementWise", {"ElementWiseOperation": "PROD"}, "ElementWise"),
        ("concat", "Concatenation", {}, "Concatenation"),
    ],
)
def test_a_residual_add_of_its_own_is_told_from_other_layers(
    name: str, kind: str, more: dict[str, Any], expected: str
) -> None:
    layers = Graph().add(name, kind, "fp16", second=("short", "fp16"), **more).layers
    assert one(layers[0]).kind == expected
    assert audit(layers, "fp16").adds_own == ([name] if expected == "add" else [])


def test_an_add_of_a_bias_is_no_residual_add() -> None:
    (layer,) = Graph().add("fc bias add", "ElementWise", "fp32", second=("bias", "fp32")).layers
    layer["Inputs"][1]["Dimensions"] = [1, 64, 1, 1]
    assert one(layer).kind == "ElementWise"
    (layer,) = Graph().add("add", "ElementWise", "fp32").layers
    assert one(layer).kind == "ElementWise"


def test_a_second_input_of_another_shape_is_no_residual() -> None:
    (layer,) = Graph().conv("conv", second=("weights", "int8")).layers
    assert one(layer).kind == "convolution, add"
    layer["Inputs"][1]["Dimensions"] = [64, 64, 3, 3]
    assert one(layer).kind == "convolution"
    assert one({**layer, "HasResidual": 1}).kind == "convolution, add"


def test_own_adds_are_named_beside_the_fused() -> None:
    g = network()
    add = Graph().add("layer2.0.add", "ElementWise", "int8", second=("s", "int8"), ElementWiseOperation="SUM").layers
    found = audit([*g.layers, *add], "int8", residuals=3)
    assert (found.adds_fused, found.adds_own) == (2, ["layer2.0.add"])
    assert "2 of 3 residual adds fused" in found.summary()[0]
    assert "residual adds in layers of their own: layer2.0.add" in found.summary()


def test_what_copies_is_told_from_what_costs_nothing() -> None:
    g = Graph().add("Reformatting CopyNode for Input Tensor 1 to a", "NoOp", "fp32")
    g.add("Reformatting CopyNode for Output Tensor 0 to a", "Reformat", "int8", Origin="REFORMAT")
    g.add("a.dq", "Reformat", "fp16", Origin="QDQ").add("b.q", "Reformat", "int8", Origin="QDQ")
    g.add("input_quantize", "Quantize", "int8").add("__myl_QuanRoun", "kgen", "int8")
    found = audit(g.layers, "int8")
    assert (found.reformats, found.gpu) == (["a (output 0)"], 5)
    assert [la.kind for la in found.layers] == ["no-op", "reformat", "dequantize", *["quantize"] * 3]
    assert found.quantizers == ["a.dq", "b.q", "input_quantize", "__myl_QuanRoun"]


def test_fp32_counts_between_layers_and_not_at_the_ends() -> None:
    assert audit(network().layers, "int8").fp32 == []  # reads FP32 images and writes FP32 logits
    g = Graph().conv("a", "fp32").add("again", "NoOp", "fp32").add("pool", "TiledPooling", "fp32")
    g.add("copy", "Reformat", "int8").conv("b", "fp32")
    found = audit(g.layers, "int8")
    assert found.fp32 == ["a", "pool"]  # through the no-op; a copy is counted as such
    assert found.summary()[0].endswith("FP32: a, pool")
    assert audit(g.layers, "fp32").fp32 == []
    assert "FP32:" not in audit(g.layers, "fp32").summary()[0]


def test_a_circle_of_no_ops_ends() -> None:
    g = Graph()
    g.last = ("x", "fp32")
    g.add("a", "NoOp", "fp32", out="y").add("b", "NoOp", "fp32", out="x")
    assert audit(g.layers, "int8").fp32 == []


def test_constants_are_no_work_and_no_input() -> None:
    g = Graph().add("w", "Constant", "fp32", out="w")
    g.last = ("x", "int8")
    found = audit(g.conv("conv", second=("w", "fp32")).layers, "int8")
    assert (found.in_and_out, found.adds_fused, found.gpu, found.fp32) == (1, 0, 1, [])


@pytest.mark.parametrize(
    ("kind", "name", "more", "expected"),
    [
        ("CaskGemmConvolution", "conv3", {}, "convolution"),
        ("ConvActPool", "conv1 + maxpool", {"ConvParameterType": "Convolution"}, "convolution"),
        ("CublasConvolution", "resnet50/predictions/MatMul", {"ParameterType": "Convolution"}, "fully connected"),
        ("CaskConvolution", "Gemm_257", {}, "fully connected"),
        ("CaskDeconvolutionV2", "up", {}, "CaskDeconvolutionV2"),
        ("gemm", "layer1.0.conv1_myl0_3", {}, "convolution"),
        ("gemm", "__myl_Fc", {"Metadata": "[ONNX Layer: fc]"}, "fully connected"),
        ("kgen", "__myl_Fused", {"TacticName": "sm80_xmma_fprop_implicit_gemm_i8i8"}, "convolution"),
        ("CaskGemmMatrixMultiply", "fc", {}, "fully connected"),
        ("CudaSoftMax", "prob", {"ParameterType": "SoftMax"}, "CudaSoftMax"),
    ],
)
def test_layers_are_what_their_kernels_do(kind: str, name: str, more: dict[str, Any], expected: str) -> None:
    assert one(Graph().add(name, kind, "int8", **more).layers[0]).kind == expected


def test_foreign_nodes_are_dla_where_tensors_go_to_and_from_it() -> None:
    node = Graph().add("{ForeignNode[conv1...fc]}", "Myelin", "fp16").layers
    times = {"input to nvm": 0.1, "{ForeignNode[conv1...fc]}": 0.01, "output from nvm": 3.0, "output copy finish": 0.02}
    found = audit(node, "fp16", times, convolutions=53, residuals=16)
    assert (found.dla, found.gpu, found.total_ms) == (["{ForeignNode[conv1...fc]}"], 0, pytest.approx(3.13))
    assert [la.kind for la in found.layers] == ["DLA", "copy", "copy", "copy"]
    assert found.summary()[:4] == [
        "0 of 53 convolutions FP16 in and out; 0 of 16 residual adds fused; 0 reformats; FP32: none",
        "the engine shows 0 convolutions, the graph has 53",
        "the engine shows 0 residual adds, the graph has 16",
        "1 layer on DLA, not shown inside; 0 on the GPU",
    ]
    assert audit(node, "fp16").dla == []  # a graph's worth of GPU kernels
    assert audit(["input to nvm", "{conv1,relu,fc}", "softmax"], "fp16").dla == ["{conv1,relu,fc}"]
    assert one(Graph().add("{ForeignNode[conv1...fc]}", "DLA", "fp16").layers[0]).kind == "DLA"


def test_times_go_to_their_layers_and_the_rest_comes_last() -> None:
    g = Graph().conv("a").add("a", "CaskPooling", "int8").add("a", "NoOp", "int8")
    g.layers[0]["Name"] = "a"
    found = audit(g.layers, "int8", {"a": 0.5, "elsewhere": 0.25})
    assert [(la.name, la.ms) for la in found.layers] == [("a", 0.5), ("a", None), ("a", None), ("elsewhere", 0.25)]
    assert (found.total_ms, found.by_name) == (0.75, 1)
    assert found.summary()[-2:] == ["1 layer known by name only", "0.750 ms in all layers, one after the other"]
    assert audit(g.layers, "int8", {}).total_ms is None


def test_names_alone_say_so() -> None:
    layers = ["Reformatting CopyNode for Input Tensor 0 to conv1", "conv1 + relu", "fc"]
    found = audit(layers, "int8", {"fc": 0.5})
    assert found.summary() == [
        "3 layers, of them at most 1 reformat",
        "the plan holds the names of its layers, not what they run in",
        "0.500 ms in all layers, one after the other",
    ]
    assert found.fusion().operators == {"layer": 3}
    assert found.fusion().notes == found.summary()
    assert [la.types for la in found.layers] == ["", "", ""]


def test_some_names_among_layers_are_counted() -> None:
    found = audit(["elsewhere", *network().layers], "int8")
    assert found.summary()[0].startswith("8 of 8 convolutions")
    assert found.summary()[-1] == "1 layer known by name only"
    assert "layer" not in found.fusion().operators


def test_types_that_depend_on_the_batch_are_unknown() -> None:
    g = Graph()
    g.last = ("x", "?")
    found = audit(g.conv("conv", "?").layers, "int8")
    assert (found.other, found.layers[0].types) == ({"": ["conv"]}, "")
    assert "convolutions of unknown type: conv" in found.summary()


def test_the_record_counts_kernels_by_the_type_they_compute_in() -> None:
    assert audit(network().layers, "int8").fusion().operators == {
        "CaskConvolution int8": 9,
        "CaskPooling int8": 1,
        "CudaPooling int8": 1,
        "Reformat fp32": 1,
        "Reformat int8": 1,
    }


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        (("fp32", "int8", "fp16"), "int8"),
        (("fp32", "fp16"), "fp16"),
        (("fp32",), "fp32"),
        (("int32",), "fp32"),
        (("?",), "fp32"),
    ],
)
def test_the_lowest_precision_is_that_of_convolutions(types: tuple[str, ...], expected: str) -> None:
    g = Graph().add("pool", "Pooling", "int8").add("pool2", "Pooling", "int8")
    for kind in types:
        g.last = (kind, kind)
        g.conv(f"conv {kind}", "fp32")
    assert lowest(g.layers) == expected


def test_the_lowest_precision_without_convolutions_is_that_of_any_layer() -> None:
    g = Graph()
    g.last = ("x", "fp16")
    assert lowest(g.add("pool", "Pooling", "fp16").layers) == "fp16"
    assert lowest(["conv1"]) == "fp32"


def test_layers_come_in_an_object_or_alone() -> None:
    layers = network().layers
    assert raw_layers({"Layers": layers, "Bindings": ["input"]}, "x") == layers
    assert raw_layers({"Layers": ["a", "b"], "I/O Tensors": [{"Name": "input"}]}, "x") == ["a", "b"]
    assert raw_layers(layers, "x") == layers
    assert raw_layers([{"Name": "signal", "LayerType": "signal"}], "x")
    assert one({"Name": "signal"}).type == "?"


def test_layers_of_further_profiles_are_left_out() -> None:
    other = {"Name": "conv1 [profile 1]", "LayerType": "CaskConvolution"}
    assert raw_layers(["conv1", "conv1 [profile 1]", "fc [profile 12]", other], "x") == ["conv1"]


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        {"Layers": []},
        {"layers": ["a"]},
        {"Layers": "a"},
        7,
        None,
        "conv1",
        ["a", 1],
        [{"LayerType": "x"}],
        [{"Name": 1}],
        [{"Name": "a", "Inputs": ["x"]}],
        [{"Name": "a", "Outputs": None}],
        [{"count": 1}, {"name": "a", "medianMs": 1.0}],
    ],
)
def test_what_holds_no_layers_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"x\.json holds no layers of a TensorRT engine") as error:
        raw_layers(value, "x.json")
    assert error.value.evidence.startswith("it is a JSON ")
    assert "--exportLayerInfo" in error.value.hint


def test_times_are_medians_or_else_averages() -> None:
    rows: list[Any] = [{"count": 20}, {"name": "a", "timeMs": 9, "averageMs": 2.0, "medianMs": 1.5, "percentage": 60}]
    rows += [{"name": "b", "timeMs": 20, "averageMs": 1, "percentage": 40}]
    assert read_times(rows, "x") == {"a": 1.5, "b": 1}
    assert read_times([*rows, {"name": "a", "medianMs": 0.5}], "x") == {"a": 2.0, "b": 1}  # two kernels of one name


@pytest.mark.parametrize(
    "value",
    [{}, [], [{"count": 1}], ["a"], [{"name": "a"}], [{"name": "a", "medianMs": "1"}], [{"medianMs": 1.0}], None],
)
def test_what_holds_no_times_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"p\.json holds no times of layers") as error:
        read_times(value, "p.json")
    assert error.value.evidence
    assert "--exportProfile" in error.value.hint


def test_a_file_may_have_control_characters_in_its_strings(tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    path.write_text('{"Layers": [{"Name": "a", "Metadata": "[ONNX Layer: a]\x1e[ONNX Layer: b]"}]}', encoding="utf-8")
    assert raw_layers(read_file(path), "x")[0]["Metadata"] == "[ONNX Layer: a]\x1e[ONNX Layer: b]"


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe"])
def test_a_file_that_is_no_json_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read .*x\.json") as error:
        read_file(tmp_path / "x.json")
    assert error.value.evidence


def test_what_was_kept_of_a_build_comes_back() -> None:
    kept = {"layers": ["a"], "times_ms": {"a": 1}, "convolutions": 53, "residuals": 16}
    assert read_kept(kept, "x") == (["a"], {"a": 1}, 53, 16)
    assert read_kept({"layers": ["a"]}, "x") == (["a"], {}, None, None)


@pytest.mark.parametrize("change", [{"times_ms": [1]}, {"times_ms": {"a": "1"}}, {"residuals": "16"}, {"layers": {}}])
def test_what_was_kept_of_a_build_and_is_damaged_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"x (is damaged|holds no layers)"):
        read_kept({"layers": ["a"], **change}, "x")


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("conv1.weight + conv1.weight.q + conv1 + relu", "conv1 + relu"),
        ("layer1.0.conv1.weight + QuantizeLinear_20 + Conv_22", "Conv_22"),
        ("fc.weight.dq + fc + fc.bias + (Unnamed Layer* 3) [Shuffle] + unsqueeze_node_after_fc.bias", "fc"),
        ("a.weight + a || b.weight + b + relu", "a || b + relu"),
        ("Reformatting CopyNode for Input Tensor 1 to a.weight + a", "a (input 1)"),
        ("Reformatting CopyNode for Output Tensor 0 to a", "a (output 0)"),
        ("input.q", "input.q"),
        ("", ""),
    ],
)
def test_a_label_is_the_name_without_weights(name: str, short: str) -> None:
    assert label(name) == short


def test_an_audit_as_json_has_everything() -> None:
    found = audit(network().layers, "int8", {"maxpool": 0.25}, 8, 2)
    value = json.loads(to_json(found.to_json()))
    assert value["summary"] == found.summary()
    assert {*value} == {"summary", *Audit.__dataclass_fields__}
    assert value["layers"][2] == {
        "name": "maxpool",
        "type": "CaskPooling",
        "kind": "pooling",
        "reads": ["int8"],
        "writes": ["int8"],
        "fp32": False,
        "ms": 0.25,
    }


def test_reading_layers_takes_nothing_but_the_standard_library() -> None:
    code = "import sys, edgeres.fusion; print(*{m.partition('.')[0] for m in sys.modules} & {'numpy', 'rich', 'onnx'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
