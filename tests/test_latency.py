from __future__ import annotations

import io
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import binom

from edgeres.benchmark import SAMPLES
from edgeres.latency import (
    PERCENTILES,
    SURE,
    describe,
    doubts,
    histogram,
    in_short,
    interval,
    left_out,
    median,
    percentile,
    rank,
    ranks,
    speedup,
    summary,
    table,
)

RNG = np.random.default_rng(0)


def test_percentiles_of_200_samples_are_samples_by_rank() -> None:
    samples = np.random.default_rng(0).permutation(np.arange(1, 201)).astype(float)
    assert summary(samples, 1) == {"p50": 100.5, "p90": 180.0, "p99": 199.0, "batch": 1, "samples": 200}


TRTEXEC = {
    1: (0, 0, 0, 0),
    10: (8, 9, 9, 9),
    19: (17, 18, 18, 18),
    20: (17, 18, 19, 19),
    40: (35, 37, 39, 39),
    100: (89, 94, 99, 99),
    101: (90, 95, 99, 100),
    200: (179, 189, 198, 199),
    201: (180, 190, 198, 200),
    300: (269, 284, 297, 299),
    368: (331, 349, 364, 367),
    1000: (899, 949, 990, 999),
    1001: (900, 950, 990, 999),
    2000: (1799, 1899, 1980, 1998),
    2001: (1800, 1900, 1980, 1998),
    3000: (2699, 2849, 2970, 2997),
    20_000: (17_999, 18_999, 19_800, 19_980),
}
"""Samples -> where `(1 - percentile / 100) * all` in C++ floats, compiled by g++ 12, puts p90, p95, p99 and p99.9."""


@pytest.mark.parametrize("n", TRTEXEC)
def test_a_percentile_is_the_sample_that_trtexec_takes(n: int) -> None:
    assert tuple(rank(n, per_mille) for per_mille in (900, 950, 990, 999)) == TRTEXEC[n]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 99, 100, 101, 200, 1000, 2000, 20_000])
def test_a_percentile_leaves_out_no_more_than_its_share(n: int) -> None:
    for per_mille in PERCENTILES.values():
        above = n - 1 - rank(n, per_mille)
        assert above * 1000 <= (1000 - per_mille) * n <= (above + 1) * 1000


def test_a_median_of_an_even_number_is_the_mean_of_two_as_in_trtexec() -> None:
    assert [median(np.asarray(values)) for values in ([4.0], [1.0, 4.0], [1.0, 2.0, 9.0], [1.0, 2.0, 5.0, 9.0])] == [
        *(4.0, 2.5, 2.0, 3.5)
    ]
    assert percentile(np.asarray([1.0, 2.0, 5.0, 9.0]), 500) == 3.5
    assert speedup(np.asarray([1.0, 3.0]), np.ones(2))["of_p50"] == 2
    assert speedup(np.asarray([1.0, 3.0]), np.ones(2), paired=False)["of_p50"] == 2


def test_the_samples_stay_in_the_order_they_were_taken() -> None:
    samples = np.asarray([3.0, 1.0, 2.0])
    summary(samples, 1)
    describe(samples, 3, 1)
    np.testing.assert_array_equal(samples, [3, 1, 2])


@pytest.mark.parametrize(("samples", "p90", "p99"), [(400, 360.0, 397.0), (50, 45.0, 50.0), (10, 10.0, 10.0)])
def test_in_short_the_slowest_stands_in_where_samples_are_too_few(samples: int, p90: float, p99: float) -> None:
    value = {"batch": 4, "runners": {"INT8": describe(np.arange(1.0, samples + 1), samples, 1)}}
    found = in_short(value, "INT8")
    assert found == {"p50": (samples + 1) / 2, "p90": p90, "p99": p99, "batch": 4, "samples": samples}
    assert set(found) == set(summary(np.ones(3), 1))


@pytest.mark.parametrize(("name", "enough"), [("p90", 20), ("p95", 40), ("p99", 201), ("p99.9", 2001)])
def test_a_percentile_that_would_be_the_maximum_is_not_given(name: str, enough: int) -> None:
    ordered = np.arange(enough, dtype=float)
    assert percentile(ordered[:-1], PERCENTILES[name]) is None
    assert percentile(ordered, PERCENTILES[name]) == enough - 3  # two lie beyond
    assert describe(ordered[:-1] + 1, 1, 1)[name] is None
    assert name not in describe(ordered[:-1] + 1, 1, 1)["intervals"]


