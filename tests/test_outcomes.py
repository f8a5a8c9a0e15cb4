from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from rows import draw, drawn
from scipy import special

from edgeres.errors import InputError, StaleError
from edgeres.files import sha256_file
from edgeres.outcomes import ABSENT, Outcomes, beside, join, measure, top5


def assert_same(one: Outcomes, other: Outcomes) -> None:
    for f in fields(Outcomes):
        a, b = getattr(one, f.name), getattr(other, f.name)
        assert a.dtype == b.dtype, f.name
        np.testing.assert_array_equal(a, b, f.name)


@pytest.mark.parametrize("classes", [2, 4, 5, 10, 1000])
def test_every_column_is_what_scipy_and_loops_compute(classes: int) -> None:
    reference, logits, labels = draw(60, classes, seed=classes)
    rows = measure(reference, logits, labels, np.arange(100, 160))
    a, b = reference.astype(float), logits.astype(float)
    p, q = special.softmax(a, 1), special.softmax(b, 1)
    for i in range(60):
        best = [sorted(range(classes), key=lambda k, x=x[i]: (-x[k], k))[:5] for x in (a, b)]
        assert [rows.baseline_top[i].tolist(), rows.engine_top[i].tolist()] == best
        assert rows.baseline_probability[i] == pytest.approx(p[i].max())
        assert rows.engine_probability[i] == pytest.approx(q[i].max())
        assert rows.margin[i] == pytest.approx(p[i, best[0][0]] - p[i, best[0][1]])
        assert rows.signal[i] == pytest.approx((a[i] ** 2).sum())
        assert rows.noise[i] == pytest.approx(((a[i] - b[i]) ** 2).sum())
        assert rows.divergence[i] == pytest.approx(special.rel_entr(p[i], q[i]).sum(), rel=1e-9)
        hits, among = rows.hits(rows.engine_top)
        assert (hits[i], among[i]) == (best[1][0] == labels[i], labels[i] in best[1])
    np.testing.assert_array_equal(rows.index, np.arange(100, 160))
    np.testing.assert_array_equal(rows.label, labels)


def test_one_class_has_no_second() -> None:
    rows = measure(np.ones((3, 1)), np.ones((3, 1)), np.zeros(3), np.arange(3))
    assert rows.margin.tolist() == rows.baseline_probability.tolist() == [1, 1, 1]


def test_images_without_labels_hit_nothing() -> None:
    rows = drawn(20, 4, labelled=False)
    assert not rows.labels
    assert (rows.label == ABSENT).all()
    assert not rows.hits(rows.baseline_top)[1].any()
    assert drawn(20, 4).labels


def test_of_equal_logits_the_lower_class_comes_first() -> None:
    logits = np.asarray([[0, 2, 2, 1, 2, 1, 1], [0, 0, 0, 0, 0, 0, 0]], np.float32)
    np.testing.assert_array_equal(top5(logits), [[1, 2, 4, 3, 5], [0, 1, 2, 3, 4]])


@pytest.mark.parametrize("classes", [1, 3, 5, 6, 40])
@pytest.mark.parametrize("levels", [2, 6, 10_000])
def test_the_best_five_are_those_of_a_stable_sort(classes: int, levels: int) -> None:
    logits = np.random.default_rng(levels).integers(0, levels, (200, classes)).astype(np.float32)
    np.testing.assert_array_equal(top5(logits), np.argsort(-logits, 1, kind="stable")[:, :5])


def test_far_apart_logits_have_a_finite_divergence() -> None:
    rows = measure(np.asarray([[3000.0, 0]]), np.asarray([[0, 3000.0]]), np.asarray([0]), np.asarray([0]))
    assert rows.divergence.tolist() == [3000]


def test_a_constant_added_to_all_logits_changes_no_probability() -> None:
    reference, logits, labels = draw(50, 10)
    rows, shifted = (measure(reference, x, labels, np.arange(50)) for x in (logits, logits + 4))
    np.testing.assert_allclose(shifted.divergence, rows.divergence, rtol=1e-4)
    assert shifted.noise.sum() > rows.noise.sum()


def test_parts_join_in_the_order_of_the_set() -> None:
    whole = replace(drawn(90, 10), skipped=np.asarray([95, 97]))
    parts = [
        replace(
            Outcomes(**{f.name: getattr(whole, f.name)[start::3] for f in fields(Outcomes)}),
            skipped=whole.skipped[start:][:1],
        )
        for start in (2, 0, 1)
    ]
    assert_same(join(parts), whole)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    rows = replace(drawn(40, 7), skipped=np.asarray([50]))
    digest = rows.save(tmp_path / "new" / "outcomes.npz")
    assert digest == sha256_file(tmp_path / "new" / "outcomes.npz")
    assert_same(Outcomes.load(tmp_path / "new" / "outcomes.npz", digest), rows)
    assert rows.save(tmp_path / "again.npz") == digest
    assert drawn(40, 7, seed=1).save(tmp_path / "other.npz") != digest
    assert {path.name for path in tmp_path.rglob("*.*")} == {"outcomes.npz", "again.npz", "other.npz"}


def test_outcomes_of_another_result_are_refused(tmp_path: Path) -> None:
    drawn(40, 7).save(tmp_path / "outcomes.npz")
    with pytest.raises(StaleError, match=r"outcomes.npz is not what its result was computed from") as caught:
        Outcomes.load(tmp_path / "outcomes.npz", "a" * 64)
    assert "the result says aaaaaaaaaaaa" in caught.value.evidence


@pytest.mark.parametrize("content", ["text", "columns"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "outcomes.npz"
    if content == "text":
        path.write_text("not an archive", encoding="utf-8")
    else:
        np.savez(path, index=np.arange(3))
    with pytest.raises(InputError, match=r"outcomes.npz holds no outcomes"):
        Outcomes.load(path, sha256_file(path))


@pytest.mark.parametrize(
    ("result", "outcomes"),
    [
        ("result.json", "outcomes.npz"),
        ("result-2of5.json", "outcomes-2of5.npz"),
        ("resnet50-v1-int8.result.json", "resnet50-v1-int8.outcomes.npz"),
        ("kept.json", "kept.outcomes.npz"),
        ("results.json", "results.outcomes.npz"),
    ],
)
def test_outcomes_lie_beside_their_result(result: str, outcomes: str) -> None:
    assert beside(Path("somewhere") / result) == Path("somewhere") / outcomes
