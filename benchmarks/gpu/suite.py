"""The project's own tests that need a GPU."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from outcome import Skip, so_far, under_way

ROOT = Path(__file__).resolve().parents[2]
SHOWN = 5
VERDICT = re.compile(r"(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b")
"""How a line of ``pytest -v`` about a test begins."""


def run(work: Path, tests: Path = ROOT / "tests", mark: str = "gpu") -> dict[str, Any]:
    """``pytest -m gpu`` of the files that have such tests -> counts, what failed, and why others were skipped."""
    if importlib.util.find_spec("pytest") is None:
        raise Skip("the package pytest is not installed")
    files = [str(path) for path in sorted(tests.glob("test_*.py")) if f"pytest.mark.{mark}" in path.read_text("utf-8")]
    if not files:
        raise Skip(f"no tests in {tests}")
    report = work / "junit.xml"
    report.unlink(missing_ok=True)  # of an earlier run
    # no header, as it names packages that these tests do without; warnings of other versions of packages do not count
    options = ["-v", "--no-header", "-W", "default", "-m", mark, "-p", "no:cacheprovider", f"--junitxml={report}"]
    status = watched(work, mark, [sys.executable, "-m", "pytest", *options, *files], tests.parent)
    if not report.exists():
        raise RuntimeError(f"pytest ended with status {status} and no report")
    cases = list(ET.parse(report).getroot().iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    left_out = [case for case in cases if case.find("skipped") is not None]
    reasons = {(case.find("skipped").get("message") or "").partition("\n")[0] for case in left_out}  # type: ignore[union-attr]
    passed = len(cases) - len(bad) - len(left_out)
    if cases and not passed and not bad:
        raise Skip(f"all {len(cases)} tests skipped: {'; '.join(sorted(reasons))}")
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in bad]
    return {
        "passed": passed,
        "failed": failed,
        "messages": [
            (child.get("message") or "")[:300] for case in bad[:SHOWN] for child in case if child.tag != "skipped"
        ],
        "skipped": {f"{len(left_out)} tests": "; ".join(sorted(reasons))} if left_out else {},
        "checks": {" ".join([f"pytest -m {mark} passes", *(f"({name})" for name in failed[:SHOWN])]): status == 0},
    }


def watched(work: Path, mark: str, command: list[str], folder: Path) -> int:
    """Run ``command`` in ``folder`` -> its exit status. What its tests came to is kept one by one: one may hang."""
    found: dict[str, list[str]] = {"PASSED": [], "FAILED": [], "ERROR": [], "SKIPPED": []}
    under_way(work, "the first test")
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pytest:
        for line in pytest.stdout or ():
            print(line, end="")
            if verdict := VERDICT.match(line):
                found[verdict[2]].append(verdict[1])
                under_way(work, f"the test after {verdict[1]}")
                bad, out = found["FAILED"] + found["ERROR"], len(found["SKIPPED"])
                skipped = {f"{out} tests": "pytest did not live to say why"} if out else {}
                so_far(work, f"pytest -m {mark}", {"passed": len(found["PASSED"]), "failed": bad, "skipped": skipped})
    under_way(work)
    return pytest.returncode
