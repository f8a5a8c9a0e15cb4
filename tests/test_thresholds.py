from __future__ import annotations

import inspect
import math
import time
from typing import Any

import numpy as np
import pytest
from onnxruntime.quantization import calibrate

from edgeres import recipe, thresholds
from edgeres.calibrate import BINS, TensorRange
from edgeres.thresholds import METHODS, PERCENTILE, SHRINK, WEIGHTS, entropy, least_squares, minmax, mse, percentile

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


def test_a_recipe_may_name_every_method() -> None:
    assert tuple(METHODS) == recipe.METHODS


def test_each_percentile_keeps_what_its_name_says() -> None:
    values = draw("heavy")
    r = measure(values)
    named = {99.9: "percentile-99.9", 99.99: "percentile-99.99", 99.999: "percentile"}
    for share, name in named.items():
        raw = np.percentile(values.astype(np.float64), [100 - share, share], method="inverted_cdf")
        assert METHODS[name](r, STEPS) == pytest.approx(tuple(raw), abs=r.limit / BINS)


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


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping weighs as much as rounding: then the least squared error is what is known from elsewhere."""
    monkeypatch.setattr(thresholds, "CLIPPING", 1 / STEPS)


@pytest.mark.usefixtures("plain")
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


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(("kind", "optimum"), [("normal", 3.92), ("laplace", 9.89 * 0.3)])
def test_mse_finds_the_published_optimum(kind: str, optimum: float) -> None:
    # Banner et al. 2018, "Post training 4-bit quantization of convolutional networks" (ACIQ): 8-bit clipping values
    lo, hi = mse(measure(draw(kind)), STEPS)
    assert (-lo, hi) == pytest.approx((optimum, optimum), rel=0.06)


@pytest.mark.parametrize("kind", ["laplace", "heavy", "heavy-relu"])
def test_mse_clips_less_where_clipping_weighs_more(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    r = measure(draw(kind))
    weighed = mse(r, STEPS)[1]
    monkeypatch.setattr(thresholds, "CLIPPING", 1 / STEPS)
    assert mse(r, STEPS)[1] < weighed <= r.max


@pytest.mark.parametrize("kind", ["normal", "positive", "negative"])
@pytest.mark.parametrize("distance", [100, 200])
def test_mse_lets_go_of_single_values_far_beyond_millions_of_others(kind: str, distance: float) -> None:
    values = draw(kind)
    far = [sign * distance for sign in (-1, 1) if (sign * values).max() > 0]
    r = measure(np.append(values, np.float32(far)))
    common = np.abs((r.edges()[:-1] + r.edges()[1:]) / 2) < 30
    r.histogram[common] *= 1000
    r.count = int(r.histogram.sum())
    lo, hi = mse(r, STEPS)
    assert max(-lo, hi) < 1.2 * np.abs(values).max() + r.limit / BINS


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


def test_a_threshold_costs_a_millisecond() -> None:
    ranges = [measure(draw(kind, 20_000)) for kind in KINDS]
    for method in METHODS.values():
        start = time.process_time()
        for r in ranges:
            method(r, STEPS)
        assert time.process_time() - start < 0.02 * len(ranges)  # twenty times what it takes


def onnxruntime_histogram(r: TensorRange, times: int = 1) -> tuple[Any, ...]:
    """What `HistogramCollector` keeps, cut to the bins in use: counts, edges, min, max, threshold."""
    filled = np.flatnonzero(r.histogram + r.histogram[::-1])
    keep = slice(filled[0], filled[-1] + 1)
    edges = r.edges()[filled[0] : filled[-1] + 2]
    return r.histogram[keep] * times, edges, np.float64(r.min), np.float64(r.max), edges[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("share", "name"), [(99.9, "percentile-99.9"), (99.99, "percentile-99.99")])
def test_percentile_agrees_with_onnxruntime(
    kind: str, share: float, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the same histogram as `onnxruntime.quantization`, with the differences between the two:

    - It cuts (100 - p) / 2 percent on each side, ours 100 - p: it is asked for 100 - 2 (100 - p).
    - Its upper end is the lower edge of the bin in which the share is reached, which leaves out more than was asked
      for; ours is the upper edge: one bin.
    - Ours holds zero and ends at the extremes, as every scheme needs it. It only cuts at the extremes.
    """
    r = measure(draw(kind, SIZE + 7))  # no share is reached exactly, where rounding decides
    collector = calibrate.HistogramCollector("percentile", False, 2 * BINS, 128, 100 - 2 * (100 - share), "same")
    collector.histogram_dict = {"x": onnxruntime_histogram(r)}
    lo, hi = (float(end) for end in collector.compute_percentile()["x"][:2])
    width = r.limit / BINS
    expected = (min(lo, 0), max(min(hi + width, r.max), 0))
    assert METHODS[name](r, STEPS) == pytest.approx(expected, abs=1e-9 * r.limit)


