from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import threading
from pathlib import Path

import pytest

from edgeres import files
from edgeres.errors import InputError, UsageError


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert files.sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_sha256_without_file_digest_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(range(256)) * 5000)  # more than one chunk
    monkeypatch.delattr(hashlib, "file_digest", raising=False)
    assert files.sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["absent.bin", "."])
def test_sha256_of_what_is_no_file_names_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot read") as error:
        files.sha256_file(tmp_path / name)
    assert str(tmp_path / name) in error.value.cause
    assert error.value.evidence


def test_digest_does_not_depend_on_key_order() -> None:
    assert files.digest({"a": 1, "b": [1.5, None]}) == files.digest({"b": [1.5, None], "a": 1})
    assert files.digest({}) == hashlib.sha256(b"{}").hexdigest()


def test_digest_of_a_tuple_is_that_of_the_list_it_becomes_in_json() -> None:
    assert files.digest((1, 2)) == files.digest([1, 2])


@pytest.mark.parametrize("other", [{"a": 2}, {"a": "1"}, {"a": [1]}, {"b": 1}, {"a": 1, "b": None}, [["a", 1]]])
def test_digest_tells_values_apart(other: object) -> None:
    assert files.digest({"a": 1}) != files.digest(other)


def test_atomic_makes_folders_and_the_file_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    with files.atomic(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert os.listdir(path.parent) == ["a.txt"]
    assert path.read_text() == "whole"


def write_half(path: Path, error: BaseException) -> None:
    with files.atomic(path) as temporary:
        temporary.write_text("ne")
        raise error


def test_atomic_keeps_the_old_file_and_leaves_nothing_on_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="halfway"):
        write_half(path, RuntimeError("halfway"))
    assert os.listdir(tmp_path) == ["a.txt"]
    assert path.read_text() == "old"


def test_atomic_leaves_nothing_on_an_interrupt(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path / "a.txt", KeyboardInterrupt())
    assert os.listdir(tmp_path) == []


def test_atomic_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a long old text")
    with files.atomic(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_atomic_says_of_a_folder_that_it_is_one(tmp_path: Path) -> None:
    for path in (Path("."), tmp_path):
        with pytest.raises(IsADirectoryError, match="it is a folder"):
            files.write_json(path, {})


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no") as error, files.atomic(tmp_path / "a") as temporary:
        raise OSError(errno.EROFS, "no", str(temporary))
    assert error.value.filename == str(tmp_path / "a")
    with pytest.raises(OSError, match="no") as error, files.atomic(tmp_path / "a"):
        raise OSError(errno.EROFS, "no", "another")
    assert error.value.filename == "another"


def test_what_can_be_written_is_known_before_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    files.require_writable(tmp_path / "new" / "a.json")
    assert list((tmp_path / "new").iterdir()) == []
    files.require_writable(tmp_path / "file")
    for path, why in ((Path("."), "it is a folder"), (tmp_path, "it is a folder"), (tmp_path / "file" / "a", "")):
        with pytest.raises(InputError, match=f"cannot write {re.escape(str(path))}") as error:
            files.require_writable(path)
        assert why in error.value.evidence
        assert error.value.evidence
        assert "-o" in error.value.hint


def test_a_full_disk_is_seen_before_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> Path:  # it has names to give, and no room
        if path.parent == tmp_path:
            path.symlink_to("/dev/full")
        return path

    temporary_name = files.temporary_name
    monkeypatch.setattr(files, "temporary_name", lambda path: full(temporary_name(path)))
    with pytest.raises(InputError, match=rf"cannot write {tmp_path}/a\.json") as error:
        files.require_writable(tmp_path / "a.json")
    assert error.value.evidence == os.strerror(errno.ENOSPC)
    with pytest.raises(OSError, match="No space") as refused:
        files.write_json(tmp_path / "a.json", {})
    assert (refused.value.filename, refused.value.filename2) == (str(tmp_path / "a.json"), None)
    assert os.listdir(tmp_path) == []


def test_who_waited_for_a_file_that_is_gone_holds_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, waits, held = tmp_path / "a.part", threading.Event(), list[bool]()
    monkeypatch.setattr(files, "say", lambda text: waits.set())

    def wait() -> None:
        with files.alone(path, "writes it"):
            held.append(path.is_file())

    other = threading.Thread(target=wait)
    with files.alone(path, "writes it"):
        other.start()
        assert waits.wait(10)
        path.rename(tmp_path / "a")
    other.join()
    assert held == [True]


def test_to_json_writes_null_for_what_is_not_finite() -> None:
    value = {"a": [1.0, math.inf, (-math.inf, math.nan)], "b": {"c": math.nan, "d": "inf", "e": True}}
    assert json.loads(files.to_json(value)) == {
        "a": [1.0, None, [None, None]],
        "b": {"c": None, "d": "inf", "e": True},
    }


def test_write_json_and_read_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "x" / "a.json"
    value = {"name": "Zürich", "drop": 0.1, "rows": [1, None, {"deep": True}]}
    files.write_json(path, value)
    assert files.read_json(path, "a result") == value
    assert path.read_bytes().endswith(b"}\n")


def test_write_json_of_what_json_cannot_hold_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"new": object()})
    assert files.read_json(path, "a result") == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe{}", b"[1, 2]", b"3"])
def test_read_json_refuses_damaged_files_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a range table") as error:
        files.read_json(path, "a range table")
    assert str(path) in error.value.cause
    assert error.value.evidence


def test_read_json_of_a_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.json"):
        files.read_json(tmp_path / "absent.json", "a range table")


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.cache_folder() == tmp_path / "cache"  # conftest's
    monkeypatch.delenv("EDGERES_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_folder() == tmp_path / "xdg" / "edgeres"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.cache_folder() == tmp_path / "home" / ".cache" / "edgeres"


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("EDGERES_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(Path, "home", classmethod(homeless))
    with pytest.raises(UsageError, match="no folder for caches") as error:
        files.cache_folder()
    assert "EDGERES_CACHE=" in error.value.hint


def test_temporary_names_differ_where_process_numbers_do_not(tmp_path: Path) -> None:
    names = {files.temporary_name(tmp_path / "a.json") for _ in range(20)}
    assert len(names) == 20
    assert all(name.parent == tmp_path and name.match(".a.json.*.tmp") for name in names)
