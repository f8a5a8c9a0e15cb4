from __future__ import annotations

import hashlib
import io
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import edgeres
from edgeres import download as module
from edgeres import progress
from edgeres.download import ATTEMPTS, download
from edgeres.errors import InputError

BODY = bytes(range(256)) * 12288
"""3 MiB, more than is read at once."""
SHA256 = hashlib.sha256(BODY).hexdigest()
MIB = 3.0
CUT = 2_000_000


@dataclass
class Server:
    """What is served, and what was asked for.

    ``cut``: bytes after which each of the next answers ends; a number too many for none. ``ranges``: whether Range is
    understood. ``status``: what is answered instead of the file.
    """

    url: str = ""
    body: bytes = BODY
    cut: list[int] = field(default_factory=list)
    ranges: bool = True
    length: bool = True
    status: int = 200
    raw: bytes | None = None
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    agents: set[str | None] = field(default_factory=set)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Published files from this machine, no farther."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers["Range"]
            state.asked.append((self.path, wanted))
            state.agents.add(self.headers["User-Agent"])
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", state.url)
                self.end_headers()
            elif state.raw is not None:
                self.wfile.write(state.raw)
                if not state.raw:
                    self.connection.shutdown(socket.SHUT_RDWR)
            elif state.status != 200:
                self.send_error(state.status)
            elif wanted and state.ranges:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                if start >= len(state.body):
                    self.send_error(416)
                else:
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{len(state.body) - 1}/{len(state.body)}")
                    self.send_body(state.body[start:])
            else:
                self.send_response(200)
                self.send_body(state.body)

        def send_body(self, body: bytes) -> None:
            if state.length:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: state.cut.pop(0)] if state.cut else body)

        def log_message(self, *_args: Any) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.url = f"http://127.0.0.1:{http.server_port}/models/resnet50-test.pth"
        yield state
        http.shutdown()
        thread.join()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the file shall lie, in a folder that is not there yet."""
    return tmp_path / "cache" / "weights" / "resnet50-test.pth"


def part_of(path: Path) -> Path:
    return path.with_name("resnet50-test.pth.part")


def write_part(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True)
    part_of(path).write_bytes(content)


def files_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


def refused(url: str, path: Path, match: str, sha256: str = SHA256, mib: float | None = MIB) -> InputError:
    """The error; every one names the file's address and the two ways to go on without the network."""
    with pytest.raises(InputError, match=match) as error:
        download(url, path, sha256, mib)
    assert url in error.value.cause
    assert "--weights FILE" in error.value.hint
    assert "`edgeres demo`" in error.value.hint
    assert not path.exists()
    return error.value


# whole transfers


@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("sha256", [SHA256, SHA256[:8]])
@pytest.mark.parametrize("mib", [None, 3.0, 2.95, 3.05])
def test_a_file_arrives_whole_with_one_request(
    server: Server, path: Path, tmp_path: Path, length: bool, sha256: str, mib: float | None
) -> None:
    server.length = length
    download(server.url, path, sha256, mib)
    assert path.read_bytes() == BODY
    assert files_in(tmp_path) == [path.name]
    assert server.asked == [("/models/resnet50-test.pth", None)]
    assert server.agents == {f"edgeres/{edgeres.__version__}"}


def test_redirects_are_followed_also_in_the_middle(server: Server, path: Path, tmp_path: Path) -> None:
    server.cut = [CUT]
    moved = server.url.replace("/models/resnet50-test.pth", "/moved")
    download(moved, path, SHA256, MIB)
    assert path.read_bytes() == BODY
    assert [r for p, r in server.asked if p == "/moved"] == [None, f"bytes={CUT}-"]
    assert [r for p, r in server.asked if p != "/moved"] == [None, f"bytes={CUT}-"]
    assert files_in(tmp_path) == [path.name]


def test_the_name_appears_only_after_size_and_hash_were_checked(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Path] = []

    def sha256_file(part: Path) -> str:
        assert not path.exists()
        assert part.stat().st_size == len(BODY)
        checked.append(part)
        return SHA256

    monkeypatch.setattr(module, "sha256_file", sha256_file)
    download(server.url, path, SHA256, MIB)
    assert checked == [part_of(path)]
    assert path.is_file()


def test_progress_is_told_in_mib_under_the_files_name(server: Server, path: Path) -> None:
    told = Console(file=io.StringIO(), width=200)
    with progress.to(told):
        download(server.url, path, SHA256, MIB)
    assert "download resnet50-test.pth: 3 MiB in " in told.file.getvalue()  # type: ignore[attr-defined]


