"""Validation on many machines: Ray runs pieces of the image set wherever there are processors, or GPUs.

The driver cuts the grid of batches into tasks of consecutive batches, so that every image has the neighbours it has on
one machine, and the digits are the same. It opens no image: a task gets names, reads and hashes the images where it
runs, and gives back a row per image. What a machine takes with it when it dies, Ray runs again elsewhere.
"""

from __future__ import annotations

import contextvars
import hashlib
import json
import os
import pickle
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import edgeres
from edgeres import machine, validate
from edgeres.build import Engine
from edgeres.errors import EdgeresError, InputError, StaleError, UsageError, need
from edgeres.job import BATCH
from edgeres.loader import refuse_all_bad
from edgeres.machine import cores
from edgeres.merge import refuse_gaps
from edgeres.outcomes import join
from edgeres.progress import bar, say
from edgeres.runners import Runner, open_runner
from edgeres.trt import EXECUTORS
from edgeres.validate import Found, Question

TASK = 32
"""Batches of a task at most: what a machine that dies takes with it, and what has to be made up for at its end."""
TASKS = 4
"""Tasks for each worker at least, so that they end at about the same time, though some are slower."""
AHEAD = 2
"""Tasks under way for each worker: one that it runs, and one that waits, so that it never does."""
RETRIES = 3
"""How often Ray runs a task again whose machine or process died."""
SLOW, ANSWER = 3.0, 10.0
"""Seconds after which the user is told what is waited for, and that an address has to answer at all."""
PATIENCE = 60.0
"""Seconds without an answer after which the driver looks whether there still is a machine to wait for."""
SETTINGS = b"\0\0\0\4\0\0\0\0\0"
"""A frame of HTTP/2: settings, none of them."""
SPARE = 256 << 20
"""Bytes of Ray's object store beside the models, where the store is ours: for tasks and their results."""


@dataclass(frozen=True)
class Fleet:
    """A Ray cluster: ``address`` is host:port, ray://host:port, or auto, the one that runs here, else one made here.

    ``cpus`` are what a worker claims and computes with. None is for all of the smallest machine, or its share for each
    GPU: a network computes faster with more threads, and then every machine loads the models once.
    """

    address: str
    cpus: int | None = None

    def find(self, question: Question) -> Found:
        """Answer ``question`` on all machines: what one machine would find. Errors are those of `validate.answer`."""
        models = [question.fp32, *(engine.path for engine in question.engines)]
        with connected(self.address, SPARE + 2 * sum(path.stat().st_size for path in models)) as ray:
            try:
                parts = _parts(ray, self.cpus, question, models)
            except (ray.exceptions.RayError, ConnectionError) as error:
                reason: BaseException = error
                if isinstance(error, ray.exceptions.RayTaskError):  # a worker met it
                    reason = error.cause
                    if not isinstance(reason, ray.exceptions.RayError):  # an error of ours, or a bug
                        raise _ours(error) from None
                raise EdgeresError(
                    "Ray could not finish the validation",
                    evidence=str(reason).strip(),
                    hint="the logs of Ray on its machines say more: /tmp/ray/session_latest/logs",
                ) from error
        return _join(parts, question, ray.__version__)


@dataclass(frozen=True)
class Part:
    """What a task found from place ``first`` of the set on, and where; ``hashes`` are 32 bytes for each image."""

    first: int
    found: Found
    hashes: bytes
    node: str
    process: int
    versions: dict[str, str]


@contextmanager
def connected(address: str, store_bytes: int) -> Iterator[Any]:
    """Yield the module ``ray``, connected. What is connected already stays so; what was started here is stopped."""
    ray = need("ray", "ray")
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or a cluster started here would report to its makers
    found = (os.environ.get("RAY_ADDRESS") or address) if address == "auto" else address
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    waiting = threading.Timer(SLOW, contextvars.copy_context().run, (say, f"waiting for Ray at {found}"))
    waiting.daemon = True
    waiting.start()
    try:
        _refuse_unreachable(found)
        try:
            ray.init(found, **quiet)
        except ConnectionError:
            waiting.cancel()
            if found != "auto":
                raise
            say("no Ray cluster runs here: one is started on this machine, for this run")
            ray.init("local", num_cpus=cores(), include_dashboard=False, object_store_memory=store_bytes, **quiet)
    except (ImportError, OSError, RuntimeError, SystemExit, ValueError) as error:
        raise InputError(
            f"cannot connect to Ray at {found}",
            evidence="Ray gave up" if isinstance(error, SystemExit) else str(error).strip(),
            hint="give host:port from a machine of the cluster, ray://host:10001 from elsewhere, or auto; where the "
            "cluster asks for a token, say so to Ray with RAY_AUTH_MODE=token",
        ) from error
    finally:
        waiting.cancel()
    try:
        yield ray
    finally:
        ray.shutdown()


