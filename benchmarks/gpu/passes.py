"""The two passes in which FP32 runs over many images, calibration and fidelity: how much faster is a GPU, same numbers?

edgeres makes both on the CPU, by ONNX Runtime. Beside that, in turn: the same graph by PyTorch on the GPU, and by ONNX
Runtime's CUDA provider where there is one. Pixels lie ready in memory of the host, as decoding is no part of this.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import nets
import numpy as np
from on_torch import Network, grown, measure
from outcome import Skip, left, so_far, under_way
from plans import LEAST_DB
from roofline import cuda
from sides import CUDA, session

from edgeres import counting, graph
from edgeres.calibrate import RangeTable, calibrate
from edgeres.fidelity import decibels, squares
from edgeres.loader import Batch
from edgeres.probe import Probe
from edgeres.quantize import SCHEMES, interval
from edgeres.recipe import CalibrationSection
from edgeres.runners import open_runner

CPU, PYTORCH, ORT = "CPU", "PyTorch", "ONNX Runtime"
BATCH = 32
BATCHES = 4
"""Batches of a pass. The first warms up: it counts for the numbers, and not for the time."""
ROUNDS = 3
"""At most: what is slow has one."""
EXTREME, MOVED, THRESHOLD = 1e-4, 1e-3, 0.03
"""What rounding may change: extremes, by a share of the larger one; values that lie in another bin, a share of all; and
thresholds, where two are as good, by one step of their grid. FP32 in another order moved 5 in 100,000 values of
ResNet-50 on a CPU, and extremes by a millionth; TF32, rounded there as GPUs do, 350 values, and extremes by 1/900."""

Numbers = Any
"""What a pass comes to: a `RangeTable`, or logits (N, classes)."""


class Clocked:
    """Batches, and when the second was asked for."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches, self.start = batches, math.nan

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for place, batch in enumerate(self.batches):
            if place == 1:
                self.start = time.perf_counter()
            yield batch


Pass = Callable[[Clocked], Numbers]


def calibration(
    work: Path, device: str = "cuda", provider: str = CUDA, most: float = 25.0, batch: int = BATCH
) -> dict[str, Any]:
    """edgeres' calibration pass, and the same on ``device`` and by ``provider``; see `compare`."""
    torch = pytorch(device)
    model = graph.load(nets.onnx_file(work, "v1.5", "fp32"))
    counting.compiled()

    def other(batches: Clocked) -> RangeTable:
        with mock.patch("edgeres.calibrate.Probe", partial(ProviderProbe, provider)):
            return calibrate(model, batches, {})

    network = Network(torch, model, device)
    passes: dict[str, Pass] = {
        CPU: lambda batches: calibrate(model, batches, {}),
        PYTORCH: lambda batches: measure(network, batches),
        ORT: other,
    }
    record = compare(work, "calibration", passes, ready(model, batch), differences, most)
    return {**record, "tensors": len(graph.activations(model)), "method": CalibrationSection().method}


def fidelity(
    work: Path, device: str = "cuda", provider: str = CUDA, most: float = 25.0, batch: int = BATCH
) -> dict[str, Any]:
    """FP32's logits as `edgeres validate` has them, and the same on ``device`` and by ``provider``; see `compare`."""
    torch = pytorch(device)
    path = nets.onnx_file(work, "v1.5", "fp32")
    model = graph.load(path)
    network = Network(torch, model, device)

    def reference(batches: Clocked) -> np.ndarray:
        with open_runner(path, "onnxruntime") as runner:
            return np.concatenate([runner.infer(batch.pixels) for batch in batches])

    def other(batches: Clocked) -> np.ndarray:
        opened = session(path, provider)
        return np.concatenate([opened.run([graph.OUTPUT], {graph.INPUT: batch.pixels})[0] for batch in batches])

    passes: dict[str, Pass] = {
        CPU: reference,
        PYTORCH: lambda batches: np.concatenate([network.run(batch.pixels).cpu().numpy() for batch in batches]),
        ORT: other,
    }
    return compare(work, "fidelity", passes, ready(model, batch), apart, most)


def pytorch(device: str) -> Any:
    """PyTorch, which sees a GPU if that is what it is for."""
    if device == "cuda":
        return cuda()
    import torch

    return torch


def ready(model: Any, batch: int) -> list[Batch]:
    """Smooth random images of the size of ``model``."""
    crop = graph.metadata(model)["preprocess"]["crop"]
    return [
        Batch(nets.pixels(batch, crop, 600 + n), None, np.arange(batch * n, batch * (n + 1))) for n in range(BATCHES)
    ]


