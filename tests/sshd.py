"""A real sshd on a free port of this machine, whose users have a folder of the test as their home: a device."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.environ.get("PATH", ""))
RUN = Path("/run/sshd")
"""sshd of root wants this folder, as its service makes it; it stays, as other runs of the tests may need it."""


class Device:
    """A device that ssh knows by ``name``, with what ``config`` says. Programs in ``tools`` come first in its PATH."""

    def __init__(self, folder: Path, name: str, user_key: Path) -> None:
        self.name, self.folder = name, folder
        # as devices may have them: a space, a quote, and a login shell that talks
        self.home = folder / f"home of {name}'s"
        self.tools = folder / "tools"
        for each in (self.home, self.tools):
            each.mkdir(parents=True)
        (self.home / ".bashrc").write_text("echo welcome to the device\n", encoding="utf-8")
        key = new_key(folder / "host")
        path = f"{self.tools}:{Path(sys.base_prefix) / 'bin'}:/usr/bin:/bin"
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        (folder / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1:{self.port}\nHostKey {key}\nAuthorizedKeysFile {user_key}.pub\nPidFile none\n"
            "StrictModes no\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\n"
            f'KbdInteractiveAuthentication no\nSetEnv "HOME={self.home}" PATH={path} PIP_INDEX_URL=http://127.0.0.1:9/\n',
            encoding="utf-8",
        )
        self.known = f"[127.0.0.1]:{self.port} {key.with_suffix('.pub').read_text(encoding='utf-8')}"
        if os.geteuid() == 0:
            RUN.mkdir(mode=0o755, exist_ok=True)
        self.log = folder / "log"
        assert SSHD
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
        wait(lambda: b"listening" in self.log.read_bytes(), "sshd is not up")

    def config(self, user_key: Path, known: Path) -> str:
        """What a user's ssh configuration says of it."""
        return (
            f"Host {self.name}\n HostName 127.0.0.1\n Port {self.port}\n User {getpass.getuser()}\n"
            f" IdentityFile {user_key}\n IdentitiesOnly yes\n IdentityAgent none\n UserKnownHostsFile {known}\n"
            " GlobalKnownHostsFile none\n StrictHostKeyChecking yes\n"
        )

    @property
    def left(self) -> list[str]:
        """What a deploy left in its home."""
        return sorted(str(p.relative_to(self.home)) for p in self.home.iterdir() if p.name != ".bashrc")

    @property
    def cache(self) -> Path:
        return self.home / ".cache" / "edgeres"

    def tool(self, name: str, script: str) -> Path:
        """Put a program in its PATH before all others; gone with the next `reset`."""
        path = self.tools / name
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)
        return path

    def reset(self) -> None:
        """As it was at the start."""
        for folder in (self.tools, self.home / ".cache", self.home / "env"):
            shutil.rmtree(folder, ignore_errors=True)
        self.tools.mkdir()

    def cut(self) -> None:
        """Kill the processes of sshd that serve connections, as if the network had gone."""
        for pid in children(self.process.pid):
            for each in (*children(pid), pid):
                if Path(f"/proc/{each}/comm").read_text(encoding="utf-8").startswith("sshd"):
                    os.kill(each, signal.SIGKILL)

    def stop(self) -> None:
        self.cut()
        self.process.terminate()
        self.process.wait(10)


def new_key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)], check=True)
    return path


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]


def wait(ready: object, what: str, seconds: float = 30) -> None:
    """Until ``ready()`` is true."""
    end = time.monotonic() + seconds
    while not ready():  # type: ignore[operator]
        assert time.monotonic() < end, what
        time.sleep(0.05)
