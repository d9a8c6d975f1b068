"""The ds_config of a run: its "auto" values filled in, its steps per epoch written into our section."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from ds_agsel.config import SECTION, find_section
from ds_agsel.ds_config import AUTO, DsConfig, with_batch, with_bf16, with_learning_rate, with_scheduler_params
from ds_agsel.errors import ConfigError

from ..data.batches import Batching
from .hardware import bf16_is_fast

_DEFAULT_LR = 1e-4
_WARMUP_FRACTION = 0.1


def batching(raw: Mapping[str, Any], world_size: int, micro_batch: int | None, accumulation: int | None) -> Batching:
    """Return rows per micro-batch and accumulation steps: the command line's, else those of the ds_config ``raw``."""
    config = DsConfig.of(raw)
    config.require_readable("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    overridden = micro_batch is not None or accumulation is not None
    total = None if overridden else config.train_batch_size
    micro = micro_batch or config.micro_batch_size
    steps = accumulation or config.accumulation_steps
    if total is not None:
        if micro is None:
            micro = total // ((steps or 1) * world_size)
        if steps is None and micro > 0:
            steps = total // (micro * world_size)
        if not micro or not steps or micro * steps * world_size != total:
            raise ConfigError(
                f"train_batch_size={total} is not micro-batch {micro} × accumulation {steps} × "
                f"{world_size} ranks. "
                "Change one, or leave train_batch_size out."
            )
    if micro is None:
        raise ConfigError(
            "The ds_config sets no batch size. Set train_micro_batch_size_per_gpu, or --micro-batch-size."
        )
    return Batching(micro, steps or 1, world_size)


def complete(
    config: Mapping[str, Any],
    *,
    batches: Batching,
    steps_per_epoch: int,
    total_steps: int,
    lr: float | None,
    seed: int,
    section: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a copy of ``config`` with nothing left open; ``config`` is not edited.

    "auto" is filled where the run knows the value: batch sizes, the optimizer's lr (--lr, or 1e-4), the
    scheduler's warmup_max_lr, total_num_steps and warmup_num_steps (a tenth of the run). A --lr overrides the
    file's. In our own section steps_per_epoch and seed are filled where they are null, and ``section``
    overrides what it names. Raises ConfigError for an "auto" that is left elsewhere.
    """
    filled = with_batch(copy.deepcopy(dict(config)), batches.micro_batch, batches.accumulation)
    if lr is not None or "optimizer.params.lr" in DsConfig.of(filled).autos:
        filled = with_learning_rate(filled, _DEFAULT_LR if lr is None else lr)
    if DsConfig.of(filled).bf16_is_auto:
        filled = with_bf16(filled, bf16_is_fast())
    filled = _with_known_schedule(filled, total_steps, lr_is_given=lr is not None)
    if find_section(filled) is not None:
        ours = {**filled[SECTION], **section}
        for name, value in (("steps_per_epoch", steps_per_epoch), ("seed", seed)):
            if ours.get(name) in (None, AUTO):
                ours[name] = value
        filled[SECTION] = ours
    elif section:
        raise ConfigError(
            f"--select-percent, --policy and --section need the section {SECTION!r} in the ds_config. Add it: {{}}."
        )
    open_settings = [path for path in DsConfig.of(filled).autos if not path.startswith(f"{SECTION}.")]
    if open_settings:
        raise ConfigError(f'{open_settings[0]}="auto" is not known to launch/train.py. Set its value.')
    return filled


def _with_known_schedule(config: Mapping[str, Any], total_steps: int, *, lr_is_given: bool) -> dict[str, Any]:
    read = DsConfig.of(config)
    known = {
        "total_num_steps": total_steps,
        "warmup_num_steps": max(2, round(_WARMUP_FRACTION * total_steps)),
        "warmup_max_lr": read.optimizer_params.get("lr"),
    }
    overridden = "warmup_max_lr" if lr_is_given else None
    return with_scheduler_params(
        config,
        **{
            name: value
            for name, value in known.items()
            if f"scheduler.params.{name}" in read.autos or (name == overridden and name in read.scheduler_params)
        },
    )