def test_a_median_is_always_given() -> None:
    assert percentile(np.asarray([4.0]), 500) == 4
    assert describe(np.asarray([4.0]), 1, 1)["p50"] == 4


@pytest.mark.parametrize("per_mille", PERCENTILES.values())
@pytest.mark.parametrize("n", [6, 25, 200, 368, 1000, 20_000])
def test_an_interval_is_the_tightest_pair_of_ranks_that_a_binomial_count_lies_between(n: int, per_mille: int) -> None:
    count, found = binom(n, per_mille / 1000), ranks(n, per_mille)
    if found is None:
        assert count.cdf(0) > 0.025 or count.sf(n - 1) > 0.025
        return
    low, high = found  # places from 0: the percentile is above the first, below the second
    assert count.cdf(low) <= 0.025 < count.cdf(low + 1)
    assert count.sf(high) <= 0.025 < count.sf(high - 1)


@pytest.mark.parametrize(("per_mille", "enough"), [(500, 6), (900, 36), (990, 368), (999, 3688)])
def test_too_few_samples_have_no_interval(per_mille: int, enough: int) -> None:
    assert ranks(enough - 1, per_mille) is None
    assert ranks(enough, per_mille) is not None
    assert interval(np.asarray([]), per_mille) is None


def test_samples_are_the_fewest_that_give_p99_and_p99_9_their_intervals() -> None:
    assert tuple(next(n for n in range(10_000) if ranks(n, p)) for p in (990, 999)) == (SAMPLES, SURE)
    for n, p in ((SAMPLES, 990), (SURE, 999)):
        (low, high), at = ranks(n, p) or (0, 0), rank(n, p)
        assert low < at < high < n
        assert percentile(np.arange(n), p) is not None


def test_what_has_no_interval_is_said_with_the_option_that_gives_it() -> None:
    runners = {"FP32": {"samples": 400, "seconds": 16.0}, "INT8": {"samples": SURE, "seconds": 40.0}}
    assert left_out(runners) == [
        "no interval of p99.9: it takes 3,688 samples, here 148 s of each; --seconds 163 gives it"
    ]
    assert left_out({"INT8": runners["INT8"]}) == []


@pytest.mark.parametrize("per_mille", [500, 900])
def test_an_interval_holds_the_truth_as_often_as_it_says(per_mille: int) -> None:
    truth, rng = -np.log(1 - per_mille / 1000), np.random.default_rng(1)
    ends = [interval(np.sort(rng.exponential(size=150)), per_mille) for _ in range(2000)]
    share = np.mean([low <= truth <= high for low, high in ends if low is not None])
    assert 0.945 < share < 0.975


def test_a_description_holds_what_was_measured() -> None:
    ms = np.asarray([1.0, 3.0] * 200)
    found = describe(ms, images=1600, seconds=0.8)
    assert found["mean"] == 2
    assert found["cv"] == 50
    assert (found["samples"], found["seconds"], found["images_per_second"]) == (400, 0.8, 2000)
    assert found["p50"] == 2
    assert found["p99"] == 3
    assert found["intervals"]["p50"] == [1, 3]
    assert found["intervals"]["p99"] == [3, 3]


def test_a_histogram_has_every_sample_and_does_not_let_a_straggler_crowd_the_rest() -> None:
    ms = np.concatenate([RNG.uniform(1, 2, 999), [1000.0]])
    found = histogram(ms)
    counts, edges = found["counts"], found["edges"]
    assert sum(counts) == 1000
    assert len(edges) == len(counts) + 1
    assert edges == sorted(edges)
    assert (edges[0], edges[-1]) == (pytest.approx(ms.min(), rel=1e-5), 1000)
    assert counts[-1] == 1
    assert sum(count > 0 for count in counts) > 4
    factors = np.asarray(edges[1:]) / np.asarray(edges[:-1])
    np.testing.assert_allclose(factors, factors[0], rtol=1e-4)


def test_a_histogram_of_equal_samples_is_one_bar() -> None:
    assert histogram(np.full(7, 2.5)) == {"edges": [2.5, 2.5], "counts": [7]}


