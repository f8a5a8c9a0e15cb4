from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from conftest import batch, measure

from edgeres import equalize, graph
from edgeres.calibrate import RangeTable, TensorRange
from edgeres.calibration_cache import header, read, scales, write
from edgeres.errors import InputError
from edgeres.thresholds import METHODS


@pytest.mark.parametrize(
    ("version", "number"),
    [("8.5.2", 8502), ("8.6.1", 8601), ("8.6.1.6", 8601), ("10.3.0", 100300), ("10.14.1", 101401), ("10.0.1", 100001)],
)
def test_the_header_counts_versions_as_tensorrt_does(version: str, number: int) -> None:
    assert header(version) == f"TRT-{number}-EntropyCalibration2"


def test_the_header_names_another_algorithm() -> None:
    assert header("8.5.2", "MinMaxCalibration") == "TRT-8502-MinMaxCalibration"


@pytest.mark.parametrize("version", ["", "10", "10.3", "ten.three.zero", "10.x.1", "v8.6.1"])
def test_what_is_no_version_is_refused(version: str) -> None:
    with pytest.raises(InputError, match="is no TensorRT version") as caught:
        header(version)
    assert repr(version) in caught.value.cause
    assert "10.3.0" in caught.value.hint


def test_a_cache_as_written_by_hand() -> None:
    # 1.0 is sign 0, exponent 127, mantissa 0: 0 01111111 000... = 3f800000; 0.15625 = 1.25 * 2^-3: 3e200000
    text = write({"input": 1.0, "layer1.0.relu1": 0.15625}, "10.3.0")
    assert text == "TRT-100300-EntropyCalibration2\ninput: 3f800000\nlayer1.0.relu1: 3e200000\n"


def test_what_is_written_is_read_to_the_bit() -> None:
    values = [1.0, 0.1, 1 / 127, 3e-39, 1e-45, 3e38, 0.0, float(np.nextafter(np.float32(1), np.float32(2)))]
    values += np.random.default_rng(0).random(50).tolist()
    names = [f"tensor{i}" for i in range(len(values))]
    first, found = read(write(dict(zip(names, values, strict=True)), "8.6.1"))
    assert first == "TRT-8601-EntropyCalibration2"
    assert list(found) == names
    assert list(found.values()) == [float(np.float32(v)) for v in values]


def test_it_reads_what_tensorrt_writes_unpadded_and_under_names_of_its_own() -> None:
    text = "TRT-8502-EntropyCalibration2\n(Unnamed Layer* 64) [Shuffle]_output: 3d2f0c1a\na: b: c: 800000\nzero: 0\n"
    _, found = read(text)
    (first,) = struct.unpack(">f", b"\x3d\x2f\x0c\x1a")
    smallest_normal = float(np.finfo(np.float32).tiny)
    assert found == {"(Unnamed Layer* 64) [Shuffle]_output": first, "a: b: c": smallest_normal, "zero": 0.0}


def test_names_with_spaces_and_colons_come_back() -> None:
    names = {"a b": 1.0, "a: b": 2.0, "x:0": 4.0, " : ": 8.0}
    assert read(write(names, "8.6.1"))[1] == names


@pytest.mark.parametrize("line", ["input 3f800000", "input: 3f80000g", "input: 3f8000000", "input: ", "3f800000", ""])
def test_a_damaged_line_is_refused_with_its_place(line: str) -> None:
    text = f"TRT-8601-EntropyCalibration2\ngood: 3f800000\n{line}\nbetter: 3f800000\n"
    with pytest.raises(InputError, match="calibration cache is damaged") as caught:
        read(text)
    assert caught.value.evidence == f"line 3: {line!r}"


@pytest.mark.parametrize("text", ["", "input: 3f800000\n", "{}", "\n\n"])
def test_what_is_no_cache_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="no TensorRT calibration cache"):
        read(text)


def test_every_tensor_but_the_logits_has_a_scale_in_graph_order(tiny: Any, table: RangeTable) -> None:
    found = scales(tiny, table, "minmax")
    order = [graph.INPUT, *(o for n in tiny.graph.node for o in n.output if o != graph.OUTPUT)]
    assert list(found) == order


@pytest.mark.parametrize("method", METHODS)
def test_scales_are_the_thresholds_over_127_and_fused_tensors_share_them(
    tiny: Any, table: RangeTable, method: str
) -> None:
    found = scales(tiny, table, method)
    relus = [n for n in tiny.graph.node if n.op_type == "Relu"]
    assert len(relus) == 13
    for node in relus:
        assert found[node.input[0]] == found[node.output[0]]
    assert found["maxpool"] == found["relu"]
    assert found["flatten"] == found["avgpool"]
    if method == "minmax":
        for name, r in table.tensors.items():
            if name != "maxpool":
                assert found[name] == np.float32(max(-r.min, r.max) / 127)


def test_one_worked_by_hand(tiny: Any, table: RangeTable) -> None:
    known = TensorRange()
    known.update(np.asarray([-3.175, 1, 2], np.float32))  # 3.175 / 127 = 0.025 = 1.6 * 2^-6: 3ccccccd
    tensors = {**table.tensors, "layer1.0.conv3": known}
    text = write(scales(tiny, RangeTable(table.made_from, tensors=tensors), "minmax"), "10.3.0")
    assert "layer1.0.conv3: 3ccccccd" in text.splitlines()


def test_scales_are_of_the_evened_out_model(tiny: Any) -> None:
    exponents = equalize.measure(tiny, [batch()])
    assert exponents
    even = equalize.equalize(tiny, exponents)
    measured = measure(even, batch())
    table = RangeTable({"model": graph.digest(tiny)}, 8, [], exponents, measured.tensors)
    assert scales(tiny, table, "minmax") == scales(even, measured, "minmax")
