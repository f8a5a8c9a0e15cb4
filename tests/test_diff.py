from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rows
from click.testing import CliRunner
from records import SHA, latency, layers, record
from rich.console import Console

from edgeres.cli import cli
from edgeres.diff import diff
from edgeres.errors import InputError, StaleError
from edgeres.files import write_json
from edgeres.statistics import mcnemar, paired, unpaired

ENGINE = {
    "sha256": SHA["int8"],
    "precision": "int8",
    "target": "cpu",
    "size_bytes": 24_000_000,
    "executor": "onnxruntime",
}


def write(folder: Path, r: dict[str, Any], lost: int = 0, won: int = 0, images: int = 10_000) -> Path:
    """A result whose engine lost and won so many images against its baseline, with its outcomes beside it."""
    outcomes = rows.flips(images, lost, won, right=images - lost - won)
    folder.mkdir()
    r["provenance"]["digests"]["outcomes"] = outcomes.save(folder / "outcomes.npz")
    r["engine"]["top1"] = 100 * float(outcomes.hits(outcomes.engine_top)[0].mean())
    r["images"] = images
    write_json(folder / "result.json", r)
    return folder / "result.json"


def plain(folder: Path, r: dict[str, Any]) -> Path:
    """A result without outcomes."""
    write_json(folder / "result.json", r)
    return folder / "result.json"


def engine(folder: Path, **changes: Any) -> Path:
    write_json(folder / "engine.json", {**ENGINE, **changes})
    return folder


