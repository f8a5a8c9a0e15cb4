"""The GPU that CUDA programs use first, as NVIDIA's management library (NVML) sees it. Standard library only.

nvidia-smi and pynvml are front ends of the same library, which comes with the driver. Calls and numbers are those of
nvml.h and cuda.h. No CUDA context is made. Jetson boards up to Orin answer nearly every call with "not supported".
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

Load = Callable[[str], Any]

GRAPHICS, MEMORY = 0, 2
"""nvmlClockType_t."""
POWER, THERMAL = 0, 1
"""nvmlPerfPolicyType_t: what holds clocks down."""
SLOWDOWN, GPU_MAX = 1, 3
"""nvmlTemperatureThresholds_t: where the hardware, and where the driver, slows the GPU down."""
REASONS = {
    0x001: "idle",
    0x002: "application clocks",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "power brake",
    0x100: "display clocks",
}
"""nvmlClocksEventReasons, once called nvmlClocksThrottleReasons, bit by bit."""
HELD_BACK = frozenset(REASONS[bit] for bit in (0x004, 0x008, 0x020, 0x040, 0x080))
"""Those of `REASONS` that slow a GPU down under load; the others are settings, or idleness."""
UNKNOWN_STATE = 32
"""NVML_PSTATE_UNKNOWN."""


class _Violation(ctypes.Structure):
    """nvmlViolationTime_t: microseconds of a clock, nanoseconds held back."""

    _fields_ = [("reference", ctypes.c_ulonglong), ("held_back", ctypes.c_ulonglong)]


class _Temperature(ctypes.Structure):
    """nvmlTemperature_v1_t."""

    _fields_ = [("version", ctypes.c_uint), ("sensor", ctypes.c_uint), ("celsius", ctypes.c_int)]


class Gpu:
    """One GPU. What it cannot tell is None."""

    def __init__(self, library: Any, device: ctypes.c_void_p) -> None:
        self._library, self._device = library, device

    def clock(self, domain: int) -> int | None:
        """MHz at this moment."""
        return self._number("nvmlDeviceGetClockInfo", domain)

    def highest_clock(self, domain: int) -> int | None:
        """MHz."""
        return self._number("nvmlDeviceGetMaxClockInfo", domain)

    def temperature(self) -> int | None:
        """Degrees Celsius."""
        record = _Temperature(ctypes.sizeof(_Temperature) | 1 << 24)  # NVML_STRUCT_VERSION; sensor 0 is the GPU
        if self._ok("nvmlDeviceGetTemperatureV", self._device, ctypes.byref(record)):
            return int(record.celsius)
        return self._number("nvmlDeviceGetTemperature", 0)  # goes with CUDA 14, the other came with 12.8

    def temperature_limit(self) -> int | None:
        """Degrees Celsius at which clocks go down."""
        limits = (self._number("nvmlDeviceGetTemperatureThreshold", kind) for kind in (GPU_MAX, SLOWDOWN))
        return min((limit for limit in limits if limit), default=None)

    def reasons(self) -> list[str] | None:
        """Why clocks are not at their highest at this moment."""
        for call in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
            bits = self._number(call, kind=ctypes.c_ulonglong)
            if bits is not None:
                return [name for bit, name in REASONS.items() if bits & bit]
        return None

    def held_back(self) -> dict[str, float]:
        """Seconds for which power or temperature held clocks down, counted since the driver was loaded."""
        found = {}
        for name, policy in (("power limit", POWER), ("temperature", THERMAL)):
            time = _Violation()
            if self._ok("nvmlDeviceGetViolationStatus", self._device, policy, ctypes.byref(time)):
                found[name] = time.held_back / 1e9
        return found

    def power_limit(self) -> float | None:
        """Watts."""
        return _scaled(self._number("nvmlDeviceGetEnforcedPowerLimit"), 1e-3)

    def persistent(self) -> bool | None:
        """Does the driver stay loaded without a program that uses it?"""
        mode = self._number("nvmlDeviceGetPersistenceMode")
        return None if mode is None else bool(mode)

    def performance_state(self) -> str | None:
        """From "P0", the fastest, to "P15"."""
        state = self._number("nvmlDeviceGetPerformanceState")
        return None if state in (None, UNKNOWN_STATE) else f"P{state}"

    def joules(self) -> float | None:
        """Energy since the driver was loaded; Volta and later."""
        return _scaled(self._number("nvmlDeviceGetTotalEnergyConsumption", kind=ctypes.c_ulonglong), 1e-3)

    def watts(self) -> float | None:
        """Power at this moment; a mean over a second from Ampere on, but for A100's chip."""
        return _scaled(self._number("nvmlDeviceGetPowerUsage"), 1e-3)

    def _number(self, call: str, *args: int, kind: Any = ctypes.c_uint) -> int | None:
        value = kind()
        return value.value if self._ok(call, self._device, *args, ctypes.byref(value)) else None

    def _ok(self, call: str, *args: Any) -> bool:
        return _ok(self._library, call, *args)


def gpu(load: Load = ctypes.CDLL) -> Gpu | None:
    """The first GPU in CUDA's order, or None where there is none.

    NVML counts GPUs in another order than CUDA, and knows nothing of CUDA_VISIBLE_DEVICES: the PCI address joins them.
    """
    windows = sys.platform == "win32"
    try:
        cuda = load("nvcuda.dll" if windows else "libcuda.so.1")
        library = load("nvml.dll" if windows else "libnvidia-ml.so.1")
    except OSError:
        return None
    number, address, device = ctypes.c_int(), ctypes.create_string_buffer(32), ctypes.c_void_p()
    found = (
        _ok(cuda, "cuInit", 0)
        and _ok(cuda, "cuDeviceGet", ctypes.byref(number), 0)
        and _ok(cuda, "cuDeviceGetPCIBusId", address, len(address), number.value)
        and _ok(library, "nvmlInit_v2")
        and _ok(library, "nvmlDeviceGetHandleByPciBusId_v2", address, ctypes.byref(device))
    )
    return Gpu(library, device) if found else None


def _ok(library: Any, call: str, *args: Any) -> bool:
    """Does ``library`` have the call, and did it succeed?"""
    function = getattr(library, call, None)
    return function is not None and function(*args) == 0


def _scaled(value: int | None, factor: float) -> float | None:
    return None if value is None else value * factor
