from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import CLASSES, pytorch, tiny_resnet
from torch import nn

from edgeres import export, graph
from edgeres.errors import BuildError, InputError
from edgeres.export import export_onnx, fold, trace
from edgeres.model import ResNet, resnet50
from edgeres.recipe import Preprocess

SIZE = 32
RECORD = {"variant": "v1.5", "weights": {"source": "tiny.pth", "sha256": "0" * 64}}


def noise(n: int, seed: int = 11, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 3, size, size), dtype=np.float32)


def session(model: Any) -> onnxruntime.InferenceSession:
    content = model if isinstance(model, bytes) else model.SerializeToString()
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def run(model: Any, images: np.ndarray) -> np.ndarray:
    return session(model).run(None, {"input": images})[0]


def written(path: Path) -> Any:
    return onnx.load(path)


# what is in the file


# opset -> the first IR version that may carry it, from ONNX's table of releases (1.8, 1.12, 1.14, 1.16)
@pytest.mark.parametrize(("opset", "ir_version"), [(13, 7), (17, 8), (19, 9), (21, 10)])
def test_opset_is_the_one_asked_for_in_the_oldest_ir_and_runs(
    tmp_path: Path, preprocess: Preprocess, opset: int, ir_version: int
) -> None:
    model = tiny_resnet()
    graph.save(export_onnx(model, preprocess, {}, opset=opset), tmp_path / "a.onnx")
    proto = written(tmp_path / "a.onnx")
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", opset)]
    assert proto.ir_version == ir_version
    assert graph.metadata(proto)["opset"] == opset
    onnx.checker.check_model(proto, full_check=True)
    np.testing.assert_allclose(run(proto, noise(3)), pytorch(model, noise(3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride_on", ["1x1", "3x3"])
def test_batch_norm_is_folded_and_the_rest_is_there(stride_on: str) -> None:
    proto = trace(tiny_resnet(stride_on), SIZE, 17, None)
    assert graph.count_ops(proto) == {
        "Conv": 15,
        "Relu": 13,
        "Add": 4,
        "Flatten": 1,
        "Gemm": 1,
        "GlobalAveragePool": 1,
        "MaxPool": 1,
    }


def test_the_full_network_keeps_its_layers_and_names() -> None:
    model = resnet50("v1.5")
    proto = trace(model, 224, 17, None)
    counts = {"Conv": 53, "Relu": 49, "Add": 16, "MaxPool": 1, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1}
    assert graph.count_ops(proto) == counts
    named = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.ReLU | nn.MaxPool2d)}
    assert {n.name for n in proto.graph.node if n.op_type in ("Conv", "Gemm", "Relu", "MaxPool")} == named
    assert {"layer3.5.add", "avgpool", "flatten"} < {n.name for n in proto.graph.node}
    shapes = {t.name: tuple(t.dims) for t in proto.graph.initializer}
    assert len(shapes) == 2 * 54
    assert shapes["layer4.0.downsample.0.weight"] == (2048, 1024, 1, 1)
    assert shapes["layer4.0.downsample.0.bias"] == (2048,)
    assert shapes["fc.weight"] == (1000, 2048)
    assert sum(math.prod(s) for s in shapes.values()) == 25_557_032 - 26_560  # a bias where each norm had two


def test_nodes_and_tensors_are_named_as_in_pytorch_and_once() -> None:
    proto = trace(tiny_resnet(), SIZE, 17, None)
    names = [n.name for n in proto.graph.node]
    assert len(set(names)) == len(names)
    modules = dict(tiny_resnet().named_modules())
    assert [n for n in names if n not in modules] == [*(f"layer{i}.{j}.add" for i in (1, 2) for j in (0, 1)), "flatten"]
    assert all(n.output[0] == n.name for n in proto.graph.node[:-1])
    assert {t.name for t in proto.graph.initializer} == {
        f"{n.name}.{part}" for n in proto.graph.node if n.op_type in ("Conv", "Gemm") for part in ("weight", "bias")
    }


@pytest.mark.parametrize("stride_on", ["1x1", "3x3"])
def test_strides_are_where_the_variant_has_them(stride_on: str) -> None:
    proto = trace(tiny_resnet(stride_on), SIZE, 17, None)
    found = {
        n.name
        for n in proto.graph.node
        for a in n.attribute
        if n.op_type == "Conv" and a.name == "strides" and list(a.ints) == [2, 2]
    }
    assert found == {"conv1", "layer2.0.downsample.0", "layer2.0.conv1" if stride_on == "1x1" else "layer2.0.conv2"}


def io(proto: Any) -> list[tuple[str, int, list[Any]]]:
    return [
        (v.name, v.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
        for v in (*proto.graph.input, *proto.graph.output)
    ]


@pytest.mark.parametrize(("batch", "first"), [(None, "N"), (1, 1), (3, 3)])
def test_input_and_output_have_names_and_shapes(preprocess: Preprocess, batch: int | None, first: int | str) -> None:
    proto = export_onnx(tiny_resnet(), preprocess, {}, batch=batch)
    assert io(proto) == [("input", 1, [first, 3, SIZE, SIZE]), ("logits", 1, [first, CLASSES])]
    assert graph.metadata(proto)["batch"] == batch


def test_a_dynamic_batch_takes_any_number_and_images_do_not_mix(tiny_path: Path) -> None:
    images = noise(5)
    together = run(tiny_path.read_bytes(), images)
    assert together.shape == (5, CLASSES)
    for i in range(5):
        np.testing.assert_allclose(run(tiny_path.read_bytes(), images[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5)


def test_a_fixed_batch_takes_no_other(preprocess: Preprocess) -> None:
    model = tiny_resnet()
    fixed = session(export_onnx(model, preprocess, {}, batch=2))
    found = fixed.run(None, {"input": noise(2)})[0]
    np.testing.assert_allclose(found, pytorch(model, noise(2)), rtol=1e-4, atol=1e-5)
    for n in (1, 3):
        with pytest.raises(Exception, match="Got invalid dimensions") as error:
            fixed.run(None, {"input": noise(n)})
        assert type(error.value).__name__ == "InvalidArgument"


def test_the_input_size_is_the_crop() -> None:
    model = tiny_resnet()
    proto = export_onnx(model, Preprocess(crop=45), {})
    np.testing.assert_allclose(run(proto, noise(2, size=45)), pytorch(model, noise(2, size=45)), rtol=1e-4, atol=1e-5)


def test_everything_is_in_one_file(tmp_path: Path, preprocess: Preprocess) -> None:
    graph.save(export_onnx(tiny_resnet(), preprocess, RECORD), tmp_path / "out" / "a.onnx")
    assert os.listdir(tmp_path / "out") == ["a.onnx"]
    proto = onnx.load(tmp_path / "out" / "a.onnx", load_external_data=False)
    assert all(not t.external_data for t in proto.graph.initializer)
    assert all(t.data_type == onnx.TensorProto.FLOAT for t in proto.graph.initializer)


# what it computes


@pytest.mark.parametrize("stride_on", ["1x1", "3x3"])
def test_logits_are_those_of_pytorchs_own_exporter(tmp_path: Path, preprocess: Preprocess, stride_on: str) -> None:
    model = tiny_resnet(stride_on)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and good as a witness
        torch.onnx.export(
            model, (torch.zeros(4, 3, SIZE, SIZE),), tmp_path / "theirs.onnx", dynamo=False, input_names=["input"]
        )
    theirs = run((tmp_path / "theirs.onnx").read_bytes(), noise(4))
    ours = run(export_onnx(model, preprocess, {}), noise(4))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_folding_computes_what_convolution_and_norm_compute() -> None:
    torch.manual_seed(3)
    conv, norm = nn.Conv2d(3, 5, 3, bias=True), nn.BatchNorm2d(5, eps=1e-3)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)  # type: ignore[arg-type]
    nn.init.uniform_(norm.running_var, 0.01, 3)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        expected = norm.eval()(conv(x))
        weight, bias = (torch.from_numpy(a) for a in fold(conv, norm))
        torch.testing.assert_close(nn.functional.conv2d(x, weight, bias), expected, rtol=1e-4, atol=1e-5)
        weight, bias = (torch.from_numpy(a) for a in fold(conv, None))
        assert torch.equal(weight, conv.weight)
        assert torch.equal(bias, conv.bias)


def test_batch_norm_is_frozen_even_in_a_model_left_training(preprocess: Preprocess) -> None:
    model = tiny_resnet().train()
    before = model.bn1.running_mean.clone()
    proto = export_onnx(model, preprocess, {})
    assert torch.equal(model.bn1.running_mean, before)
    np.testing.assert_allclose(run(proto, noise(2)), pytorch(tiny_resnet(), noise(2)), rtol=1e-4, atol=1e-5)


# parity


def test_parity_is_measured_on_random_images_and_on_none_given(tiny_path: Path) -> None:
    parity = graph.metadata(written(tiny_path))["parity"]
    assert parity["images"] is None
    assert parity["random"]["images"] == 8
    assert 0 <= parity["random"]["max_abs"] < 1e-4
    assert parity["random"]["db"] is None or parity["random"]["db"] > 100


def test_parity_on_given_images_is_what_it_says(preprocess: Preprocess) -> None:
    model, batches = tiny_resnet(), [noise(4, 1), noise(3, 2)]
    proto = export_onnx(model, preprocess, {}, images=batches)
    parity = graph.metadata(proto)["parity"]["images"]
    expected = np.concatenate([pytorch(model, b) for b in batches]).astype(float)
    error = np.concatenate([run(proto, b) for b in batches]) - expected
    assert parity["images"] == 7
    assert parity["max_abs"] == pytest.approx(np.abs(error).max())
    assert parity["db"] == pytest.approx(10 * math.log10((expected**2).sum() / (error**2).sum()), rel=1e-6)


def corrupted(change: Callable[[np.ndarray, np.ndarray], None]) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    def wrong(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[np.ndarray, np.ndarray]:
        weight, bias = fold(conv, norm)
        if conv.in_channels == 3:
            change(weight, bias)
        return weight, bias

    return wrong


def shift(_weight: np.ndarray, bias: np.ndarray) -> None:
    bias[0] += 0.05


def not_a_number(weight: np.ndarray, _bias: np.ndarray) -> None:
    weight[0, 0, 0, 0] = np.nan


@pytest.mark.parametrize("change", [shift, not_a_number])
def test_a_wrong_weight_is_found_by_parity(
    preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch, change: Callable[[np.ndarray, np.ndarray], None]
) -> None:
    monkeypatch.setattr(export, "fold", corrupted(change))
    with pytest.raises(BuildError, match=r"does not compute what PyTorch computes: .* dB on random") as error:
        export_onnx(tiny_resnet(), preprocess, {})
    assert "over 8 images" in error.value.evidence
    assert "80 dB" in error.value.hint


def test_a_wrong_stride_is_found_by_parity(preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tiny_resnet("1x1")
    proto = trace(other, SIZE, 17, None)
    monkeypatch.setattr(export, "trace", lambda *_: proto)
    with pytest.raises(BuildError, match="does not compute what PyTorch computes"):
        export_onnx(tiny_resnet("3x3"), preprocess, {})


def test_images_count_for_themselves(preprocess: Preprocess) -> None:
    images = noise(2)
    images[1, 0, 0, 0] = np.nan
    with pytest.raises(BuildError, match="nan dB on images") as error:
        export_onnx(tiny_resnet(), preprocess, {}, images=[images])
    assert "over 2 images" in error.value.evidence


def doubled(model: ResNet) -> None:
    model.relu = nn.Sequential(nn.ReLU(), nn.GELU())  # type: ignore[assignment]


def pooled(model: ResNet) -> None:
    model.avgpool = nn.AdaptiveAvgPool2d(2)


def rounded_up(model: ResNet) -> None:
    model.maxpool = nn.MaxPool2d(3, 2, padding=1, ceil_mode=True)


def normed(model: ResNet) -> None:
    model.relu = nn.BatchNorm2d(8)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (doubled, r"relu\.1 \(GELU\)"),
        (pooled, r"avgpool \(AdaptiveAvgPool2d\)"),
        (rounded_up, r"maxpool \(MaxPool2d\)"),
        (normed, r"relu \(BatchNorm2d\)"),
    ],
)
def test_an_unknown_layer_is_named(preprocess: Preprocess, change: Callable[[ResNet], None], named: str) -> None:
    model = tiny_resnet()
    change(model)
    with pytest.raises(BuildError, match=f"cannot export layer {named}") as error:
        export_onnx(model, preprocess, {})
    assert "Conv2d" in error.value.hint


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x) + 1
        return self.fc(torch.flatten(x.mean((2, 3)), 1))


def test_an_unknown_function_is_named(preprocess: Preprocess) -> None:
    with pytest.raises(BuildError, match="cannot export layer add "):
        export_onnx(Scaled(), preprocess, {})


# identity and metadata


def test_metadata_says_where_the_file_comes_from(tiny_path: Path, preprocess: Preprocess) -> None:
    record = graph.normal_form(written(tiny_path), tiny_path)
    assert {k: record[k] for k in RECORD} == RECORD
    assert (record["precision"], record["classes"], record["opset"], record["batch"]) == ("fp32", CLASSES, 17, None)
    stored = dict(record["preprocess"])
    stored |= {"mean": tuple(stored["mean"]), "std": tuple(stored["std"])}
    assert Preprocess(**stored) == preprocess


def test_metadata_is_json_even_when_parity_is_exact(preprocess: Preprocess) -> None:
    model = tiny_resnet()
    nn.init.zeros_(model.fc.weight)  # the logits are the bias, to the bit
    proto = export_onnx(model, preprocess, RECORD)
    (text,) = [e.value for e in proto.metadata_props if e.key == "edgeres"]

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    record = json.loads(text, parse_constant=refuse)
    assert record["parity"]["random"] == {"images": 8, "max_abs": 0.0, "db": None}


def test_export_is_the_same_each_time(preprocess: Preprocess) -> None:
    first, second = (export_onnx(tiny_resnet(), preprocess, RECORD, seed=s) for s in (0, 1))
    assert graph.digest(first) == graph.digest(second)
    for proto in (first, second):
        del proto.metadata_props[:]
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


def test_digest_is_that_of_the_computation_not_of_the_record(tiny_path: Path, preprocess: Preprocess) -> None:
    digest = graph.digest(written(tiny_path))
    other = export_onnx(tiny_resnet(), preprocess, {"variant": "another"}, images=[noise(2)], seed=9)
    assert graph.digest(other) == digest
    graph.set_metadata(other, {"anything": 1})
    assert graph.digest(other) == digest
    assert graph.digest(export_onnx(tiny_resnet(), preprocess, {}, opset=18)) != digest
    assert graph.digest(export_onnx(tiny_resnet(), preprocess, {}, batch=1)) != digest
    assert graph.digest(export_onnx(tiny_resnet(), Preprocess(crop=33), {})) != digest
    assert graph.digest(export_onnx(tiny_resnet("1x1"), preprocess, {})) != digest


def test_digest_changes_with_any_weight() -> None:
    model = tiny_resnet()
    seen = {graph.digest(trace(model, SIZE, 17, None))}
    changed = 0
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        with torch.no_grad():
            last = tensor.view(-1)[-1:]
            before = last.clone()
            last += 0.01
            seen.add(graph.digest(trace(model, SIZE, 17, None)))
            last.copy_(before)
        changed += 1
    assert changed == 15 * 5 + 2
    assert len(seen) == changed + 1


def test_metadata_is_replaced_and_that_of_others_kept(tiny_path: Path) -> None:
    model = written(tiny_path)
    model.metadata_props.add(key="author", value="somebody")
    graph.set_metadata(model, {"a": math.inf})
    graph.set_metadata(model, {"b": [1, math.nan]})
    assert graph.metadata(model) == {"b": [1, None]}
    assert [(e.key) for e in model.metadata_props] == ["author", "edgeres"]


# files that are not what they should be


def test_a_missing_file_is_named_with_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no ONNX file .*absent\.onnx") as error:
        graph.load(tmp_path / "absent.onnx")
    assert "edgeres export" in error.value.hint


@pytest.mark.parametrize("keep", [0, 10, -100])
def test_a_cut_file_is_refused_by_name(tmp_path: Path, tiny_path: Path, keep: int) -> None:
    (tmp_path / "cut.onnx").write_bytes(tiny_path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"cut\.onnx is not a valid ONNX file") as error:
        graph.load(tmp_path / "cut.onnx")
    assert error.value.evidence


def test_an_invalid_graph_is_not_written(tmp_path: Path, tiny_path: Path) -> None:
    model = written(tiny_path)
    model.graph.node[3].input[0] = "nobody makes this"
    with pytest.raises(onnx.checker.ValidationError):
        graph.save(model, tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()


def test_a_model_made_elsewhere_is_not_normal_form(tiny_path: Path) -> None:
    model = written(tiny_path)
    del model.metadata_props[:]
    with pytest.raises(InputError, match="is not an FP32 model made by edgeres") as error:
        graph.normal_form(model, tiny_path)
    assert "precision not recorded" in error.value.evidence
    assert graph.metadata(model) == {}
