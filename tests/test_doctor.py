from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from edgeres import diagnosis, doctor, facts
from edgeres.devices import JETPACK, Gpu, Jetson
from edgeres.diagnosis import JETPACKS, can_build, can_run, detect, jetpack, obstacle, problems
from edgeres.errors import UsageError
from edgeres.facts import Facts, Package
from edgeres.files import to_json
from edgeres.targets import Target, load_target, names

CPU = {name: Package("1.0") for name in ("numpy", "onnx", "onnxruntime")}
ORIN, XAVIER = Gpu("Orin", "8.7", 32 << 30, True), Gpu("Xavier", "7.2", 8 << 30, True)
THOR, ADA = Gpu("NVIDIA Thor", "11.0", 128 << 30, True), Gpu("NVIDIA GeForce RTX 4090", "8.9", 24 << 30, False)
AGX, NANO = "NVIDIA Jetson AGX Orin Developer Kit", "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
NX = "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"


def with_packages(here: Facts, **packages: Package) -> Facts:
    return replace(here, packages={**here.packages, **{n.replace("__", "-"): p for n, p in packages.items()}})


def jetson(model: str, l4t: str | None, tensorrt: str | None, gpu: Gpu = ORIN, **more: Any) -> Facts:
    """A Jetson as it should be: packages by apt, seen by this Python."""
    packages = {**CPU, "pycuda": Package("2025.1"), "tensorrt": Package(tensorrt)}
    more = {"python": "3.10.12", "cuda": "12.6", "apt": True, "packages": packages, **more}
    return Facts("Linux", "aarch64", gpus=(gpu,), jetson=Jetson(model, l4t, JETPACK.get(l4t or "")), **more)


def pc(*gpus: Gpu, **more: Any) -> Facts:
    more = {"cuda": "12.8" if gpus else None, "no_gpu": "" if gpus else "no NVIDIA driver", "packages": CPU, **more}
    return Facts("Linux", "x86_64", "3.12.1", instruction_sets=("avx2", "avx_vnni"), gpus=gpus, **more)


AGX_62 = jetson(AGX, "36.4.3", "10.3.0", dla_cores=2)
AGX_60 = jetson(AGX, "36.3.0", "8.6.2", dla_cores=2, cuda="12.2")
AGX_72 = jetson(AGX, "39.2.0", "10.16.2", python="3.12.3", cuda="13.2", dla_cores=0)
AGX_722 = jetson(AGX, "39.2.9", "11.4.1", python="3.12.3", cuda="13.2", dla_cores=2)
NX_62 = jetson(NX, "36.4.4", "10.3.0", dla_cores=2)
NANO_62 = jetson(NANO, "36.4.3", "10.3.0", dla_cores=0)
THOR_71 = jetson("NVIDIA Jetson AGX Thor Developer Kit", "38.4.0", "10.13.3", THOR, python="3.12.3", cuda="13.0")
XAVIER_51 = jetson("NVIDIA Jetson Xavier NX Developer Kit", "35.4.1", None, XAVIER, cuda="11.4", apt=False)
LAPTOP = pc()
PC_BARE = pc(ADA)
PC_TRT = with_packages(PC_BARE, tensorrt=Package("10.13.3.9", cuda=12), cuda__python=Package("12.9"))
PC_RTX = with_packages(PC_BARE, tensorrt_rtx=Package("1.7.1.116", cuda=12), cuda__python=Package("12.9"))
MAC = Facts("Darwin", "arm64", "3.12.1", no_gpu="macOS has no NVIDIA driver", packages=CPU)
ARM = Facts("Linux", "aarch64", "3.12.1", instruction_sets=("asimddp",), no_gpu="no NVIDIA driver", packages=CPU)
BROKEN = with_packages(PC_BARE, tensorrt=Package("10.13.3.9", "libnvinfer.so.10: cannot open shared object file", 12))
NO_GPU = with_packages(pc(), tensorrt=Package("10.13.3.9", cuda=12))

