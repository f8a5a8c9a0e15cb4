from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_resnet
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from edgeres import progress, weights
from edgeres.errors import InputError, MissingDependency, UsageError
from edgeres.model import LAYOUT, ResNet, resnet, resnet50
from edgeres.recipe import Preprocess
from edgeres.weights import Checkpoint, load_checkpoint, load_model, locate, published, torchvision_names

Tensors = dict[str, Tensor]


def save(tensors: Any, path: Path) -> Path:
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


def full_size(classes: int = 5, variant: str = "v1.5") -> Tensors:
    torch.manual_seed(1)
    return resnet50(variant, classes).state_dict()


def outline(classes: int = 5, depth: int = 50) -> Tensors:
    """Names and shapes of a ResNet without the memory: each tensor is one zero, seen many times."""
    with torch.device("meta"):
        shapes = {k: t.shape for k, t in resnet(depth, "v1.5", classes).state_dict().items()}
    return {
        k: torch.zeros((), dtype=torch.int64 if k.endswith("tracked") else None).expand(s) for k, s in shapes.items()
    }


def checkpoint(tensors: Tensors) -> Checkpoint:
    return Checkpoint("mine.pth", "0" * 64, tensors)


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[k], t) for k, t in expected.items())


def noise(n: int = 2, size: int = 40) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(3))


# files


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_tensors_and_hash_come_back_from_a_file(tmp_path: Path, suffix: str) -> None:
    tensors = tiny_resnet().state_dict()
    path = save(tensors, tmp_path / f"a{suffix}")
    found = load_checkpoint(path)
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[k], t) for k, t in tensors.items())
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.source == path.name
    assert load_checkpoint(path, "imagenet").source == "imagenet"


