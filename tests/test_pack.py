from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import folder_of

from edgeres import data, files, pixels
from edgeres.data import ImageSet, Manifest
from edgeres.errors import InputError, MissingDependency
from edgeres.images import decode
from edgeres.layouts import open_images
from edgeres.loader import Loader
from edgeres.pack import Pack, _Part, open_pack, write_pack
from edgeres.pixels import HEADER, MAGIC, PAGE
from edgeres.recipe import Preprocess

SMALL = Preprocess(crop=8, resize=8, interpolation="nearest")


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    """100 images, three whole batches of the packer and a rest."""
    return open_images(folder_of(tmp_path / "set", *(f"{'ab'[i % 2]}/{i:03}.png" for i in range(100))))


@pytest.fixture
def packed(images: ImageSet, tmp_path: Path) -> Pack:
    return write_pack(images, SMALL, tmp_path / "set.pack")


# what is in a pack


def test_a_pack_holds_what_decoding_the_images_gives(
    train_images: ImageSet, preprocess: Preprocess, tmp_path: Path
) -> None:
    pack = write_pack(train_images, preprocess, tmp_path / "train.pack")
    assert (len(pack), pack.paths, pack.labels, pack.classes) == (
        len(train_images),
        train_images.paths,
        train_images.labels,
        train_images.classes,
    )
    for i, path in enumerate(train_images.paths):
        found = pack.read(i, preprocess)
        assert (found.shape, found.dtype) == ((32, 32, 3), np.uint8)
        np.testing.assert_array_equal(found, decode(train_images.root / path, preprocess))
    pack.verify()


def test_its_manifest_is_that_of_the_image_files(images: ImageSet, packed: Pack) -> None:
    assert Manifest.of(packed) == Manifest.of(images)
    shutil.rmtree(images.root)
    assert Manifest.of(packed).hashes[0] == packed.hashes()[0]  # they are stored, the files are not needed


def test_batches_from_a_pack_are_those_from_the_images(images: ImageSet, packed: Pack) -> None:
    for a, b in zip(Loader(images, SMALL, 30), Loader(packed, SMALL, 30), strict=True):
        for x, y in ((a.pixels, b.pixels), (a.labels, b.labels), (a.index, b.index)):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_a_subset_of_a_pack_is_the_pack_of_the_subset(images: ImageSet, packed: Pack, tmp_path: Path) -> None:
    some, of_pack = images.subset(40, 3), packed.subset(40, 3)
    assert (of_pack.paths, of_pack.labels, of_pack.hashes()) == (some.paths, some.labels, some.hashes())
    for a, b in zip(Loader(some, SMALL), Loader(of_pack, SMALL), strict=True):
        np.testing.assert_array_equal(a.pixels, b.pixels)
    again = of_pack.subset(7)  # places in the subset, not in the file
    np.testing.assert_array_equal(again.read(0, SMALL), images.subset(40, 3).subset(7).read(0, SMALL))
    assert isinstance(of_pack, Pack)
    of_pack.verify()


def test_a_pack_can_be_packed_again_without_its_images(images: ImageSet, packed: Pack, tmp_path: Path) -> None:
    shutil.rmtree(images.root)
    write_pack(packed.subset(10), SMALL, tmp_path / "ten.pack")
    ten = open_pack(tmp_path / "ten.pack")
    assert ten.hashes() == packed.subset(10).hashes()
    np.testing.assert_array_equal(ten.read(9, SMALL), packed.subset(10).read(9, SMALL))


def test_images_without_labels_stay_without(tmp_path: Path) -> None:
    pack = write_pack(open_images(folder_of(tmp_path / "flat", "1.png", "2.png")), SMALL, tmp_path / "flat.pack")
    assert (pack.labels, pack.subset(1).labels, pack.classes) == (None, None, ())


