from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fake_nvml import FakeCuda, FakeNvml, loads, no_library, plant

from edgeres import nvml, sensors
from edgeres.files import to_json

SAMPLES = Path(__file__).parent / "data" / "jetson"
BOARDS = ("agx_orin", "orin_nano", "thor")


def board(root: Path, name: str, **files: str) -> Path:
    """A Jetson's files below ``root``; ``files`` on top, with / written as __."""
    tree = json.loads((SAMPLES / f"{name}.json").read_text())
    return plant(root, tree | {path.replace("__", "/"): content for path, content in files.items()})


def look(root: Path, since: Any = None, at: float = 0.0, load: Any = no_library, **answers: str) -> dict[str, Any]:
    """Conditions at a scripted time. ``answers``: what programs print, by their names."""
    run = lambda command: answers.get(command[0], "")  # noqa: E731
    return sensors.conditions(root, since, load=load, run=run, clock=lambda: at)


def ticks(busy: int, idle: int, steal: int = 0, own: int = 0, cores: int = 2) -> dict[str, str]:
    """Files of /proc with these ticks, spread over the kinds that count alike."""
    parts = busy - 6 * (busy // 7)
    rest = busy // 7
    line = f"cpu  {parts + rest} {rest} {rest} {idle - idle // 3} {idle // 3} {rest} {2 * rest} {steal} 999 999"
    each = "".join(f"cpu{i} 1 1 1 1 1 1 1 1 0 0\n" for i in range(cores))
    name = "4806 (a (b) c) S"
    stat = f"{name} 1 1 1 0 -1 4194304 99 0 0 0 {own - own // 2} {own // 2 - 2} 1 1 20 0 1 0 2573318 3133440 394"
    return {"proc/stat": f"{line}\n{each}intr 12 0\nctxt 34\n", "proc/self/stat": stat}


def record(**values: Any) -> dict[str, Any]:
    """Conditions of a machine that tells nothing, but for ``values``."""
    names = ("power_mode", "throttle_reasons", "throttle_events", "throttle_seconds", "cpu_ticks")
    names += ("governor", "gpu_governor")
    return {"at": 0.0, "clocks": {}, "temperatures": {}, "temperature_limits": {}, **dict.fromkeys(names), **values}


def test_a_machine_that_tells_nothing_leaves_nothing_made_up(tmp_path: Path) -> None:
    found = look(tmp_path)
    assert {key for key, value in found.items() if value not in (None, {})} == {"at"}
    assert sensors.changed(found, look(tmp_path, found)) == []
    assert to_json(found)


@pytest.mark.parametrize("name", BOARDS)
def test_a_record_can_be_written_as_json(tmp_path: Path, name: str) -> None:
    found = look(board(tmp_path, name))
    assert json.loads(to_json(found)) == found


def test_agx_orin_tells_its_clocks_temperatures_and_events(tmp_path: Path) -> None:
    found = look(board(tmp_path, "agx_orin"), nvpmodel="NV Power Mode: MAXN\n0\n")
    assert found["power_mode"] == "MAXN"
    cpu, gpu, emc = (2201.6, 729.6, 2201.6), (1300.5, 306.0, 1300.5), (3199.0, 204.0, 3199.0)
    names = [name + end for name in ("cpu", "gpu", "emc") for end in ("", "_min", "_max")]
    assert found["clocks"] == dict(zip(names, cpu + gpu + emc, strict=True))
    assert (found["governor"], found["gpu_governor"]) == ("schedutil", "nvhost_podgov")
    # cv0 is switched off (-256 C), cv1 gives an error
    assert found["temperatures"] == {"cpu-thermal": 52.125, "gpu-thermal": 48.406, "tj-thermal": 52.125}
    # the lowest that slows down; the others start the fan
    assert found["temperature_limits"] == {"cpu-thermal": 99.0, "gpu-thermal": 99.0, "tj-thermal": 104.5}
    assert (found["throttled"], found["throttle_reasons"]) == (False, [])
    assert found["throttle_events"] == {
        "under-voltage (oc1)": 0,
        "average over-current (oc2)": 2,
        "instantaneous over-current (oc3)": 17,
    }
    assert found["memory_free_mb"] == 55625
    assert found["load_1min"] == 0.42


def test_thor_has_its_gpu_and_memory_clock_in_other_places(tmp_path: Path) -> None:
    clocks = look(board(tmp_path, "thor"))["clocks"]
    assert (clocks["gpu"], clocks["gpu_max"]) == (1386.0, 1575.0)  # not those of the video engines
    assert (clocks["emc"], clocks["emc_max"]) == (4266.0, 4266.0)


@pytest.mark.parametrize(
    ("node", "known"),
    [("17000000.ga10b", True), ("17000000.gv11b", True), ("15340000.vic", False), ("gpu-nvd-0", False)],
)
def test_the_gpu_is_known_by_its_name(tmp_path: Path, node: str, known: bool) -> None:
    plant(tmp_path, {f"sys/class/devfreq/{node}/cur_freq": "624750000"})
    assert look(tmp_path)["clocks"] == ({"gpu": 624.8} if known else {})


def test_nvpmodel_is_understood_between_warnings_and_errors() -> None:
    assert sensors.power_mode((SAMPLES / "nvpmodel_without_root.txt").read_text()) == "MAXN_SUPER"
    assert sensors.power_mode("NV Power Mode: MODE_30W\n2\n") == "MODE_30W"
    assert sensors.power_mode("NVPM ERROR: no such mode\n") is None
    assert sensors.power_mode("") is None


@pytest.mark.parametrize(
    ("status", "name"),
    [("pmode:0002 fmode:quiet", "MAXN_SUPER"), ("pmode:0001", "25W"), ("pmode:0012", "7W"), ("pmode:0005", "mode 5")],
)
def test_without_nvpmodel_its_files_name_the_power_mode(tmp_path: Path, status: str, name: str) -> None:
    config = (SAMPLES / "nvpmodel.conf").read_text()
    root = board(tmp_path, "orin_nano", var__lib__nvpmodel__status=status, **{"etc/nvpmodel.conf": config})
    assert look(root)["power_mode"] == name
    assert look(root, nvpmodel="NV Power Mode: 15W\n0\n")["power_mode"] == "15W"


def test_a_jetson_without_nvpmodel_has_no_power_mode(tmp_path: Path) -> None:
    assert look(board(tmp_path, "agx_orin"))["power_mode"] is None


def test_a_machine_that_is_no_jetson_is_not_asked_for_a_power_mode(tmp_path: Path) -> None:
    def run(command: list[str]) -> str:
        raise AssertionError(command)

    assert sensors.conditions(tmp_path, load=no_library, run=run)["power_mode"] is None


def test_programs_that_fail_hang_or_are_not_there_give_what_they_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sensors._run(["sh", "-c", "echo NV Power Mode: 15W; exit 3"]) == "NV Power Mode: 15W\n"
    assert sensors._run(["no-such-program-of-edgeres"]) == ""

    def hang(*args: Any, **kwargs: Any) -> None:
        assert kwargs["timeout"] <= 10
        raise subprocess.TimeoutExpired("nvpmodel", 5)

    monkeypatch.setattr(sensors.subprocess, "run", hang)
    assert sensors._run(["nvpmodel"]) == ""


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        ("gpu-throttle-alert", True),
        ("hot-surface-alert", True),
        ("devfreq-17000000.gpu", True),
        ("thermal-cpufreq-0", True),
        ("Processor", True),
        ("pwm-fan", False),
        ("TCC Offset", False),
    ],
)
def test_a_cooling_device_at_work_slows_down_unless_it_is_a_fan(tmp_path: Path, kind: str, counts: bool) -> None:
    device = "sys/class/thermal/cooling_device9"
    found = look(board(tmp_path, "agx_orin", **{f"{device}/type": kind, f"{device}/cur_state": "1"}))
    assert found["throttle_reasons"] == ([kind] if counts else [])
    assert found["throttled"] is counts
    assert sensors.changed(found, found).count(f"throttled: {kind}") == counts


