"""Does the loader keep the runner fed? Images per second of each part alone and together, and peak memory.

    python benchmarks/loader.py --images DIR --json benchmarks/loader.json

Every variant runs once per round, in turn, so that a change of the machine's pace meets them all; ratios are medians
of the ratios within a round. Memory is that of a fresh process for each variant and size.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import alone, conduct, make_model

from edgeres import graph, machine
from edgeres.data import ImageSet
from edgeres.images import decode
from edgeres.layouts import open_images
from edgeres.loader import Batch, Loader
from edgeres.machine import cores
from edgeres.pack import write_pack
from edgeres.recipe import Preprocess
from edgeres.runners import Runner, open_runner

PREPROCESS = Preprocess()
GROWN = 8
"""Peak memory is measured on the set, and on the set this many times over."""

Variant = tuple[int, Callable[[], object]]
"""How many images it reads, and a function that does."""


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=Path, help="image folder; without it, 64 synthetic JPEGs of 500 x 375")
    parser.add_argument("--repeat", type=int, default=1, help="times that a round reads the set, without a runner")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", type=Path, help="engine.onnx for 224 x 224; without it, INT8 of random weights")
    conduct(parser, measure, show)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything -> one JSON object."""
    root = args.images or write_photos(folder / "images")
    images = open_images(root)
    large = repeated(images, GROWN)
    sets = {len(images): (images, folder / "set.pack"), len(large): (large, folder / "large.pack")}
    for source, packed in sets.values():
        write_pack(source, PREPROCESS, packed)
    engine = args.engine or alone(make_engine, root, folder / "int8.onnx")
    with open_runner(engine, "onnxruntime") as runner:
        work = variants(images, folder / "set.pack", runner, args.batch, args.repeat)
        wall, cpu = in_turn(work, args.rounds)
    jobs: dict[str, Callable[[ImageSet, Path], tuple[Any, ...]]] = {
        "loader": lambda s, _: (load, s, args.batch),
        "pack": lambda _, p: (load, p, args.batch),
        "write pack": lambda s, _: (pack, s, folder / "again.pack"),
        "loader + INT8": lambda s, _: (load, s, args.batch, engine),
    }
    return {
        "images": len(images),
        "bytes_per_image": round(sum((images.root / p).stat().st_size for p in images.paths) / len(images)),
        "batch": args.batch,
        "rounds": args.rounds,
        "repeat": args.repeat,
        "threads": cores(),
        "images_per_s": {name: round(median(rates), 1) for name, rates in wall.items()},
        "ratios": {
            "loader / decode only": ratio(wall, "loader", "decode only"),
            "the same, in processor time": ratio(cpu, "loader", "decode only"),
            "loader + INT8 / one after the other": ratio(wall, "loader + INT8", "decode only", "INT8 only"),
            "pack + INT8 / INT8 only": ratio(wall, "pack + INT8", "INT8 only"),
        },
        "peak_mb": {name: {n: alone(peak, *job(*of)) for n, of in sets.items()} for name, job in jobs.items()},
        "machine": machine.describe(),
        "versions": machine.versions("numpy", "pillow", "onnxruntime"),
    }


