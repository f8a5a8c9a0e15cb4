"""ResNet-50 with random weights, as PyTorch has it and as FP32, FP16 and INT8 ONNX; and what it has to compute.

Random weights are as fast as trained ones. Batch norm statistics and INT8 ranges (minmax) are those of smooth random
images: noise of 8 x 8 pixels, enlarged, from a normal distribution as normalized photographs are about.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from outcome import under_way, write

IMAGES = 32
"""That INT8 ranges are measured on, and as many again for batch norm."""
BRANCH = 0.1
"""What a bottleneck's branch is scaled by. With 1, random weights blow rounding up from layer to layer, until INT8 says
nothing; trained ones do not."""
TESTED = 16
"""Images whose logits are kept, to be compared with those of engines."""


def pixels(images: int, crop: int, seed: int = 0) -> np.ndarray:
    """Smooth random images, float32 (images, 3, crop, crop); ``crop`` is a multiple of 8."""
    coarse = np.random.default_rng(seed).standard_normal((images, 3, 8, 8), np.float32)
    return np.ascontiguousarray(coarse.repeat(crop // 8, 2).repeat(crop // 8, 3))


def onnx_file(work: Path, variant: str, precision: str) -> Path:
    """Where `make` leaves it."""
    return work / "models" / f"{variant}-{precision}.onnx"


def load(work: Path, variant: str) -> tuple[Any, dict[str, Any]]:
    """The PyTorch model that `make` left, in FP32 on the CPU, and its record."""
    import torch

    from edgeres.model import resnet

    record = json.loads((work / "models" / f"{variant}.json").read_text(encoding="utf-8"))
    model = resnet(record["depth"], variant)
    model.load_state_dict(torch.load(work / "models" / f"{variant}.pth", weights_only=True))
    return model.eval(), record


def make(work: Path, variant: str, depth: int = 50, crop: int = 224) -> dict[str, Any]:
    """Make the model of ``variant``, its three ONNX files, and the logits to expect of them."""
    import torch

    from edgeres import graph
    from edgeres.calibrate import calibrate
    from edgeres.export import export_onnx
    from edgeres.fp16 import fp16
    from edgeres.loader import Batch
    from edgeres.model import Bottleneck, resnet
    from edgeres.quantize import SCHEMES, int8
    from edgeres.recipe import Preprocess

    folder = work / "models"
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = resnet(depth, variant).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the average of all batches
        if isinstance(module, Bottleneck):
            torch.nn.init.constant_(module.bn3.weight, BRANCH)
    with torch.no_grad():
        for seed in range(IMAGES // 8):
            model(torch.from_numpy(pixels(8, crop, 100 + seed)))
    torch.save(model.eval().state_dict(), folder / f"{variant}.pth")
    under_way(work, "export")
    made = {"variant": variant, "depth": depth, "weights": {"source": "random", "sha256": "0" * 64}}
    fp32 = export_onnx(model, Preprocess(crop=crop, resize=crop), made)
    under_way(work, "calibration")
    batches = [Batch(pixels(8, crop, seed), None, np.arange(8)) for seed in range(IMAGES // 8)]
    table = calibrate(fp32, batches, {"model": graph.digest(fp32)})
    typed = {"fp32": fp32, "fp16": fp16(fp32), "int8": int8(fp32, table, SCHEMES["tensorrt"], "minmax")}
    for precision, proto in typed.items():
        graph.set_metadata(proto, {**graph.metadata(fp32), "precision": precision})
        graph.save(proto, onnx_file(work, variant, precision))
    tested = pixels(TESTED, crop, 200)
    fp32_logits, int8_logits = (reference(onnx_file(work, variant, p), tested) for p in ("fp32", "int8"))
    np.savez(folder / f"{variant}.npz", pixels=tested, fp32=fp32_logits, int8=int8_logits)
    counted = layers(model, crop)
    record = {
        "variant": variant,
        "depth": depth,
        "crop": crop,
        "weights": "random, seed 0",
        "calibration": f"minmax of {IMAGES} smooth random images",
        "layers": counted,
        "gmacs": round(sum(layer["macs"] for layer in counted) / 1e9, 3),
    }
    write(folder / f"{variant}.json", record)
    return {key: value for key, value in record.items() if key != "layers"}


def reference(path: Path, images: np.ndarray) -> np.ndarray:
    """What ONNX Runtime computes on the CPU in FP32, Q/DQ as written: not all INT8 kernels are exact."""
    import onnxruntime

    from edgeres import graph

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([graph.OUTPUT], {graph.INPUT: images})[0])


def layers(model: Any, crop: int) -> list[dict[str, int]]:
    """Of each convolution, the classifier and each shortcut that is read: multiply-adds and elements per image.

    ``read`` and ``written`` are activations, ``weights`` are read once whatever the batch. Nothing else is counted: all
    other operators can be part of these.
    """
    import torch

    from edgeres.model import Bottleneck

    found: list[dict[str, int]] = []

    def note(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, Bottleneck):
            found.append({"macs": 0, "read": output[0].numel(), "written": 0, "weights": 0})
        else:
            macs = output[0].numel() * module.weight[0].numel()
            elements = {"read": inputs[0][0].numel(), "written": output[0].numel(), "weights": module.weight.numel()}
            found.append({"macs": macs, **elements})

    kinds = (torch.nn.Conv2d, torch.nn.Linear, Bottleneck)
    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, kinds)]
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, crop, crop))
    finally:
        for handle in handles:
            handle.remove()
    return found