def test_a_machine_without_alerts_does_not_claim_to_be_unthrottled(tmp_path: Path) -> None:
    assert look(plant(tmp_path, {"sys/class/thermal/cooling_device0/type": "Fan"}))["throttled"] is None


def test_events_between_two_looks_are_throttling(tmp_path: Path) -> None:
    root = board(tmp_path, "agx_orin")
    before = look(root)
    assert look(root, before)["throttled"] is False
    plant(root, {"sys/class/hwmon/hwmon5/oc3_event_cnt": "20"})
    after = look(root, before)
    assert after["throttled"] is True
    assert "throttled 3 times: instantaneous over-current (oc3)" in sensors.changed(before, after)


def test_a_hot_processor_of_a_pc_counts_its_slow_downs(tmp_path: Path) -> None:
    folder = "sys/devices/system/cpu/cpu{}/thermal_throttle/{}_throttle_count"
    files = {folder.format(i, kind): n for i in (0, 1) for kind, n in (("core", "4"), ("package", "9"))}
    before = look(plant(tmp_path, files))
    assert before["throttle_events"] == {"hot core": 8, "hot processor": 9}
    assert before["throttled"] is None  # counts since the start say nothing of now
    after = look(plant(tmp_path, {folder.format(1, "core"): "5", folder.format(0, "package"): "11"}), before)
    assert sensors.changed(before, after) == ["throttled 1 times: hot core", "throttled 2 times: hot processor"]
    assert after["throttled"] is True


