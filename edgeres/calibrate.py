"""FP32 ONNX + batches -> range table: one streaming pass, in memory that does not grow with the number of images."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgeres import graph
from edgeres.errors import InputError, StaleError, need
from edgeres.files import read_json, write_json
from edgeres.loader import Batch

BINS = 2048
"""Histogram bins on each side of zero."""
FORMAT = "edgeres range table 1"


@dataclass
class TensorRange:
    """What one tensor did over all calibration images.

    ``histogram`` (2 BINS,) counts values in equal bins over [-limit, limit). ``limit`` is a power of two, and grows by
    merging pairs of bins: the counts depend neither on the order of the images nor on the batch size. ``zeros`` counts
    values of exactly 0, which lie in bin BINS.
    """

    min: float = math.inf
    max: float = -math.inf
    count: int = 0
    zeros: int = 0
    limit: float = 2.0**-116  # the smallest for which BINS / limit is a float32
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(2 * BINS, np.int64))

    def update(self, values: np.ndarray) -> None:
        """Add float32 ``values`` of any shape, all finite."""
        flat = values.reshape(-1)
        lo, hi = float(flat.min()), float(flat.max())
        self.min, self.max = min(self.min, lo), max(self.max, hi)
        self.count += flat.size
        self.zeros += flat.size - int(np.count_nonzero(flat))
        self._grow(max(-lo, hi))
        scale = np.float32(BINS / self.limit)
        for start in range(0, flat.size, 1 << 16):  # pieces that stay in the cache
            index = flat[start : start + (1 << 16)] * scale
            np.floor(index, out=index)  # first, for adding BINS may round up across an edge
            index += np.float32(BINS)
            self.histogram += np.bincount(index.astype(np.int64), minlength=2 * BINS)

    def _grow(self, largest: float) -> None:
        """Double ``limit`` until it exceeds ``largest``; each doubling merges bins in pairs around zero."""
        if largest < self.limit:
            return
        limit = 2.0 ** (math.floor(math.log2(largest)) + 1)
        if self.histogram.any():
            for _ in range(round(math.log2(limit / self.limit))):
                merged = self.histogram.reshape(-1, 2).sum(1)
                self.histogram = np.pad(merged, BINS // 2)
        self.limit = limit

    def edges(self) -> np.ndarray:
        """Bin edges (2 BINS + 1,)."""
        return np.linspace(-self.limit, self.limit, 2 * BINS + 1)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the histogram's counts as zlib-compressed little-endian uint64, in base64."""
        packed = base64.b64encode(zlib.compress(self.histogram.astype("<u8").tobytes(), 9)).decode()
        return {**vars(self), "histogram": packed}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TensorRange:
        """The inverse of `to_json`."""
        histogram = np.frombuffer(zlib.decompress(base64.b64decode(value["histogram"])), "<u8").astype(np.int64)
        if histogram.shape != (2 * BINS,) or histogram.sum() != value["count"]:
            raise ValueError("the histogram does not hold the counted values")
        if not -value["limit"] < value["min"] <= value["max"] < value["limit"]:
            raise ValueError("min, max and limit contradict each other")
        return cls(**{**value, "histogram": histogram})


@dataclass
class RangeTable:
    """What calibration measured. ``made_from`` holds the digests of model, images and preprocess."""

    made_from: dict[str, str]
    images: int = 0
    skipped: list[str] = field(default_factory=list)
    tensors: dict[str, TensorRange] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        tensors = {name: r.to_json() for name, r in self.tensors.items()}
        write_json(path, {"format": FORMAT, **vars(self), "tensors": tensors})

    @classmethod
    def load(cls, path: Path) -> RangeTable:
        """Read a table; `InputError` if it is none or was damaged."""
        value = read_json(path, "range table")
        if value.get("format") != FORMAT:
            raise InputError(
                f"{path} is not a range table",
                evidence=f"its format is {value.get('format')!r}, expected {FORMAT!r}",
                hint="`edgeres calibrate` writes one",
            )
        try:
            tensors = {name: TensorRange.from_json(r) for name, r in value["tensors"].items()}
            return cls(dict(value["made_from"]), value["images"], value["skipped"], tensors)
        except (AttributeError, KeyError, TypeError, ValueError, zlib.error) as error:
            evidence = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise InputError(f"range table {path} is damaged", evidence=evidence, hint="calibrate again") from error

    def require(self, made_from: dict[str, str]) -> None:
        """Raise `StaleError` naming each input that is not the one the table was measured on."""
        changed = [key for key, value in made_from.items() if self.made_from.get(key) != value]
        if changed:
            raise StaleError(
                f"the range table was made from another {' and another '.join(changed)}",
                evidence="\n".join(
                    f"{k}: table {self.made_from.get(k, 'none')[:12]}, here {made_from[k][:12]}" for k in changed
                ),
                hint="run `edgeres calibrate` again, or give the files it was made from",
            )


def calibrate(model: Any, batches: Iterable[Batch], made_from: dict[str, str]) -> RangeTable:
    """Run the FP32 ``model`` over ``batches`` and measure every tensor that INT8 may need."""
    ort = need("onnxruntime", "onnx")
    names = graph.activations(model)
    probe = type(model)()
    probe.CopyFrom(model)
    probe.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"  # batches here need not be the model's own
    helper = need("onnx.helper", "onnx")
    inner = [n for n in names if n != graph.INPUT]
    probe.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in inner)
    session = ort.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    table = RangeTable(made_from, tensors={name: TensorRange() for name in names})
    for batch in batches:
        results = session.run(inner, {graph.INPUT: batch.pixels})
        for name, values in zip((graph.INPUT, *inner), (batch.pixels, *results), strict=True):
            with np.errstate(invalid="ignore"):  # inf - inf
                total = values.sum(dtype=np.float64)
            if not np.isfinite(total):
                raise InputError(
                    f"tensor {name} holds NaN or infinity",
                    evidence=f"among images {batch.index[0]} to {batch.index[-1]} of the calibration set",
                    hint="check the weights and the preprocess: no range can be derived from such values",
                )
            table.tensors[name].update(values)
        table.images += len(batch.pixels)
    if not table.images:
        raise InputError("there are no images to calibrate on")
    return table
