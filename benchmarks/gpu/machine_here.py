"""What this machine is, as far as edgeres can tell without starting CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeres import devices, machine, sensors

PACKAGES = ["torch", "triton", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy", "pycuda", "cuda-python"]
PACKAGES += ["cuda-bindings", "tensorrt", "tensorrt_cu12", "tensorrt_cu13", "tensorrt_rtx", "pytest"]


def look(work: Path) -> dict[str, Any]:
    """``why``: why no GPU can be used, "" if one can."""
    return {
        "why": devices.why_no_gpu(),
        "machine": machine.describe(),
        "conditions": sensors.conditions(),
        "versions": machine.versions(*PACKAGES),
    }
