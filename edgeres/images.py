"""From image file to network input: the only preprocessing there is.

Pixels are those of torchvision's PIL path (``default_loader``, ``Resize``, ``CenterCrop``), bit for bit, with one
exception: gray with 16 bits is scaled to 8 bits, where Pillow's own conversion clips it to white. Like torchvision,
this ignores the EXIF orientation tag, drops transparency, and reads the first frame of several.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from edgeres.errors import InputError, need
from edgeres.recipe import Preprocess, one_of
from edgeres.remote import Address

MAX_PIXELS = 178_956_970
"""An image with more, or that would have more once resized, is refused. Pillow's own limit for an error."""

PRESETS: dict[str, Preprocess] = {
    # torchvision: ResNet50_Weights.IMAGENET1K_V1 and V2
    "imagenet": Preprocess(),
    "imagenet-v2": Preprocess(resize=232),
    # timm's ResNet-50 recipes (a1_in1k and others): crop_pct 0.95, resize = floor(224 / 0.95)
    "timm": Preprocess(resize=235, interpolation="bicubic"),
    # MLPerf inference, pre_process_vgg: RGB, 87.5 %, cv2.INTER_AREA, means subtracted from 0..255, no division
    "mlperf": Preprocess(
        interpolation="area", mean=(123.68 / 255, 116.78 / 255, 103.94 / 255), std=(1 / 255, 1 / 255, 1 / 255)
    ),
}
"""Preprocessing that published ResNet-50 weights expect, by name, for 224 x 224 inputs."""

_warnings = threading.Lock()


def preset(name: str) -> Preprocess:
    """The preprocessing called ``name`` in `PRESETS`."""
    one_of("preprocess preset", name, tuple(PRESETS))
    return PRESETS[name]


def decode(file: Path | Address | IO[bytes], preprocess: Preprocess) -> np.ndarray:
    """Read one image -> uint8 (crop, crop, 3) RGB, resized and cropped as torchvision does it on PIL images.

    An `InputError` says in one line what is wrong with the image; a damaged one can raise anything.
    """
    with open_image(file.open() if isinstance(file, Address) else file) as opened:
        w, h = opened.size
        short = min(w, h)
        # torchvision's Resize truncates the longer side, its CenterCrop rounds the offset
        size = (int(preprocess.size * w / short), int(preprocess.size * h / short))
        if size[0] * size[1] > MAX_PIXELS:  # a strip one pixel high becomes gigabytes
            raise InputError(f"{w} x {h} pixels would be resized to {size[0]} x {size[1]}; the limit is {MAX_PIXELS:,}")
        image = to_rgb(opened)
    if size != (w, h):
        image = resize(image, size, preprocess.interpolation)
    left, top = (round((extent - preprocess.crop) / 2.0) for extent in size)
    return np.asarray(image.crop((left, top, left + preprocess.crop, top + preprocess.crop)))


@contextmanager
def open_image(file: Path | IO[bytes]) -> Iterator[Any]:
    """Yield a Pillow image of which only the header was read. Refuses what is no image, and what is too large."""
    Image = need("PIL.Image", "images")
    try:
        with _warnings, warnings.catch_warnings():  # the filters belong to the whole process, hence the lock
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # judged below
            opened = Image.open(file)
    except Image.UnidentifiedImageError as error:
        raise InputError(_what_instead(file)) from error
    except Image.DecompressionBombError as error:
        raise InputError(f"too many pixels: {error}") from error
    with opened:
        w, h = opened.size
        if w * h > MAX_PIXELS:
            raise InputError(f"too many pixels: {w} x {h}; the limit is {MAX_PIXELS:,}")
        if min(w, h) < 1:
            raise InputError(f"no pixels: {w} x {h}")
        yield opened


def _what_instead(file: Path | IO[bytes]) -> str:
    if isinstance(file, Path):
        with open(file, "rb") as f:
            start = f.read(8)
    else:
        file.seek(0)
        start = file.read(8)
    return f"not an image that Pillow knows: it starts with {start!r}" if start else "the file is empty"


def to_rgb(image: Any) -> Any:
    """Any Pillow image -> one in mode RGB.

    Gray with 16 bits keeps the high byte, as Pillow itself does for 16-bit color. Numbers without a known white
    (floats, 32-bit integers of a TIFF) are refused.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        Image = need("PIL.Image", "images")
        gray = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise InputError(f"{kind} pixels: which number is white is not recorded; convert it to 8 bits")
    image.load()
    image.info.pop("transparency", None)  # dropped in any case; Pillow warns about dropping it from a palette
    return image.convert("RGB")


def resize(image: Any, size: tuple[int, int], interpolation: str) -> Any:
    """A Pillow image -> one of ``size`` (width, height). Filters other than nearest widen as the image shrinks."""
    Image = need("PIL.Image", "images")
    if interpolation != "area":
        return image.resize(size, getattr(Image.Resampling, interpolation.upper()))
    pixels = np.asarray(image)  # (h, w, 3)
    rows = _area(pixels, size[1])  # (size[1], w, 3)
    both = _area(rows.transpose(1, 0, 2), size[0]).transpose(1, 0, 2)  # (size[1], size[0], 3)
    return Image.fromarray(np.rint(both).clip(0, 255).astype(np.uint8))


def _area(pixels: np.ndarray, n: int) -> np.ndarray:
    """Mean over ``n`` equal stretches of the first axis: (m, ...) -> float64 (n, ...), as ``cv2.INTER_AREA``.

    A pixel counts by how much of it lies in the stretch. (Pillow's ``box`` counts pixels whole or not at all.)
    """
    m = len(pixels)
    edges = np.arange(n + 1) * (m / n)
    whole = np.minimum(edges.astype(np.int64), m - 1)
    sums = np.zeros((m + 1, *pixels.shape[1:]), np.int64 if pixels.dtype == np.uint8 else np.float64)
    np.cumsum(pixels, axis=0, out=sums[1:])
    part = (edges - whole).reshape(-1, *[1] * (pixels.ndim - 1))
    return np.diff(sums[whole] + part * pixels[whole], axis=0) * (n / m)


def normalize(pixels: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """uint8 (N, H, W, 3) RGB -> float32 (N, 3, H, W): (x / 255 - mean) / std, in the model's channel order."""
    mean, std = np.asarray(preprocess.mean, np.float32), np.asarray(preprocess.std, np.float32)
    x = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    if preprocess.channel_order == "BGR":
        x = x[..., ::-1]
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
