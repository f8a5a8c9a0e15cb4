"""The project's own tests that need a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from outcome import Skip

ROOT = Path(__file__).resolve().parents[2]
SHOWN = 5


def run(work: Path, tests: Path = ROOT / "tests", mark: str = "gpu") -> dict[str, Any]:
    """``pytest -m gpu`` of the files that have such tests -> counts, what failed, and why others were skipped."""
    if importlib.util.find_spec("pytest") is None:
        raise Skip("the package pytest is not installed")
    files = [str(path) for path in sorted(tests.glob("test_*.py")) if f"pytest.mark.{mark}" in path.read_text("utf-8")]
    if not files:
        raise Skip(f"no tests in {tests}")
    report = work / "junit.xml"
    # quiet, as the header names packages that these tests do without
    options = ["-q", "--no-header", "-m", mark, "-p", "no:cacheprovider", f"--junitxml={report}"]
    pytest = subprocess.run([sys.executable, "-m", "pytest", *options, *files], cwd=tests.parent, check=False)
    if not report.exists():
        raise RuntimeError(f"pytest ended with status {pytest.returncode} and no report")
    cases = list(ET.parse(report).getroot().iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    left_out = [case for case in cases if case.find("skipped") is not None]
    reasons = {(case.find("skipped").get("message") or "").partition("\n")[0] for case in left_out}  # type: ignore[union-attr]
    passed = len(cases) - len(bad) - len(left_out)
    if cases and not passed and not bad:
        raise Skip(f"all {len(cases)} tests skipped: {'; '.join(sorted(reasons))}")
    return {
        "passed": passed,
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in bad],
        "messages": [
            (child.get("message") or "")[:300] for case in bad[:SHOWN] for child in case if child.tag != "skipped"
        ],
        "skipped": {f"{len(left_out)} tests": "; ".join(sorted(reasons))} if left_out else {},
        "checks": {f"pytest -m {mark} passes": pytest.returncode == 0},
    }
