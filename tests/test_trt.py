"""TensorRT as a builder, against fakes of nine versions; TensorRT-RTX for real, which builds without a GPU."""

from __future__ import annotations

import _thread
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import SURFACES, VERSIONS, fake
from onnx import TensorProto, helper, numpy_helper

from edgeres import trt
from edgeres.errors import BuildError, MissingDependency, UsageError
from edgeres.trt import Calibration, Options, OutOfMemory, bindings, build, build_plan, builder
from edgeres.trt.configure import set_batches
from edgeres.trt.options import MIB

WEAK = ["8.6.1"]
RTX = [v for v in VERSIONS if v.startswith("rtx")]
FULL = [v for v in VERSIONS if v not in RTX]
TWO = pytest.mark.parametrize("version", ["8.6.1", "11.4.0.106"])
every = pytest.mark.parametrize("version", VERSIONS)
NO_KERNEL = "Error Code 10: Internal Error (Could not find any implementation for node {conv1 + relu}.)"
NO_MEMORY = "Error Code 1: Cuda Runtime (out of memory)"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the user was told."""
    lines: list[str] = []
    monkeypatch.setattr(builder, "say", lines.append)
    return lines


def failing(lib: Any, *errors: str, severity: str = "ERROR") -> None:
    """Let every build of ``lib`` log ``errors`` and return nothing."""

    def fail(*_: Any) -> None:
        for error in errors:
            lib.say(severity, error)

    lib.script["Builder.build_serialized_network"] = fail


# timing cache

full = pytest.mark.parametrize("version", FULL)


def caching(lib: Any, fits: Callable[[bytes], bool]) -> list[bytes]:
    """Let ``lib`` take a timing cache where its content ``fits``, and return what it was offered."""
    offered: list[bytes] = []

    def create(self: Any, content: bytes) -> Any:
        offered.append(content)
        return lib.make("ITimingCache")

    lib.script["IBuilderConfig.create_timing_cache"] = create
    lib.script["IBuilderConfig.set_timing_cache"] = lambda self, cache, ignore: fits(offered[-1])
    return offered


@full
def test_a_timing_cache_is_made_and_kept(version: str, tmp_path: Path, said: list[str]) -> None:
    lib, path = fake(version), tmp_path / "folder" / "timings"
    offered = caching(lib, lambda content: True)
    build_plan(lib, b"onnx", "fp32", Options(timing_cache=path))
    assert offered == [b""]
    assert path.read_bytes() == b"plan"  # what any memory of the fake holds
    build_plan(lib, b"onnx", "fp32", Options(timing_cache=path))
    assert offered == [b"", b"plan"]
    assert {ignore for _, ignore in lib.called("IBuilderConfig.set_timing_cache")} == {False}
    assert not said


@full
def test_a_timing_cache_of_another_gpu_is_left_aside(version: str, tmp_path: Path, said: list[str]) -> None:
    lib, path = fake(version), tmp_path / "timings"
    path.write_bytes(b"foreign")
    offered = caching(lib, lambda content: content != b"foreign")
    build_plan(lib, b"onnx", "fp32", Options(timing_cache=path))
    assert offered == [b"foreign", b""]
    assert path.read_bytes() == b"plan"
    assert said == ["timings is of another GPU or TensorRT: measured anew"]


def test_a_damaged_timing_cache_is_left_aside(tmp_path: Path, said: list[str]) -> None:
    lib, path = fake("10.3.0"), tmp_path / "timings"
    path.write_bytes(b"damaged")
    lib.script["IBuilderConfig.create_timing_cache"] = lambda self, content: (
        None if content else lib.make("ITimingCache")
    )
    build_plan(lib, b"onnx", "fp32", Options(timing_cache=path))
    assert len(lib.called("IBuilderConfig.set_timing_cache")) == len(said) == 1


@pytest.mark.parametrize("nothing", ["IBuilderConfig.get_timing_cache", "ITimingCache.serialize"])
def test_no_timings_no_file(nothing: str, tmp_path: Path) -> None:
    lib, path = fake("11.0.0.114"), tmp_path / "timings"
    lib.script[nothing] = None
    assert build_plan(lib, b"onnx", "fp32", Options(timing_cache=path)).plan == b"plan"
    assert not path.exists()


def test_a_timing_cache_that_cannot_be_written_is_no_failure(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "timings", tmp_path):  # below a file; a folder
        assert build_plan(fake("10.3.0"), b"onnx", "fp32", Options(timing_cache=path)).plan == b"plan"
    assert len(said) == 2
    assert said[0].startswith("timings could not be kept: ")


def test_rtx_is_not_asked_for_timings(tmp_path: Path) -> None:
    lib = fake(RTX[0])
    build_plan(lib, b"onnx", "fp32", Options(timing_cache=tmp_path / "timings"))
    assert not [name for name, _ in lib.calls if "timing_cache" in name]
    assert not (tmp_path / "timings").exists()


# what goes wrong


@every
def test_a_builder_that_cannot_start(version: str) -> None:
    lib = fake(version)

    def nothing(self: Any, logger: Any) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    lib.script["Builder.__init__"] = nothing
    with pytest.raises(BuildError, match="cannot start") as caught:
        build_plan(lib, b"onnx", "fp32", Options())
    assert "nullptr" in caught.value.evidence
    assert "nvidia-smi" in caught.value.hint
    assert ("--target rtx" in caught.value.hint) == (version not in RTX)

    def loud(self: Any, logger: Any) -> None:
        logger.log(lib.ILogger.ERROR, "CUDA initialization failure with error: 35")
        nothing(self, logger)

    lib.script["Builder.__init__"] = loud
    with pytest.raises(BuildError) as caught:
        build_plan(lib, b"onnx", "fp32", Options())
    assert caught.value.evidence == "CUDA initialization failure with error: 35"


@TWO
@pytest.mark.parametrize(
    ("call", "what"),
    [
        ("Builder.create_network", "create a network"),
        ("Builder.create_builder_config", "create a configuration"),
        ("INetworkDefinition.get_input", "find an input"),
    ],
)
def test_nothing_where_something_is_due(version: str, call: str, what: str) -> None:
    lib = fake(version)
    lib.script[call] = lambda self, *_: lib.say("ERROR", "because of this")
    with pytest.raises(BuildError, match=f"could not {what}") as caught:
        build_plan(lib, b"onnx", "fp32", Options())
    assert caught.value.evidence == "because of this"
    assert caught.value.hint


def unreadable(lib: Any, errors: list[tuple[int, str, str, str]]) -> None:
    """Let the parser fail with ``errors``: node, name, operator, description."""
    made = []
    for error in errors:
        made.append(lib.make("ParserError"))
        made[-1].__dict__["about"] = error
    for i, call in enumerate(("node", "node_name", "node_operator", "desc")):
        lib.script[f"ParserError.{call}"] = lambda self, i=i: self.__dict__["about"][i]
    lib.script |= {"OnnxParser.parse": False, "OnnxParser.num_errors": len(errors)}
    lib.script["OnnxParser.get_error"] = lambda self, index: made[index]


@every
def test_every_parser_error_is_told(version: str) -> None:
    lib = fake(version)
    unreadable(lib, [(3, "conv1", "Conv", "no such kernel"), (5, "", "Relu", "odd"), (-1, "", "", "cut short")])
    with pytest.raises(BuildError, match="does not read this ONNX file") as caught:
        build_plan(lib, b"onnx", "int8", Options())
    named = ["node 3: no such kernel", "node 5: odd", "cut short"]
    if version not in WEAK:
        named = ["conv1 (Conv): no such kernel", "node 5 (Relu): odd", "cut short"]
    assert caught.value.evidence.split("\n") == named
    again = "make it for this target again: `edgeres quantize"
    assert caught.value.hint == f"{again}{' --tensorrt 8.6.1' if version in WEAK else ''}`"


@TWO
def test_a_parser_that_lists_nothing_leaves_the_log(version: str) -> None:
    lib = fake(version)
    lib.script["OnnxParser.parse"] = lambda self, *_: bool(lib.say("ERROR", "deserialize failed"))
    with pytest.raises(BuildError, match="does not read") as caught:
        build_plan(lib, b"onnx", "fp32", Options())
    assert caught.value.evidence == "deserialize failed"
    assert caught.value.hint == "make it for this target again: `edgeres export`"


@every
def test_a_refused_profile(version: str) -> None:
    lib = fake(version)
    lib.script["IBuilderConfig.add_optimization_profile"] = lambda *_: lib.say("ERROR", "not valid") or -1
    with pytest.raises(BuildError, match=r"takes no batches \(1, 8, 32\) of \(3, 64, 64\)") as caught:
        build_plan(lib, b"onnx", "fp32", Options())
    assert caught.value.evidence == "not valid"


@every
def test_a_failed_build_tells_what_was_logged(version: str) -> None:
    lib = fake(version)
    failing(lib, "first", "second", "first")
    with pytest.raises(BuildError, match="built no engine") as caught:
        build_plan(lib, b"onnx", "int8", Options())
    assert caught.value.evidence == "first\nsecond"  # each once
    assert not isinstance(caught.value, OutOfMemory)
    assert "TensorRT's own" in caught.value.hint
    failing(lib, "third")
    with pytest.raises(BuildError) as caught:
        build_plan(lib, b"onnx", "int8", Options())
    assert caught.value.evidence == "third"  # nothing of the build before, and from the one logger there is


def test_builds_share_a_logger() -> None:
    lib = fake("10.3.0")
    build_plan(lib, b"onnx", "fp32", Options())
    build_plan(lib, b"onnx", "fp32", Options())
    assert len(lib.used) > 2
    assert len({id(logger) for logger in lib.used}) == 1


def test_warnings_and_harmless_words_are_no_evidence() -> None:
    lib = fake("10.3.0")

    def fail(*_: Any) -> None:
        lib.say("INTERNAL_ERROR", "Thread context has not been set")
        lib.say("WARNING", "Some tactics do not have sufficient workspace memory to run.")
        lib.say("INFO", "out of memory, had it been an error")
        lib.say("INTERNAL_ERROR", " broken ")

    lib.script["Builder.build_serialized_network"] = fail
    with pytest.raises(BuildError) as caught:
        build_plan(lib, b"onnx", "fp32", Options())
    assert caught.value.evidence == "broken"
    assert caught.value.hint.startswith("likely a workspace too small")  # what a warning gives away


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        (NO_MEMORY, "likely too little memory"),
        ("Error Code 2: OutOfMemory (no further information)", "likely too little memory"),
        ("no tactics to implement the operation within workspace limit.", "likely a workspace too small"),
        ("graph_jit.cpp:278: CHECK(status == CUDA_SUCCESS) failed.", "likely no NVIDIA GPU here, or a driver too old"),
        ("Unable to load library: libnvinfer_lean.so.1", "likely version-compatible plans need .* lean runtime"),
        ("Cannot compile operation 'fc' for Turing (SM75): FP32 GEMM is not supported.", r"capability 7\.5"),
        ("an error while capturing", "TensorRT's own"),
    ],
)
def test_hints(message: str, hint: str) -> None:
    lib = fake("10.3.0")
    failing(lib, message)
    with pytest.raises(BuildError, match=hint) as caught:
        build_plan(lib, b"onnx", "fp32", Options())
    assert caught.value.evidence == message


def test_several_causes_are_numbered() -> None:
    lib = fake("10.3.0")
    failing(lib, NO_KERNEL, "cudaError 35")
    with pytest.raises(OutOfMemory) as caught:
        build_plan(lib, b"onnx", "fp32", Options())
    head, *causes = caught.value.hint.split("\n")
    assert head == "likely one of:"
    assert [cause.split(":")[0] for cause in causes] == [
        "1. too little memory",
        "2. a workspace too small for some layer",
        "3. no NVIDIA GPU here, or a driver too old for this TensorRT",
    ]


@every
def test_refitting_with_rtx_needs_a_gpu(version: str) -> None:
    lib = fake(version)
    failing(lib, "CHECK(sm_vers_.size() == 1) failed")
    with pytest.raises(BuildError) as caught:
        build_plan(lib, b"onnx", "fp32", Options(refit=True))
    assert ("need a GPU here" in caught.value.hint) == (version in RTX)


# less memory


def attempts(lib: Any) -> list[tuple[Any, ...]]:
    """Workspace, level, auxiliary streams and profile of each build."""
    builds: list[tuple[Any, ...]] = []
    for name, args in lib.calls:
        if name == "Builder.create_builder_config":
            builds.append([None, None, None, None])
        if name == "IBuilderConfig.set_memory_pool_limit":
            builds[-1][0] = args[1]
        if name == "IBuilderConfig.builder_optimization_level=":
            builds[-1][1] = args[0]
        if name == "IBuilderConfig.max_aux_streams=":
            builds[-1][2] = args[0]
        if name == "IOptimizationProfile.set_shape":
            builds[-1][3] = tuple(shape[0] for shape in args[1:])
        if name == "ITensor.shape=":
            builds[-1][3] = args[0][0]
    return [tuple(b) for b in builds]


@every
@pytest.mark.parametrize("message", [NO_MEMORY, NO_KERNEL])
def test_less_and_less_while_memory_runs_short(version: str, message: str, said: list[str]) -> None:
    lib = fake(version)
    failing(lib, message)
    with pytest.raises(OutOfMemory, match="ran short of memory"):
        build(lib, b"onnx", "int8", Options(profile=(1, 4, 8)))
    half, quarter = 4 << 30, 2 << 30  # of the fake's 8 GiB
    assert attempts(lib) == [
        (None, None, None, (1, 4, 8)),
        (half, None, None, (1, 4, 8)),
        (quarter, None, None, (1, 4, 8)),
        (quarter, 1, None, (1, 4, 8)),
        (quarter, 1, 0, (1, 4, 8)),
        (quarter, 1, 0, 1),  # static
    ]
    assert said == [
        f"memory ran short: again with {what}"
        for what in (
            "half the workspace",
            "a quarter of the workspace",
            "optimization level 1",
            "no auxiliary streams",
            "batch 1 only",
        )
    ]


def test_what_tensorrt_warns_of_is_told_and_kept(said: list[str]) -> None:
    lib = fake("10.3.0")
    words = ["Weights had values that FP16 clips.", "Layers run on the GPU.\nThey are slow there."]

    def warn(*_: Any) -> Any:
        for severity, message in (
            ("INFO", "fine"),
            ("WARNING", words[0]),
            ("WARNING", words[1]),
            ("WARNING", words[0]),
        ):
            lib.say(severity, message)
        return lib.make("IHostMemory")

    lib.script["Builder.build_serialized_network"] = warn
    built = build(lib, b"onnx", "fp16", Options())
    assert (built.warnings, built.notes) == (words, [])
    assert said == [f"TensorRT 10.3.0 warns: {words[0]} (and 1 more, see engine.json)"]
    assert build(fake("10.3.0"), b"onnx", "fp16", Options()).warnings == []
    assert len(said) == 1


def test_the_first_that_fits_ends_it(said: list[str]) -> None:
    lib = fake("10.3.0")
    left = [NO_MEMORY, NO_MEMORY]

    def fit(*_: Any) -> Any:
        return lib.say("ERROR", left.pop()) if left else lib.make("IHostMemory")

    lib.script["Builder.build_serialized_network"] = fit
    asked = Options(workspace=1024, level=4, refit=True)
    built = build(lib, b"onnx", "int8", asked)
    assert (built.plan, built.options) == (b"plan", replace(asked, workspace=256))
    assert built.notes == said
    assert len(said) == 2


def test_what_is_so_already_is_not_tried_again() -> None:
    lib = fake("10.3.0")
    lib.script["ITensor.shape"] = (1, 3, 64, 64)
    failing(lib, NO_MEMORY)
    with pytest.raises(OutOfMemory):
        build(lib, b"onnx", "int8", Options(workspace=1000 / MIB, level=0, aux_streams=0))
    assert attempts(lib) == [(n, 0, 0, None) for n in (1000, 500, 250)]


def test_one_batch_above_1_becomes_1_in_the_end() -> None:
    lib = fake("10.3.0")
    failing(lib, NO_MEMORY)
    with pytest.raises(OutOfMemory):
        build(lib, b"onnx", "int8", Options(profile=(4, 4, 4), workspace=1, level=0, aux_streams=0))
    assert [batch for *_, batch in attempts(lib)] == [4, 4, 4, 1]


def test_a_workspace_asked_for_too_small_is_not_made_smaller() -> None:
    requested = "Error Code 2: OutOfMemory (Requested size was 2000 bytes.)"
    limited = "no tactics to implement the operation within workspace limit."
    for message, workspace, builds in (
        (requested, 1999, 1),
        (requested, 2000, 6),  # so it was not that, and smaller ones are worth a try
        (requested, None, 6),
        (limited, 2000, 1),
        (limited, None, 6),
    ):
        lib = fake("10.3.0")
        failing(lib, message)
        with pytest.raises(OutOfMemory, match="workspace too small"):
            build(lib, b"onnx", "int8", Options(workspace=workspace and workspace / MIB))
        assert len(attempts(lib)) == builds


@TWO
def test_other_errors_are_not_retried(version: str, said: list[str]) -> None:
    lib = fake(version)
    failing(lib, "unsupported data type")
    with pytest.raises(BuildError, match="built no engine"):
        build(lib, b"onnx", "int8", Options())
    failing(lib, NO_MEMORY, severity="WARNING")  # tactics that did not fit are skipped all the time
    with pytest.raises(BuildError, match="built no engine"):
        build(lib, b"onnx", "int8", Options())
    assert len(attempts(lib)) == 2
    assert not said


# progress and Ctrl-C


@pytest.mark.parametrize("version", [v for v in VERSIONS if v not in WEAK])
def test_progress_is_shown(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lib, shown, texts = fake(version), threading.Event(), []

    @contextmanager
    def busy(what: str) -> Iterator[Callable[[str], None]]:
        yield lambda text: (texts.append(text), shown.set() if "1/48" in text else None)

    def slow(builder: Any, network: Any, config: Any) -> Any:
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        monitor.phase_start("Choosing kernels", "Building", 48)
        assert monitor.step_complete("Choosing kernels", 0)
        assert shown.wait(10)
        monitor.phase_finish("Choosing kernels")
        return lib.make("IHostMemory")

    monkeypatch.setattr(builder, "busy", busy)
    lib.script["Builder.build_serialized_network"] = slow
    assert build_plan(lib, b"onnx", "fp32", Options()).plan == b"plan"
    assert "build Choosing kernels 1/48, 0 s" in texts


def test_time_goes_by_where_there_is_nothing_else_to_show(monkeypatch: pytest.MonkeyPatch) -> None:
    lib, shown, texts = fake("8.6.1"), threading.Event(), []
    clock = iter(range(0, 10_000, 7))

    @contextmanager
    def busy(what: str) -> Iterator[Callable[[str], None]]:
        yield lambda text: (texts.append(text), shown.set() if len(texts) == 3 else None)

    monkeypatch.setattr(builder, "busy", busy)
    monkeypatch.setattr(builder, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    lib.script["Builder.build_serialized_network"] = lambda *_: shown.wait(10) and lib.make("IHostMemory")
    assert build_plan(lib, b"onnx", "fp32", Options()).plan == b"plan"
    assert texts[:3] == ["build 7 s", "build 14 s", "build 21 s"]


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once the main thread waits for the build, as it does when somebody has the time to press Ctrl-C."""
    event = threading.Event()

    @contextmanager
    def busy(what: str) -> Iterator[Callable[[str], None]]:
        yield lambda text: event.set()

    monkeypatch.setattr(builder, "busy", busy)
    return event


