from __future__ import annotations

import contextlib
import hashlib
import http.server
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from conftest import folder_of
from fsspec.implementations.memory import MemoryFileSystem

from edgeres import pipeline, pixels, remote
from edgeres.data import ImageSet, Manifest
from edgeres.errors import InputError, MissingDependency, UsageError
from edgeres.job import Job
from edgeres.layouts import open_images
from edgeres.loader import Loader
from edgeres.pack import Pack, open_pack, write_pack
from edgeres.recipe import Preprocess, load_recipe, resolve
from edgeres.remote import Address, Unreachable

SMALL = Preprocess(crop=8, resize=8, interpolation="nearest")
ROW = 8 * 8 * 3


class Recorded:
    """An open file that notes what is read of it."""

    def __init__(self, file: Any, path: str, asked: list[tuple[str, int | None, int | None]]) -> None:
        self.file, self.path, self.asked = file, path, asked
        self.seek = file.seek

    def read(self, size: int) -> bytes:
        start = self.file.tell()
        content: bytes = self.file.read(size)
        self.asked.append((self.path, start, start + len(content)))
        return content

    def __enter__(self) -> Recorded:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Counted(MemoryFileSystem):
    """Files in memory, and what was asked of them: (path, start, end) of each read; errors that come first."""

    protocol = "counted"
    cachable = False
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    asked: list[tuple[str, int | None, int | None]] = []
    errors: list[Exception] = []
    cut = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = MemoryFileSystem._strip_protocol(path.removeprefix("counted:/"))
        return stripped

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self.asked.append((path, start, end))
        if self.errors:
            raise self.errors.pop()
        content: bytes = super().cat_file(path, start, end, **kwargs)
        return content[: len(content) - self.cut]

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return (
            Recorded(super()._open(path, mode, **kwargs), path, self.asked)
            if mode == "rb"
            else super()._open(path, mode, **kwargs)
        )

    def bytes_read(self) -> int:
        return sum(
            (len(self.store[path].getvalue()) if end is None else end) - (start or 0) for path, start, end in self.asked
        )


fsspec.register_implementation("counted", Counted, clobber=True)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """An empty file system at counted://."""
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    yield Counted()
    for kept in (Counted.store, Counted.asked, Counted.errors, MemoryFileSystem.store):
        kept.clear()
    Counted.cut = 0
    Counted.pseudo_dirs[:] = [""]


