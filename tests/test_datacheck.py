from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

from edgeres.cli import cli
from edgeres.data import ImageSet
from edgeres.datacheck import SHOWN, check, table
from edgeres.files import to_json
from edgeres.layouts import open_images
from edgeres.remote import Unreachable


def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def save(path: Path, image: Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def printed(report: dict[str, object], width: int = 80) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(table(report))
    return stream.getvalue().splitlines()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes: of 3, 1 and 2 images."""
    folder = tmp_path / "set"
    save(folder / "ant" / "1.png", picture(10, 20, 1))
    save(folder / "ant" / "2.jpg", picture(30, 20, 2).convert("L"))
    save(folder / "ant" / "3.png", picture(50, 6, 3))
    save(folder / "bee" / "4.png", picture(10, 20, 4))
    save(folder / "cat" / "5.webp", picture(12, 20, 5))
    save(folder / "cat" / "6.png", picture(10, 90, 6))
    return folder


def test_a_good_set_is_described(root: Path) -> None:
    report = check(open_images(root))
    assert report["images"] == 6
    assert report["classes"] == {"known": 3, "seen": 3, "empty": 0, "images": {"min": 1, "median": 2, "max": 3}}
    assert report["width"] == {"min": 10, "median": 11, "max": 50}
    assert report["height"] == {"min": 6, "median": 20, "max": 90}
    assert report["modes"] == {"RGB": 5, "L": 1}
    assert report["formats"] == {"PNG": 4, "JPEG": 1, "WEBP": 1}
    wrong = ("unreadable", "duplicates", "labels_out_of_range", "overlap", "rotated", "not_utf8")
    assert {key: report[key] for key in wrong} == {key: [] for key in wrong}
    assert printed(report)[-1] == "nothing wrong found"
    assert json.loads(to_json(report)) == report


def test_every_unreadable_image_is_listed_with_its_reason(root: Path) -> None:
    (root / "ant" / "a.png").write_bytes(b"")
    (root / "bee" / "b.jpg").write_bytes(b"<html>not found</html>")
    whole = (root / "cat" / "6.png").read_bytes()
    (root / "cat" / "c.png").write_bytes(whole[: len(whole) // 2])
    save(root / "cat" / "d.tiff", Image.new("F", (8, 8)))
    (root / "cat" / "e.png").symlink_to(root / "absent")
    report = check(open_images(root))
    found = {entry["path"]: entry["reason"] for entry in report["unreadable"]}
    assert list(found) == ["ant/a.png", "bee/b.jpg", "cat/c.png", "cat/d.tiff", "cat/e.png"]
    assert found["ant/a.png"] == "the file is empty"
    assert "starts with b'<html>no'" in found["bee/b.jpg"]
    assert "truncated" in found["cat/c.png"]
    assert "floating-point pixels" in found["cat/d.tiff"]
    assert "No such file" in found["cat/e.png"]
    assert report["images"] == 11
    assert sum(report["formats"].values()) == 6  # of those that can be read


def test_identical_images_are_listed_together_under_any_name(root: Path) -> None:
    content = (root / "ant" / "1.png").read_bytes()
    (root / "cat" / "copy.png").write_bytes(content)
    (root / "bee" / "copy.png").write_bytes(content)
    (root / "bee" / "empty.png").write_bytes(b"")
    (root / "cat" / "empty.png").write_bytes(b"")
    report = check(open_images(root))
    assert report["duplicates"] == [["ant/1.png", "bee/copy.png", "cat/copy.png"], ["bee/empty.png", "cat/empty.png"]]


def test_images_shared_with_another_set_are_listed(root: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other" / "x" / "new.png", picture(9, 9, 9)).parent.parent
    against = check(open_images(root), open_images(other))
    assert (against["overlap"], against["against"]) == ([], 1)
    assert printed(against)[-1] == "no image in common with the 1 compared"
    (other / "x" / "old.png").write_bytes((root / "cat" / "6.png").read_bytes())
    (other / "x" / "broken.png").symlink_to(other / "absent")
    report = check(open_images(root), open_images(other))
    assert report["overlap"] == [{"path": "cat/6.png", "other": "x/old.png"}]
    assert "1 the same as one of the 3 to compare with" in printed(report)
    assert check(open_images(root))["against"] is None


@pytest.mark.parametrize("which", [0, 1])
def test_a_set_that_cannot_be_reached_has_no_verdict(root: Path, which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = [open_images(root / name) for name in ("ant", "bee")]

    def gone(images: ImageSet, i: int) -> None:
        raise Unreachable("cannot read it")

    monkeypatch.setattr(Elsewhere, "open", gone, raising=False)
    sets[which] = Elsewhere(sets[which].root, sets[which].paths, None)
    with pytest.raises(Unreachable, match="cannot read it"):
        check(*sets)


class Elsewhere(ImageSet):
    """Images on a machine that does not answer."""


def test_labels_outside_the_classes_are_listed(root: Path) -> None:
    (root / "list.txt").write_text("ant/1.png 0\nant/3.png 2\nbee/4.png 9\n")
    images = open_images(root / "list.txt")
    assert check(images)["labels_out_of_range"] == []  # nobody knows how many classes there are
    report = check(images, classes=3)
    assert report["labels_out_of_range"] == [{"path": "bee/4.png", "label": 9}]
    assert report["classes"]["known"] == 3
    assert report["classes"]["empty"] == 1
    assert check(open_images(root), classes=2)["classes"]["known"] == 3  # the set knows better


def test_the_models_number_of_classes_bounds_labels(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "list.txt").write_text("ant/1.png 0\nbee/4.png 9\n")
    monkeypatch.chdir(root)
    assert CliRunner().invoke(cli, ["data", "check", "list.txt"]).exit_code == 0
    (root / "edgeres.toml").write_text("[model]\nclasses = 3\n")
    found = CliRunner().invoke(cli, ["data", "check", "list.txt"])
    assert (found.exit_code, "bee/4.png: 9" in found.stdout) == (1, True)


def test_a_set_without_labels_has_no_classes(root: Path) -> None:
    report = check(open_images(root / "ant"), classes=1000)
    assert report["classes"] is None
    assert report["labels_out_of_range"] == []
    assert "classes  no labels" in [line.rstrip() for line in printed(report)]


def test_images_that_a_viewer_would_turn_are_listed(root: Path) -> None:
    for orientation in (1, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        save(root / "ant" / f"o{orientation}.jpg", picture(8, 8, orientation), exif=exif)
    assert check(open_images(root))["rotated"] == ["ant/o6.jpg"]


@pytest.mark.skipif(os.name != "posix", reason="only POSIX has file names that are no text")
def test_names_that_are_no_utf8_are_listed_escaped(root: Path) -> None:
    save(root / "ant" / os.fsdecode(b"\xe9t\xe9.png"), picture(8, 8, 1))
    report = check(open_images(root))
    assert report["not_utf8"] == [r"ant/\xe9t\xe9.png"]
    assert to_json(report).encode()
    assert any(r"ant/\xe9t\xe9.png" in line for line in printed(report))


def test_shards_are_checked_too(root: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in (("1.png", (root / "ant" / "1.png").read_bytes()), ("2.png", b"")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    report = check(open_images(tmp_path / "a.tar"), open_images(root))
    assert report["unreadable"] == [{"path": "a.tar/2.png", "reason": "the file is empty"}]
    assert report["overlap"] == [{"path": "a.tar/1.png", "other": "ant/1.png"}]


class Pixels(ImageSet):
    """As a pack: it knows the hashes of files that it does not hold."""

    def hashes(self) -> tuple[str, ...]:
        return ("0" * 64, "1" * 64, "0" * 64)


def test_a_pack_is_checked_by_the_hashes_it_keeps() -> None:
    packed = Pixels(Path("a.pack"), ("a.png", "b.png", "c.png"), (0, 1, 1))
    report = check(packed, packed)
    assert report["duplicates"] == [["a.png", "c.png"]]
    assert (report["unreadable"], report["width"], report["formats"]) == ([], None, {})
    assert [entry["other"] for entry in report["overlap"]] == ["a.png", "b.png", "a.png"]
    assert printed(report)


def test_the_table_fits_80_columns_and_says_how_much_it_leaves_out(root: Path) -> None:
    for i in range(SHOWN + 3):
        (root / "ant" / f"bad{i}.png").write_bytes(bytes([i]) * 9)
    lines = printed(check(open_images(root)))
    assert max(map(len, lines)) <= 80
    assert f"{SHOWN + 3} unreadable" in lines
    assert "  and 3 more (--json lists all)" in lines
    assert any(line.startswith("classes  3 of 3, with 1 to 11, median 2 images each") for line in lines)
