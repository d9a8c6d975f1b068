"""With the section switched off: plain DeepSpeed's error on a checkpoint that was saved with a selection."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from ds_agsel import checkpoints
from ds_agsel.config import SECTION
from ds_agsel.errors import CheckpointError


def name_the_remedy(engine: Any) -> None:
    """Make ``load_checkpoint`` of the plain ``engine`` name the remedy if it fails on our states.

    A selection has param groups by block, and DeepSpeed 0.19.8 can't load them into others: it raises RuntimeError of a
    "parameter-alignment layout" (stages 1, 2) or ValueError of a "number of parameter groups" (stage 3). Any load that
    works, and any other checkpoint's error, stays as it is.
    """
    stock = engine.load_checkpoint

    @functools.wraps(stock)
    def load_checkpoint(load_dir: str | os.PathLike[str], tag: str | None = None, *args: Any, **kwargs: Any) -> Any:
        try:
            return stock(load_dir, tag, *args, **kwargs)
        except Exception as error:
            folder = _saved_with_selection(Path(load_dir), tag)
            if folder is None or isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"checkpoint {folder} was saved with {SECTION}, and {SECTION}.enabled is false: plain DeepSpeed can't "
                f"load its optimizer states, which are by block ({type(error).__name__}: {error}). To train every "
                f'block from it, set {SECTION}.enabled=true and {SECTION}.policy="all"; for the weights alone, '
                "load_checkpoint(..., load_module_only=True, load_optimizer_states=False)."
            ) from error

    engine.load_checkpoint = load_checkpoint


def _saved_with_selection(directory: Path, tag: str | None) -> Path | None:
    try:
        tags = [str(tag)] if tag else checkpoints.candidates(directory)[:1]
        folders = [checkpoints.folder_of(directory, name) for name in tags]
    except (CheckpointError, OSError):
        return None
    return next((folder for folder in folders if (folder / checkpoints.STATE_FILE).is_file()), None)
