"""Typed ONNX + target -> an engine folder: the plain engine file, and engine.json that says what it is."""

from __future__ import annotations

import platform
import re
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import edgeres
from edgeres import devices, engine_layers, graph, schema, trt
from edgeres.errors import BuildError, InputError, MissingDependency, StaleError
from edgeres.files import atomic, cache_folder, read_json, sha256_file, write_json
from edgeres.fusion import Fusion, audit
from edgeres.progress import busy, say
from edgeres.recipe import ON_DEVICE, Preprocess
from edgeres.runners import Runner, executor, open_runner
from edgeres.targets import Target

FORMAT = "edgeres engine 1"
RECORD = "engine.json"
LISTED = "model.txt"
"""Beside an engine for which TensorRT calibrated by itself: the manifest of the images."""
COPIED = (
    "depth",
    "variant",
    "classes",
    "batch",
    "preprocess",
    "io",
    "quantization",
    "chosen",
    "kept_fp32",
    "dla",
    "layers",
    "ranges",
)
"""What an engine's record says as the typed model's metadata do."""


@dataclass(frozen=True)
class Engine:
    """An engine file and its record: what it runs on, what it was made from, what its graph fused to."""

    path: Path
    record: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Engine:
        """Open an engine folder (or a file in it), after checking that the engine is the one its record describes."""
        folder = path.parent if path.is_file() else path
        if not (folder / RECORD).is_file():
            raise InputError(
                f"no engine at {path}",
                evidence=f"there is no {RECORD} in {folder}",
                hint="give an engine folder; `edgeres build-engine` with the same options makes one",
            )
        record = read_json(folder / RECORD, "engine record")
        if record.get("format") != FORMAT:
            raise InputError(f"{folder / RECORD} is not an engine record", evidence=f"format {record.get('format')!r}")
        if missing := [k for k in ("file", "sha256", "executor") if not isinstance(record.get(k), str)]:
            raise InputError(
                f"engine record {folder / RECORD} is damaged",
                evidence=f"without {', '.join(missing)}",
                hint="build the engine again",
            )
        schema.refuse(schema.wrong(record, schema.ENGINE), f"engine record {folder / RECORD}", "build the engine again")
        engine = cls(folder / Path(record["file"]).name, record)
        size = engine.path.stat().st_size if engine.path.is_file() else None
        if size is not None and size < (record.get("size_bytes") or 0):
            raise StaleError(
                f"{engine.path} is cut short",
                evidence=f"{size:,} of {record['size_bytes']:,} bytes",
                hint="copy it again, or build it again",
            )
        if (found := sha256_file(engine.path)) != record["sha256"]:
            raise StaleError(
                f"{engine.path} is not the file that was built",
                evidence=f"SHA-256 {found[:12]}, its record says {record['sha256'][:12]}",
                hint="it was changed; build it again",
            )
        return engine

    def open(self, cuda_graph: bool = False, threads: int | None = None) -> Runner:
        """Load the engine into its executor, if nothing speaks against it.

        ``cuda_graph`` is for TensorRT, ``threads`` are what a CPU computes with, None for all its cores.
        """
        name, options = self.record["executor"], self.record.get("options", {})
        settings: dict[str, Any] = {}
        if name in trt.EXECUTORS:
            self.check_version(executor(name).version())
            self.check_gpu()
            settings = {key: options.get(key) for key in ("dla_core", "version_compatible")}
            settings["cuda_graph"] = cuda_graph
        runner = open_runner(self.path, name, threads, **settings)
        runner.preprocess = Preprocess.from_json(self.record["preprocess"])
        return runner

    @property
    def _again(self) -> str:
        asked = f"--precision {self.record['precision']} --target {self.record['target']}"
        return f"build it again: `edgeres build-engine {asked}`"

    def check_version(self, version: str) -> None:
        """Raise `StaleError` if this plan does not load in ``version`` of its executor.

        It loads in the one that built it; if version-compatible, also in later ones, up to those of `READERS`.
        """
        built = self.record["built_with"][self.record["executor"]]
        compatible = self.record.get("options", {}).get("version_compatible")
        (old, *_), (new, *_) = _numbers(built), _numbers(version)
        later = _numbers(version) >= _numbers(built) and new <= READERS.get(old, old)
        if version != built and not (compatible and later):
            serves = self.record["executor"] == "tensorrt" and later and not compatible
            raise StaleError(
                f"{self.path} is for {self.record['executor']} {built}",
                evidence=f"here is {self.record['executor']} {version}",
                hint=self._again + ("; --build version_compatible=true serves later ones too" if serves else ""),
            )

    def check_gpu(self, gpus: list[devices.Gpu] | None = None) -> None:
        """Raise `StaleError` if this plan is for another GPU than the first here, or of ``gpus``.

        It is for the compute capability it was built on, unless it was built to be compatible (TensorRT documentation,
        "Hardware compatibility"); TensorRT-RTX builds for several. Without a GPU nothing is known.
        """
        gpus = devices.gpus() if gpus is None else gpus
        name, options = self.record["executor"], self.record.get("options", {})
        if not gpus or name not in trt.EXECUTORS:
            return
        gpu, on = gpus[0], self.record["built_with"].get("gpu")
        machine = self.record["built_with"].get("machine")
        if name == "tensorrt" and machine not in (None, platform.machine()):  # "Engine Portability", support matrix
            raise StaleError(
                f"{self.path} is for {machine}",
                evidence=f"this is {platform.machine()}; no setting makes a plan run on both",
                hint=self._again,
            )
        if name == "tensorrt-rtx":
            wanted = ", ".join(options.get("capabilities") or []) or PORTABLE
        elif on is None:
            return
        else:
            wanted = PORTABLE if options.get("hardware") == "ampere-plus" else on["capability"]
        fits = float(gpu.capability) >= 8 if wanted == PORTABLE else gpu.capability in wanted.split(", ")
        if not fits:
            raise StaleError(
                f"{self.path} is for compute capability {wanted}",
                evidence=f"{gpu.name} here has {gpu.capability}",
                hint=self._again,
            )
        if on and on["name"] != gpu.name and options.get("hardware") == "none":
            say(f"note: {self.path.name} was built on {on['name']}; built again for this {gpu.name} it may be faster")


