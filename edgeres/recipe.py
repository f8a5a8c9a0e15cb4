"""What a run is asked to do: frozen records, read strictly from TOML.

A workspace is a folder with an ``edgeres.toml``; that file and every recipe have the same keys. What a recipe does
not say the workspace says, and flags win over both.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from edgeres.errors import InputError, UsageError
from edgeres.files import digest
from edgeres.remote import is_address

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

WORKSPACE_FILE = "edgeres.toml"
STRIDE_ON = {"v1": "1x1", "v1.5": "3x3"}
"""Variant -> the convolution that carries stride 2 in a downsampling bottleneck."""
DEPTHS = (18, 34, 50, 101, 152)
BASIC_DEPTHS = (18, 34)
"""Built of blocks without 1x1 convolutions: v1 and v1.5 are the same network."""
PRECISIONS = ("fp32", "fp16", "int8")
METHODS = ("minmax", "entropy", "percentile-99.9", "percentile-99.99", "percentile", "mse")
AUTO = "auto"
"""The method of these that is most faithful on held-out images. As a target: the one of this machine."""
ON_DEVICE = ("tensorrt-entropy", "tensorrt-minmax")
"""Methods of TensorRT's own calibrators, up to 10, which take the images while it builds."""
WEIGHTS = ("absmax", "mse")
"""Rules for the scales of weights."""
IO = ("fp32", "fp16", "uint8")
"""What an engine takes and gives; uint8 pixels are normalized in the graph."""
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "area")
CHANNEL_ORDERS = ("RGB", "BGR")

PATH = {"path": True}  # marks a field whose relative path starts at the workspace


def one_of(what: str, value: str | int, choices: tuple[str | int, ...]) -> None:
    """Raise `UsageError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        names = [str(choice) for choice in choices]
        near = difflib.get_close_matches(str(value), names, 1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"unknown {what} {value!r}", hint=f"{guess}choose from: {', '.join(names)}")


def at_least(what: str, value: float | None, least: float, most: float = math.inf) -> None:
    """Raise `UsageError` if ``value`` is given and below ``least``, or above ``most``."""
    if value is not None and not least <= value <= most:  # nor NaN
        hint = f"it must be at least {least}" + f", and at most {most}" * (most < math.inf)
        raise UsageError(f"{what} is {value}", hint=hint)


@dataclass(frozen=True)
class Preprocess:
    """From image file to network input: shorter side to ``resize``, center crop, scale to [0, 1], mean and std.

    ``resize`` and ``crop`` are in pixels; without ``resize`` it is ``crop`` * 256 / 224, the common ImageNet ratio.
    ``mean`` and ``std`` are per channel, in RGB order. The defaults are torchvision's for IMAGENET1K_V1.
    """

    crop: int = 224
    resize: int | None = None
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channel_order: str = "RGB"

    def __post_init__(self) -> None:
        if self.resize is None:
            object.__setattr__(self, "resize", round(self.crop * 256 / 224))
        at_least("preprocess.crop (the input size)", self.crop, 1)
        if self.size < self.crop:
            raise UsageError(
                f"preprocess.resize {self.resize} is smaller than the input size {self.crop}",
                hint="the center crop would reach outside the image; give a resize of at least the input size",
            )
        one_of("preprocess.interpolation", self.interpolation, INTERPOLATIONS)
        one_of("preprocess.channel_order", self.channel_order, CHANNEL_ORDERS)
        finite = all(map(math.isfinite, (*self.mean, *self.std)))
        if len(self.mean) != 3 or len(self.std) != 3 or not finite or min(self.std) <= 0:
            raise UsageError("preprocess.mean and std need three finite numbers each, and no std of 0 or less")

    @property
    def size(self) -> int:
        """Pixels of the shorter side after resizing."""
        assert self.resize is not None
        return self.resize

    def digest(self) -> str:
        """Identity of this contract, for artifacts made under it."""
        return digest(asdict(self))

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Preprocess:
        """The inverse of `to_json`; `UsageError` for a record of another kind."""
        return from_dict(cls, record, " in a recorded preprocess")


@dataclass(frozen=True)
class ModelSection:
    """``[model]``: which network and how it is exported. ``classes`` and ``batch`` None: as in the weights; dynamic."""

    depth: int = 50
    variant: str = "v1.5"
    weights: str = field(default="imagenet", metadata=PATH)
    classes: int | None = None
    opset: int = 17
    batch: int | None = None

    def __post_init__(self) -> None:
        one_of("depth", self.depth, DEPTHS)
        one_of("variant", self.variant, tuple(STRIDE_ON))
        at_least("model.classes", self.classes, 1)
        at_least("model.batch", self.batch, 1)
        if not 13 <= self.opset <= 22:
            raise UsageError(
                f"opset {self.opset} is outside 13 to 22",
                hint="17 loads everywhere from TensorRT 8.6 on; per-channel Q/DQ needs at least 13",
            )

    @property
    def network(self) -> str:
        """The network's name: resnet50-v1.5; resnet18, which has no variants."""
        return f"resnet{self.depth}" if self.depth in BASIC_DEPTHS else f"resnet{self.depth}-{self.variant}"


