"""Small pictures of images, as the network sees them, to be written into a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgeres.data import ImageSet
from edgeres.errors import MissingDependency, need
from edgeres.images import decode
from edgeres.recipe import Preprocess

SIDE = 112
"""Pixels of the longer side: enough for a screen with two of its pixels to one of the page."""
QUALITY = 80


class Thumbnail(NamedTuple):
    """A JPEG as data URI, or None and ``why`` there is none."""

    uri: str | None
    why: str = ""


def thumbnails(paths: Sequence[str], preprocess: Preprocess, images: ImageSet | None = None) -> list[Thumbnail]:
    """One for each of ``paths``: of ``images``, where they have it, else of the file that lies there."""
    places = {path: i for i, path in enumerate(images.paths)} if images else {}

    def one(path: str) -> Thumbnail:
        try:
            if images is not None and path in places:
                return Thumbnail(_jpeg(images.read(places[path], preprocess)))
            if not Path(path).is_file():
                return Thumbnail(None, "the image is not here")
            return Thumbnail(_jpeg(decode(Path(path), preprocess)))
        except MissingDependency as error:
            return Thumbnail(None, f"showing it needs Pillow: {error.hint}")
        except Exception:  # a damaged file can raise anything from an image library
            return Thumbnail(None, "the image cannot be read")

    return [one(path) for path in paths]


def _jpeg(pixels: np.ndarray) -> str:
    """uint8 (h, w, 3) RGB -> a data URI."""
    image = need("PIL.Image", "images").fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