@pytest.mark.parametrize("kind", KINDS)
def test_percentile_agrees_with_onnxruntime_from_the_raw_values(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each with its own bins, filled in three parts; its are as many, between minus and plus the largest magnitude."""
    values, r = draw(kind), TensorRange()
    collector = calibrate.HistogramCollector("percentile", False, 2 * BINS, 128, 99.8, "same")
    for part in np.array_split(np.sort(np.abs(values)) * np.sign(values), 3):
        r.update(part)
        collector.collect({"x": part})
    lo, hi = (float(end) for end in collector.compute_percentile()["x"][:2])
    assert METHODS["percentile-99.9"](r, STEPS) == pytest.approx((min(lo, 0), max(hi, 0)), abs=2 * r.limit / BINS)


@pytest.mark.parametrize("kind", ["exponential", "heavy tail", "two bumps"])
def test_entropy_agrees_with_onnxruntime(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The divergences of `onnxruntime.quantization`, for the candidates and histograms which both treat alike.

    Both follow GTC 2017 S7310; `migacz` does to the letter. onnxruntime.quantization 1.31 differs:

    - Levels are spread over both signs at once: 128 of them are 64 for |x|. Here it is given 256, for 128.
    - A level takes ``bins // levels`` bins and the last one what remains, though Q gets none there. So only multiples
      of ``levels`` are compared.
    - A candidate reaches one bin further above than below zero, where P holds all that was clipped and Q nothing. So
      there are no positive values here.
    - Q has mass in empty bins, too, wherever another bin of their level is filled. So a level is empty or full here.
    - Zeros count. So there are none here.
    - Q is rounded down to integers, and empty bins get 0.0001 of a count. So counts are large.
    - Every candidate is tried; ours, as published, every fourth.
    """
    used, levels = 700, 128
    x = np.arange(used)
    counts = {
        "exponential": np.exp(-x / 60),
        "heavy tail": 1 / (1 + (x / 30) ** 3),
        "two bumps": np.exp(-(((x - 200) / 90) ** 2)) + np.exp(-x / 15),
    }[kind]
    histogram = np.zeros(2 * BINS, np.int64)
    histogram[BINS - used : BINS] = np.where(x < 60, 0, 1e9 * counts + 1e4)[::-1]
    r = TensorRange(-used / BINS, -60 / BINS, int(histogram.sum()), 0, 1.0, histogram)
    seen, divergence = [], calibrate.entropy

    def recorded(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        seen.append(divergence(p, q))
        return seen[-1]

    monkeypatch.setattr(calibrate, "entropy", recorded)
    edges = r.edges()[BINS - used : BINS + used + 1]
    collected = (histogram[BINS - used : BINS + used], edges, np.float64(r.min), np.float64(r.max))
    calibrate.HistogramCollector.get_entropy_threshold(None, collected, 2 * levels)
    ours = migacz(r)
    for bins in range(levels, used, levels):
        assert seen[bins - levels] == pytest.approx(ours[bins / BINS], rel=2e-3, abs=1e-6), bins
    best = min(ours, key=lambda t: (ours[t], t))
    assert entropy(r, STEPS) == (max(-best, r.min), 0)


def test_what_onnxruntime_calls_entropy_is_minmax() -> None:
    """With its own 128 bins and 128 levels there is one candidate, the whole range."""
    values = draw("heavy")
    defaults = inspect.signature(calibrate.EntropyCalibrater).parameters
    assert (defaults["num_bins"].default, defaults["num_quantized_bins"].default) == (128, 128)
    largest = np.float64(np.abs(values).max())
    counts, edges = np.histogram(values, 128, (-largest, largest))
    lo, hi = calibrate.HistogramCollector.get_entropy_threshold(None, (counts, edges, -largest, largest), 128)
    assert (lo, hi) == (-largest, largest)
    assert entropy(measure(values), STEPS)[1] < 0.7 * largest


def weights(rows: int = 40) -> np.ndarray:
    """Rows of many shapes and sizes, (5 rows, 90)."""
    rng = np.random.default_rng(11)
    normal = rng.standard_normal((rows, 90))
    outlier = normal.copy()
    outlier[:, 7] = -9 - 20 * rng.random(rows)
    kinds = [normal, rng.laplace(0, 1, normal.shape), rng.standard_t(2, normal.shape), rng.uniform(-1, 1, normal.shape)]
    return (np.concatenate([*kinds, outlier]) * np.exp(rng.normal(0, 3, (5 * rows, 1)))).astype(np.float32)


def weight_error(rows: np.ndarray, thresholds: np.ndarray, top: int) -> np.ndarray:
    """Squared error of each row, in float64."""
    x, scale = rows.astype(np.float64), thresholds.astype(np.float64)[:, None] / top
    return np.square(np.clip(np.rint(x / scale), -top - 1, top) * scale - x).sum(1)


@pytest.mark.parametrize("top", [127, 63, 7])
def test_least_squares_is_as_good_as_trying_every_share_one_after_the_other(top: int) -> None:
    rows = weights()
    largest = np.abs(rows).max(1)
    best = np.min([weight_error(rows, largest * share, top) for share in SHRINK], axis=0)
    found = weight_error(rows, least_squares(rows, top), top)
    np.testing.assert_allclose(found, best, rtol=1e-3)
    gain = found / weight_error(rows, largest, top)
    assert gain.max() <= 1.0001
    assert gain.mean() < 0.985


def test_least_squares_clips_an_outlier_more_where_there_are_fewer_steps() -> None:
    rows = weights()
    shares = [least_squares(rows, top) / np.abs(rows).max(1) for top in (127, 63, 7)]
    assert [float(s.min()) >= 0.5 for s in shares] == [True] * 3
    assert [float(s.max()) <= 1 for s in shares] == [True] * 3
    means = [float(s.mean()) for s in shares]
    assert means == sorted(means, reverse=True)
    assert means[0] > means[2] + 0.05


def test_least_squares_uses_the_integer_that_only_negative_weights_have() -> None:
    (threshold,) = least_squares(np.asarray([[-4, 3, 3, 2, -1]], np.float32), 3)
    assert threshold == pytest.approx(3)  # -4 to 3 without an error


def test_least_squares_clips_nothing_that_is_exact_as_it_is() -> None:
    rows = np.asarray([[127, -60, 3, 0], [0.5, 0, 0, 0]], np.float32)
    np.testing.assert_array_equal(least_squares(rows, 127), [127, 0.5])


@pytest.mark.parametrize("size", [1e-37, 3e-20, 1e20, 1e37])
def test_least_squares_does_not_depend_on_the_size_of_weights(size: float) -> None:
    rows = weights(3)
    rows /= np.abs(rows).max(1, keepdims=True)
    np.testing.assert_allclose(least_squares(rows * np.float32(size), 127), least_squares(rows, 127) * size, rtol=1e-2)


@pytest.mark.parametrize("rule", WEIGHTS.values(), ids=WEIGHTS)
def test_rows_of_zeros_and_of_the_smallest_and_largest_floats(rule: Any) -> None:
    rows = np.asarray([[0, 0], [1e-45, 0], [3e38, -3e38], [np.finfo(np.float32).tiny, 0]], np.float32)
    np.testing.assert_allclose(rule(rows, 127), np.abs(rows).max(1), rtol=1e-6)
    assert rule(rows, 127).dtype == np.float32


def test_least_squares_of_a_row_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = weights(10)
    together = least_squares(rows, 7)
    assert np.ptp(together / np.abs(rows).max(1)) > 0.2
    for piece in (1, 180, 10_000):
        monkeypatch.setattr(thresholds, "PIECE", piece)
        np.testing.assert_allclose(least_squares(rows, 7), together, rtol=0.011)  # within one share


def test_least_squares_of_a_million_weights_takes_no_second() -> None:
    rows = np.random.default_rng(0).standard_normal((512, 2048), dtype=np.float32)
    start = time.process_time()
    least_squares(rows, 127)
    assert time.process_time() - start < 2  # ten times what it takes


def test_a_recipe_may_name_every_rule_for_weights() -> None:
    assert tuple(WEIGHTS) == recipe.WEIGHTS
