"""MLPerf-style runs: MLCommons' LoadGen asks, a runner answers, the verdict is LoadGen's own, read from its logs.

Settings of each scenario are those of mlperf.conf for ResNet-50, which LoadGen carries: single-stream, latency of one
image, p90; multi-stream, latency of eight, p99; offline, images per second (mlcommons/inference: loadgen/mlperf.conf).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from edgeres.build import Engine
from edgeres.data import ImageSet
from edgeres.errors import BuildError, InputError, UsageError, need
from edgeres.files import write_json
from edgeres.job import BATCH, Job
from edgeres.latency import aligned
from edgeres.layouts import open_images
from edgeres.lineup import random_pixels
from edgeres.loader import Loader
from edgeres.progress import busy, say
from edgeres.recipe import Preprocess
from edgeres.runners import Runner
from edgeres.tables import Trimmed

FORMAT = "edgeres loadgen 1"
SCENARIOS = {"single-stream": "SingleStream", "multi-stream": "MultiStream", "offline": "Offline"}
MODEL = "resnet50"
IMAGES = 50_000
"""What MLPerf's ResNet-50 draws from: the validation images of ImageNet."""
NOISE = 64
"""Random images, where no real ones are given."""
AMPLE = 1.2
"""An offline test prepares so many times the images that it seems to take: one that ends too early is invalid."""
FASTER = 2
"""The same for queries that come one by one: so many times faster than when tried out may the runner become."""
TRIES = 5
"""Calls before a test: they warm the runner up, and tell LoadGen how many queries to prepare."""


@dataclass(frozen=True)
class Library:
    """What LoadGen draws from. ``read(places)`` gives normalized float32 (n, 3, H, W)."""

    count: int
    read: Callable[[Sequence[int]], np.ndarray]
    labels: tuple[int, ...] | None = None
    random: bool = False


def of_images(images: ImageSet, preprocess: Preprocess) -> Library:
    """Images of a set. One that cannot be read is an error: answers are counted."""

    def read(places: Sequence[int]) -> np.ndarray:
        return np.concatenate([batch.pixels for batch in Loader(images.take(places), preprocess, BATCH)])

    return Library(len(images), read, images.labels)


def of_noise(preprocess: Preprocess, seed: int = 0) -> Library:
    """Random pixels, which cost as much as any."""
    pixels = random_pixels(NOISE, preprocess, seed)
    return Library(NOISE, lambda places: pixels[list(places)], random=True)


def run(job: Job, engines: list[Engine], scenario: str, seconds: float | None, real: bool) -> list[dict[str, Any]]:
    """One record per engine, kept beside it with LoadGen's logs.

    With ``real`` images, those that the recipe names for validation, accuracy is measured too. ``seconds`` shortens
    the test, which then is no valid MLPerf run.
    """
    need("mlperf_loadgen", "loadgen")  # before the minutes that the rest takes
    records = []
    for engine in engines:
        preprocess, section = Preprocess.from_json(engine.record["preprocess"]), job.recipe.validation
        library = of_noise(preprocess, job.recipe.seed)
        if real and section.images:
            images = open_images(section.images, section.labels, engine.record.get("classes"))
            library = of_images(images.subset(section.limit, job.recipe.seed), preprocess)
            if library.labels is None:
                raise UsageError(f"{section.images} has no labels to judge answers by", hint="leave out --data")
        folder = engine.path.parent / "loadgen" / scenario
        with engine.open() as runner:
            record = performance(runner, library, scenario, folder / "performance", seconds)
            accurate = accuracy(runner, library, scenario, folder / "accuracy") if real else None
        wrong = _other_network(engine.record)
        record = {
            "format": FORMAT,
            "name": engine.path.parent.name,
            "precision": engine.record["precision"],
            "target": engine.record["target"],
            **record,
            "accuracy": accurate,
            "deviations": [*record["deviations"], *([wrong] if wrong else [])],
        }
        write_json(folder / "result.json", record)
        records.append(record)
    return records


