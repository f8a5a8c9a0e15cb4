"""Who executes an engine, on what, and how its graph must be quantized for it. One TOML each in ``targets/``."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

from edgeres.errors import UsageError
from edgeres.machine import cpu_flags
from edgeres.quantize import SCHEMES, Scheme
from edgeres.recipe import one_of, read_record
from edgeres.trt import Options


@dataclass(frozen=True)
class Target:
    """One executor on one kind of machine. ``scheme`` names how Q/DQ is laid; ``precisions`` what it can run.

    ``tensorrt`` is the version that a calibration cache is written for, ``build`` how a plan is built.
    """

    description: str
    executor: str
    scheme: str
    precisions: list[str]
    tensorrt: str | None = None
    build: Options = field(default_factory=Options)


def names() -> tuple[str, ...]:
    """Every known target."""
    folder = resources.files("edgeres") / "targets"
    return tuple(sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".toml")))


def load_target(name: str, precision: str | None = None) -> Target:
    """The record of target ``name``; with ``precision``, refused if the target cannot run it."""
    one_of("target", name, names())
    text = (resources.files("edgeres") / "targets" / f"{name}.toml").read_text(encoding="utf-8")
    target = read_record(Target, text, f"target {name}")
    if precision is not None and precision not in target.precisions:
        raise UsageError(f"target {name} does not run {precision}", hint=f"it runs {', '.join(target.precisions)}")
    return target


def scheme_for(target: Target) -> Scheme:
    """The scheme, fitted to this machine where the machine is what will execute it."""
    scheme = SCHEMES[target.scheme]
    if scheme.signed or exact_dot_product(platform.machine(), cpu_flags()):
        return scheme
    return replace(scheme, weight_bits=7)


def exact_dot_product(machine: str, flags: frozenset[str]) -> bool:
    """Whether uint8 x int8 dot products are exact on this CPU.

    x86 without VNNI adds pairs of products in 16 bits, which saturates at 8-bit weights (Intel, VPMADDUBSW); 7-bit
    weights cannot overflow. Where the flags cannot be read, no VNNI is assumed.
    """
    x86 = machine.lower() in ("x86_64", "amd64", "i386", "i686")
    return not x86 or bool(flags & {"avx512_vnni", "avx_vnni", "amx_int8"})
