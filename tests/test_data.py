from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeres.data import ImageSet, Manifest, open_images
from edgeres.errors import InputError
from edgeres.images import decode, normalize
from edgeres.recipe import Preprocess

EXACT = Preprocess(crop=8, resize=8, interpolation="nearest")


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def folder_of(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        save(root / name, picture(8, 8, i))
    return root


# decoding


@pytest.mark.parametrize(
    ("size", "resized", "left", "top"),
    [
        ((36, 36), (36, 36), 2, 2),
        ((72, 72), (36, 36), 2, 2),
        ((61, 43), (51, 36), 10, 2),  # 36 * 61 / 43 = 51.07; 9.5 rounds to the even 10
        ((43, 61), (36, 51), 2, 10),
        ((40, 53), (36, 47), 2, 8),  # 47.7 is cut to 47; 7.5 rounds to the even 8
        ((36, 49), (36, 49), 2, 8),  # 8.5 rounds to the even 8
        ((72, 40), (64, 36), 16, 2),  # 64.8 is cut to 64
        ((10, 7), (51, 36), 10, 2),  # enlarged
        ((1, 1), (36, 36), 2, 2),
        ((2, 300), (36, 5400), 2, 2684),
    ],
)
def test_shorter_side_is_resized_and_the_center_cropped(
    tmp_path: Path, size: tuple[int, int], resized: tuple[int, int], left: int, top: int
) -> None:
    pixels = picture(*size)
    reference = np.asarray(Image.fromarray(pixels).resize(resized, Image.Resampling.BILINEAR))
    found = decode(save(tmp_path / "a.png", pixels), Preprocess(crop=32, resize=36))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, reference[top : top + 32, left : left + 32])


def test_an_image_of_the_right_size_is_only_cropped(tmp_path: Path) -> None:
    pixels = picture(36, 40)
    found = decode(save(tmp_path / "a.png", pixels), Preprocess(crop=31, resize=36))
    np.testing.assert_array_equal(found, pixels[4:35, 2:33])  # 4.5 and 2.5 round to the even 4 and 2


def test_box_filter_averages(tmp_path: Path) -> None:
    pixels = picture(8, 8)
    found = decode(save(tmp_path / "a.png", pixels), Preprocess(crop=4, resize=4, interpolation="box"))
    mean = pixels.reshape(4, 2, 4, 2, 3).mean((1, 3))
    assert np.abs(found - mean).max() <= 1  # the filter rounds after each direction


def test_bilinear_filter_is_as_wide_as_the_reduction(tmp_path: Path) -> None:
    pixels = picture(16, 16)
    found = decode(save(tmp_path / "a.png", pixels), Preprocess(crop=8, resize=8, interpolation="bilinear"))
    # halving: a triangle of half width 2 meets pixel centers at distances 0.5 and 1.5 on either side
    taps = np.zeros((8, 16))
    for i in range(8):
        for j, weight in zip(range(2 * i - 1, 2 * i + 3), (1, 3, 3, 1), strict=True):
            if 0 <= j < 16:
                taps[i, j] = weight
    taps /= taps.sum(1, keepdims=True)
    expected = np.einsum("ij,kl,jlc->ikc", taps, taps, pixels.astype(float))
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box"])
def test_each_interpolation_is_its_own(tmp_path: Path, interpolation: str) -> None:
    path = save(tmp_path / "a.png", picture(50, 50))
    found = {
        name: decode(path, Preprocess(crop=20, resize=20, interpolation=name)).tobytes()
        for name in ("nearest", "bilinear", "bicubic", "lanczos", "box")
    }
    assert [name for name, pixels in found.items() if pixels == found[interpolation]] == [interpolation]


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 3), (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (10, 20, 30)),  # transparency is dropped, not blended
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, color: object, expected: tuple[int, ...]) -> None:
    Image.new(mode, (8, 8), color).save(tmp_path / "a.png")  # type: ignore[arg-type]
    assert decode(tmp_path / "a.png", EXACT).reshape(-1, 3).tolist() == [list(expected)] * 64


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 9, 90, 200])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png")
    found = decode(tmp_path / "a.png", EXACT)
    assert found[0, 0].tolist() == [0, 0, 0]
    assert found[0, 1].tolist() == found[7, 7].tolist() == [9, 90, 200]