def performance(
    runner: Runner, library: Library, scenario: str, folder: Path, seconds: float | None = None
) -> dict[str, Any]:
    """Let LoadGen measure ``runner`` and keep its logs in ``folder``. Latencies are in ms, of a query.

    ``valid`` is LoadGen's verdict on the settings it was given; ``deviations`` say how those are not MLPerf's.
    ``early_stopping`` has the latency that MLPerf reports: what the percentile is not above, with 99 % confidence.
    """
    lg = need("mlperf_loadgen", "loadgen")
    settings = _settings(lg, scenario)
    if seconds is not None and not 0 < seconds < float("inf"):
        raise UsageError(f"{seconds} seconds to measure")
    system = _System(lg, runner, library, scenario)
    took = system.try_out()
    settings.single_stream_expected_latency_ns = settings.multi_stream_expected_latency_ns = 1e9 * took / FASTER
    settings.offline_expected_qps = AMPLE * system.batch / took
    full, loaded = settings.min_duration_ms / 1e3, settings.performance_sample_count_override
    settings.performance_sample_count_override = min(loaded, library.count)
    if seconds is not None:
        settings.min_duration_ms = max(1, round(1e3 * seconds))
        settings.min_query_count = settings.min_query_count if seconds >= full else 1
    duration = settings.min_duration_ms / 1e3
    say(f"LoadGen, {scenario}: {duration:g} s at least")
    log = system.start(settings, lg.TestMode.PerformanceOnly, folder)
    valid = log["result_validity"] == "VALID"
    why = log.get("result_invalid_reason", "").strip() or log.get("early_stopping_result", "").strip()
    deviations = [
        text
        for wrong, text in (
            (duration < full, f"{duration:g} of {full:g} s"),
            (library.random, "random pixels"),
            (not library.random and library.count != IMAGES, f"{library.count:,} of {IMAGES:,} images"),
            (library.count < loaded, f"{library.count:,} of {loaded:,} images in memory"),
            (not valid, f"LoadGen calls it invalid ({' '.join(why.replace('*', '').split())})"),
        )
        if wrong
    ]
    return {
        "scenario": scenario,
        "images": library.count,
        "random": library.random,
        "seconds": duration,
        "queries": log.get("result_query_count", 1),
        "latency_ms": _latencies(log, scenario),
        "images_per_second": _per_second(log, scenario),
        "early_stopping": _early_stopping(log, scenario),
        "valid": valid,
        "deviations": deviations,
        "loadgen": str(log["loadgen_version"]).partition(" ")[0],
        "logs": str(folder),
    }


def accuracy(runner: Runner, library: Library, scenario: str, folder: Path) -> dict[str, Any]:
    """Let LoadGen ask for every image once, and judge the answers in its log: ``top1`` in percent."""
    lg = need("mlperf_loadgen", "loadgen")
    if library.labels is None:
        raise UsageError("accuracy takes images with labels")
    settings = _settings(lg, scenario)
    settings.performance_sample_count_override = min(settings.performance_sample_count_override, library.count)
    system = _System(lg, runner, library, scenario)
    with busy(f"LoadGen, {scenario}: accuracy on {library.count:,} images"):
        system.start(settings, lg.TestMode.AccuracyOnly, folder)
    answers = {row["qsl_idx"]: bytes.fromhex(row["data"]) for row in _json(folder / "mlperf_log_accuracy.json")}
    if set(answers) != set(range(library.count)):
        raise InputError(f"LoadGen logged answers to {len(answers)} of {library.count} images", evidence=str(folder))
    hits = sum(int.from_bytes(answers[i], "little") == label for i, label in enumerate(library.labels))
    return {"top1": 100 * hits / library.count, "images": library.count, "logs": str(folder)}


