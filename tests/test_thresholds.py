from __future__ import annotations

import math

import numpy as np
import pytest

from edgeres.calibrate import BINS, TensorRange
from edgeres.thresholds import METHODS, PERCENTILE, entropy, minmax, mse, percentile

STEPS = 255
SIZE = 250_000  # tail of 2.5 values on each side


def draw(kind: str, size: int = SIZE) -> np.ndarray:
    rng = np.random.default_rng(7)
    normal = rng.standard_normal(size)
    return {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "laplace": rng.laplace(0, 0.3, size),
        "heavy": rng.standard_t(3, size),
        "heavy-relu": np.maximum(rng.standard_t(3, size), 0),
        "lopsided": np.where(rng.random(size) < 0.9, rng.exponential(2, size), -rng.exponential(0.1, size)),
        "positive": rng.uniform(3, 5, size),
        "negative": -rng.exponential(1, size) - 0.5,
        "one outlier": np.concatenate([normal[1:], [300]]),
    }[kind].astype(np.float32)


KINDS = ["normal", "relu", "laplace", "heavy", "heavy-relu", "lopsided", "positive", "negative", "one outlier"]


def measure(values: np.ndarray) -> TensorRange:
    r = TensorRange()
    r.update(values)
    return r


def squared_error(x: np.ndarray, lo: float, hi: float) -> float:
    """Mean over ``x`` of what uint8 with a zero point loses."""
    scale = (hi - lo) / STEPS
    zero = np.rint(-lo / scale)
    restored = (np.clip(np.rint(x / scale) + zero, 0, STEPS) - zero) * scale
    return float(np.square(x - restored).mean())