@pytest.mark.parametrize("version", [v for v in VERSIONS if v not in WEAK])
def test_ctrl_c_ends_the_build_at_its_next_step(version: str, said: list[str], waiting: threading.Event) -> None:
    lib, ended = fake(version), []

    def endless(builder: Any, network: Any, config: Any) -> None:
        config.progress_monitor.phase_start("Building", None, 1_000_000)
        waiting.wait(10)
        _thread.interrupt_main()
        until = time.monotonic() + 20
        while time.monotonic() < until:
            if not config.progress_monitor.step_complete("Building", 0):
                return ended.append("at a step")
            time.sleep(0.01)
        return ended.append("by itself")

    lib.script["Builder.build_serialized_network"] = endless
    with pytest.raises(KeyboardInterrupt):
        build(lib, b"onnx", "fp32", Options())
    assert ended == ["at a step"]
    assert said == ["stopping"]


def test_ctrl_c_waits_where_a_build_cannot_be_ended(said: list[str], waiting: threading.Event) -> None:
    lib, ended = fake("8.6.1"), []

    def deaf(builder: Any, network: Any, config: Any) -> None:
        waiting.wait(10)
        _thread.interrupt_main()
        time.sleep(0.5)
        ended.append(True)

    lib.script["Builder.build_serialized_network"] = deaf
    with pytest.raises(KeyboardInterrupt):
        build_plan(lib, b"onnx", "fp32", Options())
    assert ended
    assert said == ["TensorRT 8.6.1 cannot stop in the middle: waiting for it to finish"]