# interruptions


def test_a_broken_connection_is_continued_in_the_same_call(server: Server, path: Path, tmp_path: Path) -> None:
    server.cut = [CUT, 500_000]
    told = Console(file=io.StringIO(), width=200)
    with progress.to(told):
        download(server.url, path, SHA256, MIB)
    assert path.read_bytes() == BODY
    assert [r for _, r in server.asked] == [None, f"bytes={CUT}-", f"bytes={CUT + 500_000}-"]
    assert files_in(tmp_path) == [path.name]
    assert "2,000,000 of 3,145,728 bytes" in told.file.getvalue()  # type: ignore[attr-defined]


def test_after_three_attempts_the_rest_is_left_to_the_next_call(server: Server, path: Path, tmp_path: Path) -> None:
    server.cut = [1000] * ATTEMPTS
    error = refused(server.url, path, "cannot download")
    assert len(server.asked) == ATTEMPTS == 3
    assert "3,000 of 3,145,728 bytes" in error.evidence
    assert "3,000 bytes are kept" in error.hint
    assert part_of(path).read_bytes() == BODY[:3000]
    assert files_in(tmp_path) == [part_of(path).name]
    server.asked.clear()
    download(server.url, path, SHA256, MIB)
    assert server.asked == [("/models/resnet50-test.pth", "bytes=3000-")]
    assert path.read_bytes() == BODY
    assert files_in(tmp_path) == [path.name]


def test_a_cut_in_a_transfer_of_unknown_length_shows_in_size_or_hash(server: Server, path: Path) -> None:
    server.length, server.cut = False, [CUT]
    refused(server.url, path, "is not the published file")
    assert not part_of(path).exists()


