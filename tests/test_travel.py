"""Image sets in other processes: what is pickled is where the images are, not the images."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeres.data import ImageSet
from edgeres.errors import InputError
from edgeres.layouts import open_images
from edgeres.loader import Loader
from edgeres.pack import Pack, open_pack, write_pack
from edgeres.recipe import Preprocess


def read(images: ImageSet, preprocess: Preprocess) -> tuple[tuple[str, ...], np.ndarray]:
    return images.hashes(), np.stack([images.read(i, preprocess) for i in range(len(images))])


def in_a_child(images: ImageSet, preprocess: Preprocess, folder: Path) -> Any:
    """What `read` gives in a process that was started in another folder and has nothing but the pickle."""
    code = """
import pickle, sys
import numpy as np
images, preprocess = pickle.load(sys.stdin.buffer)
found = images.hashes(), np.stack([images.read(i, preprocess) for i in range(len(images))])
pickle.dump((images, found), sys.stdout.buffer)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps((images, preprocess)),
        capture_output=True,
        cwd=folder,
        check=False,
    )
    assert not done.returncode, done.stderr.decode()
    return pickle.loads(done.stdout)


def tar_of(path: Path, folder: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for image in sorted(folder.rglob("*.*")):
            label = tarfile.TarInfo(f"{image.parent.name}-{image.stem}.cls")
            label.size = 1
            tar.add(image, f"{image.parent.name}-{image.stem}{image.suffix}")
            tar.addfile(label, io.BytesIO(image.parent.name[-1].encode()))
    return path


def a_folder(folder: Path, _: Preprocess) -> ImageSet:
    return open_images(os.path.relpath(folder))


def a_list(folder: Path, _: Preprocess) -> ImageSet:
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*"))
    (folder / "list.txt").write_text("".join(f"{name} {i % 4}\n" for i, name in enumerate(names)))
    return open_images(os.path.relpath(folder / "list.txt"))


def shards(folder: Path, _: Preprocess) -> ImageSet:
    for i, name in enumerate(("class0", "class1", "class2")):
        tar_of(folder.parent / f"{i}.tar", folder / name)
    return open_images(os.path.relpath(folder.parent / "*.tar"))


def a_pack(folder: Path, preprocess: Preprocess) -> ImageSet:
    return write_pack(open_images(folder), preprocess, os.path.relpath(folder.parent / "set.pack"))


@pytest.fixture
def folder(val_folder: Path, tmp_path: Path) -> Path:
    """A copy, below the current folder."""
    return Path(shutil.copytree(val_folder, tmp_path / "set"))


@pytest.mark.parametrize("make", [a_folder, a_list, shards, a_pack])
def test_a_set_is_read_elsewhere_as_it_is_here(
    make: Callable[[Path, Preprocess], ImageSet], folder: Path, preprocess: Preprocess
) -> None:
    images = make(folder, preprocess).take([17, 3, 4, 5, 9])
    assert not images.root.is_absolute()  # as it was typed, and so said in messages
    there, (hashes, pixels) = in_a_child(images, preprocess, Path("/"))
    ours = read(images, preprocess)
    assert hashes == ours[0]
    np.testing.assert_array_equal(pixels, ours[1])
    assert (there.paths, there.labels, there.classes) == (images.paths, images.labels, images.classes)
    assert there.root == images.root.absolute()
    part = there.take([0, 2])
    np.testing.assert_array_equal(read(part, preprocess)[1], pixels[[0, 2]])


@pytest.mark.parametrize("make", [a_folder, shards, a_pack])
def test_what_is_taken_is_all_that_is_pickled(
    make: Callable[[Path, Preprocess], ImageSet], folder: Path, preprocess: Preprocess
) -> None:
    images = make(folder, preprocess)
    some, one = images.take(range(8)), images.take([13])
    assert len(pickle.dumps(images)) < 5000 < 32 * 32 * 3 * len(images)
    assert len(pickle.dumps(one)) + 7 * 15 < len(pickle.dumps(some)) < len(pickle.dumps(images))
    assert images.paths[12] not in pickle.dumps(one).decode("latin-1")


def test_shards_that_are_not_taken_from_stay_behind(folder: Path, preprocess: Preprocess) -> None:
    images = shards(folder, preprocess)
    part = images.take([12, 17, 0])
    assert [p[:5] for p in part.paths] == ["2.tar", "2.tar", "0.tar"]
    assert getattr(part, "shards", None) == ("0.tar", "2.tar")
    np.testing.assert_array_equal(read(part, preprocess)[1], read(images, preprocess)[1][[12, 17, 0]])


@pytest.mark.parametrize("make", [a_folder, a_list, shards])
def test_a_set_that_a_machine_does_not_see_is_refused_and_not_skipped(
    make: Callable[[Path, Preprocess], ImageSet], folder: Path, preprocess: Preprocess
) -> None:
    sent = pickle.dumps(make(folder, preprocess))
    for file in (*folder.rglob("*.png"), *folder.rglob("*.jpg"), *folder.parent.glob("*.tar")):
        file.unlink()
    images = pickle.loads(sent)
    with pytest.raises(InputError, match="is there") as error:
        list(Loader(images, preprocess, skip_bad=True))
    assert "give a path that every machine sees" in error.value.hint
    assert str(images.root) in error.value.cause


def test_one_image_that_is_not_there_is_one_unreadable_image(folder: Path, preprocess: Preprocess) -> None:
    images = open_images(folder)
    (folder / images.paths[3]).unlink()
    loader = Loader(images, preprocess, skip_bad=True)
    assert sum(len(b.index) for b in loader) == len(images) - 1
    assert [path for path, _ in loader.skipped] == [images.paths[3]]
    (folder / images.paths[0]).unlink()
    (folder / images.paths[0]).symlink_to("nowhere")
    with pytest.raises(InputError, match="none of the 1 images is readable"):
        list(Loader(images.take([0]), preprocess, skip_bad=True))


# packs


@pytest.fixture
def packed(folder: Path, preprocess: Preprocess) -> Pack:
    return write_pack(open_images(folder), preprocess, Path("set.pack"))


def test_a_pack_is_loaded_without_a_look_at_the_file(packed: Pack, preprocess: Preprocess) -> None:
    sent = pickle.dumps(packed)
    packed.root.rename("away.pack")
    there = pickle.loads(sent)
    assert (there.hashes(), there.labels) == (packed.hashes(), packed.labels)
    Path("away.pack").rename(packed.root)
    np.testing.assert_array_equal(there.read(5, preprocess), packed.read(5, preprocess))
    there.verify()


def test_a_pack_that_is_not_there_is_refused(packed: Pack, preprocess: Preprocess) -> None:
    there = pickle.loads(pickle.dumps(packed))
    packed.root.unlink()
    for attempt in (lambda: there.read(0, preprocess), lambda: list(Loader(there, preprocess, skip_bad=True))):
        with pytest.raises(InputError, match=r"cannot read /.*set\.pack") as error:
            attempt()
        assert error.value.evidence == "No such file or directory"
        assert "give a path that every machine sees" in error.value.hint
    np.testing.assert_array_equal(packed.read(0, preprocess), packed.read(0, preprocess))  # which is open already


def test_another_pack_is_refused(packed: Pack, folder: Path, preprocess: Preprocess) -> None:
    """One that has the same images, but other labels."""
    there = pickle.loads(pickle.dumps(packed))
    (folder / "class0").rename(folder / "class9")
    other = write_pack(open_images(folder).take(range(6, 24)), preprocess, packed.root)
    for attempt in (lambda: there.read(0, preprocess), lambda: list(Loader(there, preprocess, skip_bad=True))):
        with pytest.raises(InputError, match="is another pack than the one that was opened") as error:
            attempt()
        assert other.pixels.header.metadata_sha256.hex() in error.value.evidence
        assert "give a path that every machine sees" in error.value.hint
    assert len(pickle.loads(pickle.dumps(other)).read(0, preprocess)) == 32


def test_a_pack_that_was_cut_short_meanwhile_is_refused(packed: Pack, preprocess: Preprocess) -> None:
    there = pickle.loads(pickle.dumps(packed))
    packed.root.write_bytes(packed.root.read_bytes()[:-1])
    with pytest.raises(InputError, match="was cut short"):
        there.read(0, preprocess)


def test_the_two_packs_of_one_file_are_equal(packed: Pack) -> None:
    again = open_pack(packed.root.absolute())
    assert pickle.loads(pickle.dumps(packed)) == again
    assert pickle.loads(pickle.dumps(packed.take([4]))) == again.take([4])