@dataclass(frozen=True)
class Typed:
    """A typed ONNX file, as far as a build must know what is in it. A device knows that from a bundle, without onnx.

    ``made``: edgeres' metadata; ``model``: digest of the FP32 model; convolutions and residual adds: how many.
    """

    path: Path
    made: dict[str, Any]
    model: str
    convolutions: int
    residuals: int

    @classmethod
    def read(cls, path: Path) -> Typed:
        """Look into the file. `InputError` if it is not one of edgeres'."""
        model = graph.load(path)
        made, counts = graph.metadata(model), graph.count_ops(model)
        if "precision" not in made:
            raise InputError(f"{path} was not made by edgeres", hint="give the file that `edgeres quantize` wrote")
        head = bool(made.get("dla"))  # the classifier is a convolution too
        digest = made.get("model") or graph.digest(model)
        return cls(path, made, digest, counts.get("Conv", 0) - head, counts.get("Add", 0))


READERS = {8: 10, 9: 10, 10: 11}
"""Major version of TensorRT -> the newest that takes its version-compatible plans: "Version Compatibility" in the
documentation of 10.16.1, "Engine Compatibility" in that of 11.1."""
PORTABLE = "8.0 or later"
"""What a plan for Ampere and newer runs on, and what TensorRT-RTX builds for unless told."""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version))


def installed(name: str, target: Target, elsewhere: str) -> str:
    """Version of the executor that builds for ``target`` here. Raises what keeps it from being built here.

    ``elsewhere``: what to do if this machine is not of the target's kind.
    """
    try:
        version = executor(target.executor).version()
    except MissingDependency as error:
        if target.executor != "tensorrt" or (target.capability is None and devices.gpus()):
            raise
        raise BuildError(
            f"no engine for {name} can be built here", evidence=str(error.cause), hint=elsewhere
        ) from error
    found = devices.gpus()
    if target.capability and found and found[0].capability != target.capability:
        raise BuildError(
            f"{name} is for compute capability {target.capability}",
            evidence=f"{found[0].name} here has {found[0].capability}",
            hint=elsewhere,
        )
    return version


def up_to_date(folder: Path, typed: Path, version: str, target: Target) -> Engine | None:
    """The engine in ``folder``, if it is whole, runs here, and is what `build` would make of the file ``typed``.

    That is: from the same bytes, with the same ``version`` of the executor, as asked.
    """
    try:
        engine = Engine.load(folder)
        engine.check_gpu()
        made_from, built_with = engine.record["made_from"], engine.record["built_with"]
        found = made_from["onnx"], built_with[target.executor], engine.record.get("asked", {})
    except (InputError, StaleError, KeyError):
        return None
    return engine if found == (sha256_file(typed), version, target.asked) else None


