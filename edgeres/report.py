"""Results as the terminal shows them, and what all reports take from them."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from rich.text import Text

from edgeres.tables import Measured
from edgeres.words import count, probability

Record = dict[str, Any]


class Column(NamedTuple):
    """One side of a comparison: an FP32 baseline or an engine, as reports put them beside each other.

    ``side`` is ``record["baseline"]`` or ``record["engine"]``; ``css`` is its color in a page.
    """

    name: str
    css: str
    record: Record
    side: Record
    engine: bool

    @property
    def runner(self) -> Record | None:
        """What the benchmark measured of it, if there was one."""
        runners = (self.record.get("latency") or {}).get("runners") or {}
        name = self.side["name"]
        return runners.get(name) or runners.get(f"{name} {self.record['target']}")

    @property
    def p50(self) -> float | None:
        """Median latency in ms; None where none was measured, as of shards."""
        return (self.runner or self.side["latency_ms"] or {}).get("p50")

    @property
    def p50_interval(self) -> list[float] | None:
        """Its 95% interval, if it was measured."""
        return ((self.runner or {}).get("intervals") or {}).get("p50")

    @property
    def shaky(self) -> bool:
        """Whether the benchmark found its latency not to be stable."""
        return bool(self.runner and not self.runner["stable"])


def groups(results: list[Record]) -> list[list[Record]]:
    """Results that were compared with the same FP32 baseline on the same images, together."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for r in results:
        digests = r["provenance"]["digests"]
        found.setdefault((digests.get("model"), digests.get("images"), r["images"]), []).append(r)
    return list(found.values())


def columns(results: list[Record], among: list[Record] | None = None) -> list[Column]:
    """Every baseline once, before the engines that were compared with it; names are those ``among`` more results."""
    among, together = among or results, groups(results)
    named = {id(r): name for r, name in zip(among, labels(among), strict=True)}
    css = colors(["FP32"] * len(together) + [r["precision"].upper() for r in results])
    color = dict(zip(map(id, results), css[len(together) :], strict=True))
    out = list[Column]()
    for name, paint, group in zip(_baselines(together), css, together, strict=False):
        out.append(Column(name, paint, group[0], group[0]["baseline"], False))
        out += [Column(named[id(r)], color[id(r)], r, r["engine"], True) for r in group]
    return out


def _baselines(together: list[list[Record]]) -> list[str]:
    """What to call the baseline of each group: FP32, and as much more as tells them apart."""
    names = ["FP32"] * len(together)
    for more in (
        [group[0]["model"] for group in together],
        [f"on {count(group[0]['images'], 'image')}" for group in together],
    ):
        if len(set(more)) > 1 and len(set(names)) < len(names):
            names = [f"{name} {what}" for name, what in zip(names, more, strict=True)]
    return _numbered(names)


def colors(names: list[str]) -> list[str]:
    """A color of the page for each of ``names``: always the same for a precision, and another for a second one."""
    rest = itertools.cycle(("c3", "c4", "c5"))
    usual = {"FP32": "c0", "FP16": "c1", "INT8": "c2"}
    return [usual.pop(name, "") or next(rest) for name in names]


def labels(results: list[Record]) -> list[str]:
    """What to call each engine: its precision, and as much more as tells them apart."""
    names = [r["precision"].upper() for r in results]
    for key in ("target", "model", "name"):
        if len({r[key] for r in results}) > 1 and (key != "name" or len(set(names)) < len(names)):
            names = [f"{name} {r[key]}" for name, r in zip(names, results, strict=True)]
    if len(set(names)) < len(names):  # one engine on several devices
        hosts = [r["provenance"].get("host") for r in results]
        names = [f"{name} {host}" if host else name for name, host in zip(names, hosts, strict=True)]
    return _numbered(names)