def test_steady_times_leave_no_doubt() -> None:
    assert doubts(RNG.normal(10, 0.1, 400)) == []


def test_scattered_times_are_doubted_with_both_numbers() -> None:
    ms = np.asarray([1.0, 3.0] * 50)
    assert doubts(ms) == ["times scatter: coefficient of variation 50.0 %, limit 10 %"]
    assert doubts(ms, limit=50) == []


def test_a_drift_is_named_with_both_medians() -> None:
    ms = np.concatenate([RNG.normal(10, 0.05, 200), RNG.normal(10.6, 0.05, 200)])
    (words,) = doubts(ms)
    assert words.startswith("times drift: median 10")
    assert "10.6" in words


def test_a_drift_that_is_small_or_may_be_chance_is_none() -> None:
    small = np.concatenate([RNG.normal(10, 0.05, 200), RNG.normal(10.2, 0.05, 200)])
    assert doubts(small) == []
    chance = np.asarray([10.0, 10.5, 9.8, 10.4, 9.9, 10.1, 10.9, 10.6, 10.0, 11.0, 9.9, 10.9])
    assert np.median(chance[6:]) > 1.03 * np.median(chance[:6])
    assert doubts(chance) == []
    assert doubts(np.asarray([1.0, 1.05])) == []  # two samples say nothing


def test_a_speedup_is_paired_by_round_so_that_what_slows_both_cancels() -> None:
    machine = np.linspace(1, 5, 100)
    found = speedup(20 * machine, 8 * machine)
    assert found == {"of_p50": 2.5, "interval": [2.5, 2.5]}
    opposed = speedup(np.tile([1.0, 2, 4], 4), np.tile([4.0, 2, 1], 4))
    assert opposed == {"of_p50": 1, "interval": [0.25, 4]}
    apart = speedup(20 * machine, 8 * machine, paired=False)
    assert apart["of_p50"] == 2.5
    assert apart["interval"][0] < 2 < 3 < apart["interval"][1]


def test_a_speedup_without_rounds_compares_the_slow_end_of_one_with_the_fast_end_of_the_other() -> None:
    first, other = np.arange(1.0, 102), np.arange(201.0, 302)
    low, high = ranks(101, 500, 0.975) or (0, 0)
    assert speedup(first, other, paired=False) == {
        "of_p50": round(51 / 251, 4),
        "interval": [round(first[low] / other[high], 4), round(first[high] / other[low], 4)],
    }
    assert (low, high) != ranks(101, 500)


def test_a_speedup_of_few_rounds_has_no_interval() -> None:
    assert speedup(np.asarray([4.0, 4, 4]), np.asarray([1.0, 2, 4])) == {"of_p50": 2, "interval": None}
    assert speedup(np.ones(3), np.ones(3), paired=False)["interval"] is None


def runner(p50: float, **changes: Any) -> dict[str, Any]:
    ms = RNG.normal(p50, p50 / 50, 2500)
    return {**describe(ms, 2500, 2500 * p50 / 1e3), "stable": True, "warnings": [], "energy": None, **changes}


def record(**changes: Any) -> dict[str, Any]:
    runners = {"FP32": runner(1234.5), "FP32 TF32": runner(700), "INT8": runner(123.4)}
    speedups = {"FP32 TF32": {"of_p50": 1.76, "interval": [1.71, 1.81]}, "INT8": {"of_p50": 10.0, "interval": None}}
    return {
        "title": "resnet50 v1.5 on jetson-agx-orin",
        "batch": 8,
        "streams": 1,
        "preset": "edgeres",
        "runners": runners,
        "speedup": speedups,
        "sweep": [],
        "conditions": {"warnings": []},
        **changes,
    }


