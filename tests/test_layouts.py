from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED, shared
from PIL import Image

from edgeres import imagenet, layouts, shards
from edgeres.data import ImageSet, open_images
from edgeres.errors import InputError
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


# class folders


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