ALL = {
    "agx 6.2": AGX_62,
    "agx 6.0": AGX_60,
    "agx 7.2": AGX_72,
    "agx 7.2.2": AGX_722,
    "nx 6.2": NX_62,
    "nano 6.2": NANO_62,
    "thor 7.1": THOR_71,
    "xavier 5.1": XAVIER_51,
    "laptop": LAPTOP,
    "pc bare": PC_BARE,
    "pc tensorrt": PC_TRT,
    "pc rtx": PC_RTX,
    "mac": MAC,
    "arm": ARM,
    "broken": BROKEN,
    "no gpu": NO_GPU,
}
GPU = {"desktop", "desktop-implicit"}
ORIN_GPU = {"jetson-agx-orin", "jetson-orin-nx", "jetson-orin-nano"}
DLA = {"jetson-agx-orin-dla", "jetson-orin-nx-dla"}


def can(answer: Any, here: Facts) -> set[str]:
    return {name for name in names() if answer(name, load_target(name), here)[0]} - {"cpu", "cpu-openvino"}


@pytest.mark.parametrize(
    ("here", "builds", "runs"),
    [
        (AGX_62, GPU | ORIN_GPU | DLA, None),
        (AGX_60, GPU | ORIN_GPU | DLA, None),
        (AGX_72, GPU | ORIN_GPU, None),
        (AGX_722, {"desktop"} | ORIN_GPU | DLA, None),
        (NX_62, GPU | ORIN_GPU | DLA, None),
        (NANO_62, GPU | ORIN_GPU, None),
        (THOR_71, GPU | {"jetson-agx-thor"}, None),
        (XAVIER_51, set(), None),
        (LAPTOP, set(), None),
        (PC_BARE, set(), None),
        (PC_TRT, GPU, None),
        (PC_RTX, {"rtx"}, None),
        (with_packages(LAPTOP, tensorrt_rtx=Package("1.7.1.116", cuda=13)), {"rtx"}, set()),
        (with_packages(PC_TRT, cuda__python=Package()), GPU, set()),
        (with_packages(PC_TRT, onnx=Package()), set(), GPU),
        (with_packages(PC_RTX, cuda__python=Package()), {"rtx"}, set()),
        (with_packages(PC_RTX, tensorrt_rtx=Package("1.7.1.116", cuda=13)), {"rtx"}, set()),
        (with_packages(MAC, tensorrt_rtx=Package("1.7.1.116")), set(), None),
        (BROKEN, set(), None),
        (NO_GPU, set(), None),
    ],
)
def test_what_a_machine_builds_and_runs(here: Facts, builds: set[str], runs: set[str] | None) -> None:
    assert can(can_build, here) == builds
    assert can(can_run, here) == (builds if runs is None else runs)


@pytest.mark.parametrize("here", ALL.values(), ids=ALL)
def test_every_machine_with_onnx_runtime_has_the_target_cpu(here: Facts) -> None:
    target = load_target("cpu")
    assert can_build("cpu", target, here) == can_run("cpu", target, here) == (True, "")


@pytest.mark.parametrize(
    ("here", "target"),
    [
        (AGX_62, "jetson-agx-orin"),
        (NX_62, "jetson-orin-nx"),
        (NANO_62, "jetson-orin-nano"),
        (jetson("NVIDIA IGX Orin Development Kit", "36.3.0", "8.6.2"), "jetson-agx-orin"),
        (jetson("NVIDIA IGX Thor Developer Kit", "38.4.0", "10.13.3", THOR), "jetson-agx-thor"),
        (jetson("NVIDIA Orin Nano Developer Kit", "35.4.1", None), "jetson-orin-nano"),
        (THOR_71, "jetson-agx-thor"),
        (XAVIER_51, "jetson-xavier-nx"),
        (jetson("Jetson AGX Xavier", "35.6.4", None), "jetson-xavier-nx"),
        (LAPTOP, "cpu"),
        (PC_BARE, "cpu"),
        (PC_TRT, "desktop"),
        (PC_RTX, "rtx"),
        (with_packages(PC_RTX, tensorrt=PC_TRT.package("tensorrt")), "desktop"),
        (with_packages(LAPTOP, tensorrt_rtx=Package("1.7.1.116")), "cpu"),
        (replace(PC_RTX, gpus=(replace(ADA, capability="7.0"),)), "cpu"),
        (replace(PC_RTX, gpus=(replace(ADA, capability="7.5"),)), "rtx"),
        (replace(PC_RTX, gpus=(replace(ADA, capability="12.0"),)), "rtx"),
        (MAC, "cpu"),
        (BROKEN, "cpu"),
        (NO_GPU, "cpu"),
    ],
)
def test_auto_is_the_best_that_works(here: Facts, target: str) -> None:
    assert detect(here) == target
    assert target in names()


