"""Somebody's ONNX file -> FP32 ONNX in normal form, with the parity that was measured.

The file is read, not rewritten (foreign_graph.py), so that it ends in the same few operators whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import edgeres
from edgeres import graph
from edgeres.errors import BuildError, InputError, need
from edgeres.fidelity import MIN_PARITY_DB, decibels, squares
from edgeres.files import sha256_file
from edgeres.foreign_graph import DYNAMIC_BATCH, FLOATS, Reader
from edgeres.foreign_ops import LETTERS, Op, Value, fold, write
from edgeres.progress import say
from edgeres.recipe import Preprocess

MIN_HALF_DB = 40.0
"""Against an FP16 file as it is: what its own rounding leaves."""
FLOAT16 = 10  # onnx.TensorProto.FLOAT16
OLDEST_OPSET = 7
QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger")
BACKGROUND = 1001
"""Classes of a TensorFlow ImageNet head; class 0 is background, which no one else has."""
TRANSPARENT = ("Relu", "BatchNormalization", "Identity", "Cast", "Pad", "Dropout", "QuantizeLinear", "DequantizeLinear")
VARIANTS: dict[tuple[int, ...], str] = {(2, 1, 1): "v1", (1, 2, 1): "v1.5"}
"""Strides of a downsampling bottleneck's 1x1, 3x3, 1x1 convolutions -> variant."""
DEPTHS = {(2, 8): 18, (2, 16): 34, (3, 16): 50, (3, 33): 101, (3, 50): 152}
"""(convolutions per block, blocks) -> depth."""


def import_onnx(
    path: Path,
    preprocess: Preprocess,
    *,
    opset: int = 17,
    batch: int | None = None,
    images: Iterable[np.ndarray] = (),
    seed: int = 0,
) -> Any:
    """Bring the classifier in ``path`` to normal form -> ModelProto with parity and origin in its metadata.

    ``batch`` None gives a dynamic N. ``images`` are batches (N, 3, crop, crop) on which parity with the file is
    measured, besides random ones drawn with ``seed``. Raises `InputError` for a file that is not an FP32 or FP16
    classifier of such images, `BuildError` for operators it does not know and for a parity below `MIN_PARITY_DB`.
    """
    model = load(path)
    wide = widened(model)
    source, fixed = _source(wide, path, preprocess.crop)
    reader = Reader(_opset(wide), graph.initializers(wide), source)
    reader.read(_needed(wide.graph))
    logits = _logits(wide, reader, path)
    title = wide.graph.name or "foreign"
    proto = write(fold(*_head(reader.ops, logits)), source.op, opset, batch, title)
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((batch or 8, 3, preprocess.crop, preprocess.crop), dtype=np.float32)
    ours = _Session(proto, graph.INPUT, graph.OUTPUT, batch)
    theirs = _Session(wide, source.tensor, logits.tensor, fixed, source.axes[-1] == "C")
    parity = {"random": measure_parity(ours, theirs, [noise]), "images": measure_parity(ours, theirs, images)}
    for kind, p in parity.items():
        _require(kind, p, MIN_PARITY_DB)
    if any(t.data_type == FLOAT16 for t in _tensors(model.graph)):  # as it is, it is rounded at every step
        half = _Session(model, source.tensor, logits.tensor, fixed, source.axes[-1] == "C")
        _require("random, against the FP16 file as it is", measure_parity(ours, half, [noise]), MIN_HALF_DB)
    graph.set_metadata(
        proto,
        {
            "variant": variant_of(proto),
            "depth": depth_of(proto),
            "weights": {"source": path.name, "sha256": sha256_file(path)},
            "edgeres": edgeres.__version__,
            "precision": "fp32",
            "classes": proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value,
            "opset": opset,
            "batch": batch,
            "preprocess": preprocess.to_json(),
            "parity": parity,
        },
    )
    return proto


