"""Everything between a network and its build: flags, pools, batches, DLA, calibration."""

from __future__ import annotations

from typing import Any

from edgeres.errors import BuildError, UsageError
from edgeres.trt.bindings import Parts, ahead_of_time, given, strongly_typed, title
from edgeres.trt.calibrator import Calibration
from edgeres.trt.options import HARDWARE, POOLS, VERBOSITY, Options

NAMED = 10
"""Layers that a line on the screen names."""


def check(trt: Any, precision: str, options: Options, calibration: Calibration | None) -> None:
    """Raise `UsageError` for a combination that ``trt`` cannot build, before anything is made."""
    implicit = hasattr(trt.IBuilderConfig, "int8_calibrator")
    if calibration is not None:
        if precision != "int8":
            raise UsageError(f"calibration is for INT8, not {precision.upper()}")
        if not implicit:
            raise UsageError(
                f"{title(trt)} has no implicit INT8",
                evidence="calibrators ended with TensorRT 10.16",
                hint="quantize explicitly: `edgeres quantize` for a target whose scheme is not implicit",
            )
    if options.dla_core is None:
        return
    if precision not in ("fp16", "int8"):
        raise UsageError(f"DLA does not run {precision.upper()}", hint="it runs FP16 and INT8")
    if precision == "int8" and implicit and calibration is None:
        raise UsageError(
            f"the DLA of {title(trt)} takes INT8 from a calibration cache, not from Q/DQ nodes",
            hint="give the FP32 graph and its cache, which `edgeres quantize` writes for targets with DLA",
        )
    if calibration is not None and calibration.algorithm != "entropy":
        raise UsageError(f"DLA takes no {calibration.algorithm} calibrator", hint="it takes entropy")


def weakly_typed(trt: Any, options: Options, calibration: Calibration | None) -> bool:
    """Whether flags say what precision is.

    So it is before TensorRT 10, and up to 10.16 where there is a calibrator, which knows no types, or DLA, which is
    built for one of the flags FP16 and INT8.
    """
    asked = calibration is not None or options.dla_core is not None
    return not strongly_typed(trt) or (asked and hasattr(trt.BuilderFlag, "FP16"))


def configure(parts: Parts, precision: str, options: Options, weak: bool) -> None:
    """Set everything that does not depend on the network."""
    trt, config = parts.trt, parts.config
    if options.version_compatible and ahead_of_time(trt):  # has the flag; "Engine Compatibility" in its documentation
        raise UsageError(f"{title(trt)} has no version-compatible plans", hint="build again for each of its releases")
    flags = {
        "TF32": options.tf32,
        "VERSION_COMPATIBLE": options.version_compatible,
        "STRIP_PLAN": options.strip,
        "REFIT": options.refit,
        "SPARSE_WEIGHTS": options.sparse,
        "GPU_FALLBACK": options.dla_core is not None and options.gpu_fallback,
    }
    if weak:  # INT8 alone would leave the rest in FP32
        flags |= {"FP16": precision in ("fp16", "int8"), "INT8": precision == "int8"}
    for name, on in flags.items():
        if (member := getattr(trt.BuilderFlag, name, None)) is not None:
            (config.set_flag if on else config.clear_flag)(member)
        elif on:
            raise UsageError(f"{title(trt)} has no {name.lower().replace('_', ' ')}")
    if (member := getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)) is not None:
        config.set_flag(member)  # TensorRT-RTX: only then any call can be captured in a CUDA graph
    for option, size in options.pools().items():
        _pool(parts, option, size)
    if options.level is not None:
        config.builder_optimization_level = options.level
    if options.aux_streams is not None:
        config.max_aux_streams = options.aux_streams
    if options.hardware != "none":
        _hardware(trt, config, options.hardware)
    # by default layer names and what they run in, for the fusion audit; no cost at run time
    config.profiling_verbosity = getattr(trt.ProfilingVerbosity, VERBOSITY[options.verbosity])
    if options.capabilities:
        _capabilities(trt, config, options.capabilities)


def _pool(parts: Parts, option: str, size: int) -> None:
    if (pool := getattr(parts.trt.MemoryPoolType, POOLS[option], None)) is None:
        raise UsageError(f"{title(parts.trt)} has no {option} to limit")
    parts.config.set_memory_pool_limit(pool, size)  # returns nothing, also where it refuses
    if (limit := parts.config.get_memory_pool_limit(pool)) != size:
        raise BuildError(
            f"{title(parts.trt)} takes no {option} of {size:,} bytes",
            evidence=parts.log.errors() or f"it stays at {limit:,}",
            hint="choose another size, or leave it to TensorRT",
        )


def _hardware(trt: Any, config: Any, wanted: str) -> None:
    """Let the plan run on more GPUs than the one at hand."""
    if ahead_of_time(trt):  # takes the setting, and makes the same plan
        raise UsageError(f"{title(trt)} has no hardware compatibility", hint="name compute capabilities instead")
    if (level := getattr(trt.HardwareCompatibilityLevel, HARDWARE[wanted], None)) is None:
        known = [name for name, member in HARDWARE.items() if hasattr(trt.HardwareCompatibilityLevel, member)]
        raise UsageError(f"{title(trt)} has no hardware {wanted!r}", hint=f"choose from: {', '.join(known)}")
    config.hardware_compatibility_level = level


