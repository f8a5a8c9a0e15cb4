"""Checkpoints that look trained: random weights, and statistics taken from the images of the test."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, SHARED, shared
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from edgeres import baseline, graph, identity, progress, weights
from edgeres.errors import InputError
from edgeres.identity import CLEAR, FITS, Identity, identify
from edgeres.job import Job
from edgeres.layouts import open_images
from edgeres.loader import Loader
from edgeres.model import BasicBlock, ResNet, resnet50
from edgeres.recipe import STRIDE_ON, Preprocess, load_recipe
from edgeres.weights import Checkpoint, load_checkpoint

OTHER = {"v1": "v1.5", "v1.5": "v1"}
SIZE = 32


def images(n: int = 48, size: int = SIZE, seed: int = 4) -> Tensor:
    """Smooth random images (n, 3, size, size); a seed gives the same pictures at any size."""
    coarse = torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (size, size), mode="bicubic")


def tiny(variant: str, depth: int = 50) -> ResNet:
    block = {"block": BasicBlock} if depth < 50 else {}
    return ResNet(CLASSES, STRIDE_ON[variant], blocks=(2, 2, 2), width=16, **block)


def train(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """``model`` gets the statistics of ``pixels``, as a training on them would leave them -> its state dict."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches, not one that forgets
    with torch.no_grad():
        model.train()(pixels)
    return model.state_dict()


def checkpoint(tensors: dict[str, Tensor], variant: str | None = None) -> Checkpoint:
    return Checkpoint("mine.pth", "0" * 64, tensors, variant)


def trained(variant: str, pixels: Tensor | None = None) -> Checkpoint:
    torch.manual_seed(7)
    return checkpoint(train(tiny(variant), images() if pixels is None else pixels))