@pytest.mark.parametrize("model", ["Jetson-AGX", "NVIDIA Jetson Nano Developer Kit", ""])
def test_an_unknown_jetson_is_named_with_the_choices(model: str) -> None:
    here = jetson(model, "36.4.3", "10.3.0")
    with pytest.raises(UsageError, match=model or "cannot be read") as caught:
        detect(here)
    assert all(target in caught.value.hint for target in diagnosis.BOARDS.values())
    assert problem(here, "no target is known").remedy == caught.value.hint
    assert doctor.report(facts=here)[0]["auto"] is None


def answer(name: str, here: Facts, **changes: Any) -> tuple[str, str]:
    """What is in the way of target ``name``, and what to do."""
    found = obstacle(replace(load_target(name), **changes), here)
    assert found is not None
    return found


def problem(here: Facts, part: str) -> diagnosis.Obstacle:
    (found,) = [p for p in problems(here) if part in p.cause]
    return found


def test_a_machine_as_it_should_be_has_no_problem() -> None:
    for here in (AGX_62, AGX_60, AGX_722, NX_62, NANO_62, THOR_71, LAPTOP, PC_BARE, PC_TRT, PC_RTX, MAC, ARM):
        assert list(problems(here)) == []


def test_without_a_gpu_other_machines_are_the_way() -> None:
    assert answer("desktop", LAPTOP) == ("no NVIDIA GPU here", diagnosis.ELSEWHERE)
    cause, _ = answer("jetson-agx-thor", LAPTOP)
    assert cause == "no NVIDIA GPU of compute capability 11.0 here"
    cause, remedy = answer("jetson-orin-nano", PC_TRT)
    assert cause == "for compute capability 8.7, not 8.9"
    assert remedy == diagnosis.ELSEWHERE


@pytest.mark.parametrize("here", [MAC, AGX_62])
def test_tensorrt_rtx_is_for_pcs(here: Facts) -> None:
    assert answer("rtx", here)[0] == "only for Linux and for Windows on x86-64, and not for Jetson"


def test_tensorrt_rtx_is_also_for_arm_servers() -> None:
    cause, remedy = answer("rtx", ARM)
    assert cause != answer("rtx", AGX_62)[0]
    assert 'pip install "edgeres[rtx]"' in remedy or "engines built here run" in remedy


@pytest.mark.parametrize(
    ("cuda", "remedy"),
    [("12.8", 'pip install tensorrt-cu12 "cuda-python<13"'), ("13.2", 'pip install "edgeres[tensorrt]"')],
)
def test_the_tensorrt_to_install_is_that_of_the_driver(cuda: str, remedy: str) -> None:
    assert answer("desktop", replace(PC_BARE, cuda=cuda)) == ("TensorRT is not installed", remedy)


@pytest.mark.parametrize(
    ("cuda", "remedy"),
    [("12.8", 'pip install tensorrt-rtx-cu12 "cuda-python<13"'), ("13.2", 'pip install "edgeres[rtx]"')],
)
def test_so_is_the_tensorrt_rtx(cuda: str, remedy: str) -> None:
    assert answer("rtx", replace(PC_BARE, cuda=cuda)) == ("TensorRT-RTX is not installed", remedy)


def test_a_broken_tensorrt_is_told_from_a_missing_one() -> None:
    found = answer("desktop", BROKEN)
    assert found == problem(BROKEN, "TensorRT")
    assert found[0] == "TensorRT does not load: libnvinfer.so.10: cannot open shared object file"
    assert found[1] == "pip install --force-reinstall tensorrt-cu12"


def test_a_driver_too_old_for_the_cuda_of_tensorrt_is_seen() -> None:
    here = with_packages(PC_TRT, tensorrt=Package("11.4.0.106", cuda=13))
    found = answer("desktop", here)
    assert found == problem(here, "CUDA")
    assert found[0] == "TensorRT here is for CUDA 13, the driver supports 12.8"
    assert found[1] == "update the NVIDIA driver, or pip install tensorrt-cu12"
    assert answer("desktop", replace(here, cuda="11.4"))[1] == "update the NVIDIA driver"
    assert can_build("desktop", load_target("desktop"), replace(here, cuda="13.0"))[0]


