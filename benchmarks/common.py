"""What the benchmarks share: how they run and measure, and what they make up where nothing was given."""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from edgeres import graph
from edgeres.files import write_json
from edgeres.recipe import Preprocess

Result = dict[str, Any]


def conduct(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace, Path], Result],
    show: Callable[[Result], None],
) -> None:
    """Parse, measure in a temporary folder, print, write."""
    parser.add_argument("--json", type=Path, help="keep the results here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=getattr(args, "folder", None)) as folder:
        result = measure(args, Path(folder))
    show(result)
    if args.json:
        write_json(args.json, result)


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that ``function`` takes, and what it returns."""
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def ratios(times: list[float], to: list[float]) -> list[float]:
    """Ratio within each round: how far they scatter says how quiet the machine was."""
    return [t / o for t, o in zip(times, to, strict=True)]


def ratio(times: list[float], to: list[float]) -> float:
    """Median of the ratios within each round."""
    return median(ratios(times, to))


def make_model(path: Path) -> Path:
    """ResNet-50 v1.5 for 224 x 224 with random weights: as fast as a trained one."""
    import torch

    from edgeres.export import export_onnx
    from edgeres.model import resnet

    torch.manual_seed(0)
    record = {"variant": "v1.5", "weights": {"source": "random", "sha256": "0" * 64}}
    graph.save(export_onnx(resnet(50, "v1.5"), Preprocess(), record), path)
    return path


def write_noise(folder: Path, count: int = 32) -> Path:
    """Images to calibrate random weights on."""
    from PIL import Image

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "noise").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8)).save(folder / "noise" / f"{i:02}.png")
    return folder
