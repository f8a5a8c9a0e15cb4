from __future__ import annotations

import math

import numpy as np
import pytest

from edgeres.fidelity import decibels, squares


@pytest.mark.parametrize(
    ("signal", "noise", "db"),
    [(100.0, 1.0, 20.0), (1.0, 1.0, 0.0), (1.0, 1000.0, -30.0), (2.0, 1.0, 3.0102999566398120), (1e100, 1e-100, 2000)],
)
def test_decibels_are_ten_times_the_logarithm(signal: float, noise: float, db: float) -> None:
    assert decibels(signal, noise) == pytest.approx(db, rel=1e-12)


def test_no_noise_is_infinitely_good_and_no_signal_infinitely_bad() -> None:
    assert decibels(5.0, 0.0) == math.inf
    assert decibels(0.0, 0.0) == math.inf
    assert decibels(0.0, 1.0) == -math.inf


def test_squares_are_those_of_reference_and_difference() -> None:
    assert squares(np.asarray([[3, -4.0]]), np.asarray([[3, -1.0]])) == (25.0, 9.0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_sums_are_taken_in_fp64(dtype: type) -> None:
    rng = np.random.default_rng(0)
    reference = (rng.standard_normal(100_000) * 300).astype(dtype)  # 300^2 does not fit FP16
    result = (reference * dtype(1.001)).astype(dtype)
    pairs = [(float(a), float(b)) for a, b in zip(reference, result, strict=True)]
    expected = math.fsum(a * a for a, _ in pairs), math.fsum((a - b) ** 2 for a, b in pairs)
    assert squares(reference, result) == pytest.approx(expected, rel=1e-12)
