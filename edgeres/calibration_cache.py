"""TensorRT's calibration cache from a range table, for the implicit INT8 of TensorRT 8 to 10 and its DLA.

The text format: a header ``TRT-<version>-<algorithm>``, then one ``tensor: scale`` a line, the scale (dynamic range /
127) as the hexadecimal digits of a big-endian float32.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from typing import Any

from edgeres import graph
from edgeres.calibrate import RangeTable
from edgeres.errors import InputError
from edgeres.quantize import SCHEMES, activation_scales, pairs

ALGORITHM = "EntropyCalibration2"
"""The calibrator whose caches every version reads, and the only one that DLA takes."""


def header(version: str, algorithm: str = ALGORITHM) -> str:
    """First line for TensorRT ``version`` such as "10.3.0": NV_TENSORRT_VERSION counts otherwise from 10 on."""
    try:
        major, minor, patch = (int(part) for part in version.split(".")[:3])
    except ValueError as error:
        raise InputError(f"{version!r} is no TensorRT version", hint='such as "10.3.0"') from error
    return f"TRT-{major * (10_000 if major >= 10 else 1_000) + minor * 100 + patch}-{algorithm}"


def scales(model: Any, table: RangeTable, method: str, keep: Collection[str] = ()) -> dict[str, float]:
    """Scale of every tensor of ``model``, equalized as ``table`` says, but the logits.

    A layer that reads or writes a tensor without a scale stays in FP16: the last one, and those in ``keep``.
    What only a ReLU reads is fused with it and has the ReLU's scale; what carries another tensor's values has that
    one's.
    """
    scheme = SCHEMES["implicit"]
    found = activation_scales(model, table, scheme, method, pairs(model, scheme, keep))
    out = {name: float(scale) for name, (scale, _) in found.items()}
    for node in reversed(model.graph.node):
        for name in node.input:
            if node.op_type == "Relu" and name not in out and node.output[0] in out:
                out[name] = out[node.output[0]]
    order = [graph.INPUT, *(o for n in model.graph.node for o in n.output)]
    return {name: out[name] for name in order if name in out}


def write(scales: dict[str, float], version: str) -> str:
    """The text of a cache for TensorRT ``version``."""
    lines = (f"{name}: {struct.pack('>f', scale).hex()}" for name, scale in scales.items())
    return "\n".join([header(version), *lines]) + "\n"


def read(text: str) -> tuple[str, dict[str, float]]:
    """The inverse of `write`: header, and scale by tensor. Also reads what TensorRT writes, which pads no zeros."""
    first, *lines = text.splitlines() or [""]
    if not first.startswith("TRT-"):
        raise InputError("this is no TensorRT calibration cache", evidence=f"it begins with {first[:40]!r}")
    found = {}
    for number, line in enumerate(lines, 2):
        name, _, digits = line.rpartition(": ")
        try:
            if not (name and digits):
                raise ValueError("a name or a scale is missing")
            (found[name],) = struct.unpack(">f", bytes.fromhex(digits.zfill(8)))
        except (ValueError, struct.error) as error:
            raise InputError("the calibration cache is damaged", evidence=f"line {number}: {line!r}") from error
    return first, found