def _refuse_unreachable(address: str) -> None:
    """Raise `OSError` if no gRPC answers at ``address``: Ray itself would try for minutes, and then end the process."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not host or not port.isdecimal():
        return
    with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER) as connection:
        if os.environ.get("RAY_USE_TLS", "").lower() in ("1", "true"):
            return
        # each side of HTTP/2 begins with a frame of settings: length (3 bytes), type 4, flags, stream (RFC 9113, 3.4)
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SETTINGS)
        try:
            begin = connection.recv(len(SETTINGS))
        except TimeoutError:
            raise TimeoutError(f"it takes connections, and did not answer for {ANSWER:g} seconds") from None
        if begin[3:4] != SETTINGS[3:4]:
            raise ConnectionError(f"what answers there is not Ray: {begin!r}")


def _parts(ray: Any, cpus: int | None, question: Question, models: Sequence[Path]) -> list[Part]:
    """Run every task -> what they found, in the order in which they were done."""
    gpus = int(any(engine.record["executor"] in EXECUTORS for engine in question.engines))
    cpus = cpus or _share(_machines(ray), gpus)
    if not (workers := _workers(_machines(ray), cpus, gpus)):
        largest = max((int(m.get("CPU", 0)) for m in _machines(ray)), default=0)
        raise UsageError(
            f"no machine of the Ray cluster has {cpus} CPUs" + " and a GPU" * gpus,
            evidence=f"the largest has {largest}",
            hint="give fewer with --ray-cpus, or validate on a cluster that has them",
        )
    say(f"workers: {workers}, with {cpus} CPU{'s' * (cpus > 1)}{' and a GPU' * gpus} each")
    images, batches = question.images, validate.grid(len(question.images), BATCH)
    size = min(TASK, max(1, len(batches) // (TASKS * workers)))
    tasks = iter([batches[i : i + size] for i in batches[::size]])
    run = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, retry_exceptions=False)(work)
    stored = [ray.put(np.fromfile(path, np.uint8)) for path in models]
    common = ray.put(pickle.dumps(replace(question, images=images.take(()))))
    flying: dict[Any, range] = {}
    parts: list[Part] = []
    with bar("validate", len(batches), "batches") as step:
        while True:
            free = AHEAD * _workers(_machines(ray), cpus, gpus) - len(flying)  # machines come and go
            for task in islice(tasks, max(free, 0 if flying else 1)):
                first = task.start * BATCH
                own = pickle.dumps(images.take(range(first, min(task.stop * BATCH, len(images)))))
                flying[run.remote(edgeres.__version__, common, own, first, stored, cpus)] = task
            if not flying:
                return parts
            # after an error what is under way ends with the connection; to cancel it may end this process
            # (Ray 2.60: a check in task_manager.cc fails if a task answers at that moment)
            done, _ = ray.wait(list(flying), timeout=PATIENCE)
            if not done and not _workers(_machines(ray), cpus, gpus):
                raise EdgeresError(
                    "no machine is left to validate on",
                    evidence=f"{sum(map(len, flying.values()))} batches are under way on machines that are gone",
                    hint="look at the cluster with `ray status`, and validate again",
                )
            for task in done:
                parts.append(pickle.loads(ray.get(task)))  # arrays of Ray's own would stay in its store
                for _ in flying.pop(task):
                    step()


def _machines(ray: Any) -> list[dict[str, float]]:
    """Resources of each machine that is there."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _share(machines: list[dict[str, float]], gpus: int) -> int:
    """CPUs for each worker: all of the smallest machine, or its share for each GPU."""
    fit = [m for m in machines if m.get("CPU") and (m.get("GPU") or not gpus)]
    shares = [int(m["CPU"] / (m["GPU"] if gpus else 1)) for m in fit]
    return max(1, min(shares, default=1))