def compare(
    work: Path,
    part: str,
    passes: Mapping[str, Pass],
    batches: list[Batch],
    judge: Callable[[Numbers, Numbers], dict[str, Any]],
    most: float,
) -> dict[str, Any]:
    """``passes``, in turn; ``judge`` says how far the numbers of each are from the first one's, and has checks.

    One round, and more as far as they fit ``most`` seconds. ``faster``: the median ratio of the times within a round.
    """
    until = time.monotonic() + min(most, 0.7 * left())
    first, *_ = passes
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    images = sum(len(batch.pixels) for batch in batches[1:])
    record: dict[str, Any] = {"batch": len(batches[0].pixels), "images": images}
    record |= {"passes": {}, "skipped": {}, "checks": {}}
    reference: Numbers = None
    for _ in range(ROUNDS):
        start = time.monotonic()
        for name, go in passes.items():
            if name in record["skipped"]:
                continue
            under_way(work, name)
            clocked = Clocked(batches)
            try:
                numbers = go(clocked)
            except Skip as reason:
                record["skipped"][name] = str(reason)
                continue
            except Exception as error:  # drivers raise whatever they like; what was measured is kept
                if name == first:
                    raise
                traceback.print_exc()
                record["skipped"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                record["checks"][f"{name} runs"] = False
                continue
            seconds[name].append(time.perf_counter() - clocked.start)
            found = record["passes"].setdefault(name, {})
            found["images_per_s"] = images / median(seconds[name])
            if name == first:
                reference = numbers
            else:
                found["faster"] = median(a / b for a, b in zip(seconds[first], seconds[name], strict=True))
                found |= judge(reference, numbers)
                record["checks"] |= {f"{name}: {what}": met for what, met in found.pop("checks").items()}
            so_far(work, part, record)
        took = time.monotonic() - start
        if time.monotonic() + took > until:
            break
    under_way(work)
    return {**record, "rounds": len(seconds[first])}


def differences(reference: RangeTable, table: RangeTable) -> dict[str, Any]:
    """How far two tables are apart: the worst tensors, and of all values the share that lies in another bin."""
    method, extremes, thresholds, moved, values = CalibrationSection().method, {}, {}, 0, 0
    for name, a in reference.tensors.items():
        b = table.tensors[name]
        extremes[name] = max(abs(a.min - b.min), abs(a.max - b.max)) / (max(abs(a.min), abs(a.max)) or 1.0)
        wanted, found = (interval(r, SCHEMES["tensorrt"], method)[1] for r in (a, b))
        thresholds[name] = abs(wanted - found) / (wanted or 1.0)
        a, b = (grown(r, max(a.limit, b.limit)) for r in (a, b))
        moved += int(np.abs(a.histogram - b.histogram).sum()) // 2
        values += a.count
    worst = {what: max(of, key=of.__getitem__) for what, of in (("extremes", extremes), ("thresholds", thresholds))}
    share, same = moved / values, [r.tensors[graph.INPUT].to_json() for r in (reference, table)]
    return {
        "extremes": {"largest": extremes[worst["extremes"]], "tensor": worst["extremes"]},
        "moved": share,
        "thresholds": {"largest": thresholds[worst["thresholds"]], "tensor": worst["thresholds"]},
        "checks": {
            "pixels are counted alike, to the last one": same[0] == same[1],
            "as many values are counted": all(r.count == table.tensors[n].count for n, r in reference.tensors.items()),
            f"extremes differ by {EXTREME:.2%} at most": extremes[worst["extremes"]] <= EXTREME,
            f"{MOVED:.1%} of values at most are in another bin": share <= MOVED,
            f"thresholds differ by {THRESHOLD:.0%} at most": thresholds[worst["thresholds"]] <= THRESHOLD,
        },
    }


def apart(reference: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """Signal to noise of logits (N, classes)."""
    db, least = decibels(*squares(reference, logits)), LEAST_DB["fp32"]
    equal = np.array_equal(reference, logits)
    return {"db": db, "equal": equal, "checks": {f"logits are the CPU's within {least:.0f} dB": db >= least}}


class ProviderProbe(Probe):
    """`Probe` with the network on ``provider``. Tensors come home to be counted there."""

    def __init__(self, provider: str, model: Any, names: list[str]) -> None:
        super().__init__(model, names)
        self.session = session(graph.expose(model, self.inner).SerializeToString(), provider)
