"""The few ONNX graph operations that everything shares.

Normal form, which `export` writes and every later step expects: FP32, one input ``input`` (N, 3, H, W), one output
``logits`` (N, classes), batch norm folded, and an ``edgeres`` entry in the metadata that says where it came from.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

import edgeres
from edgeres.errors import InputError, need
from edgeres.files import atomic, to_json

METADATA_KEY = "edgeres"
INPUT, OUTPUT = "input", "logits"
LAYERS = ("Conv", "Gemm")
"""Operators with weights, whose output channels lie on axis 0 of the weight."""


def load(path: Path) -> Any:
    """Read and check an ONNX file -> ModelProto."""
    onnx = need("onnx", "onnx")
    if not path.is_file():
        raise InputError(f"no ONNX file {path}", hint="`edgeres export` writes one")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(str(path))  # given the model, it would serialize all of it first
    except Exception as error:  # protobuf and the checker raise many kinds, none of them documented
        raise InputError(
            f"{path} is not a valid ONNX file",
            evidence=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            hint="it may be cut short or damaged; make or fetch it again",
        ) from error
    return model


def assemble(
    nodes: list[Any],
    constants: list[Any],
    title: str,
    image: tuple[int, ...],
    classes: int,
    opset: int,
    batch: int | None,
) -> Any:
    """A checked model in normal form: `INPUT` (N, *image) to `OUTPUT` (N, classes), N free or ``batch``."""
    helper = need("onnx.helper", "onnx")
    N = batch if batch is not None else "N"
    model = helper.make_model(
        helper.make_graph(
            nodes,
            title,
            [helper.make_tensor_value_info(INPUT, 1, [N, *image])],
            [helper.make_tensor_value_info(OUTPUT, 1, [N, classes])],
            constants,
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        producer_name="edgeres",
        producer_version=edgeres.__version__,
    )
    # the oldest IR that may carry this opset: runtimes refuse IR versions newer than themselves
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)
    need("onnx.checker", "onnx").check_model(model)
    assert [o.version for o in model.opset_import] == [opset]
    return model


def save(model: Any, path: Path) -> None:
    """Check ``model`` and write it as one file, whole or not at all."""
    onnx = need("onnx", "onnx")
    onnx.checker.check_model(model)
    with atomic(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))


def metadata(model: Any) -> dict[str, Any]:
    """What edgeres wrote into ``model`` ({} for a foreign file)."""
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            try:
                return dict(json.loads(entry.value))
            except (TypeError, ValueError):  # somebody else's entry of that name
                return {}
    return {}


def set_metadata(model: Any, values: dict[str, Any]) -> None:
    """Replace edgeres' entry in the metadata of ``model``."""
    kept = [entry for entry in model.metadata_props if entry.key != METADATA_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    model.metadata_props.add(key=METADATA_KEY, value=to_json(values))


def digest(model: Any) -> str:
    """SHA-256 of what ``model`` computes: graph and opset, not the metadata, nor shapes that some tool noted down.

    Metadata holds measured numbers, which differ between machines; the same weights give the same digest anywhere.
    """
    bare = type(model.graph)()
    bare.CopyFrom(model.graph)
    del bare.value_info[:]
    h = hashlib.sha256(bare.SerializeToString(deterministic=True))
    h.update(json.dumps(sorted((o.domain, o.version) for o in model.opset_import)).encode())
    return h.hexdigest()


def normal_form(model: Any, path: Path) -> dict[str, Any]:
    """Metadata of an FP32 model in normal form, or `InputError` saying what is missing."""
    record = metadata(model)
    inputs, outputs = [i.name for i in model.graph.input], [o.name for o in model.graph.output]
    if inputs == [INPUT] and outputs == [OUTPUT] and record.get("precision") == "fp32":
        return record
    seen = f"inputs {inputs}, outputs {outputs}, precision {record.get('precision', 'not recorded')}"
    raise InputError(
        f"{path} is not an FP32 model made by edgeres",
        evidence=seen,
        hint="give the file that `edgeres export` wrote",
    )


def initializers(model: Any) -> dict[str, np.ndarray]:
    """Constant tensors by name."""
    numpy_helper = need("onnx.numpy_helper", "onnx")
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def consumers(model: Any) -> dict[str, list[Any]]:
    """Tensor name -> the nodes that read it, in graph order."""
    out: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            out.setdefault(name, []).append(node)
    return out


def activations(model: Any) -> list[str]:
    """Tensors that an INT8 executor may hold as integers, in graph order.

    That is every value between two nodes except what only a ReLU reads (it is fused into its producer, so the ReLU's
    output is what exists) and what comes out of Flatten (the same numbers under another shape).
    """
    readers = consumers(model)
    names = [i.name for i in model.graph.input]
    names += [out for node in model.graph.node if node.op_type != "Flatten" for out in node.output]
    ends = {o.name for o in model.graph.output}
    return [n for n in names if n not in ends and {r.op_type for r in readers.get(n, [])} not in ({"Relu"}, set())]


def main_branch(model: Any, add: Any) -> str | None:
    """The input of a residual Add that comes bare from a convolution, into which the Add is fused; the longer of two.

    TensorRT does not fuse across a Q/DQ pair there; one on the other input is what lets the sum run in INT8.
    """
    producer = {out: node for node in model.graph.node for out in node.output}
    readers = consumers(model)
    depth: dict[str, int] = {}  # layers on the longest way from the graph's input
    for node in model.graph.node:
        here = (node.op_type in LAYERS) + max((depth.get(i, 0) for i in node.input), default=0)
        depth.update(dict.fromkeys(node.output, here))
    bare = [i for i in add.input if i in producer and producer[i].op_type == "Conv" and len(readers[i]) == 1]
    return max(bare, key=depth.__getitem__, default=None)


def count_ops(model: Any) -> dict[str, int]:
    """Operator type -> number of nodes, most frequent first."""
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def raise_opset(model: Any, opset: int) -> None:
    """Let ``model`` import at least ``opset``, in place.

    The operators of a normal form and of Q/DQ mean the same from 13 to 22: they gained types, and attributes whose
    defaults are what was meant before (ONNX, Changelog.md).
    """
    helper = need("onnx.helper", "onnx")
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = max(entry.version, opset)
    least = helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)  # other domains have no say
    model.ir_version = max(model.ir_version, least)


def expose(model: Any, outputs: list[str]) -> Any:
    """A copy of ``model`` that takes any batch and gives the named tensors."""
    helper = need("onnx.helper", "onnx")
    out = type(model)()
    out.CopyFrom(model)
    out.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    del out.graph.output[:]
    out.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
    return out


def set_nodes(model: Any, nodes: list[Any]) -> None:
    """Make ``nodes``, of which some may be ``model``'s own, its nodes."""
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
