"""What a machine can build and run, by what is known of it: pure functions of `Facts`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from edgeres import trt
from edgeres.devices import Jetson
from edgeres.errors import UsageError
from edgeres.facts import Facts
from edgeres.targets import Target, exact_dot_product


class JetPack(NamedTuple):
    """What JetPacks bring. ``l4t``: the first of theirs; ``boards``: what they are for; ``dla``: on which of these."""

    name: str
    l4t: str
    tensorrt: str
    cuda: str
    python: str
    boards: str
    dla: str


# developer.nvidia.com/embedded/jetpack-archive. DLA: NVIDIA/Deep-Learning-Accelerator-SW, operators/README.md, for
# JetPack 5 and 6; for 7, and that Thor has none, "Working with DLA" in TensorRT's documentation. JetPack 6 also takes
# TensorRT 10.4 to 10.7, which NVIDIA has as archives; 7.2.2 is the first to take 11.4.1, maybe to be installed.
JETPACKS = (
    JetPack("5.1", "35.2.1", "8.5.2", "11.4", "3.8", "Xavier, Orin", "all but Orin Nano"),
    JetPack("6.0", "36.2.0", "8.6.2", "12.2", "3.10", "Orin", "all but Orin Nano"),
    JetPack("6.1, 6.2", "36.4.0", "10.3.0", "12.6", "3.10", "Orin", "all but Orin Nano"),
    JetPack("7.0, 7.1", "38.2.0", "10.13", "13.0", "3.12", "Thor", "none"),
    JetPack("7.2", "39.2.0", "10.16.2", "13.2", "3.12", "Thor, Orin", "none"),
    JetPack("7.2.2 on", "> 39.2.1", "11.4.1", "13", "3.12", "Thor, AGX Orin", "AGX Orin"),
)
BOARDS = {
    "agx orin": "jetson-agx-orin",
    "igx orin": "jetson-agx-orin",  # the same module (Linux: tegra234-p3740-0002+p3701-0008.dts)
    "orin nx": "jetson-orin-nx",
    "orin nano": "jetson-orin-nano",
    "thor": "jetson-agx-thor",
    "xavier nx": "jetson-xavier-nx",
    "agx xavier": "jetson-xavier-nx",  # the same GPU, DLA and last JetPack
}
"""Words in the name of a Jetson -> its target."""
WITHOUT_DLA = ("jetson-orin-nano", "jetson-agx-thor")
NO_DLA = (10, 8), (11, 4, 1)
"""From the one and before the other version TensorRT drives no DLA (its documentation, "Working with DLA")."""
RTX_GPUS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities that TensorRT-RTX 1.7 is for (its support matrix, "CPU-only ahead-of-time compilation")."""
TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
EXTRAS = {"onnx": "onnx", "onnxruntime": "onnx", "openvino": "openvino"}
ELSEWHERE = "`edgeres quantize` with this target works here; build and run on a machine of its kind"
VENV = "/usr/bin/python3 -m venv --system-site-packages .venv"  # sees apt's packages, and is of their Python


class Obstacle(NamedTuple):
    """What is in the way, and what to do about it."""

    cause: str
    remedy: str


def detect(facts: Facts) -> str:
    """The target that ``auto`` means here. Raises `UsageError` for a Jetson that no target is for."""
    if facts.jetson:
        if board := board_of(facts.jetson):
            return board
        raise UsageError(
            f"no target is known for this Jetson ({facts.jetson.model or 'its model cannot be read'})",
            hint=f"name the nearest: --target {', '.join(dict.fromkeys(BOARDS.values()))}",
        )
    if facts.gpus and facts.package("tensorrt").works:
        return "desktop"
    new_enough = facts.gpus and _numbers(facts.gpus[0].capability) >= (7, 5)
    return "rtx" if new_enough and facts.package("tensorrt_rtx").works else "cpu"


def can_build(name: str, target: Target, facts: Facts) -> tuple[bool, str]:
    """Whether ``edgeres build-engine`` makes engines for ``target`` here; why not, or what to know about it."""
    found = _to_build(target, facts)
    return found is None, found.cause if found else _note(name, target, facts)


def can_run(name: str, target: Target, facts: Facts) -> tuple[bool, str]:
    """Whether engines for ``target`` run here; why not, or what to know about it."""
    found = _to_run(target, facts)
    return found is None, found.cause if found else _note(name, target, facts)


