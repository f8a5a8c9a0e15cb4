"""Results from files, and reports of them to files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgeres import result, schema
from edgeres.errors import InputError
from edgeres.files import atomic, read_json
from edgeres.junit import junit
from edgeres.markdown import markdown
from edgeres.page import page
from edgeres.report import Column
from edgeres.thumbnails import Draw

Record = dict[str, Any]


def read(paths: Sequence[Path]) -> list[tuple[Record, Record | None]]:
    """Every result in files and engine folders, each with the engine.json that lies beside it and belongs to it.

    A file that `edgeres benchmark -o` wrote is the latency of those results that have none of their own.
    """
    found, benchmarks = list[tuple[Record, Record | None]](), list[tuple[Path, Record]]()
    for path in paths:
        file = path / "result.json" if path.is_dir() else path
        if (measured := _benchmark(file)) is not None:
            benchmarks.append((path, measured))
            continue
        engine = engine_record(file.parent)
        for r in result.load(file):
            belongs = engine is not None and engine.get("sha256") == r["provenance"]["digests"]["engine"]
            found.append((r, engine if belongs else None))
    if not found:
        raise InputError("there is no result to show", hint="name a result.json that `edgeres validate` wrote")
    for path, measured in benchmarks:
        without = [r for r, _ in found if r["latency"] is None]
        for r in without:
            r["latency"] = measured
            if Column("", "", r, r["engine"], True).runner is None:
                r["latency"] = None
        if not any(r["latency"] is measured for r, _ in found):
            names = ", ".join(measured["runners"])
            raise InputError(f"{path} is of none of the results", evidence=f"it has {names}")
    return found


def write(
    found: list[tuple[Record, Record | None]],
    html: Path | None = None,
    for_pull_request: Path | None = None,
    for_ci: Path | None = None,
    images: Callable[[], Draw | None] = lambda: None,
) -> None:
    """Write what `read` gives as a page, Markdown and JUnit XML; ``images`` are opened for the page alone."""
    records = [record for record, _ in found]
    texts = [(path, make(records)) for path, make in ((for_pull_request, markdown), (for_ci, junit)) if path]
    if html:
        texts.append((html, page(records, [engine for _, engine in found], images())))
    for path, text in texts:
        write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write ``text``, whole or not at all; what is no UTF-8, as in the names of some files, becomes ``?``."""
    with atomic(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "replace"))


def engine_record(folder: Path) -> Record | None:
    """The engine.json in ``folder``, if there is one that can be read."""
    file = folder / "engine.json"
    if not file.is_file():
        return None
    record = read_json(file, "engine record")
    schema.refuse(schema.wrong(record, schema.ENGINE), f"engine record {file}", "build the engine again")
    return record


def _benchmark(file: Path) -> Record | None:
    """The benchmark record in a file; None if it is something else, or cannot be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    form = value.get("format") if isinstance(value, dict) else None
    if not isinstance(form, str) or not form.startswith("edgeres benchmark"):
        return None
    schema.refuse(schema.wrong(value, schema.LATENCY), f"benchmark {file}", "measure again to write it anew")
    return value
