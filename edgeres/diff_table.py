"""What changed between two results or engines, as the terminal shows it. Fits 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from edgeres.tables import Trimmed, plain_table
from edgeres.words import NONE, between, count, decibels, megabytes, milliseconds, number, probability

Record = dict[str, Any]
SHOWN = 10
"""Layers that are shown; all are in the JSON."""


def shown(value: Record) -> RenderableType:
    """One table of the numbers of both, then what changed besides, then the judgement."""
    out = plain_table("", "A", "B", "B against A", title="", right=1)
    acc, lat, fid, joules = (value[key] for key in ("accuracy", "latency", "fidelity", "energy"))
    if None not in acc["top1"]:
        noise = ""
        if acc["drop"] is not None:
            ends = [-acc["interval"][1], -acc["interval"][0]]
            noise = f"{number(-acc['drop'], sign=True)} ({between(ends, sign=True)})"
        out.add_row("top-1 %", *map(number, acc["top1"]), noise)
    if acc["p_value"] is not None:
        out.add_row("p-value", "", "", probability(acc["p_value"]))
    if lat["ratio"] is not None:
        within = f" ({between(lat['interval'], 3)})" if lat["interval"] else ""
        out.add_row("p50 ms", *map(milliseconds, lat["p50"]), f"{lat['ratio']:.3f} times{within}")
    if joules:
        out.add_row("J/image", *(number(j, 4) for j in joules["joules_per_image"]), _times(joules["joules_per_image"]))
    if fid:
        out.add_row("SQNR", *map(decibels, fid["sqnr_db"]), "")
        out.add_row("agrees with FP32 %", *map(number, fid["agreement"]), "")
    if value["size_bytes"]:
        out.add_row("MB", *map(megabytes, value["size_bytes"]), _times(value["size_bytes"]))
    lines = [
        Text(f"A {value['a']}"),
        Text(f"B {value['b']}"),
        out if out.row_count else Text("nothing in common to compare"),
    ]
    for title, changes in (("made from", value["made_from"]), ("versions", value["versions"])):
        lines += [Text(f"{title}: {key} {_short(x)} -> {_short(y)}") for key, (x, y) in changes.items()]
    lines += [Text(line) for line in _layer_lines(value)]
    lines += [Text(f"note: {what}: {part['note']}") for what, part in (("top-1", acc), ("p50", lat)) if part["note"]]
    return Trimmed(*lines, *_judgement(value))


def _layer_lines(value: Record) -> Iterator[str]:
    found = value["layers"] or {"changed": [], "only_a": [], "only_b": []}
    for row in found["changed"][:SHOWN]:
        types = " to ".join(filter(None, dict.fromkeys(row["types"])))
        times = " to ".join(milliseconds(ms) for ms in row["ms"]) + " ms" if None not in row["ms"] else ""
        yield f"layer {row['layer']}: {', '.join(filter(None, (types, times)))}"
    if len(found["changed"]) > SHOWN:
        yield f"and {len(found['changed']) - SHOWN} more layers changed in precision or time"
    for key, name in (("only_a", "A"), ("only_b", "B")):
        if found[key]:
            more = " ..." * (len(found[key]) > 3)
            yield f"in {name} alone: {count(len(found[key]), 'layer')}: {', '.join(found[key][:3])}{more}"
    for row in ((value["fidelity"] or {}).get("layers") or [])[:SHOWN]:
        yield f"layer {row['layer']}: {' to '.join(decibels(db) for db in row['sqnr_db'])}"


def _judgement(value: Record) -> Iterator[Text]:
    acc, lat = value["accuracy"], value["latency"]
    if acc["change"] == "worse":
        yield Text(
            f"WORSE in top-1: {number(acc['drop'])} points lost, at least {number(acc['interval'][0])}", "bold red"
        )
    if lat["change"] == "worse":
        yield Text(f"WORSE in p50: {lat['ratio']:.3f} times as long, at least {lat['interval'][0]:.3f}", "bold red")
    for what, part in (("top-1", acc), ("p50", lat)):
        if part["change"] == "better":
            yield Text(f"better in {what}", "green")
    for what in value["incomparable"]:
        yield Text(f"NOT COMPARABLE: other {what}", "bold red")
    if not value["worse"] and not value["incomparable"]:
        unknown = [what for what, part in (("top-1", acc), ("p50", lat)) if part["change"] == "unknown"]
        yield Text(f"not worse beyond noise{'; not judged: ' + ', '.join(unknown) if unknown else ''}")


def _times(pair: list[float]) -> str:
    return f"{pair[1] / pair[0]:.2f} times" if pair[0] and pair[1] else NONE


def plain(value: Any) -> str:
    """A value of a record in words."""
    return "none" if value in (None, [], {}) else str(value)


def _short(value: Any) -> str:
    """As much of a value as fits a line: digests by their first digits."""
    text = plain(value)
    return text[:12] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text
