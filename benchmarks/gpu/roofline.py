"""What the GPU can do at most: multiply-adds in large matrices, bytes per second. And how long a network takes then."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from outcome import Skip, so_far, under_way

SIDE = 8192
"""Of the matrices that are multiplied: large enough that nothing but arithmetic counts."""
COPIED = 1 << 30
"""Bytes of a copy, or an eighth of what is free."""
PINNED = 1 << 28
SECONDS = 1.0
"""That each rate is measured for, after as many tenths to warm up."""
BYTES = {"fp32": 4, "fp16": 2, "int8": 1}


def cuda() -> Any:
    """PyTorch, if it sees a GPU; FP32 is FP32 in it, not TF32."""
    import torch

    if not torch.cuda.is_available():
        raise Skip(f"PyTorch {torch.__version__} sees no GPU: it was built for the CPU, or for a newer driver")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch


def measure(work: Path) -> dict[str, Any]:
    """Rates of FP32, FP16 and INT8 matrices in operations per second, and of copies in bytes per second."""
    torch = cuda()
    rates, skipped = {}, dict[str, str]()
    for precision in BYTES:
        under_way(work, f"{precision} matrices")
        try:
            rates[precision] = 2 * SIDE**3 / best(torch, multiply(torch, precision))
        except RuntimeError as error:  # INT8 has conditions of its own, and small GPUs little memory
            skipped[f"{precision} matrices"] = " ".join(str(error).split())[:200]
        so_far(work, "matrix and copy rates", {"operations_per_s": rates, "bytes_per_s": {}, "skipped": skipped})
    under_way(work, "copies")
    return {"operations_per_s": rates, "bytes_per_s": copies(torch), "skipped": skipped, "side": SIDE}


def multiply(torch: Any, precision: str, side: int = SIDE, device: str = "cuda") -> Callable[[], Any]:
    """A product of two random square matrices: zeros would take less power, and run at higher clocks."""
    if precision == "int8":
        a, b = (torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device) for _ in range(2))
        return lambda: torch._int_mm(a, b.t())
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return lambda: torch.mm(a, b)


def copies(torch: Any) -> dict[str, float]:
    """Bytes per second inside the GPU's memory, read and written, and to and from page-locked memory."""
    size = min(COPIED, torch.cuda.mem_get_info()[0] // 8)
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    host = torch.empty(min(PINNED, size), dtype=torch.uint8).pin_memory()
    part = source[: host.numel()]
    return {
        "device": 2 * size / best(torch, lambda: target.copy_(source)),
        "in": host.numel() / best(torch, lambda: part.copy_(host, non_blocking=True)),
        "out": host.numel() / best(torch, lambda: host.copy_(part, non_blocking=True)),
    }


def best(torch: Any, work: Callable[[], Any], seconds: float = SECONDS) -> float:
    """Seconds that ``work`` takes by the GPU's clock, in the fastest of as many runs as fit: it is to be a limit."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    fastest = float("inf")
    for duration in (seconds / 10, seconds):
        fastest, until = float("inf"), time.monotonic() + duration
        while time.monotonic() < until or fastest == float("inf"):
            start.record()
            work()
            end.record()
            end.synchronize()
            fastest = min(fastest, start.elapsed_time(end) / 1e3)
    return fastest


def floor_ms(layers: list[dict[str, int]], batch: int, precision: str, rates: dict[str, Any]) -> dict[str, float]:
    """Milliseconds below which ``layers`` cannot go at these ``rates`` (of `measure`); {} if one is not known.

    ``arithmetic``: all multiply-adds. ``memory``: all activations written once and read once, and the weights.
    ``layers``: the sum over layers of the longer of the two, as layers come one after the other.
    """
    operations = rates.get("operations_per_s", {}).get(precision)
    bandwidth = rates.get("bytes_per_s", {}).get("device")
    if not operations or not bandwidth:
        return {}
    size = BYTES[precision]
    computing = [2e3 * layer["macs"] * batch / operations for layer in layers]
    moving = [
        1e3 * size * ((layer["read"] + layer["written"]) * batch + layer["weights"]) / bandwidth for layer in layers
    ]
    each = [max(pair) for pair in zip(computing, moving, strict=True)]
    return {"arithmetic": sum(computing), "memory": sum(moving), "layers": sum(each)}
