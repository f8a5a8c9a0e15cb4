"""What does calibration cost? Time beside a bare FP32 pass over the same images, beside peers, and peak memory.

    python benchmarks/calibration.py --images DIR --modelopt-python PATH --json benchmarks/calibration.json

Variants run once per round, in turn; ratios are medians of the ratios within a round. Peers hold the activations of all
images, so they get few: their time per image is what more images add, divided by how many more they are.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from loader import alone, peak, repeated, write_photos

from edgeres import equalize, graph, machine
from edgeres.calibrate import calibrate
from edgeres.data import ImageSet
from edgeres.files import write_json
from edgeres.layouts import open_images
from edgeres.loader import Batch, Loader, cores
from edgeres.recipe import Preprocess
from edgeres.runners import open_runner
from edgeres.thresholds import METHODS

PREPROCESS = Preprocess()
MODELOPT = Path(__file__).parent / "peers" / "make_modelopt.py"


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=Path, help="image folder; without it, 64 synthetic JPEGs of 500 x 375")
    parser.add_argument("--model", type=Path, help="FP32 ONNX for 224 x 224; without it, ResNet-50 of random weights")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs=2, default=(256, 2048), help="numbers of images")
    parser.add_argument("--peer-images", type=int, nargs=2, default=(8, 40), help="numbers of images, multiples of 8")
    parser.add_argument("--modelopt-python", type=Path, help="interpreter of an environment with nvidia-modelopt")
    parser.add_argument("--json", type=Path, help="keep the results here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    show(result)
    if args.json:
        write_json(args.json, result)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything -> one JSON object."""
    images = open_images(args.images or write_photos(folder / "images"))
    model = args.model or alone(make_model, folder / "model.onnx")
    ready = list(Loader(images, PREPROCESS, args.batch))
    seconds = in_turn(variants(model, images, ready, args.batch), args.rounds)
    per_image = {name: median(times) / len(images) * 1e3 for name, times in seconds.items()}
    few = np.concatenate([b.pixels for b in ready])
    peers: dict[str, Callable[[Path], float]] = {
        "onnxruntime.quantization": lambda p: alone(onnxruntime_entropy, model, p)
    }
    if args.modelopt_python:
        peers["Model Optimizer"] = lambda p: modelopt_entropy(args.modelopt_python, model, p)
    per_image |= {f"{name} entropy": marginal(peer, few, args.peer_images, folder) for name, peer in peers.items()}
    bare = seconds["bare FP32 pass"]
    return {
        "images": len(images),
        "batch": args.batch,
        "rounds": args.rounds,
        "threads": cores(),
        "tensors": len(graph.activations(graph.load(model))),
        "peer_images": list(args.peer_images),
        "ms_per_image": {name: round(ms, 2) for name, ms in per_image.items()},
        "ratio_to_bare": {
            name: round(median(t / b for t, b in zip(times, bare, strict=True)), 3) for name, times in seconds.items()
        }
        | {name: round(ms / per_image["bare FP32 pass"], 3) for name, ms in per_image.items() if name not in seconds},
        "peak_mb": {n: alone(peak, calibrate_some, model, images, n, args.batch) for n in args.memory},
        "machine": machine.describe(),
        "versions": machine.versions("numba", "numpy", "onnxruntime", "pillow"),
    }


def variants(model: Path, images: ImageSet, ready: list[Batch], batch: int) -> dict[str, Callable[[], object]]:
    """What is measured, by name. Each call opens the model anew."""

    def bare() -> None:
        with open_runner(model, "onnxruntime") as runner:
            for b in ready:
                runner.infer(b.pixels)

    def whole(batches: Any, even: list[Batch] | None = None) -> None:
        proto = graph.load(model)
        if even:
            proto = equalize.equalize(proto, equalize.measure(proto, even))
        table = calibrate(proto, batches, {})
        for r in table.tensors.values():
            METHODS["entropy"](r, 255)

    return {
        "bare FP32 pass": bare,
        "edgeres, with entropy thresholds": lambda: whole(ready),
        "the same, channels evened out first": lambda: whole(ready, ready[: -(-equalize.IMAGES // batch)]),
        "the same, from image files": lambda: whole(Loader(images, PREPROCESS, batch)),
    }


def in_turn(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round. Before the first, what is compiled once gets compiled."""
    from edgeres.counting import compiled

    compiled()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, go in work.items():
            start = time.perf_counter()
            go()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def marginal(peer: Callable[[Path], float], pixels: np.ndarray, sizes: tuple[int, int], folder: Path) -> float:
    """Milliseconds per image that ``peer`` takes longer for the larger of two numbers of images."""
    times = []
    for n in sizes:
        np.save(folder / "pixels.npy", pixels[np.arange(n) % len(pixels)])
        times.append(peer(folder / "pixels.npy"))
    return (times[1] - times[0]) / (sizes[1] - sizes[0]) * 1e3


def onnxruntime_entropy(model: Path, pixels: Path, batch: int = 8) -> float:
    """Seconds that its entropy calibrator takes, with its own defaults, for every tensor it would quantize."""
    from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest: Iterator[np.ndarray] = iter(np.split(np.load(pixels), range(batch, len(np.load(pixels)), batch)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            some = next(self.rest, None)
            return None if some is None else {graph.INPUT: some}

    augmented = pixels.with_name("augmented.onnx")
    calibrator = create_calibrator(
        model, augmented_model_path=str(augmented), calibrate_method=CalibrationMethod.Entropy
    )
    start = time.perf_counter()
    calibrator.collect_data(Reader())
    calibrator.compute_data()
    return time.perf_counter() - start


def modelopt_entropy(python: Path, model: Path, pixels: Path) -> float:
    """Seconds of a whole quantization with entropy; what does not depend on the images cancels out in `marginal`."""
    output = pixels.with_name("modelopt.onnx")
    start = time.perf_counter()
    subprocess.run([python, MODELOPT, model, pixels, output, "--method", "entropy"], check=True, capture_output=True)
    return time.perf_counter() - start


def calibrate_some(model: Path, images: ImageSet, count: int, batch: int) -> None:
    """Calibrate on ``count`` of the images, over and over if there are fewer."""
    images = repeated(images, -(-count // len(images))).take(range(count))
    calibrate(graph.load(model), Loader(images, PREPROCESS, batch), {})


def make_model(path: Path) -> Path:
    """ResNet-50 v1.5 with random weights: as fast as a trained one."""
    import torch

    from edgeres.export import export_onnx
    from edgeres.model import resnet

    torch.manual_seed(0)
    record = {"variant": "v1.5", "weights": {"source": "random", "sha256": "0" * 64}}
    graph.save(export_onnx(resnet(50, "v1.5"), PREPROCESS, record), path)
    return path


def show(result: dict[str, Any]) -> None:
    """Print two small tables."""
    print(
        f"{result['images']} images (peers: {result['peer_images'][1] - result['peer_images'][0]} more), "
        f"{result['tensors']} tensors, batch {result['batch']}, {result['machine']['cpu']}, {result['threads']} threads"
    )
    print(f"\n{'':40}{'ms per image':>14}{'to bare pass':>14}")
    for name, ms in result["ms_per_image"].items():
        print(f"{name:40}{ms:>14.2f}{result['ratio_to_bare'][name]:>14.3f}")
    print()
    for n, mb in result["peak_mb"].items():
        print(f"{f'peak memory, {n:,} images, MB':40}{mb:>14.1f}")


if __name__ == "__main__":
    main()
