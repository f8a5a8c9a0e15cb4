"""How a plan is built, as far as the graph does not say it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from edgeres.errors import UsageError
from edgeres.recipe import one_of

MIB = 1 << 20
POOLS = {
    "workspace": "WORKSPACE",
    "tactic_memory": "TACTIC_DRAM",
    "tactic_shared_memory": "TACTIC_SHARED_MEMORY",
    "dla_sram": "DLA_MANAGED_SRAM",
    "dla_local_dram": "DLA_LOCAL_DRAM",
    "dla_global_dram": "DLA_GLOBAL_DRAM",
}
"""Option -> member of MemoryPoolType."""
DLA_POOLS = tuple(name for name in POOLS if name.startswith("dla_"))
HARDWARE = {
    "none": "NONE",
    "ampere-plus": "AMPERE_PLUS",
    "same-compute-capability": "SAME_COMPUTE_CAPABILITY",
}
"""Option -> member of HardwareCompatibilityLevel."""
VERBOSITY = {"detailed": "DETAILED", "names": "LAYER_NAMES_ONLY", "none": "NONE"}
"""Option -> member of ProfilingVerbosity."""
SMALLEST_DLA_POOL = 4096  # bytes; NvInfer.h, MemoryPoolType


@dataclass(frozen=True)
class Options:
    """How a plan is built; None leaves TensorRT's default. Raises `UsageError` for what makes no sense.

    ``profile``: smallest, usual and largest batch of a model with dynamic batch; all the same make it static.
    ``level``: optimization level, 0 to 5. ``tf32``: let FP32 layers round to TF32. ``sparse``: permit 2:4 kernels.
    ``verbosity``: what a plan tells of its layers: "detailed", "names" or "none".

    In MiB, as trtexec's --memPoolSize: ``workspace``, what kernels may use; ``tactic_memory`` and
    ``tactic_shared_memory``, what trying them out may; ``dla_sram``, ``dla_local_dram`` and ``dla_global_dram``, what
    each part of a network on DLA may, in powers of two.

    ``capabilities``: compute capabilities that a TensorRT-RTX plan is for, such as "8.6". ``hardware``: GPUs that a
    TensorRT plan is for besides the one at hand: "none", "ampere-plus" or "same-compute-capability".
    ``version_compatible``: runs on later versions of TensorRT. ``strip``: leave out weights, to be refitted;
    ``refit``: let weights be replaced.

    ``dla_core``: the DLA core to build for. ``gpu_fallback``: let the GPU run what DLA cannot, but no more than
    ``max_fallback`` layers.

    ``timing_cache``: file that keeps what kernels took; unused by TensorRT-RTX, which measures nothing while it builds.
    """

    profile: tuple[int, int, int] = (1, 8, 32)
    workspace: float | None = None
    tactic_memory: float | None = None
    tactic_shared_memory: float | None = None
    level: int | None = None
    aux_streams: int | None = None
    capabilities: tuple[str, ...] = ()
    hardware: str = "none"
    version_compatible: bool = False
    strip: bool = False
    refit: bool = False
    tf32: bool = False
    sparse: bool = False
    verbosity: str = "detailed"
    dla_core: int | None = None
    gpu_fallback: bool = True
    max_fallback: int | None = None
    dla_sram: float | None = None
    dla_local_dram: float | None = None
    dla_global_dram: float | None = None
    timing_cache: Path | None = field(default=None, metadata={"internal": True})

    def __post_init__(self) -> None:
        one_of("hardware", self.hardware, tuple(HARDWARE))
        one_of("verbosity", self.verbosity, tuple(VERBOSITY))
        ordered = len(self.profile) == 3 and 1 <= self.profile[0] <= self.profile[1] <= self.profile[2]
        for sound, what in (
            (ordered, f"batches {self.profile} are not smallest, usual and largest"),
            (self.level is None or 0 <= self.level <= 5, f"optimization level {self.level} is not 0 to 5"),
            (self.aux_streams is None or self.aux_streams >= 0, f"{self.aux_streams} auxiliary streams"),
            (self.dla_core is None or self.dla_core >= 0, f"DLA core {self.dla_core}"),
            (self.max_fallback is None or self.max_fallback >= 0, f"max_fallback of {self.max_fallback} layers"),
            (self.gpu_fallback or not self.max_fallback, f"max_fallback {self.max_fallback} without gpu_fallback"),
        ):
            if not sound:
                raise UsageError(what)
        self._check_pools()
        asked = [name for name in ("max_fallback", *DLA_POOLS) if getattr(self, name) is not None]
        asked += [] if self.gpu_fallback else ["gpu_fallback"]
        if asked and self.dla_core is None:
            raise UsageError(f"{', '.join(asked)} without DLA", hint="say dla_core = 0 too")

    def _check_pools(self) -> None:
        for name in POOLS:
            mib = getattr(self, name)
            if mib is None:
                continue
            if not (math.isfinite(mib) and mib * MIB >= 1):
                raise UsageError(f"{name} of {mib} MiB")
            size = int(mib * MIB)
            if name in DLA_POOLS and (size < SMALLEST_DLA_POOL or size & (size - 1) or size != mib * MIB):
                raise UsageError(f"{name} of {mib} MiB", hint="DLA takes powers of two, from 0.00390625 (4 KiB) on")

    def pools(self) -> dict[str, int]:
        """Bytes of each pool that is not left to TensorRT."""
        asked = {name: getattr(self, name) for name in POOLS}
        return {name: int(mib * MIB) for name, mib in asked.items() if mib is not None}
