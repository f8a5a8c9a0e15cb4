"""Tiny things that every test may use, made by code and by the same functions a user calls."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from edgeres import benchmark, energy, graph, machine, progress
from edgeres.calibrate import RangeTable, calibrate
from edgeres.data import ImageSet
from edgeres.export import export_onnx
from edgeres.layouts import open_images
from edgeres.loader import Batch
from edgeres.model import ResNet
from edgeres.recipe import Preprocess

CLASSES = 4
SHARED = Path(__file__).parents[2] / "shared" / "data"


def pytest_configure() -> None:
    """A shell that starts the tests in the background has Ctrl-C ignored, which some of them are about."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    """Versions that results depend on."""
    versions = machine.versions("torch", "onnx", "onnxruntime", "openvino", "numpy")
    return ", ".join([*(f"{name} {version}" for name, version in versions.items()), f"{os.cpu_count()} cores"])


@pytest.fixture(autouse=True)
def _private_and_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache or the folder the tests were started in, or measures for long."""
    monkeypatch.setenv("EDGERES_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "SAMPLES", 10)  # tests look at what is recorded, not at how fast it is
    monkeypatch.setattr(benchmark, "SECONDS", 0.01)
    monkeypatch.setattr(energy, "IDLE_SECONDS", 0.0)


def tiny_resnet(stride_on: str = "3x3", seed: int = 0) -> ResNet:
    """Four bottlenecks in two stages, an eighth of the width, with batch norm statistics that matter."""
    torch.manual_seed(seed)
    model = ResNet(CLASSES, stride_on, blocks=(2, 2), width=8)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture(scope="session")
def preprocess() -> Preprocess:
    return Preprocess(crop=32, resize=36)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory, preprocess: Preprocess) -> Path:
    """FP32 ONNX of `tiny_resnet`, as `edgeres export` writes it."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    record = {"variant": "v1.5", "weights": {"source": "tiny.pth", "sha256": "0" * 64}}
    graph.save(export_onnx(tiny_resnet(), preprocess, record), path)
    return path


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def folder_of(root: Path, *names: str) -> Path:
    """A file for each of ``names``, of another 8 x 8 picture."""
    for i, name in enumerate(names):
        save(root / name, picture(8, 8, i))
    return root


def write_images(root: Path, per_class: int, seed: int) -> Path:
    """Smooth random images of several sizes and shapes, PNG and JPEG, in one folder per class."""
    rng = np.random.default_rng(seed)
    for label in range(CLASSES):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for i in range(per_class):
            coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
            size = (40 + 3 * i, 60 - 2 * i)
            coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.{'jpg' if i % 2 else 'png'}")
    return root


@pytest.fixture(scope="session")
def train_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "train", 8, seed=1)


@pytest.fixture(scope="session")
def val_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "val", 6, seed=2)


@pytest.fixture(scope="session")
def train_images(train_folder: Path) -> ImageSet:
    return open_images(train_folder)


@pytest.fixture
def workspace(tmp_path: Path, tiny_path: Path, train_folder: Path, val_folder: Path) -> Path:
    """The current folder, as a workspace whose image sets are named."""
    (tmp_path / "edgeres.toml").write_text(
        f'[calibration]\nimages = "{train_folder}"\n[validation]\nimages = "{val_folder}"\n', encoding="utf-8"
    )
    return tmp_path


@pytest.fixture(scope="module")
def tiny(tiny_path: Path) -> Any:
    return graph.load(tiny_path)


def batch(images: int = 8, size: int = 32, seed: int = 0, channels: int = 3) -> Batch:
    pixels = np.random.default_rng(seed).standard_normal((images, channels, size, size), dtype=np.float32)
    return Batch(pixels, None, np.arange(images))


def measure(model: Any, *batches: Batch) -> RangeTable:
    return calibrate(model, batches, {"model": graph.digest(model)})


@pytest.fixture(scope="module")
def table(tiny: Any) -> RangeTable:
    return measure(tiny, batch())


def told(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, str]:
    """What ``function`` returns, and what it tells the user."""
    console = Console(file=io.StringIO(), width=300)
    with progress.to(console):
        result = function(*arguments, **options)
    return result, console.file.getvalue()  # type: ignore[attr-defined]


def pytorch(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(images)).numpy()


shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the trained checkpoints and images in {SHARED}")
