from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import special, stats

from edgeres.errors import BuildError, InputError
from edgeres.loader import Batch
from edgeres.runners import Runner
from edgeres.validate import Comparison, Verdict, compare, judge, top5


def draw(images: int, classes: int, noise: float = 0.7, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of a fair baseline, logits of a worse engine, labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    reference = rng.standard_normal((images, classes)) + 2 * np.eye(classes)[labels]
    logits = reference + noise * rng.standard_normal((images, classes))
    return reference.astype(np.float32), logits.astype(np.float32), labels


def compared(reference: np.ndarray, logits: np.ndarray, labels: np.ndarray) -> Comparison:
    comparison = Comparison()
    comparison.add(reference, logits, labels)
    return comparison


def assert_equal(one: Comparison, other: Comparison) -> None:
    for name, value in vars(one).items():
        assert value == pytest.approx(getattr(other, name), rel=1e-12), name


def flips(images: int, lost: int, won: int) -> Comparison:
    """A comparison of ``images`` of which ``lost`` went wrong and ``won`` came right."""
    both = (images - lost - won) // 2
    return Comparison(images, (both + lost, images), (both + won, images), lost, won)


@pytest.mark.parametrize("classes", [2, 4, 5, 10, 1000])
def test_every_number_is_what_scipy_and_loops_compute(classes: int) -> None:
    reference, logits, labels = draw(150, classes, seed=classes)
    c = compared(reference, logits, labels)
    first, fifth, changed, same, shared = [0, 0], [0, 0], [0, 0], 0, 0.0
    for a, b, label in zip(reference.astype(float), logits.astype(float), labels, strict=True):
        tops = [sorted(range(classes), key=lambda k, x=x: (-x[k], k))[:5] for x in (a, b)]
        hits = [top[0] == label for top in tops]
        for side in (0, 1):
            first[side] += hits[side]
            fifth[side] += label in tops[side]
            changed[side] += hits[side] and not hits[1 - side]
        same += tops[0][0] == tops[1][0]
        shared += len(set(tops[0]) & set(tops[1])) / len(tops[0])
    assert c.images == 150
    assert (c.baseline, c.engine) == ((first[0], fifth[0]), (first[1], fifth[1]))
    assert [c.right_to_wrong, c.wrong_to_right] == changed
    assert c.same_top1 == same
    assert c.shared_top5 == pytest.approx(shared, rel=1e-12)
    p, q = special.softmax(reference.astype(float), 1), special.softmax(logits.astype(float), 1)
    assert c.divergence == pytest.approx(special.rel_entr(p, q).sum(), rel=1e-9)
    assert c.p_value() == pytest.approx(stats.binomtest(changed[0], sum(changed)).pvalue, rel=1e-9)
    error = reference.astype(float) - logits
    assert c.sqnr_db() == pytest.approx(10 * math.log10(np.sum(reference.astype(float) ** 2) / np.sum(error**2)))
    assert c.drop() == pytest.approx(((first[0] - first[1]) / 1.5, (fifth[0] - fifth[1]) / 1.5))


def test_batches_add_up() -> None:
    reference, logits, labels = draw(100, 10)
    whole, parts = compared(reference, logits, labels), Comparison()
    for start in range(0, 100, 7):
        parts.add(*(x[start : start + 7] for x in (reference, logits, labels)))
    assert_equal(parts, whole)


def test_two_classes_have_every_label_in_their_top_5() -> None:
    c = compared(*draw(50, 2, noise=3))
    assert c.baseline[1] == c.engine[1] == 50
    assert c.shared_top5 == 50
    assert c.drop()[1] == 0
    assert 0 < c.same_top1 < 50


def test_an_identical_engine_loses_nothing() -> None:
    reference, _, labels = draw(80, 10)
    c = compared(reference, reference.copy(), labels)
    assert c.sqnr_db() == math.inf
    assert c.drop() == (0, 0)
    assert (c.divergence, c.same_top1, c.shared_top5, c.p_value()) == (0, 80, 80, 1)
    lo, hi = c.interval()
    assert lo == -hi < 0


def test_a_constant_added_to_all_logits_changes_no_probability() -> None:
    reference, logits, labels = draw(50, 10)
    c, shifted = compared(reference, logits, labels), compared(reference, logits + 4, labels)
    assert shifted.divergence == pytest.approx(c.divergence, rel=1e-5)
    assert shifted.sqnr_db() < c.sqnr_db()


def test_far_apart_logits_have_a_finite_divergence() -> None:
    reference, logits = np.asarray([[3000.0, 0]]), np.asarray([[0, 3000.0]])
    assert compared(reference, logits, np.asarray([0])).divergence == 3000


def test_of_equal_logits_the_lower_class_comes_first() -> None:
    logits = np.asarray([[0, 2, 2, 1, 2, 1, 1], [0, 0, 0, 0, 0, 0, 0]], np.float32)
    np.testing.assert_array_equal(top5(logits), [[1, 2, 4, 3, 5], [0, 1, 2, 3, 4]])


@pytest.mark.parametrize(
    ("lost", "won"),
    [(0, 0), (1, 0), (0, 1), (1, 1), (5, 0), (10, 3), (3, 10), (40, 41), (200, 150), (3000, 2800), (2600, 2600)],
)
def test_the_p_value_is_the_exact_mcnemar_test(lost: int, won: int) -> None:
    expected = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert flips(20_000, lost, won).p_value() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("images", "lost", "won"), [(100, 0, 0), (1000, 12, 7), (5000, 3, 90), (50, 20, 25)])
