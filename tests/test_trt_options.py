"""What each version of TensorRT is asked for, by options: against fakes of nine versions."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from fake_tensorrt import VERSIONS, fake

from edgeres.errors import BuildError, UsageError
from edgeres.recipe import from_dict, read_record
from edgeres.trt import Options, build_plan
from edgeres.trt.options import MIB, POOLS

WEAK = ["8.6.1"]
RTX = [v for v in VERSIONS if v.startswith("rtx")]
every = pytest.mark.parametrize("version", VERSIONS)


@every
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_precision_is_the_graphs_own_except_in_version_8(version: str, precision: str) -> None:
    lib = fake(version)
    assert build_plan(lib, b"onnx", precision, Options()).plan == b"plan"
    weak = {"fp32": set(), "fp16": {"FP16"}, "int8": {"FP16", "INT8"}}[precision]
    assert lib.asked() == (weak if version in WEAK else set())  # without TF32


@every
def test_network_flags(version: str) -> None:
    lib = fake(version)
    build_plan(lib, b"onnx", "int8", Options())
    [(flags,)] = lib.called("Builder.create_network")
    kind = lib.NetworkDefinitionCreationFlag
    asked = {member.name for member in kind if flags >> int(member) & 1}
    assert flags < 1 << (max(int(member) for member in kind) + 1)
    assert ("EXPLICIT_BATCH" in asked) == hasattr(kind, "EXPLICIT_BATCH")
    assert ("STRONGLY_TYPED" in asked) == (version not in WEAK)
    assert asked <= {"EXPLICIT_BATCH", "STRONGLY_TYPED"}


def test_a_version_without_either_flag_is_strongly_typed() -> None:
    lib = fake("11.4.0.106")
    del lib.NetworkDefinitionCreationFlag
    lib.NetworkDefinitionCreationFlag = fake("8.6.1").DeviceType  # any enum without these members
    build_plan(lib, b"onnx", "int8", Options())
    assert lib.called("Builder.create_network") == [(0,)]
    assert lib.asked() == set()


@every
def test_the_parser_gets_the_bytes_and_the_layers_keep_their_names(version: str) -> None:
    lib = fake(version)
    build_plan(lib, b"onnx", "fp32", Options())
    assert lib.called("OnnxParser.parse") == [(b"onnx", None)]
    assert lib.set_to("IBuilderConfig.profiling_verbosity") is lib.ProfilingVerbosity.DETAILED


@every
@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        (Options(level=1), "builder_optimization_level", 1),
        (Options(level=0), "builder_optimization_level", 0),
        (Options(aux_streams=0), "max_aux_streams", 0),
    ],
)
def test_numbers_are_set(version: str, options: Options, name: str, value: int) -> None:
    lib = fake(version)
    build_plan(lib, b"onnx", "fp32", options)
    assert lib.called(f"IBuilderConfig.{name}=") == [(value,)]


@every
def test_what_is_not_asked_for_is_left_to_the_library(version: str) -> None:
    lib = fake(version)
    build_plan(lib, b"onnx", "fp32", Options())
    touched = {name for name, _ in lib.calls if name.startswith("IBuilderConfig.")}
    touched -= {"IBuilderConfig.progress_monitor=", "IBuilderConfig.clear_flag"}
    assert lib.asked() == set()
    touched.discard("IBuilderConfig.set_flag")
    assert touched == {"IBuilderConfig.profiling_verbosity=", "IBuilderConfig.add_optimization_profile"}


@every
@pytest.mark.parametrize("option", POOLS)
def test_a_pool_is_set_or_refused(version: str, option: str) -> None:
    lib = fake(version)
    lib.script["Builder.num_DLA_cores"] = 2
    lib.script["ITensor.shape"] = (1, 3, 64, 64)
    dla = {"dla_core": 1} if option.startswith("dla") else {}
    options = Options(**{option: 0.25}, **dla)
    if (version, option) == ("8.6.1", "tactic_shared_memory"):
        with pytest.raises(UsageError, match=r"TensorRT 8\.6\.1 has no tactic_shared_memory to limit"):
            build_plan(lib, b"onnx", "fp16", options)
    else:
        build_plan(lib, b"onnx", "fp16", options)
        pool = getattr(lib.MemoryPoolType, POOLS[option])
        assert lib.called("IBuilderConfig.set_memory_pool_limit") == [(pool, 1 << 18)]


@every
def test_a_pool_that_the_library_does_not_take_is_an_error(version: str) -> None:
    lib = fake(version)
    lib.script["IBuilderConfig.set_memory_pool_limit"] = lambda *_: lib.say("ERROR", "less than 1 GiB, please")
    with pytest.raises(BuildError, match="takes no tactic_memory of 2,147,483,648 bytes\nless than 1 GiB, please"):
        build_plan(lib, b"onnx", "fp32", Options(tactic_memory=2048))


def test_a_refused_pool_tells_what_it_stays_at() -> None:
    lib = fake("10.3.0")
    lib.script["IBuilderConfig.set_memory_pool_limit"] = None
    with pytest.raises(BuildError, match="takes no workspace of 1,048,576 bytes\nit stays at 8,589,934,592"):
        build_plan(lib, b"onnx", "fp32", Options(workspace=1))


@every
@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (Options(tf32=True), "TF32"),
        (Options(version_compatible=True), "VERSION_COMPATIBLE"),
        (Options(strip=True), "STRIP_PLAN"),
        (Options(refit=True), "REFIT"),
        (Options(sparse=True), "SPARSE_WEIGHTS"),
    ],
)
def test_flags_are_set_or_refused(version: str, options: Options, flag: str) -> None:
    lib = fake(version)
    if version in RTX and flag == "VERSION_COMPATIBLE":  # it has the flag, and its plans are for one release
        with pytest.raises(UsageError, match="has no version-compatible plans"):
            build_plan(lib, b"onnx", "fp32", options)
    elif hasattr(lib.BuilderFlag, flag):
        build_plan(lib, b"onnx", "fp32", options)
        named = getattr(lib.BuilderFlag, flag).name  # the first of two names for one number
        assert lib.asked() == {named}
    else:
        assert (version, flag) == ("8.6.1", "STRIP_PLAN")
        with pytest.raises(UsageError, match=r"TensorRT 8\.6\.1 has no strip plan"):
            build_plan(lib, b"onnx", "fp32", options)


@every
def test_any_call_can_be_captured_in_a_cuda_graph(version: str) -> None:
    lib = fake(version)
    build_plan(lib, b"onnx", "fp32", Options())
    assert ("REQUIRE_USER_ALLOCATION" in lib.flags()) is (version in RTX)


@every
@pytest.mark.parametrize(
    ("option", "level"), [("ampere-plus", "AMPERE_PLUS"), ("same-compute-capability", "SAME_COMPUTE_CAPABILITY")]
)
def test_hardware_compatibility(version: str, option: str, level: str) -> None:
    lib = fake(version)
    options = Options(hardware=option)
    if version in RTX:
        with pytest.raises(UsageError, match="name compute capabilities"):
            build_plan(lib, b"onnx", "fp32", options)
    elif level == "SAME_COMPUTE_CAPABILITY" and version in ("8.6.1", "10.0.1", "10.3.0", "10.8.0.43"):
        with pytest.raises(UsageError, match=r"no hardware 'same-compute-capability'\nchoose from: none, ampere-plus$"):
            build_plan(lib, b"onnx", "fp32", options)
    else:
        build_plan(lib, b"onnx", "fp32", options)
        wanted = getattr(lib.HardwareCompatibilityLevel, level)
        assert lib.called("IBuilderConfig.hardware_compatibility_level=") == [(wanted,)]


@every
@pytest.mark.parametrize(
    ("option", "member"), [("detailed", "DETAILED"), ("names", "LAYER_NAMES_ONLY"), ("none", "NONE")]
)
def test_verbosity(version: str, option: str, member: str) -> None:
    lib = fake(version)
    build_plan(lib, b"onnx", "fp32", Options(verbosity=option))
    assert lib.called("IBuilderConfig.profiling_verbosity=") == [(getattr(lib.ProfilingVerbosity, member),)]


@every
def test_compute_capabilities_are_a_matter_of_rtx(version: str) -> None:
    lib = fake(version)
    options = Options(capabilities=("8.6", "12.0", "8.6"))
    if version in RTX:
        build_plan(lib, b"onnx", "fp32", options)
        assert lib.set_to("IBuilderConfig.num_compute_capabilities") == 2
        sm = lib.ComputeCapability
        assert lib.called("IBuilderConfig.set_compute_capability") == [(sm.SM86, 0), (sm.SM120, 1)]
    else:
        with pytest.raises(UsageError, match="for the GPU at hand only"):
            build_plan(lib, b"onnx", "fp32", options)


def test_a_compute_capability_may_be_unknown_or_refused() -> None:
    lib = fake(RTX[0])
    with pytest.raises(UsageError, match=r"capability 8\.7, 9\.0\n.*: 7\.5, 8\.0, 8\.6, 8\.9, 12\.0, 12\.1$"):
        build_plan(lib, b"onnx", "fp32", Options(capabilities=("8.7", "8.6", "9.0")))
    lib.script["IBuilderConfig.set_compute_capability"] = False
    with pytest.raises(BuildError, match=r"refused compute capability 8\.6\nname fewer"):
        build_plan(lib, b"onnx", "fp32", Options(capabilities=("8.6",)))


@every
def test_dynamic_batch_gets_a_profile_and_static_batch_none(version: str) -> None:
    lib = fake(version)
    for profile in ((2, 4, 16), (1, 8, 8), (2, 2, 8)):
        lib.calls.clear()
        build_plan(lib, b"onnx", "fp32", Options(profile=profile))
        assert lib.called("IOptimizationProfile.set_shape") == [("input", *((n, 3, 64, 64) for n in profile))]
    assert len(lib.called("IBuilderConfig.add_optimization_profile")) == 1
    lib = fake(version)
    lib.script["ITensor.shape"] = (1, 3, 64, 64)
    build_plan(lib, b"onnx", "fp32", Options(profile=(2, 4, 16)))
    assert not lib.called("Builder.create_optimization_profile")


@every
def test_one_batch_makes_the_input_static(version: str) -> None:
    lib = fake(version)
    build_plan(lib, b"onnx", "fp32", Options(profile=(4, 4, 4)))
    assert lib.called("ITensor.shape=") == [((4, 3, 64, 64),)]
    assert not lib.called("Builder.create_optimization_profile")
    lib = fake(version)
    lib.script["ITensor.shape"] = (1, 3, 64, 64)
    build_plan(lib, b"onnx", "fp32", Options(profile=(4, 4, 4)))
    assert not lib.called("ITensor.shape=")  # it is so already


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": (4, 2, 8)}, r"\(4, 2, 8\) are not smallest"),
        ({"profile": (1, 8, 4)}, "are not smallest"),
        ({"profile": (0, 2, 8)}, "are not smallest"),
        ({"profile": (1, 2)}, "are not smallest"),
        ({"workspace": 0}, "workspace of 0 MiB"),
        ({"workspace": 1e-7}, "workspace of 1e-07 MiB"),
        ({"workspace": float("inf")}, "workspace of inf MiB"),
        ({"tactic_memory": -1}, "tactic_memory of -1 MiB"),
        ({"tactic_shared_memory": float("nan")}, "tactic_shared_memory of nan MiB"),
        ({"hardware": "ampere"}, "did you mean 'ampere-plus'"),
        ({"verbosity": "name"}, "did you mean 'names'"),
        ({"level": 6}, "level 6"),
        ({"level": -1}, "level -1"),
        ({"aux_streams": -1}, "-1 auxiliary"),
        ({"dla_core": -1}, "DLA core -1"),
        ({"dla_core": 0, "max_fallback": -1}, "max_fallback of -1"),
        ({"dla_core": 0, "max_fallback": 2, "gpu_fallback": False}, "max_fallback 2 without gpu_fallback"),
        ({"dla_core": 0, "dla_sram": 3}, "dla_sram of 3 MiB\nDLA takes powers of two"),
        ({"dla_core": 0, "dla_local_dram": 0.001953125}, "dla_local_dram of 0.001953125 MiB"),
        ({"dla_core": 0, "dla_global_dram": 1 + 1e-7}, "dla_global_dram of 1.0000001 MiB"),
        ({"gpu_fallback": False}, "gpu_fallback without DLA"),
        ({"max_fallback": 0, "dla_sram": 1}, "max_fallback, dla_sram without DLA\nsay dla_core = 0 too"),
    ],
)
def test_numbers_without_sense_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Options(**options)


def test_sizes_are_in_mib() -> None:
    options = Options(workspace=0.5, dla_core=0, dla_sram=1 / 256, dla_global_dram=512, tactic_memory=1.1)
    assert options.pools() == {
        "workspace": MIB // 2,
        "tactic_memory": 1_153_433,
        "dla_sram": 4096,
        "dla_global_dram": 512 * MIB,
    }


def test_every_option_but_the_timing_cache_is_read_from_toml() -> None:
    asked = {
        "profile": (2, 2, 2),
        "workspace": 256.5,
        "tactic_memory": 1024.0,
        "tactic_shared_memory": 0.0625,
        "level": 2,
        "aux_streams": 1,
        "capabilities": ("8.6",),
        "hardware": "ampere-plus",
        "version_compatible": True,
        "strip": True,
        "refit": True,
        "tf32": True,
        "sparse": True,
        "verbosity": "none",
        "dla_core": 1,
        "gpu_fallback": False,
        "max_fallback": 0,
        "dla_sram": 0.5,
        "dla_local_dram": 1024.0,
        "dla_global_dram": 512.0,
    }
    assert set(asked) == {f.name for f in fields(Options)} - {"timing_cache"}
    lines = {name: list(value) if isinstance(value, tuple) else value for name, value in asked.items()}
    text = "\n".join(
        f"{name} = {str(value).lower() if isinstance(value, bool) else repr(value)}" for name, value in lines.items()
    )
    assert read_record(Options, text, "this test") == Options(**asked)
    with pytest.raises(UsageError, match="unknown key 'timing_cache'"):
        from_dict(Options, {"timing_cache": Path("timings")})
