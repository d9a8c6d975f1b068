"""One line at `initialize`, on rank 0, whatever the logging level: what will be trained, or why nothing is selected."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

import torch

from ds_agsel.ds_config import DsConfig
from ds_agsel.entry.epochs import EpochLength
from ds_agsel.entry.preparation import Preparation
from ds_agsel.samples.choice import num_taken
from ds_agsel.zero.step_device import StepDevice

logger = logging.getLogger("ds_agsel")


def announce(text: str) -> None:
    """Print ``text`` on rank 0: to the log if it shows INFO, else to stderr. A closed pipe is no error."""
    ranked = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if ranked else int(os.environ.get("RANK", "0"))
    if rank != 0:
        return
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info("adagrad_select: %s", text)
        return
    with contextlib.suppress(OSError, ValueError):  # ValueError: a closed file
        print(f"adagrad_select: {text}", file=sys.stderr, flush=True)


def selection(prepared: Preparation, ds_config: DsConfig, choice: StepDevice, epoch: EpochLength | None) -> str:
    """Return what a run will do: blocks a step, steps that may explore, where the optimizer states are."""
    lottery, config = prepared.lottery, prepared.config
    outside = [
        f"{len(blocks)} {when}" for blocks, when in ((lottery.always, "always"), (lottery.never, "never")) if blocks
    ]
    parts = [
        f"policy {config.policy} updates {_how_many(prepared)} at each step"
        f"{' (' + ', '.join(outside) + ')' if outside else ''}",
        *_exploring(prepared, epoch),
        *_rows(prepared, ds_config),
        _states(ds_config, choice),
    ]
    return f"{'; '.join(parts)}."


def _how_many(prepared: Preparation) -> str:
    bound, units = prepared.bound, "blocks" if prepared.config.granularity == "block" else "units"
    number = f"{bound.num_blocks} of {len(prepared.blocks)} {units}"
    if bound.lottery is None or bound.lottery.share is None:
        return number
    share = bound.lottery.share
    return f"at most {number}, {share.limit} of the {sum(share.costs)} parameters in the lottery,"


def _exploring(prepared: Preparation, epoch: EpochLength | None) -> Iterator[str]:
    if not prepared.policy.needs_steps_per_epoch:
        return
    rate = prepared.config.explore_rate
    if rate == 0:
        yield "no step explores"
    elif epoch is None:
        yield (
            f"steps explore with a probability that starts at {rate:g} and falls until epoch 1 ends, whose length is "
            "looked up after the first step"
        )
    else:
        yield (
            f"steps explore with a probability that starts at {rate:g} and falls until epoch 1 ends, after "
            f"{epoch.steps} steps (from {epoch.source})"
        )


def _rows(prepared: Preparation, ds_config: DsConfig) -> Iterator[str]:
    gast, rows = prepared.config.gast, ds_config.micro_batch_size
    if gast is None or rows is None:
        return
    taken = num_taken(gast, rows)
    if taken < rows:
        how = {"sample": "drawn by alignment", "random": "drawn at random", "top": "of the highest alignment"}[
            gast.draw
        ]
        yield f"each learns from {taken} of the {rows} rows of a micro-batch, {how}"
        return
    logger.warning(
        "adagrad_select.gast masks nothing: train_micro_batch_size_per_gpu=%d, of which each block takes %d rows. Rows "
        "are chosen within a micro-batch: use a larger one (and fewer accumulation steps), or a smaller "
        "gast.select_samples.",
        rows,
        taken,
    )
    yield "each learns from all rows"


def _states(ds_config: DsConfig, choice: StepDevice) -> str:
    if choice is StepDevice.VISIT:
        return "optimizer states are in host memory, and visit the accelerator where their blocks are updated"
    if choice is StepDevice.STAY:
        return "optimizer states are in host memory, where the model is"
    place = "on NVMe" if ds_config.offload_optimizer.device == "nvme" else "in host memory"
    return f"optimizer states are {place}, and AdamW runs on the host"
