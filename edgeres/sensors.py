"""What a machine was like while something was measured on it: clocks, temperatures, throttling, and who else used it.

Standard library only, no privilege needed, files read below ``root``. What a machine does not tell is None.
"""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeres import devices, nvml
from edgeres.energy import Energy, energy, why_no_energy
from edgeres.sysfs import number, text

__all__ = ["Energy", "changed", "conditions", "energy", "why_no_energy"]

Run = Callable[[list[str]], str]

NEAR = 5.0
"""Degrees Celsius below a limit from which on a temperature is near it."""
FELL = 0.95
"""A clock below this share of what it was has fallen."""
PINNED = 0.99
"""A clock whose lowest is at this share of its highest cannot move."""
STEAL = 1.0
HELD_BACK = 1.0
"""Percent of the time."""
OTHERS = (0.25, 0.02)
"""Cores that others may use, and the share of all cores if that is more."""

OVER_CURRENT = {1: "under-voltage", 2: "average over-current", 3: "instantaneous over-current"}
"""soctherm_oc's events of Orin and later (NVIDIA Jetson Linux Developer Guide, over-current throttling)."""
SLOWING = re.compile(r".*-alert|(thermal-)?(cpufreq|devfreq)-.*|Processor|intel_powerclamp")
"""Cooling devices that slow something down. Jetson's alerts say that the hardware does."""
GPU_NODE = re.compile(r"[0-9a-f]+\.(gpu|ga10b|gv11b)|gpu-gpc-\d+")
"""An integrated GPU below /sys/class/devfreq: 17000000.gpu of JetPack 6, .ga10b and .gv11b of 5, gpu-gpc-0 on Thor."""


