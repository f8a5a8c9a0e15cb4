"""A recipe in a workspace, and where its artifacts lie."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeres.recipe import Recipe

BATCH = 32
"""Images decoded and run at a time."""


@dataclass(frozen=True)
class Job:
    """A recipe in a workspace, and what the command line adds.

    ``model``: an FP32 file to use as it is. ``skip_bad``: leave out unreadable images. ``force``: use a checkpoint
    that seems to be of the other variant.
    """

    recipe: Recipe
    root: Path
    model: Path | None = None
    skip_bad: bool = False
    force: bool = False

    @property
    def stem(self) -> str:
        """First part of every file name made."""
        return self.recipe.name or (self.model.stem if self.model else self.recipe.model.network)

    @property
    def fp32(self) -> Path:
        """The FP32 model in normal form, baseline of everything."""
        return self.model or self.root / "engines" / "out" / f"{self.stem}.onnx"

    @property
    def table(self) -> Path:
        """Where calibration keeps what it measured."""
        return self.root / "calibration" / f"{self.stem}.json"

    @property
    def manifest(self) -> Path:
        """Which images the table was measured on; beside the table, also if that was given."""
        source = self.recipe.calibration.images or ""
        return (Path(source) if source.endswith(".json") else self.table).with_suffix(".txt")

    @property
    def folder(self) -> Path:
        """The engine's folder."""
        engine = self.recipe.engine
        return self.root / "engines" / "out" / f"{self.stem}-{engine.precision}-{engine.target}"

    def with_engine(self, **changes: Any) -> Job:
        """The same job with another precision, target, ... of the engine."""
        return replace(self, recipe=replace(self.recipe, engine=replace(self.recipe.engine, **changes)))

    def show(self, path: Path) -> str:
        """``path`` as a user in the workspace would write it."""
        return os.path.relpath(path, self.root) if path.is_relative_to(self.root) else str(path)
