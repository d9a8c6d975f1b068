"""Facts that the framework calling `deepspeed.initialize` knows but does not pass on, found by `frames`."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from ds_agsel.entry import frames

logger = logging.getLogger("ds_agsel")


def steps_per_epoch(accumulation: int) -> tuple[int, str] | None:
    """Return the optimizer steps in an epoch of the HF Trainer or Accelerator that is calling, and who says so.

    A Trainer's number is its own; where its data have no length, its ``max_steps`` is the length of epoch 1. An
    Accelerator's is that of the data loader that stands first in the running ``prepare``, else of the only one prepared
    before; two of different lengths are ambiguous. None if unknown.

    Args:
        accumulation: micro-batches in an optimizer step.
    """
    for _, frame in frames.methods_of("transformers.trainer", "Trainer"):
        if "num_update_steps_per_epoch" in frame.f_locals:
            return int(frame.f_locals["num_update_steps_per_epoch"]), "the Trainer"
        if "train_dataloader" in frame.f_locals:
            return _of_trainer(frame.f_locals, accumulation)
    for accelerator, frame in frames.methods_of("accelerate.accelerator", "Accelerator"):
        if frame.f_code.co_name == "_prepare_deepspeed":
            steps = _steps(_training_loader(accelerator, frame.f_locals.get("args", ())), accumulation)
            return None if steps is None else (steps, "the Accelerator's data loader")
    return None


def _of_trainer(variables: Mapping[str, Any], accumulation: int) -> tuple[int, str] | None:
    steps = _steps(variables["train_dataloader"], accumulation)
    if steps is not None:
        return steps, "the Trainer's data loader"
    limit = variables.get("max_steps")
    if isinstance(limit, int) and limit > 0:
        return limit, "the Trainer's max_steps, as its data have no length"
    return None


def only_evaluates() -> bool:
    """Return whether TRL is making the engine of a reference model.

    TRL before 1.10 leaves the optimizer in that model's ds_config (trl/models/utils.py, prepare_deepspeed).
    """
    return any(
        frame.f_code.co_name == "prepare_deepspeed" and frame.f_globals.get("__name__", "").startswith("trl.")
        for frame in frames.callers()
    )


def warn_of_unseen_ranks() -> None:
    """Warn if the calling Accelerator does not know of all ranks, and so gives each of them the same data."""
    for accelerator, _ in frames.methods_of("accelerate.accelerator", "Accelerator"):
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        if accelerator.num_processes < ranks:
            logger.warning(
                "Accelerate sees %d process and DeepSpeed has %d ranks, so that every rank trains on the same "
                "rows. On a CPU, use TrainingArguments(use_cpu=True), or "
                "Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend='gloo')]).",
                accelerator.num_processes, ranks,
            )  # fmt: skip
        return


def warn_of_replaced_optimizer(given: Any) -> None:
    """Warn if the calling Accelerator passes ``given`` in place of a user's optimizer that is not an Adam."""
    for _, frame in frames.methods_of("accelerate.accelerator", "Accelerator"):
        for prepared in frame.f_locals.get("args", ()):
            if isinstance(prepared, torch.optim.Optimizer) and not isinstance(
                prepared, (type(given), torch.optim.Adam, torch.optim.AdamW)
            ):
                logger.warning(
                    "Accelerate has replaced your %s by %s, as it does under CPU offload. Use "
                    "torch.optim.AdamW, or set zero_force_ds_cpu_optimizer to false to have your own looked at.",
                    type(prepared).__name__, type(given).__name__,
                )  # fmt: skip
                return


def _training_loader(accelerator: Any, prepared_now: tuple[Any, ...]) -> Any:
    loaders = accelerator._dataloaders
    num_now = sum(isinstance(argument, DataLoader) for argument in prepared_now)
    if 0 < num_now <= len(loaders):
        return loaders[-num_now]
    lengths = {_length(loader) for loader in loaders}
    return loaders[0] if len(lengths) == 1 else None


def _steps(loader: Any, accumulation: int) -> int | None:
    length = _length(loader)
    if length is None:
        return None
    return max(1, math.ceil(length / accumulation))


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # None, or data without a length
        return None
