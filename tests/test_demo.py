from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from edgeres import demo
from edgeres.layouts import open_images


def test_digits_are_split_without_overlap_and_written_once(tmp_path: Path) -> None:
    demo.write_digits(tmp_path)
    train, test = open_images(tmp_path / "train"), open_images(tmp_path / "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.classes == test.classes == tuple("0123456789")
    assert not set(train.hashes()) & set(test.hashes())
    first = tmp_path / "train" / "1" / "0001.pgm"
    with Image.open(first) as image:
        assert image.size == (8, 8)
    os.utime(first, (0, 0))
    demo.write_digits(tmp_path)
    assert first.stat().st_mtime == 0


def test_demo_trains_once_then_walks_the_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "STEPS", 2)  # the flow, not the accuracy
    monkeypatch.setattr(demo, "BATCH", 16)
    results = demo.run("v1")
    assert [r["precision"] for r in results] == ["fp16", "int8"]
    assert all(r["images"] == 360 and r["model"] == "resnet50 v1" for r in results)
    assert results[0]["sqnr_db"] > 40
    assert results[1]["provenance"]["quantization"]["images"] == 512

    def refuse(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(demo, "train", refuse)
    again = demo.run("v1")
    assert [r["engine"]["top1"] for r in again] == [r["engine"]["top1"] for r in results]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["v1.5", "v1"])
def test_demo_reaches_its_accuracy(variant: str) -> None:
    _, int8 = demo.run(variant)
    assert int8["baseline"]["top1"] >= 97
    assert int8["verdict"] == "PASS"
    assert int8["engine"]["latency_ms"]["p50"] < int8["baseline"]["latency_ms"]["p50"]