@pytest.mark.skipif(os.name != "posix", reason="only POSIX has file names that are no text")
def test_file_names_that_are_not_utf8_are_kept(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    folder_of(tmp_path / "set", "a.png")
    (tmp_path / "set" / "a.png").rename(tmp_path / "set" / os.fsdecode(b"\xff\n.png"))
    images = ImageSet(tmp_path / "set", (os.fsdecode(b"\xff\n.png"),), None)
    assert write_pack(images, SMALL, tmp_path / "odd.pack").paths == images.paths


def test_the_file_is_header_page_pixels_and_json(images: ImageSet, packed: Pack) -> None:
    content = packed.root.read_bytes()
    magic, version, crop, count, start, length, digest = HEADER.unpack_from(content)
    assert (magic, version, crop, count) == (MAGIC, 1, 8, 100)
    pixels = content[PAGE:start]
    assert pixels == b"".join(images.read(i, SMALL).tobytes() for i in range(100))
    assert hashlib.sha256(content[start:]).digest() == digest
    record = json.loads(content[start : start + length])
    assert record["pixels_sha256"] == hashlib.sha256(pixels).hexdigest()
    assert (record["shape"], record["preprocess"]) == ([100, 8, 8, 3], json.loads(json.dumps(SMALL.to_json())))
    assert PAGE % 4096 == 0


def test_the_same_images_elsewhere_give_the_same_bytes(images: ImageSet, packed: Pack, tmp_path: Path) -> None:
    shutil.copytree(images.root, tmp_path / "else" / "where")
    write_pack(open_images(tmp_path / "else" / "where"), SMALL, tmp_path / "new" / "folder" / "b.pack")
    assert (tmp_path / "new" / "folder" / "b.pack").read_bytes() == packed.root.read_bytes()
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["b.pack"]


# reading


def test_pixels_cannot_be_written_to(packed: Pack) -> None:
    with pytest.raises(ValueError, match="read-only"):
        packed.read(0, SMALL)[:] = 0


def test_another_preprocess_is_refused_and_both_are_named(packed: Pack) -> None:
    other = Preprocess(crop=8, resize=9, interpolation="bicubic")
    for attempt in (lambda: packed.read(0, other), lambda: next(iter(Loader(packed, other, skip_bad=True)))):
        with pytest.raises(InputError, match="under another preprocess") as error:
            attempt()
        assert error.value.evidence == "resize: packed 8, asked for 9\ninterpolation: packed nearest, asked for bicubic"


def test_the_encoded_bytes_of_an_image_are_not_in_a_pack(packed: Pack) -> None:
    with pytest.raises(InputError, match=r"not the bytes of a/000\.png"):
        packed.open(0)


def test_pages_that_were_read_are_handed_back(packed: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [packed.read(i, SMALL).copy() for i in range(100)]
    monkeypatch.setattr(pixels, "RELEASE", 500)
    for i, view in enumerate([packed.read(i, SMALL) for i in range(100)]):  # views from before outlive it
        np.testing.assert_array_equal(view, before[i])
    packed.verify()


def test_reading_a_pack_imports_no_image_library(packed: Pack) -> None:
    code = f"""
import sys
sys.modules["PIL"] = None  # importing it fails
from edgeres.data import Manifest
from edgeres.loader import Loader
from edgeres.pack import open_pack
from edgeres.recipe import Preprocess
pack = open_pack({str(packed.root)!r})
pack.verify()
Manifest.of(pack.subset(5))
print(sum(len(b.pixels) for b in Loader(pack, pack.preprocess)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.stdout.strip(), run.stderr) == ("100", "")


# writing


def test_a_missing_image_library_is_named_at_once(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingDependency, match="PIL") as error:
        write_pack(images, SMALL, tmp_path / "a.pack", skip_bad=True)
    assert "edgeres[images]" in error.value.hint


def test_unreadable_images_are_named_or_left_out(images: ImageSet, tmp_path: Path) -> None:
    for i in (0, 33, 34, 99):
        (images.root / images.paths[i]).write_bytes(b"no image")
    path = tmp_path / "set.pack"
    with pytest.raises(InputError, match="1 unreadable image in") as error:
        write_pack(images, SMALL, path)
    assert images.paths[0] in error.value.evidence
    assert not path.exists()
    pack = write_pack(images, SMALL, path, skip_bad=True)
    bad = {images.paths[i] for i in (0, 33, 34, 99)}
    assert {p for p, reason in pack.skipped if reason} == bad
    good = [i for i, p in enumerate(images.paths) if p not in bad]
    assert pack.paths == images.take(good).paths
    assert pack.labels == images.take(good).labels
    assert pack.hashes() == images.take(good).hashes()
    for i, place in enumerate(good):
        np.testing.assert_array_equal(pack.read(i, SMALL), images.read(place, SMALL))
    with pytest.raises(InputError, match="unreadable"):  # a pack that lacks images is not what was asked for
        write_pack(images, SMALL, path)


def test_no_readable_image_leaves_nothing_behind(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", "1.png", "2.png")
    for path in root.iterdir():
        path.write_bytes(b"x")
    with pytest.raises(InputError, match="none of the 2 images is readable"):
        write_pack(open_images(root), SMALL, tmp_path / "out" / "set.pack", skip_bad=True)
    assert list((tmp_path / "out").iterdir()) == []


def counting(monkeypatch: pytest.MonkeyPatch, stop_at: str | None = None) -> list[str]:
    """Count decoded images; a Ctrl-C comes at the one whose name is ``stop_at``."""
    seen: list[str] = []

    def counted(path: Path, preprocess: Preprocess) -> np.ndarray:
        if path.name == stop_at:
            raise KeyboardInterrupt
        seen.append(path.name)
        return decode(path, preprocess)

    monkeypatch.setattr(data, "decode", counted)
    return seen


def interrupted(images: ImageSet, path: Path, monkeypatch: pytest.MonkeyPatch, skip_bad: bool = False) -> Path:
    """A pack whose making was stopped in its third batch -> the part that is left."""
    with monkeypatch.context() as patch:
        counting(patch, stop_at=Path(images.paths[70]).name)
        with pytest.raises(KeyboardInterrupt):
            write_pack(images, SMALL, path, skip_bad=skip_bad)
    part = path.with_name(path.name + ".part")
    assert part.is_file()
    assert not path.exists()
    return part


def test_an_interrupted_run_is_continued_to_the_same_bytes(
    images: ImageSet, packed: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = interrupted(images, tmp_path / "again" / "set.pack", monkeypatch)
    with part.open("ab") as f:
        f.write(b"half a batch that is in no journal")
    seen = counting(monkeypatch)
    pack = write_pack(images, SMALL, tmp_path / "again" / "set.pack")
    assert len(seen) == 100 - 64
    assert pack.root.read_bytes() == packed.root.read_bytes()
    assert list(part.parent.iterdir()) == [pack.root]


def test_a_continued_run_remembers_what_it_left_out(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in (1, 40, 98):
        (images.root / images.paths[i]).write_bytes(b"no image")
    whole = write_pack(images, SMALL, tmp_path / "whole.pack", skip_bad=True)
    path = tmp_path / "set.pack"
    interrupted(images, path, monkeypatch, skip_bad=True)
    with pytest.raises(InputError, match="2 unreadable images in"):
        write_pack(images, SMALL, path)
    seen = counting(monkeypatch)
    assert write_pack(images, SMALL, path, skip_bad=True).skipped == whole.skipped
    assert path.read_bytes() == whole.root.read_bytes()
    assert len(seen) == 100 - 64


def _other_images(images: ImageSet, part: Path) -> ImageSet:
    folder_of(images.root, images.paths[1])  # new content under an old name
    return images


def _other_labels(images: ImageSet, part: Path) -> ImageSet:
    return ImageSet(images.root, images.paths, (7,) * len(images), images.classes)


def _flipped_pixel(images: ImageSet, part: Path) -> ImageSet:
    content = bytearray(part.read_bytes())
    content[PAGE + 5] ^= 1
    part.write_bytes(content)
    return images


def _shorter(images: ImageSet, part: Path) -> ImageSet:
    os.truncate(part, PAGE + 100)
    return images


def _no_journal(images: ImageSet, part: Path) -> ImageSet:
    part.with_name(part.name + ".json").unlink()
    return images


def _odd_journal(images: ImageSet, part: Path) -> ImageSet:
    part.with_name(part.name + ".json").write_text('{"done": "many"')
    return images


@pytest.mark.parametrize(
    "change",
    [_other_images, _other_labels, _flipped_pixel, _shorter, _no_journal, _odd_journal],
    ids=lambda f: f.__name__,
)
def test_a_part_of_something_else_is_not_continued(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[ImageSet, Path], ImageSet]
) -> None:
    path = tmp_path / "set.pack"
    images = change(images, interrupted(images, path, monkeypatch))
    seen = counting(monkeypatch)
    pack = write_pack(images, SMALL, path)
    assert len(seen) == 100
    pack.verify()
    assert Manifest.of(pack) == Manifest.of(images)
    np.testing.assert_array_equal(pack.read(1, SMALL), images.read(1, SMALL))


def test_a_part_of_another_preprocess_is_not_continued(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(images, tmp_path / "set.pack", monkeypatch)
    seen = counting(monkeypatch)
    other = Preprocess(crop=6, resize=8)
    assert write_pack(images, other, tmp_path / "set.pack").read(0, other).shape == (6, 6, 3)
    assert len(seen) == 100


def test_a_whole_pack_of_the_same_is_not_made_again_and_of_another_is(
    images: ImageSet, packed: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = counting(monkeypatch)
    assert write_pack(images, SMALL, packed.root) == packed
    assert seen == []
    assert len(write_pack(images.subset(5), SMALL, packed.root)) == 5
    assert len(seen) == 5


def test_of_two_processes_that_write_one_pack_the_second_waits_and_takes_what_is_there(
    images: ImageSet, packed: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, waits, note = tmp_path / "new" / "set.pack", threading.Event(), _Part._note
    found: list[Pack] = []
    other = threading.Thread(target=lambda: found.append(write_pack(images, SMALL, path)))

    def while_the_other_begins(part: _Part) -> None:
        if other.ident is None:
            other.start()
            while other.is_alive() and not waits.wait(0.01):
                pass
        note(part)

    seen = counting(monkeypatch)
    monkeypatch.setattr(_Part, "_note", while_the_other_begins)
    monkeypatch.setattr(files, "say", lambda text: waits.set() if "wait for it" in text else None)
    pack = write_pack(images, SMALL, path)
    other.join()
    assert found == [pack]
    assert len(seen) == 100
    assert path.read_bytes() == packed.root.read_bytes()
    assert list(path.parent.iterdir()) == [path]


def test_a_disk_that_fills_is_an_error_that_names_the_pack(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: _Part) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_Part, "_note", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_pack(images, SMALL, tmp_path / "set.pack")
    assert error.value.filename == str(tmp_path / "set.pack.part")


# files that are refused


def _edit(content: bytearray, place: int) -> bytearray:
    content[place] ^= 1
    return content


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda c: b"", "is not a pack"),
        (lambda c: b"\x89PNG" + c[4:], "is not a pack"),
        (lambda c: bytes(PAGE) + c[PAGE:], "is not a pack"),
        (lambda c: c[:1000], "was cut short"),
        (lambda c: c[:PAGE], "was cut short"),
        (lambda c: c[:-1], "was cut short"),
        (lambda c: c + b"\0", "has bytes after its end"),
        (lambda c: _edit(c, 8), "is a pack of version 0, this edgeres reads 1"),
        (lambda c: _edit(c, 12), "has a damaged header"),
        (lambda c: _edit(c, 16), "has a damaged header"),
        (lambda c: _edit(c, PAGE - 1), "has a damaged header"),
        (lambda c: _edit(c, 200), "has a damaged header"),
        (lambda c: _edit(c, len(c) - 9), "has damaged metadata"),
    ],
)
def test_a_file_that_is_not_a_whole_pack_is_refused(
    packed: Pack, tmp_path: Path, change: Callable[[bytearray], bytes], cause: str
) -> None:
    path = tmp_path / "changed.pack"
    path.write_bytes(change(bytearray(packed.root.read_bytes())))
    with pytest.raises(InputError, match=cause) as error:
        open_pack(path)
    assert "changed.pack" in error.value.cause
    assert error.value.hint


def sealed(record: object, count: int = 1, crop: int = 8) -> bytes:
    """A pack of black images whose digests are right, whatever its metadata say."""
    pixels = bytes(count * crop * crop * 3)
    text = (record if isinstance(record, str) else json.dumps(record)).encode()
    page = HEADER.pack(MAGIC, 1, crop, count, PAGE + len(pixels), len(text), hashlib.sha256(text).digest())
    page = page.ljust(PAGE - 32, b"\0")
    return page + hashlib.sha256(page).digest() + pixels + text


def test_metadata_that_make_no_sense_are_refused(packed: Pack, tmp_path: Path) -> None:
    content = packed.root.read_bytes()
    record = json.loads(content[HEADER.unpack_from(content)[4] :])
    one = {**record, "paths": ["a"], "labels": [0], "sha256": ["0" * 64], "shape": [1, 8, 8, 3]}
    path = tmp_path / "odd.pack"
    path.write_bytes(sealed(one))
    assert len(open_pack(path)) == 1
    short = {k: v for k, v in one.items() if k != "shape"}
    kinds = ({"labels": [label]} for label in ("0", None, 0.5, True, [0]))
    others = ({"labels": []}, {"paths": [1]}, {"classes": [{}]}, {"sha256": [0]}, {"skipped": [["a", 1]]})
    more = ({"labels": [0, 1]}, {"preprocess": {"crop": 0}}, {"shape": [1, 8, 8]}, {"made_from": 1})
    for odd in ([], short, *({**one, **change} for change in (*kinds, *others, *more))):
        path.write_bytes(sealed(odd))
        with pytest.raises(InputError, match="unusable metadata"):
            open_pack(path)
    path.write_bytes(sealed({**one, "preprocess": Preprocess(crop=9).to_json()}))
    with pytest.raises(InputError, match="unusable metadata"):
        open_pack(path)
    path.write_bytes(sealed("[" * 200_000 + "]" * 200_000))
    with pytest.raises(InputError, match="unusable metadata"):
        open_pack(path)
    for count, crop in ((0, 8), (1, 0), (2**63, 0)):
        path.write_bytes(sealed(one, count, crop))
        with pytest.raises(InputError, match="damaged header"):
            open_pack(path)


def test_a_missing_file_and_a_folder_are_told(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pack", tmp_path):
        with pytest.raises(InputError, match="cannot read"):
            open_pack(path)


def test_a_flipped_pixel_is_found_on_request(packed: Pack, tmp_path: Path) -> None:
    path = tmp_path / "flipped.pack"
    path.write_bytes(_edit(bytearray(packed.root.read_bytes()), PAGE + 77))
    pack = open_pack(path)
    with pytest.raises(InputError, match="has damaged pixels"):
        pack.verify()
