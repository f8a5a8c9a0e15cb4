from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edgeres.calibrate import RangeTable, TensorRange
from edgeres.cli import cli
from edgeres.errors import InputError, UsageError
from edgeres.plot import histogram
from edgeres.thresholds import METHODS

RNG = np.random.default_rng(0)
TENSORS = {
    "both signs": RNG.laplace(0, 1, 50_000),
    "relu": np.maximum(RNG.normal(0, 3, 50_000), 0),
    "negative": -RNG.exponential(1, 50_000) - 1,
    "zero": np.zeros(100),
    "one value": np.full(100, 0.7),
    "small": RNG.normal(0, 1e-20, 1000),
    "all bins": np.linspace(-0.999999, 0.999999, 100_000),
}


@pytest.fixture(scope="module")
def table() -> RangeTable:
    tensors = {name: TensorRange() for name in TENSORS}
    for name, values in TENSORS.items():
        tensors[name].update(values.astype(np.float32))
    return RangeTable({}, 7, tensors=tensors)


@pytest.mark.parametrize("name", TENSORS)
def test_every_method_is_a_line_with_its_numbers(table: RangeTable, name: str, tmp_path: Path) -> None:
    histogram(table, name, tmp_path / "p.svg")
    svg = (tmp_path / "p.svg").read_text(encoding="utf-8")
    written = re.findall(r"<!-- (.*?) -->", svg, re.DOTALL)
    for method, function in METHODS.items():
        lo, hi = function(table.tensors[name], 255)
        assert method in written
        assert written[written.index(method) + 1] == f"{lo:.4g} to {hi:.4g}"
    assert any(line.startswith(f"{name}: {table.tensors[name].count:,} values of 7 images") for line in written)


@pytest.mark.parametrize("name", TENSORS)
def test_the_bars_hold_every_value(
    table: RangeTable, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    drawn = []
    stairs = Axes.stairs

    def recorded(self: Axes, counts: np.ndarray, edges: np.ndarray, **style: object) -> object:
        drawn.append((counts, edges))
        return stairs(self, counts, edges, **style)

    monkeypatch.setattr(Axes, "stairs", recorded)
    histogram(table, name, tmp_path / "p.png")
    ((counts, edges),) = drawn
    values = TENSORS[name].astype(np.float32).astype(np.float64)
    assert counts.sum() == values.size
    assert len(counts) <= 256
    assert (counts[0], counts[-1]) > (0, 0)
    if name != "small":  # whose bars are too narrow for NumPy
        np.testing.assert_array_equal(counts, np.histogram(values, edges)[0])


def test_a_png_is_a_picture_of_some_size(table: RangeTable, tmp_path: Path) -> None:
    histogram(table, "relu", tmp_path / "new" / "p.png")
    with Image.open(tmp_path / "new" / "p.png") as image:
        assert image.size == (1200, 600)
        assert len(image.convert("RGB").getcolors(100_000)) > len(METHODS)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["p.png"]


def test_an_unknown_tensor_is_answered_with_near_names(table: RangeTable, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tensor 'relu1' in the range table") as caught:
        histogram(table, "relu1", tmp_path / "p.png")
    assert "relu" in caught.value.hint
    with pytest.raises(InputError) as caught:
        histogram(table, "????", tmp_path / "p.png")
    assert "both signs" in caught.value.hint
    assert not (tmp_path / "p.png").exists()


@pytest.mark.parametrize("name", ["p.jpg", "p", "png"])
def test_another_kind_of_picture_is_wrong_usage(table: RangeTable, name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot plot to") as caught:
        histogram(table, "relu", tmp_path / name)
    assert ".png or .svg" in caught.value.hint


def test_no_window_system_is_asked_for(table: RangeTable, tmp_path: Path) -> None:
    table.save(tmp_path / "t.json")
    code = (
        "import sys; from pathlib import Path; from edgeres.inspect import plot\n"
        "plot(Path('t.json'), 'relu', Path('p.png')); assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p.png").exists()


def test_the_command_plots(table: RangeTable, tmp_path: Path) -> None:
    table.save(tmp_path / "t.json")
    result = CliRunner().invoke(cli, ["inspect", "t.json", "--plot", "relu", "-o", "p.svg", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"plot": "p.svg"}
    assert (tmp_path / "p.svg").read_text(encoding="utf-8").startswith("<?xml")


@pytest.mark.parametrize(
    "arguments", [["t.json", "--plot", "relu"], ["t.json", "-o", "p.png"], ["--plot", "relu", "-o", "p.png"]]
)
def test_a_plot_needs_table_tensor_and_file(arguments: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["inspect", *arguments])
    assert result.exit_code == 2
    assert "a plot needs a range table, --plot TENSOR and -o FILE" in result.output
