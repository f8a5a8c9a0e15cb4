"""Does the memory of a self-test grow with the images of its bundle? Peak of the process, beside a bare load.

    python benchmarks/selftest.py --json benchmarks/selftest.json

A small network on crops of 32 pixels and ResNet-50 on crops of 224, both FP32 with random weights and 1000 classes,
whose bundles repeat a few images under many names: as many rows, names and digests as of other images. Bare is what
nobody can do without: importing edgeres and the executor, a session, one inference of a batch. Every figure is the
peak of a fresh process, in an environment with what a device has. MB are 10^6 bytes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import alone, conduct, make_model

from edgeres import bundle, graph, machine
from edgeres.job import Job
from edgeres.recipe import Preprocess, load_recipe

BAR = 300
"""MB that a self-test may take above a bare load, at most, whatever the number of images."""
PREPROCESS = Preprocess(crop=32, resize=32)
CLASSES, DIFFERENT = 1000, 50
SEEDED = """
import resource, sys
from pathlib import Path
sys.argv[0] = "edgeres"
"""
PEAK = """
status = Path("/proc/self/status")
if status.exists():
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    print(int(line.split()[1]) * 1024, file=sys.stderr)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""
BARE = """
import numpy as np
from edgeres import cli, selftest
from edgeres.runners import open_runner
with open_runner(Path(sys.argv[1]), "onnxruntime") as runner:
    runner.infer(np.zeros((32, 3, runner.input_size, runner.input_size), np.float32))
"""
TEST = """
from edgeres.cli import cli
cli(["selftest", *sys.argv[1:]], standalone_mode=False)
"""


def main() -> None:
    """Parse, measure, print, write."""
    device = Path(__file__).parents[1] / ".venv-device" / "bin" / "python"
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, nargs="*", default=(256, 10_000, 100_000), help="at 32 pixels")
    parser.add_argument(
        "--large", type=int, nargs="*", default=(256, 2048), help="images of ResNet-50's bundles, at 224"
    )
    parser.add_argument("--python", type=Path, default=device, help="interpreter of the device's environment")
    parser.add_argument("--folder", type=Path, help="where there is room for 3 GB at 100,000 images; a temporary one")
    conduct(parser, measure, show)


def measure(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Everything -> one JSON object."""
    rows = []
    for make, size, counts in ((write_model, 32, args.images), (make_model, 224, args.large)):
        model = alone(make, root / f"{size}.onnx") if counts else Path()
        photos = write_images(root / f"photos{size}", size)
        rows += [measure_one(args.python, root / f"{size}-{count}", model, photos, count) for count in counts]
    return {
        "classes": CLASSES,
        "rows": rows,
        "bar_mb": BAR,
        "machine": machine.describe(),
        "versions": json.loads(python(args.python, VERSIONS).stdout),
    }


def measure_one(interpreter: Path, folder: Path, model: Path, photos: Path, count: int) -> dict[str, Any]:
    """A bare load of ``model``, and a self-test of its bundle of ``count`` images made in ``folder`` -> a row."""
    folder.mkdir()
    made = alone(make_bundle, folder, model, photos, count)
    bare, _ = peak(interpreter, BARE, model)
    flags = ("--work", folder / "work", "--seconds", "0.1", "--quiet", "--json")
    taken, seconds = peak(interpreter, TEST, made, *flags)
    row = {
        "input_size": int(model.stem),
        "images": count,
        "bundle_mb": round(made.stat().st_size / 1e6, 1),
        "bare_mb": round(bare, 1),
        "selftest_mb": round(taken, 1),
        "above_mb": round(taken - bare, 1),
        "seconds": round(seconds, 1),
    }
    shutil.rmtree(folder)
    return row


VERSIONS = """
import json
from edgeres import machine
print(json.dumps(machine.versions("numpy", "onnxruntime")))
"""


def python(interpreter: Path, code: str, *arguments: Path | str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in an interpreter of its own."""
    command = [str(a) for a in (interpreter, "-c", code, *arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def peak(interpreter: Path, code: str, *arguments: Path | str) -> tuple[float, float]:
    """Peak resident memory in MB of a process that runs ``code``, and the seconds it took."""
    start = time.perf_counter()
    done = python(interpreter, SEEDED + code + PEAK, *arguments)
    return int(done.stderr.splitlines()[-1]) / 1e6, time.perf_counter() - start


def write_model(path: Path) -> Path:
    """FP32 ONNX of a small residual network with random weights."""
    import torch

    from edgeres.export import export_onnx
    from edgeres.model import ResNet

    torch.manual_seed(0)
    model = ResNet(CLASSES, "3x3", blocks=(1, 1), width=8).eval()
    graph.save(export_onnx(model, PREPROCESS, {"weights": {"source": "random"}}), path)
    return path


def write_images(folder: Path, size: int) -> Path:
    """A few images of noise, ``size`` pixels high and wide."""
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(DIFFERENT):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(folder / f"{i:02}.png")
    return folder


def make_bundle(folder: Path, model: Path, photos: Path, count: int) -> Path:
    """A bundle of ``count`` images, each file of ``photos`` as often as it takes."""
    for start in range(0, count, DIFFERENT):
        (part := folder / "images" / f"{start:06}").mkdir(parents=True)
        for i in range(min(DIFFERENT, count - start)):
            (part / f"{i:02}.png").symlink_to(photos / f"{i:02}.png")
    files = sorted((folder / "images").rglob("*.png"))
    lines = (f"{path.relative_to(folder)} {i % CLASSES}\n" for i, path in enumerate(files))
    (folder / "list.txt").write_text("".join(lines), encoding="utf-8")
    flags = {"validation": {"images": str(folder / "list.txt")}, "engine": {"precision": "fp32"}}
    job = Job(load_recipe(folder, flags=flags), folder, model)
    return Path(bundle.make(job, limit=None)["bundle"])


def show(result: dict[str, Any]) -> None:
    """Print one small table."""
    print(f"{'pixels':>8}{'images':>10}{'bundle':>12}{'bare load':>12}{'self-test':>12}{'above it':>12}{'time':>10}")
    for row in result["rows"]:
        sizes = "".join(f"{row[key]:>9.1f} MB" for key in ("bundle_mb", "bare_mb", "selftest_mb", "above_mb"))
        print(f"{row['input_size']:>8}{row['images']:>10,}{sizes}{row['seconds']:>8.1f} s")
    worst = max(row["above_mb"] for row in result["rows"])
    print(f"\nat most {worst:.1f} MB above a bare load (bar: {result['bar_mb']} MB of 10^6 bytes)")


if __name__ == "__main__":
    main()
