"""Who executes an engine, on what, and how its graph must be quantized for it. One TOML each in ``targets/``."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from edgeres.errors import UsageError
from edgeres.machine import cpu_flags
from edgeres.quantize import SCHEMES, Scheme
from edgeres.recipe import from_dict, one_of, read_record
from edgeres.trt import EXECUTORS, Options


@dataclass(frozen=True)
class Target:
    """One executor on one kind of machine. ``scheme`` names how Q/DQ is laid; ``precisions`` what it can run.

    ``tensorrt``: the version there, as far as the graph depends on it. ``capability``: of the GPU, such as "8.7".
    ``dla``: the graph must be one that DLA runs. ``build``: how a plan is built.
    """

    description: str
    executor: str
    scheme: str
    precisions: list[str]
    tensorrt: str | None = None
    capability: str | None = None
    dla: bool = False
    build: Options = field(default_factory=Options)

    @property
    def asked(self) -> dict[str, Any]:
        """How a plan is to be built, as engine.json has it; empty where no plan is built."""
        options = asdict(self.build) if self.executor in EXECUTORS else {}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in options.items() if key != "timing_cache"}

    @property
    def major(self) -> int | None:
        """TensorRT's major version, where one is known."""
        return int(self.tensorrt.split(".")[0]) if self.tensorrt else None

    @property
    def runs_edgeres(self) -> bool:
        """Whether there is a Python for edgeres: JetPack 5, with TensorRT 8.5, has 3.8 (NVIDIA's JetPack archive)."""
        return self.capability is None or not (self.tensorrt or "").startswith("8.5.")

    @property
    def typed(self) -> bool:
        """Whether FP16 is in the graph. TensorRT 8 has flags for it, and FP32 scales only; DLA needs them up to 10."""
        return self.major is None or self.major >= (11 if self.dla else 10)

    @property
    def implicit(self) -> bool:
        """Whether INT8 is an FP32 graph and a calibration cache, which TensorRT has up to 10."""
        return self.scheme == "implicit" and (self.major is None or self.major <= 10)


def names() -> tuple[str, ...]:
    """Every known target."""
    folder = resources.files("edgeres") / "targets"
    return tuple(sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".toml")))


def load_target(
    name: str, precision: str | None = None, tensorrt: str | None = None, build: dict[str, Any] | None = None
) -> Target:
    """The record of target ``name``; another version of ``tensorrt`` and options of ``build`` win over its own.

    With ``precision``, refused if the target cannot run it.
    """
    one_of("target", name, names())
    text = (resources.files("edgeres") / "targets" / f"{name}.toml").read_text(encoding="utf-8")
    target = read_record(Target, text, f"target {name}")
    if precision is not None and precision not in target.precisions:
        raise UsageError(f"target {name} does not run {precision}", hint=f"it runs {', '.join(target.precisions)}")
    if build and target.executor in EXECUTORS:
        target = replace(target, build=from_dict(Options, {**target.asked, **build}, " in [build]"))
    if tensorrt is None:
        return target
    if target.executor != "tensorrt":
        raise UsageError(f"target {name} has no TensorRT version to choose", hint="leave out --tensorrt")
    return replace(target, tensorrt=tensorrt)


def scheme_for(target: Target) -> Scheme:
    """The scheme, fitted to the version of TensorRT, and to this machine where it is what will execute the graph."""
    scheme = SCHEMES["tensorrt" if target.scheme == "implicit" and not target.implicit else target.scheme]
    if scheme.signed:
        return replace(scheme, rest="fp32") if scheme.name == "tensorrt" and not target.typed else scheme
    return scheme if exact_dot_product(platform.machine(), cpu_flags()) else replace(scheme, weight_bits=7)


def exact_dot_product(machine: str, flags: frozenset[str]) -> bool:
    """Whether uint8 x int8 dot products are exact on this CPU.

    x86 without VNNI adds pairs of products in 16 bits, which saturates at 8-bit weights (Intel, VPMADDUBSW); 7-bit
    weights cannot overflow. Where the flags cannot be read, no VNNI is assumed.
    """
    x86 = machine.lower() in ("x86_64", "amd64", "i386", "i686")
    return not x86 or bool(flags & {"avx512_vnni", "avx_vnni", "amx_int8"})