def test_the_interval_is_walds_with_half_an_image_in_each_cell(images: int, lost: int, won: int) -> None:
    both = (images - lost - won) // 2
    cells = np.asarray([both, lost, won, images - both - lost - won]) + 0.5
    p = cells / cells.sum()
    difference = np.asarray([0, 1, -1, 0])  # of an image in each cell
    mean = (p * difference).sum()
    error = math.sqrt((p * (difference - mean) ** 2).sum() / cells.sum())
    expected = 100 * (mean + stats.norm.ppf([0.025, 0.975]) * error)
    assert flips(images, lost, won).interval() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("images", [300, 1000, 10_000])
@pytest.mark.parametrize("rates", [(0.03, 0.03), (0.05, 0.02), (0.02, 0.08), (0.1, 0.09), (0.012, 0.008)])
def test_the_interval_holds_the_true_drop_95_times_in_100(images: int, rates: tuple[float, float]) -> None:
    rng = np.random.default_rng(images)
    lost, won = rates
    draws = rng.multinomial(images, [lost, won, 1 - lost - won], 2000)
    intervals = np.asarray([flips(images, int(a), int(b)).interval() for a, b, _ in draws])
    true = 100 * (lost - won)
    coverage = np.mean((intervals[:, 0] <= true) & (true <= intervals[:, 1]))
    assert 0.93 <= coverage <= 0.99


@pytest.mark.parametrize(("images", "rate"), [(50, 0.01), (200, 0.002), (200, 0.01)])
def test_where_flips_are_rare_the_interval_is_rather_too_wide(images: int, rate: float) -> None:
    draws = np.random.default_rng(images).multinomial(images, [rate, rate, 1 - 2 * rate], 2000)
    intervals = np.asarray([flips(images, int(a), int(b)).interval() for a, b, _ in draws])
    assert np.mean((intervals[:, 0] <= 0) & (intervals[:, 1] >= 0)) >= 0.93


def test_pass_and_fail_are_decided_by_the_ends_of_the_interval() -> None:
    c = flips(10_000, 110, 60)
    lo, hi = c.interval()
    assert 0 < lo < 0.5 < hi < 1
    assert judge(c, hi) == Verdict("PASS")
    assert judge(c, hi + 1) == Verdict("PASS")
    assert judge(c, lo - 1e-9) == Verdict("FAIL")
    assert judge(c, -1) == Verdict("FAIL")
    for budget in (lo, (lo + hi) / 2, hi - 1e-9):
        assert judge(c, budget).word == "NOT ENOUGH IMAGES"