@pytest.mark.parametrize(
    ("tensorrt", "capability", "fits"),
    [("10.4.0", "7.0", True), ("10.5.0", "7.0", False), ("11.4.0.106", "7.0", False), ("11.4.0.106", "7.5", True)],
)
def test_volta_ended_with_tensorrt_10_4(tensorrt: str, capability: str, fits: bool) -> None:
    here = replace(PC_TRT, gpus=(replace(ADA, capability=capability),))
    here = with_packages(here, tensorrt=Package(tensorrt, cuda=12))
    assert can_build("desktop", load_target("desktop"), here)[0] is fits
    if not fits:
        assert "needs compute capability 7.5" in answer("desktop", here)[0]


def test_tensorrt_rtx_starts_with_turing() -> None:
    here = replace(PC_RTX, gpus=(replace(ADA, capability="7.0"),))
    assert "TensorRT-RTX needs compute capability 7.5" in can_run("rtx", load_target("rtx"), here)[1]


@pytest.mark.parametrize(
    ("capability", "note"),
    [("7.5", "with --build capabilities=7.5"), ("9.0", "not list compute capability 9.0"), ("8.6", "")],
)
def test_gpus_that_tensorrt_rtx_does_not_build_for_by_itself_are_noted(capability: str, note: str) -> None:
    here = replace(PC_RTX, gpus=(replace(ADA, capability=capability),))
    runs, why = can_run("rtx", load_target("rtx"), here)
    assert runs
    assert note in why
    assert bool(note) == bool(why)


def test_running_needs_a_way_to_cuda() -> None:
    here = with_packages(PC_TRT, cuda__python=Package())
    found = ("neither pycuda nor cuda-python is installed", 'pip install "cuda-python<13"')
    assert answer("desktop", here) == found
    here = with_packages(here, pycuda=Package("2025.1", "libcurand.so.10: cannot open shared object file"))
    assert answer("desktop", here)[0] == "pycuda does not load: libcurand.so.10: cannot open shared object file"
    here = with_packages(AGX_62, pycuda=Package())
    assert answer("jetson-agx-orin", here)[1] == "PATH=/usr/local/cuda/bin:$PATH pip install pycuda"


@pytest.mark.parametrize(("target", "package"), [("cpu", "onnxruntime"), ("cpu", "onnx"), ("cpu-openvino", "openvino")])
def test_a_missing_package_comes_with_its_command(target: str, package: str) -> None:
    here = with_packages(LAPTOP, openvino=Package("2026.4"))
    extra = {"openvino": "openvino"}.get(package, "onnx")
    missing = with_packages(here, **{package: Package()})
    remedy = f'pip install "edgeres[{extra}]"' + "; `edgeres selftest` builds from a bundle without it" * (
        package == "onnx"
    )
    assert answer(target, missing) == (f"{package} is not installed", remedy)
    broken = with_packages(here, **{package: Package("1.0", "undefined symbol")})
    assert answer(target, broken)[0] == f"{package} does not load: undefined symbol"
    assert can_build(target, load_target(target), here)[0]


# what is wrong with TensorRT for Python on a Jetson

APT = "sudo apt install python3-libnvinfer"


@pytest.mark.parametrize(
    ("changes", "cause", "remedy"),
    [
        ({"apt": False}, "TensorRT is not installed", APT),
        ({"apt": False, "isolated": True}, "TensorRT is not installed", f"{APT}, then {diagnosis.VENV}"),
        ({"isolated": True}, "TensorRT is out of reach of this Python environment", diagnosis.VENV),
        (
            {"python": "3.11.9"},
            "TensorRT of JetPack 6.1, 6.2 is for Python 3.10, and this is 3.11.9",
            diagnosis.VENV,
        ),
        ({}, "TensorRT is out of reach of this Python environment", f"{APT} --reinstall"),
    ],
)
def test_why_a_jetson_finds_no_tensorrt(changes: dict[str, Any], cause: str, remedy: str) -> None:
    here = jetson(AGX, "36.4.3", None, **changes)
    remedy = remedy.replace(f"{APT} --reinstall", "sudo apt install --reinstall python3-libnvinfer")
    assert list(problems(here)) == [(cause, remedy)]
    assert answer("jetson-agx-orin", here)[1] == remedy