def test_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    found = decode(tmp_path / "a.jpg", EXACT).astype(int)
    assert np.abs(found - np.array([255, 0, 0])).max() < 8


# normalizing


def test_normalize_gives_the_imagenet_extremes() -> None:
    black_white = np.stack([np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)])
    found = normalize(black_white, Preprocess())
    assert (found.shape, found.dtype) == ((2, 3, 2, 2), np.float32)
    np.testing.assert_allclose(found[0, :, 0, 0], [-2.117904, -2.035714, -1.804444], atol=2e-6)
    np.testing.assert_allclose(found[1, :, 1, 1], [2.248908, 2.428571, 2.64], atol=2e-6)


def test_normalize_puts_channels_first_and_keeps_rows_and_columns() -> None:
    pixels = picture(5, 4)[None]
    found = normalize(pixels, Preprocess(mean=(0, 0, 0), std=(1, 1, 1)))
    assert found.flags.c_contiguous
    for c in range(3):
        for row in range(4):
            np.testing.assert_allclose(found[0, c, row] * 255, pixels[0, row, :, c], atol=1e-4)


def test_bgr_swaps_the_channels_after_each_got_its_own_mean_and_std() -> None:
    pixels = np.array([[[[51, 102, 204]]]], np.uint8)  # 0.2, 0.4, 0.8
    preprocess = Preprocess(mean=(0.1, 0.2, 0.3), std=(1, 2, 5), channel_order="BGR")
    np.testing.assert_allclose(normalize(pixels, preprocess).ravel(), [0.1, 0.1, 0.1], atol=1e-6)
    preprocess = Preprocess(mean=(0.0, 0.0, 0.0), std=(1, 2, 4), channel_order="BGR")
    np.testing.assert_allclose(normalize(pixels, preprocess).ravel(), [0.2, 0.2, 0.2], atol=1e-6)
    preprocess = Preprocess(mean=(0.0, 0.0, 0.0), std=(1, 1, 1), channel_order="BGR")
    np.testing.assert_allclose(normalize(pixels, preprocess).ravel(), [0.8, 0.4, 0.2], atol=1e-6)


# image sets


def test_class_folders_are_numbered_in_alphabetical_order(tmp_path: Path) -> None:
    names = ("zebra/b.png", "zebra/a.PNG", "Ant/1.jpg", "bee/10.bmp", "bee/9.webp", "bee/deep/er.ppm")
    found = open_images(folder_of(tmp_path / "set", *names))
    assert found.classes == ("Ant", "bee", "zebra")  # capitals come first, as in torchvision
    assert found.paths == ("Ant/1.jpg", "bee/10.bmp", "bee/9.webp", "bee/deep/er.ppm", "zebra/a.PNG", "zebra/b.png")
    assert found.labels == (0, 1, 1, 1, 2, 2)


