from __future__ import annotations

import base64
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from records import record

from edgeres.data import ImageSet, Manifest
from edgeres.layouts import open_images
from edgeres.pack import write_pack
from edgeres.recipe import Preprocess
from edgeres.thumbnails import SIDE, judged, thumbnails

LARGE = Preprocess(crop=224)


def picture(uri: str | None) -> Image.Image:
    assert uri is not None
    head, _, data = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_an_image_is_shown_as_the_network_sees_it(val_folder: Path, preprocess: Preprocess) -> None:
    images = open_images(val_folder)
    (found,) = thumbnails([images.paths[5]], preprocess, images)
    shown = np.asarray(picture(found.uri), np.int64)
    assert shown.shape == (32, 32, 3)
    assert np.abs(shown - images.read(5, preprocess)).mean() < 12  # but for what JPEG leaves out


def test_a_large_image_is_made_small(val_folder: Path) -> None:
    images = open_images(val_folder)
    (found,) = thumbnails([images.paths[0]], LARGE, images)
    assert picture(found.uri).size == (SIDE, SIDE)


def test_a_pack_has_pictures_without_its_files(val_folder: Path, preprocess: Preprocess, tmp_path: Path) -> None:
    packed = write_pack(open_images(val_folder), preprocess, tmp_path / "val.pack")
    of_files = thumbnails(packed.paths, preprocess, open_images(val_folder))
    assert thumbnails(packed.paths, preprocess, packed) == of_files
    (other,) = thumbnails(packed.paths[:1], LARGE, packed)
    assert other == (None, "the image cannot be read")


def test_a_path_alone_is_no_picture(val_folder: Path, preprocess: Preprocess) -> None:
    images = open_images(val_folder)
    path = str(val_folder / images.paths[3])
    assert thumbnails([path], preprocess, None) == thumbnails([path], preprocess, images.take([0]))
    assert thumbnails([path], preprocess, None) == [(None, "the image is not here")]


def test_a_damaged_image_has_a_reason_that_shows_nothing_of_it(tmp_path: Path, preprocess: Preprocess) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret words")
    images = ImageSet(tmp_path, ("secret.jpg",), None)
    assert thumbnails(images.paths, preprocess, images) == [(None, "the image cannot be read")]


def of(images: ImageSet) -> dict[str, Any]:
    """A result on ``images``."""
    r = record(images=len(images), flips=3)
    r["provenance"]["digests"]["images"] = Manifest.of(images).digest()
    return r


def test_images_are_those_of_the_result_or_are_not_shown(val_folder: Path, tmp_path: Path) -> None:
    images = open_images(val_folder)
    shutil.copytree(val_folder, tmp_path / "fake")
    (tmp_path / "fake" / images.paths[3]).write_bytes((val_folder / images.paths[4]).read_bytes())
    fake = open_images(tmp_path / "fake")
    assert fake.paths == images.paths
    r = of(images)
    assert judged([r], images.subset)[0].images == images
    (found,) = judged([r], fake.subset)
    assert found.images is None
    for part in (
        str(fake.root),
        of(fake)["provenance"]["digests"]["images"][:12],
        of(images)["provenance"]["digests"]["images"][:12],
    ):
        assert part in found.why
    assert judged([r], None) == [(None, "")]


def test_a_result_on_some_of_the_images_has_its_pictures(val_folder: Path) -> None:
    images = open_images(val_folder)
    part = images.subset(7)
    found = judged([of(images), of(part), of(part.take([0]))], images.subset)
    assert [each.images for each in found[:2]] == [images, part]
    assert found[2].images is None
    assert "the 1 of the result" in found[2].why


def test_images_are_hashed_once_and_only_for_pictures(val_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, hashed = open_images(val_folder), list[int]()
    results = [of(images), of(images), record(flips=0)]
    known = ImageSet.hashes
    monkeypatch.setattr(ImageSet, "hashes", lambda self: hashed.append(len(self)) or known(self))
    judged(results, images.subset)
    judged([record(flips=0)], images.subset)
    assert hashed == [len(images)]


def test_images_that_are_gone_are_said_to_be(val_folder: Path, tmp_path: Path) -> None:
    r = of(open_images(val_folder))
    assert judged([r], ImageSet(tmp_path, r["flipped"][0]["path"].split(), None).subset) == [
        (None, f"not all of the 1 image in {tmp_path} can be read")
    ]


def test_without_pillow_it_says_how_to_get_it(
    val_folder: Path, preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_images(val_folder)
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    (found,) = thumbnails(images.paths[:1], preprocess, images)
    assert found == (None, 'showing it needs Pillow: pip install "edgeres[images]"')
