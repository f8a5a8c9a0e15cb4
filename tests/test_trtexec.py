from __future__ import annotations

from pathlib import Path

import pytest

from edgeres.targets import load_target
from edgeres.trtexec import trtexec

ONNX = Path("out/model.onnx")
ALL = "trtexec --onnx=model.onnx --saveEngine=model.plan"
END = " --profilingVerbosity=detailed"
SHAPES = " --minShapes=input:1x3x64x64 --optShapes=input:8x3x64x64 --maxShapes=input:32x3x64x64"
ONE = " --minShapes=input:1x3x64x64 --optShapes=input:1x3x64x64 --maxShapes=input:1x3x64x64"


@pytest.mark.parametrize(
    ("name", "version", "precision", "rest"),
    [
        ("desktop", None, "int8", f"{SHAPES} --stronglyTyped --noTF32"),
        ("desktop", "11.4.0", "int8", f"{SHAPES} --noTF32"),
        ("desktop", "8.6.1", "fp32", f"{SHAPES} --noTF32"),
        ("desktop", None, "fp32", f"{SHAPES} --stronglyTyped --noTF32"),
        ("desktop", "8.6.1", "fp16", f"{SHAPES} --fp16 --noTF32"),
        ("jetson-xavier-nx", None, "int8", f"{SHAPES} --fp16 --int8 --noTF32"),
        ("jetson-agx-orin", None, "fp16", f"{SHAPES} --stronglyTyped --noTF32"),
        ("desktop-implicit", None, "int8", f"{SHAPES} --fp16 --int8 --calib=model.cache --noTF32"),
        (
            "jetson-agx-orin-dla",
            None,
            "int8",
            f"{ONE} --fp16 --int8 --calib=model.cache --noTF32 --useDLACore=0 --allowGPUFallback",
        ),
        ("jetson-agx-orin-dla", None, "fp16", f"{ONE} --fp16 --noTF32 --useDLACore=0 --allowGPUFallback"),
        ("jetson-agx-orin-dla", "11.4.1", "int8", f"{ONE} --noTF32 --useDLACore=0 --allowGPUFallback"),
    ],
)
def test_the_call_says_what_the_graph_does_not(name: str, version: str | None, precision: str, rest: str) -> None:
    target = load_target(name, precision, version)
    assert trtexec(ONNX, precision, target, 64, None) == ALL + rest + END


def test_a_fixed_batch_needs_no_shapes() -> None:
    assert trtexec(ONNX, "int8", load_target("desktop", None, "11.0.0"), 64, 4) == f"{ALL} --noTF32{END}"


def test_everything_that_is_asked_of_a_build_is_asked_of_trtexec() -> None:
    build = {
        "profile": [1, 2, 4],
        "workspace": 1024,
        "tactic_shared_memory": 0.046875,
        "level": 5,
        "aux_streams": 0,
        "tf32": True,
        "sparse": True,
        "hardware": "same-compute-capability",
        "version_compatible": True,
        "strip": True,
        "refit": True,
        "verbosity": "names",
    }
    assert trtexec(ONNX, "fp16", load_target("desktop", build=build), 64, 4) == (
        f"{ALL} --stronglyTyped --builderOptimizationLevel=5 --maxAuxStreams=0 --sparsity=enable"
        " --hardwareCompatibilityLevel=sameComputeCapability --versionCompatible --stripWeights --refit"
        " --profilingVerbosity=layer_names_only --memPoolSize=workspace:1024,tacticSharedMem:0.046875"
    )


def test_dla_is_asked_for_as_the_build_has_it() -> None:
    build = {
        "gpu_fallback": False,
        "dla_core": 1,
        "dla_sram": 0.25,
        "dla_local_dram": 1024,
        "dla_global_dram": 0.5,
    }
    call = trtexec(ONNX, "fp16", load_target("jetson-agx-orin-dla", build=build), 64, 1)
    assert call == (
        f"{ALL} --fp16 --noTF32 --useDLACore=1{END} --memPoolSize=dlaSRAM:0.25,dlaLocalDRAM:1024,dlaGlobalDRAM:0.5"
    )


def test_paths_survive_a_shell() -> None:
    assert "'--onnx=my model.onnx'" in trtexec(Path("out/my model.onnx"), "fp16", load_target("desktop"), 64, 4)
