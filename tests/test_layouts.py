from __future__ import annotations

import hashlib
import io
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED, folder_of, picture, save, shared
from PIL import Image
from rich.console import Console

from edgeres import imagenet, progress, shards
from edgeres.data import ImageSet, Manifest
from edgeres.errors import InputError
from edgeres.images import normalize
from edgeres.layouts import open_images
from edgeres.loader import Loader
from edgeres.recipe import Preprocess

EXACT = Preprocess(crop=8, resize=8, interpolation="nearest")


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
    with pytest.raises(InputError, match="'cat' is not in the labels file") as error:
        open_images(root, tmp_path / "labels.txt")
    assert error.value.evidence.endswith("labels.txt has 'a', 'b'")
    assert "one per line" in error.value.hint


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


# ImageNet


def test_the_1000_classes_are_those_of_torchvision_in_its_order() -> None:
    ids = imagenet.ids()
    assert len(ids) == len(set(ids)) == 1000
    assert list(ids) == sorted(ids)
    known = {
        0: "tench",
        1: "goldfish",
        65: "sea snake",
        207: "golden retriever",
        482: "cassette player",
        574: "golf ball",
    }
    known |= {517: "crane (machine)", 134: "crane (bird)", 638: "maillot (tights)", 999: "toilet tissue"}
    assert {i: imagenet.classes()[i][1] for i in known} == known
    assert (ids[0], ids[999]) == ("n01440764", "n15075141")
    # SHA-256 of the ids, each with a line break, as timm lists them (timm/data/_info/imagenet_synsets.txt)
    assert (
        hashlib.sha256("".join(f"{i}\n" for i in ids).encode()).hexdigest()
        == "70002b0ff5de60a3a17a82dbfcff291931f96225ddf941ad2e182fc39e183d15"
    )


def test_names_are_plain_short_and_each_its_own() -> None:
    names = [name for _, name in imagenet.classes()]
    assert len(set(map(str.lower, names))) == 1000
    assert all(name.isascii() and "," not in name and 1 < len(name) < 32 for name in names)
    assert imagenet.index("Great_White-shark") == imagenet.index("n01484850") == 2
    assert imagenet.index("crane") is imagenet.index("cat") is imagenet.index("n00000000") is None


@shared
def test_the_sample_of_imagenet_is_scored_by_imagenets_indices() -> None:
    found = open_images(SHARED / "imagenet-sample")
    assert (len(found), found.classes) == (512, imagenet.ids())
    assert found.labels is not None
    for path, label in zip(found.paths, found.labels, strict=True):
        folder, name = path.removesuffix(".JPEG").split("/")
        assert imagenet.ids()[label] == folder
        assert imagenet.index(name) in (label, None)  # None: the cranes and their like