def _numbered(names: list[str]) -> list[str]:
    return [f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def benchmarks(results: list[Record], names: list[str]) -> list[tuple[list[str], list[Record]]]:
    """Each benchmark once: ``names`` and results of the engines that were measured in it together."""
    found = list[tuple[list[str], list[Record]]]()
    for r, name in zip(results, names, strict=True):
        if r["latency"] is None:
            continue
        known = next((of for of in found if of[1][0]["latency"] == r["latency"]), None)
        if known is None:
            found.append(known := ([], []))
        known[0].append(name)
        known[1].append(r)
    return found


def speedup(r: Record) -> tuple[float | None, list[float] | None]:
    """How many times as fast as FP32 the engine is, by p50, and the 95% interval if they were benchmarked together."""
    baseline, engine = (Column("", "", r, r[key], key == "engine") for key in ("baseline", "engine"))
    latency, name = r.get("latency") or {}, engine.side["name"]
    measured = latency.get("speedup") or {}
    found = measured.get(name) or measured.get(f"{name} {r['target']}")
    # ratios are to the first runner: another where FP32 was not measured, or not on this target
    if found and baseline.runner and baseline.runner is next(iter(latency["runners"].values())):
        return found["of_p50"], found["interval"]
    return (baseline.p50 / engine.p50, None) if baseline.p50 and engine.p50 else (None, None)


def shown(results: list[Record]) -> list[Measured | Text]:
    """What the terminal shows: a table for each baseline, intervals where there are any, verdicts and notes."""
    out: list[Measured | Text] = []
    for group in groups(results):
        more = intervals(group, results)
        out += [table(group, results), *([more] if more else [])]
    return [*out, *verdicts(results)]


def table(results: list[Record], among: list[Record] | None = None) -> Measured:
    """One row for the FP32 baseline, one per engine, named as `columns` does."""
    first = results[0]
    rows = [["", "top-1 %", "drop", "95% interval", "agree %", "SQNR", "MB", "p50 ms", "p99 ms"]]
    for c in columns(results, among):
        r, drop = c.record, c.record["drop"]
        middle = [""] * 4
        if c.engine:
            lost = [f"{drop['top1']:+.2f}", "{:+.2f} {:+.2f}".format(*drop["interval"])] if drop else ["", ""]
            noise = "exact" if r["sqnr_db"] in (None, float("inf")) else f"{r['sqnr_db']:.1f} dB"
            middle = [*lost, f"{r['agreement']['top1']:.2f}", noise]
        measured = c.runner or c.side["latency_ms"] or {}
        times = ["" if measured.get(key) is None else f"{measured[key]:.2f}" for key in ("p50", "p99")]
        top1 = "" if c.side["top1"] is None else f"{c.side['top1']:.2f}"
        rows.append([c.name, top1, *middle, f"{c.side['size_bytes'] / 1e6:.1f}", *times])
    where = " and ".join(dict.fromkeys(r["target"] for r in results))
    return Measured(f"{first['model']} on {where}, {count(first['images'], 'image')}", rows)


def intervals(results: list[Record], among: list[Record] | None = None) -> Measured | None:
    """The 95% intervals of the numbers above, and of top-5 and the speed-up; the p-value of the drop in top-1.

    None if the results hold none.
    """
    rows = [["95% intervals", "top-1 %", "top-5 %", "p-value", "p50 ms", "faster"]]
    for c in columns(results, among):
        ratio, ends = speedup(c.record) if c.engine else (None, None)
        top1, top5 = (_ends(c.side.get(f"{key}_interval")) for key in ("top1", "top5"))
        p = probability(c.record["drop"]["p_value"]) if c.engine and c.record["drop"] else ""
        faster = f"{ratio:.2f}x {_ends(ends)}" if ratio and ends else ""
        rows.append(
            [
                c.name,
                top1,
                f"{c.side['top5']:.2f} {top5}" if top5 and c.side["top5"] is not None else "",
                p,
                _ends(c.p50_interval),
                faster,
            ]
        )
    kept = [i for i, column in enumerate(zip(*rows, strict=True)) if i == 0 or any(column[1:])]
    return Measured("", [[cells[i] for i in kept] for cells in rows]) if len(kept) > 1 else None


def _ends(ends: list[float] | None) -> str:
    return f"{ends[0]:.2f} {ends[1]:.2f}" if ends else ""


def verdicts(results: list[Record]) -> list[Text]:
    """A line per engine with a budget, then what the user should know about each engine and each benchmark."""
    lines = []
    for name, r in zip(labels(results), results, strict=True):
        word = r["verdict"]
        if word is not None:
            style = {"PASS": "green", "FAIL": "red"}.get(word, "yellow")
            first, *more = reasons(r) or [""]
            lines.append(Text.assemble(f"{name} ", (word, f"bold {style}"), f": {first}"))
            lines += [Text(f"  {reason}") for reason in more]
        if r["shard"]:
            part = f"shard {r['shard']['index']} of {r['shard']['of']}, {r['images']:,} of {r['images_of']:,} images"
            lines.append(Text(f"{name} note: {part}; `edgeres report merge` makes one result of all"))
        lines += [Text(f"{name} note: {note}") for note in r["notes"]]
        if r["skipped"]:
            lines.append(Text(f"{name} note: {count(len(r['skipped']), 'unreadable image')} left out"))
    for names, measured in benchmarks(results, labels(results)):
        of = " and ".join(names)
        if doubts := unstable(*measured):
            lines.append(Text(f"{of} latency is not stable: {'; '.join(doubts)}", style="yellow"))
        lines += [Text(f"{of} latency note: {note}") for note in latency_notes(*measured)]
    return lines


def latency_notes(*results: Record) -> list[str]:
    """Notes of the benchmark that ``results`` share, but for those that a result has as its own."""
    told = {note for r in results for note in r["notes"]}
    return [note for note in results[0]["latency"].get("notes") or [] if note not in told]


def unstable(*results: Record) -> list[str]:
    """What makes the latency of ``results`` of one benchmark doubtful, of FP32 or an engine; empty if it is steady."""
    sides = [Column("", "", r, r[key], key == "engine") for key in ("baseline", "engine") for r in results]
    shaky = [c for c in sides if c.shaky]
    own = [f"{c.side['name']}: {warning}" for c in shaky for warning in (c.runner or {})["warnings"]]
    return list(dict.fromkeys(own)) + (results[0]["latency"]["conditions"]["warnings"] if shaky else [])


class Check(NamedTuple):
    """One budget: which, one of `result.VERDICTS`, and why in a sentence."""

    budget: str
    word: str
    reason: str


def checks(r: Record) -> list[Check]:
    """Every budget of a result. Where it does not say how each was met, each counts as all of them together do."""
    if r["verdict"] is None:
        return []
    given = [key for key in ("max_drop", "min_relative", "accepted") if r["budget"].get(key) is not None]
    found = reasons(r)
    words = r.get("verdicts") or [r["verdict"]] * len(found)
    return [Check(*check) for check in itertools.zip_longest(given, words, found, fillvalue="unknown")]


def reasons(r: Record) -> list[str]:
    """A sentence for each budget; made from the numbers where a result of the first format has none."""
    if r["reasons"] or r["verdict"] is None:
        return list(r["reasons"])
    needed = f"; about {r['images_needed']:,} would decide" if r["images_needed"] else ""
    drop = f"drop {r['drop']['top1']:+.2f}, at worst {r['drop']['interval'][1]:+.2f}"
    return [f"{drop} points, budget {r['budget']['max_drop']:g}{needed}"]


def met(results: list[Record]) -> bool:
    """Whether every result with a budget passed. NOT ENOUGH IMAGES is no pass, nor is NO LABELS."""
    return all(r["verdict"] in (None, "PASS") for r in results)
