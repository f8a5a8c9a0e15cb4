"""What a run says about questions that documents leave open, and one line for each part. Standard library only."""

from __future__ import annotations

from typing import Any

from outcome import NOT_HERE, OK, Outcome
from parts import BATCHES, TARGETS, plan_of


def answers(result: dict[str, Any]) -> dict[str, str]:
    """Question -> answer, as far as this run has one; and why not where it has none."""
    parts, found = result["parts"], {}
    found["does TensorRT-RTX run on this GPU"] = starts(parts.get("rtx starts"))
    for target in TARGETS:
        found[f"do INT8 convolutions run as INT8 ({target})"] = int8(parts.get(plan_of(target, "v1.5", "int8")))
        found[f"what does the inspector tell ({target})"] = inspector(parts.get(plan_of(target, "v1.5", "int8")))
        found[f"how much faster is INT8 than FP16 ({target})"] = ratios(parts, target)
    for name in ("calibration", "fidelity"):
        found[f"is {name} faster on the GPU, and the same"] = same(parts.get(name))
    return found


def missing(part: Outcome | None) -> str:
    """Why there is no answer."""
    return f"not found out: {part['reason'] if part else 'not among the parts'}"


def starts(part: Outcome | None) -> str:
    """Whether a plan ran, and what the library said."""
    if part is None or not part["record"]:
        return f"no: {part['reason']}" if part and NOT_HERE in part["reason"] else missing(part)
    record = part["record"]
    ran = "yes" if part["status"] == OK else f"no ({part['reason']})"
    return f"{ran}: TensorRT-RTX {record['version']} on compute capability {record['capability']}, " + (
        f"validity {record['validity']}" if "validity" in record else "which says nothing of its validity"
    )


def int8(part: Outcome | None) -> str:
    """What the convolutions of an INT8 plan read and write."""
    if part is None or not (found := part["record"].get("inspector")):
        return missing(part)
    if not found.get("convolutions") or found["by_name"] == found["layers"]:
        return f"the inspector does not tell: {'; '.join(found['summary'])}"
    others = ", ".join(f"{number} {kind or 'of unknown type'}" for kind, number in found["other"].items())
    whole, part_of = found["in_and_out"], found["in_only"]
    return f"{whole} of {found['convolutions']} in and out, {part_of} in only; others: {others or 'none'}"


def inspector(part: Outcome | None) -> str:
    """How much it tells, and the keys of its first layer."""
    if part is None or "layers" not in (found := part["record"].get("inspector", {})):
        return missing(part)
    first = found["first_layers"][0] if found["first_layers"] else None
    keys = ", ".join(first) if isinstance(first, dict) else "a name only"
    return f"{found['layers']} layers, {found['by_name']} by name only; a layer has: {keys}"


def ratios(parts: dict[str, Outcome], target: str) -> str:
    """FP16's time by INT8's, computation only, per batch; with a CUDA graph where there is one."""
    said = []
    for batch in BATCHES:
        sides = parts.get(f"speed at batch {batch}", {"record": {}})["record"].get("sides", {})
        for how in (", CUDA graph", ""):
            times = [sides.get(f"{target} {precision}{how}") for precision in ("FP16", "INT8")]
            if all(times):
                fp16, low = (t["compute"]["p50_ms"] for t in times if t)
                said.append(f"{fp16 / low:.2f}x at batch {batch}{how}")
                break
    return "; ".join(said) or "not found out: no two engines were measured"


def same(part: Outcome | None) -> str:
    """How much faster a pass over images is than on the CPU, and how far its numbers are from that one's."""
    if part is None or len(found := part["record"].get("passes", {})) < 2:
        return missing(part)
    (_, first), *others = found.items()
    said = [f"{name} {other['faster']:.2f}x, {distance(other)}" for name, other in others]
    return "; ".join([*said, f"the CPU {first['images_per_s']:.0f} images/s"])


def distance(found: dict[str, Any]) -> str:
    """The difference that `same` is about."""
    if "moved" not in found:
        return "equal to the last bit" if found["equal"] else f"{found['db'] or 0:.0f} dB"
    extremes, thresholds = (found[what]["largest"] for what in ("extremes", "thresholds"))
    return f"{found['moved']:.1e} of values in another bin, extremes within {extremes:.1e}, thresholds {thresholds:.1e}"


def line(name: str, part: Outcome) -> str:
    """What a table says of an outcome, in short."""
    record = part["record"]
    if part["status"] != OK or not record:
        return str(part["reason"])
    if "operations_per_s" in record:
        rates = ", ".join(f"{p.upper()} {rate / 1e12:.0f}" for p, rate in record["operations_per_s"].items())
        return f"{rates} TOP/s; copies {record['bytes_per_s']['device'] / 1e9:.0f} GB/s"
    if "build_s" in record:
        inner = record["inspector"].get("summary", [""])[:1]
        return "; ".join([f"built in {record['build_s']:.1f} s, {record['db']:.0f} dB of FP32", *inner])
    if "device_bytes" in record:
        times, what = next((record[key], key) for key in ("cycles", "inferences") if key in record)
        device, host = (record[key] / 2**20 for key in ("device_bytes", "host_bytes"))
        return f"{times:,} {what}: {device:+.1f} MiB on the GPU, {host:+.1f} MiB on the host"
    if "ratio" in record:
        return f"the same logits; p50 {', '.join(f'{k} {v:.3f} ms' for k, v in record['p50_ms'].items())}"
    if "passed" in record:
        return f"{record['passed']} passed, {sum(map(leading, record['skipped']))} skipped"
    if "gmacs" in record:
        return f"{record['gmacs']} GMAC; INT8 by {record['calibration']}"
    if "capability" in record:
        return f"{record['version']} on compute capability {record['capability']}"
    if "passes" in record:
        speeds = ", ".join(f"{who} {found['images_per_s']:,.0f}" for who, found in record["passes"].items())
        return f"images/s: {speeds}"
    if "sides" in record:
        return f"{len(record['sides'])} sides, below"
    return "done"


def leading(text: str) -> int:
    """The number that ``text`` begins with."""
    return int(text.split()[0])
