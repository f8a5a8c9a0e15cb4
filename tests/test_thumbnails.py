from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeres.layouts import open_images
from edgeres.pack import write_pack
from edgeres.recipe import Preprocess
from edgeres.thumbnails import SIDE, thumbnails

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


def test_without_an_image_set_a_path_is_a_file(val_folder: Path, preprocess: Preprocess) -> None:
    images = open_images(val_folder)
    path = str(val_folder / images.paths[3])
    assert thumbnails([path], preprocess) == thumbnails([images.paths[3]], preprocess, images)


@pytest.mark.parametrize("path", ["none.jpg", "a\0b", "\udc83.jpg", ""])
def test_an_image_that_is_not_here_has_a_reason(path: str, preprocess: Preprocess) -> None:
    (found,) = thumbnails([path], preprocess)
    assert found.uri is None
    assert found.why in ("the image is not here", "the image cannot be read")


def test_a_damaged_image_has_a_reason_that_shows_nothing_of_it(tmp_path: Path, preprocess: Preprocess) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret words")
    assert thumbnails([str(tmp_path / "secret.jpg")], preprocess) == [(None, "the image cannot be read")]


def test_without_pillow_it_says_how_to_get_it(
    val_folder: Path, preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_images(val_folder)
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    (found,) = thumbnails(images.paths[:1], preprocess, images)
    assert found == (None, 'showing it needs Pillow: pip install "edgeres[images]"')
