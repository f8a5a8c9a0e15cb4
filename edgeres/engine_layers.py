"""Layers of a TensorRT engine, as its inspector or trtexec lists them -> `Layer`, and their times.

Three dialects are read: TensorRT 8 to 10 tells a tensor's type and layout in one sentence ("Format/Datatype"), 11 and
TensorRT-RTX in two keys, and an engine built without detail holds bare names. What the words mean is taken from
NVIDIA's engine explorer (trex: its ResNet samples and format names), trtexec's sources, and the page on migrating
IEngineInspector from TensorRT 10 to 11.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeres.errors import InputError

TYPES = {word: word for word in ("int8", "uint8", "int32", "int64", "bool", "fp8", "fp16", "bf16", "fp32")}
TYPES |= {"half": "fp16", "float16": "fp16", "bfloat16": "bf16", "float": "fp32", "float32": "fp32"}
"""Words for a tensor's type -> what edgeres calls it."""
FILE = "layers.json"
"""Beside engine.json: {"sha256": of the engine, "layers": [...], "times_ms": {...}, "convolutions": and "residuals":
how many the ONNX graph has}. All but the layers may be missing."""
IDLE = ("constant", "no-op")
"""Kinds of layers that nothing is executed for."""
COPIES = ("reformat", "quantize", "dequantize", "copy")
"""Kinds that change how a tensor is stored, and compute nothing."""
CLASSIFIER = re.compile(r"(?<![a-z])(fc|gemm|matmul|dense|logits|predictions)(?![a-z])", re.IGNORECASE)
"""What the layer before the logits is called; TensorRT runs it as a convolution where that is faster."""
CONSTANTS = re.compile(r"(\.weight|\.bias|\.q|\.dq)$|QuantizeLinear|ReadVariableOp|^\(Unnamed |^unsqueeze_node_after")
"""Parts of a layer's name that stand for its weights and for what was folded into them."""
COPY = re.compile(r"Reformatting CopyNode for (Input|Output) Tensor (\d+) (?:to|from) ")
DLA_COPIES = (" to nvm", " from nvm", " copy finish")
"""How rows of a profile end that move a tensor between GPU and DLA."""


@dataclass(frozen=True)
class Layer:
    """One layer of an engine. ``type`` is TensorRT's word for it, ``kind`` what it is; both empty if not known.

    ``reads`` and ``writes`` are the types of its tensors as in `TYPES`, constants left out, "" where not known.
    ``fp32``: one of them is FP32 and neither input nor output of the engine. ``ms`` is its median time.
    """

    name: str
    type: str
    kind: str
    reads: list[str]
    writes: list[str]
    fp32: bool = False
    ms: float | None = None

    @property
    def label(self) -> str:
        """The name without its weights: "conv1.weight + conv1.weight.q + conv1 + relu" is "conv1 + relu"."""
        return label(self.name)

    @property
    def parts(self) -> list[str]:
        """Labels of the layers that were merged into this one because they read the same tensor."""
        return [label(part) for part in self.name.split(" || ")]

    @property
    def types(self) -> str:
        """Such as "INT8,FP16 -> FP16", each type once; "" if none is known."""
        if not any(self.reads + self.writes):
            return ""
        return " -> ".join(",".join(dict.fromkeys(t.upper() or "?" for t in ts)) for ts in (self.reads, self.writes))


def read(layers: list[Any], times: Mapping[str, float] | None = None) -> list[Layer]:
    """What ``layers``, as `raw_layers` gives them, are; ``times`` is milliseconds by name.

    What a profile has besides comes last: copies to and from DLA, and kernels that the inspector does not list.
    """
    left = dict(times or {})
    nvm = any(name.endswith(DLA_COPIES) for name in [*map(_name, layers), *left])
    constants = {t.get("Name") for la in layers if _type(la) == "Constant" for t in _tensors(la, "Outputs")}
    inner = _inner(layers)
    found = []
    for layer in layers:
        name = _name(layer)
        ms = left.pop(name, None)
        if isinstance(layer, str):
            found.append(Layer(name, "", _kind_by_name(name, nvm), [], [], ms=ms))
            continue
        inputs = [t for t in _tensors(layer, "Inputs") if t.get("Name") not in constants]
        outputs = _tensors(layer, "Outputs")
        reads, writes = [_tensor_type(t) for t in inputs], [_tensor_type(t) for t in outputs]
        single = any(_tensor_type(t) == "fp32" and t.get("Name") in inner for t in [*inputs, *outputs])
        found.append(Layer(name, _type(layer), _kind(layer, inputs, writes, nvm), reads, writes, single, ms))
    return found + [Layer(name, "", _kind_by_name(name, nvm), [], [], ms=ms) for name, ms in left.items()]


