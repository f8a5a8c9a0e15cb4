"""From image file to network input: the only preprocessing there is."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np

from edgeres.errors import need
from edgeres.recipe import Preprocess


def decode(file: Path | IO[bytes], preprocess: Preprocess) -> np.ndarray:
    """Read one image -> uint8 (crop, crop, 3) RGB, resized and cropped as torchvision does it on PIL images."""
    Image = need("PIL.Image", "images")
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    w, h = image.size
    short = min(w, h)
    # torchvision's Resize truncates the longer side, its CenterCrop rounds the offset
    size = (int(preprocess.size * w / short), int(preprocess.size * h / short))
    if size != (w, h):
        image = image.resize(size, getattr(Image.Resampling, preprocess.interpolation.upper()))
    left, top = (round((extent - preprocess.crop) / 2.0) for extent in size)
    return np.asarray(image.crop((left, top, left + preprocess.crop, top + preprocess.crop)))


def normalize(pixels: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """uint8 (N, H, W, 3) RGB -> float32 (N, 3, H, W): (x / 255 - mean) / std, in the model's channel order."""
    mean, std = np.asarray(preprocess.mean, np.float32), np.asarray(preprocess.std, np.float32)
    x = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    if preprocess.channel_order == "BGR":
        x = x[..., ::-1]
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
