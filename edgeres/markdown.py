"""Results as Markdown, for a pull request: what GitHub and GitLab show alike."""

from __future__ import annotations

import re
from typing import Any

from edgeres.report import columns, groups, labels, reasons, speedup
from edgeres.words import between, count, decibels, megabytes, milliseconds, number, spread

Record = dict[str, Any]


def markdown(results: list[Record]) -> str:
    """A table for each FP32 baseline, the reasons of each verdict, notes, and the provenance folded away."""
    parts = []
    for group in groups(results):
        first = group[0]
        where = " and ".join(dict.fromkeys(r["target"] for r in group))
        title = f"{first['model']} on {where}, {count(first['images'], 'image')}"
        parts += [f"### {text(title)}", _table(group), *_lines(group), *_provenance(group)]
    return "\n\n".join(parts) + "\n"


def _table(group: list[Record]) -> str:
    headings = ["", "verdict", "top-1 %", "drop, points", "same answer %", "SQNR", "MB", "p50 ms", "times as fast"]
    rows = []
    for c in columns(group):
        r, drop = c.record, c.record["drop"] if c.engine else None
        ratio, ends = speedup(r) if c.engine else (None, None)
        verdict = r["verdict"] or "no budget"
        rows.append(
            [
                text(c.name),
                f"**{verdict}**" if c.engine else "",
                _both(number(c.side["top1"]), between(c.side["top1_interval"])),
                _both(number(drop["top1"], sign=True), between(drop["interval"], sign=True)) if drop else "",
                number(r["agreement"]["top1"]) if c.engine else "",
                decibels(r["sqnr_db"]) if c.engine else "",
                megabytes(c.side["size_bytes"]),
                _both(milliseconds(c.p50), spread(c.p50_interval)),
                _both(number(ratio), between(ends)) if c.engine else "",
            ]
        )
    rule = ["---", "---", *["--:"] * (len(headings) - 2)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, rule, *rows))


def _both(value: str, interval: str) -> str:
    """A number, and its interval if there is one."""
    return f"{value} ({interval})" if " to " in interval else value


def _lines(group: list[Record]) -> list[str]:
    lines = []
    for name, r in zip(labels(group), group, strict=True):
        lines += [f"- {text(name)}: {text(reason)}" for reason in reasons(r)]
        if r["skipped"]:
            lines.append(f"- {text(name)}: {count(len(r['skipped']), 'unreadable image')} left out")
        lines += [f"- {text(name)}: {text(note)}" for note in r["notes"]]
        doubts = ((r["latency"] or {}).get("conditions") or {}).get("warnings") or []
        lines += [f"- {text(name)}: latency: {text(doubt)}" for doubt in doubts]
    intervals = "95% intervals in brackets" if any(r["engine"]["top1_interval"] for r in group) else ""
    unjudged = "" if any(r["verdict"] for r in group) else "No budget was set, so nothing was judged."
    return [part for part in ("\n".join(lines), ". ".join(filter(None, [intervals, unjudged]))) if part]


def _provenance(group: list[Record]) -> list[str]:
    rows = []
    for name, r in zip(labels(group), group, strict=True):
        for what, digest in r["provenance"]["digests"].items():
            known = digest if isinstance(digest, str) else (digest or {}).get("sha256", "")
            rows.append(f"| {text(name)} | {text(what)} | `{re.sub(r'[^0-9a-f]', '', str(known))}` |")
        built = ", ".join(f"{key} {value}" for key, value in r["provenance"]["built_with"].items() if _plain(value))
        rows.append(f"| {text(name)} | built with | {text(built)} |")
    table = "\n".join(["| | | |", "| --- | --- | --- |", *rows])
    return [f"<details><summary>Provenance</summary>\n\n{table}\n\n</details>"]


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def text(value: str) -> str:
    """``value`` as Markdown shows it letter for letter, within a table too."""
    value = re.sub(r"\s+", " ", value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#!@$])", r"\\\1", value)
