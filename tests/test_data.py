from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import folder_of

from edgeres.data import ImageSet, Manifest, threaded
from edgeres.errors import InputError
from edgeres.layouts import open_images
from edgeres.recipe import Preprocess

EXACT = Preprocess(crop=8, resize=8, interpolation="nearest")


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


@pytest.mark.parametrize(
    "line", ["a.png", "a.png 0 " + "0" * 64, "a.png\tcat\t" + "0" * 64, "a.png\t-1\t" + "0" * 64, "", "a\tb\t0\t1"]
)
def test_a_manifest_that_was_edited_is_refused_by_line(line: str) -> None:
    good = "b.png\t1\t" + "1" * 64
    with pytest.raises(InputError, match="line 2 of a manifest is not path, label and SHA-256"):
        Manifest.from_text(f"{good}\n{line}\n{good}\n")


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


# threads


def test_threads_keep_the_order_and_hold_few_results() -> None:
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for i in range(100):
            taken.append(i)
            yield i

    found = threaded(lambda i: i * i, numbers(), ahead=10)
    assert [next(found) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert len(taken) == 10
    assert list(found) == [i * i for i in range(5, 100)]


def test_there_are_as_many_threads_as_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)  # of the machine, not of the container
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 7}, raising=False)
    meet = threading.Barrier(3)

    def together(_: int) -> bool:
        try:
            meet.wait(0.2)
        except threading.BrokenBarrierError:
            return False
        return True

    assert list(threaded(together, range(3))) == [False] * 3


def test_what_a_thread_raises_arrives() -> None:
    with pytest.raises(ZeroDivisionError):
        list(threaded(lambda i: 1 // i, [2, 1, 0]))


def test_without_leaves_out_by_path_and_keeps_order_and_labels() -> None:
    images = ImageSet(Path("a"), ("x", "y", "z"), (0, 1, 2), ("p", "q", "r"))
    rest = images.without(ImageSet(Path("b"), ("y", "w"), None))
    assert (rest.paths, rest.labels, rest.classes) == (("x", "z"), (0, 2), ("p", "q", "r"))
    assert len(images.without(images)) == 0