def put(there: Counted, path: Path) -> str:
    """A copy of a file or folder, and its address."""
    there.put(str(path), f"/{path.name}", recursive=True)
    there.asked.clear()
    return f"counted://{path.name}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with folders in them, names that a plain sort of paths would put elsewhere, and what is left out."""
    names = ("a/1.png", "a/b/2.png", "a/b.png", "a/b-c.png", "a/b c#?%.png", "é/4.png", "é/0.PNG")
    root = folder_of(tmp_path / "set", *names, "a/.hidden/1.png", ".thumbs/1.png", "beside.png")
    (root / "a" / "notes.txt").write_text("no image")
    (root / "papers").mkdir()
    (root / "papers" / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def packed(tmp_path: Path) -> Pack:
    """100 images of 192 bytes."""
    images = open_images(folder_of(tmp_path / "many", *(f"{'ab'[i % 2]}/{i:03}.png" for i in range(100))))
    return write_pack(images, SMALL, tmp_path / "set.pack")


def read(images: ImageSet) -> np.ndarray:
    return np.stack([images.read(i, SMALL) for i in range(len(images))])


def assert_same(found: ImageSet, expected: ImageSet) -> None:
    assert (found.paths, found.labels, found.classes) == (expected.paths, expected.labels, expected.classes)
    assert Manifest.of(found).digest() == Manifest.of(expected).digest()
    np.testing.assert_array_equal(read(found), read(expected))


# sets


@pytest.mark.parametrize("protocol", ["counted", "memory", "file"])
def test_a_folder_at_an_address_is_the_set_that_it_is_here(
    folder: Path, there: Counted, protocol: str, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"file://{folder}"
    if protocol != "file":
        fsspec.filesystem(protocol).put(str(folder), "/set", recursive=True)
        address = f"{protocol}://set"
    here = open_images(folder)
    said_here = capsys.readouterr().err
    found = open_images(address)
    assert capsys.readouterr().err == said_here.replace(str(folder), address)
    assert found.paths[:4] == ("a/1.png", "a/b/2.png", "a/b c#?%.png", "a/b-c.png")
    assert_same(found, here)
    assert_same(open_images(f"{address}/"), here)
    assert_same(found.subset(3), here.subset(3))
    assert found.open(1).read() == (folder / "a/b/2.png").read_bytes()
    for a, b in zip(Loader(found, SMALL, 3), Loader(here, SMALL, 3), strict=True):
        np.testing.assert_array_equal(a.pixels, b.pixels)


@pytest.mark.parametrize("kind", ["list", "bare", "csv", "flat", "up"])
def test_lists_and_ground_truths_are_read_there_too(tmp_path: Path, there: Counted, kind: str) -> None:
    root = folder_of(tmp_path / "val", *(f"ILSVRC2012_val_0000000{i}.JPEG" for i in range(1, 5)))
    names = sorted(p.name for p in root.iterdir())
    (tmp_path / "labels.txt").write_text("".join(f"class{i}\n" for i in range(1000)))
    name = {"list": "list.txt", "bare": "list.txt", "csv": "list.csv", "flat": "val_map.txt", "up": "../val.txt"}[kind]
    rows = [("./" * (i % 2) + n, 10 * i) for i, n in enumerate(names)]
    text = {
        "bare": "".join(f"{n}\n" for n, _ in rows),
        "csv": "".join(["path,label\n", *(f"{n},{i}\n" for n, i in rows)]),
    }
    (root / name).write_text(text.get(kind, "".join(f"{n} {i}\n" for n, i in rows)))
    there.put(str(tmp_path), "/bucket", recursive=True)
    address = "counted://bucket/val"
    end = "" if kind in ("flat", "up") else f"/{name}"
    assert_same(open_images(f"{address}{end}"), open_images(f"{root}{end}"))
    assert (open_images(f"{address}{end}").labels is None) == (kind == "bare")
    if kind == "list":
        named = open_images(f"{address}{end}", "counted://bucket/labels.txt")
        assert named.classes == open_images(f"{root}{end}", tmp_path / "labels.txt").classes


def test_a_list_may_name_folders_above_and_other_addresses(tmp_path: Path, there: Counted) -> None:
    root = folder_of(tmp_path / "set", "lists/x.png", "train/y.png", "z.png")
    (root / "lists" / "list.txt").write_text("x.png 0\n../train/y.png 1\nmemory://z.png 2\n")
    put(there, root)
    fsspec.filesystem("memory").put(str(root / "z.png"), "/z.png")
    images = open_images("counted://set/lists/list.txt")
    assert images.hashes() == tuple(
        hashlib.sha256((root / name).read_bytes()).hexdigest() for name in ("lists/x.png", "train/y.png", "z.png")
    )


def test_opening_a_folder_reads_no_image_and_reading_one_reads_that(folder: Path, there: Counted) -> None:
    images = open_images(put(there, folder))
    assert there.asked == []
    images.read(1, SMALL)
    assert there.asked == [("/set/a/b/2.png", None, None)]


def test_an_image_that_cannot_be_read_is_named(folder: Path, there: Counted) -> None:
    (folder / "a" / "1.png").write_bytes(b"no image")
    images = open_images(put(there, folder))
    there.rm_file("/set/a/b.png")
    with pytest.raises(InputError, match="2 unreadable images in counted://set") as error:
        list(Loader(images, SMALL))
    assert error.value.evidence.split("\n") == [
        "a/1.png: not an image that Pillow knows: it starts with b'no image'",
        "a/b.png: nothing at counted://set/a/b.png",
    ]
    loader = Loader(images, SMALL, skip_bad=True)
    assert sum(len(b.index) for b in loader) == len(images) - 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("counted://nowhere", "no images at counted://nowhere"),
        ("counted://set/papers", "no images in counted://set/papers"),
        ("counted://set/a/1.png", "is one image, not a set"),
        ("counted://set/val.zip", "is a compressed archive"),
        ("counted://set/zipped", "is a compressed archive"),
        ("counted://set/val-0.tar", "is a tar file at an address"),
        ("counted://tars", "is a tar file at an address"),
        ("https://example.invalid/val/", "https://example.invalid/val/ names no file"),
        ("nonsense://x", "cannot read nonsense://x\nProtocol not known: nonsense"),
    ],
)
def test_what_cannot_be_a_set_is_refused(folder: Path, there: Counted, source: str, message: str) -> None:
    put(there, folder)
    for name in ("set/val.zip", "set/val-0.tar", "tars/1.tar"):
        there.pipe(f"/{name}", b"1234")
    there.pipe("/set/zipped", b"PK\x03\x04")
    with pytest.raises(InputError, match=re.escape(message)):
        open_images(source)