def migacz(r: TensorRange) -> dict[float, float]:
    """Threshold -> divergence, one bin at a time, after the pseudocode of GTC 2017 S7310."""
    counts = [float(r.histogram[BINS + i] + r.histogram[BINS - 1 - i]) for i in range(BINS)]
    counts[0] = 0.0
    levels = 128 if r.min < 0 else 256
    last = max(i for i in range(BINS) if counts[i])
    found = {}
    for bins in range(levels, last + 2, 4):
        reference = counts[:bins]
        outliers = sum(counts[bins:])
        candidate = [0.0] * bins
        for level in range(levels):
            first, end = -(-level * bins // levels), -(-(level + 1) * bins // levels)
            filled = [i for i in range(first, end) if counts[i]]
            for i in filled:
                candidate[i] = sum(counts[first:end]) / len(filled)
        reference[-1] += outliers
        p_total, q_total = sum(reference), sum(candidate)
        divergence = 0.0
        for p, q in zip(reference, candidate, strict=True):
            if p:
                divergence += p / p_total * math.log((p / p_total) / (q / q_total)) if q else math.inf
        found[r.limit * bins / BINS] = divergence
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_interval_holds_zero_and_lies_in_what_was_measured(method: str, kind: str) -> None:
    r = measure(draw(kind, 20_000))
    lo, hi = METHODS[method](r, STEPS)
    assert min(r.min, 0) <= lo <= 0 <= hi <= max(r.max, 0)
    assert hi > lo


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_zero_has_an_empty_interval(method: str) -> None:
    assert METHODS[method](measure(np.zeros(100, np.float32)), STEPS) == (0, 0)


@pytest.mark.parametrize("value", [1.0, -1.0, 0.75, 3e38, -1e-30, 1e-40])
@pytest.mark.parametrize("method", METHODS)
def test_one_repeated_value_stays_inside(method: str, value: float) -> None:
    r = measure(np.full(50, value, np.float32))
    lo, hi = METHODS[method](r, STEPS)
    assert (lo, hi) == ((0, pytest.approx(r.max)) if value > 0 else (pytest.approx(r.min), 0))


@pytest.mark.parametrize("method", METHODS)
def test_a_one_sided_tensor_gets_a_one_sided_interval(method: str) -> None:
    positive, negative = draw("heavy-relu", 20_000), draw("negative", 20_000)
    assert METHODS[method](measure(positive), STEPS)[0] == 0
    assert METHODS[method](measure(negative), STEPS)[1] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_minmax_is_what_was_seen_and_zero(kind: str) -> None:
    values = draw(kind)
    assert minmax(measure(values), STEPS) == (min(float(values.min()), 0), max(float(values.max()), 0))


@pytest.mark.parametrize("kind", KINDS)
def test_percentile_is_that_of_the_raw_values_within_a_bin(kind: str) -> None:
    values = draw(kind)
    r = measure(values)
    bin_width = r.limit / BINS
    raw = np.percentile(values.astype(np.float64), [100 - PERCENTILE, PERCENTILE], method="inverted_cdf")
    assert percentile(r, STEPS) == pytest.approx((min(raw[0], 0), max(raw[1], 0)), abs=bin_width)


@pytest.mark.parametrize("kind", KINDS)
def test_percentile_leaves_no_more_outside_than_it_says(kind: str) -> None:
    values = draw(kind)
    lo, hi = percentile(measure(values), STEPS)
    most = (1 - PERCENTILE / 100) * values.size
    assert (values < lo).sum() <= most
    assert (values > hi).sum() <= most


def test_percentile_ignores_an_outlier() -> None:
    assert percentile(measure(draw("one outlier")), STEPS)[1] < 6


@pytest.mark.parametrize("kind", ["normal", "laplace", "heavy", "heavy-relu", "lopsided", "negative", "one outlier"])
def test_mse_is_as_good_as_trying_every_pair_of_ends_on_the_raw_values(kind: str) -> None:
    values = draw(kind, 8000)
    lo, hi = minmax(measure(values), STEPS)
    grid = np.linspace(0.2, 1, 33)
    pairs = {(a, b) for a in (grid * lo if lo else [0.0]) for b in (grid * hi if hi else [0.0])}
    x = values.astype(np.float64)
    best = min(squared_error(x, a, b) for a, b in pairs)
    chosen = squared_error(x, *mse(measure(values), STEPS))
    assert chosen <= 1.03 * best
    assert chosen <= 1.001 * squared_error(x, lo, hi)


@pytest.mark.parametrize(("kind", "optimum"), [("normal", 3.92), ("laplace", 9.89 * 0.3)])
def test_mse_finds_the_published_optimum(kind: str, optimum: float) -> None:
    # Banner et al. 2018, "Post training 4-bit quantization of convolutional networks" (ACIQ): 8-bit clipping values
    lo, hi = mse(measure(draw(kind)), STEPS)
    assert (-lo, hi) == pytest.approx((optimum, optimum), rel=0.06)


def test_mse_does_not_count_exact_zeros() -> None:
    values = draw("heavy-relu", 20_000)
    padded = np.concatenate([values, np.zeros(10 * values.size, np.float32)])
    assert mse(measure(padded), STEPS) == mse(measure(values), STEPS)


@pytest.mark.parametrize("kind", ["relu", "heavy", "heavy-relu", "lopsided"])
def test_entropy_is_the_least_divergence_of_the_published_procedure(kind: str) -> None:
    r = measure(draw(kind, 50_000))
    divergence = migacz(r)
    best = min(divergence, key=lambda t: (divergence[t], t))
    runner_up = min(d for t, d in divergence.items() if t != best)
    assert divergence[best] < runner_up * (1 - 1e-9)  # so that rounding cannot decide
    assert entropy(r, STEPS) == (max(-best, min(r.min, 0)), min(best, max(r.max, 0)))


def test_entropy_clips_a_heavy_tail_more_than_a_light_one() -> None:
    heavy, light = draw("heavy-relu"), draw("positive")
    assert entropy(measure(heavy), STEPS)[1] < 0.7 * heavy.max()
    assert entropy(measure(light), STEPS)[1] > 0.9 * light.max()


def test_entropy_does_not_see_zeros() -> None:
    values = draw("heavy-relu", 20_000)
    padded = np.concatenate([values, np.zeros(10 * values.size, np.float32)])
    assert entropy(measure(padded), STEPS) == entropy(measure(values), STEPS)


def test_entropy_of_a_symmetric_tensor_is_symmetric() -> None:
    values = np.abs(draw("heavy", 20_000))
    lo, hi = entropy(measure(np.concatenate([values, -values])), STEPS)
    assert -lo == hi < values.max()
