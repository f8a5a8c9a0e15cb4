"""Bundles to devices over ssh: copy what is missing, test there, bring the results home, leave the device as it was.

What happens on a device is in device.sh. A device that fails has its line in the table and does not spoil the others.
"""

from __future__ import annotations

import contextvars
import queue
import re
import shutil
import tarfile
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import edgeres
from edgeres import report, result, words
from edgeres.benchmark import Plan
from edgeres.bundle import Bundle
from edgeres.errors import EdgeresError, InputError, StaleError, UsageError
from edgeres.files import digest, require_writable, sha256_file, write_json
from edgeres.outcomes import beside
from edgeres.progress import say
from edgeres.ssh import Device, LostConnection, Stopped, client, sockets
from edgeres.wheels import Python, Wheels, name_of, platforms

Record = dict[str, Any]
AT_A_TIME = 16
"""Devices at work at the same time."""
NEEDS: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "tensorrt": (),
    "tensorrt-rtx": ("tensorrt-rtx", "cuda-python"),
}
"""Executor -> packages that an environment for it needs. TensorRT is a part of the device's system."""
BINDINGS = ("pycuda", "cuda-python")
"""What TensorRT's runner needs one of."""
OLDEST = (3, 10)
FILES = ("result.json", "outcomes.npz")
"""What comes home."""
ENVIRONMENT = 60 << 20
"""Bytes of an empty environment with pip, about."""


@dataclass(frozen=True)
class Ways:
    """How to deploy. ``python``: interpreter or environment on the device that has edgeres, instead of a new one.

    ``wheels``: a folder with more wheels. ``keep``: leave on the device what the next deploy can use. ``options`` and
    ``config`` are ssh's -o and -F. ``seconds``: that each engine works for its latency, at least.
    """

    python: str | None = None
    wheels: Path | None = None
    keep: bool = False
    options: tuple[str, ...] = ()
    config: Path | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Parcel:
    """A bundle to be sent: the file, its SHA-256, and who executes its engine."""

    path: Path
    sha256: str
    size: int
    executor: str

    @classmethod
    def of(cls, path: Path) -> Parcel:
        """The bundle at ``path``, opened to see that it is one."""
        if not path.is_file():
            raise InputError(
                f"there is no bundle {path}", hint="after the hosts comes the file: edgeres deploy HOST FILE"
            )
        executor = Bundle.open(path).target.executor
        return cls(path, sha256_file(path), path.stat().st_size, executor)


def deploy(hosts: Sequence[str], path: Path, output: Path, ways: Ways = Ways()) -> list[Record]:
    """Self-test the bundle at ``path`` on every host -> a record for each; results go to ``output``/<host>.

    Ctrl-C ends all of it: devices are cleaned, and the records of those that had not ended say "interrupted".
    """
    check(hosts)
    Plan(seconds=ways.seconds)  # which the devices would refuse
    client()
    parcel = Parcel.of(path)
    require_writable(output / FILES[0])  # before devices work for it
    with tempfile.TemporaryDirectory(prefix="er-") as scratch, sockets() as near:
        wheels = Wheels(Path(scratch), _packages(parcel.executor, ways.wheels), ways.wheels)
        devices = [Device(host, Path(near), ways.options, ways.config) for host in hosts]
        found, bugs = dict[str, Record](), list[BaseException]()
        slots, ask, ended = threading.Semaphore(AT_A_TIME), threading.Lock(), queue.SimpleQueue[str]()

        def work(device: Device) -> None:
            try:
                with slots:
                    found[device.host] = _one(device, parcel, wheels, ways, output / quote(device.host, safe="@"), ask)
            except BaseException as bug:  # raised where all devices are done: it must not spoil their results
                bugs.append(bug)
            finally:
                ended.put(device.host)

        for device in devices:  # each in a context of its own, where it finds how progress is told
            threading.Thread(target=contextvars.copy_context().run, args=(work, device), daemon=True).start()
        waiting = set(hosts)
        try:
            while waiting:
                waiting.remove(ended.get())  # not Thread.join: before Python 3.13 Ctrl-C makes it forget the thread
        except BaseException as reason:
            say("stopping: waiting for the devices to clean up")
            for device in devices:
                device.stop()
            while waiting:
                waiting.remove(ended.get())
            if not isinstance(reason, KeyboardInterrupt):
                raise
    if bugs:
        raise bugs[0]
    return [found[host] for host in hosts]


