"""A run as the terminal shows it, 80 columns wide. Standard library only."""

from __future__ import annotations

import textwrap
from typing import Any

from answers import line
from outcome import FAILED, OK, SKIPPED

WIDTH = 80
NAME, STATUS = 22, 6
COLUMNS = (9, 9, 8, 9, 9, 9)
"""Widths of numbers, after 26 for a name."""


def table(result: dict[str, Any]) -> str:
    """Parts, speeds, answers."""
    machine = result["machine"] or {}
    gpus = ", ".join(f"{gpu['name']} ({gpu['capability']})" for gpu in machine.get("gpus", [])) or "no GPU"
    title = f"edgeres on {gpus}, driver {machine.get('driver', 'none')}: {result['seconds']:.0f} s"
    out = [*textwrap.wrap(title, WIDTH), ""]
    for name, part in result["parts"].items():
        if part["status"] != SKIPPED:
            out += wrapped(f"{name:<{NAME}} {part['status']:<{STATUS}} ", line(name, part))
    out += left_out(result["skipped"])
    out += speeds(result["parts"])
    if any(part["status"] == OK for part in result["parts"].values()):
        out.append("")
        for question, answer in result["answers"].items():
            out += wrapped(f"{question}: ", answer, indent=4)
    number = {kind: sum(p["status"] == kind for p in result["parts"].values()) for kind in (OK, FAILED)}
    out += ["", f"parts: {number[OK]} ok, {len(result['failed'])} failed; {len(result['skipped'])} things skipped"]
    return "\n".join(out)


def left_out(skipped: list[dict[str, str]]) -> list[str]:
    """What was skipped, by reason: each is said once."""
    out, reasons = [], dict[str, list[str]]()
    for one in skipped:
        reasons.setdefault(one["reason"], []).append(one["part"])
    for reason, names in reasons.items():
        out += ["", *wrapped("skipped: ", reason, indent=4), *wrapped("    ", ", ".join(names), indent=4)]
    return out


def speeds(parts: dict[str, Any]) -> list[str]:
    """A row per batch and side: medians, throughput, and how far from what the GPU could do."""
    out = []
    for part in parts.values():
        if not (sides := part["record"].get("sides")):
            continue
        batch = part["record"]["batch"]
        headings = ("compute", "images/s", "faster", "of floor", "whole", "images/s")
        out += ["", f"{f'batch {batch}':<26}" + "".join(f"{h:>{w}}" for h, w in zip(headings, COLUMNS, strict=True))]
        for name, found in sides.items():
            compute, whole = found["compute"], found["whole"]
            faster = compute["faster"].get("first")
            cells = (
                milliseconds(compute["p50_ms"]),
                f"{compute['images_per_s']:,.0f}",
                times(faster and faster["of_p50"]),
                times(found["of_floor"]),
                milliseconds(whole["p50_ms"]),
                f"{whole['images_per_s']:,.0f}",
            )
            out.append(f"{name[:26]:<26}" + "".join(f"{c:>{w}}" for c, w in zip(cells, COLUMNS, strict=True)))
    if out:
        out += [
            "",
            "compute: ms, on the GPU; whole: ms, from and to memory of the host",
            "faster: than PyTorch FP32; of floor: times the least that this GPU could take",
        ]
    return out


def milliseconds(value: float) -> str:
    """Four digits that count, at most."""
    return f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:.1f}"


def times(value: float | None) -> str:
    """A ratio."""
    return "-" if value is None else f"{value:.2f}x"


def wrapped(head: str, text: str, indent: int = NAME + STATUS + 2) -> list[str]:
    """``head`` and then ``text``, continued under itself."""
    return textwrap.wrap(head + text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False) or [head]