def test_a_few_wordnet_ids_keep_imagenets_indices(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", "n03888257/1.png", "n01440764/2.png", "n03000684/3.png")
    found = open_images(root)
    assert (found.labels, found.classes) == ((0, 491, 701), imagenet.ids())
    assert open_images(root, classes=1000) == found


def test_a_model_of_other_classes_numbers_wordnet_ids_itself(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", "n03888257/1.png", "n01440764/2.png")
    found = open_images(root, classes=2)
    assert (found.labels, found.classes) == ((0, 1), ("n01440764", "n03888257"))


def test_english_names_are_imagenets_only_for_a_model_of_1000_classes(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", "zebra/1.png", "ant/2.png", "Great_White_Shark/3.png")
    assert open_images(root).classes == ("Great_White_Shark", "ant", "zebra")
    found = open_images(root, classes=1000)
    assert (found.labels, found.classes) == ((2, 310, 340), imagenet.ids())


@pytest.mark.parametrize(
    ("folders", "evidence"),
    [
        (("n01440764", "n00000000"), "1 of 2 are not, or could be two of them: n00000000"),
        (("n01440764", "cat"), "cat"),
        (("hen", "crane"), "crane"),
        (("n01440764", "hen"), "mixed"),
        (("hen", "Hen "), "one class has two names"),
    ],
)
def test_a_mixture_is_alphabetical_and_refused_for_a_model_of_1000_classes(
    tmp_path: Path, folders: tuple[str, ...], evidence: str
) -> None:
    root = folder_of(tmp_path / "set", *(f"{name}/1.png" for name in folders))
    assert open_images(root).classes == tuple(sorted(folders))
    with pytest.raises(
        InputError, match=r"some of the class folders .* are classes of ImageNet, others are not"
    ) as error:
        open_images(root, classes=1000)
    assert evidence in error.value.evidence


def test_a_labels_file_comes_before_imagenet(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", "n03888257/1.png", "n01440764/2.png")
    (tmp_path / "labels.txt").write_text("n03888257\nn01440764\n")
    assert open_images(root, tmp_path / "labels.txt").labels == (1, 0)


# folders that are not what they seem


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[ImageSet, str]:
    with progress.to(Console(stderr=True, width=500)):
        found = open_images(*arguments)  # type: ignore[arg-type]
    return found, capsys.readouterr().err


def test_splits_are_no_classes(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", "train/cat/1.png", "val/cat/2.png")
    with pytest.raises(InputError, match="are train and val: splits, not classes") as error:
        open_images(root)
    assert error.value.hint.endswith(f"{root / 'train'}")
    (tmp_path / "labels.txt").write_text("train\nval\n")  # whoever says so means it
    assert open_images(root, tmp_path / "labels.txt").labels == (0, 1)


def test_numbered_folders_are_alphabetical_and_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder_of(tmp_path / "set", *(f"{i}/1.png" for i in range(12)))
    found, words = said(capsys, root)
    assert found.classes[:4] == ("0", "1", "10", "11")
    assert "are numbers, in alphabetical order as in torchvision: 0, 1, 10, ..." in words


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder_of(tmp_path / "set", "a/1.png", "beside.png", ".hidden.png", "a/.hidden.png", "a/.deep/1.png")
    (root / "gifs").mkdir()
    (root / "gifs" / "1.gif").write_bytes(b"GIF89a")
    found, words = said(capsys, root)
    assert (found.paths, found.classes) == (("a/1.png",), ("a",))
    assert "left out 1 images beside the class folders" in words
    assert "beside.png" in words
    assert f"no images in {root / 'gifs'}: not a class" in words


posix = pytest.mark.skipif(os.name != "posix", reason="POSIX file systems only")


@posix
def test_links_to_folders_are_followed_and_loops_refused(tmp_path: Path) -> None:
    folder_of(tmp_path / "there", "1.png", "deep/2.png")
    root = tmp_path / "set"
    root.mkdir()
    (root / "cat").symlink_to(tmp_path / "there", target_is_directory=True)
    assert open_images(root).paths == ("cat/1.png", "cat/deep/2.png")
    for target in (root, tmp_path / "there" / "deep"):
        (tmp_path / "there" / "deep" / "back").symlink_to(target, target_is_directory=True)
        with pytest.raises(InputError, match="leads back to one above it"):
            open_images(root)
        (tmp_path / "there" / "deep" / "back").unlink()


@posix
def test_a_broken_link_is_an_unreadable_image_and_a_pipe_is_refused(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", "a/1.png")
    (root / "a" / "2.png").symlink_to(tmp_path / "absent.png")
    found = open_images(root)
    assert found.paths == ("a/1.png", "a/2.png")
    with pytest.raises(FileNotFoundError):
        found.read(1, EXACT)
    os.mkfifo(root / "a" / "3.png")
    with pytest.raises(InputError, match=r"3\.png is no regular file"):
        open_images(root)


@posix
def test_names_that_are_no_utf8_are_read_and_names_with_line_breaks_refused(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", os.fsdecode(b"a/\xff.png"))
    assert open_images(root).read(0, EXACT).shape == (8, 8, 3)
    save(root / "a" / "two\nlines.png", picture(8, 8))
    with pytest.raises(InputError, match="a file name holds a tab or a line break") as error:
        open_images(root)
    assert r"'a/two\nlines.png'" in error.value.evidence


def test_opening_a_folder_opens_no_file_and_asks_for_no_files_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder_of(tmp_path / "set", *(f"c{i % 3}/{i:03}.png" for i in range(60)))
    asked: list[str] = []
    stat = os.stat

    def count(path: object, **kwargs: object) -> os.stat_result:
        asked.append(str(path))
        return stat(path, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", count)
    monkeypatch.setattr("builtins.open", lambda path, *_, **__: asked.append(str(path)))
    assert len(open_images(root)) == 60
    assert not [path for path in asked if path.endswith(".png")]


# ImageNet's validation images


def flat(root: Path, numbers: tuple[int, ...] = (1, 2, 48981)) -> Path:
    return folder_of(root, *(f"ILSVRC2012_val_{i:08}.JPEG" for i in numbers))


VAL_MAP = "ILSVRC2012_val_00000001.JPEG 65\nILSVRC2012_val_00000002.JPEG 970\nILSVRC2012_val_00048981.JPEG 0\n"
SOLUTION = (
    "ImageId,PredictionString\n"
    "ILSVRC2012_val_00048981,n01440764 85 1 499 272 \n"
    "ILSVRC2012_val_00000001,n01751748 111 108 431 202 n01751748 1 2 3 4 \n"
    "ILSVRC2012_val_00000002,n09193705 1 2 3 4 \n"
    "ILSVRC2012_val_00000003,n09193705 1 2 3 4 \n"
)
SYNSETS = "n01751748\nn09193705\n" + "n02000000\n" * 48978 + "n01440764\n" + "n02000000\n" * 1019


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("val_map.txt", VAL_MAP),
        ("val.txt", VAL_MAP),
        ("LOC_val_solution.csv", SOLUTION),
        ("imagenet_2012_validation_synset_labels.txt", SYNSETS),
    ],
)
@pytest.mark.parametrize("place", ["in the folder", "above it", "given"])
def test_validation_images_find_their_labels(tmp_path: Path, name: str, text: str, place: str) -> None:
    root = flat(tmp_path / "some" / "val")
    file = {"in the folder": root, "above it": root.parent, "given": tmp_path / "elsewhere"}[place] / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    found = open_images(root, file if place == "given" else None)
    assert found.paths == tuple(f"ILSVRC2012_val_{i:08}.JPEG" for i in (1, 2, 48981))
    assert (found.labels, found.classes) == ((65, 970, 0), imagenet.ids())


def test_kaggles_layout_has_its_labels_four_folders_up(tmp_path: Path) -> None:
    root = flat(tmp_path / "imagenet" / "ILSVRC" / "Data" / "CLS-LOC" / "val")
    (tmp_path / "imagenet" / "LOC_val_solution.csv").write_text(SOLUTION)
    assert open_images(root).labels == (65, 970, 0)


def test_validation_images_without_labels_can_calibrate(tmp_path: Path) -> None:
    root = flat(tmp_path / "val")
    (root / "val.txt").write_text("notes about something else\n")
    assert open_images(root).labels is None


def test_the_development_kits_numbers_are_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = flat(tmp_path / "val")
    kit = root / "ILSVRC2012_validation_ground_truth.txt"
    kit.write_text("490\n361\n171\n")
    found, words = said(capsys, root)  # lying beside the images it keeps nobody from calibrating
    assert found.labels is None
    assert "numbers classes in an order of its own" in words
    with pytest.raises(InputError, match="numbers alone, and which class each stands for is not known") as error:
        open_images(root, kit)
    assert "meta.mat" in error.value.evidence
    assert "LOC_val_solution.csv" in error.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (VAL_MAP.replace(" 970", " 1000"), r"val_00000002\.JPEG: no class '1000'"),
        (VAL_MAP.replace(" 970", " n00000000"), r"val_00000002\.JPEG: no class 'n00000000'"),
        (VAL_MAP.replace(" 970", " -1"), "no class '-1'"),
        (VAL_MAP.replace(" 970", " 9" + "9" * 5000), "no class"),
        (VAL_MAP + VAL_MAP, r"line 4: 'ILSVRC2012_val_00000001.JPEG' has a label already"),
        (VAL_MAP[:63], "no label for 1 of 3 images"),
        ("tench\ngoldfish\n", "does not say which image each of its 2 lines belongs to"),
        ("n01440764\n" * 3, "does not say which image each of its 3 lines"),
        ("", "no label for 3 of 3 images"),
    ],
)
def test_a_ground_truth_that_does_not_fit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    root = flat(tmp_path / "val")
    (tmp_path / "truth.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        open_images(root, tmp_path / "truth.txt")


def test_labels_that_count_from_one_are_guessed_at(tmp_path: Path) -> None:
    root = flat(tmp_path / "val")
    (tmp_path / "truth.txt").write_text(VAL_MAP.replace(" 970", " 1000"))
    with pytest.raises(InputError) as error:
        open_images(root, tmp_path / "truth.txt")
    assert (error.value.evidence, "count from 1" in error.value.hint) == ("there are 1,000, counted from 0", True)


def test_any_flat_folder_takes_labels_by_name(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", "b.png", "a.png")
    (tmp_path / "truth.txt").write_text("somewhere/a.png\tcat\nb dog\n")
    found = open_images(root, tmp_path / "truth.txt")
    assert (found.paths, found.labels, found.classes) == (("a.png", "b.png"), (0, 1), ("cat", "dog"))


# list files, further


def test_a_list_of_paths_alone_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("# MLPerf's calibration list\nILSVRC2012_val_00027145.JPEG\nmy cat.jpg\n")
    found = open_images(tmp_path / "list.txt")
    assert (found.paths, found.labels) == (("ILSVRC2012_val_00027145.JPEG", "my cat.jpg"), None)


def test_a_manifest_without_labels_is_a_list_file(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", "b.png", "a.png")
    images = open_images(root)
    (root / "list.txt").write_text(Manifest.of(images).to_text())
    assert open_images(root / "list.txt") == images


def test_a_list_may_name_wordnet_ids(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.png n15075141\nb.png n01440764\n")
    found = open_images(tmp_path / "list.txt")
    assert (found.labels, found.classes) == ((999, 0), imagenet.ids())


@pytest.mark.parametrize(
    ("text", "names", "classes", "message"),
    [
        ("a.png 0\nb.png 1\na.png 1\n", None, None, r"line 3: 'a\.png' is listed already"),
        ("a.png 0\nb.png 2\n", "cat\ndog\n", None, r"line 2: no class '2'"),
        ("a.png 0\nb.png 10\n", None, 10, r"line 2: no class '10'"),
        ("a.png 99999999999999999999\n", None, None, "no class"),
        ("a.png 1\nb.png\t-\n", None, None, "line 2: expected"),
    ],
)
def test_a_list_that_cannot_be_right_is_refused_by_line(
    tmp_path: Path, text: str, names: str | None, classes: int | None, message: str
) -> None:
    (tmp_path / "list.txt").write_text(text)
    (tmp_path / "names.txt").write_text(names or "")
    with pytest.raises(InputError, match=message):
        open_images(tmp_path / "list.txt", tmp_path / "names.txt" if names else None, classes)


def test_a_line_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"a.png 0\nb\xff.png 1\n")
    with pytest.raises(InputError, match="cannot read") as error:
        open_images(tmp_path / "list.txt")
    assert error.value.evidence == r"line 2 is not UTF-8: b'b\xff.png 1'"


# CSV


@pytest.mark.parametrize(
    ("text", "labels", "classes"),
    [
        ("path,label\na.png,3\nb.png,0\n", (3, 0), ()),
        ("Label;Filename\nzebra fish;a.png\nant;b.png\n", (1, 0), ("ant", "zebra fish")),
        ('image,other,class\n"a.png","x, y",dog\n\nb.png,,cat\n', (1, 0), ("cat", "dog")),
        ("file\ttarget\r\na.png\tn15075141\r\nb.png\tn01440764\r\n", (999, 0), imagenet.ids()),
        ("\ufeffpath,class,label\na.png,cat,1\nb.png,dog,0\n", (1, 0), ()),
    ],
)
def test_csv_columns_are_found_by_their_names(
    tmp_path: Path, text: str, labels: tuple[int, ...], classes: tuple[str, ...]
) -> None:
    (tmp_path / "set.csv").write_text(text, encoding="utf-8", newline="")
    found = open_images(tmp_path / "set.csv")
    assert (found.paths, found.labels, found.classes) == (("a.png", "b.png"), labels, classes)
    assert found.root == tmp_path


def test_csv_paths_may_be_quoted(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text('path,label\n"a, ""b"".png",1\n')
    assert open_images(tmp_path / "set.csv").paths == ('a, "b".png',)


def test_only_a_line_break_ends_a_line_of_csv(tmp_path: Path) -> None:
    names = ("a\u2028b.png", "c\x0cd.png", "e\x85f.png")
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "set.csv").write_bytes(end.join(["path,label", *(f"{name},1" for name in names)]).encode())
        assert open_images(tmp_path / "set.csv").paths == names


@pytest.mark.parametrize(
    ("content", "message", "evidence"),
    [
        (b"", "no column for the path", "names nothing"),
        (b"name,label\na.png,1\n", "no column for the path", "'name', 'label'"),
        (b"path,kind\na.png,1\n", "no column for the label", "'path', 'kind'"),
        (b"path,label\na.png,1\nb.png\n", "line 3: expected a path and a label", "1 columns, 2 in the header"),
        (b"path,label\na.png,1,2\n", "line 2: expected", "3 columns"),
        (b"path,label\na.png,\n", "line 2: expected", "''"),
        (b'path,label\n"a.png,1\n', "not valid CSV", ""),
        (b"path,label\na.png,1\na.png,1\n", "line 3: 'a.png' is listed already", "line 2"),
        (b"path,label\na\xff.png,1\n", "cannot read", "line 2 is not UTF-8"),
        (b"path,label\na.png,1\nb.png,cat\n", "some labels are numbers", "'cat'"),
        (b'path,label\n"a\nb.png",1\n', "a tab or a line break", "nb.png"),
    ],
)
def test_bad_csv_is_refused_by_line(tmp_path: Path, content: bytes, message: str, evidence: str) -> None:
    (tmp_path / "set.csv").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        open_images(tmp_path / "set.csv")
    assert evidence in error.value.evidence


# tar shards


def encoded(seed: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture(8, 8, seed)).save(stream, kind)
    return stream.getvalue()


def tar(path: Path, *members: tuple[str | tarfile.TarInfo, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(content))
    return path


def pairs(*keys: str) -> list[tuple[str | tarfile.TarInfo, bytes]]:
    found: list[tuple[str | tarfile.TarInfo, bytes]] = []
    for i, key in enumerate(keys):
        found += [(f"{key}.png", encoded(i)), (f"{key}.cls", b"%d\n" % (10 * i))]
    return found


def test_a_shard_is_read_in_place_sorted_by_key(tmp_path: Path) -> None:
    found = open_images(tar(tmp_path / "a.tar", *pairs("0002", "0001", "./dir/0003")))
    assert found.paths == ("a.tar/0001.png", "a.tar/0002.png", "a.tar/dir/0003.png")
    assert (found.labels, found.classes, found.root) == ((10, 0, 20), (), tmp_path)
    for i, seed in enumerate((1, 0, 2)):
        np.testing.assert_array_equal(found.read(i, EXACT), picture(8, 8, seed))
        assert found.hashes()[i] == hashlib.sha256(encoded(seed)).hexdigest()
        with found.open(i) as stream:
            assert stream.read() == encoded(seed)


def test_a_loader_takes_shards(tmp_path: Path) -> None:
    images = open_images(tar(tmp_path / "a.tar", *pairs(*"abcde")))
    first, second = Loader(images, EXACT, batch=3)
    assert [batch.labels.tolist() for batch in (first, second) if batch.labels is not None] == [[0, 10, 20], [30, 40]]
    np.testing.assert_array_equal(second.pixels, normalize(np.stack([picture(8, 8, 3), picture(8, 8, 4)]), EXACT))


def test_a_subset_of_shards_reads_its_own_images(tmp_path: Path) -> None:
    tar(tmp_path / "set" / "b.tar", *pairs(*"wxyz"))
    tar(tmp_path / "set" / "a.tar", *pairs(*"wxyz"))  # keys may begin anew in every shard
    whole = open_images(tmp_path / "set")
    assert whole.paths[:4] == ("a.tar/w.png", "a.tar/x.png", "a.tar/y.png", "a.tar/z.png")
    part = whole.subset(3, seed=1)
    assert len(part) == 3
    for i, path in enumerate(part.paths):
        j = whole.paths.index(path)
        assert part.hashes()[i] == whole.hashes()[j]
        np.testing.assert_array_equal(part.read(i, EXACT), whole.read(j, EXACT))


@pytest.mark.parametrize("source", ["set", "set/*.tar", "set/?.tar", "*/*.tar"])
def test_shards_are_a_folder_or_a_pattern(tmp_path: Path, source: str) -> None:
    for name in "ab":
        tar(tmp_path / "set" / f"{name}.tar", *pairs("1", "2"))
    found = open_images(str(tmp_path / source))
    assert [p.removeprefix("set/") for p in found.paths] == ["a.tar/1.png", "a.tar/2.png", "b.tar/1.png", "b.tar/2.png"]


def test_many_threads_read_one_shard(tmp_path: Path) -> None:
    found = open_images(tar(tmp_path / "a.tar", *pairs(*(f"{i:02}" for i in range(40)))))
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda i: found.read(i % 40, EXACT).tobytes(), range(400)))
    assert read == [picture(8, 8, i % 40).tobytes() for i in range(400)]


@pytest.mark.parametrize(
    ("files", "labels", "classes"),
    [
        ({"a.jpg": b"x", "a.cls": b"7"}, (7,), ()),
        ({"a.JPEG": b"x", "a.json": b'{"label": 7, "more": [1]}'}, (7,), ()),
        ({"a.webp": b"x", "a.txt": b"dog\n", "b.png": b"x", "b.txt": b"cat"}, (1, 0), ("cat", "dog")),
        ({"a.jpg": b"x", "a.txt": b"a caption", "a.json": b'{"label": "n01440764"}'}, (0,), imagenet.ids()),
        ({"a.jpg": b"x", "a.txt": b"a caption", "a.json": b'{"label": 3}', "a.cls": b"4"}, (4,), ()),
        ({"a.jpg": b"x", "a.seg.png": b"x", "a.cls": b"4", "a.npy": b"x", "README": b"x", "._a.jpg": b"x"}, (4,), ()),
        ({"a.jpg": b"x", "b.jpg": b"x"}, None, ()),
    ],
)
def test_a_label_is_an_index_a_json_or_a_name(
    tmp_path: Path, files: dict[str, bytes], labels: tuple[int, ...] | None, classes: tuple[str, ...]
) -> None:
    found = open_images(tar(tmp_path / "a.tar", *files.items()))
    assert (found.labels, found.classes) == (labels, classes)
    assert len(found) == sum(name.split(".", 1)[-1].lower() in shards.IMAGES for name in files)


def test_the_validation_tar_takes_its_labels_from_a_ground_truth(tmp_path: Path) -> None:
    path = tar(tmp_path / "ILSVRC2012_img_val.tar", *((f"ILSVRC2012_val_{i:08}.JPEG", b"x") for i in (1, 2, 48981)))
    (tmp_path / "truth.csv").write_text(SOLUTION)
    found = open_images(path, tmp_path / "truth.csv")
    assert (found.labels, found.classes) == ((65, 970, 0), imagenet.ids())


def kind(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    ("members", "message", "evidence"),
    [
        ([("../../etc/a.jpg", b"x")], "a name that leads out of the archive", "'../../etc/a.jpg'"),
        ([("a/../../b.jpg", b"x")], "a name that leads out", "'a/../../b.jpg'"),
        ([("/etc/a.jpg", b"x")], "a name that leads out", "'/etc/a.jpg'"),
        ([("C:\\a.jpg", b"x")], "a name that leads out", "C:"),
        ([("..\\a.jpg", b"x")], "a name that leads out", "a.jpg"),
        ([(kind("a.jpg", tarfile.SYMTYPE, "/etc/passwd"), b"")], "a link", "'a.jpg' -> '/etc/passwd'"),
        ([("b.jpg", b"x"), (kind("a.jpg", tarfile.LNKTYPE, "b.jpg"), b"")], "a link", "'a.jpg' -> 'b.jpg'"),
        ([(kind("a.jpg", tarfile.FIFOTYPE), b"")], "a sparse or special file", "'a.jpg'"),
        ([(kind("a.jpg", tarfile.CHRTYPE), b"")], "a sparse or special file", "'a.jpg'"),
        ([("a.jpg", b"x"), ("a.jpg", b"y")], "one name twice", "'a.jpg'"),
        ([("a.jpg", b"x"), ("./a.jpg", b"y")], "one name twice", "'a.jpg'"),
        ([("a.jpg", b"x"), ("a.png", b"y")], "two images for 'a'", "a.jpg and a.png"),
        ([("a.jpg", b"x"), ("b.cls", b"1"), ("a.cls", b"1")], "a label without an image", "'b.cls'"),
        ([("a.jpg", b"x"), ("b.jpg", b"1"), ("a.cls", b"1")], "an image without a label", "'b.jpg'"),
        ([("a.jpg", b"x"), ("a.json", b"{")], "a label that cannot be read", "'a.json'"),
        ([("a.jpg", b"x"), ("a.json", b"[" * 100_000)], "a label that cannot be read", "'a.json'"),
        ([("a.jpg", b"x"), ("a.cls", b"\xff")], "a label that cannot be read", "'a.cls'"),
        ([("a.jpg", b"x"), ("a.txt", b"x" * 2_000_000)], "a label of 2,000,000 bytes", "'a.txt'"),
    ],
)
def test_what_does_not_belong_in_a_shard_is_refused_by_name(
    tmp_path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]], message: str, evidence: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        open_images(tar(tmp_path / "a.tar", *members))
    assert evidence in error.value.evidence
    assert "a.tar" in error.value.cause


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" * 3 + size.ljust(12, b"\0") + b"0" * 11 + b"\0" + b" " * 8)
    block += kind + b"\0" * 100 + b"ustar\x0000" + b"\0" * 247
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block[:512].ljust(512, b"\0"))


END = b"\0" * 1024


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read .*a.tar as a tar file"),
        (b"no tar at all" * 100, "cannot read .*a.tar as a tar file"),
        (header(b"a.jpg", b"00000000001") + b"x" * 512, "is cut short"),
        (header(b"a.jpg", b"00000004000") + b"x" * 512, "as a tar file"),
        (header(b"a.jpg", b"00000000001") + b"x" * 512 + b"y" * 512 + END, "is damaged"),
        (header(b"a.jpg", b"\x80" + b"\0" * 3 + b"\x7f" * 8) + END, "holds a file of .* bytes|as a tar file"),
        (header(b"a.jpg", b"00400000000") + END, "as a tar file|is cut short"),
        (header(b"a.jpg", b"\xff" * 12) + END, "a header that points backward|as a tar file"),
        (header(b"a.jpg", b"\xff" * 10 + b"\xf0\x00") + END, "a header that points backward|as a tar file"),
        (header(b"x", b"\xff" * 12, b"x") + END, "as a tar file"),
        (header(b"x", b"77777777777", b"L") + END, "as a tar file"),
        (header(b"x", b"00000000012", b"x") + b"99999 size=-512\n".ljust(512, b"\0") + header(b"a", b"0") + END, "."),
        (header(b"x", b"00000000020", b"x") + b"16 size=-99999\n\n".ljust(512, b"\0") + header(b"a", b"0") + END, "."),
        (header(b"x", b"0", b"x") * 3000 + END, "."),
    ],
)
def test_a_damaged_or_hostile_tar_is_refused_and_never_followed(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_images(tmp_path / "a.tar")


def test_a_member_as_large_as_a_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with open(path, "wb") as f:  # sparse: takes no room on the disk
        f.write(header(b"a.jpg", b"%011o" % (300 << 20)))
        f.truncate((300 << 20) + 2048)
    with pytest.raises(InputError, match="a file of 314,572,800 bytes, more than 268,435,456"):
        open_images(path)


def test_archives_joined_with_cat_are_refused(tmp_path: Path) -> None:
    one = tar(tmp_path / "1.tar", *pairs("a")).read_bytes()
    (tmp_path / "joined.tar").write_bytes(one + one)
    with pytest.raises(InputError, match="goes on after its end mark") as error:
        open_images(tmp_path / "joined.tar")
    assert "tar -A" in error.value.hint


@pytest.mark.parametrize("seed", range(60))
def test_a_tar_with_random_damage_is_read_or_refused(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    whole = bytearray(tar(tmp_path / "a.tar", *pairs(*"abcdef")).read_bytes())
    for place in rng.integers(0, 12 * 1024, 1 + seed % 7):
        whole[place] = rng.integers(0, 256)
    (tmp_path / "a.tar").write_bytes(whole[: rng.integers(512, len(whole))] if seed % 3 == 0 else whole)
    try:
        found = open_images(tmp_path / "a.tar")
    except InputError:
        return
    assert len(found) == 6  # what opens has lost nothing


def test_a_shard_that_changed_since_is_noticed(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", *pairs("a", "b"))
    found = open_images(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(InputError, match="was cut short since it was opened"):
        found.read(1, EXACT)
    path.unlink()
    with pytest.raises(InputError, match=r"cannot read .*a\.tar"):
        found.hashes()


# what is no set of images


@pytest.mark.parametrize("name", ["a.zip", "a.tgz", "a.tar.gz", "A.TAR.XZ", "a.7z"])
def test_compressed_archives_are_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match="is a compressed archive") as error:
        open_images(tmp_path / name)
    assert "unpack it and give the folder" in error.value.hint


def test_a_zip_by_another_name_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "images").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="is a compressed archive"):
        open_images(tmp_path / "images")


def test_one_image_is_no_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.png is one image, not a set"):
        open_images(save(tmp_path / "a.png", picture(8, 8)))


def test_a_pattern_is_for_shards_alone(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png")
    with pytest.raises(InputError, match=r"\*\.png matches .*a\.png"):
        open_images(str(tmp_path / "*.png"))
    with pytest.raises(InputError, match="no images at"):
        open_images(str(tmp_path / "*.tar"))
