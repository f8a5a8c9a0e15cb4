"""INT8 models of edgeres and of other tools, made from one FP32 model and the same images, side by side.

    python benchmarks/peers/compare.py --model FP32.onnx --calibration DIR --data DIR --json RESULT.json
    python benchmarks/peers/compare.py --speed --json RESULT.json

Each tool is installed into its own virtual environment and given the same 512 preprocessed images as an array. All
files are run by edgeres' own ONNX Runtime: those laid for TensorRT as a simulation of it, which is not timed unless
with --speed. --speed needs no data: random weights at 224 pixels compute as fast as trained ones.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import alone, make_model, write_noise
from peers import IMAGES, SETTINGS, PeerError, environment, make, versions
from rich.console import Console

from edgeres import benchmark, graph, machine, progress
from edgeres.baseline import preprocess_of
from edgeres.files import cache_folder, sha256_file, write_json
from edgeres.layouts import open_images
from edgeres.loader import Loader
from edgeres.runners import Runner
from edgeres.runners.onnxruntime import OnnxRuntimeRunner
from edgeres.validate import Comparison, compare

BATCHES = (1, 8)
"""Batch sizes that are timed."""
SCHEMES = {"onnxruntime": "laid for ONNX Runtime", "tensorrt": "laid for TensorRT, simulated by ONNX Runtime"}
Row = dict[str, Any]


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="FP32 ONNX file made by `edgeres export`")
    parser.add_argument("--calibration", type=Path, help="images to calibrate on")
    parser.add_argument("--data", type=Path, help="images to validate on")
    parser.add_argument("--limit", type=int, help="validate on at most this many of them")
    parser.add_argument("--speed", action="store_true", help="only times, of ResNet-50 v1.5 with random weights at 224")
    parser.add_argument("--tools", nargs="+", choices=sorted({s.tool for s in SETTINGS}), help="only these")
    parser.add_argument("--rounds", type=int, default=100, help="times that each file is timed, in turn")
    parser.add_argument("--envs", type=Path, default=cache_folder() / "peers", help="folder of virtual environments")
    parser.add_argument("--json", type=Path, help="keep the result here")
    args = parser.parse_args()
    if args.speed == bool(args.model and args.calibration and args.data):
        parser.error("give either --model, --calibration and --data, or --speed")
    args.envs = args.envs.absolute()
    with tempfile.TemporaryDirectory() as name, progress.to(Console(stderr=True)):
        folder = Path(name)
        if args.speed:
            args.model, args.calibration = alone(make_model, folder / "fp32.onnx"), write_noise(folder / "noise")
        result = measure(args, folder)
    show(result)
    if args.json:
        write_json(args.json, result)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything -> one JSON object."""
    settings = [s for s in SETTINGS if (s.timed or not args.speed) and s.tool in (args.tools or (s.tool,))]
    model, calibration, pixels = args.model.absolute(), args.calibration.absolute(), folder / "calibration.npy"
    preprocess = preprocess_of(graph.load(model))
    images = open_images(calibration).subset(IMAGES, seed=0)
    np.save(pixels, np.concatenate([batch.pixels for batch in Loader(images, preprocess)]))
    rows: dict[str, Row] = {"FP32": {"size_bytes": model.stat().st_size}}
    files = {}
    for setting in settings:
        row = rows[setting.title] = asdict(setting)
        progress.say(f"make {setting.title}")
        try:
            files[setting.title] = path = make(setting, model, calibration, pixels, args.envs, folder)
            row["size_bytes"] = path.stat().st_size
        except PeerError as error:
            row["error"] = error.evidence
            progress.say(f"{error}")
    with ExitStack() as stack:
        runners = {
            name: stack.enter_context(OnnxRuntimeRunner(path, rows[name].get("scheme") == "tensorrt"))
            for name, path in ({"FP32": model} | files).items()
        }
        if args.data:
            loader = Loader(open_images(args.data).subset(args.limit), preprocess)
            engines = {name: runner for name, runner in runners.items() if name != "FP32"}
            comparisons = compare(runners["FP32"], engines, progress.track(loader, "validate", len(loader)))
            add_accuracy(rows, comparisons)
        timed = {"FP32", *(s.title for s in settings if args.speed or s.scheme == "onnxruntime")}
        add_latency(rows, {n: r for n, r in runners.items() if n in timed}, np.load(pixels, mmap_mode="r"), args.rounds)
    peers = sorted({s.tool for s in settings} - {"edgeres"})
    return {
        "model": sha256_file(model),
        "input_size": preprocess.crop,
        "calibration_images": len(images),
        "validation_images": rows["FP32"].pop("images", None),
        "rounds": args.rounds,
        "rows": rows,
        "machine": machine.describe(),
        "versions": machine.versions("numpy", "onnx", "onnxruntime"),
        "peers": {tool: versions(tool, environment(tool, args.envs)) for tool in peers},
    }


