"""Small pictures of images, as the network sees them, to be written into a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from edgeres.data import ImageSet, Manifest
from edgeres.errors import EdgeresError, MissingDependency, need
from edgeres.progress import busy, say
from edgeres.recipe import Preprocess
from edgeres.words import count

SIDE = 112
"""Pixels of the longer side: enough for a screen with two of its pixels to one of the page."""
QUALITY = 80

Draw = Callable[[int], ImageSet]
"""Draws so many images of a set, as the validation did."""


class Thumbnail(NamedTuple):
    """A JPEG as data URI, or None and ``why`` there is none."""

    uri: str | None
    why: str = ""


class Judged(NamedTuple):
    """The images that a result is of; or None, and ``why`` pictures would be of others, if there are any."""

    images: ImageSet | None
    why: str = ""


def judged(results: Sequence[dict[str, Any]], images: Draw | None) -> list[Judged]:
    """For each of ``results`` its images, which ``images`` draws, by the digest recorded: a path says little."""
    known: dict[int, str | None] = {}

    def one(r: dict[str, Any]) -> Judged:
        if images is None or not r["flipped"]:
            return Judged(None)
        some, recorded = images(r["images_of"]), r["provenance"]["digests"]["images"]
        found = known[len(some)] if len(some) in known else known.setdefault(len(some), _digest(some))
        if found == recorded:
            return Judged(some)
        there = f"the {count(len(some), 'image')} in {some.root}"
        if found is None:
            return Judged(None, f"not all of {there} can be read")
        differs = f"SHA-256 of files and labels {found[:12]}, recorded {recorded[:12]}"
        return Judged(None, f"{there} are not the {r['images_of']:,} of the result: {differs}")

    out = list(map(one, results))
    for why in dict.fromkeys(each.why for each in out if each.why):
        say(f"no pictures: {why}")
    return out


def _digest(images: ImageSet) -> str | None:
    try:
        with busy(f"hash {count(len(images), 'image')}"):
            return Manifest.of(images).digest()
    except EdgeresError:
        return None


def thumbnails(paths: Sequence[str], preprocess: Preprocess, images: ImageSet | None) -> list[Thumbnail]:
    """One for each of ``paths``, of ``images``."""
    places = {path: i for i, path in enumerate(images.paths)} if images else {}

    def one(path: str) -> Thumbnail:
        if images is None or path not in places:
            return Thumbnail(None, "the image is not here")
        try:
            return Thumbnail(_jpeg(images.read(places[path], preprocess)))
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
