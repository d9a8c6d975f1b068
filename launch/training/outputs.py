"""The final model of a run, on disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ds_agsel.errors import CheckpointError


def save_model(
    model: Any,
    state_dict: Mapping[str, torch.Tensor],
    tokenizer: Any,
    folder: Path,
    *,
    extra_files: Mapping[str, str] | None = None,
) -> None:
    """Write ``folder`` for ``from_pretrained``: weights, tokenizer, generation config. Replaces it whole.

    ``extra_files`` are texts by file name. Raises CheckpointError if it can't be written; the folder that was there
    before then stays.
    """
    building = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(building, ignore_errors=True)
    try:
        model.save_pretrained(building, state_dict=state_dict)
        tokenizer.save_pretrained(building)
        for name, text in (extra_files or {}).items():
            (building / name).write_text(text, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two come from the writers of tensors
        shutil.rmtree(building, ignore_errors=True)
        raise CheckpointError(
            f"The model could not be written to {folder}: {error}. Make room, then --resume."
        ) from error
