from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import folder_of, picture, save

from edgeres import data, loader
from edgeres.data import ImageSet
from edgeres.errors import InputError, MissingDependency, UsageError
from edgeres.images import decode, normalize
from edgeres.layouts import open_images
from edgeres.loader import Loader, normalizer
from edgeres.recipe import Preprocess

EXACT = Preprocess(crop=8, resize=8, interpolation="nearest")


def numbered(n: int) -> ImageSet:
    save(Path("root/c/000.png"), picture(8, 8))  # a set of which nothing is there is refused
    return ImageSet(Path("root"), tuple(f"c/{i:03}.png" for i in range(n)), tuple(range(n)))


def test_loader_gives_order_labels_and_a_short_last_batch(train_images: ImageSet, preprocess: Preprocess) -> None:
    loader = Loader(train_images, preprocess, batch=5)
    batches = list(loader)
    assert [len(b.pixels) for b in batches] == [5] * 6 + [2]
    assert len(loader) == 7
    assert np.concatenate([b.index for b in batches]).tolist() == list(range(32))
    assert np.concatenate([b.labels for b in batches if b.labels is not None]).tolist() == list(
        train_images.labels or ()
    )
    for batch in batches:
        assert (batch.pixels.dtype, batch.pixels.shape[1:], batch.index.dtype) == (np.float32, (3, 32, 32), np.int64)
        for pixels, i in zip(batch.pixels, batch.index, strict=True):
            alone = normalize(decode(train_images.root / train_images.paths[i], preprocess)[None], preprocess)
            np.testing.assert_array_equal(pixels, alone[0])


def test_loader_can_be_iterated_again(train_images: ImageSet, preprocess: Preprocess) -> None:
    loader = Loader(train_images.subset(6), preprocess, batch=4)
    first, second = list(loader), list(loader)
    assert len(first) == len(second) == 2
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.pixels, b.pixels)


def test_loader_without_labels_gives_none(tmp_path: Path) -> None:
    (batch,) = Loader(open_images(folder_of(tmp_path / "set", "a.png", "b.png")), EXACT)
    assert batch.labels is None


BAD = {
    "zero.png": b"",
    "text.jpg": b"this is no image",
    "header.png": b"\x89PNG\r\n\x1a\n",
}


def damaged(root: Path) -> Path:
    """Ten good images and four bad ones, one of them a photograph that was cut short."""
    folder_of(root, *(f"a/{i}.png" for i in range(10)))
    for name, content in BAD.items():
        (root / "a" / name).write_bytes(content)
    save(root / "a" / "cut.jpg", picture(64, 64))
    whole = (root / "a" / "cut.jpg").read_bytes()
    (root / "a" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    return root


def test_every_unreadable_image_of_a_batch_is_named(tmp_path: Path) -> None:
    images = open_images(damaged(tmp_path / "set"))
    with pytest.raises(InputError, match="4 unreadable images in") as error:
        list(Loader(images, EXACT, batch=20))
    for name in (*BAD, "cut.jpg"):
        assert f"a/{name}: " in error.value.evidence
    assert "--skip-bad" in error.value.hint


def test_one_unreadable_image_is_one(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", "a/1.png", "a/2.png")
    (root / "a" / "2.png").unlink()
    images = ImageSet(root, ("a/1.png", "a/2.png"), None)
    with pytest.raises(InputError, match="1 unreadable image in"):
        list(Loader(images, EXACT))


def test_skipped_images_are_listed_and_the_others_keep_their_index_and_label(tmp_path: Path) -> None:
    folder_of(damaged(tmp_path / "set"), "b/last.png")
    images = open_images(tmp_path / "set")
    loader = Loader(images, EXACT, batch=4, skip_bad=True)
    for _ in range(2):  # a second pass starts the list anew
        batches = list(loader)
        skipped = [path for path, reason in loader.skipped if reason]
        assert skipped == ["a/cut.jpg", "a/header.png", "a/text.jpg", "a/zero.png"]
    index = np.concatenate([b.index for b in batches])
    assert [images.paths[i] for i in index] == [p for p in images.paths if p not in skipped]
    assert np.concatenate([b.labels for b in batches if b.labels is not None]).tolist() == [0] * 10 + [1]
    assert all(len(b.pixels) == len(b.index) > 0 for b in batches)


def test_all_images_bad_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for i in range(12):
        (tmp_path / "set" / f"{i:02}.png").write_bytes(b"x")
    with pytest.raises(InputError, match="none of the 12 images is readable") as error:
        list(Loader(open_images(tmp_path / "set"), EXACT, batch=5, skip_bad=True))
    assert "00.png: " in error.value.evidence
    assert error.value.evidence.endswith("and 2 more")


def test_leaving_early_stops_the_decoding_and_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Path] = []

    def fake(path: Path, _preprocess: Preprocess) -> np.ndarray:
        decoded.append(path)
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(data, "decode", fake)
    monkeypatch.setattr(loader, "cores", lambda: 2)
    before = threading.active_count()
    for batch in Loader(numbered(400), EXACT, batch=4):
        assert batch.index.tolist() == [0, 1, 2, 3]
        break
    assert threading.active_count() == before
    assert len(decoded) <= 4 * 3  # this batch and two ahead


def test_only_a_few_batches_are_decoded_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Path] = []

    def fake(path: Path, _preprocess: Preprocess) -> np.ndarray:
        decoded.append(path)
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(data, "decode", fake)
    monkeypatch.setattr(loader, "cores", lambda: 2)  # more cores, more batches
    for done, _ in enumerate(Loader(numbered(60), EXACT, batch=4), 1):
        assert len(decoded) <= 4 * (done + 2)
    assert len(decoded) == 60


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_normalizing_in_place_gives_the_same_bits(order: str) -> None:
    preprocess = Preprocess(crop=16, resize=16, mean=(0.4, 0.5, 0.6), std=(0.3, 1.0, 1 / 255), channel_order=order)
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = np.stack([ramp, ramp.T, 255 - ramp], axis=-1)
    found = np.empty((3, 16, 16), np.float32)
    normalizer(preprocess)(found, pixels)
    np.testing.assert_array_equal(found, normalize(pixels[None], preprocess)[0])


