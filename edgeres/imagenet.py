"""ImageNet-1k: which WordNet id has which class index, and what it is called.

``imagenet.txt`` beside this has one class per line, in the order that torchvision, timm and MLPerf number them: that of
the sorted ids. The name is WordNet's first; the six that would be two things (crane, cardigan, maillot) say which.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from importlib import resources

WORDNET_ID = re.compile(r"n\d{8}")


@functools.lru_cache(1)
def classes() -> tuple[tuple[str, str], ...]:
    """WordNet id and English name of the 1000 classes, by index."""
    text = resources.files("edgeres").joinpath("imagenet.txt").read_text(encoding="utf-8")
    pairs = (line.partition(" ")[::2] for line in text.splitlines())
    return tuple((wordnet_id, name) for wordnet_id, name in pairs)


@functools.lru_cache(1)
def ids() -> tuple[str, ...]:
    """The 1000 WordNet ids, by class index."""
    return tuple(wordnet_id for wordnet_id, _ in classes())


@functools.lru_cache(1)
def _indices() -> dict[str, int]:
    by_name = {_plain(name): i for i, (_, name) in enumerate(classes())}
    return by_name | {wordnet_id: i for i, wordnet_id in enumerate(ids())}


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name.casefold()).strip()


def index(name: str) -> int | None:
    """Class index of a WordNet id or an English name; None if it is neither. Case, _ and - do not matter."""
    known = _indices()
    return known[name] if name in known else known.get(_plain(name))


def indices(names: Iterable[str]) -> dict[str, int] | None:
    """Class index of each name, if all are WordNet ids of ImageNet-1k, or all its English names; None otherwise."""
    found = {name: index(name) for name in names}
    numbers = {name: i for name, i in found.items() if i is not None}
    kinds = {WORDNET_ID.fullmatch(name) is not None for name in found}
    one_each = len(set(numbers.values())) == len(found)  # "hen" and "Hen" would share an index
    return numbers if len(numbers) == len(found) and len(kinds) == 1 and one_each else None
