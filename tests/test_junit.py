from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest
from records import record

from edgeres.junit import junit

BUDGET = {"max_drop": 0.5, "min_relative": 99.0, "accepted": {"path": "old.json", "top1": 86.0, "max_loss": 0.0}}


def parsed(*results: dict[str, Any]) -> ElementTree.Element:
    return ElementTree.fromstring(junit(list(results)).encode())


def counts(element: ElementTree.Element) -> tuple[str | None, ...]:
    return tuple(element.get(key) for key in ("tests", "failures", "skipped"))


def test_a_case_for_each_budget() -> None:
    root = parsed(record(budget=BUDGET, reasons=["a", "b", "c"]))
    assert [case.get("name") for case in root.iter("testcase")] == ["max_drop", "min_relative", "accepted"]
    assert counts(root) == ("3", "0", "0")
    assert list(root.iter("failure")) == []


@pytest.mark.parametrize("word", ["FAIL", "NOT ENOUGH IMAGES"])
def test_a_budget_that_is_not_met_is_a_failure(word: str) -> None:
    r = record(budget=BUDGET, verdict=word, reasons=["within", "too much", "within too"])
    r["verdicts"] = ["PASS", word, "PASS"]
    root = parsed(record("fp16"), r)
    assert counts(root) == ("4", "1", "0")
    assert [counts(suite) for suite in root.iter("testsuite")] == [("1", "0", "0"), ("3", "1", "0")]
    (failure,) = root.iter("failure")
    assert (failure.get("type"), failure.get("message")) == (word, "too much")
    assert failure.text is not None
    assert "drop +0.05, 95% -0.09 to +0.19" in failure.text
    assert failure.text.startswith("10,000 images, INT8")
    (failure,) = parsed(record(images=1, verdict=word)).iter("failure")
    assert (failure.text or "").startswith("1 image, INT8")


def test_where_it_is_not_known_which_budget_was_missed_none_passes() -> None:
    root = parsed(record(budget=BUDGET, verdict="FAIL", reasons=["a", "b", "c"]))
    assert counts(root) == ("3", "3", "0")


@pytest.mark.parametrize("shard", [None, {"index": 1, "of": 2}])
def test_without_a_budget_a_case_is_skipped(shard: dict[str, int] | None) -> None:
    root = parsed(record(verdict=None, reasons=[], shard=shard, labels=False, drop=None))
    assert counts(root) == ("1", "0", "1")
    (skipped,) = root.iter("skipped")
    assert skipped.get("message") == ("a shard is not judged" if shard else "no budget was set")


def test_cases_of_several_engines_have_names_of_their_own() -> None:
    cases = [(c.get("classname"), c.get("name")) for c in parsed(record(), record("fp16")).iter("testcase")]
    assert len(set(cases)) == 2


def test_any_name_gives_a_document_that_can_be_read() -> None:
    odd = '<a> & "b" \x00\x1b\ud83d\udc00 \']]>\ufffe é'
    r = record(name=odd, model=odd, target=odd, verdict="FAIL", reasons=[odd])
    (failure,) = parsed(r).iter("failure")
    assert failure.get("message") == '<a> & "b" \ufffd\ufffd\ufffd\ufffd \']]>\ufffd é'
