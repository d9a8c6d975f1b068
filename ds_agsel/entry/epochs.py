"""How many optimizer steps epoch 1 has, during which steps explore.

[Note: Where the length comes from] The section's ``steps_per_epoch`` is taken first, then ``training_data``, then what
the calling framework knows. A raw loop with its own DataLoader passes none of these: there, once the first step has
been applied, the DataLoader that the loop is iterating is found among the live objects of the process (`EpochFinder`).
torch offers no hook for it; one on DataLoader.__iter__ would replace the search. A loop over something else has no
length: the scheduler's ``total_num_steps`` is taken for it, or `ASSUMED_STEPS`, and the log says so.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch.utils.data.dataloader import _BaseDataLoaderIter

from ds_agsel.config import SECTION, SelectionConfig
from ds_agsel.ds_config import DsConfig
from ds_agsel.entry import callers

logger = logging.getLogger("ds_agsel")

ASSUMED_STEPS = 1000


@dataclass(frozen=True)
class EpochLength:
    """Optimizer steps in epoch 1, and the source of the number."""

    steps: int
    source: str


def known_length(config: SelectionConfig, ds_config: DsConfig, training_data: Any) -> EpochLength | None:
    """Return the length of epoch 1 if it is known before training starts; None for a raw loop with its own data.

    The process group must be there.
    """
    if config.steps_per_epoch is not None:
        return EpochLength(config.steps_per_epoch, f"{SECTION}.steps_per_epoch")
    of_data = _of_data(training_data, ds_config)
    if of_data is not None:
        return EpochLength(of_data, "training_data")
    found = callers.steps_per_epoch(ds_config.accumulation_steps or 1)
    return None if found is None else EpochLength(*found)


def _of_data(training_data: Any, ds_config: DsConfig) -> int | None:
    """Return the optimizer steps that one pass over ``training_data`` takes."""
    if not isinstance(training_data, Sized):
        return None
    batch = ds_config.train_batch_size
    if batch is None:
        if ds_config.micro_batch_size is None:
            return None
        batch = ds_config.micro_batch_size * (ds_config.accumulation_steps or 1) * dist.get_world_size()
    return max(1, math.ceil(len(training_data) / batch))


class EpochFinder:
    """Looks for the DataLoader that the training loop is iterating; for `PolicyContext.find_steps_per_epoch`."""

    def __init__(self, ds_config: DsConfig) -> None:
        self._accumulation = ds_config.accumulation_steps or 1
        total = ds_config.scheduler_params.get("total_num_steps")
        self._total_steps = total if isinstance(total, int) and total > 0 else None

    def __call__(self) -> int:
        """Return rank 0's number, on every rank. Collective; called while the loop is inside its first epoch."""
        found = self._found()
        if dist.get_rank() == 0:
            self._report(found)
        if dist.get_world_size() == 1:
            return found.steps
        steps = torch.tensor(found.steps, dtype=torch.int64, device=get_accelerator().current_device_name())
        dist.broadcast(steps, src=0)
        return int(steps.item())

    def _found(self) -> EpochLength:
        lengths = _lengths_of_running_loaders()
        if len(lengths) == 1:
            steps = max(1, math.ceil(lengths.pop() / self._accumulation))
            return EpochLength(steps, "the DataLoader that the training loop iterates")
        if self._total_steps is not None:
            return EpochLength(self._total_steps, "scheduler.params.total_num_steps")
        return EpochLength(ASSUMED_STEPS, "")

    @staticmethod
    def _report(found: EpochLength) -> None:
        if found.source:
            logger.info("adagrad_select: epoch 1 is taken to have %d steps: %s.", found.steps, found.source)
            return
        logger.warning(
            "adagrad_select: the training loop iterates no DataLoader of known length, so that epoch 1, during which "
            "steps explore, is assumed to have %d steps. Set %s.steps_per_epoch to the optimizer steps in one pass "
            "over the data.",
            found.steps, SECTION,
        )  # fmt: skip


def _lengths_of_running_loaders() -> set[int]:
    """Return the batches in one pass of each DataLoader that is being iterated in this process."""
    lengths = set()
    for candidate in gc.get_objects():
        # By type(): isinstance would ask lazy proxies of other packages for their class.
        if issubclass(type(candidate), _BaseDataLoaderIter) and candidate._num_yielded > 0:
            try:
                lengths.add(len(candidate))
            except TypeError:  # an IterableDataset has no length
                continue
    return lengths
