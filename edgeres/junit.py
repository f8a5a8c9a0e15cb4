"""Results as JUnit XML, which CI systems show: a test case for each budget."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

from edgeres.report import checks, labels
from edgeres.words import between, count, number

Record = dict[str, Any]
FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What no XML 1.0 document may hold (its section 2.2)."""


def junit(results: list[Record]) -> str:
    """The document. All but PASS are failures; a result without a budget is a skipped case."""
    root = ElementTree.Element("testsuites", name="edgeres")
    totals = {"tests": 0, "failures": 0, "skipped": 0}
    for name, r in zip(labels(results), results, strict=True):
        suite = ElementTree.SubElement(root, "testsuite", name=_clean(f"{r['model']} {name} on {r['target']}"))
        counts = {"tests": 0, "failures": 0, "skipped": 0}
        for check in checks(r):
            counts["tests"] += 1
            case = _case(suite, r, name, check.budget)
            if check.word != "PASS":
                counts["failures"] += 1
                failure = ElementTree.SubElement(case, "failure", type=check.word, message=_clean(check.reason))
                failure.text = _clean(_numbers(r))
        if not checks(r):
            counts["tests"] += 1
            counts["skipped"] += 1
            why = "a shard is not judged" if r["shard"] else "no budget was set"
            ElementTree.SubElement(_case(suite, r, name, "no budget"), "skipped", message=why)
        suite.attrib.update({key: str(value) for key, value in counts.items()})
        totals = {key: value + counts[key] for key, value in totals.items()}
    root.attrib.update({key: str(value) for key, value in totals.items()})
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _case(suite: ElementTree.Element, r: Record, engine: str, budget: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=_clean(f"{r['name']} {engine}"), name=budget)


def _numbers(r: Record) -> str:
    """What a reader of the failure wants to see."""
    lines = [f"{count(r['images'], 'image')}, {r['precision'].upper()} on {r['target']}"]
    if r["drop"]:
        lines.append(f"top-1 FP32 {number(r['baseline']['top1'])} %, engine {number(r['engine']['top1'])} %")
        lines.append(f"drop {number(r['drop']['top1'], sign=True)}, 95% {between(r['drop']['interval'], sign=True)}")
    lines.append(f"same answer {number(r['agreement']['top1'])} %")
    return "\n".join(lines)


def _clean(text: str) -> str:
    return FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
