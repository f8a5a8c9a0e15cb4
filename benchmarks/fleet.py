"""What does Ray cost on one machine, what does a second worker win, and what does the driver's memory grow with?

    python benchmarks/fleet.py --data DIR --images 10000 --json benchmarks/fleet.json

Overhead: rounds of a plain validation and of one with --ray, one worker on all cores, in turn; with Ray's start, and
without. Workers: one worker of one core on one core, then two on two. Memory: the driver's peak in a fresh process that
validates ever more tiny images with a tiny network, less what it takes for 64 of them; then the driver is all there is
to see, as workers are other processes.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import ray
from common import alone, conduct, make_model, ratio, ratios, timed, write_noise

from edgeres import graph, imagenet, lineup, machine, pipeline
from edgeres.build import Engine
from edgeres.data import ImageSet
from edgeres.export import export_onnx
from edgeres.fleet import SPARE, Fleet
from edgeres.job import Job
from edgeres.layouts import open_images
from edgeres.recipe import Preprocess, load_recipe

BAR = 1.1
"""What a validation by one worker on all cores may take at most, in plain validations."""


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="image folder, list file or pack")
    parser.add_argument("--images", type=int, default=10_000, help="how many of them; 10000")
    parser.add_argument(
        "--engine", type=Path, help="engine folder; without it, INT8 ResNet-50 of random weights at 224"
    )
    parser.add_argument("--model", type=Path, help="FP32 ONNX that the engine was built from")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--memory", type=int, nargs="*", default=[1_000, 10_000, 100_000], help="numbers of tiny images"
    )
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": ""}
    conduct(parser, measure, show)


def measure(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Everything -> one JSON object."""
    with patch.object(lineup, "run", lambda *_: None):
        return {
            **validations(args, root),
            "memory": [alone(memory, root / str(count), count) for count in args.memory],
            "machine": machine.describe(),
            "versions": {**machine.versions("numpy", "onnxruntime", "pillow"), "ray": ray.__version__},
        }