def _packages(executor: str, more: Path | None) -> tuple[str, ...]:
    """What devices install beside edgeres: with TensorRT, a binding that is among the wheels in ``more``."""
    theirs = {name_of(wheel) for wheel in more.glob("*.whl")} if more and executor == "tensorrt" else set()
    return (*NEEDS[executor], *(name for name in BINDINGS if name in theirs))


def check(hosts: Sequence[str]) -> None:
    """Raise `UsageError` for hosts that are none, or the same twice."""
    if not hosts:
        raise UsageError("no host to deploy to", hint="edgeres deploy user@host model.bundle")
    for host in hosts:
        if not re.fullmatch(r"[^\s\x00-\x1f.@-][^\s\x00-\x1f]*", host):  # a dash would be an option of ssh
            raise UsageError(f"{host!r} is no host", hint="give hosts as ssh takes them: [user@]host")
    if twice := {host for host in hosts if hosts.count(host) > 1}:
        raise UsageError(f"the same host twice: {', '.join(sorted(twice))}", hint="name each host once")


def read_hosts(path: Path) -> list[str]:
    """Hosts of a file with one on each line; # begins a comment."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read hosts {path}", evidence=str(error)) from error
    return [host for line in lines if (host := line.partition("#")[0].strip())]


def _one(device: Device, parcel: Parcel, wheels: Wheels, ways: Ways, folder: Path, ask: threading.Lock) -> Record:
    """All steps on one device. What fails there ends up in the record, with whatever was brought home before."""
    start = time.monotonic()
    record: Record = {"host": device.host, "met": False, "verdict": None, "result": None, "error": None, "device": None}
    summary: Record = dict.fromkeys(("drop", "interval", "p50_ms", "images_needed", "reasons", "unstable"))
    for name in FILES:  # a result of another time must not be taken for this one's
        with suppress(FileNotFoundError):
            (folder / name).replace(folder / f"former-{name}")
    try:
        try:
            facts = device.connect(ways.python or "python3", ways.keep, ask)
            record["device"] = _named(facts)
            _say(device, f"connected: {record['device']['name']}, Python {facts.get('version', 'none')}")
            require(facts, ways.python, parcel.executor, wheels.packages)
            failed = _test(device, facts, parcel, wheels, ways)
            found = _bring_home(device, folder, failed)
            summary = _summary(found)
            record |= {"verdict": found["verdict"], "result": str(folder / "result.json")}
            record["met"] = failed is None and report.met([found])
            if failed is not None and report.met([found]):
                raise failed
        except Exception as error:  # bugs too: here they cost the results of one device
            told = _told(error)
            record["error"] = {"cause": told.cause, "evidence": told.evidence, "next": told.hint}
            _say(device, told.cause)
    finally:
        notes = device.close()
    return {**record, **summary, "notes": notes, "seconds": round(time.monotonic() - start, 1)}


def _told(error: Exception) -> EdgeresError:
    """What the table says of ``error``; a bug keeps its traceback."""
    if isinstance(error, EdgeresError):
        return error
    if isinstance(error, Stopped):
        return EdgeresError("interrupted", hint="deploy again")
    if isinstance(error, OSError):
        return EdgeresError(str(error))
    cause = f"{type(error).__name__}, a bug in edgeres"
    return EdgeresError(cause, evidence=traceback.format_exc(), hint="please report it")


def require(facts: dict[str, str], python: str | None, executor: str, packages: Sequence[str]) -> None:
    """Raise what keeps a self-test from running on a device with these facts, before anything is copied.

    ``python`` as in `Ways`; ``packages`` would be installed where there is none.
    """
    version = facts.get("version", "")
    numbers = tuple(map(int, re.findall(r"\d+", version)))
    found = f"Python {version} at {facts.get('python')}"
    minor = ".".join(version.split(".")[:2])
    if facts.get("system") != "Linux":
        raise EdgeresError("the device does not run Linux", evidence=f"uname says {facts.get('system')!r}")
    if len(numbers) < 2:
        hint = "see where it is with `command -v` there" if python else "sudo apt install python3 python3-venv"
        what = f"{python} is no Python interpreter or environment" if python else "there is no python3"
        raise EdgeresError(f"{what} on the device", hint=hint)
    if numbers < OLDEST:
        raise EdgeresError(
            "Python on the device is too old for edgeres",
            evidence=f"{found}; 3.10 is the oldest that works",
            hint="JetPack 6 and newer have it; else name an environment of a newer one with --python",
        )
    if python and facts.get("edgeres") != edgeres.__version__:
        has = f"edgeres {facts['edgeres']}" if facts.get("edgeres") else "no edgeres"
        raise EdgeresError(
            "the environment on the device has not the edgeres that is here",
            evidence=f"{found} has {has}; here is {edgeres.__version__}",
            hint="install that there, or leave out --python to have an environment made",
        )
    if not python and not facts.get("venv"):
        raise EdgeresError(
            "Python on the device cannot make environments",
            evidence=f"{found} lacks the module venv or ensurepip",
            hint=f"there: sudo apt install python{minor}-venv; or name an environment with --python",
        )
    if executor == "tensorrt" and not facts.get("tensorrt"):
        raise EdgeresError(
            "the bundle needs TensorRT, and Python on the device finds none",
            evidence=found,
            hint="on a Jetson: sudo apt install tensorrt python3-libnvinfer; else name its environment with --python",
        )
    if executor == "tensorrt" and not facts.get("cuda") and (python or not packages):
        raise EdgeresError(
            "the bundle needs PyCUDA or cuda-python, and Python on the device finds neither",
            evidence=found,
            hint="name an environment that has one with --python; or give its wheel with --wheels: on one such device, "
            "PATH=/usr/local/cuda/bin:$PATH pip wheel pycuda -w wheels",
        )


def _test(device: Device, facts: dict[str, str], parcel: Parcel, wheels: Wheels, ways: Ways) -> EdgeresError | None:
    """Copy what is missing and run the self-test -> what it ended with if not with success."""
    name, work = f"bundle-{parcel.sha256[:16]}", f"work-{parcel.sha256[:16]}"
    root = facts["ready"].rpartition("/")[0]
    python = _python(facts)
    env = "" if ways.python else f"env-{digest([wheels.digest(python), facts['python'], facts['version']])[:16]}"
    there = device.step("have", env, name, parcel.sha256)
    new_env, new_bundle = not ways.python and "env" not in there, "bundle" not in there
    tar = wheels.tar(python) if new_env else Path()
    need = 2 * parcel.size + (parcel.size if new_bundle else 0)  # as it is, unpacked, and the engine
    need += ENVIRONMENT + 5 * tar.stat().st_size if new_env else 0
    free = facts.get("free_kb", "")
    if free.isdigit() and (room := int(free) * 1024) < need:
        raise EdgeresError(
            "there is not enough room on the device",
            evidence=f"about {words.megabytes(need)} MB are needed in {root}, {words.megabytes(room)} MB are free",
            hint="make room there: self-tests that were kept are in that folder",
        )
    if new_bundle:
        _say(device, f"copying the bundle, {words.megabytes(parcel.size)} MB")
        with open(parcel.path, "rb") as data:
            device.step("put", name, str(parcel.size), parcel.sha256, stdin=data)
    if new_env:
        _say(device, f"making a Python environment from {words.megabytes(tar.stat().st_size)} MB of wheels")
        wanted = [f"edgeres=={edgeres.__version__}", *wheels.packages]
        arguments = (env, facts["python"], str(tar.stat().st_size), sha256_file(tar), *wanted)
        with open(tar, "rb") as data, _lacking(wheels, python):
            device.step("environment", *arguments, stdin=data, live=lambda line: _say(device, line))
    interpreter = facts["python"] if ways.python else f"{root}/{env}/bin/python"
    _say(device, "the self-test begins")

    def told(line: str) -> None:
        if not line.startswith(f"wrote {root}/"):  # which is gone soon
            _say(device, line.replace(f"{root}/", ""))

    try:
        seconds = () if ways.seconds is None else ("--seconds", f"{ways.seconds:g}")
        device.step("selftest", interpreter, name, work, *seconds, live=told)
    except EdgeresError as error:
        return error
    return None


def _python(facts: dict[str, str]) -> Python:
    """The interpreter that the device has, which `require` found new enough."""
    glibc = [int(number) for number in re.findall(r"\d+", facts.get("libc", ""))]
    major, minor = (int(number) for number in re.findall(r"\d+", facts["version"])[:2])
    return Python((major, minor), facts.get("machine", ""), (glibc[0], glibc[1]) if len(glibc) > 1 else (0, 0))


@contextmanager
def _lacking(wheels: Wheels, python: Python) -> Iterator[None]:
    """Tell, where pip found packages neither among the wheels nor elsewhere, how to get them."""
    try:
        yield
    except EdgeresError as error:
        missing = set(re.findall(r"No matching distribution found for ([\w.-]+)", error.evidence))
        if not missing:
            raise
        names = " ".join(sorted(missing | wheels.lacking(python)))
        where = " ".join(f"--platform {platform}" for platform in platforms(python))
        major, minor = python.version
        raise EdgeresError(
            f"the device lacks {', '.join(sorted(missing))}, and found no package index with it",
            evidence=error.evidence,
            hint=f"get wheels here, and give them with --wheels wheels: pip download -d wheels --only-binary :all: "
            f"--python-version {major}.{minor} {where} {names}",
        ) from error


def _bring_home(device: Device, folder: Path, failed: EdgeresError | None) -> Record:
    """The result of the self-test, which lies in ``folder`` then, whole or not at all; else raises ``failed``."""
    if isinstance(failed, LostConnection):
        raise failed
    folder.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(".tmp", ".", folder))
    try:
        with tempfile.TemporaryFile() as data:
            device.step("fetch", stdout=data)
            _unpack(data, new)
        path = new / "result.json"
        if not path.exists():
            raise failed or EdgeresError("the self-test left no result on the device")
        record = result.load(path)[0]
        if sha256_file(beside(path)) != record["provenance"]["digests"].get("outcomes"):
            raise StaleError("the outcomes that came from the device are not those of the result")
        record["provenance"]["host"] = device.host
        write_json(path, record)
        # the result last: it names the outcomes by their digest, so that a mixture of two tests is seen
        for file in sorted(new.iterdir(), key=lambda f: f == path):
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        with suppress(OSError):
            folder.rmdir()  # if nothing came
    _say(device, f"results are in {folder}")
    return record


def _unpack(data: IO[bytes], folder: Path) -> None:
    """`FILES` of a tar after the mark that it begins, if they are plain: no links, no holes."""
    data.seek(0)
    while data.readline(1 << 16) not in (b"edgeres data=tar\n", b""):
        pass
    try:
        with tarfile.open(fileobj=data, mode="r|") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                plain = name in FILES and member.isreg() and not member.issparse()
                if plain and (content := tar.extractfile(member)):
                    with open(folder / name, "wb") as out:
                        shutil.copyfileobj(content, out)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:  # tarfile raises them all
        raise EdgeresError("what came from the device is damaged", evidence=str(error), hint="deploy again") from error


def _summary(record: Record) -> Record:
    drop, latency = record["drop"], record["engine"]["latency_ms"]
    return {
        **{key: record[key] for key in ("images_needed", "reasons")},
        "unstable": report.unstable(record),
        "drop": drop["top1"] if drop else None,
        "interval": drop["interval"] if drop else None,
        "p50_ms": latency["p50"] if latency else None,
    }


def _named(facts: dict[str, str]) -> Record:
    keys = ("system", "machine", "model", "version", "tensorrt")
    known = {key: facts[key] for key in keys if facts.get(key)}
    return {"name": facts.get("model") or f"{facts.get('system')} {facts.get('machine')}", **known}


def _say(device: Device, line: str) -> None:
    say(f"{device.host}: {line}")


def met(records: Sequence[Record]) -> bool:
    """Whether every device was tested and met its budget."""
    return all(record["met"] for record in records)