def test_a_batch_that_is_kept_is_not_written_to_again(train_images: ImageSet, preprocess: Preprocess) -> None:
    alone = [b.pixels.copy() for b in Loader(train_images, preprocess, batch=3)]
    part = [b.pixels[1:, :1].T for b in Loader(train_images, preprocess, batch=3)]  # views keep their memory too
    for pixels, few in zip(alone, part, strict=True):
        np.testing.assert_array_equal(pixels[1:, :1].T, few)


def test_memory_of_a_batch_that_is_gone_is_used_again(train_images: ImageSet, preprocess: Preprocess) -> None:
    places = {batch.pixels.__array_interface__["data"][0] for batch in Loader(train_images, preprocess, batch=1)}
    assert len(places) < len(train_images)


@pytest.mark.parametrize("cores", [1, 2, 5, 64])
@pytest.mark.parametrize("batch", [1, 7, 32, 100])
def test_batches_do_not_depend_on_the_number_of_cores(
    train_images: ImageSet, monkeypatch: pytest.MonkeyPatch, cores: int, batch: int
) -> None:
    monkeypatch.setattr(loader, "cores", lambda: cores)
    batches = list(Loader(train_images, EXACT, batch))
    assert [len(b.pixels) for b in batches[:-1]] == [batch] * (len(batches) - 1)
    assert np.concatenate([b.index for b in batches]).tolist() == list(range(len(train_images)))
    expected = normalize(np.stack([train_images.read(i, EXACT) for i in range(len(train_images))]), EXACT)
    np.testing.assert_array_equal(np.concatenate([b.pixels for b in batches]), expected)


def test_a_missing_image_library_is_no_bad_image(train_images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingDependency):
        list(Loader(train_images, EXACT, skip_bad=True))


@pytest.mark.parametrize("threads", [1, 3])
def test_so_many_threads_decode_and_the_batches_are_the_same(
    train_images: ImageSet, preprocess: Preprocess, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [batch.pixels for batch in Loader(train_images, preprocess, 5)]
    together, readers = threading.Barrier(threads), set[int]()
    read = ImageSet.read

    def watch(images: ImageSet, i: int, preprocess: Preprocess) -> np.ndarray:
        if threading.get_ident() not in readers:
            readers.add(threading.get_ident())
            together.wait(10)  # fewer threads would wait for another here
        return read(images, i, preprocess)

    monkeypatch.setattr(ImageSet, "read", watch)
    found = [batch.pixels for batch in Loader(train_images, preprocess, 5, threads=threads)]
    assert len(readers) == threads
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_no_threads_to_read_with_are_refused(train_images: ImageSet, preprocess: Preprocess) -> None:
    with pytest.raises(UsageError, match="0 threads to read images with"):
        next(iter(Loader(train_images, preprocess, threads=0)))