@pytest.mark.parametrize("budget", [0.2, 0.3, 0.75, 1.0])
@pytest.mark.parametrize(("images", "lost", "won"), [(1000, 25, 20), (2000, 60, 50), (500, 12, 10)])
def test_the_images_needed_would_decide(images: int, lost: int, won: int, budget: float) -> None:
    verdict = judge(flips(images, lost, won), budget)
    assert verdict.word == "NOT ENOUGH IMAGES"
    assert verdict.images_needed is not None
    assert verdict.images_needed > images
    digits = str(verdict.images_needed).rstrip("0")
    assert len(digits) <= 2

    def with_times(factor: float) -> str:
        return judge(flips(round(images * factor), round(lost * factor), round(won * factor)), budget).word

    factor = verdict.images_needed / images
    assert with_times(1.15 * factor) == ("PASS" if 100 * (lost - won) / images < budget else "FAIL")
    assert with_times(0.7 * factor) == "NOT ENOUGH IMAGES"


def test_no_number_of_images_is_named_where_none_would_decide() -> None:
    assert judge(flips(100, 0, 0), 0.0) == Verdict("NOT ENOUGH IMAGES", None)
    assert judge(flips(100, 3, 3), 0.0) == Verdict("NOT ENOUGH IMAGES", None)
    assert judge(flips(100, 3, 3), 1e-7) == Verdict("NOT ENOUGH IMAGES", None)


class Function(Runner):
    """A runner that computes ``function`` of the first pixels of each image."""

    batch, input_size = None, 2

    def __init__(self, function: Callable[[np.ndarray], np.ndarray]) -> None:
        self.function = function

    def _run(self, pixels: np.ndarray) -> np.ndarray:
        return self.function(pixels[:, 0].reshape(len(pixels), -1))

    def close(self) -> None:
        raise AssertionError("the runners belong to the caller")


def labelled(labels: list[int] | None, size: int = 3) -> list[Batch]:
    images = len(labels) if labels is not None else 4
    pixels = np.random.default_rng(1).standard_normal((images, 3, 2, 2), dtype=np.float32)
    return [
        Batch(
            pixels[i : i + size], np.asarray(labels[i : i + size]) if labels else None, np.arange(images)[i : i + size]
        )
        for i in range(0, images, size)
    ]


def test_engines_are_compared_on_the_same_images() -> None:
    labels = [0, 1, 2, 3, 0, 1, 2]
    engines: dict[str, Runner] = {"same": Function(lambda x: x), "opposite": Function(lambda x: -x)}
    results = compare(Function(lambda x: x), engines, labelled(labels))
    x = np.concatenate([b.pixels for b in labelled(labels)])[:, 0].reshape(7, 4)
    assert list(results) == ["same", "opposite"]
    for name, sign in (("same", 1), ("opposite", -1)):
        assert_equal(results[name], compared(x, sign * x, np.asarray(labels)))


def poison(x: np.ndarray) -> np.ndarray:
    """NaN for the fifth image of `labelled`."""
    fifth = np.concatenate([b.pixels for b in labelled([0] * 7)])[4, 0].ravel()
    return np.where((x == fifth).all(1, keepdims=True), np.nan, x)


def test_an_engine_that_computes_nan_is_named_with_the_image() -> None:
    engines: dict[str, Runner] = {"good": Function(lambda x: x), "tiny-fp16-cpu": Function(poison)}
    with pytest.raises(BuildError, match="engine tiny-fp16-cpu computes NaN or infinity") as caught:
        compare(Function(lambda x: x), engines, labelled([0] * 7))
    assert caught.value.evidence == "on 1 of 3 images, first image 4 of the set"


def test_a_baseline_that_computes_infinity_is_named() -> None:
    with pytest.raises(BuildError, match="the FP32 baseline computes NaN or infinity") as caught:
        compare(Function(lambda x: x + np.float32(np.inf)), {}, labelled([0, 1]))
    assert caught.value.evidence.startswith("on 2 of 2 images, first image 0")


@pytest.mark.parametrize(("labels", "seen"), [([0, 3, 4], "labels 0 to 4"), ([0, -1, 2], "labels -1 to 2")])
def test_a_label_out_of_range_is_refused(labels: list[int], seen: str) -> None:
    with pytest.raises(InputError, match="a label is out of range") as caught:
        compare(Function(lambda x: x), {"e": Function(lambda x: x)}, labelled(labels))
    assert caught.value.evidence == f"{seen}, 4 classes"


def test_images_without_labels_are_refused() -> None:
    with pytest.raises(InputError, match="have no labels") as caught:
        compare(Function(lambda x: x), {"e": Function(lambda x: x)}, labelled(None))
    assert "one folder per class" in caught.value.hint
