"""Results of the shards of one validation -> the result that one run would have given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeres import result, verdict
from edgeres.errors import InputError, StaleError
from edgeres.files import write_json
from edgeres.outcomes import Outcomes, beside, join
from edgeres.progress import say
from edgeres.recipe import Budget
from edgeres.verdict import Accepted

SAME = ("name", "model", "target", "precision", "images_of", "labels", "budget", "notes")
SAME_ORIGIN = ("preprocess", "quantization", "built_with")
SAME_DIGESTS = ("model", "images", "engine", "weights")


def merge(paths: Sequence[Path], output: Path, root: Path) -> dict[str, Any]:
    """Join the shards' results at ``paths``, each with its outcomes beside it -> the whole result, judged.

    It is written to ``output``, its outcomes beside it. There is no latency in it, as shards measure none. An accepted
    result is looked for from ``root``, the workspace.
    """
    records = [_load(path) for path in paths]
    _refuse_incomplete(paths, records)
    for path, record in zip(paths[1:], records[1:], strict=True):
        _refuse_other(paths[0], records[0], path, record)
    rows = [
        Outcomes.load(beside(path), record["provenance"]["digests"]["outcomes"])
        for path, record in zip(paths, records, strict=True)
    ]
    whole, first = join(rows), records[0]
    refuse_gaps(whole, first["images_of"])
    if any(record["provenance"]["versions"] != first["provenance"]["versions"] for record in records):
        say("the shards ran under different versions: in one run the last digits may differ")
    budget, accepted = _budget(first, root)
    if accepted:
        verdict.refuse_overwriting(root / accepted.path, [output])
    # of the whole set's first flipped images, each is among its own shard's first
    paths_of = {flip["index"]: flip["path"] for record in records for flip in record["flipped"]}
    names = {row["index"]: row["name"] for record in records for row in record["classes"] or ()}
    measured = result.measured(whole, paths_of.__getitem__, names.get)
    merged = {
        **first,
        **measured,
        **{side: {**first[side], **measured[side]} for side in result.SIDES},
        **verdict.judge(budget, accepted, whole, first["provenance"]["digests"]["images"]),
        "shard": None,
        "skipped": _skipped(records, rows),
        "notes": [*result.doubts(measured), *first["notes"]],  # in the order of one run
    }
    digests = {**first["provenance"]["digests"], "outcomes": whole.save(beside(output))}
    merged["provenance"] = {**first["provenance"], "digests": digests}
    write_json(output, merged)
    return merged


def _load(path: Path) -> dict[str, Any]:
    """The result of a shard."""
    records = result.load(path)
    if len(records) > 1 or records[0]["shard"] is None:
        what = f"{len(records)} results" if len(records) > 1 else "the result of a whole set"
        raise InputError(f"{path} is not the result of a shard", evidence=f"it holds {what}")
    if "outcomes" not in records[0]["provenance"]["digests"]:
        raise InputError(f"result {path} is damaged", evidence="provenance.digests.outcomes is missing")
    return records[0]


def _refuse_incomplete(paths: Sequence[Path], records: list[dict[str, Any]]) -> None:
    """Every shard must be there, and once."""
    there: dict[int, Path] = {}
    of = records[0]["shard"]["of"]
    for path, record in zip(paths, records, strict=True):
        shard = record["shard"]
        if shard["of"] != of:
            raise InputError(
                "the results are not of the same shards",
                evidence=f"{paths[0]} is one of {of}, {path} one of {shard['of']}",
                hint="merge the shards of one validation",
            )
        if shard["index"] in there:
            raise InputError(f"shard {shard['index']}/{of} is there twice", evidence=f"{there[shard['index']]}\n{path}")
        there[shard["index"]] = path
    if missing := [f"{i}/{of}" for i in range(1, of + 1) if i not in there]:
        raise InputError(
            f"{len(missing)} of {of} shards are missing",
            evidence=", ".join(missing),
            hint=f"`edgeres validate --shard {missing[0]}` with the options of the others makes the first",
        )


def _refuse_other(first: Path, record: dict[str, Any], path: Path, other: dict[str, Any]) -> None:
    """All shards must be of one engine on one image set, under the same budgets."""
    ours, theirs = record["provenance"], other["provenance"]
    pairs = {key: (record[key], other[key]) for key in SAME}
    pairs |= {key: (ours[key], theirs[key]) for key in SAME_ORIGIN}
    pairs |= {f"digest of {key}": (ours["digests"].get(key), theirs["digests"].get(key)) for key in SAME_DIGESTS}
    if differ := [(key, a, b) for key, (a, b) in pairs.items() if a != b]:
        raise StaleError(
            f"{first} and {path} are not shards of one validation",
            evidence="\n".join(f"{key}: {a} and {b}" for key, a, b in differ),
            hint="validate the one that is wrong again",
        )


def refuse_gaps(whole: Outcomes, images: int) -> None:
    """Every image of the set must have been looked at once."""
    seen = np.bincount(np.concatenate([whole.index, whole.skipped]), minlength=images)
    if wrong := np.flatnonzero(seen != 1).tolist():
        raise InputError(
            f"the outcomes do not cover the {images:,} images of the set",
            evidence=f"image {wrong[0]} is there {seen[wrong[0]]} times, {len(wrong):,} images are not there once",
            hint="validate again",
        )


def _budget(record: dict[str, Any], root: Path) -> tuple[Budget, Accepted | None]:
    """The budgets that a record was made under, and the accepted result if one was named."""
    asked = record["budget"]
    before = asked["accepted"]
    if before is None:
        return Budget(asked["max_drop"], asked["min_relative"]), None
    budget = Budget(asked["max_drop"], asked["min_relative"], before["path"], before["max_loss"])
    return budget, Accepted.load(root / before["path"], before["path"], record)


def _skipped(records: list[dict[str, Any]], rows: list[Outcomes]) -> list[str]:
    """As in one run: what the set itself leaves out, then the unreadable images in their order."""
    unreadable: dict[int, str] = {}
    for record, shard in zip(records, rows, strict=True):
        count = len(shard.skipped)
        unreadable |= zip(shard.skipped.tolist(), record["skipped"][len(record["skipped"]) - count :], strict=True)
    left_out = records[0]["skipped"][: len(records[0]["skipped"]) - len(rows[0].skipped)]
    return [*left_out, *(path for _, path in sorted(unreadable.items()))]