def add_accuracy(rows: dict[str, Row], comparisons: dict[str, Comparison]) -> None:
    """Put what was compared into the rows: percent, points, dB."""
    for name, c in comparisons.items():
        rows["FP32"] |= {"images": c.images, "top1": 100 * c.baseline[0] / c.images}
        rows[name] |= {
            "top1": 100 * c.engine[0] / c.images,
            "drop": c.drop()[0],
            "interval": c.interval(),
            "agreement": 100 * c.same_top1 / c.images,
            "sqnr_db": c.sqnr_db(),
        }


def add_latency(rows: dict[str, Row], runners: dict[str, Runner], pixels: np.ndarray, rounds: int) -> None:
    """Put times into the rows, measured in turn: median ms, and the median over rounds of the share of FP32's time."""
    for batch in BATCHES:
        times = benchmark.latency(runners, np.ascontiguousarray(pixels[:batch]), rounds)
        for name, ms in times.items():
            share = float(np.median(ms / times["FP32"]))
            rows[name].setdefault("latency", {})[batch] = {**benchmark.summary(ms, batch), "of_fp32": round(share, 4)}


def show(result: dict[str, Any]) -> None:
    """Print one table in a group per scheme; in each the best first."""
    rows = result["rows"]
    print(f"{result['validation_images'] or 'no'} images of {result['input_size']}, {result['machine']['cpu']}\n")
    heads = ("top-1 %", "drop", "agree %", "SQNR dB", "MB", *(f"ms at {b}" for b in BATCHES), "of FP32")
    print(f"{'':52}" + "".join(f"{head:>9}" for head in heads))
    print(line("FP32", rows["FP32"]))
    for scheme, meaning in SCHEMES.items():
        print(f"\n{meaning}")
        group = {name: row for name, row in rows.items() if row.get("scheme") == scheme}
        for name in sorted(group, key=lambda name: rank(group[name])):
            print(line(name, group[name]))


def rank(row: Row) -> float:
    """Smallest for the most faithful, or without accuracy the fastest; failures last."""
    if "error" in row:
        return math.inf
    return -row["sqnr_db"] if "sqnr_db" in row else row["latency"][BATCHES[-1]]["of_fp32"]


def line(name: str, row: Row) -> str:
    """One line of the table."""
    if "error" in row:
        return f"{name:52} failed: {row['error'].splitlines()[-1][:60]}"
    latency = row.get("latency")
    cells = [
        (row.get(key), form)
        for key, form in (("top1", ".2f"), ("drop", "+.2f"), ("agreement", ".2f"), ("sqnr_db", ".1f"))
    ]
    cells.append((row["size_bytes"] / 1e6, ".1f"))
    cells += [(latency[b]["p50"] if latency else None, ".2f") for b in BATCHES]
    cells.append((latency[BATCHES[-1]]["of_fp32"] if latency else None, ".3f"))
    return f"{name:52}" + "".join(f"{'-' if value is None else format(value, form):>9}" for value, form in cells)


if __name__ == "__main__":
    main()
