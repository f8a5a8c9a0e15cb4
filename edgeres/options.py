"""Options of the commands: the same name means the same everywhere. Most override a key of the recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from edgeres.recipe import (
    AUTO,
    DEPTHS,
    IO,
    METHODS,
    ON_DEVICE,
    PRECISIONS,
    STRIDE_ON,
    WEIGHTS,
    merge,
    parse_setting,
    resolve,
)
from edgeres.trt.options import Options

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


def recipe_option(section: str | None, key: str, *flags: str, **kwargs: Any) -> Callable[[F], F]:
    """A flag that overrides ``key`` in ``section`` of the recipe. Paths start at the current folder."""
    is_path = kwargs.pop("path", False)
    convert = kwargs.pop("convert", None)
    if is_path:
        kwargs["metavar"] = "PATH"

    def callback(ctx: click.Context, _param: click.Parameter, value: Any) -> None:
        if value is not None:
            value = resolve(value, Path.cwd()) if is_path else convert(value) if convert else value
            layer = {section: {key: value}} if section else {key: value}
            ctx.meta["flags"] = merge(ctx.meta.get("flags", {}), layer)

    return click.option(*flags, callback=callback, expose_value=False, **kwargs)


def _settings(ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> None:
    """KEY=VALUE of the recipe's section [build]."""
    if values:
        layer = {"build": dict(parse_setting(Options, value) for value in values)}
        ctx.meta["flags"] = merge(ctx.meta.get("flags", {}), layer)


OPTIONS: dict[str, Callable[[Any], Any]] = {
    "depth": recipe_option(
        "model",
        "depth",
        "--depth",
        type=click.Choice(tuple(str(d) for d in DEPTHS)),
        convert=int,
        help="Layers of the network; 50 unless given.",
    ),
    "variant": recipe_option(
        "model",
        "variant",
        "--variant",
        type=click.Choice(tuple(STRIDE_ON)),
        help="Where stride 2 sits: v1 1x1, v1.5 3x3.",
    ),
    "weights": recipe_option(
        "model", "weights", "--weights", path=True, help="Checkpoint file, or imagenet, imagenet-v2 (downloaded once)."
    ),
    "classes": recipe_option(
        "model", "classes", "--classes", type=int, help="Number of classes; as the checkpoint has."
    ),
    "input-size": recipe_option("preprocess", "crop", "--input-size", type=int, help="Height and width in pixels."),
    "resize": recipe_option(
        "preprocess", "resize", "--resize", type=int, help="Shorter side before the crop; input size * 256/224."
    ),
    "opset": recipe_option("model", "opset", "--opset", type=int, help="ONNX opset, 17 unless given."),
    "batch": recipe_option("model", "batch", "--batch", type=int, help="Fixed batch size; dynamic unless given."),
    "precision": recipe_option(
        "engine", "precision", "--precision", type=click.Choice(PRECISIONS), help="Precision of the engine."
    ),
    "target": recipe_option(
        "engine", "target", "--target", help="Who executes: cpu, rtx, jetson-agx-orin, ..., or auto."
    ),
    "tensorrt": recipe_option(
        "engine", "tensorrt", "--tensorrt", metavar="VERSION", help="TensorRT on the device; as the target says."
    ),
    "build": click.option(
        "--build",
        callback=_settings,
        expose_value=False,
        multiple=True,
        metavar="KEY=VALUE",
        help="How TensorRT builds: workspace=1024, tf32=true, ... (docs/tensorrt.md). Repeatable.",
    ),
    "calibration": recipe_option(
        "calibration",
        "images",
        "--calibration",
        path=True,
        help="Image folder or list file to calibrate on, or a range table.",
    ),
    "method": recipe_option(
        "calibration",
        "method",
        "--method",
        type=click.Choice((*METHODS, AUTO, *ON_DEVICE)),
        help="How ranges become thresholds.",
    ),
    "weight-scales": recipe_option(
        "calibration", "weights", "--weight-scales", type=click.Choice(WEIGHTS), help="Rule for weights; absmax."
    ),
    "equalize": recipe_option(
        "calibration", "equalize", "--equalize/--no-equalize", default=None, help="Even out channels first; on."
    ),
    "io": recipe_option(
        "engine", "io", "--io", type=click.Choice(IO), help="What the engine takes: fp32, fp16, or raw uint8 pixels."
    ),
    "calibration-limit": recipe_option(
        "calibration", "limit", "--limit", type=int, help="Calibrate on at most this many images."
    ),
    "data": recipe_option(
        "validation", "images", "--data", path=True, help="Image folder or list file to validate on."
    ),
    "labels": recipe_option(
        "validation", "labels", "--labels", path=True, help="File with one class name per line, in the model's order."
    ),
    "limit": recipe_option("validation", "limit", "--limit", type=int, help="At most this many images."),
    "max-drop": recipe_option(
        "budget", "max_drop", "--max-drop", type=float, help="Budget: top-1 points below FP32 that may be lost."
    ),
    "min-relative": recipe_option(
        "budget", "min_relative", "--min-relative", type=float, help="Budget: percent of FP32's top-1 to keep; 99, say."
    ),
    "accepted": recipe_option(
        "budget", "accepted", "--accepted", path=True, help="Budget: an earlier result.json not to fall behind."
    ),
    "shard": click.option("--shard", metavar="I/N", help="Only part I of N; `edgeres report merge` joins the parts."),
    "ray": click.option(
        "--ray", metavar="auto|ADDRESS", help="On all machines of a Ray cluster: host:port, ray://..., or auto."
    ),
    "ray-cpus": click.option(
        "--ray-cpus", type=click.IntRange(1), help="CPUs of each worker; all of the smallest machine."
    ),
    "seed": recipe_option(None, "seed", "--seed", type=int, help="Draws the subsets of images."),
    "like": click.option(
        "--like", metavar="NAME|PATH", help="Preprocessing: imagenet, imagenet-v2, timm, mlperf, or as an ONNX file's."
    ),
    "model": click.option("--model", type=PATH, help="FP32 ONNX file made by `edgeres export`."),
    "force": click.option("--force", is_flag=True, help="Use a checkpoint that seems to be of the other variant."),
    "skip-bad": click.option("--skip-bad", is_flag=True, help="Leave out unreadable images and say which."),
    "output": click.option("-o", "--output", type=PATH, help="Where to write; an engine is a folder."),
}