def load(path: Path) -> Any:
    """Read a foreign file with its external data -> ModelProto that may be imported, functions inlined."""
    onnx, inliner = need("onnx", "onnx"), need("onnx.inliner", "onnx")
    if not path.is_file():
        raise InputError(f"no ONNX file {path}")
    try:
        model = onnx.load(path, load_external_data=False)
        _check_external(model, path)
        onnx.load_external_data_for_model(model, str(path.parent))
        _give_shapes(model.graph)
        onnx.checker.check_model(model)
        model = inliner.inline_local_functions(model) if model.functions else model
    except InputError:
        raise
    except Exception as error:  # protobuf and the checker raise many kinds, none of them documented
        raise InputError(
            f"{path} is not a valid ONNX file",
            evidence=_first_line(error),
            hint="it may be cut short or damaged, or need data files that belong beside it; fetch it again",
        ) from error
    if _opset(model) < OLDEST_OPSET:
        raise InputError(
            f"{path} has opset {_opset(model)}; the oldest that can be imported is {OLDEST_OPSET}",
            hint="raise it with onnx.version_converter, or export the model again",
        )
    quantized = [n for n in model.graph.node if n.op_type in QUANTIZED or n.op_type.startswith(("QLinear", "QGemm"))]
    if quantized:
        raise InputError(
            f"{path} is already quantized",
            evidence=f"{len(quantized)} nodes such as {quantized[0].op_type} {quantized[0].name}".rstrip(),
            hint="import the FP32 model; edgeres quantizes it for the target",
        )
    # ONNX Runtime refuses IR versions newer than itself, which a file often has for no reason
    oldest = need("onnx.helper", "onnx").find_min_ir_version_for(model.opset_import, ignore_unknown=True)
    model.ir_version = min(model.ir_version, max(oldest, 10))
    return model


def _give_shapes(g: Any) -> None:
    """Inputs of unknown rank are images, and outputs are not looked at; the checker insists on a shape for both."""
    for info, rank in (*((i, 4) for i in g.input), *((o, 0) for o in g.output)):
        if info.type.HasField("tensor_type") and not info.type.tensor_type.HasField("shape"):
            info.type.tensor_type.shape.SetInParent()
            for _ in range(rank):
                info.type.tensor_type.shape.dim.add()


def _check_external(model: Any, path: Path) -> None:
    """Every data file that ``model`` names must lie in its own folder."""
    folder = path.parent.resolve()
    for tensor in _tensors(model.graph):
        for entry in tensor.external_data:
            file = (folder / entry.value).resolve()
            if entry.key == "location" and not file.is_relative_to(folder):
                raise InputError(
                    f"{path} wants data from outside its folder",
                    evidence=f"tensor {tensor.name} is in {entry.value}",
                    hint="a model's data belongs beside it; do not trust this file",
                )
            if entry.key == "location" and not file.is_file():
                raise InputError(
                    f"{path} misses its data file {entry.value}", hint=f"put it into {path.parent}, beside the model"
                )


def _tensors(g: Any) -> Iterator[Any]:
    """Every constant tensor, also those in attributes and subgraphs."""
    yield from g.initializer
    for node in g.node:
        for attribute in node.attribute:
            yield from [attribute.t] if attribute.HasField("t") else attribute.tensors
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _tensors(inner)


def _opset(model: Any) -> int:
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)


def widened(model: Any) -> Any:
    """A copy of ``model`` with every FP16, BF16 and FP64 tensor in FP32."""
    numpy_helper = need("onnx.numpy_helper", "onnx")
    out = type(model)()
    out.CopyFrom(model)
    for tensor in _tensors(out.graph):
        if tensor.data_type in FLOATS[1:]:
            array = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for node in out.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in FLOATS:
                attribute.i = 1
    for info in (*out.graph.input, *out.graph.output, *out.graph.value_info):
        if info.type.tensor_type.elem_type in FLOATS:
            info.type.tensor_type.elem_type = 1
    return out


