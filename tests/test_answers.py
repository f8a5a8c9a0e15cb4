from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from edgeres import answers, progress
from edgeres.answers import HOLES, MISSING, WHOLE, About, Answers
from edgeres.errors import BuildError

ABOUT = About("n" * 64, "onnxruntime", "1.31.1", "p" * 64, "m" * 64, {"edgeres": "0.1.0"}, 70, 5, 32)
LOGITS = np.random.default_rng(0).standard_normal((70, 5)).astype(np.float32)


def fill(store: Answers, *batches: int) -> None:
    for batch in batches:
        places = np.asarray(store.places(batch))
        store.write(batch, places, LOGITS[places])


def test_a_store_is_plain_files(tmp_path: Path) -> None:
    with Answers(tmp_path, ABOUT) as store:
        assert (store.batches, store.places(0), store.places(2)) == (3, range(32), range(64, 70))
        fill(store, 2, 0, 1)
    folder = tmp_path / ABOUT.key
    assert [p.name for p in tmp_path.iterdir()] == [ABOUT.key]
    np.testing.assert_array_equal(np.fromfile(folder / "logits.f32", "<f4").reshape(70, 5), LOGITS)
    assert (folder / "done").read_bytes() == bytes([WHOLE] * 3)
    assert json.loads((folder / "about.json").read_text()) == asdict(ABOUT)


def test_what_was_written_is_there_for_the_next_run(tmp_path: Path) -> None:
    with Answers(tmp_path, ABOUT) as store:
        fill(store, 1)
    with Answers(tmp_path, ABOUT) as store:
        assert [store.state(b) for b in range(3)] == [MISSING, WHOLE, MISSING]
        np.testing.assert_array_equal(store.read(1), LOGITS[32:64])


def test_an_image_that_could_not_be_read_leaves_an_empty_row(tmp_path: Path) -> None:
    good = np.asarray([i for i in range(32, 64) if i not in (33, 63)])
    with Answers(tmp_path, ABOUT) as store:
        store.write(1, good, LOGITS[good])
        store.write(2, np.zeros(0, np.int64), np.zeros((0, 5), np.float32))
    with Answers(tmp_path, ABOUT) as store:
        assert [store.state(b) for b in range(3)] == [MISSING, HOLES, HOLES]
        assert np.flatnonzero(np.isnan(store.read(1)).all(1)).tolist() == [1, 31]
        np.testing.assert_array_equal(store.read(1)[good - 32], LOGITS[good])
        assert np.isnan(store.read(2)).all()


@pytest.mark.parametrize(
    "change",
    [
        {"network": "x" * 64},
        {"executor": "openvino"},
        {"version": "1.31.2"},
        {"preprocess": "x" * 64},
        {"manifest": "x" * 64},
        {"read_by": {"edgeres": "0.1.1"}},
        {"images": 71},
        {"classes": 6},
        {"batch": 16},
        {"shard": "1/2"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_has_a_store_of_its_own(tmp_path: Path, change: dict[str, Any]) -> None:
    with Answers(tmp_path, ABOUT) as store, Answers(tmp_path, replace(ABOUT, **change)) as other:
        fill(store, 0)
        store.flush()
        assert store.folder != other.folder
        assert other.state(0) == MISSING


def told(root: Path) -> tuple[list[int], str]:
    console = Console(file=io.StringIO(), width=300)
    with progress.to(console), Answers(root, ABOUT) as store:
        states = [store.state(b) for b in range(3)]
    return states, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("logits.f32", b"cut", "logits.f32 has 3 of 1,400 bytes"),
        ("logits.f32", None, "no logits.f32"),
        ("done", b"\1\1\1\1", "done has 4 of 3 bytes"),
        ("about.json", b"{", "cannot read answers"),
        ("about.json", b"{}", "about.json is of others"),
    ],
)
def test_a_damaged_store_is_made_anew_and_that_is_said(
    tmp_path: Path, name: str, content: bytes | None, word: str
) -> None:
    with Answers(tmp_path, ABOUT) as store:
        fill(store, 0, 1, 2)
    assert told(tmp_path) == ([WHOLE] * 3, "")
    path = tmp_path / ABOUT.key / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    states, said = told(tmp_path)
    assert states == [MISSING] * 3
    assert word in said
    assert "begin anew" in said


def test_rows_are_on_the_disk_before_they_are_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bytes, bool]] = []
    folder = tmp_path / ABOUT.key

    def fsync(_: int) -> None:
        there = np.fromfile(folder / "logits.f32", "<f4").reshape(70, 5)[:32]
        seen.append(((folder / "done").read_bytes(), bool((there == LOGITS[:32]).all())))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(answers, "SYNC_EVERY", 0.0)
    with Answers(tmp_path, ABOUT) as store:
        fill(store, 0)
        assert seen == [(bytes(3), True)]
        assert (folder / "done").read_bytes() == bytes([WHOLE, 0, 0])
        fill(store, 1)
        assert (len(seen), seen[1][0]) == (2, bytes([WHOLE, 0, 0]))
    assert len(seen) == 2  # nothing more to wait for


