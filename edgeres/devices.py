"""The GPUs, the driver and the Jetson that this machine is. Standard library only, and no CUDA context is made.

Calls and attribute numbers are those of CUDA's driver interface (cuda.h). Files are read below ``root``.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAJOR, MINOR, INTEGRATED = 75, 76, 18
"""CUdevice_attribute: COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR, INTEGRATED."""
ROOT = Path("/")
Load = Callable[[str], Any]

# developer.nvidia.com/embedded/jetpack-archive; 36.4.2 and 36.4.7 are updates by apt alone; 35.6.3 and 35.6.4 from
# jetson_stats (jtop/core/jetson_variables.py), the last also from OE4T/meta-tegra's release notes
JETPACK = {
    "35.1.0": "5.0.2",
    "35.2.1": "5.1",
    "35.3.1": "5.1.1",
    "35.4.1": "5.1.2",
    "35.5.0": "5.1.3",
    "35.6.0": "5.1.4",
    "35.6.1": "5.1.5",
    "35.6.2": "5.1.5",
    "35.6.3": "5.1.5",
    "35.6.4": "5.1.6",
    "36.2.0": "6.0 DP",
    "36.3.0": "6.0",
    "36.4.0": "6.1",
    "36.4.2": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.4.7": "6.2.1",
    "36.5.0": "6.2.2",
    "36.5.2": "6.2.3",
    "38.2.0": "7.0",
    "38.2.1": "7.0",
    "38.2.2": "7.0",
    "38.4.0": "7.1",
    "39.2.0": "7.2",
    "39.2.1": "7.2.1",
}
"""L4T (Jetson Linux) -> JetPack."""


@dataclass(frozen=True)
class Gpu:
    """``capability``: compute capability such as "8.7". ``integrated``: shares the memory of the CPU."""

    name: str
    capability: str
    memory_bytes: int
    integrated: bool


@dataclass(frozen=True)
class Jetson:
    """``model`` as the device tree has it, empty where it cannot be read; ``l4t`` such as "36.4.3"."""

    model: str
    l4t: str | None
    jetpack: str | None


class _Failed(Exception):
    """A call of the driver did not succeed."""


def gpus(load: Load = ctypes.CDLL) -> list[Gpu]:
    """NVIDIA GPUs that CUDA programs may use, in CUDA's order. Empty where there is none or no driver."""
    return _look(load)[0]


def why_no_gpu(load: Load = ctypes.CDLL) -> str:
    """Why `gpus` is empty, in words; empty where it is not."""
    return _look(load)[1]


def driver(load: Load = ctypes.CDLL) -> str | None:
    """The newest CUDA version that the driver supports, such as "12.6"."""
    try:
        version = _integer(_library(load), "cuDriverGetVersion")
    except _Failed:
        return None
    return f"{version // 1000}.{version % 1000 // 10}" if version else None


def driver_release(root: Path = ROOT) -> str | None:
    """NVIDIA's number for the driver, such as "580.65.06", where Linux tells it."""
    found = re.search(r"Kernel Module(?: for \S+)?\s+(\d[\d.]*)", _text(root / "proc/driver/nvidia/version"))
    return found[1] if found else None


def jetson(root: Path = ROOT) -> Jetson | None:
    """Which Jetson this is, or None if it is none.

    Containers hide /proc/device-tree, and show the same model in /sys/devices/soc0.
    """
    model = _text(root / "proc/device-tree/model") or _text(root / "sys/devices/soc0/machine")
    release = _text(root / "etc/nv_tegra_release")
    if not release and "jetson" not in model.lower():
        return None
    # "# R36 (release), REVISION: 4.3, GCID: ...", the same from R32 to R39
    found = re.search(r"R(\d+) \(release\), REVISION: (\d+)(?:\.(\d+))?", release)
    l4t = ".".join(number or "0" for number in found.groups()) if found else None
    return Jetson(model, l4t, JETPACK.get(l4t or ""))


def free_memory(root: Path = ROOT) -> int | None:
    """Bytes that programs can still get, also the GPU where it is integrated; None where Linux does not tell."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _look(load: Load) -> tuple[list[Gpu], str]:
    found, failures = [], []
    try:
        cuda = _library(load)
    except _Failed as error:
        return [], str(error)
    try:
        _call(cuda, "cuInit", 0)
        count = _integer(cuda, "cuDeviceGetCount")
    except _Failed as error:
        return [], f"{error}{_hidden()}"
    for number in range(count):
        try:
            found.append(_gpu(cuda, number))
        except _Failed as error:  # others may work
            failures.append(str(error))
    if found:
        return found, ""
    return [], failures[0] if failures else f"the NVIDIA driver finds no device{_hidden()}"


def _gpu(cuda: Any, number: int) -> Gpu:
    device = _integer(cuda, "cuDeviceGet", number)
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    _call(cuda, "cuDeviceGetName", name, len(name), device)
    _call(cuda, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    major, minor, integrated = (_integer(cuda, "cuDeviceGetAttribute", a, device) for a in (MAJOR, MINOR, INTEGRATED))
    return Gpu(name.value.decode(errors="replace"), f"{major}.{minor}", memory.value, bool(integrated))


def _library(load: Load) -> Any:
    if sys.platform == "darwin":
        raise _Failed("macOS has no NVIDIA driver")
    try:
        return load("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise _Failed(f"no NVIDIA driver ({error})") from error


def _integer(cuda: Any, name: str, *args: Any) -> int:
    """The int that call ``name`` writes to its first argument."""
    value = ctypes.c_int()
    _call(cuda, name, ctypes.byref(value), *args)
    return value.value


def _call(cuda: Any, name: str, *args: Any) -> None:
    try:
        code = getattr(cuda, name)(*args)
    except AttributeError as error:
        raise _Failed(f"the NVIDIA driver has no {name}") from error
    if code:
        text = ctypes.c_char_p()
        if hasattr(cuda, "cuGetErrorName"):
            cuda.cuGetErrorName(code, ctypes.byref(text))
        raise _Failed(f"{name} failed: {text.value.decode() if text.value else f'error {code}'}")


def _hidden() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if visible is None else f"; CUDA_VISIBLE_DEVICES is {visible!r}"


def _text(path: Path) -> str:
    """What ``path`` holds, without the zero that ends a device tree's strings; empty if it cannot be read."""
    try:
        return path.read_bytes().decode(errors="replace").strip("\0 \n")
    except OSError:
        return ""