def obstacle(target: Target, facts: Facts) -> Obstacle | None:
    """What is in the way of building for ``target`` here, or else of running it."""
    return _to_build(target, facts) or _to_run(target, facts)


def jetpack(facts: Facts) -> JetPack | None:
    """The row of `JETPACKS` that this Jetson's L4T belongs to; None for an older one, or no Jetson."""
    l4t = _l4t(facts)
    rows = [row for row in JETPACKS if l4t and _numbers(row.l4t) + (1,) * (">" in row.l4t) <= l4t]
    return rows[-1] if rows else None


def problems(facts: Facts) -> Iterator[Obstacle]:
    """What is wrong here, whatever the target."""
    if _numbers(facts.python) < (3, 10):
        yield Obstacle(f"Python {facts.python} is too old", "edgeres needs 3.10 or newer")
    if facts.jetson:
        yield from _jetson_problems(facts)
    for executor, (module, _) in trt.EXECUTORS.items():
        if facts.package(module).broken and (found := _library(executor, facts)):
            yield found
        if facts.gpus and (found := _old_driver(executor, facts)):
            yield found
    if not facts.gpus and (facts.cuda or facts.jetson or facts.package("tensorrt").works):
        remedy = "install the NVIDIA driver"
        if facts.jetson:
            remedy = "in a container, start it with --runtime=nvidia"
        elif facts.cuda:
            remedy = "see whether `nvidia-smi` finds it; after an update of the driver, start the machine again"
        yield Obstacle(f"no GPU can be used: {facts.no_gpu}", remedy)
    if not exact_dot_product(facts.machine, frozenset(facts.instruction_sets)):
        remedy = "nothing to do, unless the engine is for a CPU with VNNI: then quantize on one"
        yield Obstacle("this CPU shows no VNNI: INT8 for target cpu has 7-bit weights here", remedy)


def _jetson_problems(facts: Facts) -> Iterator[Obstacle]:
    try:
        detect(facts)
    except UsageError as error:
        yield Obstacle(error.cause, error.hint)
    row, tensorrt = jetpack(facts), facts.package("tensorrt")
    if _l4t(facts) and row is None:
        older = f"L4T {facts.jetson.l4t}" if facts.jetson else ""
        yield Obstacle(f"{older} is of a JetPack before 5.1", "edgeres runs on JetPack 6 and newer")
    if tensorrt.version is None:
        yield Obstacle(_out_of_reach(facts, row), _install("tensorrt", facts))
    has_dla = board_of(facts.jetson) not in (None, *WITHOUT_DLA)
    if found := _of_another_jetpack(facts) or (_no_dla(facts) if has_dla and tensorrt.works else None):
        yield found


def _out_of_reach(facts: Facts, row: JetPack | None) -> str:
    """Why Python finds no TensorRT on a Jetson, where it comes with apt."""
    if row and row.python != ".".join(facts.python.split(".")[:2]):
        return f"TensorRT of JetPack {row.name} is for Python {row.python}, and this is {facts.python}"
    return f"TensorRT is {'out of reach of this Python environment' if facts.apt else 'not installed'}"


def _to_build(target: Target, facts: Facts) -> Obstacle | None:
    if target.executor == "tensorrt":
        found = _tensorrt(target, facts)
    elif target.executor == "tensorrt-rtx":  # builds without a GPU
        found = _rtx_platform(facts) or _library(target.executor, facts)
    else:
        found = _needs(target.executor, facts)
    if found is None and (found := _needs("onnx", facts)):
        found = found._replace(remedy=f"{found.remedy}; `edgeres selftest` builds from a bundle without it")
    return found


def _to_run(target: Target, facts: Facts) -> Obstacle | None:
    if target.executor == "tensorrt":
        return _tensorrt(target, facts) or _bindings(facts)
    if target.executor == "tensorrt-rtx":
        missing = Obstacle("no NVIDIA GPU here", "engines built here run where there is one")
        found = _rtx_platform(facts) or (_old_gpu(target.executor, facts) if facts.gpus else missing)
        found = found or _library(target.executor, facts) or _old_driver(target.executor, facts)
        return found or _bindings(facts)
    return _needs(target.executor, facts)


