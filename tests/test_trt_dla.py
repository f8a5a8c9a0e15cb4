"""Builds for DLA: who may, what is set, and which layers stay on the GPU."""

from __future__ import annotations

from typing import Any

import pytest
from fake_tensorrt import VERSIONS, fake

from edgeres.errors import BuildError, UsageError
from edgeres.trt import Calibration, Options, builder
from edgeres.trt.builder import build

IMPLICIT = [v for v in VERSIONS if v.startswith(("8", "10"))]
every = pytest.mark.parametrize("version", VERSIONS)
CORE = Options(dla_core=1, profile=(2, 2, 2))
CACHE = Calibration("TRT-100300-EntropyCalibration2\ninput: 3c000000\n")
LAYERS = [
    ("weights", "CONSTANT", False),
    ("conv1", "CONVOLUTION", True),
    ("relu", "ACTIVATION", True),
    ("avgpool", "REDUCE", False),
    ("fc", "MATRIX_MULTIPLY", False),
]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(builder, "say", lines.append)
    return lines


def with_dla(version: str, *layers: tuple[str, str, bool]) -> Any:
    lib = fake(version)
    lib.script["Builder.num_DLA_cores"] = 2
    lib.layers(*(layers or LAYERS))
    return lib


def calibration(version: str, precision: str) -> Calibration | None:
    """What INT8 on DLA needs, where it needs it."""
    return CACHE if precision == "int8" and version in IMPLICIT else None


