"""The trtexec call that builds the same plan, for devices that edgeres itself does not run on."""

from __future__ import annotations

import shlex
from pathlib import Path

from edgeres.graph import INPUT
from edgeres.targets import Target
from edgeres.trt import Options

POOLS = {
    "workspace": "workspace",
    "tactic_shared_memory": "tacticSharedMem",  # from TensorRT 10 on
    "dla_sram": "dlaSRAM",
    "dla_local_dram": "dlaLocalDRAM",
    "dla_global_dram": "dlaGlobalDRAM",
}
"""Option -> its name in --memPoolSize, in MiB too; there is none for tactic_memory."""
HARDWARE = {"ampere-plus": "ampere+", "same-compute-capability": "sameComputeCapability"}
VERBOSITY = {"detailed": "detailed", "names": "layer_names_only", "none": "none"}


def trtexec(onnx: Path, precision: str, target: Target, input_size: int, batch: int | None) -> str:
    """Build ``onnx``, made for ``target``, of ``batch`` or any number of images (3, input_size, input_size).

    To be called in the folder of the file, wherever that is on the device. Options are those of TensorRT 8.5 to 11
    (NVIDIA/TensorRT: samples/common/sampleOptions.cpp); up to 10, precision is in the graph only if it is said so.
    What is asked of a build and came with a later version, trtexec refuses by name.
    """
    build = target.build
    words = ["trtexec", f"--onnx={onnx.name}", f"--saveEngine={onnx.stem}.plan"]
    if batch is None:
        shapes = zip(("min", "opt", "max"), build.profile, strict=True)
        words += [f"--{which}Shapes={INPUT}:{n}x3x{input_size}x{input_size}" for which, n in shapes]
    if not target.typed or target.implicit:
        words += {"fp32": [], "fp16": ["--fp16"], "int8": ["--fp16", "--int8"]}[precision]
    elif target.major is None or target.major == 10:
        words.append("--stronglyTyped")
    if precision == "int8" and target.implicit:
        words.append(f"--calib={onnx.stem}.cache")
    return shlex.join([*words, *_options(build)])


def _options(build: Options) -> list[str]:
    """What a plan is built with, whatever is in its graph."""
    asked = {
        "--noTF32": not build.tf32,
        f"--useDLACore={build.dla_core}": build.dla_core is not None,
        "--allowGPUFallback": build.dla_core is not None and build.gpu_fallback,
        f"--builderOptimizationLevel={build.level}": build.level is not None,
        f"--maxAuxStreams={build.aux_streams}": build.aux_streams is not None,
        "--sparsity=enable": build.sparse,
        f"--hardwareCompatibilityLevel={HARDWARE.get(build.hardware)}": build.hardware in HARDWARE,
        "--versionCompatible": build.version_compatible,
        "--stripWeights": build.strip,
        "--refit": build.refit,
        # unless it is said, a plan keeps the names of its layers alone, and `edgeres inspect` has little to read
        f"--profilingVerbosity={VERBOSITY[build.verbosity]}": True,
    }
    sizes = {name: getattr(build, option) for option, name in POOLS.items()}
    pools = ",".join(f"{name}:{mib:.10f}".rstrip("0").rstrip(".") for name, mib in sizes.items() if mib is not None)
    return [word for word, on in asked.items() if on] + ([f"--memPoolSize={pools}"] if pools else [])
