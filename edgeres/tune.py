"""Which quantized model to take: the most faithful one on held-out images, and never one that collapsed.

Fidelity is measured against the FP32 model, without labels. ONNX Runtime executes every scheme's graph as written,
without its optimizations: a simulation of what the target computes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeres import graph
from edgeres.calibrate import RangeTable
from edgeres.equalize import equalize
from edgeres.errors import BuildError, InputError, need
from edgeres.fidelity import decibels, squares
from edgeres.fp16 import rounding
from edgeres.loader import Batch
from edgeres.progress import bar, say
from edgeres.quantize import SAME_VALUES, Scheme, int8
from edgeres.recipe import AUTO
from edgeres.thresholds import METHODS

HELD_OUT = 128
"""Images that fidelity is measured on, where the calibration set has as many to spare."""
COLLAPSED = 90.0
"""Top-1 agreement with FP32 in percent below which a model is not taken as it is."""
NOISE = 3.0
"""SQNR in dB, likewise: images that all are of one class agree with a constant too."""
CLEAN = 60.0
"""SQNR in dB from which a tensor counts as exact."""
FEW = 8
"""Images that single layers are looked at on."""
STEPS = (1, 2, 4, 8, 16)
"""How many of the worst layers stay in floating point, one try after the other."""


@dataclass(frozen=True)
class Fidelity:
    """Top-1 agreement with FP32 in percent, and SQNR of the logits in dB, over a number of images."""

    agreement: float
    sqnr_db: float
    images: int

    @property
    def collapsed(self) -> bool:
        """Whether a model is not to be taken as it is."""
        return self.agreement < COLLAPSED or self.sqnr_db < NOISE

    def __str__(self) -> str:
        return f"{self.sqnr_db:.1f} dB, {self.agreement:.1f}% agreement on {self.images} images"


@dataclass(frozen=True)
class Choice:
    """A quantized ``model``, the ``method`` its thresholds are by, the layers ``kept`` in floating point.

    ``tried`` is every method's fidelity, most faithful first; empty where there were no images to measure it on.
    """

    model: Any
    method: str
    kept: list[str]
    tried: dict[str, Fidelity]


class Held:
    """Held-out images with what FP32 ``model`` answers to them."""

    def __init__(self, model: Any, batches: Iterable[Batch]) -> None:
        self.batches = [b.pixels for b in batches]
        self.reference = self._logits(model)
        if wrong := int((~np.isfinite(self.reference).all(1)).sum()):
            raise InputError(
                "the FP32 model computes NaN or infinity",
                evidence=f"for {wrong} of {len(self.reference)} images",
                hint="check the weights and the preprocess",
            )

    def fidelity(self, model: Any) -> Fidelity:
        """How close ``model`` comes to FP32. Logits that are not finite agree with nothing."""
        logits = self._logits(model)
        same = (logits.argmax(1) == self.reference.argmax(1)) & np.isfinite(logits).all(1)
        noise = squares(self.reference, logits) if np.isfinite(logits).all() else (0.0, 1.0)
        return Fidelity(100 * float(same.mean()), decibels(*noise), len(logits))

    def _logits(self, model: Any) -> np.ndarray:
        session = _session(model, [graph.OUTPUT])
        return np.concatenate([session.run(None, {graph.INPUT: pixels})[0] for pixels in self.batches])


def choose(model: Any, table: RangeTable, scheme: Scheme, method: str, held: Held | None) -> Choice:
    """Quantize ``model`` by ``method``, or with `AUTO` by each, and take the most faithful.

    Where that has collapsed, climb: the other methods, then the worst layers in floating point, more at each step.
    `BuildError` where nothing helps. Without ``held`` images nothing is measured.
    """
    if held is None:
        return Choice(int8(model, table, scheme, method), method, [], {})
    methods = list(METHODS) if method == AUTO else [method]
    models = {m: int8(model, table, scheme, m) for m in methods}
    tried = _measure(models, held)
    if tried[next(iter(tried))].collapsed and method != AUTO:
        say(f"{method} collapses ({tried[method]}): try the other methods")
        others = {m: int8(model, table, scheme, m) for m in METHODS if m != method}
        tried = _sorted(tried | _measure(others, held))
        models |= others
    best = next(iter(tried))
    if not tried[best].collapsed:
        if best != method:
            say(f"{best} is the most faithful: {tried[best]}")
        return Choice(models[best], best, [], tried)
    say(f"every method collapses, {best} least ({tried[best]}): keep the worst layers in {scheme.rest.upper()}")
    even = equalize(model, table.exponents)
    worst = worst_layers(even, tensor_fidelity(even, models[best], held))
    for count in STEPS:
        keep = _with_input(model, worst[:count])
        kept = [name for name in worst if name in keep]
        candidate = int8(model, table, scheme, best, keep)
        found = held.fidelity(candidate)
        say(f"{', '.join(kept)} in {scheme.rest.upper()}: {found}")
        if not found.collapsed:
            return Choice(candidate, best, kept, {best: found} | {m: f for m, f in tried.items() if m != best})
    raise BuildError(
        f"INT8 does not hold what FP32 computes: {found}",
        evidence="\n".join(f"{m}: {f}" for m, f in tried.items())
        + f"\n{best}, {len(kept)} layers in {scheme.rest.upper()}: {found}",
        hint="build with --precision fp16; check that calibration images are prepared as the network was trained",
    )


def worst_layers(model: Any, found: dict[str, float]) -> list[str]:
    """Names of the layers of FP32 ``model``, worst first: by what SQNR falls from a layer's input to its output.

    ``found`` is what `tensor_fidelity` gives.
    """
    layers = [n for n in model.graph.node if n.op_type in graph.LAYERS]
    loss = {n.name: found.get(n.input[0], CLEAN) - found[n.output[0]] for n in layers}
    return sorted(loss, key=lambda name: -loss[name])


def tensor_fidelity(model: Any, quantized: Any, held: Held) -> dict[str, float]:
    """SQNR in dB of what layers read and write, on a few of the ``held`` images; `CLEAN` and better counts as that."""
    layers = [n for n in model.graph.node if n.op_type in graph.LAYERS]
    names = list(dict.fromkeys(t for n in layers for t in (n.input[0], n.output[0]) if t != graph.INPUT))
    pixels = held.batches[0][:FEW]
    reference, noisy = ([*_session(m, names).run(names, {graph.INPUT: pixels})] for m in (model, quantized))
    return {n: min(decibels(*squares(a, b)), CLEAN) for n, a, b in zip(names, reference, noisy, strict=True)}


def _with_input(model: Any, layers: Collection[str]) -> set[str]:
    """Names of ``layers``, and of all nodes that read or write what those read: a pair would be left on it else."""
    keep = set(layers)
    tensors = {n.input[0] for n in model.graph.node if n.name in keep}
    for node in reversed(model.graph.node):
        if tensors & {*node.output}:
            keep.add(node.name)
            tensors |= {*node.input} if node.op_type in SAME_VALUES else set()
    return keep | {n.name for n in model.graph.node if tensors & {*n.input}}


def _session(model: Any, outputs: list[str]) -> Any:
    """An InferenceSession for any batch that executes ``model`` as it is written."""
    ort = need("onnxruntime", "onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    probe = rounding(graph.expose(model, outputs)).SerializeToString()
    return ort.InferenceSession(probe, options, providers=["CPUExecutionProvider"])


def _measure(models: dict[str, Any], held: Held) -> dict[str, Fidelity]:
    """Fidelity of each of ``models`` by name, the most faithful first."""
    found = {}
    with bar("measure fidelity", len(models), "models") as step:
        for name, model in models.items():
            found[name] = held.fidelity(model)
            step()
    return _sorted(found)


def _sorted(found: dict[str, Fidelity]) -> dict[str, Fidelity]:
    """By SQNR: agreement on a hundred images has too few steps to tell methods apart."""
    order: Collection[str] = sorted(found, key=lambda name: -found[name].sqnr_db)
    return {name: found[name] for name in order}