def timed(factor: float = 1.0, fp32: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """A benchmark in which the engine takes ``factor`` as long, and FP32 ``fp32``."""
    made = latency(("FP32", "INT8"), seed)
    for name, by in (("FP32", fp32), ("INT8", factor)):
        run = made["runners"][name]
        run["p50"] *= by
        run["intervals"]["p50"] = [by * end for end in run["intervals"]["p50"]]
    made["speedup"]["INT8"] = {
        key: np.multiply(v, fp32 / factor).tolist() for key, v in made["speedup"]["INT8"].items()
    }
    return made


def compared(tmp_path: Path, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return diff(plain(tmp_path / "a", a), plain(tmp_path / "b", b))[0]


def shown(a: Path, b: Path) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(diff(a, b)[1])
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_spoilt_engine_record_is_refused(tmp_path: Path) -> None:
    whole = engine(tmp_path / "a", made_from={"model": "a" * 64})
    with pytest.raises(InputError, match=r"engine record .* is damaged"):
        diff(whole, engine(tmp_path / "b", made_from={"model": 5}))


def test_accuracy_is_paired_where_the_images_are_the_same(tmp_path: Path) -> None:
    # both are right on the rest; A is wrong on the first 10, B on the first 45
    a, b = write(tmp_path / "a", record(), lost=10), write(tmp_path / "b", record(), lost=45)
    found = diff(a, b)[0]["accuracy"]
    assert (found["how"], found["lost"], found["won"], found["images"]) == ("paired by image", 35, 0, 10_000)
    assert found["drop"] == pytest.approx(0.35)
    assert found["interval"] == pytest.approx(paired(35, 0, 10_000))
    assert found["p_value"] == mcnemar(35, 0)
    assert (found["change"], found["note"]) == ("worse", None)
    assert diff(b, a)[0]["accuracy"]["change"] == "better"
    assert diff(a, a)[0]["accuracy"]["change"] == "none"


def test_the_same_answers_are_known_by_their_digest(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", record(), lost=10), write(tmp_path / "b", record(), lost=10)
    (tmp_path / "b" / "outcomes.npz").unlink()
    found = diff(a, b)[0]["accuracy"]
    assert (found["lost"], found["won"], found["change"]) == (0, 0, "none")
    assert found["interval"] == pytest.approx(paired(0, 0, 10_000))
    assert found["note"] == "every answer of B is A's to the last bit"


def test_only_images_of_both_are_compared(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", record(), lost=10), record()
    outcomes = rows.flips(10_000, 40, 0, right=9960)
    part = replace(outcomes, **{k: v[5:] for k, v in vars(outcomes).items() if k != "skipped"})
    (tmp_path / "b").mkdir()
    b["provenance"]["digests"]["outcomes"] = part.save(tmp_path / "b" / "outcomes.npz")
    value = diff(a, plain(tmp_path / "b", b))[0]
    assert (value["accuracy"]["lost"], value["accuracy"]["images"], value["incomparable"]) == (30, 9995, [])
    assert value["accuracy"]["note"] == "compared on the 9,995 images of both; A has 10,000, B 10,000"


def shard(folder: Path, index: int, keep: slice) -> Path:
    """The result of a part of 10,000 images, of which the engine loses the first 40."""
    whole = rows.flips(10_000, 40, 0, right=9960)
    part = replace(whole, **{k: v[keep] for k, v in vars(whole).items() if k != "skipped"})
    r = record() | {"shard": {"index": index, "of": 2}, "images": len(part)}
    folder.mkdir()
    r["provenance"]["digests"]["outcomes"] = part.save(folder / "outcomes.npz")
    return plain(folder, r)


def test_a_shard_against_the_whole_says_on_which_images_it_was_compared(tmp_path: Path) -> None:
    whole, part = write(tmp_path / "whole", record(), lost=10), shard(tmp_path / "part", 1, slice(32))
    text = shown(whole, part)
    assert "note: top-1: compared on the 32 images of both; A has 10,000, B 32\n" in text
    assert failed(part, whole) == 0


def test_two_shards_without_a_common_image_are_not_compared(tmp_path: Path) -> None:
    a, b = shard(tmp_path / "a", 1, slice(0, 5000)), shard(tmp_path / "b", 2, slice(5000, 10_000))
    value = diff(a, b)[0]
    assert (value["accuracy"]["change"], value["incomparable"]) == ("unknown", ["images"])
    assert value["accuracy"]["note"] == "not judged: A and B are parts of one set, without an image in common"
    assert failed(a, b) == 1
    (tmp_path / "b" / "outcomes.npz").unlink()
    assert "the outcomes.npz of both would be needed" in diff(a, b)[0]["accuracy"]["note"]
    assert failed(a, b) == 1


def test_a_loss_that_shows_only_when_paired(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", record(), lost=10), write(tmp_path / "b", record(), lost=45)
    for folder in ("a", "b"):
        (tmp_path / folder / "outcomes.npz").unlink()
    found = diff(a, b)[0]["accuracy"]
    assert found["interval"] == pytest.approx(unpaired((9990, 10_000), (9955, 10_000)))
    assert (found["how"], found["p_value"]) == ("not paired", None)
    assert "outcomes.npz of both" in found["note"]


def failed(a: Path, b: Path) -> int:
    """Exit status of the command."""
    return CliRunner().invoke(cli, ["diff", str(a), str(b)]).exit_code


def of_another(key: str, value: Any, **changes: Any) -> dict[str, Any]:
    """A record of another model, other weights or other images."""
    r = record(**changes)
    r["provenance"]["digests"][key] = value
    return r


@pytest.mark.parametrize("lost", [0, 500])
def test_an_easier_image_set_hides_no_regression(tmp_path: Path, lost: int) -> None:
    a = write(tmp_path / "a", record(latency=timed()), lost=100)
    b = write(tmp_path / "b", of_another("images", "e" * 64, latency=timed(1.3)), lost=lost)
    value = diff(a, b)[0]
    assert (value["accuracy"]["change"], value["accuracy"]["drop"], value["incomparable"]) == (
        *("unknown", None, ["images"]),
    )
    assert value["worse"] == ["p50"]  # for which it does not matter
    text = shown(a, b)
    assert "note: top-1: not judged: the images differ, and others may be easier" in text
    assert "NOT COMPARABLE: other images\n" in text
    assert "beyond noise" not in text
    assert re.search(r"top-1 % +99.00 +(100.00|95.00)", text)
    assert failed(a, b) == 1


def test_another_network_is_no_better_engine(tmp_path: Path) -> None:
    other = of_another("model", "e" * 64, latency=timed(0.5))
    other["provenance"]["digests"]["weights"] = {"source": "digits.pth", "sha256": "f" * 64}
    a, b = write(tmp_path / "a", record(latency=timed()), lost=100), write(tmp_path / "b", other)
    value = diff(a, b)[0]
    assert (value["accuracy"]["change"], value["latency"]["change"], value["incomparable"]) == (
        *("unknown", "unknown", ["network"]),
    )
    words = f"not judged: the FP32 models differ: {'a' * 12} and {'e' * 12}"
    assert value["accuracy"]["note"] == value["latency"]["note"] == words
    assert "NOT COMPARABLE: other network\n" in shown(a, b)
    assert failed(a, b) == failed(b, a) == 1
    other["provenance"]["digests"]["weights"] = None  # not known: then the graph alone tells
    assert diff(a, plain(tmp_path / "b", other))[0]["incomparable"] == ["network"]


def test_the_same_weights_exported_otherwise_and_built_otherwise_are_compared(tmp_path: Path) -> None:
    newer = of_another("model", "e" * 64, target="rtx")
    newer["provenance"]["built_with"] = {"tensorrt": "10.9.0"}
    newer["provenance"]["digests"]["engine"] = "9" * 64
    a, b = write(tmp_path / "a", record(), lost=100), write(tmp_path / "b", newer, lost=10)
    value = diff(a, b)[0]
    assert (value["accuracy"]["change"], value["incomparable"]) == ("better", [])
    assert failed(a, b) == 0


def test_engines_of_other_networks_are_told_apart_without_results(tmp_path: Path) -> None:
    a, b = engine(tmp_path / "a", made_from={"model": "a" * 64}), engine(tmp_path / "b", made_from={"model": "b" * 64})
    assert diff(a, b)[0]["incomparable"] == ["network"]
    assert diff(a, a)[0]["incomparable"] == []
    assert (failed(a, b), failed(a, a)) == (1, 0)


def test_without_labels_accuracy_is_unknown(tmp_path: Path) -> None:
    r = record(labels=False, drop=None, classes=10)
    r |= {"flips": None, "classes": None} | {s: {**r[s], "top1": None, "top5": None} for s in ("baseline", "engine")}
    found = compared(tmp_path, record(), r)["accuracy"]
    assert (found["change"], found["drop"], found["note"]) == ("unknown", None, "there is no accuracy of B")


def test_outcomes_that_were_changed_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a", record())
    rows.flips(100, 50, 0).save(tmp_path / "a" / "outcomes.npz")
    with pytest.raises(StaleError, match="is not what its result was computed from"):
        diff(a, a)


def test_a_slower_engine_is_worse_where_its_interval_says_so(tmp_path: Path) -> None:
    found = compared(tmp_path, record(latency=timed()), record(latency=timed(1.2)))
    assert found["latency"]["ratio"] == pytest.approx(1.2)
    assert found["latency"]["interval"] == pytest.approx([1.2 * 0.995 / 1.006, 1.2 * 1.006 / 0.995])
    assert (found["latency"]["change"], found["worse"]) == ("worse", ["p50"])


@pytest.mark.parametrize(("factor", "change"), [(1.01, "none"), (0.99, "none"), (1.012, "worse"), (0.8, "better")])
def test_what_is_within_noise_is_no_change(factor: float, change: str, tmp_path: Path) -> None:
    a, b = timed(), timed(factor)
    for made in (a, b):
        made["speedup"] = {}
    assert compared(tmp_path, record(latency=a), record(latency=b))["latency"]["change"] == change


def test_a_slower_machine_is_no_slower_engine(tmp_path: Path) -> None:
    found = compared(tmp_path, record(latency=timed()), record(latency=timed(1.2, fp32=1.2)))["latency"]
    assert (found["change"], found["note"]) == ("none", "FP32 got slower too: it is the machine")
    assert found["against_fp32"][0] < 1 < found["against_fp32"][1]


def test_a_slower_executor_is(tmp_path: Path) -> None:
    # FP32 is slower too, but by another version: it says nothing about the machine
    b = record(latency=timed(1.2, fp32=1.2))
    b["provenance"]["built_with"]["onnxruntime"] = "1.32.0"
    found = compared(tmp_path, record(latency=timed()), b)
    assert (found["latency"]["change"], found["latency"]["against_fp32"]) == ("worse", None)
    assert found["versions"]["onnxruntime"] == ["1.31.1", "1.32.0"]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("latency", "batch"), 8, "batch is 1 and 8"),
        (("latency", "preset"), "trtexec-10", "preset is edgeres and trtexec-10"),
        (("provenance", "machine", "cpu"), "Cortex", "the machines differ: cpu AMD EPYC and Cortex"),
        (("latency", "runners", "INT8", "stable"), False, "B was not measured under stable conditions"),
    ],
)
def test_what_cannot_be_compared_is_not_judged(path: tuple[str, ...], value: Any, words: str, tmp_path: Path) -> None:
    b = record(latency=timed(2.0))
    inner = b
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    found = compared(tmp_path, record(latency=timed()), b)
    assert found["latency"]["note"] == f"not judged: {words}"
    assert (found["latency"]["change"], found["worse"]) == ("unknown", [])


def test_the_machine_that_counts_is_the_one_of_the_benchmark(tmp_path: Path) -> None:
    a, b = record(latency=timed()), record(latency=timed(2.0))
    for r, cpu in ((a, "Cortex-A78AE"), (b, "Cortex-A78AE")):
        r["latency"]["machine"] = {"cpu": cpu, "cores": 12}
    b["provenance"]["machine"]["cpu"] = "another"
    assert compared(tmp_path, a, b)["latency"]["change"] == "worse"
    b["latency"]["machine"]["cores"] = 6
    assert compared(tmp_path, a, b)["latency"]["note"] == "not judged: the machines differ: cores 12 and 6"


def test_without_intervals_latency_is_shown_and_not_judged(tmp_path: Path) -> None:
    slow = record(latency=None)
    slow["engine"]["latency_ms"]["p50"] *= 3
    found = compared(tmp_path, record(latency=None), slow)["latency"]
    assert found["ratio"] == pytest.approx(3)
    assert (found["change"], found["interval"]) == ("unknown", None)
    assert "no interval without a benchmark" in found["note"]


def test_energy_size_and_fidelity_of_both(tmp_path: Path) -> None:
    a, b = record(latency=timed(), layers=layers()), record(latency=timed(), layers=layers(), sqnr_db=30.1)
    b["latency"]["runners"]["INT8"]["energy"]["joules_per_image"] = 0.062
    b["engine"]["size_bytes"] = 30_000_000
    b["layers"][4]["sqnr_db"] -= 9
    b["layers"][5]["sqnr_db"] -= 0.5
    b["layers"][2]["sqnr_db"] -= 3
    b["layers"][9]["sqnr_db"] -= 5
    b["layers"][6]["sqnr_db"] = None
    found = compared(tmp_path, a, b)
    assert found["energy"]["joules_per_image"] == [0.031, 0.062]
    assert found["size_bytes"] == [23_997_838, 30_000_000]
    assert found["fidelity"]["sqnr_db"] == [34.8, 30.1]
    assert [row["layer"] for row in found["fidelity"]["layers"]] == [a["layers"][i]["name"] for i in (4, 9, 2)]
    text = shown(tmp_path / "a" / "result.json", tmp_path / "b" / "result.json")
    assert re.search(r"J/image +0.0310 +0.0620 +2.00 times\n", text)
    assert re.search(r"MB +24.0 +30.0 +1.25 times\n", text)
    assert f"layer {a['layers'][4]['name']}: " in text


def test_what_was_made_from_other_things_is_named(tmp_path: Path) -> None:
    b = record(target="rtx")
    b["provenance"]["quantization"]["method"] = "entropy"
    b["provenance"]["digests"]["model"] = "e" * 64
    b["provenance"]["preprocess"]["crop"] = 56
    found = compared(tmp_path, record(), b)["made_from"]
    assert found == {
        "target": ["cpu", "rtx"],
        "quantization method": ["mse", "entropy"],
        "preprocess crop": [64, 56],
        "digest model": ["a" * 64, "e" * 64],
    }
    text = shown(tmp_path / "a" / "result.json", tmp_path / "b" / "result.json")
    assert f"made from: digest model {'a' * 12} -> {'e' * 12}\n" in text


def plan(name: str, ms: float | None, reads: str = "Int8") -> tuple[dict[str, Any], dict[str, float]]:
    tensor = {"Name": f"{name} out", "Dimensions": [1, 8, 8, 8], "Format/Datatype": f"{reads} NC/32HW32 format"}
    layer = {"Name": name, "LayerType": "CaskConvolution", "Inputs": [tensor], "Outputs": [tensor]}
    return layer, {} if ms is None else {name: ms}


def planned(folder: Path, *parts: tuple[dict[str, Any], dict[str, float]], **changes: Any) -> Path:
    engine(folder, **changes)
    times = {name: ms for _, each in parts for name, ms in each.items()}
    kept = {
        "sha256": changes.get("sha256", ENGINE["sha256"]),
        "layers": [layer for layer, _ in parts],
        "times_ms": times,
    }
    write_json(folder / "layers.json", kept)
    return folder


def test_layers_that_changed_in_precision_or_time(tmp_path: Path) -> None:
    a = planned(tmp_path / "a", plan("conv1", 0.1), plan("conv2", 0.2), plan("conv3", 0.3), plan("old", 0.01))
    b = planned(tmp_path / "b", plan("conv1", 0.1, "FP16"), plan("conv2", 0.4), plan("conv3", 0.32), plan("new", 0.01))
    found = diff(a, b)[0]["layers"]
    assert [row["layer"] for row in found["changed"]] == ["conv2", "conv1"]
    assert found["changed"][0]["ms"] == [0.2, 0.4]
    assert found["changed"][1]["types"] == ["INT8 -> INT8", "FP16 -> FP16"]
    assert (found["only_a"], found["only_b"]) == (["old"], ["new"])
    text = shown(a, b)
    assert "layer conv2: INT8 -> INT8, 0.200 to 0.400 ms\n" in text
    assert "layer conv1: INT8 -> INT8 to FP16 -> FP16, 0.100 to 0.100 ms\n" in text
    assert "in B alone: 1 layer: new\n" in text


def test_layers_of_another_engine_are_refused(tmp_path: Path) -> None:
    a = planned(tmp_path / "a", plan("conv1", None))
    write_json(a / "engine.json", {**ENGINE, "sha256": "0" * 64})
    with pytest.raises(StaleError, match="is of another engine"):
        diff(a, a)


def test_engines_without_results_can_be_compared(tmp_path: Path) -> None:
    a, b = engine(tmp_path / "a"), engine(tmp_path / "b", size_bytes=30_000_000, precision="fp16")
    value = diff(a / "engine.json", b)[0]
    assert value["size_bytes"] == [24_000_000, 30_000_000]
    assert value["made_from"] == {"precision": ["int8", "fp16"]}
    assert (value["accuracy"]["change"], value["latency"]["change"], value["worse"]) == ("unknown", "unknown", [])
    assert value["layers"] is None
    assert value["fidelity"] is None


def test_an_engine_folder_brings_its_result(tmp_path: Path) -> None:
    a, b = engine(tmp_path / "a"), engine(tmp_path / "b")
    for folder, lost in ((a, 0), (b, 60)):
        made = write(tmp_path / "x", record(), lost=lost)
        for file in made.parent.iterdir():
            file.rename(folder / file.name)
        made.parent.rmdir()
    assert diff(a, b / "engine.json")[0]["accuracy"]["lost"] == 60


def test_a_result_of_another_engine_than_its_folders(tmp_path: Path) -> None:
    folder = engine(tmp_path / "a", sha256="0" * 64, kept="x")
    path = plain(folder, record())
    with pytest.raises(StaleError, match="is of another engine than the one beside it"):
        diff(folder, folder)
    assert diff(path, path)[0]["accuracy"]["drop"] == 0  # the result alone was asked for


@pytest.mark.parametrize("content", [None, "[]", "{}", "nonsense"])
def test_what_is_neither_is_refused(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    for given in (path, tmp_path):
        with pytest.raises(InputError):
            diff(given, given)
    write_json(path, [record(), record("fp16")])
    with pytest.raises(InputError, match="holds 2 results"):
        diff(path, path)


def test_a_result_is_as_good_as_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "a", record(latency=timed()), lost=20, won=5)
    value, _ = diff(path, path)
    assert (value["accuracy"]["change"], value["latency"]["change"], value["worse"]) == ("none", "none", [])
    assert (value["versions"], value["made_from"]) == ({}, {})
    assert "not worse beyond noise\n" in shown(path, path)


def test_the_command_fails_where_b_is_worse(tmp_path: Path) -> None:
    a = write(tmp_path / "a", record(latency=timed()), lost=10)
    b = write(tmp_path / "b", record(latency=timed(1.3)), lost=100)
    worse = CliRunner().invoke(cli, ["diff", str(a), str(b)])
    assert worse.exit_code == 1
    assert "WORSE in top-1: 0.90 points lost, at least 0." in worse.stdout
    assert "WORSE in p50: 1.300 times as long, at least 1.28" in worse.stdout
    assert CliRunner().invoke(cli, ["diff", str(b), str(a)]).exit_code == 0
    value = json.loads(CliRunner().invoke(cli, ["diff", str(a), str(b), "--json"]).stdout)
    assert (value["format"], value["worse"]) == ("edgeres diff 1", ["top-1", "p50"])


def test_the_terminal_shows_it_within_80_columns(tmp_path: Path) -> None:
    a = write(tmp_path / "a", record(latency=timed()), lost=10)
    b = write(tmp_path / "b", record(latency=timed(1234.5)), lost=4000)
    lines = shown(a, b).splitlines()
    table = lines[2 : lines.index("") if "" in lines else 9]
    assert max(map(len, table)) <= 80
    assert any(line.split()[:3] == ["top-1", "%", "99.90"] for line in lines)
