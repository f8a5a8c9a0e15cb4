"""What does validating a second engine cost, against running it on the same images and nothing else?

    python benchmarks/validation.py --images DIR --json benchmarks/validation.json

The first engine pays for the FP32 baseline, whose answers are kept. The second pays for itself: opening, hashing and
reading the images, its inference, comparing, and writing the result. Measuring latency takes the same time whatever the
set, and is left out. Each round validates the second engine and runs it bare, in turn; ratios are medians of rounds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from common import conduct, make_model, ratio, ratios, timed, write_noise

from edgeres import graph, lineup, machine, pipeline
from edgeres.baseline import preprocess_of
from edgeres.build import Engine
from edgeres.job import BATCH, Job
from edgeres.layouts import open_images
from edgeres.loader import Loader
from edgeres.recipe import Preprocess, load_recipe

BAR = 1.1
"""What validating a second engine may cost at most, in runs of it on the same images."""


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=Path, required=True, help="image folder, list file or pack")
    parser.add_argument("--model", type=Path, help="FP32 ONNX; without it, ResNet-50 of random weights at 224")
    parser.add_argument("--calibration", type=Path, help="images to calibrate on; without it, noise")
    parser.add_argument("--limit", type=int, help="at most so many images")
    parser.add_argument("--rounds", type=int, default=3)
    conduct(parser, measure, show)


def measure(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Everything -> one JSON object."""
    model = args.model.resolve() if args.model else make_model(root / "random.onnx")
    preprocess = preprocess_of(graph.load(model))
    images = open_images(args.images).subset(args.limit)
    source = args.images.resolve()
    if images.classes and len(images.classes) != graph.metadata(graph.load(model))["classes"]:
        source = root / "unlabelled.txt"  # the classes are not the model's: judge fidelity alone
        source.write_text("".join(f"{(images.root / p).resolve()}\n" for p in images.paths), encoding="utf-8")
    calibration = args.calibration.resolve() if args.calibration else write_noise(root / "noise")
    flags = {
        "calibration": {"images": str(calibration), "limit": 32 if args.calibration is None else 512},
        "validation": {"images": str(source), "limit": args.limit},
    }
    engines = []
    for method in ("minmax", "mse"):
        flags["calibration"]["method"] = method
        job = Job(load_recipe(root, flags=flags), root, model)
        engines.append(pipeline.ensure_engine(job, root / method))
    with patch.object(lineup, "run", lambda *_: None):
        first, _ = timed(lambda: pipeline.validate_engines(job, engines[:1]))
        validated, bare = [], []
        for _ in range(args.rounds):
            seconds, (result,) = timed(lambda: pipeline.validate_engines(job, engines[1:]))
            validated.append(seconds)
            bare.append(timed(lambda: run(engines[1], images, preprocess))[0])
    answers = root / "engines" / "out" / "answers"
    return {
        "images": result["images"],
        "labels": result["labels"],
        "input_size": preprocess.crop,
        "rounds": args.rounds,
        "seconds": {"first": first, "second": median(validated), "bare": median(bare)},
        "ratio": ratio(validated, bare),
        "ratios": ratios(validated, bare),
        "bar": BAR,
        "kept_mb": sum(path.stat().st_size for path in answers.rglob("*") if path.is_file()) / 1e6,
        "machine": machine.describe(),
        "versions": machine.versions("numpy", "onnxruntime", "pillow"),
    }


def run(engine: Engine, images: Any, preprocess: Preprocess) -> None:
    """Open the engine, read every image, run it: what nobody can do without."""
    with engine.open() as runner:
        for batch in Loader(images, preprocess, BATCH):
            runner.infer(batch.pixels)


def show(result: dict[str, Any]) -> None:
    """Print one small table."""
    print(f"{result['images']:,} images at {result['input_size']}, {result['machine']['cpu']}\n")
    rows = {
        "first engine, with the FP32 baseline": result["seconds"]["first"],
        "second engine": result["seconds"]["second"],
        "second engine, bare inference": result["seconds"]["bare"],
    }
    for name, seconds in rows.items():
        print(f"{name:40}{seconds:>10.2f} s{1e3 * seconds / result['images']:>10.3f} ms/image")
    print(f"\nsecond engine / bare inference: {result['ratio']:.3f} (bar: {result['bar']})")
    print(f"answers kept of FP32: {result['kept_mb']:.1f} MB")


if __name__ == "__main__":
    main()
