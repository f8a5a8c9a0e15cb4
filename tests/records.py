"""Results as a validation writes them, made up, with everything in them that a result can hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from edgeres.files import write_json

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHA = {"int8": "8" * 64, "fp16": "f" * 64}
P50 = {"FP32": 5.67, "FP16": 5.4, "INT8": 2.43}
NEW = (
    *("labels", "classes", "flipped", "flipped_total", "reasons", "verdicts", "shard", "images_of"),
    *("latency", "layers", "ranges"),
)
"""Fields that results of the first format had not."""
DROPS = {"int8": (0.05, -0.09, 0.19), "fp16": (0.0, -0.02, 0.02)}


def side(name: str, top1: float, size: int) -> dict[str, Any]:
    p50 = P50[name]
    return {
        "name": name,
        "precision": name.lower(),
        "top1": top1,
        "top5": 99.47,
        "top1_interval": [top1 - 0.69, top1 + 0.66],
        "top5_interval": [99.31, 99.59],
        "latency_ms": {"p50": p50, "p90": 1.1 * p50, "p99": 1.4 * p50, "batch": 1, "samples": 200},
        "size_bytes": size,
    }


def runner(name: str, rng: np.random.Generator, samples: int = 2000) -> dict[str, Any]:
    times = P50[name] * (1 + rng.gamma(1.2, 0.03, samples))
    counts, edges = np.histogram(times, np.geomspace(times.min(), times.max(), 41))
    values = {p: float(np.percentile(times, float(p[1:]))) for p in ("p50", "p90", "p95", "p99", "p99.9")}
    return {
        **values,
        "mean": float(times.mean()),
        "cv": 3.1,
        "intervals": {p: [0.995 * v, 1.006 * v] for p, v in values.items()},
        "samples": samples,
        "seconds": 11.3,
        "images_per_second": 1e3 / values["p50"],
        "stable": True,
        "warnings": [],
        "split": {"copy_in": 0.021, "compute": values["p50"] - 0.03, "copy_out": 0.004},
        "enqueue": 0.11,
        "energy": {"joules_per_image": 0.031, "idle_watts": 9.1, "rails": ["VDD_IN"], "source": "INA3221"},
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def latency(names: tuple[str, ...] = ("FP32", "FP16", "INT8"), seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    runners = {name: runner(name, rng) for name in names}
    before = {
        "power_mode": "MAXN",
        "clocks": {"cpu0": 2201.5, "gpu": 1300.5},
        "temperatures": {"cpu": 48.5, "gpu": 47.0},
        "throttled": False,
        "governor": "schedutil",
        "load_1min": 0.35,
        "steal_percent": None,
        "memory_free_mb": 21_950,
    }
    return {
        "format": "edgeres benchmark 1",
        "batch": 1,
        "streams": 1,
        "preset": "edgeres",
        "runners": runners,
        "speedup": {
            n: {"of_p50": P50["FP32"] / P50[n], "interval": [0.98 * P50["FP32"] / P50[n], 1.02 * P50["FP32"] / P50[n]]}
            for n in names[1:]
        },
        "sweep": [
            {"batch": b, "runners": {n: {"p50": b * P50[n] * 0.9, "images_per_second": 1100 / P50[n]} for n in names}}
            for b in (1, 8, 32)
        ],
        "conditions": {
            "before": before,
            "after": {**before, "temperatures": {"cpu": 61.0, "gpu": 58.5}, "load_1min": 2.35, "steal_percent": 0.4},
            "warnings": ["governor is schedutil, not performance"],
        },
    }


def changed(
    total: int, images: int, classes: int, rng: np.random.Generator, names: tuple[str, ...]
) -> list[dict[str, Any]]:
    found = []
    for i in range(total):
        kind = ("right_to_wrong", "wrong_to_right", "wrong_to_wrong")[i % 3]
        first, second, third = rng.permutation(classes)[:3].tolist()
        label = {"right_to_wrong": first, "wrong_to_right": second, "wrong_to_wrong": third}[kind]
        index = int(rng.integers(images))
        found.append(
            {
                "index": index,
                "path": f"{names[label]}/{index:05d}.jpg",
                "label": label,
                "baseline": {"answer": first, "probability": float(0.9 - 0.4 * i / max(1, total))},
                "engine": {"answer": second, "probability": float(0.5 + 0.1 * rng.random())},
                "margin": round(0.5 * (1 - i / max(1, total)), 4),
                "kind": kind,
            }
        )
    return found


def by_class(images: int, classes: int, rng: np.random.Generator, names: tuple[str, ...]) -> list[dict[str, Any]]:
    out = []
    for index in range(classes):
        lost, won = rng.poisson(2, 2).tolist()
        lost += 12 * (index == 3)
        n = images // classes + lost + won
        p = min(1.0, math.exp(-(abs(lost - won) ** 1.2) / 2))
        right = int(0.86 * n)
        row = {"index": index, "name": names[index], "images": n, "baseline": right, "engine": right - lost + won}
        out.append({**row, "lost": lost, "won": won, "p_value": p, "p_adjusted": min(1.0, classes * p)})
    return out


def layers(number: int = 54, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    ratios = 38 - np.linspace(0, 7, number) + rng.normal(0, 1.5, number)
    names = ["conv1", *(f"layer{1 + i // 13}.{i // 3}.conv{1 + i % 3}" for i in range(number - 2)), "fc"]
    return [{"name": name, "sqnr_db": float(db)} for name, db in zip(names, ratios, strict=True)]


def histogram(tensor: str, seed: int, bins: int = 2048) -> dict[str, Any]:
    values = np.abs(np.random.default_rng(seed).laplace(0, 1, 200_000))
    counts, edges = np.histogram(values, bins)
    thresholds = {"minmax": values.max(), "entropy": 5.1, "percentile": 6.9, "mse": 7.4}
    return {
        "tensor": tensor,
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "thresholds": {method: [0.0, float(end)] for method, end in thresholds.items()},
        "used": [0.0, 7.4],
    }


def record(
    precision: str = "int8",
    images: int = 10_000,
    classes: int = 10,
    flips: int = 96,
    names: tuple[str, ...] = NAMES,
    **changes: Any,
) -> dict[str, Any]:
    """A result of the second format; ``changes`` replace its fields."""
    rng = np.random.default_rng(5)
    drop, lo, hi = DROPS[precision]
    name = precision.upper()
    names = names if len(names) == classes else tuple(f"class {i}" for i in range(classes))
    return {
        "format": "edgeres result 2",
        "name": "resnet50-v1.5-cifar10",
        "model": "resnet50 v1.5",
        "target": "cpu",
        "precision": precision,
        "images": images,
        "images_of": images,
        "shard": None,
        "skipped": [],
        "labels": True,
        "baseline": side("FP32", 86.25, 94_027_162),
        "engine": side(name, 86.25 - drop, 23_997_838 if precision == "int8" else 47_020_110),
        "drop": {"top1": drop, "top5": 0.01, "interval": [lo, hi], "top5_interval": [-0.03, 0.05], "p_value": 0.58},
        "flips": {"right_to_wrong": flips // 3, "wrong_to_right": flips // 3, "wrong_to_wrong": flips // 3},
        "agreement": {"top1": 100 - 100 * flips / images, "top5": 98.28},
        "sqnr_db": 34.8,
        "kl": 0.0003,
        "classes": by_class(images, classes, rng, names),
        "flipped": changed(min(200, flips), images, classes, rng, names),
        "flipped_total": flips,
        "budget": {"max_drop": 0.5, "min_relative": None, "accepted": None},
        "verdict": "PASS",
        "images_needed": None,
        "verdicts": None,
        "reasons": ["top-1 drop is 0.05 points, at worst 0.19: within the budget of 0.5"],
        "notes": [],
        "latency": latency(),
        "layers": layers(),
        "ranges": [histogram(f"layer4.{i}.conv2", i) for i in range(3)],
        "provenance": {
            "digests": {
                "model": "a" * 64,
                "images": "b" * 64,
                "weights": {"source": "resnet50-v1.5-cifar10.safetensors", "sha256": "d" * 64},
                "engine": SHA[precision],
                "outcomes": "0" * 64,
            },
            "preprocess": {
                "crop": 64,
                "resize": 64,
                "interpolation": "bilinear",
                "mean": [0.485, 0.456, 0.406],
                "std": [0.229, 0.224, 0.225],
                "channel_order": "RGB",
            },
            "quantization": {
                "scheme": "onnxruntime",
                "method": "mse",
                "weight_bits": 8,
                "rest": "fp32",
                "table": "c" * 64,
                "images": 512,
            },
            "built_with": {"edgeres": "0.1.0", "onnxruntime": "1.31.1", "machine": "x86_64"},
            "versions": {"edgeres": "0.1.0", "python": "3.11.7", "numpy": "2.4.6", "onnxruntime": "1.31.1"},
            "machine": {
                "system": "Linux x86_64",
                "cpu": "AMD EPYC",
                "cores": 2,
                "instruction_sets": ["avx2", "avx512_vnni"],
                "load_1min": 2.16,
            },
        },
        **changes,
    }


def full() -> dict[str, Any]:
    """A small result with every field that a result may have, none of them null."""
    measured = latency(("FP32", "INT8"))
    for run in measured["runners"].values():
        run["warnings"] = ["times drift"]
        run["stable"] = False
        run["histogram"] = {"edges": [0.5 * run["p50"], run["p50"], 2 * run["p50"]], "counts": [900, 1100]}
        run["energy"] |= {"rails": {"VDD_IN": 9.3}, "note": "estimated"}
    before, after = ({**measured["conditions"][key], "cpu_ticks": {"busy": 7.0}} for key in ("before", "after"))
    found = record(images=400, classes=3, flips=3)
    found["provenance"] |= {
        "host": "orin",
        "bundle": {"digest": "1" * 64, "signer": "me"},
        "fleet": {"ray": "2.9", "nodes": 2, "versions": [{"numpy": "2.4.6"}, {"numpy": "2.4.5"}]},
    }
    found["provenance"]["machine"]["gpus"] = [{"name": "Orin", "memory": 62}, {"name": "other", "memory": 8}]
    accepted = {"path": "a.json", "top1": 86.0, "max_loss": 0.1}
    return {
        **found,
        "latency": {
            **measured,
            "sweep": measured["sweep"][:1],
            "notes": ["FP16 is missing"],
            "left_out": ["no interval of p99.9"],
            "conditions": {"before": before, "after": after, "warnings": ["the governor is schedutil"]},
            "machine": dict(found["provenance"]["machine"]),
        },
        "layers": layers(2),
        "ranges": [histogram("layer4.0.conv2", 0, bins=2)],
        "skipped": ["bad.jpg"],
        "notes": ["slow"],
        "shard": {"index": 1, "of": 2},
        "images_needed": 9000,
        "verdicts": ["PASS"],
        "budget": {
            "max_drop": 0.5,
            "min_relative": 99.0,
            "accepted": accepted,
        },
    }


def save(folder: Path, result: dict[str, Any]) -> Path:
    """Write a result as a validation does, in an engine's folder -> its path."""
    write_json(folder / "result.json", result)
    return folder / "result.json"