def _settings(lg: Any, scenario: str) -> Any:
    """The settings that LoadGen itself has for ResNet-50; its seeds change with every round of MLPerf."""
    settings = lg.TestSettings()
    try:
        code = settings.FromConfig("", MODEL, SCENARIOS[scenario], 0)
    except TypeError:
        code = -1
    if code or not settings.performance_sample_count_override:
        raise BuildError("this LoadGen does not know MLPerf's settings", hint='pip install -U "edgeres[loadgen]"')
    settings.scenario = getattr(lg.TestScenario, SCENARIOS[scenario])
    return settings


class _System:
    """A runner as the system under test, and a library as what is tested on.

    An exception must not reach LoadGen, which then ends the process when Python does: what goes wrong is kept until the
    test is over, and the rest of it is answered at once.
    """

    def __init__(self, lg: Any, runner: Runner, library: Library, scenario: str) -> None:
        self._lg, self._runner, self._library = lg, runner, library
        usual: int = getattr(runner, "usual", BATCH) if runner.batch is None else runner.batch
        self.batch = {"single-stream": 1, "multi-stream": 8}.get(scenario, usual)
        self._rows = np.empty(0)
        self._places: dict[int, int] = {}
        self._error: BaseException | None = None

    def try_out(self) -> float:
        """Seconds that a query, or offline a batch, takes at the least."""
        pixels = self._runner.prepare(self._library.read([i % self._library.count for i in range(self.batch)]))
        times = []
        for _ in range(TRIES):
            start = time.perf_counter()
            self._runner.infer(pixels)
            times.append(time.perf_counter() - start)
        return min(times)

    def start(self, settings: Any, mode: Any, folder: Path) -> dict[str, Any]:
        """Run a test -> what its detailed log says, by key."""
        lg = self._lg
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        settings.mode = mode
        outputs, logs = lg.LogOutputSettings(), lg.LogSettings()
        outputs.outdir, outputs.copy_summary_to_stdout = str(folder), False
        logs.log_output, logs.enable_trace = outputs, False
        system = lg.ConstructSUT(self._issue, lambda: None)
        count = settings.performance_sample_count_override
        library = lg.ConstructQSL(self._library.count, count, self._load, self._unload)
        try:
            # without a name, no audit.config of the current folder changes the settings
            lg.StartTestWithLogSettings(system, library, settings, logs, "")
        finally:
            lg.DestroyQSL(library)
            lg.DestroySUT(system)
        if self._error is not None:
            shutil.rmtree(folder)  # it tells of answers that were none
            raise self._error
        return _log(folder / "mlperf_log_detail.txt")

    def _load(self, places: list[int]) -> None:
        try:
            self._places = {place: row for row, place in enumerate(dict.fromkeys(places))}
            wanted = list(self._places)
            for start in range(0, len(wanted), BATCH):
                pixels = self._runner.prepare(self._library.read(wanted[start : start + BATCH]))
                if not start:
                    self._rows = np.empty((len(wanted), *pixels.shape[1:]), pixels.dtype)
                self._rows[start : start + BATCH] = pixels
        except BaseException as error:
            self._error = error

    def _unload(self, _places: list[int]) -> None:
        self._rows = np.empty(0)

    def _issue(self, queries: Any) -> None:
        for start in range(0, len(queries), self.batch):
            some = list(queries[start : start + self.batch])
            answers = np.zeros(len(some), np.int32)
            if self._error is None:
                try:
                    answers[:] = self._runner.infer(self._pixels([q.index for q in some])).argmax(1)
                except BaseException as error:
                    self._error = error
            address, size = answers.ctypes.data, answers.itemsize
            self._lg.QuerySamplesComplete(
                [self._lg.QuerySampleResponse(q.id, address + size * i, size) for i, q in enumerate(some)]
            )

    def _pixels(self, places: list[int]) -> np.ndarray:
        rows = [self._places[place] for place in places]
        return self._rows[rows[0] : rows[0] + 1] if len(rows) == 1 else self._rows[rows]