def test_jetpack_5_builds_with_trtexec() -> None:
    (found,) = problems(XAVIER_51)
    assert found.cause == "TensorRT of JetPack 5.1 is for Python 3.8, and this is 3.10.12"
    assert found.remedy == answer("jetson-xavier-nx", XAVIER_51)[1]
    assert "trtexec" in found.remedy


@pytest.mark.parametrize(
    ("here", "fits"),
    [
        (jetson(AGX, "36.4.3", "10.13.3.9"), True),  # NVIDIA's archives, or a container
        (with_packages(AGX_62, tensorrt=Package("10.13.3.9", cuda=12)), False),
        (with_packages(AGX_62, tensorrt=Package("11.4.1", cuda=13)), False),
        (jetson(AGX, "36.4.3", "11.4.1"), False),
        (with_packages(THOR_71, tensorrt=Package("10.13.3.9", cuda=13)), True),
        (with_packages(THOR_71, tensorrt=Package("11.4.0.106", cuda=13)), False),
        (with_packages(THOR_71, tensorrt=Package("11.4.1", cuda=13)), True),
    ],
)
def test_a_jetson_takes_the_tensorrt_of_its_jetpack(here: Facts, fits: bool) -> None:
    name = detect(here)
    assert can_build(name, load_target(name), here)[0] is fits
    wrong = [p for p in problems(here) if "DLA" not in p.cause]
    assert (wrong == []) is fits
    if not fits:
        assert tuple(wrong[0]) == answer(name, here)


def test_pips_tensorrt_on_a_jetson_is_taken_away_first() -> None:
    here = with_packages(replace(AGX_62, isolated=True), tensorrt=Package("11.4.0.106", cuda=13))
    (found,) = problems(here)
    assert found.cause == "TensorRT 11.4.0.106 of pip is not for JetPack before 7"
    assert found.remedy == f"pip uninstall tensorrt tensorrt-cu13, then {diagnosis.VENV}"


def test_a_jetpack_from_before_is_too_old() -> None:
    here = jetson("NVIDIA Jetson Xavier NX Developer Kit", "32.7.1", "8.2.1", XAVIER)
    assert jetpack(here) is None
    assert "JetPack 6" in problem(here, "L4T 32.7.1").remedy


@pytest.mark.parametrize(
    ("here", "tensorrt"),
    [
        (XAVIER_51, "8.5.2"),
        (AGX_60, "8.6.2"),
        (AGX_62, "10.3.0"),
        (jetson(AGX, "36.5.2", None), "10.3.0"),
        (THOR_71, "10.13"),
        (AGX_72, "10.16.2"),
        (jetson(AGX, "39.2.1", None), "10.16.2"),
        (AGX_722, "11.4.1"),
        (jetson(AGX, None, None), None),
        (LAPTOP, None),
    ],
)
def test_the_row_of_the_matrix_is_that_of_the_l4t(here: Facts, tensorrt: str | None) -> None:
    row = jetpack(here)
    assert (row.tensorrt if row else None) == tensorrt


def test_every_l4t_of_a_jetpack_that_edgeres_knows_is_in_the_matrix() -> None:
    for l4t, version in JETPACK.items():
        row = jetpack(jetson(AGX, l4t, None))
        if not version.startswith("5.0"):
            assert row is not None
            assert any(version.startswith(name) for name in row.name.removesuffix(" on").split(", "))


