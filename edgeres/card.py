"""Model card of an engine, in Markdown: what a result says of it, and nothing that it does not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeres.errors import InputError
from edgeres.markdown import latency, p50, text
from edgeres.publish import read, write_text
from edgeres.report import columns, reasons, speedup
from edgeres.words import NONE, between, count, decibels, megabytes, number, probability

Record = dict[str, Any]
UNKNOWN = "unknown: it is not recorded"
MOST = 5
"""Classes that are named, at most."""


def write_card(path: Path, output: Path) -> None:
    """Write the `card` of the one result at ``path``."""
    found = read([path])
    if len(found) > 1:
        raise InputError(f"{path} holds {len(found)} results", hint="give the result.json of one engine")
    write_text(output, card(*found[0]))


def card(r: Record, engine: Record | None = None) -> str:
    """The card of the engine that ``r`` is the result of; ``engine`` is its engine.json, which says more."""
    precision, target = r["precision"].upper(), r["target"]
    parts = [f"# {text(r['name'])}: {precision} for {text(target)}", _summary(r)]
    for title, lines in (
        ("What it is", _what(r, engine)),
        ("What it costs and wins", _numbers(r)),
        ("Use", _use(r, engine)),
        ("License", _license(r)),
        ("To make it again", _again(r, engine)),
        ("Digests", _digests(r)),
    ):
        parts += [f"## {title}", *lines]
    return "\n\n".join(parts) + "\n"


def _summary(r: Record) -> str:
    verdict = f"**{r['verdict']}**" if r["verdict"] else "Not judged: no budget was set"
    if r["shard"]:
        verdict = f"Not judged: shard {r['shard']['index']} of {r['shard']['of']}"
    why = "; ".join(text(reason) for reason in reasons(r))
    return f"{verdict}{': ' + why if why else ''}."


def _what(r: Record, engine: Record | None) -> Iterator[str]:
    made, weights = r["provenance"], _weights(r)
    built = ", ".join(f"{key} {value}" for key, value in made["built_with"].items() if isinstance(value, str))
    rows = [
        ("network", r["model"]),
        ("weights", weights.get("source") or UNKNOWN),
        ("classes", (engine or {}).get("classes")),
        ("precision", r["precision"].upper()),
        ("executed by", f"{(engine or {}).get('executor') or ''} {r['target']}".strip()),
        ("size", f"{megabytes(r['engine']['size_bytes'])} MB; FP32 {megabytes(r['baseline']['size_bytes'])} MB"),
        ("built with", built),
        ("kept in FP32", ", ".join((engine or {}).get("kept_fp32") or ())),
    ]
    yield _table(("", ""), [(key, text(str(value))) for key, value in rows if value])
    yield _quantized(r)
    shown = "; ".join(f"{key.replace('_', ' ')} {_plain(value)}" for key, value in made["preprocess"].items())
    yield f"Images are prepared so: {text(shown)}."
    if r["notes"]:
        yield "Not as asked:\n\n" + "\n".join(f"- {text(note)}" for note in r["notes"])


def _quantized(r: Record) -> str:
    quantization = r["provenance"]["quantization"]
    if r["precision"] == "fp16":
        return "Weights and activations are FP16. No images were needed for that."
    if not quantization:
        return "Nothing is quantized." if r["precision"] == "fp32" else f"How it was quantized is {UNKNOWN}."
    images = quantization.get("images")
    on = f" on {count(images, 'image')} of the calibration set" if images else ""
    rest = {key: value for key, value in quantization.items() if key not in ("method", "images", "table")}
    shown = "; ".join(f"{key.replace('_', ' ')} {_plain(value)}" for key, value in rest.items())
    return f"Ranges were calibrated{on} by the method `{_code(quantization.get('method'))}`: {text(shown)}."


def _numbers(r: Record) -> Iterator[str]:
    baseline, engine = columns([r])
    drop, (ratio, faster) = r["drop"], speedup(r)
    rows = []
    for key, name, ends in (("top1", "top-1 %", "interval"), ("top5", "top-5 %", "top5_interval")):
        if drop:
            change = _both(number(-drop[key], sign=True), _negative(drop.get(ends)))
            rows.append(
                (
                    name,
                    *(_both(number(c.side[key]), between(c.side[f"{key}_interval"])) for c in (baseline, engine)),
                    change,
                )
            )
    if engine.p50 is not None:
        times = _both(f"{number(ratio)} times as fast", between(faster)) if ratio is not None else NONE
        rows.append(("p50 ms", p50(baseline), p50(engine), times))
    if rows:
        yield _table(("", "FP32", r["precision"].upper(), "change"), rows)
        yield "95% intervals in brackets, where they were measured."
    same = f"It gives FP32's answer on {number(r['agreement']['top1'])} % of {count(r['images'], 'image')}"
    yield f"{same}; logits {decibels(r['sqnr_db'])}, Kullback-Leibler divergence {r['kl']:.2g} nats."
    if not r["labels"]:
        yield "The images have no labels, so its accuracy is not known."
    if r["classes"]:
        yield _hurt(r["classes"])
    if drop:
        yield f"p-value of the change in top-1 (exact McNemar test): {probability(drop['p_value'])}."
    machine = r["provenance"]["machine"]
    gpus = [gpu["name"] for gpu in machine.get("gpus") or []]
    where = ", ".join(
        filter(
            None,
            [
                r["provenance"].get("host"),
                machine.get("cpu"),
                f"{machine['cores']} cores" if machine.get("cores") else "",
                *gpus,
            ],
        )
    )
    if engine.p50 is not None:
        yield f"Measured on: {text(where or UNKNOWN)}."
    if r["latency"] and (lines := latency(r)):
        yield "\n".join(f"- {line[0].upper()}{line[1:]}" for line in lines)


def _hurt(classes: list[Record]) -> str:
    """The classes that lost more than chance explains."""
    hurt = [c for c in classes if c["p_adjusted"] < 0.05 and c["lost"] > c["won"]]
    names = []
    for c in sorted(hurt, key=lambda c: c["won"] - c["lost"])[:MOST]:
        name = c["name"] or f"class {c['index']}"
        names.append(f"{text(name)} (lost {c['lost']}, won {c['won']})")
    which = f": {', '.join(names)}" if names else ""
    return f"{len(hurt) or 'None'} of {count(len(classes), 'class', 'classes')} lost images beyond chance{which}."


def _negative(ends: list[float] | None) -> str:
    return between([-ends[1], -ends[0]], sign=True) if ends else ""


def _both(value: str, interval: str) -> str:
    return f"{value} ({interval})" if " to " in interval else value


def _use(r: Record, engine: Record | None) -> Iterator[str]:
    classes = (engine or {}).get("classes")
    into = f" into {classes:,} classes" if classes else ""
    yield (
        f"It classifies images{into} where {text(r['model'])} with these weights would, on the target"
        f" {text(r['target'])}. What it loses was measured on {count(r['images'], 'image')}, whose digest is below; on"
        " images of another kind it is not known."
    )
    if r["skipped"]:
        yield f"{count(len(r['skipped']), 'image')} of the set could not be read and were left out."


def _license(r: Record) -> Iterator[str]:
    known = _weights(r).get("license")
    yield f"Weights: {text(str(known))}." if known else "Unknown: the license of the weights is not recorded."


def _weights(r: Record) -> Record:
    weights = r["provenance"]["digests"].get("weights")
    return weights if isinstance(weights, dict) else {}


def _again(r: Record, engine: Record | None) -> Iterator[str]:
    recipe = _recipe(r, engine)
    if recipe is None:
        yield "The network is not recorded well enough to say how."
        return
    yield f"As `{r['precision']}.toml`:"
    yield f"```toml\n{recipe}```"
    yield (
        f"```\nedgeres run {r['precision']}.toml --weights WEIGHTS"
        f"{' --calibration TRAIN' * (r['precision'] == 'int8')} --data VALIDATION\n```"
    )
    yield (
        "What the recipe does not say was edgeres' default, or is not recorded; the digests tell whether weights and"
        " images are the same."
    )


def _recipe(r: Record, engine: Record | None) -> str | None:
    """What is recorded of the recipe, as TOML; None if the network is not known."""
    known = re.fullmatch(r"resnet(\d+)(?: (v[\d.]+))?", r["model"])
    if not known:
        return None
    made, budget = r["provenance"], r["budget"]
    quantization = made["quantization"] or {}
    accepted = budget.get("accepted") or {}
    sections = {
        "": {"name": r["name"]},
        "model": {"depth": int(known[1]), "variant": known[2]},
        "preprocess": made["preprocess"],
        "calibration": {
            "limit": quantization.get("images"),
            "method": quantization.get("method"),
            "weights": quantization.get("weights"),
        },
        "engine": {"target": r["target"], "precision": r["precision"], "io": (engine or {}).get("io")},
        "validation": {"limit": r["images_of"]},
        "budget": {
            "max_drop": budget.get("max_drop"),
            "min_relative": budget.get("min_relative"),
            "accepted": accepted.get("path"),
            "max_loss": accepted.get("max_loss"),
        },
    }
    blocks = []
    for section, values in sections.items():
        # TOML has no halves of a character, which JSON in ASCII writes
        said = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items() if value is not None}
        lines = [f"{key} = {value}\n" for key, value in said.items()]
        if lines:
            blocks.append(f"[{section}]\n" * bool(section) + "".join(lines))
    return "\n".join(blocks)


def _digests(r: Record) -> Iterator[str]:
    digests = dict(r["provenance"]["digests"])
    digests["weights"] = _weights(r).get("sha256")
    digests["bundle"] = (r["provenance"].get("bundle") or {}).get("digest")
    digests["calibration (range table)"] = (r["provenance"]["quantization"] or {}).get("table")
    yield _table(("SHA-256 of", ""), [(text(key), f"`{_code(value)}`") for key, value in digests.items() if value])


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [headings, ("---",) * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)


def _code(value: Any) -> str:
    """As `text`, within backticks: where nothing can be escaped."""
    return re.sub(r"[`|\s]+", " ", str(value))