def test_thermal_zones_of_a_pc(tmp_path: Path) -> None:
    zone = "sys/class/thermal/thermal_zone{}/{}"
    files = {zone.format(i, "type"): "acpitz" for i in (0, 10)} | {zone.format(2, "type"): "x86_pkg_temp"}
    files |= {zone.format(i, "temp"): t for i, t in ((0, "27800"), (10, "29800"), (2, "54000"))}
    files |= {zone.format(2, "trip_point_0_type"): "passive", zone.format(2, "trip_point_0_temp"): "-274000"}
    files |= {"sys/class/hwmon/hwmon1/name": "k10temp", "sys/class/hwmon/hwmon1/temp1_input": "48250"}
    found = look(plant(tmp_path, files))
    assert found["temperatures"] == {"acpitz": 27.8, "x86_pkg_temp": 54.0, "acpitz 10": 29.8, "k10temp": 48.25}
    assert found["temperature_limits"] == {}


def test_steal_is_of_the_time_between(tmp_path: Path) -> None:
    before = look(plant(tmp_path, ticks(1000, 5000, 70, own=100)))
    assert before["steal_percent"] is None
    assert before["cpu_ticks"] == {"busy": 1000, "idle": 5000, "steal": 70, "own": 100, "cores": 2}
    after = look(plant(tmp_path, ticks(1900, 5060, 110, own=1000)), before)
    assert after["steal_percent"] == 4.0
    assert sensors.changed(before, after) == [
        "the host took 4.0 % of the processor's time for other guests (steal)"
    ]  # all that was busy is this process


def test_a_percent_of_steal_is_borne(tmp_path: Path) -> None:
    before = look(plant(tmp_path, ticks(1000, 5000, 0)))
    assert sensors.changed(before, look(plant(tmp_path, ticks(1000, 5099, 1)), before)) == []


@pytest.mark.parametrize(
    ("cores", "others", "told"), [(2, 0.3, True), (2, 0.2, False), (64, 1.2, False), (64, 1.4, True)]
)
def test_work_of_others_is_told_in_cores(tmp_path: Path, cores: int, others: float, told: bool) -> None:
    before = look(plant(tmp_path, ticks(0, 0, own=7, cores=cores)))
    busy, all_ticks = round(1000 * others) + 1000, 1000 * cores
    after = look(plant(tmp_path, ticks(busy, all_ticks - busy, own=1007, cores=cores)), before)
    assert sensors.changed(before, after) == [f"other processes kept {others} of {cores} cores busy"] * told


def test_an_older_or_odd_proc_is_no_measurement(tmp_path: Path) -> None:
    assert look(plant(tmp_path, {"proc/stat": "cpu  1 2 3 4"}))["cpu_ticks"] is None


def test_clocks_that_jetson_clocks_pinned_are_no_cause_for_doubt(tmp_path: Path) -> None:
    found = look(board(tmp_path, "orin_nano"))
    assert found["governor"] == "schedutil"  # it stays, and has nothing to choose
    assert sensors.changed(found, found) == []


def test_clocks_that_may_move_are_told_with_their_governor(tmp_path: Path) -> None:
    found = look(board(tmp_path, "agx_orin"))
    assert sensors.changed(found, found) == [
        "the cpu clock is free to move between 730 and 2202 MHz (governor schedutil)",
        "the gpu clock is free to move between 306 and 1300 MHz (governor nvhost_podgov)",
    ]


def test_the_performance_governor_is_no_cause_for_doubt() -> None:
    found = record(clocks={"cpu": 4000.0, "cpu_min": 800.0, "cpu_max": 4600.0}, governor="performance")
    assert sensors.changed(found, found) == []


def test_a_pinned_clock_that_fell_is_told_one_that_may_move_is_not() -> None:
    def at(now: float, low: float) -> dict[str, Any]:
        return record(clocks={"gpu": now, "gpu_min": low, "gpu_max": 1020.0}, gpu_governor="performance")

    assert sensors.changed(at(1020, 1020), at(918, 1020)) == ["the gpu clock fell from 1020 to 918 MHz"]
    assert sensors.changed(at(1020, 1020), at(1000, 1020)) == []
    assert sensors.changed(at(1020, 306), at(918, 306)) == []
    gone = record(clocks={"gpu_min": 1020.0, "gpu_max": 1020.0})
    assert sensors.changed(at(1020, 1020), gone) == []


def test_a_ceiling_that_fell_is_told() -> None:
    before, after = (record(clocks={"cpu": 700.0, "cpu_max": top}) for top in (2201.6, 1728.0))
    assert sensors.changed(before, after) == ["the highest cpu clock fell from 2202 to 1728 MHz"]
    assert sensors.changed(after, before) == []


