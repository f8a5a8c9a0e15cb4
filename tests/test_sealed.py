from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import subprocess
import tarfile
import time
import tracemalloc
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from edgeres import sealed
from edgeres.errors import EdgeresError, InputError
from edgeres.sealed import Sealed, write

MEMBERS: dict[str, Path | bytes] = {
    "manifest.json": b'{"format": 1}\n',
    "data/images.pack": bytes(range(256)) * 2,  # whole blocks: no padding after it
    "empty.txt": b"",
    "model.onnx": b"\xff\x00onnx" * 100,
}


@pytest.fixture
def box(tmp_path: Path) -> Path:
    write(tmp_path / "a.bundle", MEMBERS)
    return tmp_path / "a.bundle"


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "tester", "-f", path], check=True)
    return path


@pytest.fixture
def signed(tmp_path: Path, key: Path) -> Path:
    write(tmp_path / "signed.bundle", MEMBERS, sign_with=key)
    return tmp_path / "signed.bundle"


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(path: Path, signed_by: Path | None = None) -> InputError:
    """Open and unpack ``path``; its refusal, which has left nothing behind."""
    before = tree(path.parent)
    with pytest.raises(InputError) as error:
        Sealed.open(path, signed_by).unpack(path.parent / "new" / "unpacked")
    assert tree(path.parent) == before
    assert not (path.parent / "new").exists()
    assert error.value.evidence
    assert error.value.hint
    return error.value


def test_members_are_read_and_unpacked_as_they_were(box: Path, tmp_path: Path) -> None:
    archive = Sealed.open(box)
    assert list(archive.members) == list(MEMBERS)
    assert {name: archive.read(name) for name in MEMBERS} == MEMBERS
    assert archive.signer is None
    assert archive.members["model.onnx"].size == 600
    archive.unpack(tmp_path / "new" / "deep")
    assert tree(tmp_path / "new" / "deep") == MEMBERS | {"SHA256SUMS": archive.sums}
    assert archive.digest == hashlib.sha256(archive.sums).hexdigest()


def test_files_and_bytes_make_the_same_archive_in_any_folder(tmp_path: Path, box: Path) -> None:
    sources = dict[str, Path | bytes]()
    for i, (name, data) in enumerate(MEMBERS.items()):
        assert isinstance(data, bytes)
        sources[name] = tmp_path / f"source{i}"
        (tmp_path / f"source{i}").write_bytes(data)
    os.utime(tmp_path / "source0", (1, 1))
    (tmp_path / "source1").chmod(0o777)
    digest = write(tmp_path / "elsewhere" / "b.bundle", sources)
    assert (tmp_path / "elsewhere" / "b.bundle").read_bytes() == box.read_bytes()
    assert digest == Sealed.open(box).digest


def test_the_order_given_is_the_order_in_the_archive(tmp_path: Path) -> None:
    write(tmp_path / "b", dict(reversed(MEMBERS.items())))
    assert list(Sealed.open(tmp_path / "b").members) == list(reversed(MEMBERS))