# the libraries themselves


def test_a_library_may_be_missing_or_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trt.EXECUTORS, "tensorrt", ("tensorrt_of_nowhere", "tensorrt"))
    with pytest.raises(MissingDependency, match=r"edgeres\[tensorrt\]"):
        trt.load_library("tensorrt")

    def broken(*_: str) -> None:
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(bindings, "need", broken)
    with pytest.raises(MissingDependency, match=r"does not load\nlibnvinfer.so.10"):
        trt.load_library("tensorrt")


def test_the_fake_is_as_strict_as_the_bindings() -> None:
    lib = fake("10.3.0")
    for wrong in (
        lambda: lib.ComputeCapability,
        lambda: lib.BuilderFlag.STRICT_TYPES,
        lambda: lib.make("IBuilderConfig").max_workspace_size,
        lambda: setattr(lib.make("IBuilderConfig"), "bogus", 1),
        lambda: lib.make("OnnxParser").load_model_proto(b""),
    ):
        with pytest.raises(AttributeError):
            wrong()
    config = lib.make("IBuilderConfig")
    for wrong in (
        lambda: config.set_flag(3),
        lambda: config.set_flag(),
        lambda: config.set_flag(lib.BuilderFlag.FP16, 1),
        lambda: config.set_flag(flags=lib.BuilderFlag.FP16),
        lambda: 1 << lib.BuilderFlag.FP16,
        lib.IBuilderConfig,
        lambda: type("Silent", (lib.ILogger,), {"__init__": lambda self: None})(),
    ):
        with pytest.raises(TypeError):
            wrong()


