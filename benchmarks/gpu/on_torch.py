"""Calibration with PyTorch alone: the FP32 graph computed and its tensors counted on whatever device PyTorch has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from edgeres import graph
from edgeres.calibrate import RangeTable, TensorRange
from edgeres.counting import BINS
from edgeres.loader import Batch


class Network:
    """A ``model`` in normal form, its convolutions with batch norm folded in, as PyTorch computes it on ``device``."""

    def __init__(self, torch: Any, model: Any, device: str) -> None:
        self.torch, self.device, self.names = torch, device, graph.activations(model)
        self.constants = {n: torch.tensor(value, device=device) for n, value in graph.initializers(model).items()}
        self.steps = [(node, operator(torch, node)) for node in model.graph.node]
        self.last = {name: node for node, _ in self.steps for name in node.input}

    def run(self, pixels: np.ndarray, see: Callable[[str, Any], None] = lambda name, values: None) -> Any:
        """Pixels (N, 3, H, W) -> logits, on the device. ``see`` gets each tensor that calibration measures, by name."""
        values = {graph.INPUT: self.torch.from_numpy(pixels).to(self.device)}
        with self.torch.inference_mode():
            see(graph.INPUT, values[graph.INPUT])
            for node, compute in self.steps:
                (name,) = node.output
                values[name] = compute(*(self.constants.get(n, values.get(n)) for n in node.input))
                for done in node.input:
                    if self.last[done] is node:
                        values.pop(done, None)
                if name in self.names:
                    see(name, values[name])
        return values[graph.OUTPUT]


def operator(torch: Any, node: Any) -> Callable[..., Any]:
    """What ``node`` computes, with the attributes that it has."""
    from onnx import helper

    functional, a = torch.nn.functional, {a.name: helper.get_attribute_value(a) for a in node.attribute}
    known: dict[str, Callable[..., Any]] = {
        "Conv": lambda x, w, b: functional.conv2d(x, w, b, a["strides"], a["pads"][:2], a["dilations"], a["group"]),
        "MaxPool": lambda x: functional.max_pool2d(x, a["kernel_shape"], a["strides"], a["pads"][:2]),
        "GlobalAveragePool": lambda x: x.mean((2, 3), keepdim=True),
        "Flatten": lambda x: x.flatten(1),
        "Gemm": functional.linear,
        "Relu": torch.relu,
        "Add": torch.add,
    }
    return known[node.op_type]


def measure(network: Network, batches: Iterable[Batch]) -> RangeTable:
    """`calibrate`, with the network and the counting on the network's device."""
    table = RangeTable({}, tensors={name: TensorRange() for name in network.names})

    def see(name: str, values: Any) -> None:
        table.tensors[name] = counted(network.torch, table.tensors[name], values)

    for batch in batches:
        network.run(batch.pixels, see)
        table.images += len(batch.pixels)
    return table


def counted(torch: Any, r: TensorRange, values: Any) -> TensorRange:
    """``r`` with float32 ``values`` added, by the rule of `edgeres.counting`: the same counts to the last one."""
    seen = [v.double() for v in (*values.aminmax(), (values == 0).sum())]
    lo, hi, zeros = (v + 0.0 for v in torch.stack(seen).tolist())  # 0.0 makes -0.0 plain
    if not (math.isfinite(lo) and math.isfinite(hi)):
        raise FloatingPointError("NaN or infinity")
    limit = r.limit
    while max(-lo, hi) >= limit:
        limit *= 2
    r, scale = grown(r, limit), BINS / limit
    # a power of two: products are exact, as long as small ones need not become smaller
    places = ((values if scale >= 1 else values.double()) * scale).floor_().to(torch.int32).add_(BINS)
    return replace(
        r,
        min=min(r.min, lo),
        max=max(r.max, hi),
        count=r.count + values.numel(),
        zeros=r.zeros + int(zeros),
        histogram=r.histogram + torch.bincount(places.flatten(), minlength=2 * BINS).cpu().numpy(),
    )


def grown(r: TensorRange, limit: float) -> TensorRange:
    """``r`` with bins that reach to ``limit``: pairs of them become one, as often as it takes."""
    counts = r.histogram
    for _ in range(round(math.log2(limit / r.limit))):
        counts = np.pad(counts.reshape(-1, 2).sum(1), BINS // 2)
    return replace(r, limit=limit, histogram=counts)
