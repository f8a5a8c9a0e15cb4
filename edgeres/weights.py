"""Where checkpoints come from, and what they are: a local file in any of the usual wrappings, or published weights."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeres.download import download
from edgeres.errors import InputError, UsageError, need
from edgeres.files import cache_folder, sha256_file
from edgeres.model import LAYOUT, Bottleneck, ResNet, resnet
from edgeres.progress import say
from edgeres.recipe import BASIC_DEPTHS, Preprocess


@dataclass(frozen=True)
class Published:
    """One source of weights. ``sha256`` may be the first digits; ``mib`` is the published size; ``top1`` in percent."""

    url: str
    sha256: str
    mib: float
    license: str
    preprocess: Preprocess
    top1: float
    variant: str = "v1.5"
    classes: int = 1000


V1, V2 = Preprocess(), Preprocess(resize=232)
_TORCHVISION = "https://download.pytorch.org/models/resnet"
_LICENSE = "BSD-3-Clause (torchvision); trained on ImageNet-1k"

# torchvision's documentation of each model gives sizes and accuracies; the file names carry the hash's first 8 digits
PUBLISHED = {
    ("imagenet", 18): Published(f"{_TORCHVISION}18-f37072fd.pth", "f37072fd", 44.7, _LICENSE, V1, 69.758),
    ("imagenet", 34): Published(f"{_TORCHVISION}34-b627a593.pth", "b627a593", 83.3, _LICENSE, V1, 73.314),
    ("imagenet", 50): Published(f"{_TORCHVISION}50-0676ba61.pth", "0676ba61", 97.8, _LICENSE, V1, 76.130),
    ("imagenet", 101): Published(f"{_TORCHVISION}101-63fe2227.pth", "63fe2227", 170.5, _LICENSE, V1, 77.374),
    ("imagenet", 152): Published(f"{_TORCHVISION}152-394f9c45.pth", "394f9c45", 230.4, _LICENSE, V1, 78.312),
    ("imagenet-v2", 50): Published(f"{_TORCHVISION}50-11ad3fa6.pth", "11ad3fa6", 97.8, _LICENSE, V2, 80.858),
    ("imagenet-v2", 101): Published(f"{_TORCHVISION}101-cd907fc2.pth", "cd907fc2", 170.5, _LICENSE, V2, 81.886),
    ("imagenet-v2", 152): Published(f"{_TORCHVISION}152-f82ba261.pth", "f82ba261", 230.5, _LICENSE, V2, 82.284),
}
"""(name, depth) -> torchvision's weights; all have the stride in the 3x3 convolution."""

ZOO_V1 = Published(
    "https://github.com/onnx/models/raw/main/validated/vision/classification/resnet/model/resnet50-v1-12.onnx",
    "3f03fdef724b22947eed826f1eef1dc5c34151bb4c37d634f1db89dfa2dd1526",
    97.8,
    "Apache-2.0 (ONNX model zoo); trained on ImageNet-1k",
    V1,
    74.97,
    "v1",
)
"""ResNet-50 v1, which torchvision does not have; an ONNX file of 102,576,593 bytes."""


def published(name: str, depth: int, variant: str) -> Published | None:
    """The record that ``name`` means for this network; None if ``name`` is no published name.

    Raises `UsageError` where a published name has no weights for this depth or variant.
    """
    depths = [d for n, d in PUBLISHED if n == name]
    if not depths:
        return None
    if (name, depth) == ("imagenet", 50) and variant == "v1":
        return ZOO_V1
    record = PUBLISHED.get((name, depth))
    if record is None or (variant != record.variant and depth not in BASIC_DEPTHS):
        has = ", ".join(str(d) for d in depths)
        raise UsageError(
            f"there are no {name} weights for ResNet-{depth}{'' if depth in BASIC_DEPTHS else ' ' + variant}",
            hint=f"{name} has depth {has} as v1.5{', and 50 as v1' * (name == 'imagenet')}; "
            "or give your own checkpoint with --weights FILE",
        )
    return record