# packs


def test_a_pack_at_an_address_is_the_pack_that_it_is_here(packed: Pack, there: Counted) -> None:
    for address in (put(there, packed.root), f"file://{packed.root}"):
        found = open_images(address)
        assert_same(found, packed)
        assert str(found.root) == address
        found.verify()
        for a, b in zip(Loader(found, SMALL, 32), Loader(packed, SMALL, 32), strict=True):
            np.testing.assert_array_equal(a.pixels, b.pixels)
    with pytest.raises(UsageError, match="has its labels inside"):
        open_images(address, "labels.txt")


def test_metadata_are_read_once_and_pixels_in_blocks_each_once(
    packed: Pack, there: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels, "BLOCK", 7 * ROW)
    found = open_images(put(there, packed.root))
    header = found.pixels.header
    assert there.asked == [("/set.pack", 0, 4096), ("/set.pack", header.start, header.start + header.length)]
    there.asked.clear()
    for threads in (1, 8):  # also if many threads want rows of one block
        assert sum(len(b.index) for b in Loader(found, SMALL, 16, threads=threads)) == 100
        edges = [(pixels.PAGE + i * ROW, pixels.PAGE + min(i + 7, 100) * ROW) for i in range(0, 100, 7)]
        assert sorted((start, end) for _, start, end in there.asked) == edges
        there.asked.clear()
    assert not found.pixels._blocks  # nothing is kept of what was read