@every
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_every_version_is_told_to_use_the_core(version: str, precision: str, said: list[str]) -> None:
    lib = with_dla(version)
    built = build(lib, b"onnx", precision, CORE, calibration(version, precision))
    assert built.plan == b"plan"
    assert lib.set_to("IBuilderConfig.default_device_type") is lib.DeviceType.DLA
    assert lib.set_to("IBuilderConfig.DLA_core") == 1
    flags = {"FP16"} if precision == "fp16" else {"FP16", "INT8"}
    assert lib.asked() == {"GPU_FALLBACK"} | (flags if version in IMPLICIT else set())
    [(network,)] = lib.called("Builder.create_network")
    typed = getattr(lib.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    assert (typed is not None and bool(network >> int(typed) & 1)) == (version not in IMPLICIT)
    assert lib.called("ITensor.shape=") == [((2, 3, 64, 64),)]
    assert built.on_gpu == ["avgpool", "fc"]
    assert built.notes == said == ["2 of 4 layers run on DLA; on the GPU: avgpool (REDUCE), fc (MATRIX_MULTIPLY)"]


@every
def test_nothing_of_dla_is_touched_without_a_core(version: str, said: list[str]) -> None:
    lib = with_dla(version)
    built = build(lib, b"onnx", "fp16", Options())
    assert not [name for name, _ in lib.calls if "DLA" in name or "device_type" in name]
    assert "GPU_FALLBACK" not in lib.flags()
    assert (built.on_gpu, built.notes, said) == ([], [], [])


@every
@pytest.mark.parametrize(("cores", "core"), [(0, 0), (1, 1), (2, 2)])
def test_a_core_that_is_not_there(version: str, cores: int, core: int) -> None:
    lib = with_dla(version)
    lib.script["Builder.num_DLA_cores"] = cores
    with pytest.raises(UsageError, match=rf"{version.removeprefix('rtx-')} has no DLA core {core} here") as caught:
        build(lib, b"onnx", "fp16", Options(dla_core=core, profile=(1, 1, 1)))
    assert caught.value.evidence == f"it counts {cores}"
    assert "Orin Nano and Thor have no DLA, and TensorRT 10.8 to 11.3 do not support it" in caught.value.hint
    assert not lib.called("OnnxParser.parse")


@every
def test_a_layer_that_the_network_does_not_give(version: str) -> None:
    lib = with_dla(version)
    lib.script["INetworkDefinition.get_layer"] = lambda *_: lib.say("ERROR", "index out of range")
    with pytest.raises(BuildError, match="could not give layer 0\nindex out of range"):
        build(lib, b"onnx", "fp16", CORE)


@every
def test_all_layers_on_dla(version: str, said: list[str]) -> None:
    lib = with_dla(version, *LAYERS[:3])
    built = build(lib, b"onnx", "fp16", Options(dla_core=0, profile=(1, 1, 1), gpu_fallback=False))
    assert lib.set_to("IBuilderConfig.DLA_core") == 0
    assert "GPU_FALLBACK" not in lib.flags()
    assert (built.on_gpu, said) == ([], ["2 of 2 layers run on DLA"])


@every
@pytest.mark.parametrize(
    ("options", "allowed"),
    [({"gpu_fallback": False}, "none"), ({"max_fallback": 0}, "none"), ({"max_fallback": 1}, "1")],
)
def test_too_many_layers_on_the_gpu_end_it_before_the_build(
    version: str, options: dict[str, Any], allowed: str
) -> None:
    lib = with_dla(version)
    with pytest.raises(BuildError, match=f"2 of 4 layers cannot run on DLA, and {allowed} may run") as caught:
        build(lib, b"onnx", "fp16", Options(dla_core=0, profile=(1, 1, 1), **options))
    assert caught.value.evidence == "avgpool (REDUCE)\nfc (MATRIX_MULTIPLY)"
    assert not lib.called("Builder.build_serialized_network")


def test_as_many_layers_on_the_gpu_as_there_may_be(said: list[str]) -> None:
    options = Options(dla_core=0, profile=(1, 1, 1), max_fallback=2)
    assert build(with_dla("10.3.0"), b"onnx", "fp16", options).on_gpu == ["avgpool", "fc"]


def test_a_line_names_ten_layers(said: list[str]) -> None:
    built = build(with_dla("10.3.0", *((f"l{i}", "SHUFFLE", False) for i in range(12))), b"onnx", "fp16", CORE)
    assert said[0].startswith("0 of 12 layers run on DLA; on the GPU: l0 (SHUFFLE), l1 (SHUFFLE)")
    assert said[0].endswith("l9 (SHUFFLE) and 2 more")
    assert len(built.on_gpu) == 12


@every
def test_dla_asks_whether_a_layer_fits_after_its_precision_is_set(version: str, said: list[str]) -> None:
    lib = with_dla(version)
    build(lib, b"onnx", "int8", CORE, calibration(version, "int8"))
    names = [name for name, _ in lib.calls]
    for before in ("IBuilderConfig.set_flag", "IBuilderConfig.default_device_type=", "ITensor.shape="):
        assert names.index(before) < names.index("IBuilderConfig.can_run_on_DLA")


@every
def test_dla_runs_no_fp32(version: str) -> None:
    with pytest.raises(UsageError, match="DLA does not run FP32\nit runs FP16 and INT8"):
        build(with_dla(version), b"onnx", "fp32", CORE)


@every
def test_dla_runs_one_batch(version: str, said: list[str]) -> None:
    lib = with_dla(version)
    with pytest.raises(UsageError, match=r"DLA runs one batch, not 1 to 32\n.*profile = \[8, 8, 8\]"):
        build(lib, b"onnx", "fp16", Options(dla_core=0))
    lib.script["ITensor.shape"] = (4, 3, 64, 64)
    assert build(lib, b"onnx", "fp16", Options(dla_core=0)).plan == b"plan"  # the model's own
    assert not lib.called("ITensor.shape=")


@every
def test_int8_on_dla_takes_a_cache_where_there_are_calibrators(version: str, said: list[str]) -> None:
    lib = with_dla(version)
    if version in IMPLICIT:
        with pytest.raises(UsageError, match="takes INT8 from a calibration cache, not from Q/DQ nodes"):
            build(lib, b"onnx", "int8", CORE)
        with pytest.raises(UsageError, match="DLA takes no minmax calibrator"):
            build(lib, b"onnx", "int8", CORE, Calibration(CACHE.cache, algorithm="minmax"))
    else:
        assert build(lib, b"onnx", "int8", CORE).plan == b"plan"


def test_pools_of_dla_are_set(said: list[str]) -> None:
    lib = with_dla("10.3.0")
    options = Options(dla_core=0, profile=(1, 1, 1), dla_sram=1, dla_local_dram=512, dla_global_dram=256)
    build(lib, b"onnx", "fp16", options)
    assert {pool.name: size >> 20 for pool, size in lib.called("IBuilderConfig.set_memory_pool_limit")} == {
        "DLA_MANAGED_SRAM": 1,
        "DLA_LOCAL_DRAM": 512,
        "DLA_GLOBAL_DRAM": 256,
    }


def test_memory_that_runs_short_leaves_dla_its_batch(said: list[str]) -> None:
    lib = with_dla("10.3.0")
    left = ["out of memory"] * 5
    lib.script["Builder.build_serialized_network"] = lambda *_: (
        lib.say("ERROR", left.pop()) if left else lib.make("IHostMemory")
    )
    built = build(lib, b"onnx", "fp16", CORE)
    assert (built.options.dla_core, built.options.profile) == (1, (1, 1, 1))
    assert [note for note in built.notes if "DLA" in note] == said[-1:]  # once, though each attempt said it
