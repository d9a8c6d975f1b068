"""Universal checkpoints of states in any form: DeepSpeed's own converter, given fp32 moments and a tag of its own.

[Note: What the converter reads] DeepSpeed's `ds_to_universal` (0.19.8) looks for tensors ``exp_avg`` and ``exp_avg_sq``
of as many elements as the master weights: it stops at 8-bit moments, and keeps bf16 ones in bf16. It unpickles what it
reads, and writes to the output folder from the start. Here it reads a folder of links to the tag's files, in which the
optimizer's files have fp32 moments, once `TagFiles` has read each without running code; what it has made gets a
manifest, and its place when it is whole.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import constants

from ds_agsel import checkpoints
from ds_agsel.errors import CheckpointError
from ds_agsel.files import write_atomically
from ds_agsel.zero.compat.converter import convert_to_universal
from ds_agsel.zero.repartition import sections
from ds_agsel.zero.states.forms import form_of, in_fp32
from ds_agsel.zero.tag_files import TagFiles


def to_universal(folder: Path, output: Path, workers: int = 1) -> None:
    """Write the universal form of the tag in ``folder`` to ``output``, a new folder; ``latest_universal`` names it.

    For a while it takes as much disk beside ``output`` as the tag has in fp32, and again. ``workers``: processes.
    Raises CheckpointError for a tag that is not whole or that a converter can't read, and where ``output`` exists.
    """
    if output.exists():
        raise CheckpointError(f"{output} exists. Name a new folder, or remove it.")
    wrong = checkpoints.problems(folder)
    if wrong:
        raise CheckpointError(f"{folder} can't be converted: {checkpoints.in_words(wrong)}. Convert another tag.")
    output = output.absolute()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".ds_agsel_universal_") as work:
            source, made = Path(work, folder.resolve().name), Path(work, output.name + ".made")
            source.mkdir()
            _in_the_converters_form(TagFiles(folder), source)
            _convert(source, made, workers)
            checkpoints.seal(made)
            made.rename(output)
        write_atomically(output.parent / checkpoints.LATEST_UNIVERSAL_FILE, output.name)
    except OSError as error:
        raise CheckpointError(f"{output} can't be written: {error}. Make room, or name another folder.") from error


def _in_the_converters_form(tag: TagFiles, target: Path) -> None:
    """Link the files of ``tag`` to ``target``, those of the optimizer written anew where moments are not fp32."""
    of_torch, of_optimizer = set(tag.names("*.pt")), set(tag.names("*_optim_states.pt"))
    for path in sorted(tag.folder.iterdir()):
        if not tag.has(path.name):
            continue
        content: Any = tag.load(path.name) if path.name in of_torch else None  # raises where it would run code
        is_state = path.name in of_optimizer
        states = sections(content[constants.OPTIMIZER_STATE_DICT])[0]["state"] if is_state else {}
        packed = [index for index, state in states.items() if form_of(state) is not None]
        for index in packed:
            states[index] = in_fp32(states[index])
        if packed:
            torch.save(content, target / path.name)
        else:
            os.symlink(path.resolve(), target / path.name)


def _convert(source: Path, target: Path, workers: int) -> None:
    try:
        convert_to_universal(source, target, workers)
    except (AssertionError, KeyError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"DeepSpeed's ds_to_universal stopped ({type(error).__name__}: {error}). Convert a checkpoint that "
            "ds_agsel saved, by the DeepSpeed that saved it."
        ) from error