def shown(value: dict[str, Any], width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(table(value))
    return str(console.file.getvalue())


def test_the_table_has_a_row_per_runner_and_no_column_that_says_nothing() -> None:
    text = shown(record())
    title, heads, fp32, tf32, int8 = text.splitlines()
    assert title == "resnet50 v1.5 on jetson-agx-orin, batch 8"
    assert heads.split() == ["p50", "ms", "95%", "interval", "p99", "p99.9", "images/s", "faster", "interval"]
    assert fp32.startswith("FP32 ")
    assert "1.76x" in tf32
    assert "1.71 1.81" in tf32
    assert int8.split()[-2:] == ["10.00x", "-"]
    assert "p99.9" not in shown(record(runners={"FP32": {**runner(3), "p99.9": None}}, speedup={}))


def test_the_table_fits_80_columns_at_its_widest() -> None:
    energy = {"joules_per_image": 0.0123}
    wide = {name: {**r, "energy": energy} for name, r in record()["runners"].items()}
    sweep = [{"batch": b, "runners": {n: {"p50": 1e3, "images_per_second": 9e3} for n in wide}} for b in (8, 32)]
    text = shown(record(runners=wide, sweep=sweep), width=200)
    assert max(map(len, text.splitlines())) <= 80


def test_a_sweep_adds_rows_with_the_ratio_of_medians() -> None:
    points = {"FP32": {"p50": 90.0, "images_per_second": 355.5}, "INT8": {"p50": 30.0, "images_per_second": 1066.0}}
    main = {"FP32": runner(3), "INT8": runner(1)}
    sweep = [{"batch": 8, "runners": main}, {"batch": 32, "runners": points}]
    lines = shown(record(runners=main, sweep=sweep, speedup={"INT8": {"of_p50": 3.01, "interval": [3, 3.02]}}))
    rows = [line.split() for line in lines.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["8", "FP32"], ["8", "INT8"], ["32", "FP32"], ["32", "INT8"]]
    assert rows[2][2:] == ["90.0", "356"]
    assert rows[3][2:] == ["30.0", "1,066", "3.00x"]


def test_what_makes_the_numbers_doubtful_is_said_below_the_table() -> None:
    runners = {"FP32": runner(3), "INT8": runner(1, stable=False, warnings=["times drift: [a] to [b]"])}
    lines = shown(
        record(runners=runners, conditions={"warnings": ["throttled"]}, notes=["no FP16 engine"], left_out=["no p"]),
        120,
    )
    assert lines.splitlines()[-5:] == [
        "not stable: INT8",
        "note: INT8: times drift: [a] to [b]",
        "note: throttled",
        "note: no FP16 engine",
        "note: no p",
    ]


@pytest.mark.parametrize("width", [50, 80])
@pytest.mark.parametrize("sweep", [False, True])
def test_long_names_give_way_and_numbers_do_not(width: int, sweep: bool) -> None:
    runners = {f"{name} resnet50-v1.5-int8-cpu-of-a-long-name": r for name, r in record()["runners"].items()}
    points = [{"batch": b, "runners": {n: {"p50": 90.0, "images_per_second": 355.5} for n in runners}} for b in (8, 32)]
    speedups = {name: {"of_p50": 10.0, "interval": [9.81, 10.21]} for name in [*runners][1:]}
    value = record(runners=runners, speedup=speedups, sweep=points if sweep else [])
    narrow, wide = shown(value, width), shown(value, 300)
    assert "…" not in narrow
    assert max(map(len, narrow.splitlines()[1:])) <= width
    numbers = re.findall(r"(?<=\s)[\d.,]+x?(?=\s)", wide)
    assert len(numbers) > 20
    assert not Counter(numbers) - Counter(re.findall(r"(?<=\s)[\d.,]+x?(?=\s)", narrow))


def test_brackets_in_a_name_are_no_markup() -> None:
    assert "INT8 net[v1] " in shown(record(runners={"FP32": runner(3), "INT8 net[v1]": runner(1)}, speedup={}))


def test_the_title_says_streams_and_preset() -> None:
    assert shown(record(streams=4)).splitlines()[0].endswith(", batch 8, 4 streams")
    title = shown(record(preset="trtexec-10")).splitlines()[0]
    assert title.endswith(", batch 8, as trtexec-10 measures")


@pytest.mark.parametrize(
    ("ms", "text"), [(1234.56, "1235"), (123.456, "123"), (12.3456, "12.3"), (1.23456, "1.23"), (0.123456, "0.123")]
)
def test_times_have_three_digits_that_count(ms: float, text: str) -> None:
    value = record(runners={"FP32": {**runner(ms), "p50": ms}}, speedup={})
    assert shown(value).splitlines()[2].split()[1] == text