def test_a_power_mode_that_changed_is_told() -> None:
    assert sensors.changed(record(power_mode="MAXN"), record(power_mode="15W")) == [
        "the power mode changed from MAXN to 15W"
    ]


def test_the_temperature_closest_to_its_limit_is_told() -> None:
    def at(cpu: float, gpu: float) -> dict[str, Any]:
        return record(
            temperatures={"cpu": cpu, "gpu": gpu, "board": 200.0}, temperature_limits={"cpu": 99.0, "gpu": 95.0}
        )

    assert sensors.changed(at(60, 60), at(93.9, 89.9)) == []
    assert sensors.changed(at(60, 94.25), at(96, 60)) == ["gpu reached 94.2 C, and clocks go down at 95.0 C"]


def test_a_gpu_on_a_board_of_its_own(tmp_path: Path) -> None:
    found = look(tmp_path, load=loads(FakeNvml()))
    assert found["clocks"] == {"gpu": 1980, "gpu_max": 2520, "gpu_memory": 9501, "gpu_memory_max": 10501}
    assert (found["temperatures"], found["temperature_limits"]) == ({"gpu": 61}, {"gpu": 90})
    assert found["gpu_state"] == {"power_limit_watts": 450.0, "persistence": True, "performance_state": "P0"}
    assert (found["throttled"], found["throttle_reasons"]) == (False, [])
    assert found["throttle_seconds"] == {"power limit": 0, "temperature": 0}
    assert sensors.changed(found, look(tmp_path, found, at=30.0, load=loads(FakeNvml()))) == []


@pytest.mark.parametrize(
    ("bits", "reasons"),
    [
        (0x1, []),
        (0x2 | 0x10 | 0x100, []),
        (0x4, ["GPU power cap"]),
        (0x28, ["GPU hardware slowdown", "GPU software thermal slowdown"]),
        (0xC0, ["GPU hardware thermal slowdown", "GPU power brake"]),
    ],
)
@pytest.mark.parametrize(
    "call", ["nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"]
)
def test_reasons_of_a_gpu_that_slow_it_down(tmp_path: Path, bits: int, reasons: list[str], call: str) -> None:
    silent = {"nvmlDeviceGetCurrentClocksEventReasons": None}
    found = look(tmp_path, load=loads(FakeNvml({**silent, call: bits})))
    assert found["throttle_reasons"] == reasons
    assert found["throttled"] is bool(reasons)


def test_time_that_power_and_heat_held_a_gpu_back_is_told(tmp_path: Path) -> None:
    before = look(tmp_path, load=loads(FakeNvml(held_back={0: 5_000_000_000, 1: 0})))
    held = FakeNvml(held_back={0: 8_500_000_000, 1: 250_000_000})
    after = look(tmp_path, before, at=30.0, load=loads(held))
    assert sensors.changed(before, after) == ["the GPU's power limit held its clocks down for 3.5 of 30.0 s"]
    assert after["throttled"] is True  # the other is below a percent


def test_a_gpu_that_supports_nothing_tells_nothing(tmp_path: Path) -> None:
    silent = FakeNvml(dict.fromkeys(FakeNvml().answers), held_back={})
    found = look(tmp_path, load=loads(silent))
    assert {key for key, value in found.items() if value not in (None, {})} == {"at"}


def test_an_integrated_gpu_that_linux_shows_keeps_its_clock_and_nvml_fills_the_rest(tmp_path: Path) -> None:
    found = look(board(tmp_path, "thor"), load=loads(FakeNvml()))
    assert (found["clocks"]["gpu"], found["clocks"]["gpu_memory"]) == (1386.0, 9501)


def test_the_new_call_for_the_temperature_goes_first(tmp_path: Path) -> None:
    new = FakeNvml({"nvmlDeviceGetTemperatureV": 64})
    assert look(tmp_path, load=loads(new))["temperatures"] == {"gpu": 64}


def test_an_unknown_performance_state_is_no_state() -> None:
    gpu = nvml.gpu(loads(FakeNvml({"nvmlDeviceGetPerformanceState": 32})))
    assert gpu is not None
    assert gpu.performance_state() is None


def test_without_a_gpu_for_cuda_there_is_none() -> None:
    assert nvml.gpu(no_library) is None
    assert nvml.gpu(loads(FakeNvml(), FakeCuda(devices=0))) is None
    assert nvml.gpu(loads(object())) is None  # another library by that name


@pytest.mark.gpu
def test_a_real_gpu_tells_its_clocks_and_energy() -> None:
    found, gpu = sensors.conditions(), nvml.gpu()
    assert gpu is not None
    assert found["clocks"]["gpu_max"] >= found["clocks"]["gpu"] > 100
    assert 10 < found["temperatures"]["gpu"] < 110
    assert found["throttle_reasons"] is not None
    assert (gpu.joules() or 0) > 0
