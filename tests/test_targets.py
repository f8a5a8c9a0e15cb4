from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path

import pytest

from edgeres import machine, targets
from edgeres.errors import UsageError
from edgeres.quantize import Scheme
from edgeres.recipe import PRECISIONS
from edgeres.targets import exact_dot_product, load_target, names, scheme_for


def test_the_cpu_is_a_target() -> None:
    target = load_target("cpu")
    assert (target.executor, target.scheme) == ("onnxruntime", "onnxruntime")
    assert target.precisions == ["fp32", "fp16", "int8"]


@pytest.mark.parametrize("name", names())
def test_every_target_loads_and_runs_what_it_says(name: str) -> None:
    target = load_target(name)
    assert target.description
    assert set(target.precisions) <= set(PRECISIONS)
    for precision in target.precisions:
        assert load_target(name, precision) == target


JETSONS = [n for n in names() if n.startswith("jetson")]


@pytest.mark.parametrize("name", JETSONS)
def test_a_jetson_has_a_tensorrt_a_capability_and_where_they_are_known_from(name: str) -> None:
    target = load_target(name)
    assert target.executor == "tensorrt"
    assert target.tensorrt
    assert target.capability in ("7.2", "8.7", "11.0")
    text = (Path(targets.__file__).parent / "targets" / f"{name}.toml").read_text(encoding="utf-8")
    assert "developer.nvidia.com" in text or "documentation" in text
    assert target.dla == name.endswith("-dla") == (target.build.dla_core == 0)


@pytest.mark.parametrize(
    ("name", "version", "scheme", "rest", "typed"),
    [
        ("desktop", None, "tensorrt", "fp16", True),
        ("desktop", "8.6.1", "tensorrt", "fp32", False),
        ("desktop", "10.0.1", "tensorrt", "fp16", True),
        ("desktop-implicit", None, "implicit", "fp16", True),
        ("jetson-agx-orin", None, "tensorrt", "fp16", True),
        ("jetson-agx-orin", "8.6.2", "tensorrt", "fp32", False),
        ("jetson-xavier-nx", None, "tensorrt", "fp32", False),
        ("jetson-agx-thor", None, "tensorrt", "fp16", True),
        ("jetson-agx-orin-dla", None, "implicit", "fp16", False),
        ("jetson-agx-orin-dla", "8.6.2", "implicit", "fp16", False),
        ("jetson-agx-orin-dla", "11.4.1", "tensorrt", "fp16", True),
        ("rtx", None, "tensorrt", "fp16", True),
    ],
)
def test_the_scheme_fits_the_version_of_tensorrt(
    name: str, version: str | None, scheme: str, rest: str, typed: bool
) -> None:
    target = load_target(name, None, version)
    found = scheme_for(target)
    assert (found.name, found.rest, target.typed) == (scheme, rest, typed)
    assert target.implicit == (scheme == "implicit")


def test_options_of_a_build_win_over_those_of_the_target() -> None:
    target = load_target("jetson-agx-orin-dla", build={"profile": [8, 8, 8], "max_fallback": 2})
    assert (target.build.profile, target.build.max_fallback, target.build.dla_core) == ((8, 8, 8), 2, 0)
    assert target.asked["profile"] == [8, 8, 8]
    with pytest.raises(UsageError, match=r"unknown key 'level2' in \[build\]"):
        load_target("desktop", build={"level2": 1})


def test_options_of_a_build_are_nothing_to_a_cpu() -> None:
    assert load_target("cpu", build={"level": 1}) == load_target("cpu")
    assert load_target("cpu").asked == {}


def test_an_unknown_target_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="unknown target 'cpuu'") as caught:
        load_target("cpuu")
    assert "did you mean 'cpu'?" in caught.value.hint
    assert all(name in caught.value.hint for name in names())
    assert caught.value.exit_code == 2


def test_a_name_far_from_any_target_gets_the_list_alone() -> None:
    with pytest.raises(UsageError) as caught:
        load_target("toaster")
    assert caught.value.hint.startswith("choose from: ")


@pytest.mark.parametrize("name", ["../targets/cpu", "cpu.toml", ""])
def test_a_target_is_a_name_not_a_path(name: str) -> None:
    with pytest.raises(UsageError, match="unknown target"):
        load_target(name)


def test_a_precision_that_the_target_does_not_run_is_refused() -> None:
    with pytest.raises(UsageError, match="target cpu does not run int4") as caught:
        load_target("cpu", "int4")
    assert caught.value.hint == "it runs fp32, fp16, int8"


@pytest.mark.parametrize(
    ("architecture", "flags", "exact"),
    [
        ("x86_64", {"avx2", "avx512f", "avx512_vnni"}, True),
        ("x86_64", {"avx2", "avx_vnni"}, True),
        ("x86_64", {"amx_int8"}, True),
        ("AMD64", {"avx_vnni"}, True),
        ("x86_64", {"avx2", "avx512f", "avx512bw"}, False),
        ("x86_64", set(), False),
        ("AMD64", set(), False),
        ("i686", {"sse4_2"}, False),
        ("aarch64", {"asimd", "asimddp"}, True),
        ("aarch64", set(), True),
        ("arm64", set(), True),
    ],
)
def test_dot_products_saturate_on_x86_without_vnni_only(architecture: str, flags: Iterable[str], exact: bool) -> None:
    assert exact_dot_product(architecture, frozenset(flags)) is exact


@pytest.mark.parametrize(("flags", "bits"), [(["avx512_vnni"], 8), (["avx2"], 7)])
def test_the_scheme_fits_the_processor(monkeypatch: pytest.MonkeyPatch, flags: list[str], bits: int) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(targets, "cpu_flags", lambda: frozenset(flags))
    assert scheme_for(load_target("cpu")) == Scheme("onnxruntime", weight_bits=bits)


@pytest.mark.parametrize(
    ("info", "flags"),
    [
        ({"flags": "fpu avx2 avx512_vnni"}, {"fpu", "avx2", "avx512_vnni"}),
        ({"Features": "fp asimd asimddp"}, {"fp", "asimd", "asimddp"}),
        ({}, set()),
    ],
)
def test_flags_are_read_as_x86_and_arm_write_them(
    monkeypatch: pytest.MonkeyPatch, info: dict[str, str], flags: set[str]
) -> None:
    monkeypatch.setattr(machine, "cpu_info", lambda: info)
    assert machine.cpu_flags() == flags
