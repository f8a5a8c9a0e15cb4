"""NVML and CUDA as far as edgeres.nvml asks them, through ctypes as the real ones."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

ADDRESS = b"0000:65:00.0"
NOT_SUPPORTED = 3

CLOCKS = {("nvmlDeviceGetClockInfo", 0): 1980, ("nvmlDeviceGetClockInfo", 2): 9501}
CLOCKS |= {("nvmlDeviceGetMaxClockInfo", 0): 2520, ("nvmlDeviceGetMaxClockInfo", 2): 10501}
LIMITS = {("nvmlDeviceGetTemperatureThreshold", 1): 97, ("nvmlDeviceGetTemperatureThreshold", 3): 90}
PLAIN = {
    "nvmlDeviceGetTemperature": 61,
    "nvmlDeviceGetCurrentClocksEventReasons": 0,
    "nvmlDeviceGetEnforcedPowerLimit": 450_000,
    "nvmlDeviceGetPersistenceMode": 1,
    "nvmlDeviceGetPerformanceState": 0,
    "nvmlDeviceGetTotalEnergyConsumption": 5_000_000,
    "nvmlDeviceGetPowerUsage": 87_500,
}


class FakeNvml:
    """One GPU. ``answers`` go over `PLAIN`; None: not supported; a function is asked anew each time."""

    def __init__(self, answers: dict[Any, Any] | None = None, held_back: dict[int, int] | None = None) -> None:
        self.answers: dict[Any, Any] = {**CLOCKS, **LIMITS, **PLAIN, **(answers or {})}
        self.held_back = {0: 0, 1: 0} if held_back is None else held_back
        self.started = False

    def nvmlInit_v2(self) -> int:  # noqa: N802
        self.started = True
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(self, address: Any, device: Any) -> int:  # noqa: N802
        assert self.started, "asked before nvmlInit"
        assert address.value == ADDRESS
        device._obj.value = 0x7F00
        return 0

    def nvmlDeviceGetViolationStatus(self, device: Any, policy: int, time: Any) -> int:  # noqa: N802
        assert ctypes.sizeof(time._obj) == 16
        time._obj.reference, time._obj.held_back = 1, self.held_back.get(policy, 0)
        return 0 if policy in self.held_back else NOT_SUPPORTED

    def nvmlDeviceGetTemperatureV(self, device: Any, record: Any) -> int:  # noqa: N802
        value = self.answers.get("nvmlDeviceGetTemperatureV")
        assert (record._obj.version, record._obj.sensor) == (12 | 1 << 24, 0)  # as pynvml's nvmlTemperature_v1
        record._obj.celsius = value or 0
        return NOT_SUPPORTED if value is None else 0

    def __getattr__(self, call: str) -> Callable[..., int]:
        if call not in self.answers and (call, 0) not in self.answers and (call, 1) not in self.answers:
            raise AttributeError(call)

        def answer(device: Any, *args: Any) -> int:
            assert device.value == 0x7F00
            value = self.answers.get((call, args[0]) if len(args) == 2 and (call, args[0]) in self.answers else call)
            value = value() if callable(value) else value
            wide = call in ("nvmlDeviceGetTotalEnergyConsumption",) or "Reasons" in call
            assert ctypes.sizeof(args[-1]._obj) == (8 if wide else 4), f"{call} writes another size"
            args[-1]._obj.value = value or 0
            return NOT_SUPPORTED if value is None else 0

        return answer


class FakeCuda:
    """``devices`` that programs may use; the first is the one of `FakeNvml`."""

    def __init__(self, devices: int = 1) -> None:
        self.devices = devices

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0 if self.devices else 100  # CUDA_ERROR_NO_DEVICE

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        device._obj.value = 70 + ordinal
        return 0

    def cuDeviceGetPCIBusId(self, address: Any, size: int, device: int) -> int:  # noqa: N802
        assert (size, device) == (len(address), 70)
        address.value = ADDRESS
        return 0


def loads(nvml: Any, cuda: Any = None) -> Callable[[str], Any]:
    """What ctypes.CDLL would give."""
    return lambda name: (cuda or FakeCuda()) if "cuda" in name else nvml


def no_library(name: str) -> Any:
    raise OSError(f"{name}: cannot open shared object file: No such file or directory")


def plant(root: Path, files: dict[str, str]) -> Path:
    """Write ``files`` below ``root``, as Linux would show them."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root
