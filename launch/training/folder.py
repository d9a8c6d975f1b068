"""The output folder of a run: what lies where, and whether it is free to be used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_agsel.errors import CheckpointError, ConfigError

from . import checkpoints
from .console import is_main

_EVENTS = ("train", "validation", "exact_match")
# What a run writes. The last two say that a folder is a run's, so they are removed last.
_WRITTEN = ("model", "checkpoints", "selection.jsonl", "blocks.json", "summary.json", "metrics.jsonl")


@dataclass(frozen=True)
class RunFolder:
    """The folder that --output names."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The folder of the trained model."""
        return self.path / "model"

    @property
    def summary(self) -> Path:
        """The file summary.json."""
        return self.path / "summary.json"

    @property
    def metrics(self) -> Path:
        """The file metrics.jsonl."""
        return self.path / "metrics.jsonl"

    def is_a_run(self) -> bool:
        """Return whether launch/train.py wrote here: its metrics.jsonl or its summary.json says so."""
        return self._has_our_metrics() or self._has_our_summary()

    def _has_our_metrics(self) -> bool:
        try:
            with open(self.metrics, encoding="utf-8") as lines:
                first = lines.readline()
            return not first or json.loads(first)["event"] in _EVENTS  # empty: it was stopped before its first record
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _has_our_summary(self) -> bool:
        try:
            found = json.loads(self.summary.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(found, Mapping) and {"method", "deepspeed_config", "rows_per_step"} <= found.keys()

    def prepare(self, options: Any) -> None:
        """Make the folder, or check that it holds a run to resume.

        Raises CheckpointError with --resume where there is no checkpoint; ConfigError where the folder holds a run
        and neither --resume nor --overwrite is given, where it holds files of those names that no run of ours wrote
        (they are never removed), and where it can't be made.
        """
        if options.resume:
            if not checkpoints.are_there(self.checkpoints):
                raise CheckpointError(f"--resume: {self.checkpoints} has no checkpoint. Start without --resume.")
            return
        found = [self.path / name for name in _WRITTEN if (self.path / name).exists()]
        if found and is_main():  # another rank may look after the main one has begun to write
            self._make_room(options, found)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--output={options.output!r} can't be made: {error.strerror}. Give a folder to write to."
            ) from None

    def _make_room(self, options: Any, found: list[Path]) -> None:
        if not self.is_a_run():
            raise ConfigError(
                f"--output={options.output!r} holds {', '.join(path.name for path in found)}, but no metrics.jsonl or "
                "summary.json of a run, so that nothing in it is removed. Use another folder."
            )
        if not options.overwrite:
            raise ConfigError(
                f"--output={options.output!r} holds an earlier run. Use --resume to go on with it, --overwrite "
                "to remove it, or another folder."
            )
        for path in found:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