def locate(weights: str, depth: int, variant: str) -> Path:
    """The file that ``weights`` means: a path, or a published name, downloaded on first use."""
    record = published(weights, depth, variant)
    if record is None:
        if not Path(weights).is_file():
            names = ", ".join(sorted({n for n, _ in PUBLISHED}))
            hint = f"give a .pth, .pt or .safetensors file, or a name: {names}"
            raise InputError(f"no checkpoint {weights}", hint=hint)
        return Path(weights)
    path = cache_folder() / "weights" / record.url.rpartition("/")[2]
    if not path.is_file():
        download(record.url, path, record.sha256, record.mib)
    return path


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: tensors by torchvision's names (FP32), its file's name and SHA-256.

    ``variant`` is what a configuration beside the file says, or None.
    """

    source: str
    sha256: str
    tensors: dict[str, Tensor]
    variant: str | None = None

    @property
    def classes(self) -> int | None:
        """Rows of the classifier, or None where there is no ``fc.weight`` with rows."""
        weight = self.tensors.get("fc.weight")
        return None if weight is None or not weight.ndim else len(weight)

    @property
    def depth(self) -> int | None:
        """The ResNet whose blocks these are: 18, 34, 50, 101 or 152, or None."""
        stages = [{k.split(".")[1] for k in self.tensors if k.startswith(f"layer{i}.")} for i in (1, 2, 3, 4)]
        bottleneck = "layer1.0.conv3.weight" in self.tensors
        for depth, (block, blocks) in LAYOUT.items():
            if blocks == tuple(map(len, stages)) and bottleneck == (block is Bottleneck):
                return depth
        return None


def load_checkpoint(path: Path, source: str | None = None) -> Checkpoint:
    """Read a .pt, .pth or .safetensors file, in the usual wrappings and namings; half precision becomes FP32."""
    load_safetensors = need("safetensors.torch", "torch").load_file if path.suffix == ".safetensors" else None
    # torchvision's and timm's training scripts keep their arguments beside the weights
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        content = load_safetensors(path) if load_safetensors else torch.load(path, "cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise InputError(f"cannot read checkpoint {path}", evidence=error.strerror or str(error)) from error
    except Exception as error:  # unpickling and safetensors raise many kinds for a damaged file, OSError among them
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        expected = "expected a .pth or .pt file holding a state dict, or a .safetensors file"
        raise InputError(
            f"{path} is not a readable checkpoint",
            evidence=f"it asks for code to be run: {code[1]}" if code else reason,
            hint="save the weights alone, with torch.save(model.state_dict(), path)" if code else expected,
        ) from error
    tensors = {
        k: t.float() if t.is_floating_point() else t for k, t in torchvision_names(unwrap(content, path)).items()
    }
    if bad := [k for k, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]:
        raise InputError(f"{path} holds NaN or infinity", evidence=f"in {bad[0]}{_more(bad)}")
    return Checkpoint(source or path.name, sha256_file(path), tensors, _declared_variant(path))


WRAPPINGS = ("model_ema", "state_dict_ema", "ema", "ema_state_dict", "state_dict", "model_state_dict", "model", "net")
"""Keys under which training scripts keep the state dict, averaged weights first: they are what is deployed."""
PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel, torch.compile and Lightning put before every name, in any order."""


def unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what a file held, without the prefixes that wrappers add to every name."""
    while isinstance(content, dict) and (
        inside := [k for k in WRAPPINGS if isinstance(content.get(k), dict) and content[k]]
    ):
        if len(inside) > 1:
            say(f"{path.name} holds {', '.join(inside)}: using {inside[0]}")
        content = content[inside[0]]
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in content.items())
    ):
        keys = f" with keys {list(content)[:5]}" if isinstance(content, dict) else ""
        raise InputError(
            f"{path} does not hold tensors by name",
            evidence=f"it holds a {type(content).__name__}{keys}",
            hint="save the model with torch.save(model.state_dict(), path)",
        )
    tensors = {k: t for k, t in content.items() if k != "n_averaged"}  # torch.optim.swa_utils counts there
    while tensors and (prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in tensors)), "")):
        tensors = {k.removeprefix(prefix): t for k, t in tensors.items()}
    return tensors


_HUGGING_FACE = (
    (r"(?:resnet\.)?embedder\.embedder\.convolution\.", "conv1."),
    (r"(?:resnet\.)?embedder\.embedder\.normalization\.", "bn1."),
    (r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution\.", "layer{0}.{1}.conv{2}."),
    (r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization\.", "layer{0}.{1}.bn{2}."),
    (r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.convolution\.", "layer{0}.{1}.downsample.0."),
    (r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.normalization\.", "layer{0}.{1}.downsample.1."),
    (r"classifier\.1\.", "fc."),
)


def torchvision_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename from Hugging Face transformers' ResNet; torchvision's and timm's names stay as they are."""

    def rename(name: str) -> str:
        for pattern, replacement in _HUGGING_FACE:
            if found := re.match(pattern, name):
                stage, block, layer = ([int(g) for g in found.groups()] + [0, 0, 0])[:3]
                return replacement.format(stage + 1, block, layer + 1) + name[found.end() :]
        return name

    return {rename(k): t for k, t in tensors.items()}


def _declared_variant(path: Path) -> str | None:
    """What Hugging Face's config.json beside the file says: downsample_in_bottleneck is stride on the first 1x1."""
    config = path.with_name("config.json")
    try:
        values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or values.get("model_type") != "resnet":
        return None
    return "v1" if values.get("downsample_in_bottleneck") else "v1.5"


def load_model(checkpoint: Checkpoint, variant: str, classes: int | None = None, depth: int = 50) -> ResNet:
    """The ResNet of ``depth`` with the checkpoint's weights. ``classes`` None: as many as its classifier has.

    Raises `InputError` if the checkpoint is of another network, `UsageError` for another number of classes.
    """
    if classes is not None and checkpoint.classes not in (None, classes):
        raise UsageError(
            f"the checkpoint has {checkpoint.classes} classes, {classes} were asked for",
            hint=f"leave --classes out, or give --classes {checkpoint.classes}",
        )
    with torch.device("meta"):
        model = resnet(depth, variant, checkpoint.classes or classes or 1000)
    wanted = {k: tuple(t.shape) for k, t in model.state_dict().items()}
    found = {k: tuple(t.shape) for k, t in checkpoint.tensors.items()}
    # old checkpoints lack the step counter, which only training reads
    missing = [k for k in wanted if k not in found and not k.endswith("num_batches_tracked")]
    surplus = [k for k in found if k not in wanted]
    shapes = [k for k in wanted if k in found and found[k] != wanted[k]]
    if missing or surplus or shapes:
        lines = [
            *(f"missing: {k}{_more(missing)}" for k in missing[:1]),
            *(f"not in ResNet-{depth}: {k}{_more(surplus)}" for k in surplus[:1]),
            *(f"{k} is {found[k]}, ResNet-{depth} has {wanted[k]}{_more(shapes)}" for k in shapes[:1]),
        ]
        other = checkpoint.depth if checkpoint.depth != depth else None
        expected = f"edgeres expects a state dict of ResNet-{depth} with torchvision's, timm's or transformers' names"
        raise InputError(
            f"{checkpoint.source} is not a ResNet-{depth} checkpoint",
            evidence="\n".join(lines),
            hint=f"its blocks are ResNet-{other}'s: give --depth {other}" if other else expected,
        )
    model.to_empty(device="cpu")
    model.load_state_dict(
        {k: torch.zeros((), dtype=torch.int64) for k in wanted if k not in found} | checkpoint.tensors
    )
    return model.eval()


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
