from __future__ import annotations

import platform
from collections.abc import Iterable

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


def test_only_an_implicit_target_says_for_which_tensorrt_its_cache_is() -> None:
    assert all((load_target(n).tensorrt is not None) == (load_target(n).scheme == "implicit") for n in names())


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
