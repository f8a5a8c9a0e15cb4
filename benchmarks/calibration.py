"""What does calibration cost? Time beside a bare FP32 pass over the same images, beside peers, and peak memory.

    python benchmarks/calibration.py --images DIR --modelopt-python PATH --json benchmarks/calibration.json

Variants run once per round, in turn; ratios are medians of the ratios within a round. Peers hold the activations of all
images in memory, so they get few: a whole quantization with entropy thresholds, from preprocessed pixels to the INT8
file, in a process of its own. Ours are shown on as few images too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import alone, conduct, make_model, ratio
from loader import peak, repeated, write_photos

from edgeres import equalize, graph, machine
from edgeres.calibrate import calibrate
from edgeres.data import ImageSet
from edgeres.layouts import open_images
from edgeres.loader import Batch, Loader
from edgeres.machine import cores
from edgeres.quantize import SCHEMES, int8
from edgeres.recipe import Preprocess
from edgeres.runners import open_runner
from edgeres.thresholds import METHODS

PREPROCESS = Preprocess()
PEERS = Path(__file__).parent / "peers"


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=Path, help="image folder; without it, 64 synthetic JPEGs of 500 x 375")
    parser.add_argument("--model", type=Path, help="FP32 ONNX for 224 x 224; without it, ResNet-50 of random weights")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs=2, default=(256, 2048), help="numbers of images")
    parser.add_argument("--peer-images", type=int, default=64, help="images that peers are compared on")
    parser.add_argument("--modelopt-python", type=Path, help="interpreter of an environment with nvidia-modelopt")
    conduct(parser, measure, show)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything -> one JSON object."""
    images = open_images(args.images or write_photos(folder / "images"))
    model = args.model or alone(make_model, folder / "model.onnx")
    ready = list(Loader(images, PREPROCESS, args.batch))
    seconds = in_turn(variants(model, images, ready, args.batch), args.rounds)
    per_image = {name: median(times) / len(images) * 1e3 for name, times in seconds.items()}
    few = np.concatenate([b.pixels for b in ready])[: args.peer_images]
    np.save(folder / "few.npy", few)
    whole = in_turn(quantizations(model, folder, args.modelopt_python), args.rounds)
    per_image |= {name: median(times) / len(few) * 1e3 for name, times in whole.items() if "edgeres" not in name}
    bare, ours = seconds["bare FP32 pass"], whole["edgeres"]
    return {
        "images": len(images),
        "batch": args.batch,
        "rounds": args.rounds,
        "threads": cores(),
        "tensors": len(graph.activations(graph.load(model))),
        "ms_per_image": {name: round(ms, 2) for name, ms in per_image.items()},
        "ratio_to_bare": {name: round(ratio(times, bare), 3) for name, times in seconds.items()}
        | {name: round(ms / per_image["bare FP32 pass"], 3) for name, ms in per_image.items() if name not in seconds},
        "peer_images": len(few),
        "whole_seconds": {name: round(median(times), 2) for name, times in whole.items()},
        "ratio_to_edgeres": {name: round(ratio(times, ours), 3) for name, times in whole.items()},
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


def quantizations(model: Path, folder: Path, modelopt: Path | None) -> dict[str, Callable[[], object]]:
    """Whole quantizations of the pixels in ``folder``, by name. Peers get a copy: one writes into the file it reads."""
    pixels, output = folder / "few.npy", folder / "int8.onnx"
    copy = folder / "copy.onnx"
    copy.write_bytes(model.read_bytes())

    def peer(python: Path | str, script: str) -> Callable[[], object]:
        call = [python, PEERS / script, copy, pixels, output, "--method", "entropy"]
        return lambda: subprocess.run(call, check=True, capture_output=True)

    found: dict[str, Callable[[], object]] = {
        "edgeres": lambda: alone(quantize, model, pixels, output, False),
        "edgeres, channels evened out first": lambda: alone(quantize, model, pixels, output, True),
        "onnxruntime.quantization": peer(sys.executable, "make_onnxruntime.py"),
    }
    return found | ({"Model Optimizer": peer(modelopt, "make_modelopt.py")} if modelopt else {})


def quantize(path: Path, pixels: Path, output: Path, even: bool) -> None:
    """Pixels (.npy) -> INT8 file, with entropy thresholds; without measuring fidelity, which peers do not."""
    model, few = graph.load(path), np.load(pixels)
    batches = [Batch(few[i : i + 32], None, np.arange(len(few))[i : i + 32]) for i in range(0, len(few), 32)]
    exponents = equalize.measure(model, batches) if even else {}
    table = calibrate(equalize.equalize(model, exponents), batches, {"model": graph.digest(model)})
    table = replace(table, exponents=exponents)
    graph.save(int8(model, table, SCHEMES["onnxruntime"], "entropy"), output)


def calibrate_some(model: Path, images: ImageSet, count: int, batch: int) -> None:
    """Calibrate on ``count`` of the images, over and over if there are fewer."""
    images = repeated(images, -(-count // len(images))).take(range(count))
    calibrate(graph.load(model), Loader(images, PREPROCESS, batch), {})


def show(result: dict[str, Any]) -> None:
    """Print small tables."""
    print(
        f"{result['images']} images, {result['tensors']} tensors, batch {result['batch']}, "
        f"{result['machine']['cpu']}, {result['threads']} threads"
    )
    print(f"\n{'':40}{'ms per image':>14}{'to bare pass':>14}")
    for name, ms in result["ms_per_image"].items():
        print(f"{name:40}{ms:>14.2f}{result['ratio_to_bare'][name]:>14.3f}")
    print(f"\n{'whole quantization, ' + str(result['peer_images']) + ' images':40}{'seconds':>14}{'to edgeres':>14}")
    for name, seconds in result["whole_seconds"].items():
        print(f"{name:40}{seconds:>14.2f}{result['ratio_to_edgeres'][name]:>14.3f}")
    print()
    for n, mb in result["peak_mb"].items():
        print(f"{f'peak memory, {n:,} images, MB':40}{mb:>14.1f}")


if __name__ == "__main__":
    main()