@pytest.fixture(scope="module")
def rtx() -> Any:
    if (platform.system(), platform.machine()) not in (("Linux", "x86_64"), ("Windows", "AMD64")):
        pytest.skip("TensorRT-RTX has wheels for Linux and Windows on x86-64 only")
    return trt.load_library("tensorrt-rtx")


@pytest.fixture(scope="module")
def tiny(tiny_path: Path) -> bytes:
    return tiny_path.read_bytes()


def test_the_fake_has_what_the_real_one_has(rtx: Any) -> None:
    if not (SURFACES / f"rtx-{rtx.__version__}.json").exists():
        pytest.skip("the fake is of another version")
    lib = fake(f"rtx-{rtx.__version__}")
    kinds = {name: kind for name, kind in vars(lib).items() if isinstance(kind, type)}
    assert len(kinds) > 40
    for name, kind in kinds.items():
        real = getattr(rtx, name)
        members = getattr(kind, "__members__", None)
        if members is not None:
            assert {m: int(v) for m, v in members.items()} == {m: int(v) for m, v in real.__members__.items()}
        else:
            assert not [m for m in vars(kind) if m[0] != "_" and m != "lib" and not hasattr(real, m)], name


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(profile=(1, 1, 1)),
        Options(capabilities=("8.6", "12.0")),
        Options(level=1),
        Options(aux_streams=0),
        Options(workspace=256),
        Options(tactic_memory=4096, tactic_shared_memory=0.046875),
        Options(sparse=True, tf32=True),
        Options(verbosity="names"),
        Options(verbosity="none"),
        Options(timing_cache=Path("timings")),
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in vars(options).items() if v != getattr(Options, k)) or "none",
)
def test_rtx_builds_without_a_gpu(rtx: Any, tiny: bytes, options: Options) -> None:
    built = build(rtx, tiny, "fp32", options)
    assert len(built.plan) > 100_000
    assert built.options == options
    assert (built.notes, built.on_gpu, built.calibration_cache) == ([], [], None)
    assert not Path("timings").exists()