def test_waits_for_the_disk_are_a_second_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(answers.time, "monotonic", lambda: now[0])
    with Answers(tmp_path, ABOUT) as store:
        done = store.folder / "done"
        fill(store, 0)
        now[0] += 0.9
        fill(store, 1)
        assert done.read_bytes() == bytes(3)
        assert [store.state(b) for b in range(3)] == [WHOLE, WHOLE, MISSING]
        now[0] += 0.2
        fill(store, 2)
        assert done.read_bytes() == bytes([WHOLE] * 3)


def test_a_full_disk_keeps_what_was_written_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device", "logits.f32")

    store = Answers(tmp_path, ABOUT)
    fill(store, 0)
    monkeypatch.setattr(store, "_logits", Full(store.folder / "logits.f32", "r+b"))
    with pytest.raises(OSError, match="No space left"):
        fill(store, 1)
    store._logits.close()
    monkeypatch.undo()
    store.close()
    assert told(tmp_path)[0] == [WHOLE, MISSING, MISSING]


def test_a_write_that_takes_a_part_goes_on_with_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[:100]) or 0

    with Answers(tmp_path, ABOUT) as store:
        with Slow(store.folder / "logits.f32", "r+b") as slow, monkeypatch.context() as patch:
            patch.setattr(store, "_logits", slow)
            fill(store, 0, 1, 2)
            store.flush()
        for batch in range(3):
            np.testing.assert_array_equal(store.read(batch), LOGITS[store.places(batch)])


def test_a_network_of_other_classes_is_refused(tmp_path: Path) -> None:
    with Answers(tmp_path, ABOUT) as store:
        with pytest.raises(BuildError, match="gives 6 logits, and the model has 5 classes"):
            store.write(0, np.arange(32), np.zeros((32, 6), np.float32))
        assert store.state(0) == MISSING


def test_a_removed_store_leaves_nothing_and_closing_twice_is_safe(tmp_path: Path) -> None:
    with Answers(tmp_path, ABOUT) as store, Answers(tmp_path, ABOUT) as other:
        fill(store, 0)
        store.flush()
        store.remove()
        assert list(tmp_path.iterdir()) == []
        np.testing.assert_array_equal(other.read(0), LOGITS[:32])  # who reads it reads on
        store.close()


FILL = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_answers import ABOUT, fill
from edgeres.answers import Answers
with Answers(Path(sys.argv[2]), ABOUT) as store:
    print(store.batches, flush=True)
    sys.stdin.readline()
    fill(store, *[int(b) for b in sys.argv[3:]])
"""


def test_several_processes_fill_one_store(tmp_path: Path) -> None:
    def start(*batches: str) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", FILL, str(Path(__file__).parent), str(tmp_path), *batches]
        return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    processes = [start("0", "2"), start("1", "0")]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "3\n"  # both have it open
    for process in processes:
        process.communicate("go\n")
        assert process.returncode == 0
    with Answers(tmp_path, ABOUT) as store:
        for batch in range(3):
            np.testing.assert_array_equal(store.read(batch), LOGITS[store.places(batch)])


def test_who_makes_a_store_second_takes_the_first_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quicker(path: Path, value: Any) -> None:
        monkeypatch.undo()
        answers.write_json(path, value)
        with Answers(tmp_path, ABOUT) as other:
            fill(other, 1)

    monkeypatch.setattr(answers, "write_json", quicker)
    with Answers(tmp_path, ABOUT) as store:
        assert store.state(1) == WHOLE
    assert [p.name for p in tmp_path.iterdir()] == [ABOUT.key]
