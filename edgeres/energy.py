"""Energy that a block of code costs, from the sensors of the machine. Standard library only.

Jetson: power monitors on the module, as files or through tegrastats. Elsewhere: energy counters of the GPU (NVML) and
of the processor (RAPL). Files are read below ``root``.
"""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeres import devices, nvml
from edgeres.sysfs import number, text

ROOT = devices.ROOT
INTERVAL = 0.1
"""Seconds between readings. One takes some 0.6 ms per file on a Jetson: the monitors are behind a slow bus (I2C)."""
GAP = 1.0
"""Seconds over which power is taken to run straight from one reading to the next."""
IDLE_SECONDS = 2.0
PATIENCE = 2.0
"""Seconds that tegrastats has for its first line."""
COVERED = 0.9
"""Share of the time that a rail must have been read in."""
SHORT = 1.0
"""Seconds below which a note is made: sensors average, and their counters move in steps."""

TOTALS = (
    (("VIN",), False),  # AGX Thor developer kit: an INA238 at the board's input
    (("VDD_IN",), False),  # Orin NX, Orin Nano, Xavier NX: the module's input
    (("POM_5V_IN",), False),  # Nano
    (("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), True),  # AGX Orin; VDDQ_VDD2_1V8AO is fed from VIN_SYS_5V0
    (("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"), True),  # Thor without the monitor at the input
    (("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"), True),  # AGX Xavier
)
"""Rails that make up what a module takes in, and whether that is only a sum (Jetson Linux Developer Guide, power)."""

RAIL = re.compile(r"(?<!\S)([A-Z]\w*) (-?\d+)(?:mW)?/-?\d+(?:mW)?(?:/-?\d+(?:mW)?)?(?!\S)")
"""tegrastats: a rail, what it takes now, its mean, in later L4T its peak; older L4T names no unit."""


@dataclass(frozen=True)
class Rail:
    """``read``: watts now or, where it ``wraps``, joules so far, which start again from 0 at that many.

    None is no answer.
    """

    read: Callable[[], float | None]
    wraps: float | None = None


@dataclass(frozen=True)
class Meter:
    """Where power is read. ``counted``: the rails whose sum is the whole."""

    source: str
    rails: dict[str, Rail]
    counted: tuple[str, ...]
    note: str = ""
    close: Callable[[], None] = lambda: None


@dataclass
class Energy:
    """What a block took. Numbers come when it has ended.

    ``joules`` is above ``idle_watts``, ``total_joules`` all of it; both None where sensors fell silent. ``rails``: mean
    watts of each rail, idle power included. ``counted``: those that the sums are of. ``note``: what to know about them.
    """

    source: str
    counted: list[str]
    note: str
    idle_watts: float | None = None
    joules: float | None = None
    total_joules: float | None = None
    seconds: float = 0.0
    samples: int = 0
    rails: dict[str, float] = field(default_factory=dict)

    def record(self, images: int) -> dict[str, Any] | None:
        """The ``energy`` of a benchmark record, for a block that took ``images``; None where sensors fell silent."""
        if self.joules is None or self.idle_watts is None:
            return None
        return {
            "joules_per_image": round(self.joules / images, 6),
            "idle_watts": round(self.idle_watts, 3),
            "rails": {name: round(watts, 3) for name, watts in self.rails.items()},
            "counted": self.counted,
            "source": self.source,
            "note": self.note,
            "seconds": round(self.seconds, 3),
            "samples": self.samples,
        }


class Tally:
    """Joules of each rail over time, from readings that need not be evenly spaced."""

    def __init__(self, rails: dict[str, Rail], clock: Callable[[], float] = time.perf_counter) -> None:
        self._rails, self._clock = rails, clock
        self._last: dict[str, tuple[float, float]] = {}
        self._joules = dict.fromkeys(rails, 0.0)
        self._covered = dict.fromkeys(rails, 0.0)
        self._start: float | None = None
        self.samples, self.seconds = 0, 0.0

    def take(self) -> None:
        """Read every rail once. They come one after another, each as long after ``now`` as the last time."""
        now = self._clock()
        self._start = now if self._start is None else self._start
        self.seconds = now - self._start
        for name, rail in self._rails.items():
            value = rail.read()
            if value is None:
                continue
            if name in self._last:
                self._add(name, rail, self._last[name], (now, value))
            self._last[name] = now, value
        self.samples += 1

    def _add(self, name: str, rail: Rail, old: tuple[float, float], new: tuple[float, float]) -> None:
        span, change = new[0] - old[0], new[1] - old[1]
        if rail.wraps is None:
            if span > GAP:
                return
            self._joules[name] += span * (old[1] + new[1]) / 2
        else:
            if change < 0:
                change += rail.wraps
            if not math.isfinite(change):  # one that does not wrap went back: the driver was loaded anew
                return
            self._joules[name] += change
        self._covered[name] += span

    def watts(self) -> dict[str, float]:
        """Mean of each rail that was read for most of the time."""
        enough = COVERED * self.seconds
        return {n: self._joules[n] / c for n, c in self._covered.items() if c and c >= enough}


@contextmanager
def energy(
    root: Path = ROOT,
    *,
    gpu: bool | None = None,
    idle_watts: float | None = None,
    idle_seconds: float | None = None,
    load: nvml.Load = ctypes.CDLL,
) -> Iterator[Energy | None]:
    """Energy of the block; None where no sensor covers it (see `why_no_energy`).

    Power at rest is measured for ``idle_seconds`` (`IDLE_SECONDS`) before the block, unless ``idle_watts`` says it:
    load the engine, and let the machine come to rest, before you enter. ``gpu``: does the work run on a GPU with a
    board of its own? The processor is then counted too if it can be. None: not known, so both must be covered, as a
    Jetson's monitors do.

    A thread reads the sensors ten times a second, so take percentiles of latency elsewhere.
    """
    found, _ = _find(root, gpu, load)
    if found is None:
        yield None
        return
    try:
        if idle_watts is None:
            with _sampled(found) as rest:
                time.sleep(IDLE_SECONDS if idle_seconds is None else idle_seconds)
            idle_watts = _sum(rest.watts(), found.counted)
        result = Energy(found.source, list(found.counted), found.note, idle_watts)
        with _sampled(found) as tally:
            yield result
        _finish(result, tally)
    finally:
        found.close()


def why_no_energy(root: Path = ROOT, gpu: bool | None = None, load: nvml.Load = ctypes.CDLL) -> str:
    """Why `energy` gives None, in words; empty where it does not."""
    found, reason = _find(root, gpu, load)
    if found:
        found.close()
    return reason


def tegrastats_rails(line: str) -> dict[str, float]:
    """Watts of each rail in a line of tegrastats."""
    return {name: int(now) / 1000 for name, now in RAIL.findall(line)}


@contextmanager
def _sampled(meter: Meter) -> Iterator[Tally]:
    tally, stop = Tally(meter.rails), threading.Event()

    def watch() -> None:
        while not stop.wait(INTERVAL):
            tally.take()

    thread = threading.Thread(target=watch, name="energy", daemon=True)
    tally.take()
    thread.start()
    try:
        yield tally
    finally:
        stop.set()
        thread.join()
        tally.take()


def _finish(result: Energy, tally: Tally) -> None:
    result.rails, result.seconds, result.samples = tally.watts(), tally.seconds, tally.samples
    watts = _sum(result.rails, tuple(result.counted))
    if watts is not None:
        result.total_joules = watts * tally.seconds
        if result.idle_watts is not None:
            result.joules = (watts - result.idle_watts) * tally.seconds
    notes = [result.note]
    if watts is None or result.idle_watts is None:
        notes.append("sensors fell silent")
    elif tally.seconds < SHORT:
        notes.append(f"only {tally.seconds:.1f} s were measured")
    result.note = "; ".join(note for note in notes if note)


def _sum(watts: dict[str, float], names: tuple[str, ...]) -> float | None:
    return sum(watts[n] for n in names) if all(n in watts for n in names) else None


def _find(root: Path, gpu: bool | None, load: nvml.Load) -> tuple[Meter | None, str]:
    """The best meter, or why there is none."""
    if found := _monitors(root):
        return found, ""
    if devices.jetson(root):
        found = _tegrastats()
        return found, "" if found else "neither power monitors nor tegrastats can be read"
    packages, why = _packages(root)
    device = None if gpu is False else nvml.gpu(load)
    board = _board(device) if device else {}
    if not board and (device or gpu):
        return None, "no NVIDIA GPU tells its power"
    if not packages and gpu is None and board:
        return None, f"the GPU tells its power, the processor does not ({why})"
    if not packages and not board:
        return None, why
    rails = {**board, **packages}
    source = ", ".join(name for name, part in (("NVML", board), ("RAPL", packages)) if part)
    return Meter(source, rails, tuple(rails), "" if packages else f"the GPU's board alone ({why})"), ""


def _monitors(root: Path) -> Meter | None:
    """INA3221 and its like as hwmon (kernel.org, Documentation/hwmon/ina3221.rst and ina238.rst): mV, mA and uW."""
    rails, chips = {}, set()
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        name = text(chip / "name")
        if not name.startswith("ina"):
            continue
        for channel in (1, 2, 3):  # above are shunt voltages and their sum, which are no rails
            label = text(chip / f"in{channel}_label") or (text(chip / "label") if channel == 1 else "")
            rail = _rail(chip, channel)
            if label and label != "NC" and rail.read() is not None:
                rails[label] = rail
                chips.add(name.upper())
    return _module(", ".join(sorted(chips)), rails)


def _rail(chip: Path, channel: int) -> Rail:
    def read() -> float | None:
        microwatts = number(chip / f"power{channel}_input")
        if microwatts is None:
            volts, amperes = number(chip / f"in{channel}_input"), number(chip / f"curr{channel}_input")
            microwatts = None if volts is None or amperes is None else volts * amperes
        return None if microwatts is None else microwatts / 1e6

    return Rail(read)


def _module(source: str, rails: dict[str, Rail], close: Callable[[], None] = lambda: None) -> Meter | None:
    """A meter of these rails; None if it is not known how to add them up."""
    for names, is_sum in TOTALS:
        if all(name in rails for name in names):
            note = f"an estimate: the sum of {', '.join(names)}, for want of a rail for all" if is_sum else ""
            return Meter(source, rails, names, note, close)
    return None


def _tegrastats() -> Meter | None:
    """Rails as tegrastats prints them, which every user may run."""
    try:
        process = subprocess.Popen(
            ["tegrastats", "--interval", str(round(1000 * INTERVAL))],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    except OSError:
        return None
    latest: dict[str, float] = {}
    first = threading.Event()

    def watch() -> None:
        for line in process.stdout or ():
            latest.update(tegrastats_rails(line))
            first.set()
        latest.clear()  # it ended: what it said last is no reading
        first.set()

    thread = threading.Thread(target=watch, name="tegrastats", daemon=True)
    thread.start()

    def close() -> None:
        with suppress(OSError):
            process.terminate()
        process.wait()
        thread.join()
        if process.stdout:
            process.stdout.close()

    first.wait(PATIENCE)
    rails = {name: Rail(lambda name=name: latest.get(name)) for name in latest.copy()}  # type: ignore[misc]
    found = _module("tegrastats", rails, close)
    if not found:
        close()
    return found


def _packages(root: Path) -> tuple[dict[str, Rail], str]:
    """RAPL counters of processors, and of memory that is not part of them, or why there are none.

    AMD's have the same names (kernel.org, Documentation/power/powercap/powercap.rst); in microjoules.
    """
    rails = {}
    for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        name, parent = text(zone / "name"), text(zone.with_name(zone.name.rpartition(":")[0]) / "name")
        if name == "dram":
            name = f"{parent} dram"
        elif not name.startswith("package"):
            continue  # cores are in the package; psys has the rest of the board in it too
        if number(zone / "energy_uj") is None:
            return {}, f"{zone / 'energy_uj'} cannot be read: Linux shows it to root alone"
        rails[name] = _counter(zone)
    return rails, "" if rails else "the processor has no energy counter that Linux shows"


def _counter(zone: Path) -> Rail:
    def joules() -> float | None:
        value = number(zone / "energy_uj")
        return None if value is None else value / 1e6

    return Rail(joules, wraps=(number(zone / "max_energy_range_uj") or math.inf) / 1e6)


def _board(gpu: nvml.Gpu) -> dict[str, Rail]:
    """The GPU's board: its energy counter, or its power where it has none."""
    if gpu.joules() is not None:
        return {"gpu": Rail(gpu.joules, wraps=math.inf)}
    return {"gpu": Rail(gpu.watts)} if gpu.watts() is not None else {}
