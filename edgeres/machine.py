"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import edgeres
from edgeres import devices

ARM = {
    ("0x41", "0xd08"): "Arm Cortex-A72",
    ("0x41", "0xd0b"): "Arm Cortex-A76",
    ("0x41", "0xd0c"): "Arm Neoverse-N1",
    ("0x41", "0xd40"): "Arm Neoverse-V1",
    ("0x41", "0xd42"): "Arm Cortex-A78AE",  # Orin
    ("0x41", "0xd49"): "Arm Neoverse-N2",
    ("0x41", "0xd4f"): "Arm Neoverse-V2",
    ("0x41", "0xd83"): "Arm Neoverse-V3AE",  # Thor
    ("0x4e", "0x004"): "NVIDIA Carmel",  # Xavier
}
"""Implementer and part -> name: Linux gives numbers only on Arm (its arch/arm64/include/asm/cputype.h)."""


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


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """Processor, cores that this process may use, the instruction sets that matter for INT8, and the load.

    Where there are, also ``gpus``, the driver (``cuda``: the version it supports; ``driver``: its own) and ``jetson``.
    """
    interesting = {"avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm"}
    info, jetson = cpu_info(), devices.jetson()
    numbers = (info.get("CPU implementer", ""), info.get("CPU part", ""))
    arm = ARM.get(numbers) or (f"Arm, implementer {numbers[0]}, part {numbers[1]}" if all(numbers) else "")
    more = {
        "gpus": [asdict(gpu) for gpu in devices.gpus()],
        "cuda": devices.driver(),
        "driver": devices.driver_release(),
        "jetson": asdict(jetson) if jetson else None,
    }
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": info.get("model name") or arm or platform.processor() or "unknown",
        "cores": cores(),
        "instruction_sets": sorted(cpu_flags() & interesting),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        **{key: value for key, value in more.items() if value},
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
