"""A device reached with the OpenSSH client that the user has: their keys, configuration and jump hosts.

One connection a device. Its first command is the guard of device.sh, which cleans up when the connection ends, however
it ends; every later step runs beside it on the same connection (ssh_config(5), ControlMaster), so that the user
authenticates once.
"""

from __future__ import annotations

import contextvars
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import IO, Any

from edgeres.errors import EdgeresError, UsageError
from edgeres.progress import say

BEAT, SILENCE = 10, 120
"""Seconds between two signs of life, and after how many without one a device takes the connection as cut."""
ENDING = 60
"""Seconds that a device has to clean up before it is left to itself."""
LOGIN, LOOK, HUSH = 120, 60, 300
"""Seconds that a login may take if it asks nothing (a key may want to be touched), and a look at the device; and after
how many without a sign of life of any other step the user is told. Twice as many end it."""
DENIED, UNKNOWN = "Permission denied", "Host key verification failed"
CHANGED = "REMOTE HOST IDENTIFICATION HAS CHANGED"
"""What ssh says when it refuses, or is refused."""
LOST = 255
"""Exit status of ssh where it failed itself (ssh(1))."""
SENT, LINE, LINES, FACTS = 256 << 20, 1 << 16, 1000, 100
"""What a device may fill here: bytes of a file (outcomes of a million images are fewer), of a line, lines, facts."""
OURS = ("RequestTTY=no", "RemoteCommand=none", "ClearAllForwardings=yes", "PermitLocalCommand=no", "EscapeChar=none")
DEFAULTS = ("ConnectTimeout=15", "ServerAliveInterval=15", "ServerAliveCountMax=3")
"""Options of ssh, which takes the first value it sees: ours, the user's, these."""


Process = subprocess.Popen[bytes]


class LostConnection(EdgeresError):
    """A device cannot be reached, or no longer."""


class Stopped(Exception):
    """The user wants everything to end."""


