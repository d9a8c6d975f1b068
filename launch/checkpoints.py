"""Checkpoints that are known to be whole: a marker is written last, and a resume looks for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ranks
from deepspeed import comm as dist

from ds_agsel.errors import CheckpointError

_MARKER = "whole.json"
_PREFIX = "step"


def tag_of(step: int) -> str:
    """The folder name of a checkpoint taken after ``step`` steps; names sort as steps do."""
    return f"{_PREFIX}{step:08d}"


def save(engine: Any, folder: Path, step: int, client_state: dict[str, Any], *, keep: int) -> Path:
    """Save the state after ``step`` steps, mark it as whole, remove all but the ``keep`` newest. Collective.

    A checkpoint of that step that is whole already is left. Raises CheckpointError on every rank where one
    could not write; the checkpoints before stay as they were.
    """
    target = folder / tag_of(step)
    if ranks.any_rank(is_whole(target)):
        return target
    engine.save_checkpoint(str(folder), tag_of(step), client_state=client_state)
    dist.barrier()
    failure: OSError | None = None
    if ranks.is_main():
        try:
            _mark_whole(target)
            for old in _whole_checkpoints(folder)[keep:]:
                shutil.rmtree(old)
        except OSError as error:
            failure = error
    if ranks.any_rank(failure is not None):
        raise CheckpointError(f"checkpoint {target} could not be completed: {failure or 'see rank 0'}. Make room.")
    return target


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder`` whose files are all there in the size they were written."""
    return next(iter(_whole_checkpoints(folder)), None)


def is_whole(checkpoint: Path) -> bool:
    """Whether ``checkpoint`` was written to its end and has all its files since."""
    try:
        sizes = json.loads((checkpoint / _MARKER).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _whole_checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    found = sorted(folder.glob(f"{_PREFIX}*"), reverse=True) if folder.is_dir() else []
    return [path for path in found if is_whole(path)]


def _mark_whole(checkpoint: Path) -> None:
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    temporary = checkpoint / f".{_MARKER}"
    temporary.write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    temporary.replace(checkpoint / _MARKER)
