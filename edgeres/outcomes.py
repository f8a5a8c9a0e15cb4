"""What two networks answered, image by image: the rows from which every number of a validation is computed."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from edgeres.errors import InputError, StaleError
from edgeres.files import atomic, sha256_file

ABSENT = -1
"""The label of an image that has none."""


@dataclass(frozen=True)
class Outcomes:
    """A row per image, in the order of ``index``, its place in the set. k is 5, or the number of classes if fewer.

    ``label`` int32 (N,), `ABSENT` without labels. ``baseline_top``, ``engine_top`` int32 (N, k): the best classes, best
    first. ``baseline_probability``, ``engine_probability`` float64 (N,): of the first of them. ``margin``: how far
    that of the baseline is above its second. ``signal``, ``noise``: sums of squares of the baseline's logits and of
    the difference. ``divergence``: Kullback-Leibler of the engine's softmax from the baseline's, nats. ``skipped``
    int64: places of images that could not be read; they have no row.
    """

    index: np.ndarray
    label: np.ndarray
    baseline_top: np.ndarray
    engine_top: np.ndarray
    baseline_probability: np.ndarray
    engine_probability: np.ndarray
    margin: np.ndarray
    signal: np.ndarray
    noise: np.ndarray
    divergence: np.ndarray
    skipped: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> bool:
        """Whether the images have labels."""
        return bool(len(self)) and int(self.label[0]) != ABSENT

    def hits(self, top: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of ``baseline_top`` or ``engine_top``: bool (N,), whether the first is right, and whether any is."""
        right = top == self.label[:, None]
        return right[:, 0], right.any(1)

    def save(self, path: Path) -> str:
        """Write as a NumPy archive, whole or not at all -> its SHA-256. The same rows give the same bytes."""
        with atomic(path) as temporary:
            temporary.write_bytes(self._packed())
        return sha256_file(path)

    def digest(self) -> str:
        """SHA-256 of what `save` writes."""
        return hashlib.sha256(self._packed()).hexdigest()

    def _packed(self) -> bytes:
        archive = io.BytesIO()
        np.savez_compressed(archive, **vars(self))
        return archive.getvalue()

    @classmethod
    def load(cls, path: Path, sha256: str) -> Outcomes:
        """The inverse of `save`; `StaleError` unless the file at ``path`` has this SHA-256."""
        if (found := sha256_file(path)) != sha256:
            raise StaleError(
                f"{path} is not what its result was computed from",
                evidence=f"SHA-256 {found[:12]}, the result says {sha256[:12]}",
                hint="keep a result and its outcomes together; validate again to write both",
            )
        try:
            with np.load(path) as columns:
                return cls(**{f.name: columns[f.name] for f in fields(cls)})
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} holds no outcomes", evidence=str(error)) from error


def beside(result: Path) -> Path:
    """Where the outcomes of the result at this path lie: outcomes.npz of result.json, and so on."""
    name, named = re.subn(r"\bresult\b", "outcomes", result.stem)
    return result.with_name(f"{name}.npz" if named else f"{name}.outcomes.npz")


def measure(reference: np.ndarray, logits: np.ndarray, labels: np.ndarray | None, index: np.ndarray) -> Outcomes:
    """Two sets of logits (N, classes), ``labels`` (N,) or None and places in the set (N,) -> a row for each image."""
    top_b, top_e = top5(reference), top5(logits)
    reference, logits = reference.astype(np.float64), logits.astype(np.float64)
    log_p, log_q = _log_softmax(reference), _log_softmax(logits)
    p, rows = np.exp(log_p), np.arange(len(index))
    best = p[rows, top_b[:, 0]]
    return Outcomes(
        index=np.asarray(index, np.int64),
        label=np.full(len(index), ABSENT, np.int32) if labels is None else np.asarray(labels, np.int32),
        baseline_top=top_b.astype(np.int32),
        engine_top=top_e.astype(np.int32),
        baseline_probability=best,
        engine_probability=np.exp(log_q[rows, top_e[:, 0]]),
        margin=best - p[rows, top_b[:, 1]] if top_b.shape[1] > 1 else best,
        signal=np.square(reference).sum(1),
        noise=np.square(reference - logits).sum(1),
        divergence=(p * (log_p - log_q)).sum(1),
        skipped=np.zeros(0, np.int64),
    )


def join(parts: Sequence[Outcomes]) -> Outcomes:
    """All rows of ``parts``, at least one, in the order of their places in the set."""
    columns = {f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Outcomes)}
    skipped, index = np.sort(columns.pop("skipped")), columns["index"]
    if (index[1:] < index[:-1]).any():  # in order they need no second copy
        order = np.argsort(index, kind="stable")
        columns = {name: column[order] for name, column in columns.items()}
    return Outcomes(**columns, skipped=skipped)


def top5(logits: np.ndarray) -> np.ndarray:
    """Indices (N, min(5, classes)) of the largest logits, best first; of equal ones the lower index first."""
    count = min(5, logits.shape[1])
    least = np.partition(logits, -count, axis=1)[:, -count, None]
    among = logits >= least
    if (among.sum(1) != count).any():  # the fifth is as large as the sixth
        return np.argsort(-logits, axis=1, kind="stable")[:, :count]
    places = np.nonzero(among)[1].reshape(len(logits), count)
    order = np.argsort(-np.take_along_axis(logits, places, 1), axis=1, kind="stable")
    return np.take_along_axis(places, order, 1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))