def test_ctrl_c_keeps_what_was_received(server: Server, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Impatient(io.BytesIO):
        status, headers = 200, {"Content-Length": str(len(BODY))}

        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= 1 << 20:
                raise KeyboardInterrupt
            return super().read(size)

    with monkeypatch.context() as patch:
        patch.setattr(module.urllib.request, "urlopen", lambda *_a, **_k: Impatient(BODY))
        with pytest.raises(KeyboardInterrupt):
            download(server.url, path, SHA256, MIB)
    assert part_of(path).read_bytes() == BODY[: 1 << 20]
    download(server.url, path, SHA256, MIB)
    assert server.asked == [("/models/resnet50-test.pth", f"bytes={1 << 20}-")]
    assert path.read_bytes() == BODY


@pytest.mark.parametrize("kept", [1, CUT, len(BODY) - 1])
def test_what_an_earlier_call_left_is_continued(server: Server, path: Path, tmp_path: Path, kept: int) -> None:
    write_part(path, BODY[:kept])
    download(server.url, path, SHA256, MIB)
    assert server.asked == [("/models/resnet50-test.pth", f"bytes={kept}-")]
    assert path.read_bytes() == BODY
    assert files_in(tmp_path) == [path.name]


def test_an_empty_part_asks_for_everything(server: Server, path: Path) -> None:
    write_part(path, b"")
    download(server.url, path, SHA256, MIB)
    assert server.asked == [("/models/resnet50-test.pth", None)]
    assert path.read_bytes() == BODY


@pytest.mark.parametrize("kept", [BODY[:CUT], b"of another file" * 9, BODY + b"too long"])
def test_a_server_that_knows_no_ranges_starts_again(server: Server, path: Path, tmp_path: Path, kept: bytes) -> None:
    server.ranges = False
    write_part(path, kept)
    download(server.url, path, SHA256, MIB)
    assert path.read_bytes() == BODY
    assert len(server.asked) == 1
    assert files_in(tmp_path) == [path.name]


def test_a_complete_part_needs_only_the_check(server: Server, path: Path, tmp_path: Path) -> None:
    write_part(path, BODY)
    download(server.url, path, SHA256, MIB)
    assert server.asked == [("/models/resnet50-test.pth", f"bytes={len(BODY)}-")]
    assert path.read_bytes() == BODY
    assert files_in(tmp_path) == [path.name]


def test_a_part_that_is_too_long_is_refused_and_thrown_away(server: Server, path: Path, tmp_path: Path) -> None:
    write_part(path, BODY + b"!")
    error = refused(server.url, path, "is not the published file")
    assert "3,145,729 bytes" in error.evidence
    assert files_in(tmp_path) == []
    download(server.url, path, SHA256, MIB)  # and trying again helps
    assert path.read_bytes() == BODY


def test_a_part_of_another_file_is_refused_and_thrown_away(server: Server, path: Path, tmp_path: Path) -> None:
    write_part(path, bytes(CUT))
    error = refused(server.url, path, "is not the published file")
    assert "3,145,728 bytes" in error.evidence
    assert files_in(tmp_path) == []


# wrong content


@pytest.mark.parametrize("body", [BODY[::-1], BODY[:-1000], BODY + b"\0", b"", b"<html>log in first</html>"], ids=len)
def test_wrong_bytes_are_refused_and_not_kept(server: Server, path: Path, tmp_path: Path, body: bytes) -> None:
    server.body = body
    error = refused(server.url, path, "is not the published file", mib=None)
    assert error.evidence == (
        f"{len(body):,} bytes, SHA-256 {hashlib.sha256(body).hexdigest()[:12]}, expected {SHA256[:12]}"
    )
    assert "nothing was kept" in error.hint
    assert files_in(tmp_path) == []
    assert len(server.asked) == 1  # the same bytes would come again
    server.body = BODY
    download(server.url, path, SHA256)
    assert path.read_bytes() == BODY


@pytest.mark.parametrize("mib", [2.93, 3.07, 0.0, 300.0])
def test_the_published_size_counts_beside_the_hash(server: Server, path: Path, tmp_path: Path, mib: float) -> None:
    error = refused(server.url, path, "is not the published file", mib=mib)
    assert "3,145,728 bytes" in error.evidence
    assert files_in(tmp_path) == []


# refusals


@pytest.mark.parametrize("status", [403, 404, 500, 503])
@pytest.mark.parametrize("kept", [b"", BODY[:CUT]])
def test_a_server_that_refuses_is_asked_once(server: Server, path: Path, status: int, kept: bytes) -> None:
    if kept:
        write_part(path, kept)
    server.status = status
    error = refused(server.url, path, "cannot download")
    assert error.evidence.startswith(f"HTTP Error {status}")
    assert len(server.asked) == 1
    assert part_of(path).is_file() == bool(kept)
    assert ("2,000,000 bytes are kept" in error.hint) == bool(kept)
    if kept:
        assert part_of(path).read_bytes() == kept


@pytest.mark.parametrize(
    ("raw", "evidence"), [(b"220 mail.example ready\r\n\r\n", "220 mail"), (b"", "closed connection")]
)
def test_where_nothing_was_received_nothing_is_tried_again(
    server: Server, path: Path, tmp_path: Path, raw: bytes, evidence: str
) -> None:
    server.raw = raw
    error = refused(server.url, path, "cannot download")
    assert evidence in error.evidence
    assert len(server.asked) == 1
    assert files_in(tmp_path) == []


def test_chunks_that_end_early_are_noticed(server: Server, path: Path) -> None:
    server.raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\nonly a little"
    error = refused(server.url, path, "cannot download")
    assert "IncompleteRead" in error.evidence


def test_a_refused_connection_says_so_and_leaves_nothing(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can answer there
        error = refused(f"http://127.0.0.1:{taken.getsockname()[1]}/a.pth", path, "cannot download")
    assert "refused" in error.evidence
    assert files_in(tmp_path) == []


def test_a_cache_that_cannot_be_made_is_no_bug(server: Server, path: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    error = refused(server.url, path, "cannot download")
    assert str(tmp_path / "cache") in error.evidence
    assert server.asked == []


# several processes


@pytest.mark.skipif(os.name != "posix", reason="locks are those of POSIX")
def test_of_two_downloads_of_one_file_the_second_waits(
    server: Server, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, fetch = threading.Event(), module._fetch

    def slow(url: str, part: Path) -> None:
        there.set()
        time.sleep(0.2)  # for the other to get as far as this, if nothing stops it
        fetch(url, part)

    monkeypatch.setattr(module, "_fetch", slow)
    first = threading.Thread(target=download, args=(server.url, path, SHA256, MIB))
    first.start()
    assert there.wait(10)
    told = Console(file=io.StringIO(), width=400)
    with progress.to(told):
        download(server.url, path, SHA256, MIB)
    first.join()
    assert "another process downloads to" in told.file.getvalue()  # type: ignore[attr-defined]
    assert len(server.asked) == 1
    assert path.read_bytes() == BODY
    assert files_in(tmp_path) == [path.name]