def test_tar_unpacks_it_and_sha256sum_checks_it(signed: Path, tmp_path: Path) -> None:
    (tmp_path / "by_tar").mkdir()
    listed = subprocess.run(["tar", "tf", signed], capture_output=True, text=True, check=True)
    assert listed.stdout.splitlines() == ["SHA256SUMS", "SHA256SUMS.sig", *MEMBERS]
    done = subprocess.run(["tar", "xf", signed, "-C", "by_tar"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    checked = subprocess.run(
        ["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd="by_tar", capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout == "".join(f"{name}: OK\n" for name in MEMBERS)
    Sealed.open(signed).unpack(tmp_path / "by_edgeres")
    assert tree(tmp_path / "by_tar") == tree(tmp_path / "by_edgeres")


def test_headers_are_those_of_an_independent_writer(box: Path) -> None:
    with tarfile.open(box) as archive:
        for info in archive:
            theirs = tarfile.TarInfo(info.name)
            theirs.size = info.size
            assert sealed._header(info.name, info.size) == theirs.tobuf(tarfile.USTAR_FORMAT)
    assert box.stat().st_size % sealed.BLOCK == 0


def test_a_member_of_more_than_8_gib_is_read_by_tar_and_by_edgeres(tmp_path: Path) -> None:
    size, path = (8 << 30) + 5, tmp_path / "large"
    sums = f"{'0' * 64}  large.bin\n".encode()
    with open(path, "wb") as f:
        f.write(sealed._header("SHA256SUMS", len(sums)) + sums.ljust(512, b"\0") + sealed._header("large.bin", size))
        f.truncate(512 * 3 + size + -size % 512 + 1024)  # a hole: no such disk is needed
    assert Sealed.open(path).members["large.bin"].size == size
    listed = subprocess.run(["tar", "tvf", path], capture_output=True, text=True, check=True)
    assert f" {size} " in listed.stdout
    assert sealed._header("a", (8 << 30) - 1)[124:136] == b"77777777777\0"  # the largest in octal


SMALL: dict[str, Path | bytes] = {"a.json": b"{}\n", "b": b""}


def taken(path: Path, places: Iterable[int]) -> list[int]:
    """Those bytes of an archive that can be changed (a bit each) without a refusal; there should be none."""
    data, found = bytearray(path.read_bytes()), []
    for i in places:
        data[i] ^= 1 << i % 8
        path.write_bytes(data)
        data[i] ^= 1 << i % 8
        with suppress(InputError):
            Sealed.open(path).unpack(path.parent / "unpacked")
            found.append(i)
    return found


def test_every_changed_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "small"
    write(path, SMALL)
    size = path.stat().st_size
    assert size == 512 * 2 + 512 * 2 + 512 + 1024
    assert taken(path, range(size)) == []
    assert os.listdir(tmp_path) == ["small"]


def test_changed_bytes_of_a_signed_archive_are_refused(tmp_path: Path, key: Path) -> None:
    path = tmp_path / "small"
    write(path, SMALL, sign_with=key)
    archive = Sealed.open(path)
    # ssh-keygen runs for each change of these, so only some are made
    checked = [*range(512, 512 + len(archive.sums)), *range(1536, 1536 + len(archive.signature or b""))]
    rest = set(range(path.stat().st_size)) - set(checked)
    assert len(rest) > 4000
    assert taken(path, [*rest, *checked[::13], 1535 + len("-----BEGIN SSH SIGNATURE-----\n")]) == []
    assert os.listdir(tmp_path) == ["small"]


def test_every_changed_byte_of_a_member_is_refused_when_it_is_read(box: Path) -> None:
    data, archive = bytearray(box.read_bytes()), Sealed.open(box)
    for member in archive.members.values():
        for i in range(member.offset, member.offset + member.size, 37):
            data[i] ^= 1
            box.write_bytes(data)
            data[i] ^= 1
            with pytest.raises(InputError, match=member.name):
                archive.read(member.name)


def test_an_archive_cut_anywhere_is_refused(box: Path) -> None:
    data = box.read_bytes()
    for size in [*range(0, len(data), 128), len(data) - 1]:
        box.write_bytes(data[:size])
        assert "cut short" in refused(box).cause or size < 512


@pytest.mark.parametrize("more", [b"\0", bytes(512), bytes(10240), b"x" * 600])
def test_bytes_after_the_end_are_refused(box: Path, more: bytes) -> None:
    box.write_bytes(box.read_bytes() + more)
    assert "has bytes after its end" in refused(box).cause


def test_other_files_are_no_archives(tmp_path: Path, box: Path) -> None:
    other = tmp_path / "other.tar"
    with tarfile.open(other, "w") as archive:
        archive.add(box, "a.bundle")
    assert "is not a bundle" in refused(other).cause
    other.write_bytes(b"")
    assert "is not a bundle" in refused(other).cause
    for data in (b"PK\x03\x04" * 1000, bytes(1024), bytes(10240)):
        other.write_bytes(data)
        assert "is not a bundle" in refused(other).cause
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(InputError, match="cannot read"):
            Sealed.open(path)


Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, data: bytes = b"", **fields: Any) -> Entry:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def hostile(path: Path, entries: list[Entry], sums: str | None = None) -> Path:
    """What an attacker writes with tarfile: a right SHA256SUMS (unless given), then anything."""
    if sums is None:
        sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {info.name}\n" for info, data in entries)
    with open(path, "wb") as f:
        for info, data in [entry("SHA256SUMS", sums.encode("latin-1")), *entries]:
            f.write(info.tobuf(tarfile.USTAR_FORMAT, "latin-1") + data + bytes(-len(data) % 512))
        f.write(bytes(1024))
    return path


def test_what_the_attacker_writes_differs_in_nothing_else(tmp_path: Path, box: Path) -> None:
    path = hostile(tmp_path / "h", [entry(n, d) for n, d in MEMBERS.items() if isinstance(d, bytes)])
    assert path.read_bytes() == box.read_bytes()


NAMES = [
    "/etc/x",
    "../x",
    "a/../x",
    "./x",
    "a/./x",
    "a//x",
    "a/",
    "..",
    ".",
    "",
    "C:/x",
    "C:x",
    "a\\x",
    "a\nx",
    "a\x1bx",
]
NAMES += ["a\0x", "a\x7fx", "a b", "é", "con", "a/NUL", "com1.txt", "x.", "a./x", "~x", "x" * 101, "a*", "\u017f"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_mean_something_else_somewhere_are_neither_written_nor_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot write"):
        write(tmp_path / "w", {name: b"x"})
    assert os.listdir(tmp_path) == []
    if len(name) > 100 or name == "\u017f":  # ustar, as tarfile writes it here, has no room for it
        return
    refused(hostile(tmp_path / "h", [entry(name, b"x")]))
    refused(hostile(tmp_path / "h", [entry(name, b"x")], f"{hashlib.sha256(b'x').hexdigest()}  plain\n"))


@pytest.mark.parametrize("name", ["a", ".a", "-", "a/b/c-d_e.F9", "console.txt", "x" * 100])
def test_plain_names_are_taken(tmp_path: Path, name: str) -> None:
    write(tmp_path / "w", {name: b"x"})
    Sealed.open(tmp_path / "w").unpack(tmp_path / "u")
    assert (tmp_path / "u" / name).read_bytes() == b"x"


@pytest.mark.parametrize(
    "names", [("a", "A"), ("d/a", "D/A"), ("a", "a/b"), ("a/b", "A"), ("sha256sums",), ("SHA256SUMS.sig",)]
)
def test_names_that_collide_are_neither_written_nor_read(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="cannot write") as error:
        write(tmp_path / "w", dict.fromkeys(names, b"x"))
    assert "ignore case" in error.value.evidence
    refused(hostile(tmp_path / "h", [entry(name, b"x") for name in names]))


def test_files_of_one_folder_do_not_collide(tmp_path: Path) -> None:
    write(tmp_path / "w", {"d/a": b"1", "d/e/b": b"2", "d/e/c": b"3"})
    Sealed.open(tmp_path / "w").unpack(tmp_path / "u")
    assert tree(tmp_path / "u").keys() == {"SHA256SUMS", "d/a", "d/e/b", "d/e/c"}


KINDS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE]
KINDS += [tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE, b"g"]


@pytest.mark.parametrize("kind", KINDS)
def test_links_folders_devices_and_extensions_are_refused(tmp_path: Path, kind: bytes) -> None:
    error = refused(hostile(tmp_path / "h", [entry("x", b"", type=kind, linkname="/etc/passwd")]))
    assert "'x' is a link, a folder or a device" in error.evidence or kind == tarfile.DIRTYPE


FIELDS: dict[str, Any] = {
    "mode": 0o4755,
    "uid": 1,
    "gid": 1,
    "mtime": 1,
    "uname": "root",
    "gname": "x",
    "linkname": "y",
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_header_that_says_more_than_name_and_size_is_refused(tmp_path: Path, field: str) -> None:
    error = refused(hostile(tmp_path / "h", [entry("x", b"data", **{field: FIELDS[field]})]))
    assert "the header of x" in error.evidence


@pytest.mark.parametrize(
    "digits", [b"-0000000512\0", b"-1" + bytes(10), b"\x80" + b"\xff" * 11, b"\xff" * 12, b"99999999999\0"]
)
def test_hostile_sizes_are_refused(box: Path, digits: bytes) -> None:
    data = bytearray(box.read_bytes())
    at = 1024
    data[at + 124 : at + 136] = digits
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    box.write_bytes(data)
    error = refused(box)
    assert "the header of manifest.json" in error.evidence or (digits[0] == 0x80 and "cut short" in error.cause)


def test_a_size_in_base_256_that_octal_would_hold_is_refused(box: Path) -> None:
    data = bytearray(box.read_bytes())
    data[1024 + 124 : 1024 + 136] = b"\x80" + int(data[1024 + 124 : 1024 + 135], 8).to_bytes(11, "big")
    data[1024 + 148 : 1024 + 156] = b" " * 8
    data[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(data[1024:1536])
    box.write_bytes(data)
    assert "the header of manifest.json" in refused(box).evidence


def test_members_and_sums_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    a, b, path = entry("a", b"1"), entry("b", b"2"), tmp_path / "h"
    line = {info.name: f"{hashlib.sha256(data).hexdigest()}  {info.name}\n" for info, data in (a, b)}
    assert "b is in SHA256SUMS, but not in the archive" in refused(hostile(path, [a], line["a"] + line["b"])).evidence
    assert "b is not in SHA256SUMS" in refused(hostile(path, [a, b], line["a"])).evidence
    assert "a is there twice" in refused(hostile(path, [a, a, b], line["a"] + line["b"])).evidence
    assert "another order" in refused(hostile(path, [b, a], line["a"] + line["b"])).evidence
    assert "a is another member" in refused(hostile(path, [a], line["a"] * 2)).evidence
    assert "SHA256SUMS is not in" in refused(hostile(path, [a, entry("SHA256SUMS", b"")], line["a"])).evidence
    assert "SHA256SUMS.sig is not in" in refused(hostile(path, [a, entry("SHA256SUMS.sig")], line["a"])).evidence
    twice = [entry("SHA256SUMS.sig"), entry("SHA256SUMS.sig"), a]
    assert "SHA256SUMS.sig is not in" in refused(hostile(path, twice, line["a"])).evidence
    assert "a has SHA-256" in refused(hostile(path, [a], f"{'1' * 64}  a\n")).evidence


SUM = hashlib.sha256(b"1").hexdigest()
SUMS = [
    f"{SUM}  a",
    f"{SUM} *a\n",
    f"{SUM}  a\r\n",
    f"{SUM.upper()}  a\n",
    f"{SUM}  a\n\n",
    f"\n{SUM}  a\n",
    f"# x\n{SUM}  a\n",
]
SUMS += [f"\\{SUM}  a\n", f"{SUM[:-1]}  a\n", "SHA256 (a) = {SUM}\n", f"{SUM}  a\nx", f" {SUM}  a\n", f"{SUM}  a\n\xff"]


@pytest.mark.parametrize("sums", SUMS)
def test_other_forms_of_sums_are_refused(tmp_path: Path, sums: str) -> None:
    assert "SHA256SUMS" in refused(hostile(tmp_path / "h", [entry("a", b"1")], sums)).evidence


def test_sums_and_signature_that_would_fill_memory_are_refused(tmp_path: Path) -> None:
    for names in (["SHA256SUMS"], ["SHA256SUMS", "SHA256SUMS.sig"]):
        with open(tmp_path / "h", "wb") as f:
            for name in names[:-1]:
                f.write(sealed._header(name, 0))
            f.write(sealed._header(names[-1], 1 << 40))
            f.truncate((1 << 40) + 4096)
        tracemalloc.start()
        with pytest.raises(InputError) as error:
            Sealed.open(tmp_path / "h")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
        assert f"{names[-1]} has 1,099,511,627,776 bytes" in error.value.evidence


def test_too_many_members_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed, "LONGEST", 100)
    with pytest.raises(InputError, match="cannot write"):
        write(tmp_path / "w", {"a": b"", "b": b""})
    assert os.listdir(tmp_path) == []


def test_memory_does_not_grow_with_a_member(tmp_path: Path) -> None:
    with open(tmp_path / "zeros", "wb") as f:
        f.truncate(40 << 20)
    tracemalloc.start()
    write(tmp_path / "w", {"zeros": tmp_path / "zeros"})
    Sealed.open(tmp_path / "w").unpack(tmp_path / "u")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    assert (tmp_path / "u" / "zeros").stat().st_size == 40 << 20


def test_a_missing_source_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        write(tmp_path / "w", {"a": tmp_path / "absent"})
    assert os.listdir(tmp_path) == []


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(b"one")
    (tmp_path / "w").write_bytes(b"old")

    def changed(path: Path) -> Any:
        path.write_bytes(b"two")
        return open(path, "rb")

    monkeypatch.setattr(sealed, "_open", changed)
    with pytest.raises(InputError, match="changed while it was read"):
        write(tmp_path / "w", {"a": tmp_path / "source"})
    assert sorted(os.listdir(tmp_path)) == ["source", "w"]
    assert (tmp_path / "w").read_bytes() == b"old"


def test_reading_what_is_not_there_names_what_is(box: Path) -> None:
    with pytest.raises(InputError, match=r"has no weights\.bin") as error:
        Sealed.open(box).read("weights.bin")
    assert "model.onnx" in error.value.evidence


# unpack


def test_a_whole_folder_is_used_again_with_what_is_beside(box: Path, tmp_path: Path) -> None:
    archive, folder = Sealed.open(box), tmp_path / "u"
    archive.unpack(folder)
    (folder / "engine.plan").write_bytes(b"built here")
    before = (folder / "model.onnx").stat().st_ino
    archive.unpack(folder)
    assert (folder / "model.onnx").stat().st_ino == before
    assert (folder / "engine.plan").read_bytes() == b"built here"


def change(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"\xff\x00onny" * 100)


def lose(folder: Path) -> None:
    (folder / "data" / "images.pack").unlink()


def link(folder: Path) -> None:
    (folder / "model.onnx").rename(folder.parent / "outside")
    (folder / "model.onnx").symlink_to(folder.parent / "outside")


def unsum(folder: Path) -> None:
    (folder / "SHA256SUMS").write_bytes(b"")


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("damage", [change, lose, link, unsum, empty])
def test_a_damaged_folder_is_made_anew(box: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    archive, folder = Sealed.open(box), tmp_path / "u"
    archive.unpack(folder)
    whole = tree(folder)
    damage(folder)
    archive.unpack(folder)
    assert tree(folder) == whole
    assert not (folder / "model.onnx").is_symlink()


def test_a_damaged_signature_in_the_folder_is_made_anew(signed: Path, tmp_path: Path) -> None:
    archive = Sealed.open(signed)
    archive.unpack(tmp_path / "u")
    (tmp_path / "u" / "SHA256SUMS.sig").write_bytes(b"")
    archive.unpack(tmp_path / "u")
    assert (tmp_path / "u" / "SHA256SUMS.sig").read_bytes() == archive.signature


def test_a_folder_with_other_files_is_not_removed(box: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "holiday.jpg").write_bytes(b"irreplaceable")
    with pytest.raises(InputError, match="photos is there") as error:
        Sealed.open(box).unpack(folder)
    assert "holiday.jpg" in error.value.evidence
    assert tree(folder) == {"holiday.jpg": b"irreplaceable"}
    with pytest.raises(InputError) as error:
        Sealed.open(box).unpack(folder / "holiday.jpg")
    assert "it is a file" in error.value.evidence
    assert sorted(os.listdir(tmp_path)) == ["a.bundle", "photos"]


def test_a_damaged_folder_stays_where_the_archive_is_damaged_too(box: Path, tmp_path: Path) -> None:
    archive, folder = Sealed.open(box), tmp_path / "u"
    archive.unpack(folder)
    lose(folder)
    left = tree(folder)
    data = bytearray(box.read_bytes())
    data[archive.members["model.onnx"].offset] ^= 1
    box.write_bytes(data)
    with pytest.raises(InputError, match="not as it was made"):
        archive.unpack(folder)
    assert tree(folder) == left
    assert sorted(os.listdir(tmp_path)) == ["a.bundle", "u"]


def test_no_room_is_said_before_anything_is_written(box: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1500, 1500))
    with pytest.raises(EdgeresError, match="no room to unpack") as error:
        Sealed.open(box).unpack(tmp_path / "new" / "u")
    assert "1,500 are free" in error.value.evidence
    assert "--work" in error.value.hint
    with pytest.raises(EdgeresError, match="no room to write") as error:
        write(tmp_path / "b", MEMBERS)
    assert "-o" in error.value.hint
    assert os.listdir(tmp_path) == ["a.bundle"]


def test_a_disk_that_fills_meanwhile_is_left_as_it_was(
    box: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full takes no byte, as a full disk does; it is the second file that meets it."""
    opened = open

    def opens(path: Any, mode: str = "r") -> Any:
        full = mode == "wb" and re.fullmatch(r"images\.pack|\.b\.\w+\.tmp", Path(path).name)
        if full:
            opened(path, mode).close()
        return opened("/dev/full" if full else path, mode)

    monkeypatch.setattr(sealed, "open", opens, raising=False)
    for work in (lambda: Sealed.open(box).unpack(tmp_path / "new" / "u"), lambda: write(tmp_path / "b", MEMBERS)):
        with pytest.raises(EdgeresError, match="no room to") as error:
            work()
        assert os.strerror(errno.ENOSPC) in error.value.evidence
        assert os.listdir(tmp_path) == ["a.bundle"]


def test_another_error_of_the_disk_passes_as_it_is(box: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(sealed, "_copy", fails)
    with pytest.raises(OSError, match="the disk is broken"):
        Sealed.open(box).unpack(tmp_path / "new" / "u")
    assert os.listdir(tmp_path) == ["a.bundle"]


def test_an_interrupted_unpack_leaves_nothing(box: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, pieces = sealed._copy, []

    def stops(*arguments: Any) -> str:
        pieces.append(tree(tmp_path))
        if len(pieces) == 3:
            raise KeyboardInterrupt
        return copy(*arguments)

    monkeypatch.setattr(sealed, "_copy", stops)
    with pytest.raises(KeyboardInterrupt):
        Sealed.open(box).unpack(tmp_path / "new" / "u")
    assert len(pieces[2]) > 1, "something had been written"
    assert os.listdir(tmp_path) == ["a.bundle"]


@pytest.mark.parametrize("whole", [False, True])
def test_what_a_killed_unpack_left_is_removed_by_a_later_one(box: Path, tmp_path: Path, whole: bool) -> None:
    if whole:  # as another one made it meanwhile
        Sealed.open(box).unpack(tmp_path / "u[1]")
    ages = {".u[1].1.tmp": 90, ".u[1].2.tmp": 7200, ".u[1].3.tmp": 90, ".u1.1.tmp": 7200}
    for name, age in ages.items():
        (folder := tmp_path / name).mkdir()
        (folder / "model.onnx").write_bytes(b"half")
        for path in (folder / "model.onnx", folder):
            os.utime(path, (time.time() - age,) * 2)
    os.utime(tmp_path / ".u[1].3.tmp" / "model.onnx")  # it has only begun
    with sealed._locked(tmp_path / ".u[1].2.tmp", wait=True):  # it is at work, and the clock was set
        Sealed.open(box).unpack(tmp_path / "u[1]")
    assert sorted(os.listdir(tmp_path)) == [".u1.1.tmp", ".u[1].2.tmp", ".u[1].3.tmp", "a.bundle", "u[1]"]


def test_without_locks_what_is_left_stays_for_an_hour(
    box: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no locks here")

    monkeypatch.setattr("fcntl.flock", none)
    for name, age in {".u.1.tmp": 90, ".u.2.tmp": 7200}.items():
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    Sealed.open(box).unpack(tmp_path / "u")
    assert sorted(os.listdir(tmp_path)) == [".u.1.tmp", "a.bundle", "u"]


def test_who_unpacks_holds_the_folder(box: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, held = sealed._copy, list[bool]()

    def look(*arguments: Any) -> str:
        (folder,) = tmp_path.glob(".u.*.tmp")
        try:
            with sealed._locked(folder, wait=False):
                held.append(False)
        except BlockingIOError:
            held.append(True)
        return copy(*arguments)

    monkeypatch.setattr(sealed, "_copy", look)
    Sealed.open(box).unpack(tmp_path / "u")
    assert held == [True] * len(MEMBERS)


def test_a_quicker_process_is_no_error(box: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, unpack = Sealed.open(box), Sealed._unpack

    def slow(self: Sealed, folder: Path) -> None:
        unpack(self, folder)
        monkeypatch.undo()
        archive.unpack(tmp_path / "quick")
        (tmp_path / "quick").rename(tmp_path / "u")
        monkeypatch.setattr(sealed.shutil, "rmtree", lambda *_, **__: None)  # it came after the look, so to say
        monkeypatch.setattr(Path, "exists", lambda _: False)

    monkeypatch.setattr(Sealed, "_unpack", slow)
    archive.unpack(tmp_path / "u")
    monkeypatch.undo()
    assert tree(tmp_path / "u") == MEMBERS | {"SHA256SUMS": archive.sums}


# signatures


def test_a_signed_archive_names_its_signer_and_is_reproducible(signed: Path, tmp_path: Path, key: Path) -> None:
    archive = Sealed.open(signed, signed_by=key.with_suffix(".pub"))
    shown = subprocess.run(["ssh-keygen", "-l", "-f", key], capture_output=True, text=True, check=True).stdout
    assert archive.signer == shown.split()[1]
    assert write(tmp_path / "b", MEMBERS, sign_with=key) == archive.digest
    assert (tmp_path / "b").read_bytes() == signed.read_bytes()
    assert write(tmp_path / "unsigned", MEMBERS) == archive.digest
    assert {name: archive.read(name) for name in MEMBERS} == MEMBERS


def test_ssh_keygen_verifies_it_alone(signed: Path, tmp_path: Path, key: Path) -> None:
    Sealed.open(signed).unpack(tmp_path / "u")
    (tmp_path / "allowed").write_text(f"me {key.with_suffix('.pub').read_text()}")
    command = "ssh-keygen -Y verify -n edgeres-bundle -f ../allowed -I me -s SHA256SUMS.sig < SHA256SUMS"
    done = subprocess.run(command, shell=True, cwd=tmp_path / "u", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'Good "edgeres-bundle" signature for me' in done.stdout


def test_another_signer_and_none_are_refused_where_one_is_asked_for(signed: Path, box: Path, key: Path) -> None:
    other = signed.with_name("other")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    pub, both = other.with_name("other.pub"), other.with_name("both.pub")
    error = refused(signed, signed_by=pub)
    assert "is not signed by" in error.cause
    assert str(Sealed.open(signed).signer) in error.evidence
    assert "it is not signed" in refused(box, signed_by=key.with_suffix(".pub")).evidence
    both.write_text(f"# who may sign\n\n{pub.read_text()}{key.with_suffix('.pub').read_text()}")
    assert Sealed.open(signed, signed_by=both).signer


def test_a_signature_of_other_sums_is_refused(signed: Path, tmp_path: Path, key: Path) -> None:
    write(tmp_path / "b", MEMBERS | {"model.onnx": b"\xff\x00ONNX" * 100}, sign_with=key)
    ours, theirs = signed.read_bytes(), (tmp_path / "b").read_bytes()
    signed.write_bytes(ours[:1536] + theirs[1536:2048] + ours[2048:])
    assert "a signature of something else" in refused(signed).cause
    signed.write_bytes(theirs[:1024] + ours[1024:2048] + theirs[2048:])  # their sums and files, our signature
    assert "a signature of something else" in refused(signed).cause


def test_a_key_that_cannot_sign_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot sign with"):
        write(tmp_path / "b", MEMBERS, sign_with=tmp_path / "absent")
    assert os.listdir(tmp_path) == []


def test_pieces_are_copied_up_to_the_size_and_no_further() -> None:
    out = io.BytesIO()
    assert sealed._copy(io.BytesIO(b"abcdef"), 3, out) == hashlib.sha256(b"abc").hexdigest()
    assert out.getvalue() == b"abc"