def _workers(machines: list[dict[str, float]], cpus: int, gpus: int) -> int:
    """How many workers there is room for."""
    return sum(int(min(m.get("CPU", 0) // cpus, m.get("GPU", 0) if gpus else m.get("CPU", 0))) for m in machines)


def _ours(error: Any) -> BaseException:
    """The error that a user is to see for one that a task raised; a bug stays as it is, with its traceback."""
    if isinstance(error.cause, EdgeresError):
        return error.cause
    if "No module named 'edgeres" in str(error):
        return StaleError(
            "a machine of the Ray cluster has no edgeres, or an older one",
            evidence=str(error).strip().splitlines()[-1],
            hint=f"install edgeres {edgeres.__version__} on every machine of the cluster",
        )
    return error


def work(version: str, common: bytes, own: bytes, first: int, models: Sequence[Any], threads: int) -> bytes:
    """A task, run by a worker: answer the question in ``common`` for the images in ``own`` -> a `Part`, all pickled.

    They begin at place ``first`` of the set. ``models`` are references to the bytes of the FP32 model and of each
    engine, which a worker that has them open does not fetch.
    """
    ray = need("ray", "ray")
    if version != edgeres.__version__:  # before anything of another version is unpickled
        raise StaleError(
            f"a machine of the Ray cluster has edgeres {edgeres.__version__}, and here is {version}",
            evidence=f"on {ray.util.get_node_ip_address()}",
            hint=f"install edgeres {version} on every machine of the cluster",
        )
    question: Question = replace(pickle.loads(common), images=pickle.loads(own))
    question.images.require(question.preprocess)
    hashes = question.images.hashes()
    question.refuse_overlap(hashes)
    runners = _open(question, lambda i: ray.get(models[i]), threads)
    rows, bad = validate.examine(question, first, BATCH, runners, threads)
    part = Part(
        first,
        Found(rows, bad, ""),
        bytes.fromhex("".join(hashes)),
        ray.get_runtime_context().get_node_id(),
        os.getpid(),
        machine.versions("numpy", "onnxruntime", "pillow"),
    )
    return pickle.dumps(part)


_opened: dict[tuple[str, str, int], Runner] = {}
"""What this process has loaded, by executor, digest and threads: a worker runs many tasks of one question."""


def _open(question: Question, content: Callable[[int], Any], threads: int) -> list[Runner]:
    """Runners of the FP32 model and of each engine; ``content`` gives the bytes of the i-th."""
    # two executors may run the same file, as in FP32
    files = [(engine.record["executor"], engine.record["sha256"]) for engine in question.engines]
    keys = [(*file, threads) for file in (("onnxruntime", question.network), *files)]
    for key in set(_opened) - set(keys):
        _opened.pop(key).close()
    for i, (key, engine) in enumerate(zip(keys, (None, *question.engines), strict=True)):
        if key not in _opened:
            # what is loaded needs its file no more
            with tempfile.TemporaryDirectory(prefix="edgeres-") as folder:
                origin = engine.path if engine else question.fp32
                # errors name the file, and only its folder tells engines apart
                path = Path(folder, origin.resolve().parent.name or "model", origin.name)
                path.parent.mkdir()
                path.write_bytes(content(i).data)
                if engine:
                    _opened[key] = Engine(path, engine.record).open(threads=threads)
                else:
                    _opened[key] = open_runner(path, "onnxruntime", threads)
    return [_opened[key] for key in keys]


def _join(parts: list[Part], question: Question, version: str) -> Found:
    """What one run would have found. Every image must have been looked at once."""
    parts = sorted(parts, key=lambda part: part.first)
    rows = [join(each) for each in zip(*(part.found.rows for part in parts), strict=True)]
    bad = {place: reason for part in parts for place, reason in part.found.bad.items()}
    images = question.images
    for each in rows:
        refuse_gaps(each, len(images))
        if not len(each):
            refuse_all_bad(images, [(images.paths[place], reason) for place, reason in bad.items()])
    versions = [dict(each) for each in sorted({tuple(part.versions.items()) for part in parts})]
    if len(versions) > 1:
        say("the machines run different versions: in one run the last digits may differ")
    fleet = {
        "ray": version,
        "nodes": len({part.node for part in parts}),
        "workers": len({(part.node, part.process) for part in parts}),
        "versions": versions,
    }
    hashes = [part.hashes for part in parts]
    copies = len(images) - len(np.unique(np.frombuffer(b"".join(hashes), "V32")))
    return Found(rows, bad, manifest_digest(hashes, images.labels), fleet, copies=copies)


def manifest_digest(hashes: Sequence[bytes], labels: Sequence[int] | None) -> str:
    """`Manifest.digest` of the images with these raw SHA-256 digests, many in a row, without all their text at once."""
    total = hashlib.sha256(b"[[")
    between = ""
    for some in hashes:
        text = ",".join(f'"{some[i : i + 32].hex()}"' for i in range(0, len(some), 32))
        total.update((between + text).encode())
        between = ","
    total.update(b"]," + json.dumps(labels, separators=(",", ":")).encode() + b"]")
    return total.hexdigest()
