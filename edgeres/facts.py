"""What this machine has: processor, GPUs, driver, Jetson, and packages with whether they load."""

from __future__ import annotations

import importlib
import platform
import re
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from edgeres import devices, machine, trt
from edgeres.devices import Gpu, Jetson


@dataclass(frozen=True)
class Package:
    """``version``: None if not installed. ``broken``: why it does not load. ``cuda``: CUDA of a TensorRT from PyPI."""

    version: str | None = None
    broken: str = ""
    cuda: int | None = None

    @property
    def works(self) -> bool:
        """Whether it is there and, as far as was tried, loads."""
        return self.version is not None and not self.broken


@dataclass(frozen=True)
class Facts:
    """What was found. ``no_gpu`` says why ``gpus`` is empty, ``cuda`` is the newest CUDA that the driver supports.

    ``apt``: apt has installed TensorRT for Python; ``isolated``: this Python does not see what apt installs.
    ``dla_cores``: as TensorRT counts them, on a Jetson. ``memory_free`` is in bytes.
    """

    system: str
    machine: str
    python: str
    cpu: str = "unknown"
    cores: int | None = None
    instruction_sets: tuple[str, ...] = ()
    memory_free: int | None = None
    gpus: tuple[Gpu, ...] = ()
    no_gpu: str = ""
    cuda: str | None = None
    driver: str | None = None
    jetson: Jetson | None = None
    dla_cores: int | None = None
    apt: bool = False
    isolated: bool = False
    packages: dict[str, Package] = field(default_factory=dict)

    def package(self, name: str) -> Package:
        """What is known of package ``name``."""
        return self.packages.get(name, Package())


def gather(root: Path = devices.ROOT) -> Facts:
    """Look at this machine. Imports what may be installed and yet not load; not PyTorch, which takes long."""
    here, gpus = machine.describe(), tuple(devices.gpus())
    # an IGX that uses a discrete GPU is like a server ("GPU Configurations" in the user guide of IGX Orin)
    jetson = None if gpus and not gpus[0].integrated else devices.jetson(root)
    packages = {name: Package(_version(name)) for name in ("numpy", "torch", "openvino")}
    packages["onnx"] = _package(["onnx"], "onnx")
    packages["onnxruntime"] = _package(["onnxruntime"], "onnxruntime", "onnxruntime-gpu")
    for module, _ in trt.EXECUTORS.values():
        packages[module] = _package([module], module)
    packages["pycuda"] = _package(["pycuda.driver"], "pycuda")
    packages["cuda-python"] = _package(["cuda.bindings.runtime", "cuda.cudart"], "cuda-python", "cuda-bindings")
    return Facts(
        system=platform.system(),
        machine=platform.machine(),
        python=platform.python_version(),
        cpu=here["cpu"],
        cores=here["cores"],
        instruction_sets=tuple(here["instruction_sets"]),
        memory_free=devices.free_memory(root),
        gpus=gpus,
        no_gpu=devices.why_no_gpu(),
        cuda=devices.driver(),
        driver=devices.driver_release(root),
        jetson=jetson,
        dla_cores=_dla_cores() if jetson and gpus and packages["tensorrt"].works else None,
        apt=any((root / "usr/lib").glob("python3*/dist-packages/tensorrt/__init__.py")),
        isolated=not any(re.match(r"/usr/lib/python3[\d.]*/dist-packages", path) for path in sys.path),
        packages=packages,
    )


def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _package(modules: list[str], *distributions: str) -> Package:
    """Import the first of ``modules`` that loads; ``distributions`` are what may have brought it."""
    version, reasons = _version(*distributions), []
    cuda = _cuda(distributions[0])
    for name in modules:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # whatever bindings raise
            if not (isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")):
                reasons.append(str(error).strip().partition("\n")[0] or type(error).__name__)
            continue
        return Package(str(getattr(module, "__version__", None) or version or "unknown"), cuda=cuda)
    if version is None and not reasons:
        return Package()
    return Package(version or "unknown", reasons[0] if reasons else f"it has no {modules[0]}", cuda)


def _cuda(name: str) -> int | None:
    """The major version of CUDA that the packages of a TensorRT from PyPI are named after."""
    for major in range(15, 10, -1):
        if _version(f"{name}-cu{major}", f"{name}-cu{major}-libs"):
            return major
    return 12 if _version(f"{name}-libs") else None  # TensorRT 8.6.1


def _dla_cores() -> int | None:
    """How many DLA cores TensorRT finds; None if it does not say."""
    library = importlib.import_module("tensorrt")
    try:
        return int(library.Runtime(trt.logger(library)).num_DLA_cores)
    except (TypeError, AttributeError):  # pybind11's, of a constructor that returned nothing
        return None
