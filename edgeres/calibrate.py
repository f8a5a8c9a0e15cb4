"""FP32 ONNX + batches -> range table: one streaming pass, in memory that does not grow with the number of images."""

from __future__ import annotations

import base64
import copy
import functools
import math
import operator
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeres import counting, graph
from edgeres.counting import BINS as BINS
from edgeres.errors import InputError, StaleError, need
from edgeres.files import digest, read_json, write_json
from edgeres.loader import Batch, Loader
from edgeres.machine import cores
from edgeres.probe import Probe
from edgeres.progress import say, track

FORMAT = "edgeres range table 1"
SAVE_EVERY = 5.0
"""Seconds between two saves of a partial table."""
NO_IMAGES = "there are no images to calibrate on"


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
    limit: float = counting.SMALLEST
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(2 * BINS, np.int64))

    def update(self, values: np.ndarray) -> None:
        """Add float32 ``values`` of any shape, at least one; `FloatingPointError` if one is not finite."""
        flat = values.reshape(-1)
        lo, hi, zeros, self.limit = counting.count(flat, self.histogram, self.limit)
        if not (math.isfinite(lo) and math.isfinite(hi)):
            raise FloatingPointError("NaN or infinity")
        self.min, self.max = min(self.min, lo), max(self.max, hi)
        self.count += flat.size
        self.zeros += zeros

    def edges(self) -> np.ndarray:
        """Bin edges (2 BINS + 1,)."""
        return np.linspace(-self.limit, self.limit, 2 * BINS + 1)

    def bars(self, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The histogram for people, without empty ends -> counts (n,) and edges (n + 1,).

        At most ``most`` bars on each side of zero.
        """
        used = int(np.flatnonzero(self.histogram + self.histogram[::-1])[-1]) + 1 - BINS  # bins on the wider side
        merge = max(1, -(-used // most))
        side = -(-used // merge)
        padded = np.pad(self.histogram, merge)  # counted from zero outward, and the last may reach beyond the bins
        middle = BINS + merge
        counts = padded[middle - side * merge : middle + side * merge].reshape(-1, merge).sum(1)
        edges = np.arange(-side, side + 1) * (merge * self.limit / BINS)
        filled = np.flatnonzero(counts)
        return counts[filled[0] : filled[-1] + 1], edges[filled[0] : filled[-1] + 2]

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
    """What calibration measured. ``made_from`` holds the digests of model, images and preprocess.

    With ``exponents``, ranges are those of the model that `equalize.equalize` makes with them.
    """

    made_from: dict[str, str]
    images: int = 0
    skipped: list[str] = field(default_factory=list)
    exponents: dict[str, list[int]] = field(default_factory=dict)
    tensors: dict[str, TensorRange] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the exponents of a group as one line of numbers."""
        exponents = {group: " ".join(map(str, powers)) for group, powers in self.exponents.items()}
        tensors = {name: r.to_json() for name, r in self.tensors.items()}
        return {"format": FORMAT, **vars(self), "exponents": exponents, "tensors": tensors}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> RangeTable:
        """The inverse of `to_json`; `ValueError` saying what is wrong."""
        try:
            exponents = {group: [int(p) for p in text.split()] for group, text in value["exponents"].items()}
            tensors = {name: TensorRange.from_json(r) for name, r in value["tensors"].items()}
            return cls(dict(value["made_from"]), value["images"], value["skipped"], exponents, tensors)
        except KeyError as error:
            raise ValueError(f"{error} is missing") from error
        except (AttributeError, TypeError, zlib.error) as error:
            raise ValueError(str(error)) from error

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(path, self.to_json())

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
            return cls.from_json(value)
        except ValueError as error:
            raise InputError(f"range table {path} is damaged", evidence=str(error), hint="calibrate again") from error

    def require(self, made_from: dict[str, str]) -> None:
        """Raise `StaleError` naming each input that is not the one the table was measured on."""
        changed = [key for key, value in made_from.items() if self.made_from.get(key) != value]
        if changed:
            raise StaleError(
                f"the range table is not of the same {' and '.join(changed)}",
                evidence="\n".join(
                    f"{k}: table {self.made_from.get(k, 'none')[:12]}, here {made_from[k][:12]}" for k in changed
                ),
                hint="run `edgeres calibrate` again, or give the files it was made from",
            )


@dataclass
class Partial:
    """A table on its way: ``done`` images of the set were looked at, ``skipped`` (path, reason) were left out of it."""

    table: RangeTable
    done: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def save(self, path: Path, inputs: dict[str, Any]) -> None:
        """Write for a later `load` with the same ``inputs``."""
        record = {"inputs": inputs, **vars(self), "table": self.table.to_json()}
        write_json(path, {**record, "sha256": digest(record)})

    @classmethod
    def load(cls, path: Path, inputs: dict[str, Any], skip_bad: bool) -> Partial | None:
        """What an earlier run left; None, and it is said why, if that is damaged or of no use to this run."""
        if not path.is_file():
            return None
        try:
            record = read_json(path, "partial range table")
        except InputError:
            record = {}
        if record.pop("sha256", None) != digest(record):
            why = "is damaged"
        elif record["inputs"] != inputs:
            why = "was measured on other inputs"
        elif record["skipped"] and not skip_bad:
            why = "leaves out unreadable images"
        else:
            say(f"resume at image {record['done']}")
            skipped = [(path, reason) for path, reason in record["skipped"]]
            return cls(RangeTable.from_json(record["table"]), record["done"], skipped)
        say(f"{path.name} {why}: begin anew")
        return None


def calibrate(
    model: Any, batches: Iterable[Batch], made_from: dict[str, str], partial: Path | None = None
) -> RangeTable:
    """Run the FP32 ``model`` over ``batches`` and measure every tensor that INT8 may need.

    With ``partial``, ``batches`` must be a `Loader`: what is measured is kept at that path every few seconds and when
    the run is cut short. The next run with the same inputs goes on from there, to the same table, and the file goes.
    """
    need("numba", "calibrate")
    if not operator.length_hint(batches, 1):
        raise InputError(NO_IMAGES)
    names = graph.activations(model)
    probe = Probe(model, names)
    now = Partial(RangeTable(made_from, tensors={name: TensorRange() for name in names}))
    loader = batches if isinstance(batches, Loader) else None
    inputs: dict[str, Any] = {}
    if loader:
        if partial:
            inputs = {**made_from, "batch": loader.batch, "onnxruntime": need("onnxruntime", "onnx").__version__}
            now = Partial.load(partial, inputs, loader.skip_bad) or now
        batches = rest = replace(loader, images=loader.images.take(range(now.done, len(loader.images))), skipped=[])
    first, earlier = now.done, now.skipped

    def name_of(place: int) -> str:
        return f"image {first + place}" + (f", {loader.images.paths[first + place]}" if loader else "")

    # a partial table ends before a batch that came: then a readable image is left for the next run
    safe, saved = now, time.monotonic()
    try:
        with ThreadPoolExecutor(cores()) as pool:
            compiled = pool.submit(counting.compiled)  # while the first images are decoded
            for batch in track(batches, "calibrate", operator.length_hint(batches)):
                if partial:
                    safe = copy.deepcopy(now)
                    if safe.done and time.monotonic() > saved + SAVE_EVERY:
                        safe.save(partial, inputs)
                        saved = time.monotonic()
                compiled.result()
                _measure(now.table, probe, batch, pool, name_of)
                if loader:  # its batches hold fewer images where some are unreadable: places count
                    now.done = first + (int(batch.index[-1]) // loader.batch + 1) * loader.batch
                    now.skipped = earlier + rest.skipped
    except BaseException:
        if partial and safe.done:
            safe.save(partial, inputs)
        raise
    if not now.table.images:
        raise InputError(NO_IMAGES)
    if loader:
        loader.skipped[:] = earlier + rest.skipped
        now.table.skipped = [path for path, _ in loader.skipped]
    if partial:
        partial.unlink(missing_ok=True)
    return now.table


def _measure(
    table: RangeTable, probe: Probe, batch: Batch, pool: ThreadPoolExecutor, name_of: Callable[[int], str]
) -> None:
    """Add one batch to ``table``; ``name_of`` says in an error which image is at a place."""

    def update(start: int, tensors: dict[str, np.ndarray], name: str) -> None:
        try:
            table.tensors[name].update(tensors[name])
        except FloatingPointError as error:
            finite = [bool(np.isfinite(image).all()) for image in tensors[name]]
            raise InputError(
                f"tensor {name} holds NaN or infinity",
                evidence=f"in {name_of(int(batch.index[start + finite.index(False)]))} of the calibration set",
                hint="check the weights and the preprocess: no range can be derived from such values",
            ) from error

    for start, tensors in probe.run(batch.pixels):
        for _ in pool.map(functools.partial(update, start, tensors), tensors):
            pass  # in this order, so that an error names the first tensor that went wrong
    table.images += len(batch.pixels)