def test_rtx_makes_a_network_static(rtx: Any, tiny: bytes) -> None:
    for profile, batch, profiles in (((1, 4, 8), -1, 1), ((4, 4, 4), 4, 0)):
        options = Options(profile=profile)
        parts = builder._start(rtx, tiny, "fp32", options, False)
        set_batches(parts, options)
        ends = [parts.network.get_input(0), parts.network.get_output(0)]
        assert [tuple(tensor.shape) for tensor in ends] == [(batch, 3, 32, 32), (batch, 4)]
        assert parts.config.num_optimization_profiles == profiles


@pytest.mark.parametrize(
    ("precision", "options", "calibration", "message"),
    [
        ("fp16", Options(dla_core=0), None, "has no DLA core 0 here\nit counts 0"),
        ("int8", Options(), Calibration("TRT-8502-EntropyCalibration2\n"), "has no implicit INT8"),
        ("fp32", Options(hardware="ampere-plus"), None, "has no hardware compatibility"),
    ],
)
def test_rtx_has_neither_dla_nor_calibrators(
    rtx: Any, tiny: bytes, precision: str, options: Options, calibration: Calibration | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build(rtx, tiny, precision, options, calibration)


def test_rtx_takes_no_shared_memory_of_1_gib(rtx: Any, tiny: bytes) -> None:
    with pytest.raises(BuildError, match="takes no tactic_shared_memory of 2,147,483,648 bytes"):
        build(rtx, tiny, "fp32", Options(tactic_shared_memory=2048))


def test_rtx_builds_for_what_it_is_told_to(rtx: Any, tiny: bytes) -> None:
    with pytest.raises(BuildError, match=r"Turing \(SM75\)(.|\n)*leave it out, or build FP16 or INT8"):
        build(rtx, tiny, "fp32", Options(capabilities=("8.6", "7.5")))


def test_rtx_knows_no_orin(rtx: Any, tiny: bytes) -> None:
    with pytest.raises(
        UsageError, match=r"TensorRT-RTX .* capability 8\.7\nchoose from: 7\.5, 8\.0, 8\.6, 8\.9, 12\.0"
    ):
        build(rtx, tiny, "fp32", Options(capabilities=("8.7",)))


def test_rtx_refuses_zero_points(rtx: Any) -> None:
    scale, zero = numpy_helper.from_array(np.float32(0.1), "s"), numpy_helper.from_array(np.int8(5), "z")
    weight = numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float32), "w")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="x/quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="x/dequantize"),
        helper.make_node("Conv", ["d", "w"], ["y"], name="conv1"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, c, 8, 8)) for n, c in (("x", 3), ("y", 4))]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], [scale, zero, weight])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(BuildError, match=r"does not read this ONNX file\nx/quantize \(QuantizeLinear\): .*zero point"):
        build(rtx, model.SerializeToString(), "int8", Options())


