"""The ds_config, read and changed here and nowhere else: the only room that knows DeepSpeed's names of settings.

raw.py the mapping as it was written, reading.py what DeepSpeed makes of it, edits.py changes. Imports no deepspeed.
"""

from __future__ import annotations

from ds_agsel.ds_config.edits import (
    for_one_rank,
    with_batch,
    with_bf16,
    with_learning_rate,
    with_offload_to_cpu,
    with_scheduler_for_groups,
    with_scheduler_params,
    with_torch_adam,
    with_zero,
    without_optimizer,
    without_pipelined_swapping,
    without_synchronizing_timer,
    without_zero,
)
from ds_agsel.ds_config.raw import (
    AUTO,
    without_autos,
    zero_section,
)
from ds_agsel.ds_config.reading import (
    DEVICES,
    DsConfig,
    Offload,
    read_ds_config,
    unknown_device,
)

__all__ = [
    "AUTO",
    "DEVICES",
    "DsConfig",
    "Offload",
    "for_one_rank",
    "read_ds_config",
    "unknown_device",
    "with_batch",
    "with_bf16",
    "with_learning_rate",
    "with_offload_to_cpu",
    "with_scheduler_for_groups",
    "with_scheduler_params",
    "with_torch_adam",
    "with_zero",
    "without_autos",
    "without_optimizer",
    "without_pipelined_swapping",
    "without_synchronizing_timer",
    "without_zero",
    "zero_section",
]
