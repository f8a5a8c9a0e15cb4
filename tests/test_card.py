from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from records import SHA, record, save

from edgeres import result
from edgeres.card import card
from edgeres.cli import cli
from edgeres.files import write_json
from edgeres.recipe import Preprocess, Recipe, from_dict, tomllib
from edgeres.words import NONE

ENGINE = {"sha256": SHA["int8"], "classes": 10, "executor": "onnxruntime", "io": "uint8", "kept_fp32": ["conv1", "fc"]}


def part(document: str, title: str) -> str:
    return document.split(f"\n## {title}\n")[1].split("\n## ")[0]


def recipe(document: str) -> Recipe:
    (block,) = re.findall(r"```toml\n(.*?)```", document, re.DOTALL)
    return from_dict(Recipe, tomllib.loads(block))


def test_it_says_what_was_quantized_on_what() -> None:
    what = part(card(record(), ENGINE), "What it is")
    for words in (
        "| network | resnet50 v1.5 |",
        "| weights | resnet50-v1.5-cifar10.safetensors |",
        "| classes | 10 |",
        "| executed by | onnxruntime cpu |",
        "| kept in FP32 | conv1, fc |",
        "calibrated on 512 images of the calibration set by the method `mse`",
        "weight bits 8",
        "crop 64; resize 64; interpolation bilinear; mean 0.485, 0.456, 0.406",
    ):
        assert words in what


def test_it_says_what_that_cost() -> None:
    numbers = part(card(record()), "What it costs and wins")
    assert "| top-1 % | 86.25 (85.56 to 86.91) | 86.20 (85.51 to 86.86) | -0.05 (-0.19 to +0.09) |" in numbers
    assert "2.33 times as fast (2.29 to 2.38)" in numbers
    assert "99.04 % of 10,000 images" in numbers
    assert "1 of 10 classes lost images beyond chance: cat (lost " in numbers
    assert "(exact McNemar test): 0.580" in numbers
    assert "AMD EPYC, 2 cores" in numbers


def test_classes_that_won_more_than_they_lost_are_not_hurt() -> None:
    r = record()
    r["classes"] = [{**c, "p_adjusted": 0.001, "lost": 2, "won": 2 + 9 * (c["index"] != 4)} for c in r["classes"]]
    r["classes"][7] |= {"lost": 9, "won": 2}
    assert "1 of 10 classes lost images beyond chance: horse (lost 9, won 2)." in card(r)


def test_a_latency_that_is_not_stable_is_marked_with_the_reason() -> None:
    r = record()
    assert "not stable" not in card(r)
    r["latency"]["runners"]["INT8"] |= {"stable": False, "warnings": ["times scatter"]}
    r["latency"]["notes"] = ["no FP16 engine"]
    numbers = part(card(r), "What it costs and wins")
    (row,) = [line for line in numbers.splitlines() if line.startswith("| p50 ms")]
    assert [("not stable" in cell) for cell in row.split("|")[2:4]] == [False, True]
    assert "- Latency is **not stable**: INT8: times scatter; governor is schedutil, not performance\n" in numbers
    assert "- Latency: no FP16 engine" in numbers


def test_the_verdict_comes_first() -> None:
    assert card(record(verdict="FAIL", reasons=["a", "b"])).split("\n\n")[1] == "**FAIL**: a; b."
    free = record(verdict=None, reasons=[], budget={"max_drop": None, "min_relative": None, "accepted": None})
    assert card(free).split("\n\n")[1] == "Not judged: no budget was set."
    shard = {**free, "shard": {"index": 1, "of": 2}}
    assert card(shard).split("\n\n")[1] == "Not judged: shard 1 of 2."


def test_the_license_is_that_of_the_weights_or_unknown() -> None:
    r = record()
    assert part(card(r), "License").strip() == "Unknown: the license of the weights is not recorded."
    r["provenance"]["digests"]["weights"]["license"] = "BSD-3-Clause (torchvision); trained on ImageNet-1k"
    assert part(card(r), "License").strip() == "Weights: BSD-3-Clause (torchvision); trained on ImageNet-1k."


def test_the_recipe_in_it_is_the_one_that_was_recorded() -> None:
    budget = {"max_drop": 0.5, "min_relative": 99.0, "accepted": {"path": "old.json", "top1": 86, "max_loss": 0.1}}
    r = record(budget=budget, images_of=5000)
    r["provenance"]["quantization"]["weights"] = "mse"
    made = recipe(card(r, ENGINE))
    assert made.name == "resnet50-v1.5-cifar10"
    assert (made.model.depth, made.model.variant) == (50, "v1.5")
    assert made.preprocess == Preprocess.from_json(r["provenance"]["preprocess"])
    assert (made.calibration.limit, made.calibration.method, made.calibration.weights) == (512, "mse", "mse")
    assert (made.engine.target, made.engine.precision, made.engine.io) == ("cpu", "int8", "uint8")
    assert made.validation.limit == 5000
    assert vars(made.budget) == {"max_drop": 0.5, "min_relative": 99.0, "accepted": "old.json", "max_loss": 0.1}
    assert "edgeres run int8.toml --weights WEIGHTS --calibration TRAIN --data VALIDATION" in card(r)