def _log(path: Path) -> dict[str, Any]:
    """What a detailed log says, by key; of a key that comes again, the last."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        events = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines if line.startswith(":::MLLOG ")]
        return {event["key"]: event["value"] for event in events}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot read LoadGen's log {path}", evidence=str(error)) from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read LoadGen's log {path}", evidence=str(error)) from error


def _latencies(log: dict[str, Any], scenario: str) -> dict[str, float] | None:
    """Percentiles in ms by LoadGen's rule; offline all is one query, and its latency says nothing."""
    if scenario == "offline":
        return None
    which = "percentile_per_query_latency_ns" if scenario == "multi-stream" else "percentile_latency_ns"
    percents = {"p50": "50.00", "p90": "90.00", "p95": "95.00", "p99": "99.00", "p99.9": "99.90"}
    return {name: round(log[f"result_{percent}_{which}"] / 1e6, 4) for name, percent in percents.items()}


def _per_second(log: dict[str, Any], scenario: str) -> float:
    if scenario == "offline":
        return round(log["result_samples_per_second"], 2)
    if scenario == "single-stream":
        return round(log["result_qps_with_loadgen_overhead"], 2)
    return round(8e9 / log["result_mean_query_latency_ns"], 2)


def _early_stopping(log: dict[str, Any], scenario: str) -> dict[str, Any] | None:
    if scenario == "offline":
        return None
    key, percent = ("ms", 99) if scenario == "multi-stream" else ("ss", 90)
    met = bool(log["early_stopping_met"])
    latency = round(log[f"early_stopping_latency_{key}"] / 1e6, 4) if met else None
    return {"met": met, "percentile": percent, "latency_ms": latency}


def _other_network(record: dict[str, Any]) -> str:
    """How an engine is not MLPerf's ResNet-50 v1.5 on ImageNet."""
    found = (record.get("depth"), record.get("variant"), record.get("classes"), record["preprocess"]["crop"])
    if found == (50, "v1.5", 1000, 224):
        return ""
    depth, variant, classes, size = found
    return f"{classes} classes, resnet{depth or ''} {variant or ''} at {size} x {size}, for 1000, resnet50 v1.5 at 224"


def table(records: list[dict[str, Any]]) -> Trimmed:
    """Records of one scenario as the terminal shows them. Fits 80 columns."""
    targets = list(dict.fromkeys(record["target"] for record in records))
    rows, notes = [], []
    for record in records:
        name = record["precision"].upper() + f" {record['target']}" * (len(targets) > 1)
        rows.append({"": name, **_row(record)})
        if record["deviations"]:
            notes.append(Text(f"{name}: not a valid MLPerf run: {'; '.join(record['deviations'])}"))
        notes.append(Text(f"{name}: logs in {record['logs']}", overflow="fold"))
    cells = {heading: [row[heading] for row in rows] for heading in rows[0]}
    title = f"MLPerf-style {records[0]['scenario']} on {' and '.join(targets)}, unverified by MLCommons"
    shown = aligned({heading: column for heading, column in cells.items() if any(column)})
    return Trimmed(Text(title, style="bold"), shown, *notes)


def _row(record: dict[str, Any]) -> dict[str, str]:
    early, latencies, accurate = record["early_stopping"], record["latency_ms"] or {}, record["accuracy"]
    row = {}
    if early:
        row[f"MLPerf p{early['percentile']} ms"] = f"{early['latency_ms']:.3f}" if early["met"] else "too short"
    row |= {f"{p} ms": f"{latencies[p]:.3f}" if latencies else "" for p in ("p50", "p99")}
    row["images/s"] = f"{record['images_per_second']:,.1f}"
    row["queries"] = f"{record['queries']:,}" if early else ""
    row["top-1 %"] = f"{accurate['top1']:.2f}" if accurate else ""
    return row
