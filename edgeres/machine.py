"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import edgeres


def cpu_info() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_flags() -> frozenset[str]:
    """Instruction set flags as Linux names them; empty where they cannot be read."""
    info = cpu_info()
    return frozenset(info.get("flags", info.get("Features", "")).split())


def describe() -> dict[str, Any]:
    """Processor, cores that this process may use, the instruction sets that matter for INT8, and the load."""
    interesting = {"avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm"}
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_info().get("model name") or platform.processor() or "unknown",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instruction_sets": sorted(cpu_flags() & interesting),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of edgeres, Python and the installed ones of ``packages``."""
    found = {"edgeres": edgeres.__version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
