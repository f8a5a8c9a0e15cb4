"""Where checkpoints come from: a local file, or published weights by name."""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import torch

from edgeres.errors import InputError, UsageError, need
from edgeres.files import atomic, cache_folder, sha256_file
from edgeres.model import ResNet, resnet50
from edgeres.progress import bar

PUBLISHED = {
    # torchvision's ResNet-50 has its stride in the 3x3 convolution; the name carries the SHA-256's first 8 digits
    "imagenet": ("v1.5", "https://download.pytorch.org/models/resnet50-0676ba61.pth", "0676ba61"),
}
"""Name -> (variant, URL, first digits of the SHA-256). IMAGENET1K_V1: 76.130 top-1 (torchvision)."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: tensors by torchvision's names (FP32), what the user called it, SHA-256 of the file."""

    source: str
    sha256: str
    tensors: dict[str, torch.Tensor]

    @property
    def classes(self) -> int | None:
        """Rows of the classifier, or None where there is no ``fc.weight`` with rows."""
        weight = self.tensors.get("fc.weight")
        return None if weight is None or not weight.ndim else len(weight)


def locate(weights: str, variant: str) -> Path:
    """The file that ``weights`` means: a path, or a published name, downloaded on first use."""
    if weights not in PUBLISHED:
        if not Path(weights).is_file():
            names = ", ".join(PUBLISHED)
            raise InputError(
                f"no checkpoint {weights}", hint=f"give a .pth, .pt or .safetensors file, or a name: {names}"
            )
        return Path(weights)
    trained_as, url, prefix = PUBLISHED[weights]
    if variant != trained_as:
        raise UsageError(
            f"{weights} weights are of variant {trained_as}, not {variant}",
            hint=f"give --variant {trained_as}, or your own checkpoint with --weights FILE",
        )
    path = cache_folder() / "weights" / url.rpartition("/")[2]
    if not path.is_file():
        download(url, path, prefix)
    return path


def download(url: str, path: Path, sha256_prefix: str) -> None:
    """Fetch ``url`` to ``path``; the file appears only when whole and its SHA-256 starts with ``sha256_prefix``."""
    own = "give a checkpoint of your own with --weights FILE, or see the flow without network: `edgeres demo`"
    try:
        with urllib.request.urlopen(url, timeout=30) as response, atomic(path) as temporary:
            length = int(response.headers.get("Content-Length") or 0)
            received = 0
            with open(temporary, "wb") as out, bar(f"download {path.name}", max(1, length >> 20), "MB") as step:
                while chunk := response.read(1 << 20):
                    out.write(chunk)
                    received += len(chunk)
                    step()
            found = sha256_file(temporary)
            if (length and received != length) or not found.startswith(sha256_prefix):
                raise InputError(
                    f"the download of {url} is damaged",
                    evidence=f"{received:,} of {length:,} bytes, SHA-256 {found[:12]}, expected {sha256_prefix}",
                    hint=f"nothing was kept; try again, or {own}",
                )
    except HTTPError as error:
        error.close()  # it is an open response
        raise InputError(f"cannot download {url}", evidence=str(error), hint=own) from error
    except (OSError, HTTPException) as error:  # URLError is an OSError
        raise InputError(f"cannot download {url}", evidence=str(getattr(error, "reason", error)), hint=own) from error


def load_checkpoint(path: Path, source: str | None = None) -> Checkpoint:
    """Read a .pt, .pth or .safetensors file of tensors by name; half precision becomes FP32."""
    load_safetensors = need("safetensors.torch", "torch").load_file if path.suffix == ".safetensors" else None
    try:
        tensors = load_safetensors(path) if load_safetensors else torch.load(path, "cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise InputError(f"cannot read checkpoint {path}", evidence=error.strerror or str(error)) from error
    except Exception as error:  # unpickling and safetensors raise many kinds for a damaged file, OSError among them
        raise InputError(
            f"{path} is not a readable checkpoint",
            evidence=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            hint="expected a .pth or .pt file holding a state dict, or a .safetensors file",
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise InputError(
            f"{path} does not hold tensors by name",
            evidence=f"it holds a {type(tensors).__name__}"
            + (f" with keys {list(tensors)[:5]}" if isinstance(tensors, dict) else ""),
            hint="save the model with torch.save(model.state_dict(), path)",
        )
    tensors = {k: t.float() if t.is_floating_point() else t for k, t in tensors.items()}
    if bad := [k for k, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]:
        raise InputError(
            f"{path} holds NaN or infinity", evidence=f"in {bad[0]}" + f" and {len(bad) - 1} more" * (len(bad) > 1)
        )
    return Checkpoint(source or path.name, sha256_file(path), tensors)


def load_model(checkpoint: Checkpoint, variant: str, classes: int | None = None) -> ResNet:
    """ResNet-50 with the checkpoint's weights. ``classes`` None: as many as its classifier has.

    Raises `InputError` if the checkpoint is of another network, or has another number of classes than asked for.
    """
    if classes is not None and checkpoint.classes not in (None, classes):
        raise UsageError(
            f"the checkpoint has {checkpoint.classes} classes, {classes} were asked for",
            hint=f"leave --classes out, or give --classes {checkpoint.classes}",
        )
    with torch.device("meta"):
        model = resnet50(variant, checkpoint.classes or classes or 1000)
    wanted = {k: tuple(t.shape) for k, t in model.state_dict().items()}
    # old checkpoints lack the step counter, which only training reads
    found = {k: tuple(t.shape) for k, t in checkpoint.tensors.items()}
    missing = [k for k in wanted if k not in found and not k.endswith("num_batches_tracked")]
    surplus = [k for k in found if k not in wanted]
    shapes = [k for k in wanted if k in found and found[k] != wanted[k]]
    if missing or surplus or shapes:
        lines = [
            *(f"missing: {k}{_more(missing)}" for k in missing[:1]),
            *(f"not in ResNet-50: {k}{_more(surplus)}" for k in surplus[:1]),
            *(f"{k} is {found[k]}, ResNet-50 has {wanted[k]}{_more(shapes)}" for k in shapes[:1]),
        ]
        raise InputError(
            f"{checkpoint.source} is not a ResNet-50 checkpoint",
            evidence="\n".join(lines),
            hint="edgeres expects a state dict of ResNet-50 with torchvision's parameter names",
        )
    model.to_empty(device="cpu")
    model.load_state_dict(
        {k: torch.zeros((), dtype=torch.int64) for k in wanted if k not in found} | checkpoint.tensors
    )
    return model.eval()


def _more(names: list[Any]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