@pytest.fixture
def tiny_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_model` makes tiny networks, so that a test takes no seconds."""

    def load_model(checkpoint: Checkpoint, variant: str, classes: int | None = None, depth: int = 50) -> ResNet:
        model = tiny(variant, depth)
        model.load_state_dict(checkpoint.tensors)
        return model.eval()

    monkeypatch.setattr(identity, "load_model", load_model)
    monkeypatch.setattr(weights, "load_model", load_model)


def ratio(found: Identity) -> float:
    return max(found.divergence.values()) / min(found.divergence.values())


# the measure


@pytest.mark.parametrize("variant", ["v1", "v1.5"])
def test_a_full_size_checkpoint_names_its_variant(variant: str) -> None:
    torch.manual_seed(0)
    pixels = images(24)
    found = identify(checkpoint(train(resnet50(variant, 3), pixels)), pixels.numpy())
    assert found.variant == variant
    assert found.divergence[variant] < 0.02
    assert ratio(found) > 5
    assert found.images == 24


@pytest.mark.usefixtures("tiny_networks")
@pytest.mark.parametrize("variant", ["v1", "v1.5"])
def test_the_right_variant_fits_and_the_other_does_not(variant: str) -> None:
    found = identify(trained(variant), images().numpy())
    assert found.variant == variant
    assert found.divergence[variant] < 0.01
    assert found.divergence[OTHER[variant]] > 5 * found.divergence[variant]


@pytest.mark.usefixtures("tiny_networks")
@pytest.mark.parametrize("variant", ["v1", "v1.5"])
def test_other_images_of_the_same_kind_tell_it_too(variant: str) -> None:
    found = identify(trained(variant, images(256)), images(64, seed=5).numpy())
    assert found.variant == variant


@pytest.mark.usefixtures("tiny_networks")
def test_the_divergence_is_that_of_two_normal_distributions() -> None:
    """Against torch.distributions, on the norm that sees the images first."""
    model, pixels = tiny("v1"), images(8)
    model.bn1.running_mean.normal_(generator=torch.Generator().manual_seed(1))
    model.bn1.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        x = model.conv1(pixels).double().transpose(0, 1).flatten(1)
    seen = torch.distributions.Normal(x.mean(1), x.std(1))
    remembered = torch.distributions.Normal(model.bn1.running_mean.double(), model.bn1.running_var.double().sqrt())
    expected = torch.distributions.kl_divergence(seen, remembered).mean().item()
    alone = nn.Sequential(model.conv1, model.bn1).eval()
    assert identity._divergence(alone, pixels) == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01


@pytest.mark.usefixtures("tiny_networks")
@pytest.mark.parametrize("variant", ["v1", "v1.5"])
def test_another_image_size_shrinks_the_difference(variant: str) -> None:
    known = trained(variant)
    at = {size: identify(known, images(size=size).numpy()) for size in (SIZE, 40, 96)}
    assert ratio(at[SIZE]) > ratio(at[40]) > ratio(at[96])
    assert at[96].divergence[variant] > 10 * at[SIZE].divergence[variant]


@pytest.mark.usefixtures("tiny_networks")
@pytest.mark.parametrize("variant", ["v1", "v1.5"])
@pytest.mark.parametrize("size", [8, 16, 64, 96])
def test_at_a_size_far_from_the_trainings_no_variant_is_called_wrong(variant: str, size: int) -> None:
    assert identify(trained(variant), images(16, size).numpy()).variant in (variant, None)


@pytest.mark.usefixtures("tiny_networks")
def test_fresh_statistics_say_nothing() -> None:
    torch.manual_seed(7)
    found = identify(checkpoint(tiny("v1").state_dict()), images().numpy())
    assert found.variant is None
    assert all(np.isfinite(d) for d in found.divergence.values())
    assert "too little to tell" in str(found)


@pytest.mark.usefixtures("tiny_networks")
def test_constant_channels_are_left_out() -> None:
    """A convolution of zeros: nothing was seen of its channel, and its remembered variance is 0."""
    torch.manual_seed(7)
    model = tiny("v1")
    with torch.no_grad():
        model.conv1.weight[3:9] = 0
        for name in ("layer2.0.conv1", "layer3.1.conv3"):
            model.get_submodule(name).weight.zero_()
    tensors = train(model, images())
    assert tensors["bn1.running_var"][3] == 0
    found = identify(checkpoint(tensors), images().numpy())
    assert found.variant == "v1"
    assert all(0 <= d < 100 for d in found.divergence.values())


@pytest.mark.usefixtures("tiny_networks")
def test_one_image_that_shrinks_to_one_pixel_is_measured_without_a_crash() -> None:
    found = identify(trained("v1"), images(1, 8).numpy())  # 8 pixels end as 1 x 1
    assert all(np.isfinite(d) for d in found.divergence.values())
    assert found.variant in ("v1", None)
    assert found.images == 1


@pytest.mark.usefixtures("tiny_networks")
def test_neither_checkpoint_nor_images_are_changed() -> None:
    known, pixels = trained("v1"), images().numpy()
    tensors, before = {k: t.clone() for k, t in known.tensors.items()}, pixels.copy()
    first = identify(known, pixels)
    assert all(torch.equal(known.tensors[k], t) for k, t in tensors.items())
    assert np.array_equal(pixels, before)
    assert identify(known, pixels) == first


# the verdict


@pytest.mark.parametrize(
    ("v1", "v15", "variant"),
    [
        (0.01, 0.01 * CLEAR * 1.01, "v1"),
        (0.01, 0.01 * CLEAR * 0.99, None),
        (0.4, 0.02, "v1.5"),
        (0.02, 0.4, "v1"),
        (FITS * 0.99, 2, "v1"),
        (FITS * 1.01, 2, None),
        (9.67, 30.0, None),  # far from both
        (0.0, 0.01, "v1"),
        (0.0, 0.0, None),
    ],
)
def test_a_variant_is_named_where_it_fits_and_clearly_better(v1: float, v15: float, variant: str | None) -> None:
    found = Identity(64, {"v1": v1, "v1.5": v15})
    assert found.variant == variant
    assert ("too little to tell" in str(found)) == (variant is None)


def test_the_verdict_is_said_with_its_numbers() -> None:
    assert str(Identity(64, {"v1": 0.1056, "v1.5": 0.0053})) == (
        "v1.5 fits 19.9 times better than v1 "
        "(divergence from the batch norm statistics v1 0.1056, v1.5 0.0053 nats, 64 images)"
    )
    assert "v1 fits 1.3 times better than v1.5, too little to tell (" in str(Identity(64, {"v1": 0.1, "v1.5": 0.13}))


# in an export


def job(root: Path, variant: str, images: Path | None, force: bool = False, depth: int = 50) -> Job:
    flags = {
        "model": {"variant": variant, "weights": str(root / "mine.pth"), "depth": depth},
        "preprocess": {"crop": SIZE, "resize": 36},
    } | ({"calibration": {"images": str(images)}} if images else {})
    return Job(load_recipe(root, flags=flags), root, force=force)


def save(root: Path, variant: str, folder: Path, depth: int = 50) -> None:
    """mine.pth, a tiny checkpoint of ``variant`` trained on the images in ``folder``."""
    torch.manual_seed(7)
    batches = Loader(open_images(folder), Preprocess(crop=SIZE, resize=36))
    pixels = np.concatenate([b.pixels for b in batches])
    torch.save(train(tiny(variant, depth), torch.from_numpy(pixels)), root / "mine.pth")


@pytest.fixture
def told() -> Iterator[io.StringIO]:
    """What is said on the way."""
    file = io.StringIO()
    with progress.to(Console(file=file, width=400)):
        yield file


@pytest.mark.usefixtures("tiny_networks")
@pytest.mark.parametrize("variant", ["v1", "v1.5"])
def test_the_right_variant_is_exported_with_what_was_measured(
    tmp_path: Path, train_folder: Path, told: io.StringIO, variant: str
) -> None:
    save(tmp_path, variant, train_folder)
    record = graph.metadata(graph.load(baseline.export(job(tmp_path, variant, train_folder))))
    assert record["variant"] == variant
    assert record["variant_check"]["images"] == 32
    divergence = record["variant_check"]["divergence"]
    assert divergence[variant] < 0.02
    assert divergence[OTHER[variant]] > 5 * divergence[variant]
    assert f"variant: {variant} fits " in told.getvalue()


@pytest.mark.usefixtures("tiny_networks")
@pytest.mark.parametrize("variant", ["v1", "v1.5"])
def test_the_other_variant_is_refused_with_the_evidence(tmp_path: Path, train_folder: Path, variant: str) -> None:
    save(tmp_path, OTHER[variant], train_folder)
    asked = job(tmp_path, variant, train_folder)
    with pytest.raises(InputError) as error:
        baseline.export(asked)
    assert error.value.cause == f"mine.pth is of variant {OTHER[variant]}, not {variant}"
    assert f"{OTHER[variant]} fits " in error.value.evidence
    assert "nats, 32 images" in error.value.evidence
    assert error.value.hint == f"give --variant {OTHER[variant]}; --force goes on all the same"
    assert not asked.fp32.exists()


@pytest.mark.usefixtures("tiny_networks")
def test_force_exports_the_other_variant_and_says_so(tmp_path: Path, train_folder: Path, told: io.StringIO) -> None:
    save(tmp_path, "v1", train_folder)
    record = graph.metadata(graph.load(baseline.export(job(tmp_path, "v1.5", train_folder, force=True))))
    assert "forced: mine.pth is of variant v1, not v1.5" in told.getvalue()
    assert record["variant"] == "v1.5"
    divergence = record["variant_check"]["divergence"]
    assert divergence["v1.5"] > CLEAR * divergence["v1"]


@pytest.mark.usefixtures("tiny_networks")
@pytest.mark.parametrize("source", [None, "ranges.json"])
def test_without_images_the_variant_is_not_checked_and_that_is_said(
    tmp_path: Path, train_folder: Path, told: io.StringIO, source: str | None
) -> None:
    save(tmp_path, "v1", train_folder)
    path = baseline.export(job(tmp_path, "v1.5", None if source is None else tmp_path / source))
    assert "variant not checked" in told.getvalue()
    assert "--calibration" in told.getvalue()
    assert graph.metadata(graph.load(path))["variant_check"] is None


@pytest.mark.usefixtures("tiny_networks")
def test_an_undecided_check_goes_on_and_says_so(tmp_path: Path, train_folder: Path, told: io.StringIO) -> None:
    torch.manual_seed(7)
    torch.save(tiny("v1").state_dict(), tmp_path / "mine.pth")
    path = baseline.export(job(tmp_path, "v1.5", train_folder))
    assert "too little to tell" in told.getvalue()
    assert graph.metadata(graph.load(path))["variant_check"]["images"] == 32


@pytest.mark.usefixtures("tiny_networks")
@pytest.mark.parametrize("variant", ["v1", "v1.5"])
def test_networks_without_variants_are_not_checked(
    tmp_path: Path, train_folder: Path, told: io.StringIO, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    save(tmp_path, "v1.5", train_folder, depth=18)
    (tmp_path / "config.json").write_text('{"model_type": "resnet", "downsample_in_bottleneck": true}')
    monkeypatch.delattr(identity, "_divergence")  # nothing may be measured
    record = graph.metadata(graph.load(baseline.export(job(tmp_path, variant, train_folder, depth=18))))
    assert record["variant_check"] is None
    assert record["depth"] == 18
    assert "variant" not in told.getvalue()


@pytest.mark.usefixtures("tiny_networks")
@pytest.mark.parametrize("images_named", [True, False])
def test_a_variant_declared_in_config_json_counts(
    tmp_path: Path, train_folder: Path, told: io.StringIO, images_named: bool
) -> None:
    save(tmp_path, "v1", train_folder)
    (tmp_path / "config.json").write_text('{"model_type": "resnet", "downsample_in_bottleneck": true}')
    folder = train_folder if images_named else None
    with pytest.raises(InputError, match=r"config\.json beside mine\.pth says variant v1, not v1\.5") as error:
        baseline.export(job(tmp_path, "v1.5", folder))
    assert "--variant v1;" in error.value.hint
    baseline.export(job(tmp_path, "v1.5", folder, force=True))
    assert "forced: config.json" in told.getvalue()
    assert baseline.export(job(tmp_path, "v1", folder)).is_file()


# trained checkpoints


@pytest.fixture(scope="module")
def cifar10() -> dict[int, np.ndarray]:
    """Input size -> 64 training images."""
    chosen = open_images(SHARED / "cifar10" / "train").subset(64)
    return {
        size: np.concatenate([b.pixels for b in Loader(chosen, Preprocess(crop=size, resize=size))])
        for size in (32, 40, 64)
    }


@shared
@pytest.mark.parametrize("variant", ["v1", "v1.5"])
def test_trained_checkpoints_name_their_variant(variant: str, cifar10: dict[int, np.ndarray]) -> None:
    known = load_checkpoint(SHARED / "checkpoints" / f"resnet50-{variant}-cifar10.safetensors")
    found = identify(known, cifar10[64])
    assert found.variant == variant
    assert found.divergence[OTHER[variant]] >= 5 * found.divergence[variant]
    assert found.divergence[variant] < FITS / 10


@shared
@pytest.mark.parametrize("size", [32, 40])
def test_a_trained_v1_is_not_called_v15_on_images_of_about_half_the_size(
    size: int, cifar10: dict[int, np.ndarray]
) -> None:
    known = load_checkpoint(SHARED / "checkpoints" / "resnet50-v1-cifar10.safetensors")
    found = identify(known, cifar10[size])
    assert found.divergence["v1.5"] < found.divergence["v1"]  # it does look like that
    assert found.variant is None


@shared
@pytest.mark.parametrize("variant", ["v1", "v1.5"])
def test_a_trained_checkpoint_is_not_exported_as_the_other_variant(tmp_path: Path, variant: str) -> None:
    flags = {
        "model": {
            "variant": OTHER[variant],
            "weights": str(SHARED / "checkpoints" / f"resnet50-{variant}-cifar10.safetensors"),
        },
        "preprocess": {"crop": 64, "resize": 64},
        "calibration": {"images": str(SHARED / "cifar10" / "train"), "limit": 64},
    }
    with pytest.raises(InputError, match=f"is of variant {variant}, not {OTHER[variant]}"):
        baseline.export(Job(load_recipe(tmp_path, flags=flags), tmp_path))
