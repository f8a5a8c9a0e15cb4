"""The trtexec call that builds the same plan, for devices that edgeres itself does not run on."""

from __future__ import annotations

import shlex
from pathlib import Path

from edgeres.graph import INPUT
from edgeres.targets import Target


def trtexec(onnx: Path, precision: str, target: Target, input_size: int, batch: int | None) -> str:
    """Build ``onnx``, made for ``target``, of ``batch`` or any number of images (3, input_size, input_size).

    To be called in the folder of the file, wherever that is on the device. Options are those of TensorRT 8.5 to 11
    (NVIDIA/TensorRT: samples/common/sampleOptions.cpp); up to 10, precision is in the graph only if it is said so.
    """
    words = ["trtexec", f"--onnx={onnx.name}", f"--saveEngine={onnx.stem}.plan"]
    if batch is None:
        shapes = zip(("min", "opt", "max"), target.build.profile, strict=True)
        words += [f"--{which}Shapes={INPUT}:{n}x3x{input_size}x{input_size}" for which, n in shapes]
    if not target.typed or target.implicit:
        words += {"fp32": [], "fp16": ["--fp16"], "int8": ["--fp16", "--int8"]}[precision]
    elif target.major is None or target.major == 10:
        words.append("--stronglyTyped")
    if precision == "fp32" and not target.build.tf32:
        words.append("--noTF32")
    if precision == "int8" and target.implicit:
        words.append(f"--calib={onnx.stem}.cache")
    if target.build.dla_core is not None:
        words += [f"--useDLACore={target.build.dla_core}", "--allowGPUFallback"]
    return shlex.join(words)