def test_a_subset_fetches_its_own_rows_and_neighbours_together(packed: Pack, there: Counted) -> None:
    found = open_images(put(there, packed.root)).take([3, 4, 5, 40, 70, 71, 2])
    there.asked.clear()
    np.testing.assert_array_equal(read(found), read(packed)[[3, 4, 5, 40, 70, 71, 2]])
    rows = [((start - pixels.PAGE) // ROW, (end - pixels.PAGE) // ROW) for _, start, end in there.asked]
    assert rows == [(3, 6), (40, 41), (70, 72), (2, 3)]
    assert there.bytes_read() == 7 * ROW


def test_rows_read_here_and_there_do_not_pile_up(packed: Pack, there: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "BLOCK", 4 * ROW)
    monkeypatch.setattr(pixels, "KEPT", 3)
    found, expected = open_images(put(there, packed.root)), read(packed)
    for i in (*range(0, 100, 5), *range(99, 0, -3)):
        np.testing.assert_array_equal(found.read(i, SMALL), expected[i])
        assert len(found.pixels._blocks) <= 3


def test_small_rows_are_fetched_a_bounded_number_at_a_time(
    packed: Pack, there: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels, "MOST", 10)
    found = open_images(put(there, packed.root))
    there.asked.clear()
    found.read(0, SMALL)
    assert there.bytes_read() == 10 * ROW


def test_a_damaged_pack_is_refused_there_too(packed: Pack, there: Counted) -> None:
    content = packed.root.read_bytes()
    for name, bad, message in (
        ("cut.pack", content[:-1], "was cut short"),
        ("text.pack", b"hello", "is not a pack"),
        ("header.pack", content[:20] + b"\xff" + content[21:], "damaged header"),
        ("metadata.pack", content[:-5] + b"\xff" + content[-4:], "damaged metadata"),
    ):
        there.pipe(f"/{name}", bad)
        with pytest.raises(InputError, match=f"counted://{name} .*{message}"):
            open_pack(f"counted://{name}")
    there.pipe("/pixels.pack", content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    with pytest.raises(InputError, match="damaged pixels"):
        open_pack("counted://pixels.pack").verify()


# other processes


def test_sets_at_an_address_are_read_in_other_processes(folder: Path, packed: Pack, tmp_path: Path) -> None:
    sets = [open_images(f"file://{folder}").take([2, 0]), open_images(f"file://{packed.root}").take(range(40, 45))]
    sent = pickle.dumps((sets, SMALL))
    assert len(sent) < 2000 < 5 * ROW + len(packed.root.read_bytes())
    code = """
import pickle, sys
import numpy as np
sets, preprocess = pickle.load(sys.stdin.buffer)
pickle.dump([np.stack([s.read(i, preprocess) for i in range(len(s))]) for s in sets], sys.stdout.buffer)
"""
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, cwd="/", check=True)
    for found, images in zip(pickle.loads(done.stdout), sets, strict=True):
        np.testing.assert_array_equal(found, read(images))
    again = pickle.loads(sent)[0]
    assert [str(s.root) for s in again] == [f"file://{folder}", f"file://{packed.root}"]


def test_a_pack_that_changed_at_its_address_is_refused(packed: Pack, there: Counted) -> None:
    found = open_images(put(there, packed.root))
    sent = pickle.dumps(found.take(range(10)))
    part = pickle.loads(sent)
    part.read(0, SMALL)
    head = len(there.asked)
    part.read(1, SMALL)
    assert len(there.asked) == head  # which pack it is was asked once
    there.pipe("/set.pack", write_pack(packed.take([1]), SMALL, Path("other.pack")).root.read_bytes())
    with pytest.raises(InputError, match=r"counted://set\.pack is another pack than the one that was opened"):
        pickle.loads(sent).read(0, SMALL)
    there.rm_file("/set.pack")
    with pytest.raises(InputError, match=r"nothing at counted://set\.pack"):
        list(Loader(pickle.loads(sent), SMALL, skip_bad=True))


# trouble


def test_what_may_pass_is_tried_again_and_what_does_not_is_said(packed: Pack, there: Counted) -> None:
    found = open_images(put(there, packed.root)).take([0])
    there.errors += [ConnectionResetError("reset"), TimeoutError("slow")]
    np.testing.assert_array_equal(found.read(0, SMALL), packed.read(0, SMALL))
    found = open_images("counted://set.pack")
    there.errors += [ConnectionResetError(f"reset {i}") for i in range(4)]
    with pytest.raises(Unreachable, match=r"cannot read counted://set\.pack\nreset 1"):
        found.read(0, SMALL)
    assert len(there.errors) == 1
    there.errors[:] = [PermissionError("not yours")] * 2
    with pytest.raises(Unreachable, match="not yours"):
        found.read(0, SMALL)
    assert len(there.errors) == 1
    there.errors.clear()
    np.testing.assert_array_equal(found.read(0, SMALL), packed.read(0, SMALL))  # a failure is not remembered


def test_an_error_of_the_web_is_tried_again_if_it_is_the_servers(there: Counted) -> None:
    there.pipe("/x", b"content")

    class Answer(Exception):
        status = 503

    behind = FileNotFoundError("x")
    behind.__cause__ = ConnectionRefusedError("nobody there")
    there.errors += [Answer(), behind]
    assert Address("counted://x").read_bytes() == b"content"
    there.errors += [behind] * 3
    with pytest.raises(Unreachable, match="nobody there"):
        Address("counted://x").read_bytes()
    Answer.status = 403
    there.errors += [Answer("no")] * 2
    with pytest.raises(Unreachable, match="no"):
        Address("counted://x").read_bytes()
    assert len(there.errors) == 1


def test_an_answer_of_another_length_is_refused(packed: Pack, there: Counted) -> None:
    found = open_images(put(there, packed.root))
    Counted.cut = 1
    with pytest.raises(Unreachable, match="in pieces") as error:
        found.read(0, SMALL)
    assert error.value.evidence == "asked for 19,200 bytes from 4,096 on, the answer has 19,199"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingDependency, match="s3:// needs a package of its own\nInstall s3fs to access S3"):
        open_images("s3://bucket/val.pack")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(MissingDependency) as error:
        open_images("s3://bucket/val.pack")
    assert error.value.hint == 'pip install "edgeres[remote]"'


def test_paths_need_no_fsspec(folder: Path) -> None:
    code = f"""
import sys
sys.modules["fsspec"] = None
from edgeres.job import Job
from edgeres.layouts import open_images
print(len(open_images({str(folder)!r})), "asyncio" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["7", "False"]


# addresses


@pytest.mark.parametrize(
    ("source", "is_one"),
    [
        ("s3://bucket/x", True),
        ("HTTPS://host/x", True),
        ("file:///x", True),
        ("git+ssh://x", True),
        ("C:\\images", False),
        ("val/a://b", False),
        ("s3:/bucket", False),
        ("1://x", False),
    ],
)
def test_addresses_and_paths_are_told_apart(source: str, is_one: bool) -> None:
    assert remote.is_address(source) is is_one
    assert isinstance(remote.place(source), Address if is_one else Path)


def test_the_parts_of_an_address() -> None:
    pack = Address("s3://bucket/val/set.pack")
    assert (pack.name, pack.suffix, str(pack.parent)) == ("set.pack", ".pack", "s3://bucket/val")
    assert [str(p) for p in pack.parents] == ["s3://bucket/val", "s3://bucket"]
    assert [str(p) for p in Address("file:///a/b").parents] == ["file:///a", "file:///"]
    assert Address("s3://bucket").parents == ()
    assert str(Address("s3://bucket/") / "a b#?.png") == "s3://bucket/a b#?.png"
    assert str(Address("s3://bucket/x//y") / "z.png") == "s3://bucket/x//y/z.png"
    assert str(Address("file:///") / "z.png") == "file:///z.png"
    assert (Address("http://host/list.txt?key=1").parent / "a b#?%.png").url == "http://host/a%20b%23%3F%25.png"


def test_passwords_and_signatures_are_not_shown() -> None:
    signed = Address("https://me:secret@host/val.pack?X-Signature=secret")
    assert str(signed) == "https://me@host/val.pack"
    assert (signed.name, signed.suffix) == ("val.pack", ".pack")
    assert "secret" not in repr(signed)
    assert str(Address("abfs://container@account/x")) == "abfs://container@account/x"
    assert "secret" in pickle.loads(pickle.dumps(signed)).url  # who reads it needs it


def test_recipes_keep_addresses(tmp_path: Path) -> None:
    (tmp_path / "edgeres.toml").write_text(
        '[validation]\nimages = "s3://bucket/val.pack"\n[calibration]\nimages = "set"\n'
    )
    (tmp_path / "set").mkdir()
    recipe = load_recipe(tmp_path, None, {"validation": {"labels": resolve("gs://bucket/labels.txt", tmp_path)}})
    assert recipe.validation.images == "s3://bucket/val.pack"
    assert recipe.validation.labels == "gs://bucket/labels.txt"
    assert recipe.calibration.images == str(tmp_path / "set")


# a web server


class Ranges(http.server.BaseHTTPRequestHandler):
    """Serves one pack, by range or, as many small servers do, always whole."""

    content = b""
    ranges = True
    sent = 0
    refuse = 0

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, body: bool) -> None:
        server = type(self)
        if body and server.refuse:
            server.refuse -= 1
            self.send_error(503)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.ranges else None
        content = self.content[int(asked[1]) : int(asked[2]) + 1] if asked else self.content
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content)))
        if asked:
            self.send_header("Content-Range", f"bytes {asked[1]}-{asked[2]}/{len(self.content)}")
        self.end_headers()
        if body:
            with contextlib.suppress(ConnectionError):  # who asked has seen enough
                for start in range(0, len(content), 1 << 16):
                    self.wfile.write(content[start : start + (1 << 16)])
                    server.sent += len(content[start : start + (1 << 16)])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def web(packed: Pack) -> Iterator[tuple[type[Ranges], str]]:
    pytest.importorskip("aiohttp", reason="fsspec's http needs aiohttp")
    handler = type("Handler", (Ranges,), {"content": packed.root.read_bytes()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield handler, f"http://127.0.0.1:{server.server_address[1]}/set.pack?key=secret"
        server.shutdown()
        thread.join()


def test_a_pack_on_a_web_server(web: tuple[type[Ranges], str], packed: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    handler, url = web
    images = open_images(url)
    assert handler.sent == len(packed.root.read_bytes()) - 100 * ROW  # header and metadata
    handler.sent, handler.refuse = 0, 2
    np.testing.assert_array_equal(read(images.take(range(50, 60))), read(packed)[50:60])
    assert handler.sent == 10 * ROW
    handler.refuse = 3
    with pytest.raises(Unreachable, match="503") as error:
        images.read(0, SMALL)
    assert "secret" not in str(error.value)


def test_a_web_server_without_ranges_is_refused_before_it_sends_all(
    web: tuple[type[Ranges], str], tmp_path: Path
) -> None:
    handler, url = web
    images = open_images(folder_of(tmp_path / "large", *(f"{i}.png" for i in range(100))))
    large = write_pack(images, Preprocess(crop=300, resize=300), tmp_path / "large.pack").root
    handler.ranges, handler.content = False, Path(str(large)).read_bytes()
    with pytest.raises(Unreachable, match="support range requests") as error:
        open_images(url)
    assert 2 * handler.sent < len(handler.content)
    assert "secret" not in str(error.value)


# the whole flow


def test_a_validation_gives_the_same_result_from_addresses(
    workspace: Path, tiny_path: Path, val_folder: Path, train_folder: Path
) -> None:
    results = []
    for start in ("", "file://"):
        flags = {"validation": {"images": f"{start}{val_folder}"}, "calibration": {"images": f"{start}{train_folder}"}}
        recipe = load_recipe(workspace, flags=flags)
        results += pipeline.run(Job(recipe, workspace, tiny_path), ("int8",))
        shutil.rmtree(workspace / "calibration")  # to be measured again
    here, there = results
    assert here["provenance"]["digests"] == there["provenance"]["digests"]
    for key in ("images", "drop", "agreement", "sqnr_db"):
        assert here[key] == there[key]


def test_a_network_that_is_down_is_no_bad_image(folder: Path, there: Counted) -> None:
    images = open_images(put(there, folder))
    there.errors += [PermissionError("not yours")]
    with pytest.raises(Unreachable, match="not yours"):
        list(Loader(images, SMALL, skip_bad=True))