def test_what_is_no_image_and_what_is_hidden_is_left_out(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", "a/1.png", ".cache/2.png", "3.png")
    (root / "a" / "notes.txt").write_text("x")
    (root / "a" / "folder.png").mkdir()
    (root / "empty").mkdir()
    found = open_images(root)
    assert (found.paths, found.classes) == (("a/1.png",), ("a",))


def test_a_labels_file_sets_the_order(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", "a/1.png", "c/2.png")
    labels = tmp_path / "labels.txt"
    labels.write_text("c\n\nb \na\n", encoding="utf-8")
    found = open_images(root, labels)
    assert found.classes == ("c", "b", "a")
    assert dict(zip(found.paths, found.labels or (), strict=True)) == {"a/1.png": 2, "c/2.png": 0}


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", "a/1.png", "b/2.png")
    (tmp_path / "labels.txt").write_text("b\na\n", encoding="utf-8-sig")
    assert open_images(root, tmp_path / "labels.txt").labels == (1, 0)
    (root / "list.txt").write_text("a/1.png 0\n", encoding="utf-8-sig")
    assert open_images(root / "list.txt").paths == ("a/1.png",)


def test_a_class_folder_outside_the_labels_file_is_named(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", "a/1.png", "cat/2.png")
    (tmp_path / "labels.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match="'cat' is not in the labels file"):
        open_images(root, tmp_path / "labels.txt")


def test_a_labels_file_with_one_name_for_two_classes_is_refused(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", "crane/1.png")
    (tmp_path / "labels.txt").write_text("crane\nmaillot\ncrane\n")
    with pytest.raises(InputError, match=r"labels\.txt names class 'crane' twice"):
        open_images(root, tmp_path / "labels.txt")


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    found = open_images(folder_of(tmp_path / "set", "b.png", "a.jpg"))
    assert (found.paths, found.labels, found.classes) == (("a.jpg", "b.png"), None, ())


def test_a_list_file_has_spaces_tabs_comments_and_its_own_order(tmp_path: Path) -> None:
    path = tmp_path / "set" / "list.txt"
    path.parent.mkdir()
    path.write_text(
        "# path label\nz/my cat.jpg 3\n\n  a/b.png 0  \r\nwith tab.png\t12\nwith hash.png\t 2\tabcdef\nä.png 1\n",
        encoding="utf-8",
    )
    found = open_images(path)
    assert found.paths == ("z/my cat.jpg", "a/b.png", "with tab.png", "with hash.png", "ä.png")
    assert (found.labels, found.classes, found.root) == ((3, 0, 12, 2, 1), (), path.parent)


def test_a_list_file_may_name_classes_of_a_labels_file(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("great white shark\ncat\n")
    (tmp_path / "list.txt").write_text("1.png\tgreat white shark\n2.png cat\n3.png 0\n")
    found = open_images(tmp_path / "list.txt", tmp_path / "labels.txt")
    assert found.labels == (0, 1, 0)
    assert found.classes == ("great white shark", "cat")


@pytest.mark.parametrize("bad", ["alone.png", "a.png -1", "a.png cat", "a.png 1.5", "\t3", "a.png\t", "a.png ²"])
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"# comment\n\nok.png 1\n\n{bad}\nok.png 2\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"list\.txt, line 5: expected `path label`") as error:
        open_images(path)
    assert bad.strip() in error.value.evidence
    assert "class index" in error.value.hint


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x89PNG\r\n\x1a\n"])
def test_a_list_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read .*list\.txt as a text file"):
        open_images(tmp_path / "list.txt")


def test_a_missing_labels_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.txt"):
        open_images(folder_of(tmp_path / "set", "a/1.png"), tmp_path / "absent.txt")


def test_nothing_there_and_no_images_there_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images at"):
        open_images(tmp_path / "absent")
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "x.txt").write_text("x")
    with pytest.raises(InputError, match="no images in") as error:
        open_images(tmp_path / "set")
    assert ".png" in error.value.evidence
    (tmp_path / "list.txt").write_text("# nothing\n")
    with pytest.raises(InputError, match="no images in"):
        open_images(tmp_path / "list.txt")


# subsets


def numbered(n: int) -> ImageSet:
    return ImageSet(Path("root"), tuple(f"c/{i:03}.png" for i in range(n)), tuple(range(n)), ("c",))


def test_subsets_are_nested_in_order_and_keep_their_labels() -> None:
    images = numbered(100)
    small, large = images.subset(10, 3), images.subset(40, 3)
    assert (len(small), len(large)) == (10, 40)
    assert set(small.paths) < set(large.paths)
    assert list(large.paths) == sorted(large.paths)
    assert large.labels == tuple(int(p[2:5]) for p in large.paths)


def test_a_subset_is_fixed_by_its_seed() -> None:
    images = numbered(100)
    # the five with the smallest SHA-256 of "0/c/000.png" and so on, from sha256sum: the same on every machine
    assert images.subset(5, 0).labels == (23, 51, 57, 85, 96)
    assert images.subset(5, 0) != images.subset(5, 1)


def test_a_subset_does_not_depend_on_the_root_or_on_other_labels() -> None:
    images = numbered(50)
    elsewhere = ImageSet(Path("elsewhere"), images.paths, None)
    assert elsewhere.subset(7).paths == images.subset(7).paths
    assert elsewhere.subset(7).labels is None


@pytest.mark.parametrize("limit", [None, 6, 7, 10**9])
def test_a_limit_that_does_not_bind_changes_nothing(limit: int | None) -> None:
    images = numbered(6)
    assert images.subset(limit) is images


@pytest.mark.skipif(os.name != "posix", reason="only POSIX has file names that are no text")
def test_file_names_that_are_not_utf8_can_be_drawn() -> None:
    images = ImageSet(Path(), tuple(os.fsdecode(b"\xff%d.png" % i) for i in range(5)), None)
    assert len(images.subset(2)) == 2


# manifests


def test_a_manifest_round_trips_and_holds_the_files_hashes(train_images: ImageSet) -> None:
    manifest = Manifest.of(train_images)
    first = (train_images.root / train_images.paths[0]).read_bytes()
    assert manifest.hashes[0] == hashlib.sha256(first).hexdigest()
    assert Manifest.from_text(manifest.to_text()) == manifest


@pytest.mark.parametrize("labels", [None, (3, 0, 1000)])
def test_a_manifest_keeps_odd_names_and_absent_labels(labels: tuple[int, ...] | None) -> None:
    manifest = Manifest(("a b/c.png", "ünï\u2028\x85 .png", "-"), ("0" * 64, "1" * 64, "2" * 64), labels)
    assert Manifest.from_text(manifest.to_text()) == manifest


def test_a_manifest_is_a_list_file(tmp_path: Path, train_folder: Path, train_images: ImageSet) -> None:
    shutil.copytree(train_folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "manifest.txt"
    path.write_text(Manifest.of(train_images).to_text())
    found = open_images(path)
    assert found.labels == train_images.labels
    assert found.hashes() == train_images.hashes()


def test_manifest_digest_is_that_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "here", "a/1.png", "a/2.png", "b/3.png")
    shutil.copytree(root, tmp_path / "there" / "deep")
    digest = Manifest.of(open_images(root)).digest()
    assert Manifest.of(open_images(tmp_path / "there" / "deep")).digest() == digest
    (root / "a").rename(root / "aa")
    assert Manifest.of(open_images(root)).digest() == digest
    (root / "b").rename(root / "A")  # the order of classes turns around
    assert Manifest.of(open_images(root)).digest() != digest


def test_manifest_digest_changes_with_content_label_and_order() -> None:
    manifest = Manifest(("a", "b"), ("0" * 64, "1" * 64), (0, 1))
    others = [
        Manifest(("a", "b"), ("0" * 64, "2" * 64), (0, 1)),
        Manifest(("a", "b"), ("0" * 64, "1" * 64), (0, 0)),
        Manifest(("a", "b"), ("0" * 64, "1" * 64), None),
        Manifest(("b", "a"), ("1" * 64, "0" * 64), (1, 0)),
        Manifest(("b", "a"), ("1" * 64, "0" * 64), (0, 1)),
        Manifest(("a",), ("0" * 64,), (0,)),
    ]
    assert len({m.digest() for m in (manifest, *others)}) == 7


def test_hashing_a_missing_image_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.png"):
        Manifest.of(ImageSet(tmp_path, ("absent.png",), None))
