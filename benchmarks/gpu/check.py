"""Everything that takes an NVIDIA GPU, in one command: does it work, how fast, and how far from what the GPU could do.

    python benchmarks/gpu/check.py [-o FILE] [--limit-s 480] [--wheels DIR] [--work DIR]

Each part runs in a process of its own and has its time, so that one that crashes or hangs does not end the others. What
cannot be done here, or does not fit the time, is listed with the reason. One JSON file, written after every part, and
one table. Exit status 1 if a check failed. This file needs the standard library only; docs/gpu.md says what the
numbers mean.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from answers import answers
from outcome import FAILED, OK, SKIPPED, UNTIL, Outcome, kept, outcome, slug, write
from parts import PROBE, USUAL_S, Part, parts
from table import table

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FORMAT = "edgeres gpu check 1"
UNFINISHED = "unfinished"
ENDED = "ended after"
LOGGED = 6000
"""Characters of a log that are kept of a part that failed."""
ENDING = 10.0
"""Seconds that a process which was killed has to be gone."""


def main() -> None:
    """Parse, check, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    output = ROOT / "engines" / "out" / "gpu-check.json"
    parser.add_argument("-o", "--output", type=Path, default=output, help="the JSON file (engines/out/gpu-check.json)")
    parser.add_argument("--limit-s", type=float, default=USUAL_S, help="seconds that all of it may take (480)")
    parser.add_argument("--wheels", type=Path, help="install the wheels in this folder first, without a network")
    parser.add_argument("--work", type=Path, help="keep models and plans here, and do not repeat parts that were ok")
    args = parser.parse_args()
    if not 0 < args.limit_s < float("inf"):
        parser.error(f"--limit-s {args.limit_s}")
    try:  # now, not after eight minutes
        args.output.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output.parent).close()
    except OSError as error:
        parser.error(f"cannot write {args.output}: {error.strerror}")
    if args.output.is_dir():
        parser.error(f"cannot write {args.output}: it is a folder")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends this gets what was found so far
    start = time.monotonic()
    env = environment(installed(args.wheels) if args.wheels else None)
    with nullcontext(args.work) if args.work else tempfile.TemporaryDirectory() as folder:
        work = Path(folder).absolute()
        result = check(parts(args.limit_s), work, env, start, args.limit_s, lambda found: write(args.output, found))
    write(args.output, result)
    print(table(result))
    print(f"\nwritten to {args.output}")
    sys.exit(result["status"] == FAILED)


