"""The package and every --help work with the base dependencies alone, and load nothing heavy where more is there."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgeres.cli import cli

BASE = Path(__file__).parents[1] / ".venv-base" / "bin" / "python"
HEAVY = {"torch", "onnx", "onnxruntime", "PIL", "sklearn", "scipy", "safetensors", "numpy"}
HEAVY |= {"numba", "matplotlib", "openvino", "jinja2"}
HELPS = [["--help"], *([name, "--help"] for name in cli.commands), ["data", "check", "--help"]]
HELPS += [["report", "merge", "--help"], ["report", "show", "--help"]]


def python(interpreter: str | Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(interpreter), *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def base() -> Path:
    assert BASE.is_file(), "no environment with the base dependencies alone; `make test` sets it up"
    return BASE


def test_the_base_environment_has_the_base_dependencies_alone(base: Path) -> None:
    listed = python(base, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check")
    names = {package["name"].lower() for package in json.loads(listed.stdout)}
    rest = names - {"click", "numpy", "rich", "tomli", "edgeres", "pip", "setuptools"}
    assert rest <= {"markdown-it-py", "mdurl", "pygments", "typing-extensions", "typing_extensions"}


def test_the_package_and_every_help_work_in_the_base_environment(base: Path) -> None:
    code = (
        "import edgeres, sys\n"
        "from edgeres.cli import cli\n"
        f"for arguments in {HELPS!r}:\n"
        "    try:\n"
        "        cli(arguments)\n"
        "    except SystemExit as stop:\n"
        "        assert stop.code == 0, arguments\n"
    )
    done = python(base, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: ") == len(HELPS)


def test_a_missing_package_is_named_with_its_extra(base: Path, tmp_path: Path) -> None:
    done = python(base, "-m", "edgeres", "inspect")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "Error: this needs the package 'torch'"
    assert 'pip install "edgeres[torch]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, contextlib, io\n"
        "from edgeres.cli import cli\n"
        f"for arguments in {HELPS!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        cli(arguments)\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
    )
    done = python(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stdout.split())


def test_onnx_runtime_reports_nothing_and_keeps_no_number_of_the_device(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}  # no other variable, as it keeps silent in CI and in tests by itself
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True, timeout=60)
    run([sys.executable, "-c", "import edgeres, onnxruntime"], env=home)
    assert list(tmp_path.rglob("*")) == []
    said = "import os, edgeres; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert run([sys.executable, "-c", said], env={**home, "ORT_DISABLE_TELEMETRY": "0"}).stdout == "0\n"
