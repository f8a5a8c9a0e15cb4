"""The table of a deploy: a line for each device, and below it what the user should know of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from edgeres import words
from edgeres.tables import Trimmed, plain_table


def table(records: Sequence[dict[str, Any]]) -> RenderableType:
    """A line for each device, then what went wrong with the ones that failed."""
    out = plain_table("host", "device", "verdict", "drop", "95% interval", "p50 ms", title="", right=3)
    out.columns[0].overflow = "fold"  # a name that is cut is another's
    more = list[Text]()
    for r in records:
        word = "failed" if r["error"] else r["verdict"] or "no budget"
        style = "green" if r["met"] else "red"
        cells = [words.number(r["drop"], sign=True), words.between(r["interval"], sign=True)]
        name = r["device"]["name"] if r["device"] else words.NONE
        row = [r["host"], name, Text(word, style), *cells, words.milliseconds(r["p50_ms"])]
        out.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
        if error := r["error"]:
            more.append(Text.assemble(f"{r['host']}: ", (error["cause"], "red")))
            more += [Text(f"  {line}") for line in error["evidence"].splitlines()]
            more += [Text(f"  Next: {error['next']}")] if error["next"] else []
        elif r["verdict"] not in (None, "PASS"):
            more += [Text(f"{r['host']}: {reason}") for reason in r["reasons"]]
        if r["unstable"]:
            more.append(Text(f"{r['host']}: latency is not stable: {'; '.join(r['unstable'])}", "yellow"))
        more += [Text(f"{r['host']} note: {note}") for note in r["notes"]]
    return Trimmed(out, Group(*more)) if more else Trimmed(out)