def variants(images: ImageSet, packed: Path, runner: Runner, batch: int, repeat: int) -> dict[str, Variant]:
    """What is measured, by name. Without a runner the set is read ``repeat`` times over."""
    pack, more = open_images(packed), repeated(images, repeat)
    ready = list(Loader(images.take(range(min(len(images), 2 * batch))), PREPROCESS, batch))

    def decode_only() -> None:
        with ThreadPoolExecutor(cores()) as pool:
            for _ in pool.map(lambda path: decode(images.root / path, PREPROCESS), more.paths):
                pass

    def infer_only() -> None:
        for start in range(0, len(images), batch):
            runner.infer(ready[start // batch % len(ready)].pixels[: len(images) - start])

    def through(source: ImageSet, use: Callable[[Batch], object]) -> Variant:
        def go() -> None:
            for b in Loader(source, PREPROCESS, batch):
                use(b)

        return len(source), go

    return {
        "decode only": (len(more), decode_only),
        "loader": through(more, lambda _: None),
        "pack": through(repeated(pack, repeat), lambda _: None),
        "INT8 only": (len(images), infer_only),
        "loader + INT8": through(images, lambda b: runner.infer(b.pixels)),
        "pack + INT8": through(pack, lambda b: runner.infer(b.pixels)),
    }


Rates = dict[str, list[float]]


def in_turn(work: dict[str, Variant], rounds: int) -> tuple[Rates, Rates]:
    """Images per second and per second of processor time, for each round after one that is not counted."""
    wall: Rates = {name: [] for name in work}
    cpu: Rates = {name: [] for name in work}
    for i in range(rounds + 1):
        for name, (count, go) in work.items():
            before = time.perf_counter(), time.process_time()
            go()
            if i:
                wall[name].append(count / (time.perf_counter() - before[0]))
                cpu[name].append(count / (time.process_time() - before[1]))
    return wall, cpu


def ratio(rates: Rates, name: str, *parts: str) -> float:
    """Median over the rounds of ``name``'s rate to that of doing the ``parts`` one after the other."""
    bounds = [1 / sum(1 / rate for rate in row) for row in zip(*(rates[part] for part in parts), strict=True)]
    return round(float(median(rate / bound for rate, bound in zip(rates[name], bounds, strict=True))), 3)


def repeated(images: ImageSet, times: int) -> ImageSet:
    """``images``, ``times`` over."""
    return images.take(list(range(len(images))) * times)


def load(source: ImageSet | Path, batch: int, engine: Path | None = None) -> None:
    """Read a set or a pack through the loader, and run each batch if there is an ``engine``."""
    runner = open_runner(engine, "onnxruntime") if engine else None
    for b in Loader(open_images(source) if isinstance(source, Path) else source, PREPROCESS, batch):
        if runner:
            runner.infer(b.pixels)


def pack(images: ImageSet, path: Path) -> None:
    """Pack ``images``, whatever is there."""
    path.unlink(missing_ok=True)
    write_pack(images, PREPROCESS, path)


def peak(function: Callable[..., None], *args: Any) -> float:
    """Peak resident memory of this process in MB, once ``function`` has run."""
    function(*args)
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include what the parent held
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return round(int(line.split()[1]) / 1024, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)  # bytes, on macOS


def write_photos(folder: Path, count: int = 64) -> Path:
    """Images about as hard to decode as photographs: smooth color with some detail."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(count):
        size = (500, 375) if i % 3 else (375, 500)
        parts = [
            np.asarray(Image.fromarray(rng.integers(0, 256, (n, n, 3), np.uint8)).resize(size), np.float32)
            for n in (5, 40, 160)
        ]
        pixels = np.tensordot(np.asarray([0.6, 0.25, 0.15], np.float32), np.stack(parts), 1)
        (folder / str(i % 4)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / str(i % 4) / f"{i}.jpg", quality=90)
    return folder


def make_engine(root: Path, path: Path) -> Path:
    """INT8 ResNet-50 v1.5 with random weights, calibrated on 32 images: as fast as a trained one."""
    from edgeres.calibrate import calibrate
    from edgeres.quantize import int8
    from edgeres.targets import load_target, scheme_for

    model = graph.load(make_model(path))
    batches = Loader(open_images(root).subset(32), PREPROCESS, 8)
    table = calibrate(model, batches, {"model": graph.digest(model)})
    graph.save(int8(model, table, scheme_for(load_target("cpu", "int8")), "minmax"), path)
    return path


def show(result: dict[str, Any]) -> None:
    """Print three small tables."""
    print(
        f"{result['images']} images, batch {result['batch']}, {result['machine']['cpu']}, {result['threads']} threads"
    )
    print(f"\n{'images per second':36}")
    for name, rate in result["images_per_s"].items():
        print(f"{name:36}{rate:>10.1f}")
    print("\nratio, median of rounds")
    for name, value in result["ratios"].items():
        print(f"{name:36}{value:>10.3f}")
    sizes = list(next(iter(result["peak_mb"].values())))
    print(f"\n{'peak memory, MB':31}" + "".join(f"{f'{n:,} images':>15}" for n in sizes))
    for name, values in result["peak_mb"].items():
        print(f"{name:31}" + "".join(f"{values[n]:>15.1f}" for n in sizes))


if __name__ == "__main__":
    main()
