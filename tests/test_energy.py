from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_nvml import FakeNvml, loads, no_library, plant

from edgeres import energy
from edgeres.energy import Rail, Tally
from edgeres.files import to_json

SAMPLES = Path(__file__).parent / "data" / "jetson"
RAPL = "sys/class/powercap/intel-rapl:"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(energy, "INTERVAL", 0.002)
    monkeypatch.setattr(energy, "SHORT", 0.0)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))  # no tegrastats but ours


def board(root: Path, name: str) -> Path:
    return plant(root, json.loads((SAMPLES / f"{name}.json").read_text()))


def packages(root: Path, joules: float = 0.0) -> Path:
    """A server with two packages, their memory, and zones that must not be counted again."""
    zones = {"0": "package-0", "0:0": "core", "0:1": "dram", "1": "package-1", "1:0": "dram", "2": "psys"}
    files = {f"{RAPL}{zone}/name": name for zone, name in zones.items()}
    files |= {f"{RAPL}{zone}/energy_uj": str(round(1e6 * joules)) for zone in zones}
    files |= {f"{RAPL}{zone}/max_energy_range_uj": "262143328850" for zone in zones}
    return plant(root, files)


def measure(
    root: Path, gpu: bool | None = None, load: Callable[[str], object] = no_library, **known: float
) -> energy.Energy:
    options = {"idle_seconds": 0.01, **known}
    with energy.energy(root, gpu=gpu, load=load, **options) as found:
        assert found is not None
        time.sleep(0.01)
    return found


def clock(*times: float) -> Callable[[], float]:
    steps = iter(times)
    return lambda: next(steps)


def reads(*values: float | None) -> Callable[[], float | None]:
    steps = iter(values)
    return lambda: next(steps)


def test_power_is_summed_over_uneven_times() -> None:
    tally = Tally({"VDD_IN": Rail(reads(4.0, 8.0, 6.0))}, clock(10.0, 10.5, 10.6))
    for _ in range(3):
        tally.take()
    assert tally.seconds == pytest.approx(0.6)
    assert tally.watts()["VDD_IN"] * tally.seconds == pytest.approx(0.5 * 6 + 0.1 * 7)
    assert tally.samples == 3


def test_a_counter_starts_again_where_it_wraps() -> None:
    tally = Tally({"package-0": Rail(reads(90.0, 97.0, 5.0), wraps=100.0)}, clock(0.0, 1.0, 4.0))
    for _ in range(3):
        tally.take()
    assert tally.watts() == {"package-0": pytest.approx(15 / 4)}


def test_a_counter_that_never_wraps_and_went_back_was_set_anew() -> None:
    tally = Tally({"gpu": Rail(reads(500.0, 3.0, 13.0), wraps=math.inf)}, clock(0.0, 0.1, 5.1))
    for _ in range(3):
        tally.take()
    assert tally.watts() == {"gpu": pytest.approx(2.0)}  # of the part that is known


def test_a_reading_that_is_missing_is_bridged_and_a_long_gap_is_not() -> None:
    short = Tally({"VDD_IN": Rail(reads(4.0, None, 4.0))}, clock(0.0, 0.4, 0.8))
    long = Tally({"VDD_IN": Rail(reads(4.0, None, 4.0, 4.0))}, clock(0.0, 1.0, 2.0, 2.5))
    for tally, steps in ((short, 3), (long, 4)):
        for _ in range(steps):
            tally.take()
    assert short.watts() == {"VDD_IN": pytest.approx(4.0)}
    assert long.watts() == {}


def test_a_rail_that_fell_silent_has_no_mean() -> None:
    rails = {"a": Rail(reads(1.0, 1.0, None)), "b": Rail(reads(2.0, 2.0, 2.0))}
    tally = Tally(rails, clock(0.0, 0.5, 1.0))
    for _ in range(3):
        tally.take()
    assert tally.watts() == {"b": pytest.approx(2.0)}


def test_agx_orin_is_the_sum_of_three_rails_and_says_that_it_is_an_estimate(tmp_path: Path) -> None:
    found = measure(board(tmp_path, "agx_orin"))
    rails = {"VDD_GPU_SOC": 19.464 * 0.640, "VDD_CPU_CV": 19.456 * 0.104, "VIN_SYS_5V0": 4.968 * 1.072}
    assert found.rails == pytest.approx({**rails, "VDDQ_VDD2_1V8AO": 4.968 * 0.264})
    assert found.counted == list(rails)
    assert found.idle_watts == pytest.approx(sum(rails.values()))
    assert found.total_joules == pytest.approx(sum(rails.values()) * found.seconds)
    assert found.joules == pytest.approx(0, abs=1e-9)  # it was idle all the while
    assert found.source == "INA3221"
    assert found.note == "an estimate: the sum of VDD_GPU_SOC, VDD_CPU_CV, VIN_SYS_5V0, for want of a rail for all"


