"""What the manifest of a bundle must hold, since a device takes it from a file that anyone may have written."""

from __future__ import annotations

from typing import Any

MOST = 4096
"""Images of the typed model's fixed batch, at most: a self-test holds them in memory."""
KEYS = (
    *((key, str) for key in ("name", "target", "precision", "typed.precision", "model.digest", "images.digest")),
    *((key, int) for key in ("typed.classes", "graph.convolutions", "graph.residuals", "model.size_bytes")),
    *((key, int) for key in ("images.count", "images.asked", "images.of")),
    *((key, dict) for key in ("made_with", "typed", "reference")),
    ("images.set", str),
    *((key, list) for key in ("images.skipped", "images.left_out")),
)
"""What a manifest must have."""
TYPED = (
    *((key, dict) for key in ("typed.quantization", "typed.chosen", "typed.layers", "typed.weights")),
    *((key, int) for key in ("typed.batch", "typed.depth", "typed.quantization.weight_bits")),
    *((key, list) for key in ("typed.ranges", "typed.kept_fp32")),
    ("typed.variant", str),
)
"""What it may have."""


def check(record: dict[str, Any]) -> None:
    """Raise unless what a self-test takes from a manifest is of its kind."""
    for keys, optional in ((KEYS, False), (TYPED, True)):
        for key, kind in keys:
            value: Any = record
            for part in key.split("."):
                value = (value or {}).get(part) if optional else value[part]
            wrong = type(value) is not kind or (isinstance(value, int) and not 0 <= value < 2**63)
            if wrong and not (optional and value is None):
                raise TypeError(f"{key} is {str(value)[:80]!r}")
    if (batch := record["typed"].get("batch")) is not None and not 1 <= batch <= MOST:
        raise ValueError(f"typed.batch is {batch}, not from 1 to {MOST:,}")
    asked, skipped = record["images"]["asked"], record["images"]["skipped"]
    if set(map(type, skipped)) - {int} or set(map(type, record["images"]["left_out"])) - {str}:
        raise TypeError("images.skipped has other than places, or images.left_out other than names")
    if skipped != sorted({i for i in skipped if 0 <= i < asked}) or record["images"]["count"] != asked - len(skipped):
        raise ValueError(f"images.count and images.skipped are not of {asked:,} images")
