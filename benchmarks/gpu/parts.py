"""What is checked, in order: what matters most comes first, since time may run out. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TARGETS = {"rtx": "tensorrt-rtx", "desktop": "tensorrt"}
"""Target -> the executor that its plans are for."""
PRECISIONS = ("fp16", "int8", "fp32")
BATCHES = (1, 8, 32, 128)
USUAL_S = 480.0
"""What the seconds below are for; a longer limit stretches them."""


@dataclass(frozen=True)
class Part:
    """``call``: "module:function", called with the work folder and ``arguments``.

    It may take ``limit`` seconds, and is not begun with fewer than ``least`` left. ``needs``: parts that must be ok.
    ``again``: if it dies, it is tried once more without what it was at, which is appended to its argument ``without``.
    """

    name: str
    call: str
    arguments: dict[str, Any] = field(default_factory=dict)
    limit: float = 60.0
    least: float = 10.0
    needs: tuple[str, ...] = ()
    again: bool = False


PROBE = Part("machine", "machine_here:look", limit=60.0)


def plan_of(target: str, variant: str, precision: str) -> str:
    """The name of the part that builds and runs it."""
    return f"{target} {variant} {precision}"


def parts(limit_s: float) -> list[Part]:
    """All of them, for a run of ``limit_s`` seconds."""
    more = max(1.0, limit_s / USUAL_S)

    def engines(variant: str) -> list[Part]:
        return [
            Part(
                plan_of(target, variant, precision),
                "plans:make",
                {"target": target, "variant": variant, "precision": precision},
                limit=120 * more,
                least=20,
                needs=(f"models {variant}", f"{target} starts"),
                again=True,
            )
            for target in TARGETS
            for precision in PRECISIONS
        ]

    def models(variant: str) -> Part:
        return Part(f"models {variant}", "nets:make", {"variant": variant}, limit=120 * more, least=20)

    # the first to load PyTorch, from a disk that may be slow
    found = [Part("matrix and copy rates", "roofline:measure", limit=90 * more), models("v1.5")]
    for target, executor in TARGETS.items():
        found.append(Part(f"{target} starts", "plans:start", {"executor": executor}, limit=60 * more))
    found += engines("v1.5")
    for batch in BATCHES:
        found.append(
            Part(
                f"speed at batch {batch}",
                "speed:measure",
                {"batch": batch, "seconds": 0.6 * more, "most": 35 * more},
                limit=150 * more,
                least=60,
                needs=("models v1.5",),
                again=True,
            )
        )
    for name in ("calibration", "fidelity"):
        most = {"most": 25 * more}
        found.append(Part(name, f"passes:{name}", most, limit=90 * more, least=30, needs=("models v1.5",)))
    found.append(Part("pytest -m gpu", "suite:run", limit=240 * more, least=40))
    for target in TARGETS:
        fp16, name = (plan_of(target, "v1.5", "fp16"),), {"target": target}
        long = {**name, "seconds": 30 * more}
        found += [
            Part(f"{target} benchmark", "plans:benchmark", name, limit=120 * more, least=30, needs=fp16),
            Part(f"{target} loads", "endurance:cycles", long, limit=60 * more, least=45, needs=fp16),
            Part(f"{target} inferences", "endurance:inferences", long, limit=60 * more, least=45, needs=fp16),
            Part(f"{target} CUDA packages", "endurance:packages", name, limit=40 * more, needs=fp16),
        ]
    return [*found, models("v1"), *engines("v1")]
