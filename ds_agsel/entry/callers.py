"""What the framework that calls `deepspeed.initialize` knows and does not hand over.

Accelerate gives DeepSpeed the model and the optimizer and keeps the data loader (accelerator.py:2144, 1.15); HF
Trainer and TRL go through it. The only way from there to here is the call stack.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader

from ds_agsel.ds_config import DsConfig

logger = logging.getLogger("ds_agsel")


def steps_per_epoch(ds_config: Mapping[str, Any]) -> int | None:
    """Optimizer steps in an epoch of the HF Trainer or Accelerator that is calling; None where nobody knows.

    A Trainer's number is its own. An Accelerator's is that of the data loader that stands first in the running
    ``prepare``, else of the only one prepared before; two of different lengths are ambiguous: None.
    """
    accumulation = DsConfig.of(ds_config).accumulation_steps or 1
    for frame in _frames():
        owner = frame.f_locals.get("self")
        if _is_a(owner, "transformers.trainer", "Trainer"):
            if "num_update_steps_per_epoch" in frame.f_locals:
                return int(frame.f_locals["num_update_steps_per_epoch"])
            if "train_dataloader" in frame.f_locals:
                return _steps(frame.f_locals["train_dataloader"], accumulation)
    for frame in _frames():
        owner = frame.f_locals.get("self")
        if _is_a(owner, "accelerate.accelerator", "Accelerator") and frame.f_code.co_name == "_prepare_deepspeed":
            return _steps(_training_loader(owner, frame.f_locals.get("args", ())), accumulation)
    return None


def only_evaluates() -> bool:
    """Whether TRL is calling for a reference model, whose ds_config it leaves the optimizer in before 1.10
    (trl/models/utils.py, prepare_deepspeed)."""
    return any(
        frame.f_code.co_name == "prepare_deepspeed" and frame.f_globals.get("__name__", "").startswith("trl.")
        for frame in _frames()
    )


def warn_of_unseen_ranks() -> None:
    """Say so where the calling Accelerator does not know of all ranks, and so gives each of them the same data."""
    for frame in _frames():
        owner: Any = frame.f_locals.get("self")
        if _is_a(owner, "accelerate.accelerator", "Accelerator"):
            ranks = int(os.environ.get("WORLD_SIZE", "1"))
            if owner.num_processes < ranks:
                logger.warning(
                    "Accelerate sees %d process and DeepSpeed has %d ranks, so that every rank trains on the same "
                    "rows. On a CPU, use TrainingArguments(use_cpu=True), or "
                    "Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend='gloo')]).",
                    owner.num_processes, ranks,
                )  # fmt: skip
            return


def warn_of_replaced_optimizer(given: Any) -> None:
    """Say so where the calling Accelerator hands over ``given`` for an optimizer of the user that is no Adam."""
    for frame in _frames():
        if not _is_a(frame.f_locals.get("self"), "accelerate.accelerator", "Accelerator"):
            continue
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


def _is_a(value: Any, module: str, name: str) -> bool:
    """Whether ``value`` is of class ``module.name``, without importing it."""
    cls = getattr(sys.modules.get(module), name, None)
    return isinstance(cls, type) and isinstance(value, cls)


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
