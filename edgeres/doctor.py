"""The report of `edgeres doctor`: what this machine is, what it can build and run, what is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

import edgeres
from edgeres.diagnosis import ELSEWHERE, JETPACKS, can_build, can_run, detect, jetpack, obstacle, problems
from edgeres.errors import UsageError
from edgeres.facts import Facts, gather
from edgeres.tables import Trimmed, plain_table
from edgeres.targets import load_target, names

__all__ = ["Facts", "can_build", "can_run", "detect", "gather", "report"]


def report(matrix: bool = False, facts: Facts | None = None) -> tuple[dict[str, Any], RenderableType]:
    """What was found, here or in ``facts``; with ``matrix``, also what every JetPack brings."""
    facts = facts or gather()
    value: dict[str, Any] = {"edgeres": edgeres.__version__, "machine": asdict(facts)}
    value["packages"] = value["machine"].pop("packages")
    try:
        value["auto"] = detect(facts)
    except UsageError:  # is among the problems
        value["auto"] = None
    value["targets"] = {name: _target(name, facts) for name in names()}
    value["jetpack"] = _jetpack(facts)
    value["problems"] = [{"cause": p.cause, "remedy": p.remedy} for p in problems(facts)]
    if matrix:
        value["matrix"] = [row._asdict() for row in JETPACKS]
    return value, Trimmed(*_shown(value, facts))


def _target(name: str, facts: Facts) -> dict[str, Any]:
    """``why``: what is in the way of building, else of running, else what to know; ``remedy``: what to do."""
    target = load_target(name)
    (builds, note), (runs, why_not) = can_build(name, target, facts), can_run(name, target, facts)
    found = obstacle(target, facts)
    return {
        "description": target.description,
        "builds": builds,
        "runs": runs,
        "why": note if not builds or runs else why_not,
        "remedy": found.remedy if found else "",
    }


def _jetpack(facts: Facts) -> dict[str, Any] | None:
    """What this Jetson's JetPack brings, and what was found instead."""
    if (row := jetpack(facts)) is None:
        return None
    found = {
        "tensorrt": facts.package("tensorrt").version,
        "cuda": facts.cuda,
        "python": facts.python,
        "dla": facts.dla_cores,
    }
    return {"expected": row._asdict(), "found": found}


def _shown(value: dict[str, Any], facts: Facts) -> list[RenderableType]:
    targets = value["targets"]
    parts: list[RenderableType] = [Text("This machine", style="bold"), _pairs(_machine(facts)), Text()]
    parts += [Text("Packages", style="bold"), _pairs(_packages(facts)), Text()]
    out = plain_table("target", "builds", "runs", "", title="Targets")
    first: dict[tuple[str, str], str] = {}  # what to do is said once
    for name, t in targets.items():
        same = first.setdefault((t["why"], t["remedy"]), name)
        remedy = "" if t["remedy"] == ELSEWHERE else t["remedy"]
        why = Text(f"as {same}") if same != name and remedy else _advice(t["why"], remedy)
        out.add_row(name, _word(t["builds"]), _word(t["runs"]), why)
    parts.append(out)
    if any(t["remedy"] == ELSEWHERE for t in targets.values()):
        parts.append(Text("For other machines: `edgeres quantize` here, `edgeres build-engine` there."))
    if value["auto"]:
        parts.append(Text(f"--target auto is {value['auto']} here."))
    if value["jetpack"]:
        parts += [Text(), _comparison(value["jetpack"])]
    if "matrix" in value:
        parts += [Text(), _matrix()]
    found = [(f"{i}.", _advice(p["cause"], p["remedy"])) for i, p in enumerate(value["problems"], 1)]
    return [*parts, Text(), Text("Problems", style="bold"), _pairs(found) if found else Text("none found")]


def _machine(facts: Facts) -> Iterable[tuple[str, str]]:
    yield "system", f"{facts.system} {facts.machine}, Python {facts.python}, edgeres {edgeres.__version__}"
    yield "CPU", f"{facts.cpu}, {facts.cores} cores"
    yield "INT8", ", ".join(facts.instruction_sets) or "no instruction sets for it found"
    if facts.memory_free is not None:
        yield "memory", f"{_gib(facts.memory_free)} free"
    for gpu in facts.gpus:
        memory = f"{_gib(gpu.memory_bytes)}{' shared with the CPU' if gpu.integrated else ''}"
        yield "GPU", f"{gpu.name}, compute capability {gpu.capability}, {memory}"
    if not facts.gpus:
        yield "GPU", f"none: {facts.no_gpu}"
    if facts.cuda:
        yield "driver", f"{facts.driver}, up to CUDA {facts.cuda}" if facts.driver else f"up to CUDA {facts.cuda}"
    if facts.jetson:
        j = facts.jetson
        yield "Jetson", f"{j.model or 'of unknown model'}, L4T {j.l4t or 'unknown'}, JetPack {j.jetpack or 'unknown'}"


def _packages(facts: Facts) -> Iterable[tuple[str, str]]:
    for name, p in facts.packages.items():
        version = p.version or "not installed"
        yield name, f"{version}, does not load: {p.broken}" if p.broken else version


def _comparison(value: dict[str, Any]) -> RenderableType:
    expected, found = value["expected"], value["found"]
    out = plain_table("", "brought", "found", title=f"JetPack {expected['name']}")
    for key, title in (("tensorrt", "TensorRT"), ("cuda", "CUDA"), ("python", "Python"), ("dla", "DLA")):
        cores = "not known" if found["dla"] is None else f"{found['dla']} cores"
        here = cores if key == "dla" else found[key] or "none"
        out.add_row(title, expected[key], here)
    return out


def _matrix() -> RenderableType:
    out = plain_table("JetPack", "from L4T", "TensorRT", "CUDA", "Python", "boards", "DLA", title="What JetPack brings")
    for row in JETPACKS:
        out.add_row(*row)
    return out


def _pairs(rows: Iterable[tuple[str, str] | tuple[str, Text]]) -> Table:
    out = Table.grid(padding=(0, 2, 0, 0))
    out.add_column(no_wrap=True)
    out.add_column(overflow="fold")
    for name, text in rows:
        out.add_row(name, text if isinstance(text, Text) else Text(text))
    return out


def _advice(cause: str, remedy: str) -> Text:
    return Text.assemble(cause, (f"\n{remedy}", "dim")) if remedy else Text(cause)


def _word(yes: bool) -> Text:
    return Text("yes", style="green") if yes else Text("no", style="red")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
