from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

import edgeres
from edgeres import fleet, pipeline, progress
from edgeres.build import Engine
from edgeres.cli import cli
from edgeres.data import ImageSet, Manifest
from edgeres.errors import BuildError, EdgeresError, InputError, StaleError, UsageError
from edgeres.fleet import Fleet, connected
from edgeres.job import BATCH, Job
from edgeres.outcomes import Outcomes
from edgeres.recipe import Preprocess, load_recipe
from edgeres.runners import open_runner
from edgeres.validate import Found, Question, examine

ray = pytest.importorskip("ray")
IMAGES = 200
STORE = 80 << 20
"""Bytes of a machine's object store: close to the least that Ray takes."""


@pytest.fixture(scope="module", autouse=True)
def _settings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # a token would be kept in the user's home
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), os.pathsep)  # workers load `Gated` from here
        yield


@pytest.fixture(scope="module")
def cluster(_settings: None) -> Iterator[Any]:
    """Two machines of one CPU each, as far as Ray can tell."""
    from ray.cluster_utils import Cluster

    made = Cluster(True, head_node_args={"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False})
    made.add_node(num_cpus=1, object_store_memory=STORE)
    yield made
    made.shutdown()


@pytest.fixture(autouse=True)
def _disconnected() -> Iterator[None]:
    yield
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that are quick to read, seven batches of them."""
    root = tmp_path_factory.mktemp("images") / "many"
    for i in range(IMAGES):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
        path = root / f"class{i % 4}" / f"{i}.pgm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"P5 8 8 255\n" + pixels.tobytes())
    return root


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Engine:
    root = tmp_path_factory.mktemp("workspace")
    recipe = load_recipe(root, flags={"engine": {"precision": "fp16"}})
    return pipeline.ensure_engine(Job(recipe, root, tiny_path))


@pytest.fixture
def make(workspace: Path, tiny_path: Path, many: Path) -> Callable[..., Job]:
    def job(images: Path = many, skip_bad: bool = False) -> Job:
        recipe = load_recipe(workspace, flags={"validation": {"images": str(images)}})
        return Job(recipe, workspace, tiny_path, skip_bad)

    return job


@pytest.fixture
def ask(tiny_path: Path, engine: Engine, preprocess: Preprocess) -> Callable[[ImageSet], Question]:
    return lambda images: Question(tiny_path, "n" * 64, 4, preprocess, [engine], images, {}, False)


def validated(job: Job, engines: list[Engine], on: Fleet | None = None) -> tuple[list[Any], list[bytes], str]:
    """Results without what one machine alone knows, their outcomes, and what was said."""
    console = Console(file=io.StringIO(), width=300)
    with progress.to(console):
        pipeline.validate_engines(job, engines, fleet=on)
    results = [json.loads(engine.path.with_name("result.json").read_text()) for engine in engines]
    for result in results:
        assert (result["latency"] is None) == bool(on)
        assert ("fleet" in result["provenance"]) == bool(on)
        for side in ("baseline", "engine"):
            result[side].pop("latency_ms")
        result["latency"] = None
        result["provenance"]["machine"].pop("load_1min")
    rows = [engine.path.with_name("outcomes.npz").read_bytes() for engine in engines]
    return results, rows, console.file.getvalue()  # type: ignore[attr-defined]


def same(one: Outcomes, other: Outcomes) -> bool:
    return all(np.array_equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(Outcomes))


# on a cluster


def test_a_fleet_gives_the_results_of_one_machine(
    cluster: Any, make: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make()
    engines = [pipeline.ensure_engine(job.with_engine(precision=p)) for p in ("fp16", "int8")]
    here, rows, _ = validated(job, engines)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    there, rows_there, said = validated(job, engines, Fleet("auto"))
    for result in there:
        found = result["provenance"].pop("fleet")
        assert found["ray"] == ray.__version__
        assert 1 <= found["nodes"] <= found["workers"]
        assert [v["edgeres"] for v in found["versions"]] == [edgeres.__version__]
    assert there == here
    assert rows_there == rows
    assert "workers: 2, with 1 CPU each\n" in said
    assert "validate: 7 batches in" in said


def test_unreadable_images_are_refused_or_skipped_as_on_one_machine(
    cluster: Any, make: Callable[..., Job], many: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    for path in many.glob("*/*"):
        (copy := broken / path.relative_to(many)).parent.mkdir(parents=True, exist_ok=True)
        os.link(path, copy)
    for name in ("class0/0.pgm", "class3/7.pgm"):
        (broken / name).unlink()
        (broken / name).write_bytes(b"P5 8 8 255\n")
    job = make(broken)
    engines = [pipeline.ensure_engine(job)]
    with pytest.raises(InputError, match=f"1 unreadable image in {broken}") as caught:
        pipeline.validate_engines(job, engines, fleet=Fleet(cluster.address))
    assert type(caught.value) is InputError
    assert "pgm: " in caught.value.evidence
    assert "--skip-bad" in caught.value.hint
    job = make(broken, skip_bad=True)
    here, rows, said = validated(job, engines)
    (there,), rows_there, said_there = validated(job, engines, Fleet(cluster.address))
    del there["provenance"]["fleet"]
    assert [there] == here
    assert there["skipped"] == ["class0/0.pgm", "class3/7.pgm"]
    assert rows_there == rows
    for line in [line for line in said.splitlines() if line.startswith("skipped")]:
        assert line in said_there


def test_calibration_images_may_not_judge_on_a_fleet_either(cluster: Any, make: Callable[..., Job]) -> None:
    job = make()
    engine = pipeline.ensure_engine(job)
    images = pipeline.validation_images(job)
    job.manifest.write_text(Manifest.of(images.take([190])).to_text(), encoding="utf-8")
    with pytest.raises(InputError, match="1 validation images are calibration images too") as caught:
        pipeline.validate_engines(job, [engine], fleet=Fleet(cluster.address))
    assert caught.value.evidence == f"the first is {images.paths[190]}, listed in calibration/tiny.txt"


@dataclass(frozen=True)
class Gated(ImageSet):
    """Images of random pixels that wait in ``gate`` until it is open, and leave a mark there; not for the driver."""

    gate: Path = Path()
    driver: int = 0

    @classmethod
    def of(cls, gate: Path) -> Gated:
        gate.mkdir()
        labels = tuple(i % 4 for i in range(IMAGES))
        return cls(Path("gated"), tuple(map(str, range(IMAGES))), labels, gate=gate, driver=os.getpid())

    def require(self, preprocess: Preprocess) -> None:
        pass

    def hashes(self) -> tuple[str, ...]:
        assert os.getpid() != self.driver
        return tuple(hashlib.sha256(path.encode()).hexdigest() for path in self.paths)

    def read(self, i: int, preprocess: Preprocess) -> np.ndarray:
        if os.getpid() != self.driver:
            (self.gate / f"{self.paths[i]}.{os.getpid()}.{ray.get_runtime_context().get_node_id()}").touch()
            while not (self.gate / "open").exists():
                time.sleep(0.01)
        return np.random.default_rng(int(self.paths[i])).integers(0, 256, (32, 32, 3), np.uint8)


def alone(question: Question) -> tuple[Outcomes, str]:
    """What one process finds: rows, and the manifest's digest."""
    with open_runner(question.fp32, "onnxruntime") as baseline, question.engines[0].open() as engine:
        (rows,), _ = examine(question, 0, BATCH, [baseline, engine])
    hashes = tuple(hashlib.sha256(path.encode()).hexdigest() for path in question.images.paths)
    return rows, Manifest(question.images.paths, hashes, question.images.labels).digest()


def test_a_cluster_without_machines_is_given_up(
    cluster: Any, ask: Callable[[ImageSet], Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = tmp_path / "gate"
    there = fleet._machines
    monkeypatch.setattr(fleet, "_machines", lambda ray: [] if any(gate.iterdir()) else there(ray))
    monkeypatch.setattr(fleet, "PATIENCE", 0.5)
    try:
        with pytest.raises(EdgeresError, match="no machine is left to validate on"):
            Fleet(cluster.address).find(ask(Gated.of(gate)))
    finally:
        (gate / "open").touch()


def test_a_worker_that_dies_again_and_again_ends_the_run(
    cluster: Any, ask: Callable[[ImageSet], Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "RETRIES", 1)
    with pytest.raises(EdgeresError, match="Ray could not finish the validation") as caught:
        Fleet(cluster.address).find(ask(Deadly(Path("deadly"), ("0",), None)))
    assert "died" in caught.value.evidence


@dataclass(frozen=True)
class Deadly(ImageSet):
    """An image that takes the process with it, as a driver of a device may."""

    def require(self, preprocess: Preprocess) -> None:
        os._exit(1)


@dataclass(frozen=True)
class Buggy(ImageSet):
    """A bug in a worker."""

    def require(self, preprocess: Preprocess) -> None:
        raise ZeroDivisionError("a bug")


def test_errors_of_workers_are_those_of_one_machine_and_bugs_keep_their_traceback(
    cluster: Any, ask: Callable[[ImageSet], Question], many: Path, engine: Engine, tmp_path: Path
) -> None:
    question = ask(pipeline.open_images(many))
    (tmp_path / "broken").mkdir()
    broken = Engine(tmp_path / "broken" / "engine.onnx", engine.record)
    broken.path.write_bytes(b"no engine")
    with pytest.raises(BuildError, match=r"ONNX Runtime cannot load .*broken/engine\.onnx") as caught:
        Fleet(cluster.address).find(replace(question, engines=[broken]))
    assert type(caught.value) is BuildError
    assert caught.value.__suppress_context__
    gone = replace(question.images, root=tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"none of the 32 images in .*elsewhere is there"):
        Fleet(cluster.address).find(replace(question, images=gone))
    with pytest.raises(ray.exceptions.RayTaskError, match=r"in require\n.*ZeroDivisionError"):
        Fleet(cluster.address).find(replace(question, images=Buggy(Path("buggy"), ("0",), None)))


def test_workers_of_another_version_are_refused(
    cluster: Any, ask: Callable[[ImageSet], Question], many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = edgeres.__version__
    monkeypatch.setattr(edgeres, "__version__", "99.0")
    with pytest.raises(StaleError, match=f"has edgeres {ours}, and here is 99.0") as caught:
        Fleet(cluster.address).find(ask(pipeline.open_images(many)))
    assert "install edgeres 99.0 on every machine" in caught.value.hint


def test_more_cpus_than_a_machine_has_are_refused_and_a_connection_of_the_caller_stays(
    cluster: Any, ask: Callable[[ImageSet], Question], many: Path
) -> None:
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        with pytest.raises(UsageError, match="no machine of the Ray cluster has 2 CPUs") as caught:
            Fleet(cluster.address, 2).find(ask(pipeline.open_images(many)))
        assert caught.value.evidence == "the largest has 1"
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def test_the_command_prints_what_it_prints_on_one_machine(
    cluster: Any, make: Callable[..., Job], tiny_path: Path, many: Path
) -> None:
    pipeline.ensure_engine(make())
    command = [sys.executable, "-m", "edgeres", "validate", "--model", str(tiny_path), "--data", str(many), "--json"]
    done = subprocess.run(
        [*command, "--ray", cluster.address, "--ray-cpus", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == IMAGES
    said = done.stderr.splitlines()
    assert len(said) == 2
    assert said[0] == "workers: 2, with 1 CPU each"
    assert said[1].startswith("validate: 7 batches in ")


# the last of those on this cluster, which goes on counting the dead machine for a while
def test_what_a_dead_machine_had_under_way_is_done_again_and_counted_once(
    cluster: Any, ask: Callable[[ImageSet], Question], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    question = ask(Gated.of(gate))
    victim = cluster.add_node(num_cpus=1, object_store_memory=STORE)

    def kill() -> None:
        while len({path.suffix for path in gate.iterdir()}) < 3:  # all three are at work
            time.sleep(0.02)
        cluster.remove_node(victim, allow_graceful=False)
        (gate / "open").touch()

    killer = threading.Thread(target=kill)
    killer.start()
    found = Fleet(cluster.address).find(question)
    killer.join()
    marks = [path.name.split(".") for path in gate.glob("*.*")]
    lost = {image for image, _, node in marks if node == victim.node_id}
    assert lost
    assert lost <= {image for image, _, node in marks if node != victim.node_id}
    assert found.fleet is not None
    assert found.fleet["nodes"] == 2
    rows, digest = alone(question)
    assert same(found.rows[0], rows)
    assert found.rows[0].index.tolist() == list(range(IMAGES))
    assert found.digest == digest


def children() -> set[str]:
    """Processes that this one started and that run."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.mark.slow
def test_auto_starts_a_cluster_where_none_runs_and_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(address: str, **settings: Any) -> Any:
        asked.append(address)
        if address == "auto":
            raise ConnectionError("none")
        return start(address, **settings)

    start, asked, before = ray.init, list[str](), children()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    with connected("auto", STORE) as module:
        (node,) = module.nodes()
        assert node["Resources"]["object_store_memory"] == STORE
        assert node["Resources"]["CPU"] == len(os.sched_getaffinity(0))
        started = children() - before
    assert asked == ["auto", "local"]
    assert started
    assert not started & children()


# without one


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense", "no.such.host.invalid:6379"])
def test_an_address_where_no_cluster_is_is_refused_at_once(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match=f"cannot connect to Ray at {address}"), connected(address, 0):
        raise AssertionError
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match=f"cannot connect to Ray at {address}"), connected("auto", 0):
        raise AssertionError
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "it takes connections, and did not answer for 0.3 seconds"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "what answers there is not Ray: b'HTTP/1.1 '"),
    ],
)
def test_an_address_where_something_else_listens_is_refused_soon(
    answer: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "ANSWER", 0.3)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray would try for minutes"))
    refused = pytest.raises(InputError, match="cannot connect to Ray at 127")
    with listener(answer) as address, refused as caught, connected(address, 0):
        raise AssertionError
    assert caught.value.evidence == words


def test_who_waits_for_ray_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "SLOW", 0.1)
    monkeypatch.setattr(ray, "init", lambda *_, **__: time.sleep(0.5))
    console = Console(file=io.StringIO(), width=300)
    with progress.to(console), listener(fleet.SETTINGS) as address, connected(address, 0):
        pass
    assert console.file.getvalue() == f"waiting for Ray at {address}\n"  # type: ignore[attr-defined]


@contextmanager
def listener(answer: bytes) -> Iterator[str]:
    """Its address; what connects gets ``answer``."""

    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.sendall(answer)
            connection.recv(1000)
            done.wait(10)

    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        done.set()
        thread.join()


def test_an_error_of_ray_in_a_worker_is_no_bug(
    ask: Callable[[ImageSet], Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = ray.exceptions.OwnerDiedError("00" * 28, b"", "")
    error = ray.exceptions.RayTaskError("work", "a traceback of 45 lines", lost).as_instanceof_cause()
    monkeypatch.setattr(fleet, "connected", lambda *_: nullcontext(ray))
    monkeypatch.setattr(fleet, "_parts", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(EdgeresError, match="Ray could not finish the validation") as caught:
        Fleet("auto").find(ask(ImageSet(Path("none"), (), None)))
    assert "owner has exited" in caught.value.evidence
    assert "a traceback" not in caught.value.evidence


def test_a_cluster_that_lets_nobody_in_is_refused_and_ends_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(address: str, **settings: Any) -> None:
        raise SystemExit(15)  # as Ray does, where nobody answers for minutes

    monkeypatch.setattr(ray, "init", init)
    refused = pytest.raises(InputError, match="cannot connect to Ray at 127")
    with listener(fleet.SETTINGS) as address, refused as caught, connected(address, 0):
        raise AssertionError
    assert caught.value.evidence == "Ray gave up"
    assert "RAY_AUTH_MODE=token" in caught.value.hint


@pytest.mark.parametrize("labels", [None, tuple(range(70))])
def test_the_manifest_digest_needs_no_manifest(labels: tuple[int, ...] | None) -> None:
    hashes = [hashlib.sha256(bytes([i])) for i in range(70)]
    manifest = Manifest(tuple(map(str, range(70))), tuple(h.hexdigest() for h in hashes), labels)
    raw = b"".join(h.digest() for h in hashes)
    assert fleet.manifest_digest([raw[:640], raw[640:672], raw[672:]], labels) == manifest.digest()


def test_a_worker_gets_all_of_the_smallest_machine_or_its_share_of_a_gpu() -> None:
    head, small, large = {"CPU": 0.0}, {"CPU": 4.0}, {"CPU": 10.0, "GPU": 2.0}
    machines = [head, small, large, {"memory": 1.0}]
    assert (fleet._share(machines, 0), fleet._share(machines, 1)) == (4, 5)
    assert (fleet._workers(machines, 4, 0), fleet._workers(machines, 5, 1)) == (3, 2)
    assert (fleet._workers(machines, 1, 0), fleet._workers(machines, 1, 1)) == (14, 2)
    assert fleet._workers(machines, 11, 0) == fleet._workers([], 1, 0) == 0
    assert fleet._share([{"CPU": 2.0, "GPU": 4.0}], 1) == fleet._share([], 0) == 1


class FakeRay:
    """Runs tasks when they are waited for, the last one first. ``machines`` may change meanwhile."""

    def __init__(self, machines: list[dict[str, float]]) -> None:
        self.machines, self.asked, self.most = machines, [dict[str, Any]()], 0
        self.flying: list[Any] = []
        self.later = machines

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": m} for m in self.machines] + [{"Alive": False, "Resources": {"CPU": 99.0}}]

    def remote(self, **options: Any) -> Any:
        self.asked = [options]

        def run(*arguments: Any) -> Any:
            self.flying.append(lambda: arguments)
            self.most = max(self.most, len(self.flying))
            return self.flying[-1]

        return lambda function: SimpleNamespace(remote=run)

    def put(self, value: Any) -> Any:
        return value

    def wait(self, tasks: list[Any], timeout: float) -> Any:
        assert tasks == self.flying
        return [self.flying.pop()], []

    def get(self, task: Any) -> bytes:
        _, _, images, first, _, threads = task()
        self.machines = self.later
        return fleet.pickle.dumps((first, len(fleet.pickle.loads(images)), threads))


def test_tasks_under_way_are_bounded_and_follow_the_machines(ask: Callable[[ImageSet], Question]) -> None:
    question = ask(ImageSet(Path("none"), tuple(map(str, range(64 * 32 - 5))), None))
    for later, most in (([{"CPU": 2.0}] * 2, 4), ([{"CPU": 2.0}] * 3, 6), ([{"CPU": 2.0}], 4)):
        fake: Any = FakeRay([{"CPU": 2.0}] * 2)
        fake.later = later
        parts: Any = fleet._parts(fake, None, question, [question.fp32])
        assert fake.most == most
        assert fake.asked == [{"num_cpus": 2, "num_gpus": 0, "max_retries": 3, "retry_exceptions": False}]
        assert sorted(parts) == [(first, 256 - 5 * (first == 1792), 2) for first in range(0, 2048, 256)]


def test_one_part_that_is_missing_or_there_twice_is_noticed(ask: Callable[[ImageSet], Question], many: Path) -> None:
    images = pipeline.open_images(many).take(range(64))
    question = ask(images)
    with open_runner(question.fp32, "onnxruntime") as baseline, question.engines[0].open() as engine:
        halves = [replace(question, images=images.take(range(i, i + 32))) for i in (0, 32)]
        found = [examine(half, 32 * i, BATCH, [baseline, engine])[0] for i, half in enumerate(halves)]
    parts = [fleet.Part(32 * i, Found(rows, {}, ""), bytes(32 * 32), "node", i, {}) for i, rows in enumerate(found)]
    joined = fleet._join(parts[::-1], question, "2.0")
    assert joined.fleet == {"ray": "2.0", "nodes": 1, "workers": 2, "versions": [{}]}
    assert joined.rows[0].index.tolist() == list(range(64))
    for wrong in (parts[:1], [*parts, parts[0]]):
        with pytest.raises(InputError, match="do not cover the 64 images"):
            fleet._join(wrong, question, "2.0")


def test_options_that_make_no_sense_together_are_refused(workspace: Path) -> None:
    for options, cause in (
        (["--ray", ""], "--ray names no cluster"),
        (["--ray-cpus", "2"], "--ray-cpus is for a Ray cluster"),
        (["--ray", "auto", "--shard", "1/2"], "--shard and --ray do not go together"),
    ):
        done = CliRunner().invoke(cli, ["validate", *options])
        assert done.exit_code == 2
        assert cause in done.stderr


def test_a_file_for_two_executors_is_opened_by_each(
    ask: Callable[[ImageSet], Question], many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = ask(ImageSet(many, (), None))
    (one,) = question.engines
    other = Engine(one.path, {**one.record, "executor": "openvino"})
    monkeypatch.setattr(fleet, "_opened", {})
    monkeypatch.setattr(fleet, "open_runner", lambda *_: "fp32")
    monkeypatch.setattr(Engine, "open", lambda self, threads: self.record["executor"])
    runners = fleet._open(replace(question, engines=[one, other]), lambda _: np.zeros(1, np.uint8), 1)
    assert runners == ["fp32", "onnxruntime", "openvino"]


@pytest.mark.parametrize("here", [True, False])
def test_a_model_in_the_current_folder_or_the_one_above(
    here: bool, ask: Callable[[ImageSet], Question], many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = ask(ImageSet(many, (), None))
    monkeypatch.setattr(fleet, "_opened", {})
    below = tmp_path / "below"
    below.mkdir()
    path = (below if here else tmp_path) / "tiny.onnx"
    path.write_bytes(question.fp32.read_bytes())
    monkeypatch.chdir(below)
    named = replace(question, fp32=Path("tiny.onnx") if here else Path("../tiny.onnx"))
    models = [named.fp32, *(engine.path for engine in named.engines)]
    runners = fleet._open(named, lambda i: np.fromfile(models[i], np.uint8), 1)
    for runner in runners:
        runner.close()
    assert len(runners) == 2