def _needed(g: Any) -> list[Any]:
    """The nodes that some output depends on, in graph order."""
    wanted = {o.name for o in g.output}
    nodes = []
    for node in reversed(g.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            nodes.append(node)
    return nodes[::-1]


def _source(model: Any, path: Path, crop: int) -> tuple[Value, int | None]:
    """The image input, as (N, 3, crop, crop) in its own layout, and the only batch size it takes (None: any)."""
    constants = {t.name for t in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in constants]  # until IR 3, weights were inputs too
    if len(inputs) != 1:
        names = ", ".join(i.name for i in inputs) or "none"
        raise InputError(f"{path} has {len(inputs)} inputs", evidence=names, hint="a classifier has one: the images")
    tensor, name = inputs[0].type.tensor_type, inputs[0].name
    extents = [d.dim_value for d in tensor.shape.dim]  # 0: open
    seen = f"input {name} {[d.dim_param or d.dim_value or '?' for d in tensor.shape.dim]}"
    if tensor.elem_type != 1:
        kind = need("onnx", "onnx").TensorProto.DataType.Name(tensor.elem_type).lower()
        raise InputError(
            f"{path} takes {kind} images", evidence=seen, hint="import the network behind its own preprocessing"
        )
    axes = _layout(model, name, extents)
    want = [{"N": None, "C": 3, "H": crop, "W": crop}[letter] for letter in axes]
    if len(extents) != 4 or any(w and e and e != w for e, w in zip(extents, want, strict=True)):
        size = next((e for e, letter in zip(extents, axes, strict=False) if letter == "H"), 0)
        raise InputError(
            f"{path} does not take (N, 3, {crop}, {crop}) images, nor the same as (N, H, W, C)",
            evidence=seen,
            hint=f"try --input-size {size}" if len(extents) == 4 and 3 in (extents[1], extents[3]) and size else "",
        )
    op = Op("Input", [], (extents[0] or DYNAMIC_BATCH, 3, crop, crop), graph.INPUT)
    return Value(op, tuple(axes), name), extents[0] or None


def _layout(model: Any, name: str, extents: list[int]) -> str:
    """NHWC if the input says so, or, where it does not, if the first thing done to it is to turn it into NCHW."""
    if len(extents) == 4 and (extents[1] == 3) != (extents[3] == 3):
        return LETTERS if extents[1] == 3 else "NHWC"
    readers = graph.consumers(model)
    while node := next(iter(readers.get(name, [])), None):
        if node.op_type == "Transpose":
            return "NHWC" if any([*a.ints] == [0, 3, 1, 2] for a in node.attribute) else LETTERS
        if node.op_type not in ("Identity", "Cast", "Pad", "Sub", "Mul", "Add", "Div"):
            break
        name = node.output[0]
    return LETTERS


def _logits(model: Any, reader: Reader, path: Path) -> Value:
    """What all outputs are made from: the one that the others lead to, before any softmax."""
    ends = [reader.values[o.name] for o in model.graph.output if o.name in reader.values]
    inner = {i for end in ends for op in _upstream(end.op) for i in op.inputs}
    found = {end.op: end for end in ends if end.op not in inner}
    if len(found) != 1:
        raise InputError(
            f"the outputs of {path} are not the logits of one classifier",
            evidence=", ".join(o.name for o in model.graph.output),
            hint="cut the graph behind the logits, with onnx.utils.extract_model",
        )
    (logits,) = found.values()
    if "".join(logits.layout) not in ("NC", "C", "N", ""):  # without "C" there is one class
        raise InputError(f"{path} does not end in (N, classes)", evidence=f"{logits.tensor} has shape {logits.shape}")
    return logits


def _upstream(op: Op) -> list[Op]:
    """``op`` and everything it is computed from."""
    out = [op]
    for o in out:
        out += [i for i in o.inputs if i not in out]
    return out


def _head(ops: list[Op], logits: Value) -> tuple[list[Op], Op]:
    """``ops`` with an end: without the background class, and flat."""
    last, N, classes = logits.op, *logits.op.sizes[:2]
    tail: list[Op] = []
    if classes == BACKGROUND:
        say(f"{BACKGROUND} classes: class 0 is taken for TensorFlow's background and left out")
        channels = {"channels": [*range(1, classes)], "strides": [1, 1]}
        tail.append(Op("Select", [last], (N, classes - 1, 1, 1), "background", last.flat, attributes=channels))
    if not last.flat:
        last = (tail or [last])[-1]
        tail.append(Op("Flatten", [last], last.sizes, "flatten", True))
    return ops + tail, (tail or [last])[-1]


class _Session:
    """``output`` of a model, run on any number of (N, 3, H, W) images within its own batch size and layout.

    Node by node, as it is written: ONNX Runtime's optimizer is not always right (1.31 fuses a Pad of zeros into a max
    pool, which pads with -inf).
    """

    def __init__(self, model: Any, source: str, output: str, batch: int | None, nhwc: bool = False) -> None:
        ort = need("onnxruntime", "onnx")
        cut = type(model)()
        cut.CopyFrom(model)
        del cut.graph.output[:]
        cut.graph.output.add(name=output)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = ort.InferenceSession(cut.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises many kinds
            raise BuildError("ONNX Runtime refuses the model", evidence=_first_line(error)) from error
        self._source, self._batch, self._nhwc = source, batch, nhwc
        self._dtype = {"tensor(float16)": np.float16, "tensor(double)": np.float64}.get(
            next(i.type for i in self._session.get_inputs() if i.name == source), np.float32
        )

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(N, 3, H, W) -> (N, classes)."""
        step = self._batch or max(len(images), 1)
        out = []
        for start in range(0, len(images), step):
            part = images[start : start + step]
            whole = np.concatenate([part, np.zeros_like(images, shape=(step - len(part), *images.shape[1:]))])
            whole = (whole.transpose(0, 2, 3, 1) if self._nhwc else whole).astype(self._dtype)
            try:
                result = self._session.run(None, {self._source: np.ascontiguousarray(whole)})[0]
            except Exception as error:  # as above: some things are found only when they are computed
                raise BuildError("ONNX Runtime cannot run the model", evidence=_first_line(error)) from error
            out.append(result.reshape(step, -1)[: len(part)])
        return np.concatenate(out)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def measure_parity(ours: _Session, theirs: _Session, batches: Iterable[np.ndarray]) -> dict[str, Any] | None:
    """Run both on ``batches`` of (N, 3, H, W): images, largest difference of logits, SQNR in dB; None without any."""
    count, largest, signal, noise = 0, 0.0, 0.0, 0.0
    for images in batches:
        reference, result = theirs(images), ours(images)
        if wrong := int((~np.isfinite(reference).all(1)).sum()):
            raise InputError(
                "the file's own network computes NaN or infinity",
                evidence=f"for {wrong} of {len(images)} images",
                hint="its weights are damaged, or its training went wrong",
            )
        reference = reference[:, 1:] if reference.shape[1] == BACKGROUND else reference
        s, n = squares(reference, result)
        difference = np.abs(reference.astype(np.float64) - result).max()
        count, largest, signal, noise = count + len(images), max(largest, float(difference)), signal + s, noise + n
    return {"images": count, "max_abs": largest, "db": decibels(signal, noise)} if count else None


def _require(kind: str, parity: dict[str, Any] | None, least: float) -> None:
    if parity is not None and not parity["db"] >= least:
        raise BuildError(
            f"the imported graph does not compute what the file computes: {parity['db']:.1f} dB on {kind}",
            evidence=f"largest difference {parity['max_abs']:.3g} over {parity['images']} images",
            hint=f"at least {least:.0f} dB is expected; nothing was written",
        )


def variant_of(model: Any) -> str | None:
    """v1 or v1.5, from where the downsampling bottlenecks carry stride 2; None where there are none, or they differ."""
    blocks = [chain for chains in _branches(model) for chain in chains if [k for k, _ in chain] == [1, 3, 1]]
    found = {VARIANTS.get(tuple(s for _, s in chain)) for chain in blocks} - {None}
    return found.pop() if len(found) == 1 else None


def depth_of(model: Any) -> int | None:
    """18, 34, 50, 101 or 152, from the number of residual blocks and of convolutions in each; else None."""
    lengths = [max(map(len, chains)) for chains in _branches(model)]
    return DEPTHS.get((lengths[0], len(lengths))) if len(set(lengths)) == 1 else None


def _branches(model: Any) -> list[list[list[tuple[int, int]]]]:
    """For each residual Add, the convolutions on either side since the fork: (kernel, stride), in order."""
    constants = {t.name: list(t.dims) for t in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output if name}
    readers = graph.consumers(model)
    out = []
    for add in model.graph.node:
        if add.op_type == "Add" and not constants.keys() & set(add.input):
            out.append([_chain(name, producers, readers, constants) for name in add.input])
    return out


def _chain(
    name: str, producers: dict[str, Any], readers: dict[str, list[Any]], constants: dict[str, list[int]]
) -> list[tuple[int, int]]:
    chain: list[tuple[int, int]] = []
    while (node := producers.get(name)) is not None and len(readers[name]) == 1:
        if node.op_type == "Conv":
            numbers: dict[str, Any] = {a.name: list(a.ints) or a.i for a in node.attribute}
            kernel = numbers.get("kernel_shape") or constants.get(node.input[1], [0] * 4)[2:]
            if not (numbers.get("group", 1) > 1 and set(kernel) == {1}):  # that would be a batch norm on its own
                chain.append((kernel[0] if len(set(kernel)) == 1 else 0, max(numbers.get("strides") or [1])))
        elif node.op_type not in TRANSPARENT:
            break
        name = node.input[0]
    return chain[::-1]
