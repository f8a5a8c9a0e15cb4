from __future__ import annotations

from pathlib import Path

import pytest

from edgeres.targets import load_target
from edgeres.trtexec import trtexec

ONNX = Path("out/model.onnx")
ALL = "trtexec --onnx=model.onnx --saveEngine=model.plan"
SHAPES = " --minShapes=input:1x3x64x64 --optShapes=input:8x3x64x64 --maxShapes=input:32x3x64x64"
ONE = " --minShapes=input:1x3x64x64 --optShapes=input:1x3x64x64 --maxShapes=input:1x3x64x64"


@pytest.mark.parametrize(
    ("name", "version", "precision", "rest"),
    [
        ("desktop", None, "int8", f"{SHAPES} --stronglyTyped"),
        ("desktop", "11.4.0", "int8", SHAPES),
        ("desktop", "8.6.1", "fp32", f"{SHAPES} --noTF32"),
        ("desktop", None, "fp32", f"{SHAPES} --stronglyTyped --noTF32"),
        ("desktop", "8.6.1", "fp16", f"{SHAPES} --fp16"),
        ("jetson-xavier-nx", None, "int8", f"{SHAPES} --fp16 --int8"),
        ("jetson-agx-orin", None, "fp16", f"{SHAPES} --stronglyTyped"),
        ("desktop-implicit", None, "int8", f"{SHAPES} --fp16 --int8 --calib=model.cache"),
        (
            "jetson-agx-orin-dla",
            None,
            "int8",
            f"{ONE} --fp16 --int8 --calib=model.cache --useDLACore=0 --allowGPUFallback",
        ),
        ("jetson-agx-orin-dla", None, "fp16", f"{ONE} --fp16 --useDLACore=0 --allowGPUFallback"),
        ("jetson-agx-orin-dla", "11.4.1", "int8", f"{ONE} --useDLACore=0 --allowGPUFallback"),
    ],
)
def test_the_call_says_what_the_graph_does_not(name: str, version: str | None, precision: str, rest: str) -> None:
    target = load_target(name, precision, version)
    assert trtexec(ONNX, precision, target, 64, None) == ALL + rest


def test_a_fixed_batch_needs_no_shapes() -> None:
    assert trtexec(ONNX, "int8", load_target("desktop", None, "11.0.0"), 64, 4) == ALL


def test_paths_survive_a_shell() -> None:
    assert "'--onnx=my model.onnx'" in trtexec(Path("out/my model.onnx"), "fp16", load_target("desktop"), 64, 4)