def _tensorrt(target: Target, facts: Facts) -> Obstacle | None:
    found = _gpu(target, facts) or (_no_cores(facts) if target.dla else None)
    found = found or _library("tensorrt", facts) or _of_another_jetpack(facts)
    found = found or _old_driver("tensorrt", facts) or _old_gpu("tensorrt", facts)
    return found or (_no_dla(facts) if target.dla else None) or _ended(target, facts)


def _needs(package: str, facts: Facts) -> Obstacle | None:
    found = facts.package(package)
    if found.works:
        return None
    how = f"does not load: {found.broken}" if found.broken else "is not installed"
    return Obstacle(f"{package} {how}", f'pip install "edgeres[{EXTRAS[package]}]"')


def _gpu(target: Target, facts: Facts) -> Obstacle | None:
    gpu = facts.gpus[0] if facts.gpus else None
    if target.capability and gpu and gpu.capability != target.capability:
        return Obstacle(f"for compute capability {target.capability}, not {gpu.capability}", ELSEWHERE)
    if gpu is None:
        wanted = f" of compute capability {target.capability}" if target.capability else ""
        return Obstacle(f"no NVIDIA GPU{wanted} here", ELSEWHERE)
    return None


def _old_gpu(executor: str, facts: Facts) -> Obstacle | None:
    """Volta went with TensorRT 10.5 (release notes of 10.4); TensorRT-RTX never had it (its support matrix)."""
    gpu, version = facts.gpus[0], _numbers(facts.package(trt.EXECUTORS[executor][0]).version)
    if _numbers(gpu.capability) >= (7, 5) or (executor == "tensorrt" and version < (10, 5)):
        return None
    remedy = "TensorRT 10.4 is the last that has 7.0 and 7.2"
    return Obstacle(f"{TITLES[executor]} needs compute capability 7.5; {gpu.name} has {gpu.capability}", remedy)


def _library(executor: str, facts: Facts) -> Obstacle | None:
    found = facts.package(trt.EXECUTORS[executor][0])
    if found.works:
        return None
    if not found.broken:
        return Obstacle(f"{TITLES[executor]} is not installed", _install(executor, facts))
    remedy = f"pip install --force-reinstall {executor}{f'-cu{found.cuda}' if found.cuda else ''}"
    remedy = _install(executor, facts) if facts.jetson else remedy
    return Obstacle(f"{TITLES[executor]} does not load: {found.broken}", remedy)


def _install(executor: str, facts: Facts) -> str:
    """How ``executor`` comes to this machine. The packages of PyPI without a suffix are of the newest CUDA."""
    row = jetpack(facts)
    if row and _numbers(row.python) < (3, 10):
        return "quantize on another machine, and build on this one with trtexec"
    if facts.jetson:
        other = row and row.python != ".".join(facts.python.split(".")[:2])
        steps = ["sudo apt install python3-libnvinfer"] if not facts.apt else []
        steps += [VENV] if facts.isolated or other else []
        return ", then ".join(steps) or "sudo apt install --reinstall python3-libnvinfer"
    if facts.cuda and _numbers(facts.cuda)[0] == 12:
        return f"pip install {executor}-cu12 {_cuda_python(facts)}"
    return f'pip install "edgeres[{trt.EXECUTORS[executor][1]}]"'


def _of_another_jetpack(facts: Facts) -> Obstacle | None:
    """PyPI's TensorRT is for servers, which Jetsons are like from JetPack 7 on; 11 came to them with 11.4.1."""
    found, l4t = facts.package("tensorrt"), _l4t(facts)
    if not facts.jetson or not found.version:
        return None
    if found.cuda and l4t and l4t < (37,):
        remedy = f"pip uninstall tensorrt tensorrt-cu{found.cuda}, then {_install('tensorrt', facts)}"
        return Obstacle(f"TensorRT {found.version} of pip is not for JetPack before 7", remedy)
    version = _numbers(found.version)
    if (11,) <= version < NO_DLA[1] or (version >= (11,) and l4t and l4t < (37,)):
        remedy = "use the one that JetPack brings; 11.4.1 is the first for a Jetson, with JetPack 7.2.2"
        return Obstacle(f"TensorRT {found.version} does not run on this JetPack", remedy)
    return None


