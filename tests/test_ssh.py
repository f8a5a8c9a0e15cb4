"""What a device may do to the machine that talks to it: nothing; and locks of device.sh, without any ssh."""

from __future__ import annotations

import io
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from sshd import wait

import edgeres
from edgeres import ssh

Guard = subprocess.Popen[bytes]


def test_control_characters_of_a_device_do_not_reach_the_terminal() -> None:
    assert ssh._clean(b"\x1b[31mred\x1b[0m\x07 \x1b]0;title\x07\r\n") == "red ]0;title"
    # C1, one character for each sequence that begins with ESC; what is above them stays
    assert (
        ssh._clean("\x9b31mred\x9d0;title\x9c\x80\x9f caf\u00e9\u00a0\u2713".encode())
        == "31mred0;title caf\u00e9\u00a0\u2713"
    )


def test_facts_and_lines_of_a_device_are_bounded() -> None:
    assert [len(piece) for piece in ssh._lines(io.BytesIO(b"x" * 150_000 + b"\nend\n"))] == [65536, 65536, 18929, 4]
    facts = dict[str, str]()
    for i in range(1000):
        ssh._note(f"edgeres fact{i}=yes\n".encode(), facts)
    assert len(facts) == ssh.FACTS


@pytest.mark.parametrize("name", ["plain", "a space", "per%cent%z", "ünï", "x" * 70, "$HOME", 'a"quote'])
def test_sockets_lie_where_ssh_can_make_them(
    tmp_path_factory: pytest.TempPathFactory, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as root:
        (Path(root) / name).mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(Path(root) / name))
        with ssh.sockets() as folder:
            assert Path(folder).parent == (Path(root) / name if name == "plain" else Path("/tmp"))
            assert len(f"{folder}/123456.{'x' * 16}") < 104


@pytest.mark.parametrize(("options", "seconds"), [((), 15), (("ServerAliveInterval=7",), 7)])
def test_a_connection_that_went_silent_is_noticed_in_45_seconds_unless_the_user_says_otherwise(
    options: tuple[str, ...], seconds: int, tmp_path: Path
) -> None:
    (tmp_path / "config").touch()
    made = ssh.Device("box.invalid", tmp_path, options, tmp_path / "config")
    *command, host, _ = made._command(["guard"])
    printed = subprocess.run([*command[:-1], "-G", host], capture_output=True, text=True, check=True)
    values = dict(line.partition(" ")[::2] for line in printed.stdout.splitlines())
    assert (values["serveraliveinterval"], values["serveralivecountmax"]) == (str(seconds), "3")
    assert values["connecttimeout"] == "15"
    made._errors.close()


def test_a_login_that_comes_to_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "LOGIN", 0.5)
    (tmp_path / "config").touch()
    with socket.create_server(("127.0.0.1", 0)) as mute, ssh.sockets() as folder:
        port = f"Port={mute.getsockname()[1]}"
        made = ssh.Device("127.0.0.1", Path(folder), (port,), tmp_path / "config")
        with pytest.raises(ssh.LostConnection, match=r"it has not let you in after 0\.5 seconds"):
            made.connect("python3", False, threading.Lock())
        assert made.close() == []


class Home:
    """A device's home folder, where guards of device.sh are started by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / ".cache" / "edgeres"
        self.cache.mkdir(parents=True)
        (self.cache / "lock").symlink_to("deadbeef.999999")
        self.stack = ExitStack()

    def guard(self, name: str, first: str = "/bin") -> Guard:
        """The guard of deploy ``name``; programs in the folder ``first`` come before all others."""
        return self.step(name, "guard", "60", "", first=first)

    def step(self, name: str, *arguments: str, first: str = "/bin") -> Guard:
        """A step of deploy ``name``."""
        script = (Path(edgeres.__file__).parent / "device.sh").read_text(encoding="utf-8")
        command = ["sh", "-c", script, "edgeres-deploy", name, *arguments]
        environment = {"PATH": f"{first}:/usr/bin:/bin", "HOME": str(self.folder)}
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
        self.stack.callback(process.communicate)
        return process

    def slow(self, *names: str) -> Path:
        """A folder with these programs; they say that they are ``at`` work, and ``go`` on when they may."""
        (self.folder / "slow").mkdir()
        for name in names:
            path = self.folder / "slow" / name
            wait_ = f'cd "{self.folder}"; touch at; while [ ! -e go ]; do sleep 0.02; done'
            path.write_text(f'#!/bin/sh\n({wait_})\nexec /bin/{name} "$@"\n', encoding="utf-8")
            path.chmod(0o755)
        return self.folder / "slow"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """One whose last deploy died."""
    made = Home(tmp_path)
    with made.stack:
        yield made


def ready(guard: Guard) -> bool:
    """Whether it came to hold the lock; waits until that is sure."""
    assert guard.stdout
    return any(line.startswith(b"edgeres ready=") for line in iter(guard.stdout.readline, b""))


def refusal(guard: Guard) -> bytes:
    assert guard.stderr
    return guard.stderr.readline()


def test_a_lock_that_was_taken_meanwhile_is_not_taken_away(home: Home) -> None:
    late = home.guard("1a7e", str(home.slow("mv", "rm")))  # it has seen that the lock's owner is dead
    wait((home.folder / "at").exists, "the lock was not looked at")
    first = home.guard("f125")
    assert ready(first)
    (home.folder / "go").touch()
    assert refusal(late) == b"Failed: another deploy is at work on this device\n"
    assert late.wait() == 1
    assert (home.cache / "lock").readlink() == Path(f"f125.{first.pid}")
    assert first.poll() is None
    first.communicate()
    assert not home.cache.exists()


def test_of_two_that_find_a_dead_lock_one_begins(home: Home) -> None:
    slow = home.slow("rm")
    (home.folder / "slow" / "rm").write_text('#!/bin/sh\nsleep 0.3; exec /bin/rm "$@"\n', encoding="utf-8")
    guards = [home.guard(name, str(slow)) for name in ("a1", "b2")]
    time.sleep(0.1)
    assert sorted(ready(guard) for guard in guards) == [False, True]


def test_a_deploy_at_work_that_lost_its_lock_is_not_swept(home: Home) -> None:
    first = home.guard("f125")
    assert ready(first)
    (home.cache / "lock").unlink()
    second = home.guard("5ec0")
    assert not ready(second)
    assert refusal(second) == b"Failed: another deploy is at work on this device\n"
    assert sorted(path.name for path in home.cache.iterdir()) == ["deploy-f125"]
    (home.cache / "lock").symlink_to("07e4.1")
    first.communicate()
    assert sorted(path.name for path in home.cache.iterdir()) == ["lock"]  # which is not its own


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'error while loading shared libraries: libpython3.so' >&2; exit 127", "libraries: libpython3.so"),
        ("exit 3", ""),
    ],
)
def test_a_python_that_does_not_work_is_not_called_absent(home: Home, script: str, words: str) -> None:
    guard = home.guard("f125")
    assert ready(guard)
    python = home.folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    python.chmod(0o755)
    _, told = home.step("f125", "look", str(python)).communicate()
    error = ssh.failure(told.decode().splitlines(), "")
    assert error.cause == f"{python} does not work on the device"
    assert words in error.evidence
    assert f"it ended with status {script.split()[-1]}" in error.evidence
    assert "--python" in error.hint
    out, _ = home.step("f125", "look", "/nowhere/python").communicate()
    assert b"edgeres python=\n" in out  # absent
