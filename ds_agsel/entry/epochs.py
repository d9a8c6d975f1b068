"""How many optimizer steps epoch 1 has, during which steps explore."""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Any

from deepspeed import comm as dist

from ds_agsel.config import SelectionConfig
from ds_agsel.ds_config import DsConfig
from ds_agsel.entry import callers


def steps_per_epoch(config: SelectionConfig, ds_config: DsConfig, training_data: Any) -> int | None:
    """Return what the section says, else what follows from the data or the calling framework; None where nobody knows.

    The process group must be there.
    """
    return config.steps_per_epoch or _of_data(training_data, ds_config) or callers.steps_per_epoch(ds_config)


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