def test_a_recipe_may_have_any_character_in_its_name() -> None:
    assert recipe(card(record(name="caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{HOT BEVERAGE} \U0001f600"))).name == (
        "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{HOT BEVERAGE} \U0001f600"
    )


def test_fp16_needs_no_calibration() -> None:
    r = record("fp16", model="resnet18")
    r["provenance"]["quantization"] = None
    document = card(r)
    assert "No images were needed for that." in document
    assert "edgeres run fp16.toml --weights WEIGHTS --data VALIDATION" in document
    assert recipe(document).model.depth == 18


def test_a_network_that_is_not_known_has_no_recipe() -> None:
    document = card(record(model="somebody's net"))
    assert "toml" not in document
    assert "not recorded well enough" in document


def test_every_digest_is_there() -> None:
    table = part(card(record()), "Digests")
    for digest in ("a", "b", "c", "d", "8", "0"):
        assert f"`{digest * 64}`" in table


def test_what_is_not_known_is_not_said() -> None:
    r = record(labels=False, drop=None, flips=0, classes=10, latency=None, notes=["fc is FP32"])
    nothing = dict.fromkeys(("top1", "top5", "top1_interval", "top5_interval"))
    r |= {side: {**r[side], **nothing, "latency_ms": None} for side in result.SIDES} | {"classes": None, "flips": None}
    r["provenance"]["digests"]["weights"] = None
    r["provenance"]["quantization"] = None
    document = card(r)
    assert "its accuracy is not known" in document
    assert "unknown: it is not recorded" in document
    assert "- fc is FP32" in document
    for absent in ("top-1 %", "p50", "McNemar", "None", "nan", "Measured on"):
        assert absent not in document


def test_names_do_no_harm() -> None:
    odd = "<b>|`x`\n# y"
    document = card(record(name=odd, model=odd, target=odd, reasons=[odd], notes=[odd]))
    assert "<b>" not in document
    assert "\n# y" not in document


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def test_the_command_writes_the_card_of_an_engine(tmp_path: Path) -> None:
    path = save(tmp_path / "engine", record())
    write_json(tmp_path / "engine" / "engine.json", ENGINE)
    assert run("card", tmp_path / "engine", "-o", "new/CARD.md").exit_code == 0
    assert Path("new/CARD.md").read_text(encoding="utf-8") == card(record(), ENGINE)
    done = run("card", path, "--json")
    assert json.loads(done.stdout) == {"card": "card.md"}
    name = f"{130 * 'n'}[v1]:100:.md"  # neither folded, nor markup
    assert run("card", path, "-o", name).stdout == f"{name}\n"
    assert Path("card.md").exists()


def test_the_command_takes_one_result(tmp_path: Path) -> None:
    write_json(tmp_path / "list.json", [record(), record("fp16")])
    done = run("card", "list.json")
    assert done.exit_code == 1
    assert "list.json holds 2 results" in done.stderr


def test_a_result_of_the_first_format_has_a_card() -> None:
    (r,) = result.load(Path(__file__).parent / "data" / "result-1.json")
    document = card(r)
    assert recipe(document).model.variant in r["model"]
    assert "classes lost images" not in document


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "engines").glob("*.result.json")), ids=lambda p: p.stem
)
def test_an_accepted_result_has_a_card(path: Path) -> None:
    (r,) = result.load(path)
    document = card(r)
    assert recipe(document).model.variant in r["model"]
    assert "of 10 classes lost images beyond chance" in document


def test_a_card_of_a_device_has_what_the_device_measured() -> None:
    r = record()
    r["baseline"]["latency_ms"] = None
    r["latency"] = {**r["latency"], "runners": {"INT8": r["latency"]["runners"]["INT8"]}, "speedup": {}}
    r["provenance"] |= {"host": "orin", "bundle": {"digest": "b" * 64, "signer": None}}
    document = card(r)
    (row,) = [line for line in document.splitlines() if line.startswith("| p50 ms")]
    assert row.split("|")[2].strip() == NONE
    assert row.split("|")[3].strip() not in ("", NONE)
    assert "Measured on: orin, " in document
    assert "b" * 64 in document