@pytest.mark.parametrize("content", [b"not a model", b""])
def test_rtx_and_no_model(rtx: Any, content: bytes) -> None:
    with pytest.raises(BuildError, match="ONNX file"):
        build(rtx, content, "int8", Options())


def test_rtx_refuses_a_profile_out_of_order(rtx: Any, tiny: bytes) -> None:
    options = Options()
    object.__setattr__(options, "profile", (4, 2, 8))  # past the check of Options: what the library makes of it
    with pytest.raises(BuildError, match="takes no batches") as caught:
        build(rtx, tiny, "fp32", options)
    assert "MIN<=OPT<=MAX" in caught.value.evidence


@pytest.mark.parametrize("workspace", [1 / 16, 16])  # below what any kernel takes; below what 32 images take
def test_rtx_and_a_workspace_too_small(rtx: Any, tiny: bytes, workspace: int, said: list[str]) -> None:
    with pytest.raises(OutOfMemory, match="workspace too small") as caught:
        build(rtx, tiny, "fp32", Options(workspace=workspace))
    assert caught.value.limited
    assert not said


def test_rtx_stops_at_the_next_step(rtx: Any, tiny: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = builder._monitor(rtx)
    monitor.cancelled = True
    monkeypatch.setattr(builder, "_monitor", lambda lib: monitor)
    with pytest.raises(BuildError, match="built no engine"):
        build_plan(rtx, tiny, "fp32", Options())
    assert monitor.text  # it was asked


@pytest.mark.parametrize("options", [Options(strip=True), Options(refit=True)], ids=["strip", "refit"])
def test_rtx_needs_a_gpu_to_strip_and_refit(rtx: Any, tiny: bytes, options: Options) -> None:
    try:
        built = build(rtx, tiny, "fp32", options)
    except BuildError as error:
        assert "need a GPU here" in error.hint  # noqa: PT017
    else:
        assert built.plan  # there is one