@pytest.mark.parametrize(
    ("here", "cause"),
    [
        (NANO_62, "this Jetson has no DLA"),
        (with_packages(NANO_62, tensorrt=Package()), "this Jetson has no DLA"),
        (replace(AGX_62, dla_cores=0), "TensorRT 10.3.0 does not drive this Jetson's DLA"),
        (jetson(AGX, "36.4.3", "10.8.0"), "TensorRT 10.8.0 does not drive this Jetson's DLA"),
        (AGX_72, "TensorRT 10.16.2 does not drive this Jetson's DLA"),
        (jetson(NX, "39.2.9", "11.4.1", python="3.12.3"), "TensorRT 11.4.1 does not drive this Jetson's DLA"),
    ],
)
def test_dla_is_there_where_board_and_tensorrt_have_it(here: Facts, cause: str) -> None:
    found, remedy = answer("jetson-agx-orin-dla", here)
    assert found == cause
    assert "--target jetson-orin-nano" in remedy or "JetPack 6 with TensorRT up to 10.7" in remedy


@pytest.mark.parametrize(
    "here", [jetson(AGX, "36.4.3", "10.7.0"), replace(AGX_72, dla_cores=2), replace(AGX_722, dla_cores=None)]
)
def test_what_tensorrt_counts_is_more_than_what_is_written(here: Facts) -> None:
    assert can_build("jetson-agx-orin-dla", load_target("jetson-agx-orin-dla"), here)[0]


def test_a_dla_out_of_reach_is_a_problem_where_the_board_has_one() -> None:
    assert "JetPack 7.2.2" in problem(AGX_72, "does not drive this Jetson's DLA").remedy
    assert list(problems(THOR_71)) == list(problems(replace(NANO_62))) == []


def test_calibration_caches_end_with_tensorrt_10() -> None:
    here = with_packages(PC_TRT, tensorrt=Package("11.0.0.114", cuda=12))
    found = answer("desktop-implicit", here)
    assert found == ("calibration caches ended with TensorRT 10.16; this is 11.0.0.114", "--target desktop")


@pytest.mark.parametrize(
    ("name", "here", "note"),
    [
        ("jetson-agx-orin", AGX_60, "with --tensorrt 8.6.2"),
        ("jetson-agx-orin-dla", AGX_722, "with --tensorrt 11.4.1"),
        ("jetson-agx-orin-dla", AGX_60, ""),
        ("jetson-agx-orin", AGX_62, ""),
        ("desktop", AGX_62, "this Jetson's own is jetson-agx-orin"),
        ("jetson-orin-nano", AGX_62, "this Jetson's own is jetson-agx-orin"),
        ("desktop", PC_TRT, ""),
    ],
)
def test_what_works_may_come_with_a_word(name: str, here: Facts, note: str) -> None:
    assert can_build(name, load_target(name), here) == can_run(name, load_target(name), here) == (True, note)


@pytest.mark.parametrize(
    ("here", "remedy"),
    [
        (NO_GPU, "install the NVIDIA driver"),
        (replace(LAPTOP, cuda="13.0", no_gpu="cuInit failed: CUDA_ERROR_UNKNOWN"), "nvidia-smi"),
        (replace(AGX_62, gpus=(), no_gpu="no NVIDIA driver"), "--runtime=nvidia"),
    ],
)
def test_a_gpu_that_should_be_there_is_missed(here: Facts, remedy: str) -> None:
    found = problem(here, "no GPU can be used")
    assert here.no_gpu in found.cause
    assert remedy in found.remedy


def test_an_old_python_and_an_old_cpu_are_told() -> None:
    assert "3.10" in problem(replace(LAPTOP, python="3.9.18"), "Python 3.9.18").remedy
    assert "7-bit" in problem(replace(LAPTOP, instruction_sets=("avx2",)), "VNNI").cause
    assert list(problems(replace(LAPTOP, machine="AMD64", instruction_sets=("amx_int8",)))) == []


