from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_nvml import no_library

from edgeres import devices
from edgeres.devices import Gpu, Jetson

ORIN = Gpu("Orin", "8.7", 32 << 30, True)
RTX = Gpu("NVIDIA GeForce RTX 5090", "12.0", 34_190_917_632, False)
THOR = Gpu("NVIDIA Thor", "11.0", 128 << 30, True)
CALLS = ["cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceTotalMem_v2", "cuDeviceGetAttribute"]


class FakeCuda:
    """libcuda with these GPUs. ``fail``: call -> its error code; with ``only``, for that device alone."""

    def __init__(self, *gpus: Gpu, version: int = 12060, fail: dict[str, int] | None = None, only: int | None = None):
        self.gpus, self.version, self.fail, self.only = gpus, version, fail or {}, only
        self.started = False

    def _code(self, name: str, device: int | None = None) -> int:
        assert self.started or name in ("cuInit", "cuDriverGetVersion"), f"{name} before cuInit"
        return self.fail.get(name, 0) if self.only in (None, device) else 0

    def cuInit(self, flags: int) -> int:  # noqa: N802
        self.started = True
        assert flags == 0
        return self._code("cuInit")

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = self.version
        return self._code("cuDriverGetVersion")

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.gpus)
        return self._code("cuDeviceGetCount")

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        device._obj.value = 70 + ordinal  # a handle is not a number in a row
        return self._code("cuDeviceGet", ordinal)

    def cuDeviceGetName(self, name: Any, size: int, device: int) -> int:  # noqa: N802
        assert size == len(name)
        name.value = self.gpus[device - 70].name.encode()
        return self._code("cuDeviceGetName", device - 70)

    def cuDeviceTotalMem_v2(self, size: Any, device: int) -> int:  # noqa: N802
        assert isinstance(size._obj, ctypes.c_size_t)
        size._obj.value = self.gpus[device - 70].memory_bytes
        return self._code("cuDeviceTotalMem_v2", device - 70)

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:  # noqa: N802
        gpu = self.gpus[device - 70]
        major, minor = gpu.capability.split(".")
        # numbers as in cuda.h
        value._obj.value = {75: int(major), 76: int(minor), 18: int(gpu.integrated)}[attribute]
        return self._code("cuDeviceGetAttribute", device - 70)

    def cuGetErrorName(self, code: int, name: Any) -> int:  # noqa: N802
        known = {100: b"CUDA_ERROR_NO_DEVICE", 803: b"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"}
        name._obj.value = known.get(code)
        return 0 if code in known else 1


def loads(cuda: Any) -> Any:
    return lambda name: cuda


@pytest.fixture(autouse=True)
def _linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize("found", [[ORIN], [RTX], [RTX, THOR, ORIN]])
def test_gpus_are_read_in_the_order_of_cuda(found: list[Gpu]) -> None:
    load = loads(FakeCuda(*found))
    assert devices.gpus(load) == found
    assert devices.why_no_gpu(load) == ""


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_is_named_with_its_error(call: str) -> None:
    load = loads(FakeCuda(RTX, fail={call: 803}))
    assert devices.gpus(load) == []
    assert devices.why_no_gpu(load) == f"{call} failed: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"


@pytest.mark.parametrize("call", CALLS[2:])
def test_one_broken_gpu_does_not_hide_the_others(call: str) -> None:
    load = loads(FakeCuda(ORIN, RTX, fail={call: 803}, only=0))
    assert devices.gpus(load) == [RTX]
    assert devices.why_no_gpu(load) == ""


def test_an_error_without_a_name_keeps_its_number() -> None:
    assert devices.why_no_gpu(loads(FakeCuda(fail={"cuInit": 4711}))) == "cuInit failed: error 4711"


def test_a_driver_too_old_for_error_names_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FakeCuda, "cuGetErrorName")
    assert devices.why_no_gpu(loads(FakeCuda(fail={"cuInit": 100}))) == "cuInit failed: error 100"


