"""Whole checkpoints of a job, also where plain DeepSpeed writes them: saved, pruned, found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_agsel import checkpoints
from ds_agsel.errors import CheckpointError
from ds_agsel.tag_owner import Run

from . import ranks

RUN = Run()  # where plain DeepSpeed saves; with a selection the engine has its own


def tag_of(step: int) -> str:
    """Return the folder name of a checkpoint taken after ``step`` steps."""
    return f"step{step:08d}"


def save(engine: Any, folder: Path, step: int, client_state: dict[str, Any], *, keep: int) -> Path:
    """Save the state after ``step`` steps, then remove all but the ``keep`` newest. Collective.

    A checkpoint of that step that is whole already is left. Raises CheckpointError on every rank where one
    could not write; the checkpoints before stay as they were.
    """
    tag = tag_of(step)
    target = folder / tag
    if ranks.any_rank(ranks.is_main() and not checkpoints.problems(target)):
        return target
    if hasattr(engine, "selection"):
        engine.save_checkpoint(str(folder), tag, client_state=client_state, keep=keep)
        return target
    engine.save_checkpoint(str(folder), tag, client_state=client_state)
    failure: Exception | None = None
    if ranks.is_main():
        try:
            checkpoints.seal(target, RUN.facts())
            checkpoints.prune(folder, keep, RUN)
        except (OSError, CheckpointError) as error:
            failure = error
    if ranks.any_rank(failure is not None):
        raise CheckpointError(f"checkpoint {target} could not be completed: {failure or 'see rank 0'}. Make room.")
    return target


def are_there(folder: Path) -> bool:
    """Return whether ``folder`` has a checkpoint, whole or not."""
    return bool(checkpoints.candidates(folder))


def load(engine: Any, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Load the newest whole checkpoint of ``folder``; return its folder and its client_state. Collective.

    Raises CheckpointError if none is whole.
    """
    tag = None
    if not hasattr(engine, "selection"):
        [(tag, passed_over)] = ranks.gather([checkpoints.newest_whole(folder)] if ranks.is_main() else [])
        if tag is None:
            reasons = "; ".join(f"{name} ({checkpoints.in_words(why)})" for name, why in passed_over.items())
            raise CheckpointError(f"{folder}: no whole checkpoint: {reasons}. Start without --resume.")
        RUN.go_on_from(checkpoints.read_manifest(folder / tag).facts)
    path, client_state = engine.load_checkpoint(str(folder), tag=tag)
    return Path(path).parent, client_state or {}