class Device:
    """One device. `connect`, any number of `step`, and always `close`.

    ``options`` are for ssh, as its -o takes them; ``config`` is a file for its -F. ``folder``: where the socket of the
    connection lies, one of `sockets`.
    """

    def __init__(self, host: str, folder: Path, options: Sequence[str] = (), config: Path | None = None) -> None:
        self.host, self.id = host, secrets.token_hex(8)
        ours = [*OURS, "ControlPersist=no", f"ControlPath={folder / self.id[:6]}"]
        # the system ends an ssh that writes more than that into a file (POSIX: in blocks of 512 bytes)
        limited = ["sh", "-c", f'ulimit -f {SENT >> 9} 2>/dev/null; exec "$@"', "sh", client(), "-T", "-x", "-a"]
        self._ssh = [*limited, *(("-F", str(config)) if config else ()), *_options(ours)]
        self._rest = _options([*options, *DEFAULTS])
        self._call = shlex.join(["ssh", *(("-F", str(config)) if config else ()), *_options(options), host])
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (it lasts as long as the connection)
        self._guard: Process | None = None
        self._stopped = self._connected = False
        self._hung = ""
        self._ending: threading.Timer | None = None
        self._lock = threading.Lock()

    def connect(self, python: str, keep: bool, ask: threading.Lock) -> dict[str, str]:
        """Connect, take the device's lock and start the guard -> facts about the device.

        Without questions first. Where one must be answered (a passphrase, an unknown host key) and there is a terminal,
        again under ``ask``: one device at a time.
        """
        arguments = ("guard", str(SILENCE), "keep" if keep else "")
        facts = self._connect(arguments, "BatchMode=yes")
        if facts is None and sys.stdin is not None and sys.stdin.isatty() and _asks(self._told()):
            with ask:
                facts = self._connect(arguments)
        if facts is None:
            raise self._refused()
        self._connected = True
        threading.Thread(target=self._beat, daemon=True).start()
        return facts | self.step("look", python, limit=LOOK)

    def _connect(self, arguments: Sequence[str], *options: str) -> dict[str, str] | None:
        """Facts once the guard is at work; None if it did not come to that."""
        self._errors.seek(0)
        self._errors.truncate()
        command = self._command(arguments, "ControlMaster=yes", *options)
        pipe = subprocess.PIPE
        self._guard = self._open(command, stdin=pipe, stdout=pipe, stderr=self._errors, start_new_session=bool(options))
        facts = dict[str, str]()
        assert self._guard.stdout
        limit = _timer(LOGIN, self._guard.kill)
        if not options:  # the user answers what ssh asks
            limit.cancel()
        for line in _lines(self._guard.stdout):
            _note(line, facts)
            if "ready" in facts:
                limit.cancel()
                return facts
        self._guard.wait()
        limit.cancel()
        _close_pipes(self._guard)
        if self._stopped:
            raise Stopped
        return None

    def step(
        self,
        *arguments: str,
        stdin: IO[Any] | None = None,
        stdout: IO[Any] | None = None,
        live: Callable[[str], None] = lambda line: None,
        limit: float | None = None,
    ) -> dict[str, str]:
        """Run a step of device.sh -> facts, or to ``stdout`` what it writes. ``live`` is given lines of its stderr.

        Raises `EdgeresError` with the device's words if it fails, `LostConnection` if the connection does. One that
        hangs, or takes more than ``limit`` seconds, ends the connection.
        """
        if self._over():
            raise self._lost(arguments[0], [])
        errors, facts = deque[str](maxlen=LINES), dict[str, str]()
        heard, over = 0, threading.Event()
        with tempfile.TemporaryFile() as own:

            def signs() -> tuple[int, ...]:
                sent = os.lseek(stdin.fileno(), 0, os.SEEK_CUR) if stdin else 0
                return heard, sent, os.fstat((stdout or own).fileno()).st_size

            command = self._command(arguments, "ControlMaster=no", "BatchMode=yes")
            running = self._open(
                command,
                stdin=stdin or subprocess.DEVNULL,
                stdout=stdout or own,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            assert running.stderr
            watch = (self._watch, arguments[0], limit, signs, over)
            threading.Thread(target=contextvars.copy_context().run, args=watch, daemon=True).start()
            with running as process:
                for raw in _lines(running.stderr):
                    heard += 1
                    errors.append(_clean(raw))
                    live(errors[-1])
                code = process.wait()
            over.set()
            own.seek(0)
            for line in _lines(own):
                _note(line, facts)
        if self._stopped:
            raise Stopped
        if self._hung:
            raise LostConnection(
                f"{facts.get('python', arguments[0])} hangs on the device",
                evidence="\n".join([self._hung, *(line for line in list(errors)[-3:] if line)]),
                hint=f"see why: {self._call}" + "; or name another interpreter with --python" * ("python" in facts),
            )
        if code == LOST or self._over():
            raise self._lost(arguments[0], list(errors))
        if code:
            raise failure(list(errors), f"{arguments[0]} ended with status {code} on the device")
        return facts

    def stop(self) -> None:
        """End what is under way; `close` still cleans up. For another thread to call."""
        with self._lock:
            self._stopped = True
            guard = self._guard
        if self._connected:
            self._end()
        elif guard and guard.poll() is None:
            guard.terminate()

    def close(self) -> list[str]:
        """Let the device clean up, end the connection -> what the user should know about that."""
        self._errors.close()
        guard, said = self._guard, dict[str, str]()
        if guard is None or guard.stdin is None or guard.stdout is None or guard.stdout.closed:
            return []
        cut = guard.poll() is not None and self._ending is None
        self._end()
        left = deque[str](maxlen=FACTS)
        for line in _lines(guard.stdout):
            _note(line, said)
            left += [said.pop("left")] if "left" in said else []
        guard.wait()
        if self._ending:
            self._ending.cancel()
        _close_pipes(guard)
        if left:
            return [f"could not be removed from the device: {', '.join(left)}"]
        return [] if cut or "end" in said else ["the device did not say that it has cleaned up"]

    def _end(self) -> None:
        """Let the device end its steps and clean up; ssh of a step that is killed would not let go of it."""
        assert self._guard
        assert self._guard.stdin
        with suppress(OSError):
            self._guard.stdin.close()
        self._ending = self._ending or _timer(ENDING, self._guard.kill)

    def _watch(self, step: str, limit: float | None, signs: Callable[[], Any], over: threading.Event) -> None:
        """End the connection if a step is not ``over`` in time, or shows no sign of life.

        That is a line, a byte sent or brought home, or a thousandth of the time spent computing.
        """
        seen, silent, before = (), 0, 0
        with suppress(OSError, ValueError):  # its files are closed: it is over
            while not over.wait(limit or HUSH):
                if limit is None and (now := signs()) != seen:
                    seen, silent = now, 0
                    continue
                silent += 1
                told = f"not a word from {step} for {silent * HUSH / 60:g} minutes"
                computed = 0 if limit else self._computed()
                if over.is_set():
                    break
                if limit or (silent > 1 and computed - before < HUSH / 10):
                    self._hung = f"no answer for {limit:g} seconds" if limit else f"{told}, and hardly any computing"
                    self._end()
                    break
                before = computed
                say(f"{self.host}: {told}; Ctrl-C ends the deploy")

    def _computed(self) -> int:
        """Hundredths of a second that steps on the device have computed; 0 if it does not tell."""
        with suppress(EdgeresError, Stopped):
            found = self.step("computed", limit=LOOK).get("computed", "")
            return int(found) if re.fullmatch(r"[0-9]{1,18}", found) else 0
        return 0

    def _command(self, arguments: Sequence[str], *options: str) -> list[str]:
        script = resources.files("edgeres").joinpath("device.sh").read_text(encoding="utf-8")
        remote = shlex.join(["sh", "-c", script, "edgeres-deploy", self.id, *arguments])
        return [*self._ssh, *_options(options), *self._rest, "--", self.host, f"exec {remote}"]

    def _open(self, command: Sequence[str], **how: Any) -> Process:
        with self._lock:
            if self._stopped:
                raise Stopped
            return subprocess.Popen(command, **how)

    def _over(self) -> bool:
        return self._guard is None or self._guard.poll() is not None

    def _beat(self) -> None:
        assert self._guard
        assert self._guard.stdin
        with suppress(OSError, ValueError):  # closed: the connection has ended
            while self._guard.poll() is None:
                self._guard.stdin.write(b".")
                self._guard.stdin.flush()
                time.sleep(BEAT)

    def _told(self) -> str:
        """What ssh, and the guard, wrote to stderr."""
        raw = os.pread(self._errors.fileno(), 1 << 16, 0)  # ssh writes on at the place where the file stands
        return "\n".join(_clean(line) for line in raw.split(b"\n"))

    def _lost(self, step: str, errors: list[str]) -> LostConnection:
        assert self._guard
        with suppress(subprocess.TimeoutExpired):  # a step may see the end before the guard's is known
            self._guard.wait(1)
        if self._guard.returncode == -signal.SIGXFSZ:
            return LostConnection(f"the device sent more than {SENT >> 20} MiB during {step}")
        lines = [line for line in (*errors[-3:], *self._told().splitlines()[-3:]) if line]
        return LostConnection(
            f"the connection was cut during {step}",
            evidence="\n".join(dict.fromkeys(lines)),
            hint="the device cleans up by itself; deploy again",
        )

    def _refused(self) -> EdgeresError:
        """Why there is no connection, from what ssh says (its log.c does not translate)."""
        told, host = self._told(), shlex.quote(self.host)
        lines = [line for line in told.splitlines() if line.strip("@ ")]
        if any(line.startswith("Failed: ") for line in lines):
            return failure(lines, "")
        assert self._guard
        code = self._guard.returncode
        cause, hint = "it cannot be reached", f"see whether `{self._call}` works"
        if code == -signal.SIGKILL:
            cause = f"it has not let you in after {LOGIN} seconds"
        elif 0 <= code != LOST:  # that of the device's shell
            cause = f"it lets you in and runs nothing: its shell ended with status {code}"
            hint = f"see whether `{self._call} true` works"
        elif CHANGED in told:
            cause = "its host key is not the one that is known here"
            hint = f"find out why; if the device was installed anew: ssh-keygen -R {host}"
        elif UNKNOWN in told:
            cause, hint = "its host key is not known here", f"connect once to see and accept it: {self._call}"
        elif DENIED in told:
            cause, hint = "it lets you in with none of your keys", f"put your key there: ssh-copy-id {host}"
        return LostConnection(cause, evidence="\n".join(lines[-3:]), hint=hint)


def client() -> str:
    """The ssh program; `EdgeresError` if there is none that keeps a connection for several commands."""
    if sys.platform == "win32":
        hint = "use edgeres in WSL, the Linux inside of Windows"
        raise UsageError("ssh on Windows cannot share a connection between commands", hint=hint)
    found = shutil.which("ssh")
    if found is None:
        raise EdgeresError("there is no ssh here", hint="sudo apt install openssh-client")
    return found


def sockets() -> tempfile.TemporaryDirectory[str]:
    """A new folder for the sockets of connections.

    It is in /tmp where the path of the usual one is too long for a socket (unix(7)), or has what ssh reads otherwise in
    a ControlPath: spaces, quotes, % and $.
    """
    usual = tempfile.gettempdir()
    fits = re.fullmatch(r"[\w/.+-]{1,60}", usual, re.ASCII)
    return tempfile.TemporaryDirectory(prefix="er-", dir=usual if fits else "/tmp")


def failure(errors: Sequence[str], otherwise: str) -> EdgeresError:
    """What edgeres (Error: ...) or device.sh (Failed: ...) said on the device, or else ``otherwise``."""
    starts = [i for i, line in enumerate(errors) if line.startswith(("Error: ", "Failed: "))]
    if not starts:
        return EdgeresError(otherwise, evidence="\n".join(line for line in errors[-5:] if line))
    before, line, after = errors[: starts[-1]], errors[starts[-1]], errors[starts[-1] + 1 :]
    hint = next((line.removeprefix("Next: ") for line in after if line.startswith("Next: ")), "")
    # edgeres writes evidence below the cause, indented; before device.sh says what failed, the system's tools have
    evidence = [line.strip() for line in after if line.startswith("  ")]
    if line.startswith("Failed: "):
        evidence = [line for line in before if line][-3:]
    return EdgeresError(line.partition(": ")[2], evidence="\n".join(evidence), hint=hint)


def _timer(seconds: float, function: Callable[[], None]) -> threading.Timer:
    """Call ``function`` then, unless it is cancelled, or this process ends."""
    timer = threading.Timer(seconds, function)
    timer.daemon = True
    timer.start()
    return timer


def _close_pipes(process: Process) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe:
            with suppress(OSError):
                pipe.close()


def _asks(told: str) -> bool:
    """Whether ssh ended because it would have had to ask the user something."""
    return CHANGED not in told and (DENIED in told or UNKNOWN in told)


def _options(options: Sequence[str]) -> list[str]:
    return [word for option in options for word in ("-o", option)]


def _lines(pipe: IO[bytes]) -> Iterator[bytes]:
    """Lines, those longer than `LINE` in pieces."""
    return iter(lambda: pipe.readline(LINE), b"")


def _clean(line: bytes) -> str:
    """A line of the device as text, without what would move the cursor or change colors."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x20-\x7e\xa0-\U0010ffff]", "", line.decode(errors="replace")).rstrip()


def _note(line: bytes, facts: dict[str, str]) -> None:
    """Take up a fact of the device; what a login shell prints is none."""
    if (found := re.fullmatch(r"edgeres (\w+)=(.*)", _clean(line))) and len(facts) < FACTS:
        facts[found[1]] = found[2].strip()