@dataclass(frozen=True)
class CalibrationSection:
    """``[calibration]``: which images, how many; ``equalize`` channels or not; how ranges become thresholds.

    ``weights``: the rule for the scales of weights.
    """

    images: str | None = field(default=None, metadata=PATH)
    limit: int = 512
    method: str = "mse"
    weights: str = "absmax"
    equalize: bool = True

    def __post_init__(self) -> None:
        at_least("calibration.limit", self.limit, 1)
        one_of("method", self.method, (*METHODS, AUTO, *ON_DEVICE))
        one_of("rule for weight scales", self.weights, WEIGHTS)


@dataclass(frozen=True)
class EngineSection:
    """``[engine]``: what is built. ``tensorrt``: the version on the device, if it is not the one its target has."""

    target: str = "cpu"
    precision: str = "int8"
    io: str = "fp32"
    tensorrt: str | None = None

    def __post_init__(self) -> None:
        if self.tensorrt is not None and not re.fullmatch(r"\d+(\.\d+)+", self.tensorrt):
            raise UsageError(f"{self.tensorrt!r} is no TensorRT version", hint="such as 10.3.0")
        one_of("precision", self.precision, PRECISIONS)
        one_of("io", self.io, IO)


@dataclass(frozen=True)
class ValidationSection:
    """``[validation]``: which images judge the engine. ``limit`` None: all. ``labels``: a file of class names."""

    images: str | None = field(default=None, metadata=PATH)
    labels: str | None = field(default=None, metadata=PATH)
    limit: int | None = None

    def __post_init__(self) -> None:
        at_least("validation.limit", self.limit, 1)


@dataclass(frozen=True)
class Budget:
    """``[budget]``: what an engine may lose. ``max_drop``: top-1 points below FP32.

    ``min_relative``: percent of FP32's top-1 that is to stay. ``accepted``: an earlier result.json, below whose top-1
    it may be by ``max_loss`` points.
    """

    max_drop: float | None = None
    min_relative: float | None = None
    accepted: str | None = field(default=None, metadata=PATH)
    max_loss: float = 0.0

    def __post_init__(self) -> None:
        for key in ("max_drop", "min_relative", "max_loss"):  # points and percent
            at_least(f"budget.{key}", getattr(self, key), 0, 100)

    @property
    def given(self) -> list[str]:
        """The keys of what is to be judged."""
        return [key for key in ("max_drop", "min_relative", "accepted") if getattr(self, key) is not None]


@dataclass(frozen=True)
class Recipe:
    """Everything one engine is made from. ``name`` is the stem of every file made; ``seed`` draws the subsets."""

    name: str | None = None
    seed: int = 0
    model: ModelSection = ModelSection()
    preprocess: Preprocess = Preprocess()
    calibration: CalibrationSection = CalibrationSection()
    engine: EngineSection = EngineSection()
    build: dict[str, Any] = field(default_factory=dict)
    """How TensorRT builds: keys of `trt.Options`, over those of the target."""
    validation: ValidationSection = ValidationSection()
    budget: Budget = Budget()
    said: dict[str, Any] = field(default_factory=dict, compare=False, metadata={"internal": True})
    """What files and flags said, without the defaults: an existing artifact may differ in the rest."""

    def __post_init__(self) -> None:
        if self.name is not None and (not self.name or Path(self.name).name != self.name):
            raise UsageError(f"name {self.name!r} is no file name", hint="it becomes the stem of every file made")


def with_defaults(recipe: Recipe, preprocess: Preprocess) -> Preprocess:
    """``preprocess``, which comes with the weights, under what files and flags said of it."""
    said = recipe.said.get("preprocess", {})
    record = preprocess.to_json()
    if said.get("crop", preprocess.crop) != preprocess.crop:
        del record["resize"]  # belongs to the other crop: back to the usual ratio
    return from_dict(Preprocess, {**record, **said})


T = TypeVar("T")


def from_dict(cls: type[T], values: dict[str, Any], where: str = "", section: str = "") -> T:
    """Build a frozen record from parsed TOML. An unknown key or a wrong type is a `UsageError` naming ``where``."""
    place = where + section
    known = {f.name: f for f in fields(typing.cast(Any, cls)) if not f.metadata.get("internal")}
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            guess = f"did you mean {near[0]!r}? " if near else ""
            raise UsageError(f"unknown key {key!r}{place}", hint=f"{guess}known keys: {', '.join(known)}")
        hint = hints[key]
        if is_dataclass(hint):
            if not isinstance(value, dict):
                raise UsageError(f"{key!r}{place} must be a table", hint=f"write [{key}] above its keys")
            arguments[key] = from_dict(typing.cast(Any, hint), value, where, f"{section} in [{key}]")
        else:
            arguments[key] = _checked(key, value, hint, place)
    missing = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING and n not in values]
    if missing:
        raise UsageError(f"missing key {missing[0]!r}{place}")
    try:
        return cls(**arguments)
    except UsageError as error:  # of a value, or of two that do not go together
        raise UsageError(f"{error.cause}{where}", evidence=error.evidence, hint=error.hint) from error