def build(
    typed: Typed | Path, folder: Path, target_name: str, target: Target, calibration: trt.Calibration | None = None
) -> Engine:
    """Build the engine for ``typed``, an FP32, FP16 or INT8 ONNX file made by edgeres, into ``folder``.

    ``calibration`` is for implicit INT8.
    """
    start = time.perf_counter()
    typed = Typed.read(typed) if isinstance(typed, Path) else typed
    made = typed.made
    tool = executor(target.executor)
    built_with = {"edgeres": edgeres.__version__, target.executor: tool.version(), "machine": platform.machine()}
    more: dict[str, Any] = {}
    if target.executor in trt.EXECUTORS:
        path = folder / "engine.plan"
        plan, fusion = _plan(path, typed, target, calibration)
        options = {k: v for k, v in asdict(plan.options).items() if k != "timing_cache"}
        more = {"asked": target.asked, "options": options, "notes": plan.notes, "on_gpu": plan.on_gpu}
        more["warnings"] = plan.warnings
        built_with |= _here()
    else:
        try:
            with busy("look at what fuses"):
                fusion = tool.audit(typed.path, made["precision"])
        except MissingDependency as error:  # a device runs graphs without the package that looks into them
            fusion = Fusion({}, [f"what the graph fused to was not looked at: {error.cause}"])
        path = folder / "engine.onnx"
        # optimized at load, for the CPU that is found: the portable file is the engine
        with atomic(path) as temporary:
            shutil.copyfile(typed.path, temporary)
    record = {
        "format": FORMAT,
        "file": path.name,
        "sha256": sha256_file(path),
        "size_bytes": path.stat().st_size,
        "target": target_name,
        "executor": target.executor,
        "precision": made["precision"],
        **dict.fromkeys(("depth", "variant", "classes", "batch", "preprocess")),
        **{k: v for k, v in made.items() if k in COPIED},
        **more,
        "fusion": asdict(fusion),
        "made_from": {
            "onnx": sha256_file(typed.path),
            "model": typed.model,
            **({"table": table} if (table := made.get("quantization", {}).get("table")) else {}),
        },
        "built_with": built_with,
        "build_seconds": round(time.perf_counter() - start, 3),
    }
    listed, beside = typed.path.with_suffix(".txt"), folder / LISTED
    own = made.get("quantization", {}).get("method") in ON_DEVICE
    if own and listed.is_file() and listed.resolve() != beside.resolve():
        shutil.copyfile(listed, beside)
    write_json(folder / RECORD, record)
    return Engine(path, record)


def _plan(path: Path, typed: Typed, target: Target, calibration: trt.Calibration | None) -> tuple[trt.Built, Fusion]:
    """Build a plan, and look at what it runs: its layers go beside it."""
    from edgeres.runners.tensorrt import TensorRt

    precision = typed.made["precision"]
    asked = replace(target.build, timing_cache=cache_folder() / "timing" / f"{target.executor}.cache")
    library = trt.load_library(target.executor)
    built = trt.build(library, typed.path.read_bytes(), precision, _within_memory(asked), calibration)
    with atomic(path) as temporary:
        temporary.write_bytes(built.plan)
    built = replace(built, plan=b"")  # it is read from the file when it is looked at
    layers = path.with_name(engine_layers.FILE)
    layers.unlink(missing_ok=True)  # of the plan before
    cache = path.with_suffix(".cache")
    cache.unlink(missing_ok=True)
    if built.calibration_cache:
        with atomic(cache) as temporary:
            temporary.write_bytes(built.calibration_cache)
    settings = {"dla_core": built.options.dla_core, "version_compatible": built.options.version_compatible}
    try:
        found, times = TensorRt(target.executor).examine(path, **settings)
    except (BuildError, MissingDependency) as error:  # TensorRT-RTX also builds where there is no GPU
        return built, Fusion({}, [f"what the engine runs in was not looked at: {error.cause}"])
    numbers = {"convolutions": typed.convolutions, "residuals": typed.residuals}
    write_json(layers, {"sha256": sha256_file(path), "layers": found, "times_ms": times, **numbers})
    return built, audit(found, precision, times, **numbers).fusion()


def _within_memory(options: trt.Options) -> trt.Options:
    """``options``, on a Jetson with no more workspace than is free: its GPU has no memory of its own."""
    free = devices.free_memory()
    if devices.jetson() is None or free is None:
        return options
    most = free * SHARE // trt.MIB
    if options.workspace is not None and options.workspace <= most:
        return options
    say(f"workspace: {most:,.0f} MiB, of {free // trt.MIB:,} MiB that are free and shared with the GPU")
    return replace(options, workspace=float(most))


SHARE = 0.75
"""Of the free memory of a Jetson that a workspace may take: the builder needs some besides."""


def _here() -> dict[str, Any]:
    """The GPU, the driver and the Jetson that a plan is built on, as far as there are any."""
    gpus, jetson = devices.gpus(), devices.jetson()
    found = {
        "gpu": asdict(gpus[0]) if gpus else None,
        "cuda": devices.driver(),
        "driver": devices.driver_release(),
        "jetson": asdict(jetson) if jetson else None,
    }
    return {key: value for key, value in found.items() if value}
