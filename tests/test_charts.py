from __future__ import annotations

import pytest

from edgeres.charts import BARS, Axis, apart, histogram


def test_places_on_an_axis_are_percent() -> None:
    axis = Axis(2, 6)
    assert [axis.at(v) for v in (2, 3, 6)] == [0, 25, 100]
    assert [axis.up(v) for v in (2, 3, 6)] == [100, 75, 0]
    assert (axis.at(-9), axis.at(99)) == (0, 100)


def test_an_axis_has_room_around_its_values() -> None:
    axis = Axis.around([1, None, 3, float("inf")], 0.1)
    assert (axis.lo, axis.hi) == pytest.approx((0.8, 3.2))
    for values in ([], [0.0], [5.0], [-5.0, -5.0]):
        axis = Axis.around(values)
        assert axis.lo < axis.hi
        assert all(0 < axis.at(v) < 100 for v in values)


@pytest.mark.parametrize(
    ("lo", "hi", "labels"),
    [
        (0, 10, ["0", "2", "4", "6", "8", "10"]),
        (-0.13, 0.52, ["0", "0.2", "0.4"]),
        (85.4, 87.1, ["85.5", "86.0", "86.5", "87.0"]),
        (0, 12_345, ["0", "5,000", "10,000"]),
        (0.0012, 0.0049, ["0.002", "0.003", "0.004"]),
    ],
)
def test_ticks_are_round_numbers_with_the_digits_they_need(lo: float, hi: float, labels: list[str]) -> None:
    ticks = Axis(lo, hi).ticks()
    assert [tick.label for tick in ticks] == labels
    for tick in ticks:
        assert Axis(lo, hi).at(float(tick.label.replace(",", ""))) == pytest.approx(tick.at, abs=0.02)


def test_ticks_of_differences_carry_their_sign() -> None:
    assert [tick.label for tick in Axis(-1, 1).ticks(4, sign=True)] == ["-1.0", "-0.5", "0", "+0.5", "+1.0"]


def test_bars_stand_for_counts_per_width() -> None:
    narrow, wide = histogram([0, 1, 3], [4, 4], Axis(0, 4))
    assert (narrow.at, narrow.width, narrow.height) == (0, 25, 100)
    assert (wide.at, wide.width, wide.height) == (25, 50, 50)


def test_many_bins_are_merged_and_none_is_lost() -> None:
    counts = [1] * 1000
    bars = histogram(list(range(1001)), counts, Axis(0, 1000))
    assert len(bars) <= BARS
    assert sum(bar.width for bar in bars) == pytest.approx(100, abs=0.5)
    assert {bar.height for bar in bars} == {100}


def test_empty_bins_have_no_bar_and_those_beyond_the_axis_neither() -> None:
    assert [bar.at for bar in histogram([0, 1, 2, 3, 9, 10], [1, 0, 1, 0, 1], Axis(0, 4))] == [0, 50]
    assert histogram([5, 5], [0], Axis(0, 10)) == []


def test_logarithmic_heights_show_rare_values() -> None:
    high, low = histogram([0, 1, 2], [999_999, 9], Axis(0, 2), log=True)
    assert high.height == 100
    assert low.height == pytest.approx(100 / 6, abs=0.01)


def test_names_that_would_overlap_are_moved_apart() -> None:
    assert apart([(10, 50), (12, 51), (14, 52)], wide=25, high=8) == [50, 58, 66]
    assert apart([(10, 50), (80, 51)], wide=25, high=8) == [50, 51]
    assert apart([(12, 60), (10, 50)], wide=25, high=8) == [60, 50]
    assert apart([]) == []