def _checked(key: str, value: Any, hint: Any, where: str) -> Any:
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    allowed = typing.get_args(hint) if union else (hint,)
    for kind in allowed:
        if typing.get_origin(kind) in (tuple, list):
            item = typing.get_args(kind)[0]
            if isinstance(value, list | tuple):
                return typing.get_origin(kind)(_checked(key, v, item, where) for v in value)
        elif typing.get_origin(kind) is dict and isinstance(value, dict):
            return value
        elif kind is float and _is_number(value):
            return float(value)
        elif isinstance(kind, type) and isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
            return value
    names = " or ".join(getattr(k, "__name__", str(k)) for k in allowed if k is not type(None))
    raise UsageError(f"{key!r}{where} must be {names}, not {value!r}")


def parse_setting(cls: type[Any], text: str) -> tuple[str, Any]:
    """KEY=VALUE as a shell gives it -> key of ``cls``, and the value as its type. Lists are separated by commas."""
    key, equals, value = text.partition("=")
    hints = typing.get_type_hints(cls)
    kinds = {f.name: hints[f.name] for f in fields(cls) if not f.metadata.get("internal")}
    if not equals or key not in kinds:
        near = difflib.get_close_matches(key, kinds, 1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"{text!r} is no KEY=VALUE", hint=f"{guess}known keys: {', '.join(kinds)}")
    return key, _checked(key, _parsed(value, kinds[key]), kinds[key], "")


def _parsed(text: str, kind: Any) -> Any:
    """``text`` as one of the types that ``kind`` allows, or as it is if it reads like none."""
    for option in typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,):
        if typing.get_origin(option) is tuple:
            return tuple(_parsed(part, typing.get_args(option)[0]) for part in text.split(","))
        if option is bool and text in ("true", "false"):
            return text == "true"
        if option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
    return text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_record(cls: type[T], text: str, what: str) -> T:
    """Build a frozen record from TOML text; ``what`` names the text in errors."""
    try:
        return from_dict(cls, tomllib.loads(text), f" in {what}")
    except ValueError as error:
        raise UsageError(f"{what} is not valid TOML", evidence=str(error)) from error


def merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts, the later ones winning key by key."""
    out: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, dict) and isinstance(out.get(key), dict)
            out[key] = merge(out[key], value) if both else value
    return out


def read_toml(path: Path, root: Path, below: dict[str, Any]) -> dict[str, Any]:
    """A recipe file's keys over those of ``below``, checked, with relative paths resolved against ``root``."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "give a TOML file with the keys of edgeres.toml: docs/recipes.md"
        raise InputError(f"cannot read recipe {path}", evidence=error.strerror or str(error), hint=hint) from error
    except ValueError as error:  # TOML syntax, or bytes that are not UTF-8
        raise UsageError(f"{path} is not valid TOML", evidence=str(error)) from error
    from_dict(Recipe, merge(below, values), f" in {path}")  # before the next layer, so that an error names this file
    for section in fields(Recipe):
        table = values.get(section.name)
        if isinstance(table, dict) and section.name != "build":  # which holds no paths
            for f in fields(typing.get_type_hints(Recipe)[section.name]):
                if f.metadata.get("path") and f.name in table:
                    table[f.name] = resolve(table[f.name], root)
    return merge(below, values)


def resolve(path: str, root: Path) -> str:
    """``path`` against ``root``. An address stays as it is, and so does a bare word that is no file: "imagenet"."""
    if is_address(path):
        return path
    try:
        full = root / Path(path).expanduser()
    except RuntimeError as error:  # nobody of that name, or a user without a home, as in containers
        raise UsageError(f"where {path} is cannot be known", evidence=str(error), hint="write the path out") from error
    return path if Path(path).parent == Path() and not Path(path).suffix and not full.exists() else str(full)


def find_workspace(start: Path) -> Path:
    """The nearest folder from ``start`` upward that has an ``edgeres.toml``; without one, ``start`` itself."""
    start = start.resolve()
    return next((d for d in (start, *start.parents) if (d / WORKSPACE_FILE).is_file()), start)


def load_recipe(root: Path, recipe: Path | None = None, flags: dict[str, Any] | None = None) -> Recipe:
    """Defaults, then the workspace's ``edgeres.toml``, then ``recipe``, then ``flags``: the later one wins."""
    said: dict[str, Any] = {}
    for path in (root / WORKSPACE_FILE, recipe):
        if path is not None and (path == recipe or path.is_file()):
            said = read_toml(path, root, said)
    said = merge(said, flags or {})
    return replace(from_dict(Recipe, said), said=said)