def test_orin_nano_has_a_rail_for_all(tmp_path: Path) -> None:
    found = measure(board(tmp_path, "orin_nano"))
    assert (found.counted, found.note) == (["VDD_IN"], "")
    assert found.idle_watts == pytest.approx(5.016 * 1.824)
    assert set(found.rails) == {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}


def test_thor_is_measured_at_its_input_and_without_that_from_its_rails(tmp_path: Path) -> None:
    root = board(tmp_path, "thor")
    found = measure(root)
    assert (found.counted, found.source, found.note) == (["VIN"], "INA238, INA3221", "")
    assert found.idle_watts == pytest.approx(40.199)  # the monitor's own power, finer than V x I
    (root / "sys/class/hwmon/hwmon2/name").unlink()
    found = measure(root)
    assert found.counted == ["VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"]
    assert found.idle_watts == pytest.approx(12.04 * 0.64 + 12.04 * 0.96 + 5.088 * 1.74)
    assert found.note.startswith("an estimate")


def test_idle_power_is_measured_before_and_taken_off(tmp_path: Path) -> None:
    root = board(tmp_path, "orin_nano")
    current = root / "sys/class/hwmon/hwmon1/curr1_input"
    watts = {"rest": 5.016 * 1.824, "work": 5.016 * 3.0}
    with energy.energy(root, idle_seconds=0.05) as found:
        assert found is not None
        assert found.idle_watts == pytest.approx(watts["rest"])
        assert found.joules is None
        current.write_text("3000\n")
        time.sleep(0.2)
    assert watts["rest"] < found.rails["VDD_IN"] <= watts["work"] + 1e-6
    assert found.total_joules is not None
    assert found.joules == pytest.approx(found.total_joules - watts["rest"] * found.seconds)
    assert 0.2 <= found.seconds < 5
    assert found.samples >= 3


def test_idle_power_is_measured_for_a_while_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(energy.time, "sleep", slept.append)
    monkeypatch.setattr(energy, "IDLE_SECONDS", 2.0)
    for options in ({}, {"idle_seconds": 0.0}, {"idle_watts": 1.0}):
        with energy.energy(board(tmp_path, "orin_nano"), **options):
            pass
    assert slept == [2.0, 0.0]


def test_idle_power_that_is_known_is_not_measured_again(tmp_path: Path) -> None:
    found = measure(board(tmp_path, "orin_nano"), idle_watts=2.0, idle_seconds=3600.0)
    assert found.idle_watts == 2.0
    assert found.joules == pytest.approx((5.016 * 1.824 - 2.0) * found.seconds)


def test_the_record_is_per_image_and_can_be_written_as_json(tmp_path: Path) -> None:
    found = measure(board(tmp_path, "orin_nano"), idle_watts=2.0)
    record = found.record(4)
    assert record is not None
    assert found.joules is not None
    assert record["joules_per_image"] == pytest.approx(found.joules / 4, abs=1e-6)
    assert record["rails"] == {"VDD_CPU_GPU_CV": 3.411, "VDD_IN": 9.149, "VDD_SOC": 2.087}
    assert (record["idle_watts"], record["source"], record["counted"]) == (2.0, "INA3221", ["VDD_IN"])
    assert json.loads(to_json(record)) == record


def test_sensors_that_fall_silent_give_no_energy(tmp_path: Path) -> None:
    root = board(tmp_path, "orin_nano")
    with energy.energy(root, idle_seconds=0.01) as found:
        assert found is not None
        (root / "sys/class/hwmon/hwmon1/in1_input").unlink()
        time.sleep(0.05)
    assert (found.joules, found.total_joules, found.record(1)) == (None, None, None)
    assert found.note == "sensors fell silent"


def test_a_short_block_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "SHORT", 60.0)
    assert measure(board(tmp_path, "orin_nano")).note.startswith("only 0.")


def test_an_error_in_the_block_is_passed_on_and_the_thread_ends(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="of the block"), energy.energy(board(tmp_path, "orin_nano"), idle_seconds=0):
        raise RuntimeError("of the block")
    assert "energy" not in {thread.name for thread in threading.enumerate()}


