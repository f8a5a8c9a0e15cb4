from __future__ import annotations

import pytest

from edgeres import devices, machine
from edgeres.devices import Gpu, Jetson
from edgeres.files import to_json


@pytest.fixture(autouse=True)
def _nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "gpus", list)
    for name in ("driver", "driver_release", "jetson"):
        monkeypatch.setattr(devices, name, lambda: None)


def test_a_machine_without_a_gpu_says_nothing_of_gpus() -> None:
    found = machine.describe()
    assert set(found) == {"system", "cpu", "cores", "instruction_sets", "load_1min"}
    assert found["cores"] >= 1


def test_a_jetson_is_described_with_gpu_driver_and_jetpack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "gpus", lambda: [Gpu("Orin", "8.7", 1 << 35, True)])
    monkeypatch.setattr(devices, "driver", lambda: "12.6")
    monkeypatch.setattr(devices, "driver_release", lambda: "540.4.0")
    monkeypatch.setattr(devices, "jetson", lambda: Jetson("NVIDIA Jetson AGX Orin Developer Kit", "36.4.3", "6.2"))
    found = machine.describe()
    assert found["gpus"] == [{"name": "Orin", "capability": "8.7", "memory_bytes": 1 << 35, "integrated": True}]
    assert (found["cuda"], found["driver"]) == ("12.6", "540.4.0")
    assert found["jetson"]["l4t"] == "36.4.3"
    to_json(found)


@pytest.mark.parametrize(
    ("info", "name"),
    [
        ({"model name": "AMD EPYC 9B14", "flags": "avx2"}, "AMD EPYC 9B14"),
        ({"CPU implementer": "0x41", "CPU part": "0xd42"}, "Arm Cortex-A78AE"),
        ({"CPU implementer": "0x41", "CPU part": "0xd83"}, "Arm Neoverse-V3AE"),
        ({"CPU implementer": "0x4e", "CPU part": "0x004"}, "NVIDIA Carmel"),
        ({"CPU implementer": "0x41", "CPU part": "0xd0c"}, "Arm Neoverse-N1"),
        ({"CPU implementer": "0x41", "CPU part": "0x004"}, "Arm, implementer 0x41, part 0x004"),
        ({"CPU part": "0x004"}, "what the system says"),
        ({}, "what the system says"),
    ],
)
def test_the_processor_has_a_name(monkeypatch: pytest.MonkeyPatch, info: dict[str, str], name: str) -> None:
    monkeypatch.setattr(machine, "cpu_info", lambda: info)
    monkeypatch.setattr(machine.platform, "processor", lambda: "what the system says")
    assert machine.describe()["cpu"] == name


def test_instruction_sets_are_those_that_matter_for_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_info", lambda: {"flags": "fpu avx2 sse4_2 avx512_vnni"})
    assert machine.describe()["instruction_sets"] == ["avx2", "avx512_vnni"]