def conditions(
    root: Path = devices.ROOT,
    since: dict[str, Any] | None = None,
    *,
    load: nvml.Load = ctypes.CDLL,
    run: Run | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """What holds now. With ``since``, what an earlier call gave, also ``steal_percent`` of the time from then on.

    ``clocks`` are in MHz, with ``_min`` and ``_max`` the range they may move in; ``temperatures`` in degrees Celsius,
    and ``temperature_limits`` where clocks go down. ``throttled`` is of this moment and, with ``since``, of the time
    between; ``throttle_reasons`` say what is active now, ``throttle_events`` and ``throttle_seconds`` count since the
    machine started. ``cpu_ticks`` are of all cores, ``own`` of this process; ``at`` is in seconds of ``clock``.
    """
    gpu = nvml.gpu(load)
    clocks, governors = _clocks(root, gpu)
    temperatures, limits = _temperatures(root, gpu)
    reasons, events, seconds = _throttling(root, gpu)
    memory = devices.free_memory(root)
    load_average = text(root / "proc/loadavg").split()
    found: dict[str, Any] = {
        "at": clock(),
        "power_mode": _power_mode(root, run or _run),
        "clocks": clocks,
        "temperatures": temperatures,
        "temperature_limits": limits,
        "throttled": None if reasons is None else bool(reasons),
        "throttle_reasons": reasons,
        "throttle_events": events,
        "throttle_seconds": seconds,
        "governor": governors.get("cpu"),
        "gpu_governor": governors.get("gpu"),
        "gpu_state": _gpu_state(gpu) if gpu else None,
        "load_1min": float(load_average[0]) if load_average else None,
        "cpu_ticks": _ticks(root),
        "steal_percent": None,
        "memory_free_mb": None if memory is None else round(memory / 1e6),
    }
    if since:
        found["steal_percent"] = _steal(since, found)
        if _slowed(since, found):
            found["throttled"] = True
    return found


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What makes a measurement between two `conditions` doubtful, in words; empty if nothing is known to."""
    words = []
    if before["power_mode"] != after["power_mode"]:
        words.append(f"the power mode changed from {before['power_mode']} to {after['power_mode']}")
    active = [*(before["throttle_reasons"] or ()), *(after["throttle_reasons"] or ())]
    words += [f"throttled: {reason}" for reason in dict.fromkeys(active)]
    words += _slowed(before, after)
    words += _moved(before, after)
    words += _hot(before, after)
    steal, others = _steal(before, after), _others(before, after)
    if steal is not None and steal > STEAL:
        words.append(f"the host took {steal:.1f} % of the processor's time for other guests (steal)")
    if others:
        words.append(f"other processes kept {others[0]:.1f} of {others[1]} cores busy")
    return words


def power_mode(output: str) -> str | None:
    """The name in what ``nvpmodel -q`` prints. Without root it adds errors about files it may not open."""
    found = re.search(r"^NV Power Mode: *(\S.*?) *$", output, re.MULTILINE)
    return found[1] if found else None


def _power_mode(root: Path, run: Run) -> str | None:
    """Name of a Jetson's power mode, also in a container that has nvpmodel's files without the program."""
    if not devices.jetson(root):
        return None
    if name := power_mode(run(["nvpmodel", "-q"])):
        return name
    # "pmode:0002 fmode:..." is what nvpmodel remembers; "< POWER_MODEL ID=2 NAME=MAXN_SUPER >" names it
    mode = re.search(r"pmode:(\d+)", text(root / "var/lib/nvpmodel/status"))
    if not mode:
        return None
    config = text(root / "etc/nvpmodel.conf")
    known = re.search(rf"^\s*<\s*POWER_MODEL\s+ID={int(mode[1])}\s+NAME=(\S+)", config, re.MULTILINE)
    return known[1] if known else f"mode {int(mode[1])}"


def _run(command: list[str]) -> str:
    """What a command prints; its exit status says little: nvpmodel fails after it has answered."""
    try:
        return subprocess.run(command, capture_output=True, timeout=5, stdin=subprocess.DEVNULL).stdout.decode()
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""


def _clocks(root: Path, gpu: nvml.Gpu | None) -> tuple[dict[str, float], dict[str, str]]:
    """MHz by name, and what governs the clocks of "cpu" and "gpu"."""
    clocks: dict[str, float] = {}
    governors = {}

    def put(name: str, value: float | None, scale: float = 1.0) -> None:
        if value is not None:
            clocks.setdefault(name, round(value * scale, 1))

    cpus = sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*"))  # one for cores that share a clock; kHz
    for name, file in (("cpu", "cur"), ("cpu_min", "min"), ("cpu_max", "max")):
        found = [value for cpu in cpus if (value := number(cpu / f"scaling_{file}_freq")) is not None]
        put(name, sum(found) / len(found) if found else None, 1e-3)
    if names := {name for cpu in cpus if (name := text(cpu / "scaling_governor"))}:
        governors["cpu"] = ", ".join(sorted(names))
    for name, folder in _nodes(root):
        for suffix, file in (("", "cur"), ("_min", "min"), ("_max", "max")):
            put(name + suffix, number(folder / f"{file}_freq"), 1e-6)
        if name == "gpu" and (governor := text(folder / "governor")):
            governors["gpu"] = governor
    emc = root / "sys/kernel/debug/bpmp/debug/clk/emc"  # memory's clock up to Orin; the folder is open to root alone
    for name, file in (("emc", "rate"), ("emc_min", "min_rate"), ("emc_max", "max_rate")):
        put(name, number(emc / file), 1e-6)
    if gpu:
        for name, domain in (("gpu", nvml.GRAPHICS), ("gpu_memory", nvml.MEMORY)):
            put(name, gpu.clock(domain))
            put(f"{name}_max", gpu.highest_clock(domain))
    return clocks, governors


def _nodes(root: Path) -> list[tuple[str, Path]]:
    """The devfreq folders of the GPU and, on Thor, of the memory controller (bwmgr); Hz."""
    folders = sorted((root / "sys/class/devfreq").glob("*"))
    gpus = [folder for folder in folders if GPU_NODE.fullmatch(folder.name)]
    return [("gpu", g) for g in gpus[:1]] + [("emc", folder) for folder in folders if folder.name == "bwmgr"]


def _temperatures(root: Path, gpu: nvml.Gpu | None) -> tuple[dict[str, float], dict[str, float]]:
    """Degrees Celsius by thermal zone, and where the zone has clocks lowered (kernel.org, sysfs-api of thermal)."""
    found: dict[str, float] = {}
    limits: dict[str, float] = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*"), key=lambda z: (len(z.name), z.name)):
        name, value = text(zone / "type"), number(zone / "temp")
        if value is None or value < -100e3:  # -256 C: the part is switched off
            continue
        name = name if name not in found else f"{name} {zone.name.removeprefix('thermal_zone')}"
        found[name] = value / 1e3
        trips = [
            number(kind.with_name(kind.name.replace("_type", "_temp")))
            for kind in zone.glob("trip_point_*_type")
            if text(kind) in ("passive", "hot", "critical")  # "active" starts a fan
        ]
        if real := [trip for trip in trips if trip and trip > 0]:  # -274 C: not in use
            limits[name] = min(real) / 1e3
    for chip in (root / "sys/class/hwmon").glob("hwmon*"):
        if text(chip / "name") == "k10temp" and (value := number(chip / "temp1_input")) is not None:
            found["k10temp"] = value / 1e3  # AMD's processors have no thermal zone
    if gpu and (value := gpu.temperature()) is not None:
        found["gpu"] = value
        if limit := gpu.temperature_limit():
            limits["gpu"] = limit
    return found, limits


def _throttling(
    root: Path, gpu: nvml.Gpu | None
) -> tuple[list[str] | None, dict[str, float] | None, dict[str, float] | None]:
    """What slows the machine down now, and counts of events and seconds; each None where nothing tells."""
    reasons, events = [], {}
    cooling = sorted((root / "sys/class/thermal").glob("cooling_device*"))
    slowing = [(name, device) for device in cooling if SLOWING.fullmatch(name := text(device / "type"))]
    states = [(name, state) for name, device in slowing if (state := number(device / "cur_state")) is not None]
    reasons += [name for name, state in states if state > 0]
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if text(chip / "name") == "soctherm_oc":
            for channel, name in OVER_CURRENT.items():
                if (count := number(chip / f"oc{channel}_event_cnt")) is not None:
                    events[f"{name} (oc{channel})"] = count
    counters = list((root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle"))
    cores = [n for folder in counters if (n := number(folder / "core_throttle_count")) is not None]
    if cores:
        packages = (number(folder / "package_throttle_count") or 0 for folder in counters)
        events |= {"hot core": sum(cores), "hot processor": max(packages)}  # each core counts for its whole package
    held = gpu.reasons() if gpu else None
    reasons += [f"GPU {name}" for name in held or () if name in nvml.HELD_BACK]
    known = states or held is not None
    return list(dict.fromkeys(reasons)) if known else None, events or None, (gpu.held_back() if gpu else None) or None


def _gpu_state(gpu: nvml.Gpu) -> dict[str, Any] | None:
    """Settings of a GPU on a board of its own."""
    state = {
        "power_limit_watts": gpu.power_limit(),
        "persistence": gpu.persistent(),
        "performance_state": gpu.performance_state(),
    }
    return state if any(value is not None for value in state.values()) else None


def _ticks(root: Path) -> dict[str, float] | None:
    """Clock ticks of all cores since the start (man 5 proc): user, nice, system, idle, iowait, irq, softirq, steal."""
    lines = text(root / "proc/stat").splitlines()
    if not lines or not re.fullmatch(r"cpu(\s+\d+){8,}", lines[0]):
        return None
    ticks = [int(tick) for tick in lines[0].split()[1:9]]  # what follows, time of guests, is in the first two too
    own = text(root / "proc/self/stat").rpartition(")")[2].split()  # behind the name, which may hold anything
    return {
        "busy": sum(ticks[:3]) + sum(ticks[5:7]),
        "idle": sum(ticks[3:5]),
        "steal": ticks[7],
        "own": sum(map(int, own[11:15])),  # utime, stime and those of children
        "cores": sum(bool(re.match(r"cpu\d", line)) for line in lines),
    }


def _spent(before: dict[str, Any], after: dict[str, Any]) -> tuple[dict[str, float], float] | None:
    """Ticks by kind between two records, and all of them."""
    if not before["cpu_ticks"] or not after["cpu_ticks"]:
        return None
    spent = {key: after["cpu_ticks"][key] - before["cpu_ticks"][key] for key in ("busy", "idle", "steal", "own")}
    total = spent["busy"] + spent["idle"] + spent["steal"]
    return (spent, total) if total > 0 else None


def _steal(before: dict[str, Any], after: dict[str, Any]) -> float | None:
    """Percent of the processor's time that went to other guests of the host."""
    found = _spent(before, after)
    return round(100 * found[0]["steal"] / found[1], 2) if found else None


def _others(before: dict[str, Any], after: dict[str, Any]) -> tuple[float, int] | None:
    """Cores that other processes kept busy, of how many; None if that is too little to matter."""
    found, ticks = _spent(before, after), after["cpu_ticks"]
    if not found:
        return None
    busy = (found[0]["busy"] - found[0]["own"]) / found[1] * ticks["cores"]
    return (busy, ticks["cores"]) if busy > max(OTHERS[0], OTHERS[1] * ticks["cores"]) else None


def _slowed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What counted up between two records."""
    words = []
    for name, count in (after["throttle_events"] or {}).items():
        more = count - (before["throttle_events"] or {}).get(name, count)
        if more > 0:
            words.append(f"throttled {more:.0f} times: {name}")
    elapsed = after["at"] - before["at"]
    for name, seconds in (after["throttle_seconds"] or {}).items():
        more = seconds - (before["throttle_seconds"] or {}).get(name, seconds)
        if more > 0 and 100 * more > HELD_BACK * elapsed:
            words.append(f"the GPU's {name} held its clocks down for {more:.1f} of {elapsed:.1f} s")
    return words


def _moved(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Clocks that fell, or may move: of one that may, two readings say little, and its range says more."""
    words = []
    for name in ("cpu", "gpu", "emc"):
        old, new = before["clocks"], after["clocks"]
        low, high = new.get(f"{name}_min"), new.get(f"{name}_max")
        free = low is not None and high is not None and low < PINNED * high
        if high is not None and high < FELL * old.get(f"{name}_max", 0):
            words.append(f"the highest {name} clock fell from {old[f'{name}_max']:.0f} to {high:.0f} MHz")
        elif low is not None and not free and new.get(name, math.inf) < FELL * old.get(name, 0):
            words.append(f"the {name} clock fell from {old[name]:.0f} to {new[name]:.0f} MHz")
        governor = after["governor" if name == "cpu" else "gpu_governor"] if name != "emc" else None
        if free and governor and governor != "performance":
            words.append(f"the {name} clock is free to move between {low:.0f} and {high:.0f} MHz (governor {governor})")
    return words


def _hot(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The temperature that is closest to its limit, if it is near."""
    margins = [
        (limit - value, name, value, limit)
        for record in (before, after)
        for name, limit in record["temperature_limits"].items()
        if (value := record["temperatures"][name]) > limit - NEAR
    ]
    if not margins:
        return []
    _, name, value, limit = min(margins)
    return [f"{name} reached {value:.1f} C, and clocks go down at {limit:.1f} C"]
