"""Against SciPy and statsmodels as independent references, and against what the names promise, by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from edgeres.statistics import Z95, holm, mcnemar, paired, unpaired, wilson

COUNTS = [(0, 1), (1, 1), (0, 40), (40, 40), (1, 40), (39, 40), (13, 64), (8580, 10_000), (38_230, 50_000)]


def test_the_quantile_is_that_of_the_normal_distribution() -> None:
    assert stats.norm.ppf(0.975) == pytest.approx(Z95, rel=1e-15)


@pytest.mark.parametrize(("hits", "images"), COUNTS)
def test_accuracy_has_wilsons_interval(hits: int, images: int) -> None:
    lo, hi = wilson(hits, images)
    ends = proportion_confint(hits, images, method="wilson")
    score = stats.binomtest(hits, images).proportion_ci(method="wilson")
    assert (lo, hi) == pytest.approx([100 * end for end in ends], rel=1e-12, abs=1e-12)
    assert (lo, hi) == pytest.approx((100 * score.low, 100 * score.high), rel=1e-12, abs=1e-12)
    assert 0 <= lo <= 100 * hits / images <= hi <= 100


def test_all_or_none_ends_exactly_at_the_end_of_the_scale() -> None:
    for images in range(1, 200):
        assert wilson(0, images)[0] == 0
        assert wilson(images, images)[1] == 100


TABLES = [(100, 0, 0), (1000, 12, 7), (5000, 3, 90), (50, 20, 25), (390, 4, 0), (390, 0, 4), (21, 1, 7), (50, 49, 1)]


@pytest.mark.parametrize(("images", "lost", "won"), TABLES)
def test_a_drop_has_tangos_score_interval(images: int, lost: int, won: int) -> None:
    """Its ends are where the score test has p = 0.05; the share of images won is found by maximum likelihood."""
    same = images - lost - won

    def p_value(drop: float) -> float:
        def unlikely(share: float) -> float:
            shares = (share + drop, share, 1 - drop - 2 * share)
            return -sum(k * math.log(p) for k, p in zip((lost, won, same), shares, strict=True) if k)

        bounds = (max(0.0, -drop), (1 - drop) / 2)
        share = optimize.minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-13}).x
        z = (lost - won - images * drop) / math.sqrt(images * (2 * share + drop - drop**2))
        return float(2 * stats.norm.sf(abs(z)))

    for end in paired(lost, won, images):
        assert p_value(end / 100) == pytest.approx(0.05, rel=1e-3)


def test_a_drop_has_the_interval_that_others_compute() -> None:
    """Fagerland, Lydersen and Laake, "Statistical Analysis of Contingency Tables", chapter 8: -0.517 to -0.026."""
    assert paired(1, 7, 21) == pytest.approx((-51.7, -2.6), abs=0.05)


def test_shares_of_the_whole_stay_shares() -> None:
    for images in (1, 2, 40):
        assert paired(images, 0, images)[1] == 100
        assert paired(0, images, images)[0] == -100
        assert paired(0, 0, images) == pytest.approx(
            (-100 * Z95**2 / (images + Z95**2), 100 * Z95**2 / (images + Z95**2))
        )


CELLS = {
    # shares of images lost and won; noise moves answers both ways, if not equally often
    "fp16": (0.0003, 0.0001),
    "best": (0.0008, 0.0006),
    "int8": (0.0027, 0.0022),
    "int8, ImageNet": (0.012, 0.008),
    "mostly lost": (0.004, 0.0005),
    "even": (0.03, 0.03),
    "loss": (0.05, 0.02),
    "gain": (0.02, 0.08),
    "poor": (0.10, 0.09),
}


@pytest.mark.parametrize("images", [300, 1000, 10_000])
@pytest.mark.parametrize("cell", CELLS)
def test_the_interval_of_a_drop_holds_the_true_one_95_times_in_100(images: int, cell: str) -> None:
    found = coverage(images, *CELLS[cell])
    assert found >= 0.935
    if images * min(CELLS[cell]) >= 10:
        assert found <= 0.96


@pytest.mark.parametrize(("images", "rate"), [(50, 0.01), (200, 0.002), (200, 0.01), (1000, 0.0005), (10_000, 5e-5)])
def test_where_flips_are_rare_the_interval_is_rather_too_wide(images: int, rate: float) -> None:
    assert coverage(images, rate, rate) >= 0.95


@pytest.mark.parametrize("won", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("flips", [0.5, 2.0, 3.9, 4.5, 8.0, 30.0])
@pytest.mark.parametrize("images", [300, 10_000])
def test_a_loss_is_greater_than_the_worst_end_once_in_forty_at_most(images: int, flips: float, won: float) -> None:
    """What a PASS rests on, exact: also where images are only ever lost, so few that all may be missed."""
    lost = flips / images
    drop, chance = 100 * lost * (1 - won), 0.0
    for k in range(int(flips + 9 * math.sqrt(flips)) + 4):
        likely = stats.binom.pmf(k, images, lost)
        for m in range(int(k / 2 + 30) if won else 1):
            if paired(k, m, images)[1] < drop:
                chance += likely * stats.binom.pmf(m, images - k, won * lost / (1 - lost))
    assert chance <= 0.0255


def coverage(images: int, lost: float, won: float, draws: int = 10_000) -> float:
    """Share of the samples whose interval holds the drop they were drawn with."""
    rng = np.random.default_rng(images)
    drawn = rng.multinomial(images, [lost, won, 1 - lost - won], draws)
    cells, count = np.unique(drawn[:, :2], axis=0, return_counts=True)
    ends = np.asarray([paired(int(a), int(b), images) for a, b in cells])
    true = 100 * (lost - won)
    return float(count[(ends[:, 0] <= true) & (true <= ends[:, 1])].sum() / draws)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(COUNTS[2:], repeat=2)))
def test_accuracies_on_other_images_have_newcombes_interval(before: tuple[int, int], after: tuple[int, int]) -> None:
    ends = confint_proportions_2indep(*before, *after, method="newcomb", compare="diff")
    assert unpaired(before, after) == pytest.approx([100 * end for end in ends], rel=1e-9, abs=1e-9)


PAIRS = [(0, 0), (1, 0), (0, 1), (1, 1), (5, 0), (10, 3), (3, 10), (40, 41), (200, 150), (3000, 2800), (2600, 2600)]


@pytest.mark.parametrize(("lost", "won"), PAIRS)
def test_the_p_value_is_the_exact_mcnemar_test(lost: int, won: int) -> None:
    binomial = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    table = reference_mcnemar([[1000, lost], [won, 1000]], exact=True).pvalue if lost + won else 1.0
    assert mcnemar(lost, won) == pytest.approx(binomial, rel=1e-9)
    assert mcnemar(lost, won) == pytest.approx(table, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_p_values_are_adjusted_as_holm_did(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = [*(10 ** -rng.uniform(0, 5, 30)).tolist(), 1.0, 1.0, 0.001, 0.001]
    rng.shuffle(p)
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1], rel=1e-12)


def test_nothing_and_one_thing_to_adjust() -> None:
    assert holm([]) == []
    assert holm([0.03]) == [0.03]