def _old_driver(executor: str, facts: Facts) -> Obstacle | None:
    """Within a major version newer CUDA runs on older drivers (CUDA Compatibility, "Minor Version Compatibility")."""
    needed, driver = facts.package(trt.EXECUTORS[executor][0]).cuda, _numbers(facts.cuda)
    if not needed or not driver or driver[0] >= needed or facts.jetson:  # whose driver comes with JetPack
        return None
    remedy = "update the NVIDIA driver" + (f", or pip install {executor}-cu{driver[0]}" if driver[0] >= 12 else "")
    return Obstacle(f"{TITLES[executor]} here is for CUDA {needed}, the driver supports {facts.cuda}", remedy)


def _rtx_platform(facts: Facts) -> Obstacle | None:
    """Where pip has it. 64-bit Arm came with 1.6, for DGX Spark and servers (its release notes)."""
    x86 = facts.machine.lower() in ("x86_64", "amd64") and facts.system in ("Linux", "Windows")
    arm = facts.machine.lower() in ("aarch64", "arm64") and facts.system == "Linux" and not facts.jetson
    if x86 or arm:
        return None
    return Obstacle("only for Linux and for Windows on x86-64, and not for Jetson", ELSEWHERE)


def _no_cores(facts: Facts) -> Obstacle | None:
    board = board_of(facts.jetson)
    if board in WITHOUT_DLA:
        return Obstacle("this Jetson has no DLA", f"--target {board}")
    return None


def _no_dla(facts: Facts) -> Obstacle | None:
    """What its documentation says, unless TensorRT itself counts cores: 11.4.1 drives those of AGX Orin alone."""
    found, board = facts.package("tensorrt").version, board_of(facts.jetson)
    version = _numbers(found)
    driven = version < NO_DLA[0] or (version >= NO_DLA[1] and board == BOARDS["agx orin"])
    if facts.dla_cores or (driven and facts.dla_cores is None):
        return None
    remedy = "for DLA: JetPack 6 with TensorRT up to 10.7, or on AGX Orin JetPack 7.2.2"
    return Obstacle(f"TensorRT {found} does not drive this Jetson's DLA", remedy)


def _ended(target: Target, facts: Facts) -> Obstacle | None:
    version = facts.package("tensorrt").version
    if not target.implicit or target.dla or _numbers(version) < (11,):
        return None
    return Obstacle(f"calibration caches ended with TensorRT 10.16; this is {version}", "--target desktop")


def _bindings(facts: Facts) -> Obstacle | None:
    found = {name: facts.package(name) for name in ("pycuda", "cuda-python")}
    if any(package.works for package in found.values()):
        return None
    broken = "; ".join(f"{name} does not load: {p.broken}" for name, p in found.items() if p.broken)
    remedy = f"pip install {_cuda_python(facts)}"
    if facts.jetson:  # compiled against the CUDA that JetPack brings
        remedy = "PATH=/usr/local/cuda/bin:$PATH pip install pycuda"
    return Obstacle(broken or "neither pycuda nor cuda-python is installed", remedy)


def _cuda_python(facts: Facts) -> str:
    return f'"cuda-python<{_numbers(facts.cuda)[0] + 1}"' if facts.cuda else "cuda-python"


def _note(name: str, target: Target, facts: Facts) -> str:
    """What to know about a target that works."""
    version, board = facts.package("tensorrt").version, board_of(facts.jetson)
    major = _numbers(version)[:1]
    if target.executor == "tensorrt" and ((target.typed and major < (10,)) or (target.implicit and major >= (11,))):
        return f"with --tensorrt {version}"  # whose graph is another
    if target.executor == "tensorrt" and board and not name.startswith(board):
        return f"this Jetson's own is {board}"
    if target.executor == "tensorrt-rtx" and facts.gpus:
        capability = facts.gpus[0].capability
        if capability == "7.5":  # not among those that TensorRT-RTX builds for by itself
            return "with --build capabilities=7.5"
        if capability not in RTX_GPUS:
            return f"TensorRT-RTX does not list compute capability {capability}"
    return ""


def board_of(jetson: Jetson | None) -> str | None:
    """The target that is for this Jetson's own GPU; None where none is known."""
    model = jetson.model.lower().replace("-", " ") if jetson else ""
    return next((target for words, target in BOARDS.items() if words in model), None)


def _l4t(facts: Facts) -> tuple[int, ...]:
    return _numbers(facts.jetson.l4t) if facts.jetson else ()


def _numbers(version: str | None) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version or ""))