def check(
    todo: list[Part],
    work: Path,
    env: dict[str, str],
    start: float,
    limit_s: float,
    save: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Look at the machine, do the parts -> the record of it all. ``start`` is `time.monotonic` when it began.

    ``save`` gets the record as it is after every part. Parts that ``work`` has as ok are not done again.
    """
    work.mkdir(parents=True, exist_ok=True)
    env = {**env, "EDGERES_CACHE": str(work / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}
    began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    probe = alone(PROBE, work, env, PROBE.limit)
    seen = probe["record"]
    done: dict[str, Outcome] = {}
    stop = probe["reason"] or seen["why"]

    def record(finished: bool) -> dict[str, Any]:
        """What there is to say by now."""
        everything = [("machine", probe), *done.items()]
        status = FAILED if any(o["status"] == FAILED for _, o in everything) else OK
        result = {
            "format": FORMAT,
            "began": began,
            "seconds": round(time.monotonic() - start, 1),
            "limit_s": limit_s,
            "status": status if finished else UNFINISHED,
            **{key: seen.get(key) for key in ("machine", "conditions", "versions")},
            "failed": [{"part": name, "reason": o["reason"]} for name, o in everything if o["status"] == FAILED],
            "skipped": [{"part": name, "reason": why} for name, o in done.items() for why in skips(o)],
            "parts": {part.name: done[part.name] for part in todo if part.name in done},
        }
        return {**result, "answers": answers(result)}

    for part in in_order(todo, work):
        earlier = before(part, work)
        if not stop and earlier and earlier["status"] == OK:
            done[part.name] = earlier
            say(f"{part.name}: ok in an earlier run")
            continue
        left = limit_s - (time.monotonic() - start)
        if why := stop or unmet(part, done) or late(part, left):
            done[part.name] = outcome(SKIPPED, why)
            continue
        say(f"{part.name} ...")
        try:
            done[part.name] = retried(part, work, env, min(part.limit, left))
            write(kept(work, part.name), done[part.name])
        except KeyboardInterrupt:  # what was found so far is kept
            stop = "interrupted"
            done[part.name] = outcome(FAILED, stop)
        found = done[part.name]
        say(f"{part.name}: {found['status']}, {found['seconds']:.0f} s {found['reason']}".strip())
        save(record(finished=False))
    return record(finished=True)


def before(part: Part, work: Path) -> Outcome | None:
    """What an earlier run left of ``part`` in ``work``."""
    with suppress(OSError, ValueError):
        return dict(json.loads(kept(work, part.name).read_text(encoding="utf-8")))
    return None


def in_order(todo: list[Part], work: Path) -> list[Part]:
    """``todo``, but last what failed in an earlier run and nothing needs: it may well fail again.

    What had no time, or was interrupted, keeps its place.
    """
    needed = {name for part in todo for name in part.needs}

    def failed(part: Part) -> bool:
        found = before(part, work)
        reason = found["reason"] if found and found["status"] == FAILED else ""
        return part.name not in needed and bool(reason) and not reason.startswith(ENDED)

    return sorted(todo, key=failed)


def unmet(part: Part, done: dict[str, Outcome]) -> str:
    """Which part that ``part`` needs is not there, and why; "" if all are."""
    for name in part.needs:
        if (needed := done.get(name)) and needed["status"] != OK and not needed["record"].get("usable"):
            return f"needs {name!r}: {needed['reason']}"
    return ""


def late(part: Part, left: float) -> str:
    """Why there is no time for ``part``; "" if there is."""
    return f"no time: {max(left, 0):.0f} s are left, it takes {part.least:.0f} s at least" if left < part.least else ""


def skips(found: Outcome) -> list[str]:
    """Why ``found`` was skipped, or what in it was."""
    if found["status"] == SKIPPED:
        return [found["reason"]]
    return [f"{what}: {why}" for what, why in found["record"].get("skipped", {}).items()]


def retried(part: Part, work: Path, env: dict[str, str], limit: float) -> Outcome:
    """`alone`, and once more without what it died over, if that is known and time is left. It stays failed then."""
    found = alone(part, work, env, limit)
    left = limit - found["seconds"]
    if not (part.again and found.get("died_over") and left >= part.least):
        return found
    without = [*part.arguments.get("without", []), found["died_over"]]
    again = alone(replace(part, arguments={**part.arguments, "without": without}), work, env, left)
    seconds = found["seconds"] + again["seconds"]
    why = "; ".join(filter(None, (f"{found['reason']}; tried again without it", again["reason"])))
    return {**again, "status": FAILED, "reason": why, "seconds": seconds}


def alone(part: Part, work: Path, env: dict[str, str], limit: float) -> Outcome:
    """Do ``part`` in a process of its own that may take ``limit`` seconds."""
    path, log, at = kept(work, part.name), work / f"{slug(part.name)}.log", work / "under-way"
    for old in (path, at):
        old.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "child.py"), str(work), part.name, part.call, json.dumps(part.arguments)]
    start = time.monotonic()
    with open(log, "w", encoding="utf-8", errors="replace") as sink:
        # a session of its own, to be ended with all that it started
        env = {**env, UNTIL: str(time.time() + limit)}
        child = subprocess.Popen(command, stdout=sink, stderr=sink, cwd=ROOT, env=env, start_new_session=True)
        try:
            code: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(child)
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else outcome(FAILED)
    over = at.read_text(encoding="utf-8") if at.exists() else ""
    if code != 0:
        how = f"{ENDED} {limit:.0f} s, its limit" if code is None else f"died: {named(code)}"
        found["status"] = FAILED
        found["reason"] = "; ".join(filter(None, (how, over and f"at {over}", found["reason"], tail(log))))
        found["died_over"] = over
    if found["status"] == FAILED:
        found["log"] = log.read_text(encoding="utf-8", errors="replace")[-LOGGED:].splitlines()
    return {**found, "seconds": round(time.monotonic() - start, 1)}


def end(child: subprocess.Popen[Any]) -> None:
    """Kill ``child`` and all that it started, as far as any of it is left."""
    with suppress(ProcessLookupError, PermissionError):  # the second, on macOS, of what has ended
        os.killpg(child.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # one that a driver holds stays: the other parts need not wait for it
        child.wait(ENDING)


def named(code: int) -> str:
    """An exit status in words."""
    names = {each.value: each.name for each in signal.Signals}
    return names.get(-code, f"signal {-code}") if code < 0 else f"exit status {code}"


def tail(log: Path) -> str:
    """The last line that says anything."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def environment(site: Path | None) -> dict[str, str]:
    """Of the children: edgeres as it lies here, and the packages in ``site`` before those of this interpreter."""
    paths = [str(ROOT), *([str(site)] if site else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def installed(wheels: Path) -> Path:
    """The folder that the wheels of folder ``wheels`` are installed in; as it is, if they are those of last time."""
    files = sorted(wheels.glob("*.whl"))
    if not files:
        sys.exit(f"no wheels in {wheels}")
    site, wanted = ROOT / ".venv-gpu", [sys.version, *([f.name, f.stat().st_size] for f in files)]
    mark = site / "wheels.json"
    if mark.exists() and json.loads(mark.read_text(encoding="utf-8")) == wanted:
        return site
    say(f"install {len(files)} wheels into {site}")
    options = ["--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), *map(str, files)]
    shutil.rmtree(site, ignore_errors=True)  # pip would leave what is no longer among the wheels
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"the wheels in {wheels} cannot be installed; pip says above why")
    write(mark, wanted)
    return site


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
