from __future__ import annotations

import pytest
import torch
from conftest import CLASSES, tiny_resnet
from torch import Tensor, nn
from torch.nn import functional as F

from edgeres.errors import UsageError
from edgeres.model import ResNet, describe, resnet50

STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def on_meta(variant: str = "v1.5", classes: int = 1000) -> ResNet:
    with torch.device("meta"):
        return resnet50(variant, classes)


def torchvision_state(classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's resnet50, from the paper's table and torchvision's names."""
    state: dict[str, tuple[int, ...]] = {}

    def norm(name: str, channels: int) -> None:
        state.update({f"{name}.{key}": () if key == "num_batches_tracked" else (channels,) for key in NORM})

    state["conv1.weight"] = (64, 3, 7, 7)
    norm("bn1", 64)
    channels = 64
    for stage, (blocks, width) in enumerate(STAGES, 1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            state[f"{name}.conv1.weight"] = (width, channels, 1, 1)
            norm(f"{name}.bn1", width)
            state[f"{name}.conv2.weight"] = (width, width, 3, 3)
            norm(f"{name}.bn2", width)
            state[f"{name}.conv3.weight"] = (4 * width, width, 1, 1)
            norm(f"{name}.bn3", 4 * width)
            if block == 0:
                state[f"{name}.downsample.0.weight"] = (4 * width, channels, 1, 1)
                norm(f"{name}.downsample.1", 4 * width)
            channels = 4 * width
    state["fc.weight"] = (classes, 2048)
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


@pytest.mark.parametrize("variant", ["v1", "v1.5"])
def test_parameter_count_is_the_published_one(variant: str) -> None:
    assert sum(p.numel() for p in on_meta(variant).parameters()) == 25_557_032


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


@pytest.mark.parametrize("variant", ["v2", "1.5", "V1", ""])
def test_unknown_variants_are_refused(variant: str) -> None:
    with pytest.raises(UsageError, match="unknown variant") as error:
        resnet50(variant)
    assert "v1, v1.5" in error.value.hint


@pytest.mark.parametrize("stride_on", ["v1", "2x2", ""])
def test_unknown_strides_are_refused(stride_on: str) -> None:
    with pytest.raises(UsageError, match="stride_on"):
        ResNet(10, stride_on, (1,), 8)