def raw_layers(value: Any, what: str) -> list[Any]:
    """The layers in JSON ``value`` as the inspector gives it, or as `trtexec --exportLayerInfo` writes it.

    They are names, or objects with one, and those of the first optimization profile. Raises `InputError`, which calls
    the value ``what``.
    """
    layers = value.get("Layers") if isinstance(value, dict) else value
    if not isinstance(layers, list) or not layers or not all(isinstance(la, str) or _is_layer(la) for la in layers):
        keys = f" of {', '.join(value) or 'nothing'}" if isinstance(value, dict) else ""
        raise InputError(
            f"{what} holds no layers of a TensorRT engine",
            evidence=f"it is a JSON {type(value).__name__}{keys}"[:120],
            hint="give what `trtexec --exportLayerInfo=FILE --profilingVerbosity=detailed` wrote",
        )
    # engines with several profiles hold all layers once for each; those of the first have no mark (trex)
    return [layer for layer in layers if not re.search(r"\[profile +\d+\]", _name(layer))]


def read_times(value: Any, what: str) -> dict[str, float]:
    """Median milliseconds by layer name, of JSON ``value`` as `trtexec --exportProfile` writes it."""
    rows = [row for row in value if not (isinstance(row, dict) and "count" in row)] if isinstance(value, list) else []
    times: dict[str, float] = {}
    for row in rows or [None]:
        name = row.get("name") if isinstance(row, dict) else None
        ms = row.get("medianMs", row.get("averageMs")) if isinstance(row, dict) else None  # early ones have no median
        if not isinstance(name, str) or not isinstance(ms, int | float):
            raise InputError(
                f"{what} holds no times of layers",
                evidence=f"it has {str(row)[:80]}" if rows else "it is no list, or one without layers",
                hint="give what `trtexec --exportProfile=FILE` wrote",
            )
        times[name] = times.get(name, 0.0) + ms
    return times


def read_kept(kept: dict[str, Any], what: str) -> tuple[list[Any], dict[str, float], int | None, int | None]:
    """Layers, times, convolutions and residual adds in the value of a `FILE`, which an error calls ``what``."""
    times, numbers = kept.get("times_ms") or {}, [kept.get(key) for key in ("convolutions", "residuals")]
    sound = isinstance(times, dict) and all(isinstance(ms, int | float) for ms in times.values())
    if not sound or not all(number is None or isinstance(number, int) for number in numbers):
        raise InputError(f"{what} is damaged", hint="build the engine again, or delete the file")
    return raw_layers(kept.get("layers"), what), times, numbers[0], numbers[1]


def read_file(path: Path) -> Any:
    """The JSON value in a file. TensorRT's may have control characters in its strings, as separators."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), strict=False)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}", evidence=str(error)) from error


def label(name: str) -> str:
    """A layer's name for people: without its weights; a copy is named after what it is for."""
    copy, short = COPY.match(name), COPY.sub("", name)
    merged = [[part for part in piece.split(" + ") if not CONSTANTS.search(part)] for piece in short.split(" || ")]
    short = " || ".join(" + ".join(parts) for parts in merged if parts) or short
    return f"{short} ({copy[1].lower()} {copy[2]})" if copy else short


