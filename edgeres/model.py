"""ResNet once. v1 and v1.5 differ in one place: where stride 2 sits in a downsampling bottleneck.

Shapes: N images, C channels, H and W pixels. Parameter names are torchvision's, so its checkpoints load unchanged.

Sources: He et al. 2015 (arXiv 1512.03385) for the network, with the stride in the first 1x1 convolution (v1);
torchvision, NVIDIA and MLPerf put it in the 3x3 convolution (v1.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgeres.errors import UsageError
from edgeres.recipe import STRIDE_ON, one_of

MAC_RULE = (
    "multiply-adds of convolutions and the fully connected layer for one image (1 multiply-add = 2 FLOPs); "
    "bias, batch norm, ReLU, pooling and residual adds are not counted"
)


class Bottleneck(nn.Module):
    """1x1 reduce, 3x3, 1x1 expand by 4, plus the shortcut. (N, C, H, W) -> (N, 4 width, H/stride, W/stride)."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int, stride_on: str) -> None:
        super().__init__()
        stride_1x1, stride_3x3 = (stride, 1) if stride_on == "1x1" else (1, stride)
        out = width * self.expansion
        self.conv1 = nn.Conv2d(channels, width, 1, stride_1x1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, stride_3x3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu3 = nn.ReLU(inplace=True)
        self.downsample = _projection(channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu1(self.bn1(self.conv1(x)))  # (N, width, H, W), or halved here in v1
        y = self.relu2(self.bn2(self.conv2(y)))  # (N, width, H/stride, W/stride), halved here in v1.5
        y = self.bn3(self.conv3(y))  # (N, 4 width, H/stride, W/stride)
        return self.relu3(y + shortcut)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions plus the shortcut. (N, C, H, W) -> (N, width, H/stride, W/stride).

    There is no 1x1 convolution that could carry the stride: v1 and v1.5 are the same network.
    """

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int, stride_on: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.downsample = _projection(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu1(self.bn1(self.conv1(x)))  # (N, width, H/stride, W/stride)
        return self.relu2(self.bn2(self.conv2(y)) + shortcut)


def _projection(channels: int, out: int, stride: int) -> nn.Module | None:
    """The shortcut's 1x1 convolution where a block changes the shape; None where it does not."""
    if stride == 1 and channels == out:
        return None
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


LAYOUT: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
"""Depth -> kind of block and blocks per stage (He et al., table 1). The depth counts convolutions and classifier."""


class ResNet(nn.Module):
    """Images (N, 3, H, W) -> logits (N, classes), for any H and W from 1 up.

    The defaults are ResNet-50 v1.5. Fewer ``blocks`` and a smaller ``width`` give the small nets that tests use.
    """

    def __init__(
        self,
        classes: int = 1000,
        stride_on: str = "3x3",
        blocks: tuple[int, ...] = LAYOUT[50][1],
        width: int = 64,
        block: type[BasicBlock] | type[Bottleneck] = Bottleneck,
    ) -> None:
        super().__init__()
        if stride_on not in STRIDE_ON.values():
            raise UsageError(f"stride_on is {stride_on!r}", hint='use "1x1" (v1) or "3x3" (v1.5)')
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        channels = width
        for i, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            stage = nn.Sequential()
            for j in range(count):
                stage.append(block(channels, width << i, 2 if i and not j else 1, stride_on))
                channels = (width << i) * block.expansion
            self.add_module(name, stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # (N, 64, H/4, W/4)
        for name in self.stages:
            x = self.get_submodule(name)(x)  # (N, 64 expansion 2^i, H/4/2^i, W/4/2^i)
        return self.fc(torch.flatten(self.avgpool(x), 1))  # (N, classes)


def resnet(depth: int = 50, variant: str = "v1.5", classes: int = 1000) -> ResNet:
    """ResNet of ``depth`` 18, 34, 50, 101 or 152 with fresh random weights, ``variant`` "v1" or "v1.5"."""
    one_of("depth", depth, tuple(LAYOUT))
    one_of("variant", variant, tuple(STRIDE_ON))
    block, blocks = LAYOUT[depth]
    return ResNet(classes, STRIDE_ON[variant], blocks, block=block)


def resnet50(variant: str = "v1.5", classes: int = 1000) -> ResNet:
    """`resnet` of depth 50."""
    return resnet(50, variant, classes)


@dataclass(frozen=True)
class StageRow:
    """One line of the stage table. ``output`` is (C, H, W); ``parameters`` and ``macs`` are counts."""

    name: str
    layers: str
    output: tuple[int, ...]
    parameters: int
    macs: int


def describe(model: ResNet, input_size: int = 224) -> list[StageRow]:
    """Stage table of ``model`` for one image of (3, input_size, input_size), counted by `MAC_RULE`.

    The counts come from the layers that run, on PyTorch's meta device: no arithmetic, no second description.
    """
    parts = ["conv1", "maxpool", *model.stages, "avgpool", "fc"]
    macs = dict.fromkeys(parts, 0)
    outputs: dict[str, tuple[int, ...]] = {}

    def count(name: str) -> Any:
        def hook(module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if isinstance(module, nn.Conv2d | nn.Linear):
                # each output value sums over one filter: weight elements per output channel
                macs[name.split(".")[0]] += output[0].numel() * module.weight[0].numel()
            if name in macs:
                outputs[name] = tuple(output.shape[1:])

        return hook

    handles = [m.register_forward_hook(count(n)) for n, m in model.named_modules() if n]
    try:
        device = next(model.parameters()).device
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, input_size, input_size, device=device))
    finally:
        for handle in handles:
            handle.remove()

    def row(name: str) -> StageRow:
        module = model.get_submodule(name)
        parameters = sum(p.numel() for p in module.parameters())
        layers = type(module).__name__
        if name == "conv1":  # the stem's batch norm belongs to its line
            parameters += sum(p.numel() for p in model.bn1.parameters())
            layers = "7x7 convolution, stride 2"
        elif name in model.stages:
            stage = list(module.children())
            layers = f"{len(stage)} {'bottlenecks' if isinstance(stage[0], Bottleneck) else 'basic blocks'}"
        elif name == "maxpool":
            layers = "3x3 max pool, stride 2"
        elif name == "avgpool":
            layers = "global average pool"
        elif name == "fc":
            layers = "fully connected"
        return StageRow(name, layers, outputs[name], parameters, macs[name])

    return [row(name) for name in parts]