def test_rails_that_nobody_knows_how_to_add_up_are_not_added_up(tmp_path: Path) -> None:
    chip = "sys/class/hwmon/hwmon0"
    root = plant(tmp_path, {f"{chip}/name": "ina226", f"{chip}/label": "VDD_FAN", f"{chip}/power1_input": "1000000"})
    with energy.energy(root, load=no_library) as found:
        assert found is None


@pytest.fixture
def tegrastats(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A program by that name, which prints a line at each interval until it is ended."""

    def install(code: str) -> Path:
        program = plant(tmp_path, {"bin/tegrastats": f"#!{sys.executable}\n{code}"}) / "bin/tegrastats"
        program.chmod(0o755)
        return plant(tmp_path / "root", {"etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1"})

    yield install
    assert "tegrastats" not in {thread.name for thread in threading.enumerate()}


def test_without_monitors_tegrastats_is_read_and_ended(tegrastats: Callable[[str], Path]) -> None:
    line = (SAMPLES / "tegrastats_orin_nano.txt").read_text()
    root = tegrastats(
        f"import sys, time\nassert sys.argv[1:] == ['--interval', '2'], sys.argv\n"
        f"while True:\n    print({line.strip()!r}, flush=True)\n    time.sleep(0.002)\n"
    )
    found = measure(root, idle_watts=1.127)
    assert (found.source, found.counted) == ("tegrastats", ["VDD_IN"])
    assert found.rails == pytest.approx({"VDD_IN": 9.127, "VDD_CPU_GPU_CV": 3.41, "VDD_SOC": 2.093})
    assert found.joules == pytest.approx(8.0 * found.seconds)


@pytest.mark.parametrize("code", ["", "print('no such option')", "raise SystemExit(1)"])
def test_a_tegrastats_that_tells_nothing_is_no_meter(tegrastats: Callable[[str], Path], code: str) -> None:
    root = tegrastats(code)
    with energy.energy(root, load=no_library) as found:
        assert found is None
    assert energy.why_no_energy(root, load=no_library) == "neither power monitors nor tegrastats can be read"


def test_a_tegrastats_that_dies_is_no_reading_any_more(tegrastats: Callable[[str], Path]) -> None:
    root = tegrastats("import time\nprint('VDD_IN 4000mW/4000mW', flush=True)\ntime.sleep(0.1)\n")
    with energy.energy(root, idle_watts=1.0) as found:
        assert found is not None
        time.sleep(0.5)
    assert found.joules is None


def test_a_jetson_without_either_has_no_energy(tmp_path: Path) -> None:
    root = plant(tmp_path / "root", {"etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1"})
    assert energy.why_no_energy(root, load=loads(FakeNvml())) == "neither power monitors nor tegrastats can be read"


@pytest.mark.parametrize(
    ("file", "rails"),
    [
        (
            "agx_orin",
            [
                {"VDD_GPU_SOC": 12.405, "VDD_CPU_CV": 1.992, "VIN_SYS_5V0": 5.32, "NC": 0.0, "VDDQ_VDD2_1V8AO": 1.304},
                {"VDD_GPU_SOC": 13.218, "VDD_CPU_CV": 2.268, "VIN_SYS_5V0": 5.5},
            ],
        ),
        ("orin_nano", [{"VDD_IN": 9.127, "VDD_CPU_GPU_CV": 3.41, "VDD_SOC": 2.093}]),
        (
            "thor",
            [
                {"VDD_GPU": 31.52, "VDD_CPU_SOC_MSS": 18.25, "VIN_SYS_5V0": 11.31, "VIN": 83.72},
                {"VDD_GPU": -0.392, "VDD_CPU_SOC_MSS": 3.924, "VIN_SYS_5V0": 6.106, "VIN": 28.114},
            ],
        ),
        (
            "without_units",
            [
                {"POM_5V_IN": 5.34, "POM_5V_GPU": 1.912, "POM_5V_CPU": 1.105},
                {"GPU": 0.311, "CPU": 0.466, "SOC": 0.933, "CV": 0.0, "VDDRQ": 0.155, "SYS5V": 1.522},
            ],
        ),
    ],
)
def test_tegrastats_lines_of_several_boards_and_releases(file: str, rails: list[dict[str, float]]) -> None:
    lines = (SAMPLES / f"tegrastats_{file}.txt").read_text().splitlines()
    assert [energy.tegrastats_rails(line) for line in lines] == rails  # memory in MB is no rail


def test_a_line_without_rails_has_none() -> None:
    assert energy.tegrastats_rails("") == {}
    assert energy.tegrastats_rails("RAM 1/2MB IRAM 0/252kB(lfb 252kB) GR3D_FREQ 0%@76 APE 25 EMC 1/x") == {}


def test_a_processor_is_counted_by_package_and_memory(tmp_path: Path) -> None:
    root = packages(tmp_path, joules=1.0)
    with energy.energy(root, gpu=False, load=no_library, idle_watts=1.0) as found:
        assert found is not None
        packages(root, joules=1.5)
    assert found.counted == ["package-0", "package-0 dram", "package-1", "package-1 dram"]
    assert found.total_joules == pytest.approx(4 * 0.5)
    assert found.joules == pytest.approx(4 * 0.5 - found.seconds)
    assert (found.source, found.note) == ("RAPL", "")


def test_a_counter_of_the_processor_wraps(tmp_path: Path) -> None:
    root = plant(tmp_path, {f"{RAPL}0/name": "package-0", f"{RAPL}0/energy_uj": "65532000000"})
    plant(root, {f"{RAPL}0/max_energy_range_uj": "65532610987"})
    with energy.energy(root, gpu=False, load=no_library, idle_watts=0.0) as found:
        assert found is not None
        plant(root, {f"{RAPL}0/energy_uj": "1389013"})
    assert found.joules == pytest.approx(0.610987 + 1.389013)


def test_counters_that_only_root_may_read_are_told(tmp_path: Path) -> None:
    root = plant(tmp_path, {f"{RAPL}0/name": "package-0"})
    why = energy.why_no_energy(root, load=no_library)
    assert why.endswith("intel-rapl:0/energy_uj cannot be read: Linux shows it to root alone")
    with energy.energy(root, load=no_library) as found:
        assert found is None


def test_a_machine_without_sensors_has_no_energy(tmp_path: Path) -> None:
    assert energy.why_no_energy(tmp_path, load=no_library) == "the processor has no energy counter that Linux shows"
    assert energy.why_no_energy(tmp_path, gpu=True, load=no_library) == "no NVIDIA GPU tells its power"
    with energy.energy(tmp_path, load=no_library) as found:
        assert found is None


def counting(start: int, step: int) -> Callable[[], int]:
    """An energy counter in mJ that goes on by ``step`` at each reading."""
    values = iter(range(start, 10**12, step))
    return lambda: next(values)


def test_work_on_a_gpu_counts_its_board_and_the_processor_where_it_can(tmp_path: Path) -> None:
    fake = FakeNvml({"nvmlDeviceGetTotalEnergyConsumption": counting(5_000_000, 2000)})
    found = measure(tmp_path, gpu=True, load=loads(fake), idle_watts=0.0)
    assert (found.source, found.counted) == ("NVML", ["gpu"])
    assert found.joules == pytest.approx(2.0 * (found.samples - 1))
    assert found.note == "the GPU's board alone (the processor has no energy counter that Linux shows)"
    both = measure(packages(tmp_path), gpu=True, load=loads(fake))
    assert (both.source, both.note) == ("NVML, RAPL", "")
    assert both.counted == ["gpu", "package-0", "package-0 dram", "package-1", "package-1 dram"]


def test_work_on_the_processor_does_not_count_the_gpu(tmp_path: Path) -> None:
    assert measure(packages(tmp_path), gpu=False, load=loads(FakeNvml())).source == "RAPL"
    assert energy.why_no_energy(tmp_path / "none", gpu=False, load=loads(FakeNvml()))


def test_work_that_may_be_on_either_needs_both(tmp_path: Path) -> None:
    why = energy.why_no_energy(tmp_path, load=loads(FakeNvml()))
    assert why.startswith("the GPU tells its power, the processor does not (")
    silent = FakeNvml({"nvmlDeviceGetTotalEnergyConsumption": None, "nvmlDeviceGetPowerUsage": None})
    assert energy.why_no_energy(packages(tmp_path), load=loads(silent)) == "no NVIDIA GPU tells its power"
    assert measure(tmp_path, load=loads(FakeNvml())).source == "NVML, RAPL"
    assert measure(tmp_path, load=no_library).source == "RAPL"  # there is no GPU


def test_a_gpu_without_a_counter_is_read_by_its_power(tmp_path: Path) -> None:
    fake = FakeNvml({"nvmlDeviceGetTotalEnergyConsumption": None})
    found = measure(tmp_path, gpu=True, load=loads(fake))
    assert found.rails == {"gpu": pytest.approx(87.5)}