def validations(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Overhead and workers -> one JSON object."""
    model = args.model.resolve() if args.model else make_model(root / "random.onnx")
    images = open_images(args.data).subset(args.images)
    source = write_list(images, root / "images.txt")
    flags: dict[str, Any] = {"validation": {"images": str(source)}}
    if args.engine:
        folder = root / args.engine.resolve().name  # results are written beside an engine
        shutil.copytree(args.engine, folder)
        job, engine = Job(load_recipe(root, flags=flags), root, model), Engine.load(folder)
    else:
        flags["calibration"] = {"images": str(write_noise(root / "noise")), "limit": 32}
        job = Job(load_recipe(root, flags=flags), root, model)
        engine = pipeline.ensure_engine(job)

    def validate(fleet: Fleet | None = None) -> float:
        shutil.rmtree(root / "engines" / "out" / "answers", ignore_errors=True)  # plain runs would go on with them
        return timed(lambda: pipeline.validate_engines(job, [engine], fleet=fleet))[0]

    cores = len(os.sched_getaffinity(0))
    seconds: dict[str, list[float]] = {"plain": [], "ray": [], "ray, started": []}
    for _ in range(args.rounds):
        seconds["plain"].append(validate())
        with nothing_runs():
            seconds["ray"].append(validate(Fleet("auto")))
        with cluster(cores):
            seconds["ray, started"].append(validate(Fleet("auto", cores)))
    workers: dict[str, list[float]] = {"1": [], "2": []}
    for _ in range(args.rounds if cores > 1 else 0):
        for count in (1, 2):
            with cluster(count):
                workers[str(count)].append(len(images) / validate(Fleet("auto", 1)))
    return {
        "images": len(images),
        "input_size": engine.record["preprocess"]["crop"],
        "rounds": args.rounds,
        "seconds": {name: median(values) for name, values in seconds.items()},
        "overhead": {name: ratio(seconds[name], seconds["plain"]) for name in ("ray", "ray, started")},
        "overheads": {name: ratios(seconds[name], seconds["plain"]) for name in ("ray", "ray, started")},
        "bar": BAR,
        "images_per_second": {name: median(values) if values else None for name, values in workers.items()},
        "second_worker": ratio(workers["2"], workers["1"]) if workers["1"] else None,
    }


def write_list(images: ImageSet, path: Path) -> Path:
    """A list file of ``images`` without labels: their classes need not be the model's."""
    path.write_text("".join(f"{(images.root / p).resolve()}\n" for p in images.paths), encoding="utf-8")
    return path


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Other clusters on this machine are none of ours: auto starts one."""
    init = ray.init

    def start(address: str, **settings: Any) -> Any:
        if address == "auto":
            raise ConnectionError("not looked for")
        return init(address, **settings)

    with patch.object(ray, "init", start):
        yield


@contextmanager
def cluster(cores: int) -> Iterator[None]:
    """Ray with so many CPUs, on so many cores: what it starts inherits them."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cores])
    settings: dict[str, Any] = {"object_store_memory": SPARE + (512 << 20), "include_dashboard": False}
    try:
        ray.init("local", num_cpus=cores, log_to_driver=False, logging_level="ERROR", **settings)
        yield
    finally:
        ray.shutdown()
        os.sched_setaffinity(0, before)


def memory(root: Path, count: int) -> dict[str, Any]:
    """Validate ``count`` tiny images -> what the driver, this process, took for that."""
    import torch

    from edgeres.model import ResNet

    root.mkdir()
    torch.manual_seed(0)
    record = {"variant": "v1.5", "weights": {"source": "random", "sha256": "0" * 64}}
    tiny = ResNet(1000, "3x3", blocks=(1, 1), width=4).eval()
    graph.save(export_onnx(tiny, Preprocess(crop=16, resize=16), record), root / "tiny.onnx")

    def job(images: int) -> Job:
        flags = {"validation": {"images": str(write_tiny(root / f"images{images}", images))}}
        return Job(load_recipe(root, flags={**flags, "engine": {"precision": "fp16"}}), root, root / "tiny.onnx")

    few, many = job(64), job(count)
    engine = pipeline.ensure_engine(few)
    with patch.object(lineup, "run", lambda *_: None), cluster(len(os.sched_getaffinity(0))):
        pipeline.validate_engines(few, [engine], fleet=Fleet("auto"))
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far counts no more (proc(5))
        before = peak()
        seconds, (result,) = timed(lambda: pipeline.validate_engines(many, [engine], fleet=Fleet("auto")))
        more = peak() - before
    return {
        "images": result["images"],
        "driver_mb": more / 1e6,
        "driver_before_mb": before / 1e6,
        "bytes_per_image": more / count,
        "outcomes_bytes_per_image": engine.path.with_name("outcomes.npz").stat().st_size / count,
        "ms_per_image": 1e3 * seconds / count,
    }


def write_tiny(root: Path, count: int) -> Path:
    """``count`` names for some images, in folders of ImageNet's classes: hard links take no space."""
    classes = imagenet.ids()
    for i in range(count):
        folder = root / classes[i % 1000]
        folder.mkdir(parents=True, exist_ok=True)
        if i < 1000:  # one file may have 65,000 names (ext4)
            (folder / f"{i:08}.pgm").write_bytes(b"P5 16 16 255\n" + bytes(range(256)))
        else:
            os.link(folder / f"{i % 1000:08}.pgm", folder / f"{i:08}.pgm")
    return root


def peak() -> int:
    """Most bytes of memory that this process had at a time."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def show(result: dict[str, Any]) -> None:
    """Print small tables."""
    print(f"{result['images']:,} images at {result['input_size']}, {result['machine']['cpu']}\n")
    for name, seconds in result["seconds"].items():
        cost = ""
        if name in result["overhead"]:
            each = result["overheads"][name]
            cost = f"{result['overhead'][name]:>10.3f} of plain ({min(each):.3f} to {max(each):.3f})"
        print(f"{name:24}{seconds:>10.2f} s{cost}")
    print(f"bar: {result['bar']}\n")
    for name, rate in result["images_per_second"].items():
        print(f"{name} worker{'s' * (name != '1'):2}of one core{'':6}" + (f"{rate:>10.1f} images/s" if rate else "-"))
    if result["second_worker"]:
        print(f"the second worker: {result['second_worker']:.2f} times the throughput\n")
    print(f"{'images':>10}{'driver, MB':>14}{'bytes/image':>14}{'outcomes/image':>16}{'ms/image':>12}")
    for row in result["memory"]:
        sizes = f"{row['driver_mb']:>14.1f}{row['bytes_per_image']:>14.0f}{row['outcomes_bytes_per_image']:>16.1f}"
        print(f"{row['images']:>10,}{sizes}{row['ms_per_image']:>12.2f}")


if __name__ == "__main__":
    main()
