from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import CLASSES, tiny_resnet
from torch import Tensor, nn
from torch.nn import functional as F

from edgeres import graph
from edgeres.errors import UsageError
from edgeres.export import export_onnx
from edgeres.model import LAYOUT, BasicBlock, ResNet, describe, resnet, resnet50
from edgeres.recipe import BASIC_DEPTHS, DEPTHS, ModelSection, Preprocess

PAPER = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Blocks per stage, table 1 of He et al."""
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def on_meta(variant: str = "v1.5", classes: int = 1000, depth: int = 50) -> ResNet:
    with torch.device("meta"):
        return resnet(depth, variant, classes)


def torchvision_state(classes: int, depth: int = 50) -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's ResNets, from the paper's table and torchvision's names."""
    state: dict[str, tuple[int, ...]] = {}

    def norm(name: str, channels: int) -> None:
        state.update({f"{name}.{key}": () if key == "num_batches_tracked" else (channels,) for key in NORM})

    state["conv1.weight"] = (64, 3, 7, 7)
    norm("bn1", 64)
    channels = 64
    for stage, (blocks, width) in enumerate(zip(PAPER[depth], (64, 128, 256, 512), strict=True), 1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            if depth < 50:
                out = width
                state[f"{name}.conv1.weight"] = (width, channels, 3, 3)
                norm(f"{name}.bn1", width)
                state[f"{name}.conv2.weight"] = (width, width, 3, 3)
                norm(f"{name}.bn2", width)
            else:
                out = 4 * width
                state[f"{name}.conv1.weight"] = (width, channels, 1, 1)
                norm(f"{name}.bn1", width)
                state[f"{name}.conv2.weight"] = (width, width, 3, 3)
                norm(f"{name}.bn2", width)
                state[f"{name}.conv3.weight"] = (out, width, 1, 1)
                norm(f"{name}.bn3", out)
            if block == 0 and channels != out:
                state[f"{name}.downsample.0.weight"] = (out, channels, 1, 1)
                norm(f"{name}.downsample.1", out)
            channels = out
    state["fc.weight"] = (classes, channels)
    state["fc.bias"] = (classes,)
    return state


@pytest.mark.parametrize("variant", ["v1", "v1.5"])
@pytest.mark.parametrize("classes", [1000, 10])
def test_state_dict_is_torchvisions_in_its_order(variant: str, classes: int) -> None:
    found = {k: tuple(t.shape) for k, t in on_meta(variant, classes).state_dict().items()}
    expected = torchvision_state(classes)
    assert list(found.items()) == list(expected.items())
    assert len(found) == 320
    for name in ("layer3.5.conv2.weight", "layer1.0.downsample.1.running_var", "layer4.2.bn3.num_batches_tracked"):
        assert name in found


@pytest.mark.parametrize(("depth", "tensors"), [(18, 122), (34, 218), (50, 320), (101, 626), (152, 932)])
def test_every_depth_has_torchvisions_state_dict(depth: int, tensors: int) -> None:
    found = {k: tuple(t.shape) for k, t in on_meta("v1.5", 7, depth).state_dict().items()}
    assert list(found.items()) == list(torchvision_state(7, depth).items())
    assert len(found) == tensors


def test_basic_blocks_project_where_the_shape_changes_only() -> None:
    names = set(on_meta(depth=18).state_dict())
    for name in ("layer1.0.conv1.weight", "layer1.1.bn2.running_mean", "layer2.0.downsample.0.weight"):
        assert name in names
    assert not any(name.startswith("layer1.0.downsample") or ".conv3." in name for name in names)


# what torchvision's model pages give: parameters, and multiply-adds at 224 as "GFLOPS"
PUBLISHED = {
    18: (11_689_512, 1.81),
    34: (21_797_672, 3.66),
    50: (25_557_032, 4.09),
    101: (44_549_160, 7.80),
    152: (60_192_808, 11.51),
}


@pytest.mark.parametrize("variant", ["v1", "v1.5"])
@pytest.mark.parametrize("depth", PUBLISHED)
def test_parameter_count_is_the_published_one(depth: int, variant: str) -> None:
    model = on_meta(variant, depth=depth)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[depth][0]
    assert sum(row.parameters for row in describe(model)) == PUBLISHED[depth][0]


@pytest.mark.parametrize("depth", PUBLISHED)
def test_multiply_adds_are_the_published_ones(depth: int) -> None:
    assert round(sum(row.macs for row in describe(on_meta(depth=depth))) / 1e9, 2) == PUBLISHED[depth][1]


def test_the_depth_counts_convolutions_and_classifier() -> None:
    for depth in DEPTHS:
        convolutions = [n for n, m in on_meta(depth=depth).named_modules() if isinstance(m, nn.Conv2d)]
        assert len([n for n in convolutions if "downsample" not in n]) + 1 == depth
    assert tuple(LAYOUT) == DEPTHS
    assert {d for d, (block, _) in LAYOUT.items() if block is BasicBlock} == set(BASIC_DEPTHS)


def strides(model: ResNet) -> dict[str, int]:
    return {name: m.stride[0] for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def test_variants_differ_in_the_stride_of_three_bottlenecks_only() -> None:
    v1, v15 = strides(on_meta("v1")), strides(on_meta("v1.5"))
    different = {name: (v1[name], v15[name]) for name in v1 if v1[name] != v15[name]}
    assert different == {f"layer{i}.0.conv{j}": stride for i in (2, 3, 4) for j, stride in ((1, (2, 1)), (2, (1, 2)))}
    assert {name for name in v15 if v15[name] == 2} == {
        "conv1",
        *(f"layer{i}.0.{conv}" for i in (2, 3, 4) for conv in ("conv2", "downsample.0")),
    }


# torchvision's model page gives 4.09 G for v1.5, the paper 3.8 G for v1
@pytest.mark.parametrize(("variant", "macs"), [("v1", 3_857_973_248), ("v1.5", 4_089_184_256)])
def test_multiply_adds_at_224(variant: str, macs: int) -> None:
    rows = describe(on_meta(variant))
    assert sum(row.macs for row in rows) == macs
    assert sum(row.parameters for row in rows) == 25_557_032


def test_stage_table_has_the_papers_sizes() -> None:
    rows = {row.name: row for row in describe(on_meta())}
    assert {name: row.output for name, row in rows.items()} == {
        "conv1": (64, 112, 112),
        "maxpool": (64, 56, 56),
        "layer1": (256, 56, 56),
        "layer2": (512, 28, 28),
        "layer3": (1024, 14, 14),
        "layer4": (2048, 7, 7),
        "avgpool": (2048, 1, 1),
        "fc": (1000,),
    }
    assert rows["conv1"].macs == 112 * 112 * 64 * 7 * 7 * 3
    assert rows["fc"].macs == 2048 * 1000
    assert rows["fc"].parameters == 2048 * 1000 + 1000
    assert rows["maxpool"].macs == rows["avgpool"].macs == 0
    assert rows["layer3"].layers == "6 bottlenecks"


@pytest.mark.parametrize(
    ("depth", "layers", "channels"),
    [
        (18, [f"{n} basic blocks" for n in (2, 2, 2, 2)], (64, 128, 256, 512)),
        (34, [f"{n} basic blocks" for n in (3, 4, 6, 3)], (64, 128, 256, 512)),
        (101, [f"{n} bottlenecks" for n in (3, 4, 23, 3)], (256, 512, 1024, 2048)),
        (152, [f"{n} bottlenecks" for n in (3, 8, 36, 3)], (256, 512, 1024, 2048)),
    ],
)
def test_every_depth_has_its_stages(depth: int, layers: list[str], channels: tuple[int, ...]) -> None:
    rows = {row.name: row for row in describe(on_meta(depth=depth))}
    assert list(rows) == ["conv1", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"]
    stages = [rows[f"layer{i}"] for i in (1, 2, 3, 4)]
    assert [row.layers for row in stages] == layers
    assert [row.output for row in stages] == [(c, 56 >> i, 56 >> i) for i, c in enumerate(channels)]
    assert rows["avgpool"].output == (channels[-1], 1, 1)
    assert rows["fc"].parameters == channels[-1] * 1000 + 1000


def test_describe_leaves_no_hooks_and_computes_with_real_weights_too() -> None:
    model = tiny_resnet()
    assert [row.name for row in describe(model, 32)] == ["conv1", "maxpool", "layer1", "layer2", "avgpool", "fc"]
    assert not any(m._forward_hooks for m in model.modules())
    assert describe(model, 32)[-1].output == (CLASSES,)


@pytest.mark.parametrize("variant", ["v1", "v1.5"])
@pytest.mark.parametrize("size", [1, 2, 33, 97, 224])
def test_any_input_size_runs(variant: str, size: int) -> None:
    model = on_meta(variant).eval()
    assert model(torch.zeros(2, 3, size, size + 5, device="meta")).shape == (2, 1000)
    tiny = tiny_resnet("1x1" if variant == "v1" else "3x3")
    assert torch.isfinite(tiny(torch.ones(1, 3, size, size + 5))).all()


def test_v1_and_v15_halve_alike_at_odd_sizes() -> None:
    for size in (1, 31, 33, 97, 225):
        a, b = (describe(on_meta(v), size) for v in ("v1", "v1.5"))
        assert [row.output for row in a] == [row.output for row in b]


@pytest.mark.parametrize("classes", [1, 2, 21843])
def test_any_number_of_classes(classes: int) -> None:
    assert on_meta("v1.5", classes).eval()(torch.zeros(1, 3, 64, 64, device="meta")).shape == (1, classes)


def reference_forward(state: dict[str, Tensor], x: Tensor, stride_on: str) -> Tensor:
    """The tiny network once more, from its state dict alone."""

    def conv_norm(name: str, norm: str, x: Tensor, stride: int) -> Tensor:
        weight = state[f"{name}.weight"]
        y = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, var = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        gain = state[f"{norm}.weight"] / torch.sqrt(var + 1e-5)
        return (y - mean[:, None, None]) * gain[:, None, None] + state[f"{norm}.bias"][:, None, None]

    x = F.max_pool2d(conv_norm("conv1", "bn1", x, 2).clamp(min=0), 3, 2, 1)
    for stage in (1, 2):
        for block in (0, 1):
            name, stride = f"layer{stage}.{block}", 2 if (stage, block) == (2, 0) else 1
            first, second = (stride, 1) if stride_on == "1x1" else (1, stride)
            y = conv_norm(f"{name}.conv1", f"{name}.bn1", x, first).clamp(min=0)
            y = conv_norm(f"{name}.conv2", f"{name}.bn2", y, second).clamp(min=0)
            y = conv_norm(f"{name}.conv3", f"{name}.bn3", y, 1)
            if block == 0:
                x = conv_norm(f"{name}.downsample.0", f"{name}.downsample.1", x, stride)
            x = (y + x).clamp(min=0)
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize("stride_on", ["1x1", "3x3"])
@pytest.mark.parametrize("size", [32, 45])
def test_forward_is_the_textbook_network(stride_on: str, size: int) -> None:
    model = tiny_resnet(stride_on)
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference_forward(model.state_dict(), x, stride_on), rtol=1e-4, atol=1e-5)


def test_the_same_weights_give_different_logits_in_the_other_variant() -> None:
    v1, v15 = tiny_resnet("1x1"), tiny_resnet("3x3")
    v1.load_state_dict(v15.state_dict())
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        assert (v1(x) - v15(x)).abs().max() > 1e-2


def test_training_reaches_every_parameter() -> None:
    model = tiny_resnet().train()
    model(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(7))).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# basic blocks


def tiny_basic(stride_on: str = "3x3") -> ResNet:
    """Two basic blocks in two stages, with batch norm statistics that matter."""
    torch.manual_seed(0)
    model = ResNet(CLASSES, stride_on, blocks=(1, 1), width=8, block=BasicBlock)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def test_basic_blocks_are_the_textbook_network() -> None:
    model = tiny_basic()
    x = torch.randn(3, 3, 45, 45, generator=torch.Generator().manual_seed(5))
    state = model.state_dict()

    def conv_norm(name: str, norm: str, x: Tensor, stride: int) -> Tensor:
        y = F.conv2d(x, state[f"{name}.weight"], stride=stride, padding=state[f"{name}.weight"].shape[-1] // 2)
        mean, var, gain, shift = (
            state[f"{norm}.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias")
        )
        return (y - mean) / torch.sqrt(var + 1e-5) * gain + shift

    y = F.max_pool2d(conv_norm("conv1", "bn1", x, 2).clamp(min=0), 3, 2, 1)
    for name, stride in (("layer1.0", 1), ("layer2.0", 2)):
        z = conv_norm(f"{name}.conv1", f"{name}.bn1", y, stride).clamp(min=0)
        z = conv_norm(f"{name}.conv2", f"{name}.bn2", z, 1)
        y = (z + (y if stride == 1 else conv_norm(f"{name}.downsample.0", f"{name}.downsample.1", y, 2))).clamp(min=0)
    expected = y.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", BASIC_DEPTHS)
def test_basic_networks_are_the_same_as_v1_and_v15(depth: int) -> None:
    torch.manual_seed(0)
    v1, v15 = resnet(depth, "v1", 10).eval(), resnet(depth, "v1.5", 10).eval()
    v1.load_state_dict(v15.state_dict())
    x = torch.randn(2, 3, 33, 33, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        assert torch.equal(v1(x), v15(x))
    assert strides(v1) == strides(v15)
    assert {n for n, s in strides(v15).items() if s == 2} == {
        "conv1",
        *(f"layer{i}.0.{conv}" for i in (2, 3, 4) for conv in ("conv1", "downsample.0")),
    }


@pytest.mark.parametrize("batch", [None, 3])
def test_exported_basic_blocks_compute_the_same_in_onnx_runtime(batch: int | None) -> None:
    model = tiny_basic()
    proto = export_onnx(model, Preprocess(crop=32), {}, batch=batch)
    onnx.checker.check_model(proto, full_check=True)
    counts = {"Conv": 6, "Relu": 5, "Add": 2, "MaxPool": 1, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1}
    assert graph.count_ops(proto) == counts
    assert graph.metadata(proto)["parity"]["random"]["db"] > 100
    x = np.random.default_rng(1).standard_normal((3, 3, 32, 32), dtype=np.float32)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(session.run(None, {"input": x})[0], expected, rtol=1e-4, atol=1e-5)


def test_basic_blocks_keep_their_names_in_the_graph() -> None:
    proto = export_onnx(tiny_basic(), Preprocess(crop=32), {})
    names = {n.name for n in proto.graph.node if n.op_type in ("Conv", "Add")}
    convolutions = {n for n, m in tiny_basic().named_modules() if isinstance(m, nn.Conv2d)}
    assert names == convolutions | {"layer1.0.add", "layer2.0.add"}


# names


def test_a_network_is_called_by_depth_and_variant_where_it_has_one() -> None:
    names = {(d, v): ModelSection(depth=d, variant=v).network for d in DEPTHS for v in ("v1", "v1.5")}
    assert names == {(d, v): f"resnet{d}" + (f"-{v}" if d >= 50 else "") for d, v in names}
    assert ModelSection().network == "resnet50-v1.5"


@pytest.mark.parametrize("depth", [0, 20, 51, 1000])
def test_unknown_depths_are_refused(depth: int) -> None:
    for make in (lambda: resnet(depth), lambda: ModelSection(depth=depth)):
        with pytest.raises(UsageError, match=f"unknown depth {depth}") as error:
            make()
        assert "18, 34, 50, 101, 152" in error.value.hint


def test_resnet50_is_the_resnet_of_depth_50() -> None:
    with torch.device("meta"):
        a, b = resnet50("v1", 7), resnet(50, "v1", 7)
    assert {k: t.shape for k, t in a.state_dict().items()} == {k: t.shape for k, t in b.state_dict().items()}
    assert strides(a) == strides(b)


@pytest.mark.parametrize("variant", ["v2", "1.5", "V1", ""])
def test_unknown_variants_are_refused(variant: str) -> None:
    with pytest.raises(UsageError, match="unknown variant") as error:
        resnet50(variant)
    assert "v1, v1.5" in error.value.hint


@pytest.mark.parametrize("stride_on", ["v1", "2x2", ""])
def test_unknown_strides_are_refused(stride_on: str) -> None:
    with pytest.raises(UsageError, match="stride_on"):
        ResNet(10, stride_on, (1,), 8)
