"""Who is compared, with which settings, and how their INT8 models come to be."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from edgeres.errors import EdgeresError
from edgeres.files import digest, sha256_file, write_json

HERE = Path(__file__).parent
IMAGES = 512
"""Calibration images that everybody gets."""


@dataclass(frozen=True)
class Setting:
    """One way to make an INT8 model: ``flags`` of `make_<tool>.py`, or of `edgeres quantize`.

    ``scheme`` is whom the graph is laid for. ``timed``: one of those that stand for the different graphs a tool makes;
    thresholds change the accuracy, not the time.
    """

    tool: str
    name: str
    scheme: str
    flags: tuple[str, ...]
    timed: bool = False

    @property
    def title(self) -> str:
        """Name of the setting among all."""
        return f"{self.tool} {self.name}"


SETTINGS = (
    Setting("edgeres", "mse", "onnxruntime", ("--target", "cpu"), timed=True),
    Setting("edgeres", "auto", "onnxruntime", ("--target", "cpu", "--method", "auto")),
    Setting("edgeres", "mse, desktop", "tensorrt", ("--target", "desktop")),
    Setting("edgeres", "auto, desktop", "tensorrt", ("--target", "desktop", "--method", "auto")),
    Setting("onnxruntime", "u8s8 minmax", "onnxruntime", ("--float-logits",), timed=True),
    Setting("onnxruntime", "u8s8 entropy", "onnxruntime", ("--float-logits", "--method", "entropy")),
    Setting("onnxruntime", "u8s8 percentile", "onnxruntime", ("--float-logits", "--method", "percentile")),
    Setting("onnxruntime", "s8s8 minmax", "onnxruntime", ("--float-logits", "--scheme", "s8s8"), timed=True),
    Setting("nncf", "performance, defaults", "onnxruntime", ()),
    Setting("nncf", "mixed, defaults", "onnxruntime", ("--preset", "mixed")),
    Setting("nncf", "mixed, minmax", "onnxruntime", ("--preset", "mixed", "--minmax"), timed=True),
    Setting("nncf", "mixed, minmax, no bias correction", "onnxruntime",
            ("--preset", "mixed", "--minmax", "--no-bias-correction")),
    Setting("inc", "qdq minmax", "onnxruntime", ("--float-logits",), timed=True),
    Setting("inc", "qdq percentile", "onnxruntime", ("--float-logits", "--method", "percentile")),
    Setting("inc", "qoperator minmax", "onnxruntime", ("--format", "qoperator"), timed=True),
    Setting("inc", "qoperator percentile", "onnxruntime", ("--format", "qoperator", "--method", "percentile")),
    Setting("modelopt", "max", "tensorrt", ("--method", "max"), timed=True),
    Setting("modelopt", "entropy", "tensorrt", ("--method", "entropy")),
    Setting("onnxruntime", "s8s8 minmax, FP32 bias", "tensorrt", ("--scheme", "tensorrt"), timed=True),
    Setting("onnxruntime", "s8s8 percentile, FP32 bias", "tensorrt",
            ("--scheme", "tensorrt", "--method", "percentile")),
)  # fmt: skip

# Tool -> the pip commands that make its environment. Model Optimizer asks for onnxruntime-gpu, which needs CUDA's
# libraries; ONNX Neural Compressor forgets to name packages that it imports, and is older than NumPy 2.
ENVIRONMENTS: dict[str, list[list[str]]] = {
    "onnxruntime": [["install", "onnxruntime==1.31.1", "onnx==1.23.2", "sympy==1.14.0"]],
    "nncf": [["install", "nncf==3.4.0", "onnx==1.23.2", "onnxruntime==1.31.1", "openvino==2026.4.1"]],
    "inc": [
        [
            "install",
            "onnx-neural-compressor==1.0",
            "onnxruntime==1.19.2",
            "onnx==1.16.2",
            "numpy<2",
            "prettytable",
            "scipy",
        ]
    ],
    "modelopt": [
        ["install", "torch==2.13.0"],
        ["install", "nvidia-modelopt[onnx]==0.47.0"],
        ["uninstall", "-y", "onnxruntime-gpu", "onnxruntime"],
        ["install", "onnxruntime==1.24.4"],
    ],
}
PACKAGES = {
    "onnxruntime": ("onnxruntime", "onnx"),
    "nncf": ("nncf", "onnxruntime", "onnx"),
    "inc": ("onnx-neural-compressor", "onnxruntime", "onnx"),
    "modelopt": ("nvidia-modelopt", "onnxruntime", "onnx"),
}
"""Whose versions the result records."""


class PeerError(EdgeresError):
    """A peer's installation or quantization ended with an error."""


def call(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a command -> its stdout. `PeerError` with the end of its stderr."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise PeerError(f"{Path(command[0]).name} ended with status {done.returncode}", evidence="\n".join(lines[-3:]))
    return done.stdout


def environment(tool: str, envs: Path) -> Path:
    """The Python of ``tool``'s own virtual environment, made once and again when its packages change."""
    folder = envs / tool
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    stamp = folder / "installed.json"
    if not stamp.is_file() or json.loads(stamp.read_text()) != ENVIRONMENTS[tool]:
        stamp.unlink(missing_ok=True)
        call(sys.executable, "-m", "venv", folder)
        for arguments in ENVIRONMENTS[tool]:
            call(python, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments)
        write_json(stamp, ENVIRONMENTS[tool])
    return python


def versions(tool: str, python: Path) -> dict[str, str]:
    """Versions of the packages that matter in ``tool``'s environment."""
    installed = {p["name"]: p["version"] for p in json.loads(call(python, "-m", "pip", "list", "--format=json"))}
    return {name: installed[name] for name in PACKAGES[tool]}


def make(setting: Setting, model: Path, calibration: Path, pixels: Path, envs: Path, folder: Path) -> Path:
    """FP32 ONNX ``model`` -> INT8 ONNX. Peers read ``pixels`` (.npy), what edgeres' loader makes of ``calibration``.

    edgeres' own is made anew in ``folder``. A peer's is kept beside its environment, under a digest of all that it is
    made from.
    """
    if setting.tool == "edgeres":
        path = folder / f"edgeres-{digest(setting.flags)[:12]}.onnx"
        inputs = ("--model", model, "--calibration", calibration, "--limit", str(IMAGES))
        call(sys.executable, "-m", "edgeres", "quantize", *inputs, *setting.flags, "-o", path, cwd=folder)
        return path
    python, script = environment(setting.tool, envs), HERE / f"make_{setting.tool}.py"
    own = folder / "fp32.onnx"  # a copy: Model Optimizer writes shapes into the file it reads
    if not own.is_file():
        shutil.copyfile(model, own)
    made_from = [sha256_file(model), sha256_file(pixels), sha256_file(script), ENVIRONMENTS[setting.tool]]
    path = envs / "models" / f"{setting.tool}-{digest([*made_from, setting.flags])[:12]}.onnx"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = folder / path.name
        call(python, script, own, pixels, unfinished, *setting.flags, cwd=folder)
        path.write_bytes(unfinished.read_bytes())
        unfinished.unlink()
    return path
