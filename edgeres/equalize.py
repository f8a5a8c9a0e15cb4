"""Even out what channels reach: factors that move from a layer's weights into those of the next.

An activation has one scale for all its channels, so a channel that stays small gets few of its steps. A ReLU network
computes the same if a channel is made larger where it is written and smaller where it is read (Nagel et al. 2019,
"Data-free quantization through weight equalization and bias correction", section 4.1), and weights, which have a scale
per channel, hardly mind.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from edgeres import graph
from edgeres.errors import InputError, need
from edgeres.loader import Batch
from edgeres.probe import Probe

PER_CHANNEL = ("Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "Flatten", "Add")
"""Operators that scale with their input, channel by channel."""
QUANTILE = 0.99
"""Over images, of what a channel reaches: one odd image must not decide."""
PER_OCTAVE = 4
"""Factors are 2^(k / PER_OCTAVE): whole k are short to write down, and finer steps gain nothing."""
SPAN = 256.0
"""Ratio of reaches up to which channels are evened out: one that is never used would ask for any factor."""
IMAGES = 128
"""Enough to see what channels reach."""


class Channels:
    """The groups of tensors of ``model`` whose channels can only be scaled together.

    A group is named by its first tensor, and scaled only if nothing but layers writes and reads it: the input, the
    logits, and what a grouped convolution or an operator not in `PER_CHANNEL` touches stay as they are. So do maps of
    several pixels that are flattened: what reads them has more columns than there are channels.
    """

    def __init__(self, model: Any) -> None:
        constants = {t.name: t.dims for t in model.graph.initializer}
        self.parent: dict[str, str] = {}
        fixed = {graph.INPUT, graph.OUTPUT}
        self.writers: dict[str, list[Any]] = {}
        self.readers: dict[str, list[Any]] = {}
        for node in model.graph.node:
            data = [i for i in node.input if i not in constants]
            if node.op_type in PER_CHANNEL and len(data) == len(node.input):
                for name in data:
                    self._join(name, node.output[0])
            elif node.op_type not in graph.LAYERS or _group(node) != 1 or len(data) != 1:
                fixed |= {*data, *node.output}
        fixed = {self.of(t) for t in fixed}

        def widths(group: str) -> set[int]:
            written = {constants[n.input[1]][0] for n in self.writers[group]}
            return written | {constants[n.input[1]][1] for n in self.readers[group]}

        for node in model.graph.node:
            if node.op_type in graph.LAYERS:
                self.writers.setdefault(self.of(node.output[0]), []).append(node)
                self.readers.setdefault(self.of(node.input[0]), []).append(node)
        self.free = [g for g in self.writers if g in self.readers and g not in fixed and len(widths(g)) == 1]

    def of(self, tensor: str) -> str:
        """The group of ``tensor``."""
        while (up := self.parent.get(tensor, tensor)) != tensor:
            tensor = up
        return tensor

    def _join(self, a: str, b: str) -> None:
        a, b = self.of(a), self.of(b)
        if a != b:
            self.parent[b] = a


def _group(node: Any) -> int:
    return next((a.i for a in node.attribute if a.name == "group"), 1)


def measure(model: Any, batches: Iterable[Batch]) -> dict[str, list[int]]:
    """Group -> whole number per channel (C,), for `equalize`.

    A channel that reaches r is scaled by (largest r / r)^(1/2): half way to full use, for the weights that read the
    channels of an input share a scale. What a channel reaches in a residual branch before the sum does not count.
    """
    channels = Channels(model)
    branches = {graph.main_branch(model, n) for n in model.graph.node if n.op_type == "Add"}
    group_of = {t: g for t in graph.activations(model) if t not in branches and (g := channels.of(t)) in channels.free}
    if not group_of:
        return {}
    probe = Probe(model, list(group_of))
    seen: dict[str, list[np.ndarray]] = {name: [] for name in probe.inner}
    for batch in batches:
        for _, tensors in probe.run(batch.pixels):
            for name in probe.inner:
                values = tensors[name].reshape(*tensors[name].shape[:2], -1)
                seen[name].append(np.maximum(values.max(2), -values.min(2)))
    reach: dict[str, np.ndarray] = {}
    for name, pieces in seen.items():
        reached = np.concatenate(pieces)
        if not np.isfinite(reached).all():
            return {}  # calibration will name the tensor and the image
        group, most = group_of[name], np.quantile(reached, QUANTILE, axis=0)
        reach[group] = np.maximum(reach.get(group, 0), most)
    out = {}
    for group, r in reach.items():
        if r.max() > 0:
            wanted = PER_OCTAVE * np.log2(r.max() / np.maximum(r, r.max() / SPAN)) / 2
            out[group] = np.rint(wanted - wanted.mean()).astype(int).tolist()
    return out


def equalize(model: Any, exponents: dict[str, list[int]]) -> Any:
    """``model`` with channel c of each group times 2^(exponents[c] / PER_OCTAVE) -> ModelProto with the same logits.

    The same, that is, up to FP32 rounding: over 130 dB. Raises `InputError` if ``exponents`` are of another model.
    """
    numpy_helper = need("onnx.numpy_helper", "onnx")
    channels = Channels(model)
    arrays = graph.initializers(model)
    kinds = {name: a.dtype for name, a in arrays.items()}
    for group, powers in exponents.items():
        width = len(arrays[channels.writers[group][0].input[1]]) if group in channels.free else 0
        if not isinstance(powers, list) or len(powers) != width or not all(type(p) is int for p in powers):
            raise InputError(
                "the range table's channel factors do not fit the model",
                evidence=f"for {group!r}, which has {width} channels that can be scaled: {powers!r:.60}",
                hint="the table was edited or is of another model; `edgeres calibrate` makes it anew",
            )
        factor = np.exp2(np.asarray(powers) / PER_OCTAVE)
        for node in channels.writers[group]:
            for name in node.input[1:]:
                arrays[name] = arrays[name] * factor.reshape(-1, *[1] * (arrays[name].ndim - 1))
        for node in channels.readers[group]:
            weight = arrays[node.input[1]]
            arrays[node.input[1]] = weight / factor.reshape(1, -1, *[1] * (weight.ndim - 2))
    out = type(model)()
    out.CopyFrom(model)
    del out.graph.initializer[:]
    out.graph.initializer.extend(numpy_helper.from_array(a.astype(kinds[name]), name) for name, a in arrays.items())
    return out