# what is found here


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that modules are imported from; what was imported of it is forgotten after the test."""
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - set(before):
        if name.startswith(("pkg", "tensorrt")):
            del sys.modules[name]


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        if (key := name.replace("-", "_")) in versions:
            return versions[key]
        raise facts.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(facts.metadata, "version", version)


def probe(*names: str) -> Package:
    return facts._package(list(names or ["pkg"]), "pkg")


def test_a_package_that_is_not_there_is_not_broken(modules: Path) -> None:
    assert probe() == probe("pkg.part", "pkg.other") == Package()
    (modules / "pkg").mkdir()  # other packages may share the name, as cuda's do
    assert probe("pkg.part") == Package()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('libnvinfer.so.10: cannot open shared object file\\nmore')", "libnvinfer.so.10: cannot"),
        ("raise OSError('libfoo.so: not there')", "libfoo.so: not there"),
        ("import a_module_that_is_not_there", "No module named 'a_module_that_is_not_there'"),
        ("assert False", "AssertionError"),
        ("def", "invalid syntax"),
    ],
)
def test_a_package_that_does_not_load_says_why(modules: Path, code: str, reason: str) -> None:
    (modules / "pkg.py").write_text(code, encoding="utf-8")
    found = probe()
    assert not found.works
    assert found.version is not None
    assert found.broken.startswith(reason)
    assert "\n" not in found.broken


def test_the_version_is_that_of_the_module_or_else_of_the_package(
    modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (modules / "pkg.py").write_text("", encoding="utf-8")
    assert probe() == Package("unknown")
    installed(monkeypatch, pkg="3.1")
    assert probe() == Package("3.1")
    assert probe("pkg_bindings") == Package("3.1", "it has no pkg_bindings")
    (modules / "pkg2.py").write_text("__version__ = '3.2'", encoding="utf-8")
    assert probe("pkg_bindings", "pkg2") == Package("3.2")


@pytest.mark.parametrize(
    ("versions", "cuda"),
    [
        ({"tensorrt_cu13_libs": "1"}, 13),
        ({"tensorrt_cu12": "1"}, 12),
        ({"tensorrt_libs": "8.6.1"}, 12),
        ({"tensorrt": "10.3.0"}, None),
    ],
)
def test_the_cuda_of_pypis_tensorrt_is_in_its_name(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], cuda: int | None
) -> None:
    installed(monkeypatch, **versions)
    assert facts._cuda("tensorrt") == cuda


@pytest.mark.parametrize(("cores", "found"), [(2, 2), (0, 0), (TypeError(), None)])
def test_dla_cores_are_counted_by_tensorrt(monkeypatch: pytest.MonkeyPatch, cores: Any, found: int | None) -> None:
    class Runtime:
        def __init__(self, log: str) -> None:
            assert log == "the one logger"
            if isinstance(cores, Exception):
                raise cores
            self.num_DLA_cores = cores

    library = ModuleType("tensorrt")
    library.Runtime = Runtime  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    monkeypatch.setattr(facts.trt, "logger", lambda trt: "the one logger" if trt is library else None)
    assert facts._dla_cores() == found


def test_a_jetson_is_gathered_with_all_that_is_asked_of_it(
    modules: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (modules / "tensorrt.py").write_text("__version__ = '10.3.0'", encoding="utf-8")
    root = tmp_path / "root"
    for path, text in {
        "proc/device-tree/model": f"{AGX}\0",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
        "proc/meminfo": "MemAvailable: 100 kB\n",
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release\n",
        "usr/lib/python3.10/dist-packages/tensorrt/__init__.py": "",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    monkeypatch.setattr(facts.devices, "gpus", lambda: [ORIN])
    monkeypatch.setattr(facts.devices, "why_no_gpu", str)
    monkeypatch.setattr(facts.devices, "driver", lambda: "12.6")
    monkeypatch.setattr(facts, "_dla_cores", lambda: 2)
    here = facts.gather(root)
    assert (here.jetson, here.gpus) == (Jetson(AGX, "36.4.3", "6.2"), (ORIN,))
    assert (here.cuda, here.driver, here.memory_free) == ("12.6", "540.4.0", 102400)
    assert (here.dla_cores, here.apt) == (2, True)
    assert here.package("tensorrt") == Package("10.3.0")
    monkeypatch.setattr(facts.devices, "gpus", lambda: [ADA, ORIN])
    igx = facts.gather(root)  # with a GPU in a slot, which comes first
    assert (igx.jetson, igx.dla_cores, detect(igx)) == (None, None, "desktop")
    monkeypatch.setattr(facts.devices, "gpus", lambda: [ORIN])
    monkeypatch.setattr(sys, "path", [*sys.path, "/usr/lib/python3.10/dist-packages"])
    assert not facts.gather(root).isolated
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "dist-packages" not in p])
    assert facts.gather(root).isolated
    elsewhere = facts.gather(tmp_path)
    assert (elsewhere.jetson, elsewhere.dla_cores, elsewhere.apt) == (None, None, False)


def test_looking_at_this_machine_imports_nothing_slow() -> None:
    code = (
        "import sys\n"
        "from edgeres import facts\n"
        "here = facts.gather()\n"
        "assert here.package('numpy').works and here.package('onnxruntime').works\n"
        "assert here.python and here.cores and (here.gpus or here.no_gpu)\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "openvino", "numba", "matplotlib"} & set(done.stdout.split())


# what is shown


def shown(here: Facts, matrix: bool = False, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(doctor.report(matrix, here)[1])
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("here", ALL.values(), ids=ALL)
def test_every_report_fits_80_columns_and_becomes_json(here: Facts) -> None:
    text = shown(here, matrix=True)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "\x1b" not in text
    value = doctor.report(True, here)[0]
    to_json(value)
    assert list(value["targets"]) == list(names())
    assert len(value["matrix"]) == len(JETPACKS)
    lines = [line.split()[:3] for line in text.splitlines()]
    for name, row in value["targets"].items():
        assert [name, *("yes" if row[key] else "no" for key in ("builds", "runs"))] in lines
        assert row["why"] or (row["builds"] and row["runs"])


def test_a_report_says_what_the_json_has() -> None:
    value, _ = doctor.report(facts=AGX_62)
    assert "matrix" not in value
    assert (value["auto"], value["problems"]) == ("jetson-agx-orin", [])
    assert value["jetpack"]["expected"]["tensorrt"] == value["jetpack"]["found"]["tensorrt"] == "10.3.0"
    assert value["packages"]["tensorrt"] == {"version": "10.3.0", "broken": "", "cuda": None}
    assert value["machine"]["jetson"]["jetpack"] == "6.2"
    text = " ".join(shown(AGX_62).split())
    assert "Orin, compute capability 8.7, 32.0 GiB shared with the CPU" in text
    assert f"{AGX}, L4T 36.4.3, JetPack 6.2" in text
    assert "TensorRT 10.3.0 10.3.0 CUDA 12.6 12.6 Python 3.10 3.10.12 DLA all but Orin Nano 2 cores" in text
    assert "--target auto is jetson-agx-orin here." in text
    assert text.endswith("Problems none found")


def test_problems_are_numbered_with_what_to_do() -> None:
    here = replace(BROKEN, instruction_sets=("avx2",))
    value, _ = doctor.report(facts=here)
    assert [set(p) for p in value["problems"]] == [{"cause", "remedy"}] * 2
    lines = shown(here, width=200).splitlines()
    start = lines.index("Problems")
    for i, p in enumerate(value["problems"], 1):
        assert lines[start + 2 * i - 1] == f"{i}.  {p['cause']}"
        assert lines[start + 2 * i] == f"    {p['remedy']}"


def test_what_to_do_is_said_once_for_many_targets() -> None:
    here = jetson(AGX, "36.4.3", None, apt=False)
    text = shown(here)
    assert text.count(APT) == 2  # for the first target, and as a problem
    assert text.count("as desktop") == len(GPU | ORIN_GPU | DLA) - 1
    remedies = [t["remedy"] for t in doctor.report(facts=here)[0]["targets"].values()]
    assert remedies.count(APT) == len(GPU | ORIN_GPU | DLA)


def test_a_target_that_builds_and_does_not_run_says_why_not() -> None:
    here = with_packages(LAPTOP, tensorrt_rtx=Package("1.7.1.116"))
    row = doctor.report(facts=here)[0]["targets"]["rtx"]
    assert (row["builds"], row["runs"], row["why"]) == (True, False, "no NVIDIA GPU here")
    assert row["remedy"] == "engines built here run where there is one"


def test_instruction_sets_are_named_or_said_not_to_be_found() -> None:
    assert "INT8    asimddp\n" in shown(ARM)
    old = shown(replace(ARM, instruction_sets=()))  # a Cortex-A72: its flags are known, and none is for INT8
    assert "INT8    no instruction sets for it found\n" in old


def test_the_report_is_of_this_machine_unless_told_otherwise() -> None:
    value, _ = doctor.report()
    assert value["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert value["targets"]["cpu"]["builds"]
    assert isinstance(load_target(value["auto"]), Target)