@pytest.mark.parametrize("call", CALLS)
def test_a_driver_without_a_call_says_which(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FakeCuda, call)
    assert devices.gpus(loads(FakeCuda(RTX))) == []
    assert devices.why_no_gpu(loads(FakeCuda(RTX))) == f"the NVIDIA driver has no {call}"


def test_no_driver_is_told_from_no_device() -> None:
    assert devices.gpus(no_library) == []
    assert devices.why_no_gpu(no_library).startswith("no NVIDIA driver (libcuda.so.1: cannot open shared object")
    assert devices.why_no_gpu(loads(FakeCuda())) == "the NVIDIA driver finds no device"
    assert devices.why_no_gpu(loads(FakeCuda(fail={"cuInit": 100}))) == "cuInit failed: CUDA_ERROR_NO_DEVICE"


@pytest.mark.parametrize("fail", [{}, {"cuInit": 100}])
def test_what_hides_gpus_is_told(fail: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.why_no_gpu(loads(FakeCuda(fail=fail))).endswith("; CUDA_VISIBLE_DEVICES is ''")
    assert "VISIBLE" not in devices.why_no_gpu(no_library)


@pytest.mark.parametrize(("system", "name"), [("linux", "libcuda.so.1"), ("win32", "nvcuda.dll")])
def test_the_library_is_that_of_the_system(system: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(sys, "platform", system)
    devices.gpus(lambda n: asked.append(n) or FakeCuda(RTX))
    assert asked == [name]


def test_macos_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert devices.why_no_gpu(loads(FakeCuda(RTX))) == "macOS has no NVIDIA driver"
    assert devices.driver(loads(FakeCuda(RTX))) is None


@pytest.mark.parametrize(("number", "version"), [(12060, "12.6"), (13020, "13.2"), (12100, "12.10"), (0, None)])
def test_the_driver_tells_the_cuda_it_supports(number: int, version: str | None) -> None:
    assert devices.driver(loads(FakeCuda(version=number))) == version


def test_without_a_driver_there_is_no_cuda() -> None:
    assert devices.driver(no_library) is None
    assert devices.driver(loads(FakeCuda(fail={"cuDriverGetVersion": 1}))) is None


def write(root: Path, path: str, content: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(content.encode())


# first lines as drivers write them: closed, open, on a Jetson with JetPack 6, and from long ago
@pytest.mark.parametrize(
    ("line", "release"),
    [
        ("NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023", "535.129.03"),
        ("NVIDIA UNIX Open Kernel Module for x86_64  580.173.02  Release Build  (dvs-builder@U22)", "580.173.02"),
        ("NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build  (buildbrain@mobile)", "540.4.0"),
        ("NVIDIA UNIX x86_64 Kernel Module  390.48  Thu Mar 22 00:42:57 PDT 2018", "390.48"),
        ("something else", None),
    ],
)
def test_the_release_of_the_driver_is_read(tmp_path: Path, line: str, release: str | None) -> None:
    write(tmp_path, "proc/driver/nvidia/version", f"NVRM version: {line}\nGCC version:  gcc version 12.2.0 (GCC)\n")
    assert devices.driver_release(tmp_path) == release


def test_no_file_no_release(tmp_path: Path) -> None:
    assert devices.driver_release(tmp_path) is None


# lines as Jetsons have them, each followed by others that do not matter
RELEASES = {
    "35.4.1": "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64, DATE: Tue Aug  1 2023",
    "36.4.0": "# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic, EABI: aarch64, DATE: Fri Sep 13 2024",
    "36.4.3": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025",
    "38.2.0": "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64, DATE: Fri Aug 22 2025",
    "38.4.0": "# R38 (release), REVISION: 4.0, GCID: 43443517, BOARD: generic, EABI: aarch64, DATE: Mon Dec 29 2025",
    "39.2.1": "# R39 (release), REVISION: 2.1, GCID: 46758480, BOARD: generic, EABI: aarch64, DATE: Fri Aug 7 2026",
}


@pytest.mark.parametrize(
    ("model", "l4t", "jetpack"),
    [
        ("NVIDIA Jetson Xavier NX Developer Kit", "35.4.1", "5.1.2"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "36.4.0", "6.1"),
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "36.4.3", "6.2"),
        ("NVIDIA Jetson AGX Thor Developer Kit", "38.2.0", "7.0"),
        ("NVIDIA Jetson AGX Thor Developer Kit", "38.4.0", "7.1"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", "39.2.1", "7.2.1"),
    ],
)
def test_a_jetson_is_recognized_by_its_own_files(tmp_path: Path, model: str, l4t: str, jetpack: str) -> None:
    write(tmp_path, "proc/device-tree/model", f"{model}\0")
    write(
        tmp_path, "etc/nv_tegra_release", f"{RELEASES[l4t]}\n# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n"
    )
    assert devices.jetson(tmp_path) == Jetson(model, l4t, jetpack)


def test_a_container_that_hides_the_device_tree_still_shows_the_model(tmp_path: Path) -> None:
    write(tmp_path, "sys/devices/soc0/machine", "NVIDIA Jetson AGX Orin Developer Kit\n")
    assert devices.jetson(tmp_path) == Jetson("NVIDIA Jetson AGX Orin Developer Kit", None, None)
    write(tmp_path, "etc/nv_tegra_release", RELEASES["36.4.3"])
    assert devices.jetson(tmp_path) == Jetson("NVIDIA Jetson AGX Orin Developer Kit", "36.4.3", "6.2")


def test_a_jetson_without_a_name_is_a_jetson(tmp_path: Path) -> None:
    write(tmp_path, "etc/nv_tegra_release", RELEASES["36.4.3"])
    assert devices.jetson(tmp_path) == Jetson("", "36.4.3", "6.2")
    write(tmp_path, "proc/device-tree/model", "Somebody's carrier board\0")
    assert devices.jetson(tmp_path) == Jetson("Somebody's carrier board", "36.4.3", "6.2")


@pytest.mark.parametrize(
    ("line", "l4t"),
    [
        ("# R36 (release), REVISION: 4.99, GCID: 1", "36.4.99"),
        ("# R41 (release), REVISION: 1, GCID: 1", "41.1.0"),
        ("what no version has written", None),
    ],
)
def test_a_release_of_no_known_jetpack_has_none(tmp_path: Path, line: str, l4t: str | None) -> None:
    write(tmp_path, "proc/device-tree/model", "NVIDIA Jetson AGX Orin Developer Kit\0")
    write(tmp_path, "etc/nv_tegra_release", line)
    assert devices.jetson(tmp_path) == Jetson("NVIDIA Jetson AGX Orin Developer Kit", l4t, None)


@pytest.mark.parametrize("model", [None, "Raspberry Pi 5 Model B Rev 1.0\0"])
def test_other_machines_are_no_jetson(tmp_path: Path, model: str | None) -> None:
    if model:
        write(tmp_path, "proc/device-tree/model", model)
    assert devices.jetson(tmp_path) is None


def test_the_table_of_jetpacks_is_in_order() -> None:
    numbers = [tuple(map(int, l4t.split("."))) for l4t in devices.JETPACK]
    assert numbers == sorted(set(numbers))
    assert {len(n) for n in numbers} == {3}
    assert all(re.fullmatch(r"\d\.\d(\.\d)?( DP)?", jetpack) for jetpack in devices.JETPACK.values())
    versions = [j.removesuffix(" DP") for j in devices.JETPACK.values()]
    assert versions == sorted(versions)


def test_free_memory_is_what_programs_can_get(tmp_path: Path) -> None:
    assert devices.free_memory(tmp_path) is None
    write(tmp_path, "proc/meminfo", "MemTotal:       65921000 kB\nMemFree:        1000000 kB\n")
    assert devices.free_memory(tmp_path) is None
    write(tmp_path, "proc/meminfo", "MemTotal:       65921000 kB\nMemAvailable:   12345678 kB\nSwapFree: 1 kB\n")
    assert devices.free_memory(tmp_path) == 12345678 * 1024


def test_this_machine_can_be_asked() -> None:
    assert bool(devices.gpus()) != bool(devices.why_no_gpu())
    assert devices.free_memory() is None or devices.free_memory() > 0