def test_a_full_size_checkpoint_gives_its_logits_back(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = resnet50("v1", 3).eval()
    found = load_model(load_checkpoint(save(model.state_dict(), tmp_path / "a.pth")), "v1")
    with torch.no_grad():
        assert torch.equal(found(noise()), model(noise()))
    assert not found.training
    assert all(p.dtype == torch.float32 for p in found.parameters())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_fp32(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    tensors = {"fc.weight": torch.tensor([[0.5, -1.25]], dtype=dtype), "steps": torch.tensor(7)}
    found = load_checkpoint(save(tensors, tmp_path / f"a{suffix}")).tensors
    assert found["fc.weight"].dtype == torch.float32
    assert found["fc.weight"].tolist() == [[0.5, -1.25]]
    assert found["steps"].dtype == torch.int64


@pytest.mark.parametrize(
    ("content", "evidence"),
    [
        ([torch.zeros(1)], "it holds a list"),
        (torch.zeros(1), "it holds a Tensor"),
        ({}, "it holds a dict with keys []"),
        ({"epoch": 3, "optimizer": {"lr": 0.1}}, "it holds a dict with keys ['epoch', 'optimizer']"),
        ({"state_dict": {"epoch": 3}}, "it holds a dict with keys ['epoch']"),
        ({"model": {}}, "it holds a dict with keys ['model']"),
        ({0: torch.zeros(1)}, "it holds a dict with keys [0]"),
    ],
)
def test_what_holds_no_tensors_by_name_is_refused(tmp_path: Path, content: Any, evidence: str) -> None:
    with pytest.raises(InputError, match="does not hold tensors by name") as error:
        load_checkpoint(save(content, tmp_path / "a.pth"))
    assert error.value.evidence == evidence
    assert "state_dict()" in error.value.hint


class Intruder:
    """Unpickling it makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("intruded",)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    path = save({"fc.weight": Intruder()}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="is not a readable checkpoint") as error:
        load_checkpoint(path)
    assert f"{os.mkdir.__module__}.mkdir" in error.value.evidence
    assert "state_dict()" in error.value.hint
    assert not (tmp_path / "intruded").exists()
    torch.load(path, weights_only=False)  # the same file does harm where code is trusted
    assert (tmp_path / "intruded").exists()


def test_a_whole_pickled_module_is_refused_with_what_to_save_instead(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a readable checkpoint") as error:
        load_checkpoint(save(tiny_resnet(), tmp_path / "a.pth"))
    assert error.value.evidence.endswith("edgeres.model.ResNet")
    assert "torch.save(model.state_dict(), path)" in error.value.hint


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_cut_files_are_refused_by_name(tmp_path: Path, suffix: str, keep: int) -> None:
    path = save({"fc.weight": torch.ones(64, 64)}, tmp_path / f"a{suffix}")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="is not a readable checkpoint") as error:
        load_checkpoint(path)
    assert str(path) in error.value.cause
    assert error.value.evidence
    assert ".safetensors" in error.value.hint


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_text_is_refused_as_a_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("<html>not found</html>" * 20)
    with pytest.raises(InputError, match="is not a readable checkpoint"):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["absent.pth", "absent.safetensors", ""])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot read checkpoint") as error:
        load_checkpoint(tmp_path / name)
    assert str(tmp_path / name) in error.value.cause


def test_safetensors_not_installed_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save({"fc.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MissingDependency, match="'safetensors'") as error:
        load_checkpoint(path)
    assert error.value.hint == 'pip install "edgeres[torch]"'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused_by_name(tmp_path: Path, value: float) -> None:
    tensors = {"conv1.weight": torch.ones(3), "fc.weight": torch.tensor([1.0, value]), "fc.bias": torch.tensor(value)}
    with pytest.raises(InputError, match="holds NaN or infinity") as error:
        load_checkpoint(save(tensors, tmp_path / "a.pth"))
    assert error.value.evidence == "in fc.weight and 1 more"


# wrappings


SMALL = {"conv1.weight": torch.tensor([1.0, 2.0]), "bn1.running_mean": torch.tensor([3.0])}
OTHER = {k: t + 10 for k, t in SMALL.items()}


def prefixed(prefix: str, tensors: Tensors = SMALL) -> Tensors:
    return {prefix + k: t for k, t in tensors.items()}


@pytest.mark.parametrize(
    "content",
    [
        SMALL,
        {"state_dict": SMALL, "epoch": 3},
        {"model_state_dict": SMALL},
        {"model": SMALL, "optimizer": {"lr": 0.1}},
        {"net": SMALL, "acc": 93.1},
        {"ema": SMALL},
        {"model_ema": SMALL},
        {"state_dict_ema": SMALL},
        {"ema_state_dict": SMALL},
        {"state_dict": {"model": SMALL}},
        {"model": {"ema": SMALL, "updates": 7}},
        {"model": {"state_dict": {"net": SMALL}}},
        {"model": SMALL, "ema": None},
        {"model": SMALL, "model_ema": {}},
        {"model": SMALL, "args": argparse.Namespace(lr=0.1, output="runs")},  # as torchvision's and timm's scripts do
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("model."),
        prefixed("module._orig_mod."),
        prefixed("_orig_mod.module."),
        prefixed("model._orig_mod."),
        prefixed("model.module."),
        {"state_dict": prefixed("module.model.")},
        {"model_ema": prefixed("module.") | {"n_averaged": torch.tensor(5)}},
        prefixed("module.") | {"n_averaged": torch.tensor(5)},
    ],
    ids=lambda content: " ".join(content),
)
def test_wrappings_and_prefixes_are_taken_off(tmp_path: Path, content: Any) -> None:
    assert same(load_checkpoint(save(content, tmp_path / "a.pth")).tensors, SMALL)


@pytest.mark.parametrize("averaged", ["ema", "model_ema", "state_dict_ema", "ema_state_dict"])
@pytest.mark.parametrize("plain", ["model", "state_dict", "model_state_dict", "net"])
def test_averaged_weights_are_preferred_and_that_is_said(tmp_path: Path, averaged: str, plain: str) -> None:
    path = save({plain: OTHER, averaged: prefixed("module.") | {"n_averaged": torch.tensor(5)}}, tmp_path / "a.pth")
    told = Console(file=io.StringIO(), width=200)
    with progress.to(told):
        assert same(load_checkpoint(path).tensors, SMALL)
    assert told.file.getvalue() == f"a.pth holds {averaged}, {plain}: using {averaged}\n"  # type: ignore[attr-defined]


def test_a_choice_that_is_none_is_not_told(tmp_path: Path) -> None:
    told = Console(file=io.StringIO(), width=200)
    with progress.to(told):
        load_checkpoint(save({"model": SMALL, "epoch": 3}, tmp_path / "a.pth"))
    assert told.file.getvalue() == ""  # type: ignore[attr-defined]


def test_a_prefix_of_some_names_only_is_part_of_the_names(tmp_path: Path) -> None:
    mixed = prefixed("module.") | OTHER
    assert same(load_checkpoint(save(mixed, tmp_path / "a.pth")).tensors, mixed)


def test_half_precision_in_a_wrapping_becomes_fp32(tmp_path: Path) -> None:
    half = {k: t.half() for k, t in SMALL.items()}
    found = load_checkpoint(save({"state_dict": half}, tmp_path / "a.pth")).tensors
    assert same(found, SMALL)
    assert {t.dtype for t in found.values()} == {torch.float32}


# Hugging Face transformers


def hugging_face(tensors: Tensors, base: str = "resnet.") -> Tensors:
    """The same tensors under transformers' names of ResNetForImageClassification."""
    kinds = {"conv": "convolution", "bn": "normalization"}

    def rename(name: str) -> str:
        first, rest = name.split(".", 1)
        if first in ("conv1", "bn1"):
            return f"{base}embedder.embedder.{kinds[first[:-1]]}.{rest}"
        if first == "fc":
            return f"classifier.1.{rest}"
        block, layer, rest = rest.split(".", 2)
        where = f"{base}encoder.stages.{int(first.removeprefix('layer')) - 1}.layers.{block}"
        if layer == "downsample":
            number, rest = rest.split(".")
            return f"{where}.shortcut.{'normalization' if number == '1' else 'convolution'}.{rest}"
        return f"{where}.layer.{int(layer[-1]) - 1}.{kinds[layer[:-1]]}.{rest}"

    return {rename(k): t for k, t in tensors.items()}


def test_the_names_in_the_test_are_those_of_microsofts_resnet_50() -> None:
    names = hugging_face(outline())
    for name in (
        "resnet.embedder.embedder.convolution.weight",
        "resnet.embedder.embedder.normalization.running_var",
        "resnet.encoder.stages.0.layers.0.shortcut.convolution.weight",
        "resnet.encoder.stages.0.layers.0.shortcut.normalization.num_batches_tracked",
        "resnet.encoder.stages.2.layers.5.layer.1.convolution.weight",
        "resnet.encoder.stages.3.layers.2.layer.2.normalization.bias",
        "classifier.1.weight",
        "classifier.1.bias",
    ):
        assert name in names
    assert len(names) == 320


@pytest.mark.parametrize("base", ["resnet.", ""])
@pytest.mark.parametrize("depth", LAYOUT)
def test_hugging_face_names_become_torchvisions(depth: int, base: str) -> None:
    tensors = outline(depth=depth)
    found = torchvision_names(hugging_face(tensors, base))
    assert {k: t.shape for k, t in found.items()} == {k: t.shape for k, t in tensors.items()}
    assert torchvision_names(tensors).keys() == tensors.keys()


@pytest.mark.parametrize(("depth", "variant"), [(50, "v1"), (18, "v1.5")])
def test_hugging_face_weights_give_the_same_logits(depth: int, variant: str) -> None:
    torch.manual_seed(2)
    model = resnet(depth, variant, 3)
    with torch.no_grad():
        model.train()(noise(4))  # running statistics that a mix-up of norms would show
        found = load_model(checkpoint(torchvision_names(hugging_face(model.state_dict()))), variant, depth=depth)
        assert torch.equal(found(noise()), model.eval()(noise()))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_hugging_face_folder_loads_with_its_variant(tmp_path: Path, name: str) -> None:
    tensors = dict(tiny_resnet().state_dict())
    (tmp_path / "config.json").write_text('{"model_type": "resnet", "downsample_in_bottleneck": true}')
    found = load_checkpoint(save(hugging_face(tensors), tmp_path / name))
    assert same(found.tensors, tensors)
    assert found.variant == "v1"


@pytest.mark.parametrize(
    ("config", "variant"),
    [
        ({"model_type": "resnet", "downsample_in_bottleneck": True}, "v1"),
        ({"model_type": "resnet", "downsample_in_bottleneck": False}, "v1.5"),
        ({"model_type": "resnet"}, "v1.5"),  # transformers' default
        ({"model_type": "vit", "downsample_in_bottleneck": True}, None),
        ({"downsample_in_bottleneck": True}, None),
        ({"architecture": "resnet50", "num_classes": 1000}, None),  # timm's
        ([], None),
        (None, None),
    ],
    ids=str,
)
def test_config_json_beside_the_file_declares_the_variant(tmp_path: Path, config: Any, variant: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_checkpoint(save(SMALL, tmp_path / "a.pth")).variant == variant


@pytest.mark.parametrize("content", [b"", b"{", b'{"model_type": "resnet"', b"\xff\xfe", b"hello"])
def test_a_damaged_config_json_is_no_matter(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert load_checkpoint(save(SMALL, tmp_path / "a.pth")).variant is None


def test_without_config_json_nothing_is_declared(tmp_path: Path) -> None:
    assert load_checkpoint(save(SMALL, tmp_path / "a.pth")).variant is None
    (tmp_path / "config.json").mkdir()
    assert load_checkpoint(tmp_path / "a.pth").variant is None


# models


def test_missing_step_counters_are_no_matter() -> None:
    tensors = full_size()
    old = {k: t for k, t in tensors.items() if not k.endswith("num_batches_tracked")}
    assert len(old) < len(tensors)
    found = load_model(checkpoint(old), "v1.5").state_dict()
    assert all(torch.equal(found[k], t) for k, t in old.items())
    assert found["bn1.num_batches_tracked"] == 0


def test_half_precision_weights_arrive_exactly() -> None:
    tensors = {k: t.half().float() if t.is_floating_point() else t for k, t in full_size().items()}
    found = load_model(checkpoint(tensors), "v1.5").state_dict()
    assert all(torch.equal(found[k], t) for k, t in tensors.items())


@pytest.mark.parametrize("classes", [1, 7])
def test_classes_are_counted_in_the_checkpoint(classes: int) -> None:
    found = checkpoint(outline(classes))
    assert found.classes == classes
    assert load_model(found, "v1").fc.out_features == classes
    assert load_model(found, "v1", classes).fc.out_features == classes


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(UsageError, match="has 5 classes, 10 were asked for") as error:
        load_model(checkpoint(outline()), "v1.5", 10)
    assert "--classes 5" in error.value.hint


def without_fc() -> Tensors:
    return {k: t for k, t in outline().items() if not k.startswith("fc.")}


NOT_RESNET50: dict[str, tuple[Tensors, list[str]]] = {
    "prefixed": (
        {f"module.{k}": t for k, t in outline().items()},
        ["not in ResNet-50: module.conv1.weight and 319 more"],
    ),
    "longer": (
        outline() | {"layer3.6.conv1.weight": torch.zeros(256, 1024, 1, 1)},
        ["not in ResNet-50: layer3.6.conv1.weight"],
    ),
    "wide": (
        outline() | {"layer1.0.conv2.weight": torch.zeros(128, 64, 3, 3)},
        ["layer1.0.conv2.weight is (128, 64, 3, 3), ResNet-50 has (64, 64, 3, 3)"],
    ),
    "headless": (without_fc(), ["missing: fc.weight and 1 more"]),
    "another": (
        {"features.0.weight": torch.zeros(3)},
        ["missing: conv1.weight", "not in ResNet-50: features.0.weight"],
    ),
    "empty": ({}, ["missing: conv1.weight and "]),
    "scalar classifier": (outline() | {"fc.weight": torch.zeros(())}, ["fc.weight is ()"]),
}


@pytest.mark.parametrize("name", NOT_RESNET50)
def test_other_networks_are_refused_with_evidence(name: str) -> None:
    tensors, evidence = NOT_RESNET50[name]
    with pytest.raises(InputError, match=r"mine\.pth is not a ResNet-50 checkpoint") as error:
        load_model(checkpoint(tensors), "v1.5")
    for part in evidence:
        assert part in error.value.evidence
    assert "torchvision's, timm's or transformers' names" in error.value.hint


@pytest.mark.parametrize("depth", LAYOUT)
def test_the_depth_is_read_off_the_blocks(depth: int) -> None:
    tensors = outline(depth=depth)
    assert checkpoint(tensors).depth == depth
    assert load_model(checkpoint(tensors), "v1.5", depth=depth).fc.out_features == 5
    assert checkpoint({k: t for k, t in tensors.items() if not k.startswith("layer3.0.")}).depth is None
    assert checkpoint({f"x.{k}": t for k, t in tensors.items()}).depth is None


@pytest.mark.parametrize(("has", "asked"), [(18, 50), (34, 18), (34, 50), (50, 34), (50, 101), (101, 152), (152, 50)])
def test_the_wrong_depth_is_refused_with_the_right_one(has: int, asked: int) -> None:
    with pytest.raises(InputError, match=rf"mine\.pth is not a ResNet-{asked} checkpoint") as error:
        load_model(checkpoint(outline(depth=has)), "v1.5", depth=asked)
    assert error.value.hint == f"its blocks are ResNet-{has}'s: give --depth {has}"
    assert error.value.evidence


def test_a_basic_block_checkpoint_gives_its_logits_back_as_either_variant() -> None:
    torch.manual_seed(2)
    model = resnet(18, "v1.5", 3).eval()
    with torch.no_grad():
        for variant in ("v1", "v1.5"):
            found = load_model(checkpoint(model.state_dict()), variant, depth=18)
            assert torch.equal(found(noise()), model(noise()))


def test_loaded_models_have_the_stride_of_their_variant() -> None:
    model = load_model(checkpoint(outline()), "v1")
    assert isinstance(model, ResNet)
    assert model.get_submodule("layer2.0.conv1").stride == (2, 2)
    assert load_model(checkpoint(outline()), "v1.5").get_submodule("layer2.0.conv2").stride == (2, 2)


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown variant 'v3'"):
        load_model(checkpoint(outline()), "v3")


# published weights and paths


RECORDS = [*weights.PUBLISHED.values(), weights.ZOO_V1]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.url.rpartition("/")[2])
def test_published_records_are_safe_and_complete(record: weights.Published) -> None:
    assert record.url.startswith("https://")
    assert set(record.sha256) <= set("0123456789abcdef")
    assert len(record.sha256) in (8, 64)
    assert record.variant in ("v1", "v1.5")
    assert record.classes == 1000
    assert record.license
    assert 60 < record.top1 < 90
    assert 40 < record.mib < 250


@pytest.mark.parametrize(("name", "depth"), weights.PUBLISHED)
def test_torchvisions_files_carry_depth_and_hash_in_their_names(name: str, depth: int) -> None:
    record = weights.PUBLISHED[name, depth]
    assert record.url == f"https://download.pytorch.org/models/resnet{depth}-{record.sha256[:8]}.pth"
    assert record.variant == "v1.5"
    assert record.preprocess == Preprocess(crop=224, resize=232 if name == "imagenet-v2" else 256)
    with torch.device("meta"):
        floats = [t.numel() for t in resnet(depth).state_dict().values() if t.ndim]
    assert record.mib == pytest.approx(sum(floats) * 4 / 2**20, abs=0.5)


def test_all_records_are_of_different_files() -> None:
    assert len({r.url for r in RECORDS}) == len({r.sha256 for r in RECORDS}) == len(RECORDS) == 9


@pytest.mark.parametrize("depth", LAYOUT)
def test_imagenet_is_torchvisions_first_set_at_every_depth(depth: int) -> None:
    record = published("imagenet", depth, "v1.5")
    assert record is weights.PUBLISHED["imagenet", depth]
    assert record.preprocess == Preprocess()


def test_imagenet_as_v1_is_the_onnx_zoos_file() -> None:
    record = published("imagenet", 50, "v1")
    assert record is not None
    assert record.url.startswith("https://github.com/onnx/models/")
    assert record.url.endswith("/resnet50-v1-12.onnx")
    assert record.sha256 == "3f03fdef724b22947eed826f1eef1dc5c34151bb4c37d634f1db89dfa2dd1526"
    assert record.variant == "v1"
    assert record.mib == pytest.approx(102_576_593 / 2**20, abs=0.05)


@pytest.mark.parametrize("depth", [50, 101, 152])
def test_imagenet_v2_resizes_to_232(depth: int) -> None:
    record = published("imagenet-v2", depth, "v1.5")
    assert record is not None
    assert (record.preprocess.resize, record.preprocess.crop) == (232, 224)


@pytest.mark.parametrize("depth", [18, 34])
def test_networks_without_variants_are_published_as_either(depth: int) -> None:
    assert published("imagenet", depth, "v1") is published("imagenet", depth, "v1.5") is not None


@pytest.mark.parametrize(
    ("name", "depth", "variant", "what", "exists"),
    [
        ("imagenet", 101, "v1", "ResNet-101 v1", "18, 34, 50, 101, 152 as v1.5, and 50 as v1;"),
        ("imagenet", 152, "v1", "ResNet-152 v1", "18, 34, 50, 101, 152 as v1.5, and 50 as v1;"),
        ("imagenet-v2", 50, "v1", "ResNet-50 v1", "50, 101, 152 as v1.5;"),
        ("imagenet-v2", 18, "v1.5", "ResNet-18", "50, 101, 152 as v1.5;"),
        ("imagenet-v2", 34, "v1", "ResNet-34", "50, 101, 152 as v1.5;"),
    ],
)
def test_what_is_not_published_is_refused_with_what_is(
    tmp_path: Path, name: str, depth: int, variant: str, what: str, exists: str
) -> None:
    with pytest.raises(UsageError, match="there are no") as error:
        locate(name, depth, variant)
    assert error.value.cause == f"there are no {name} weights for {what}"
    assert f"{name} has depth {exists}" in error.value.hint
    assert "--weights FILE" in error.value.hint
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["mine.pth", "imagenet1k", "IMAGENET", ""])
def test_other_names_are_not_published(name: str) -> None:
    assert published(name, 50, "v1.5") is None


def test_a_path_is_located_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.pth"
    path.touch()
    assert locate(str(path), 101, "v1") == path


@pytest.mark.parametrize("name", ["absent.pth", "imagenet1k", "."])
def test_neither_file_nor_name_lists_the_names(name: str) -> None:
    with pytest.raises(InputError, match="no checkpoint") as error:
        locate(name, 50, "v1.5")
    assert name in error.value.cause
    assert error.value.hint.endswith("or a name: imagenet, imagenet-v2")


@pytest.mark.parametrize(
    ("name", "depth", "variant", "file"),
    [
        ("imagenet", 50, "v1.5", "resnet50-0676ba61.pth"),
        ("imagenet", 50, "v1", "resnet50-v1-12.onnx"),
        ("imagenet", 18, "v1", "resnet18-f37072fd.pth"),
        ("imagenet-v2", 152, "v1.5", "resnet152-f82ba261.pth"),
    ],
)
def test_published_weights_are_fetched_once_into_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, depth: int, variant: str, file: str
) -> None:
    asked: list[tuple[Any, ...]] = []

    def download(url: str, path: Path, sha256: str, mib: float | None = None) -> None:
        asked.append((url, path, sha256, mib))
        path.parent.mkdir(parents=True)
        path.touch()

    monkeypatch.setattr(weights, "download", download)
    monkeypatch.setenv("EDGERES_CACHE", str(tmp_path / "elsewhere"))
    path = tmp_path / "elsewhere" / "weights" / file
    assert locate(name, depth, variant) == path
    record = published(name, depth, variant)
    assert record is not None
    assert asked == [(record.url, path, record.sha256, record.mib)]
    assert locate(name, depth, variant) == path  # and now it is there
    assert len(asked) == 1


def test_a_record_can_be_of_another_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `locate` asks of `download` is in the record, nowhere else."""
    record = replace(weights.PUBLISHED["imagenet", 50], url="http://127.0.0.1:9/x/mine.pth", sha256="ab", mib=1.5)
    monkeypatch.setitem(weights.PUBLISHED, ("imagenet", 50), record)
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(weights, "download", lambda *arguments: asked.append(arguments))
    path = locate("imagenet", 50, "v1.5")
    assert asked == [(record.url, tmp_path / "cache" / "weights" / "mine.pth", "ab", 1.5)]
    assert path.name == "mine.pth"