def _capabilities(trt: Any, config: Any, wanted: tuple[str, ...]) -> None:
    """Choose what GPUs a plan is for, where the library builds for others than the one at hand."""
    if not ahead_of_time(trt):
        raise UsageError(f"{title(trt)} builds for the GPU at hand only", hint="--target rtx takes a choice")
    known = {f"{n[2:-1]}.{n[-1]}": n for n in dir(trt.ComputeCapability) if n.startswith("SM")}
    wanted = tuple(dict.fromkeys(wanted))  # one named twice would be built twice
    if missing := [name for name in wanted if name not in known]:
        raise UsageError(
            f"{title(trt)} does not build for compute capability {', '.join(missing)}",
            hint=f"choose from: {', '.join(sorted(known, key=float))}",
        )
    config.num_compute_capabilities = len(wanted)
    for i, name in enumerate(wanted):
        if not config.set_compute_capability(getattr(trt.ComputeCapability, known[name]), i):
            raise BuildError(f"{title(trt)} refused compute capability {name}", hint="name fewer of them")


def set_batches(parts: Parts, options: Options) -> None:
    """Give a network of dynamic batch its profile, or the one batch there is."""
    tensor, (low, usual, high) = parts.tensor, options.profile
    shape = tuple(tensor.shape)
    if shape[0] >= 0:
        return
    if low == high:
        tensor.shape = (low, *shape[1:])
        return
    if options.dla_core is not None:
        raise UsageError(
            f"DLA runs one batch, not {low} to {high}",
            hint=f"say one for all three, such as profile = [{usual}, {usual}, {usual}], or export with a fixed batch",
        )
    if parts.config.add_optimization_profile(_profile(parts, options.profile)) < 0:
        raise BuildError(
            f"{title(parts.trt)} takes no batches {options.profile} of {shape[1:]}",
            evidence=parts.log.errors(),
            hint="choose others, or export with a fixed batch",
        )


def _profile(parts: Parts, batches: tuple[int, int, int]) -> Any:
    profile = given(parts.builder.create_optimization_profile(), "create a profile", parts.log)
    # returns nothing in Python; what is wrong with it comes out when it is used
    profile.set_shape(parts.tensor.name, *((n, *parts.tensor.shape[1:]) for n in batches))
    return profile


def calibration_shape(parts: Parts, options: Options, calibration: Calibration) -> tuple[int, ...]:
    """Shape of one calibration batch, which a network of dynamic batch gets a profile for."""
    if parts.tensor.dtype != parts.trt.DataType.FLOAT:
        raise UsageError("calibration needs a graph with FP32 input", hint="make it with --io fp32")
    shape = tuple(parts.tensor.shape)
    if shape[0] >= 0:
        return shape
    images = calibration.batch_size if calibration.batches else options.profile[1]
    if not parts.config.set_calibration_profile(_profile(parts, (images, images, images))):
        raise BuildError(
            f"{title(parts.trt)} does not calibrate with batches of {images}",
            evidence=parts.log.errors(),
            hint="choose another batch, or export with a fixed one",
        )
    return (images, *shape[1:])


def require_dla(trt: Any, builder: Any, core: int) -> None:
    """Raise `UsageError` if there is no such DLA ``core``."""
    if core >= builder.num_DLA_cores:
        raise UsageError(
            f"{title(trt)} has no DLA core {core} here",
            evidence=f"it counts {builder.num_DLA_cores}",
            hint="Orin Nano and Thor have no DLA, and TensorRT 10.8 to 11.3 do not support it: build for the GPU",
        )


def use_dla(parts: Parts, options: Options) -> tuple[list[str], str]:
    """Let DLA run ``network`` -> names of the layers that stay on the GPU, and how many they are in words.

    Raises `BuildError` if they are more than there may be: better now than after a long build.
    """
    trt, network, config = parts.trt, parts.network, parts.config
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = options.dla_core
    layers = [given(network.get_layer(i), f"give layer {i}", parts.log) for i in range(network.num_layers)]
    layers = [layer for layer in layers if layer.type != trt.LayerType.CONSTANT]  # weights of others, run nowhere
    stay = [layer for layer in layers if not config.can_run_on_DLA(layer)]
    named = [f"{layer.name} ({layer.type.name})" for layer in stay]
    most = options.max_fallback if options.gpu_fallback else 0
    if most is not None and len(stay) > most:
        raise BuildError(
            f"{len(stay)} of {len(layers)} layers cannot run on DLA, and {most or 'none'} may run on the GPU",
            evidence="\n".join(named),
            hint="make the graph for a target with DLA, or allow more: gpu_fallback, max_fallback",
        )
    words = f"{len(layers) - len(stay)} of {len(layers)} layers run on DLA"
    if stay:
        more = f" and {len(stay) - NAMED} more" if len(stay) > NAMED else ""
        words += f"; on the GPU: {', '.join(named[:NAMED])}{more}"
    return [layer.name for layer in stay], words
