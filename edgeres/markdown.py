"""Results as Markdown, for a pull request: what GitHub and GitLab show alike."""

from __future__ import annotations

import re
from typing import Any

from edgeres.report import Column, benchmarks, columns, groups, labels, latency_notes, reasons, speedup, unstable
from edgeres.words import NONE, between, count, decibels, megabytes, milliseconds, number, spread

Record = dict[str, Any]


def markdown(results: list[Record]) -> str:
    """A table for each FP32 baseline, the reasons of each verdict, notes, and the provenance folded away."""
    parts, named = [], {id(r): name for r, name in zip(results, labels(results), strict=True)}
    for group in groups(results):
        names, table = [named[id(r)] for r in group], _table(group, results)
        first = group[0]
        where = " and ".join(dict.fromkeys(r["target"] for r in group))
        title = f"{first['model']} on {where}, {count(first['images'], 'image')}"
        parts += [
            f"### {text(title)}",
            table,
            *_lines(group, names),
            *_legend(group, table),
            *_provenance(group, names),
        ]
    return "\n\n".join(parts) + "\n"


def _table(group: list[Record], among: list[Record]) -> str:
    headings = ["", "verdict", "top-1 %", "drop, points", "same answer %", "SQNR", "MB", "p50 ms", "times as fast"]
    rows = []
    for c in columns(group, among):
        r, drop = c.record, c.record["drop"] if c.engine else None
        ratio, ends = speedup(r) if c.engine else (None, None)
        verdict = r["verdict"] or ("not judged" if r["shard"] else "no budget")
        rows.append(
            [
                text(c.name),
                f"**{verdict}**" if c.engine else "",
                _both(number(c.side["top1"]), between(c.side["top1_interval"])),
                _both(number(drop["top1"], sign=True), between(drop["interval"], sign=True)) if drop else "",
                number(r["agreement"]["top1"]) if c.engine else "",
                decibels(r["sqnr_db"]) if c.engine else "",
                megabytes(c.side["size_bytes"]),
                p50(c),
                _both(number(ratio), between(ends)) if c.engine else "",
            ]
        )
    rule = ["---", "---", *["--:"] * (len(headings) - 2)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, rule, *rows))


def p50(c: Column) -> str:
    """A median latency with its interval, marked if it is not stable."""
    return _both(milliseconds(c.p50), spread(c.p50_interval)) + ", **not stable**" * c.shaky


def _both(value: str, interval: str) -> str:
    """A number, and its interval if there is one."""
    return f"{value} ({interval})" if " to " in interval else value


def _lines(group: list[Record], names: list[str]) -> list[str]:
    lines = []
    for name, r in zip(names, group, strict=True):
        lines += [f"- {text(name)}: {text(reason)}" for reason in reasons(r)]
        if r["shard"]:
            part = f"shard {r['shard']['index']} of {r['shard']['of']}: a part of the images is not judged"
            lines.append(f"- {text(name)}: {part}")
        if r["skipped"]:
            lines.append(f"- {text(name)}: {count(len(r['skipped']), 'unreadable image')} left out")
        lines += [f"- {text(name)}: {text(note)}" for note in r["notes"]]
    for of, measured in benchmarks(group, names):
        lines += [f"- {text(' and '.join(of))}: {line}" for line in latency(*measured)]
    return ["\n".join(lines)] if lines else []


def latency(*results: Record) -> list[str]:
    """What the reader of a latency should know, of ``results`` of one benchmark."""
    record, doubts = results[0]["latency"], unstable(*results)
    seen = [] if doubts else (record.get("conditions") or {}).get("warnings") or []
    lines = [f"latency is **not stable**: {text('; '.join(doubts))}"] if doubts else []
    return lines + [f"latency: {text(note)}" for note in (*seen, *latency_notes(*results))]


def _legend(group: list[Record], table: str) -> list[str]:
    """What is to be known of a table of ``group``, if anything is."""
    said = [
        "95% intervals in brackets" if any(r["engine"]["top1_interval"] for r in group) else "",
        "" if any(r["verdict"] or r["shard"] for r in group) else "No budget was set, so nothing was judged",
        "" if all(r["labels"] for r in group) else "The images have no labels, so accuracy was not measured",
        f"{NONE}: not measured" if NONE in table else "",
    ]
    return [". ".join(filter(None, said)) + "."] if any(said) else []


def _provenance(group: list[Record], names: list[str]) -> list[str]:
    rows = []
    for name, r in zip(names, group, strict=True):
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