def _kind(layer: dict[str, Any], inputs: list[dict[str, Any]], writes: list[str], nvm: bool) -> str:
    """What ``layer`` is, or TensorRT's own word if it is nothing that edgeres looks for."""
    name, kind = _name(layer), _type(layer).lower()
    words = f"{kind} {layer.get('ParameterType', '')}".lower()
    if kind in ("constant", "noop"):
        return "constant" if kind == "constant" else "no-op"
    by_name = _kind_by_name(name, nvm)
    if "dla" in kind or by_name in ("DLA", "copy"):
        return "copy" if by_name == "copy" else "DLA"
    traced = f"{name} {layer.get('Metadata', '')}"  # Myelin's names say what was fused, the metadata from what
    matrix = bool(re.search(r"gemm(?!conv)|matrixmultiply", words))
    if _is_convolution(layer, words) or (matrix and "conv" in traced.lower()):
        if CLASSIFIER.search(name):
            return "fully connected"
        return "convolution, add" if _adds_residual(layer, inputs) else "convolution"
    if layer.get("Origin") == "QDQ" or "quantize" in kind or (kind == "kgen" and "quan" in name.lower()):
        return "quantize" if "int8" in writes else "dequantize"
    if "reformat" in words or by_name == "reformat":
        return "reformat"
    if matrix:
        return "fully connected"
    if "pool" in words:
        return "pooling"
    return "add" if _is_add(layer, inputs, traced) else _type(layer)


def _kind_by_name(name: str, nvm: bool) -> str:
    """What can be known by name alone. ``nvm``: there are copies to and from DLA, so foreign nodes are DLA's."""
    if name.endswith(DLA_COPIES):
        return "copy"
    if nvm and name.startswith("{"):
        return "DLA"
    return "reformat" if COPY.match(name) else ""


def _is_convolution(layer: dict[str, Any], words: str) -> bool:
    tactic = str(layer.get("TacticName", "")).lower()
    return ("conv" in words and "deconv" not in words) or "fprop" in tactic


def _adds_residual(layer: dict[str, Any], inputs: list[dict[str, Any]]) -> bool:
    """A convolution that reads a second tensor as large as its result adds it: so is a residual add fused."""
    return bool(layer.get("HasResidual") or _as_large(layer, inputs[1:]))


def _is_add(layer: dict[str, Any], inputs: list[dict[str, Any]], traced: str) -> bool:
    """Whether two tensors as large as the result are added, by whatever kernel."""
    operations = " ".join(str(value) for key, value in layer.items() if "operation" in key.lower())
    adds = re.search(r"add|plus|sum", f"{traced} {operations}", re.IGNORECASE)
    return adds is not None and len(_as_large(layer, inputs)) > 1


def _as_large(layer: dict[str, Any], inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of ``inputs`` that have the shape of the result."""
    shapes = [t.get("Dimensions") for t in _tensors(layer, "Outputs")[:1]]
    return [t for t in inputs if [t.get("Dimensions")] == shapes]


def _inner(layers: list[Any]) -> set[Any]:
    """Names of tensors that one layer writes for another: neither input nor output of the engine."""
    same = {  # a no-op gives a tensor a second name
        output.get("Name"): source.get("Name")
        for layer in layers
        if _type(layer) == "NoOp"
        for output in _tensors(layer, "Outputs")
        for source in _tensors(layer, "Inputs")
    }

    def root(name: Any) -> Any:
        for _ in same:  # at most; a chain that bites its tail ends too
            name = same.get(name, name)
        return name

    working = [layer for layer in layers if _type(layer) not in ("NoOp", "Constant")]
    written = {root(t.get("Name")) for layer in working for t in _tensors(layer, "Outputs")}
    read = {root(t.get("Name")) for layer in working for t in _tensors(layer, "Inputs")}
    names = {t.get("Name") for layer in working for key in ("Inputs", "Outputs") for t in _tensors(layer, key)}
    return {name for name in names if root(name) in written & read}


def _tensor_type(tensor: dict[str, Any]) -> str:
    """Type of a tensor, from the key that tells it alone if there is one, else from the one with its layout."""
    keys = [key for key in tensor if re.search("format|datatype", key, re.IGNORECASE)]
    text = " ".join(str(tensor[key]) for key in sorted(keys, key=lambda key: "format" in key.lower()))
    return next((TYPES[word] for word in re.findall(r"\w+", text.lower()) if word in TYPES), "")


def _is_layer(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("Name"), str):
        return False
    ends = [value.get(key, []) for key in ("Inputs", "Outputs")]
    return all(isinstance(end, list) and all(isinstance(t, dict) for t in end) for end in ends)


def _name(layer: Any) -> str:
    return layer if isinstance(layer, str) else str(layer["Name"])


def _type(layer: Any) -> str:
    return "" if isinstance(layer, str) else str(layer.get("LayerType", "?"))


def _tensors(layer: Any, key: str) -> list[dict[str, Any]]:
    return [] if isinstance(layer, str) else layer.get(key, [])
