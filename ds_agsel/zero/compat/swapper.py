"""The settings of DeepSpeed's NVMe swapper, and how a load bypasses it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3


def can_swap() -> bool:
    """Return whether DeepSpeed's asynchronous I/O op can be built here: it needs libaio's headers."""
    return AsyncIOBuilder().is_compatible(verbose=False)


@dataclass(frozen=True)
class SwapSettings:
    """What the ds_config says about NVMe: ``offload_optimizer`` and ``aio``.

    Attributes:
        new_handle: makes a handle of the asynchronous I/O op.
        threads: of a handle, among which each transfer is divided evenly.
    """

    folder: Path
    threads: int
    new_handle: Callable[[], Any]


def take_swapper(optimizer: DeepSpeedZeroOptimizer_Stage3) -> tuple[SwapSettings, dict[int, Path]]:
    """Return DeepSpeed's swap settings and, by sub-group, the file that begins with its fp32 partition.

    From here on ``optimizer`` has no swapper, and treats its states as offloaded to the host.
    """
    swapper = optimizer.optimizer_swapper
    partitions = enumerate(optimizer.fp32_partitioned_groups_flat)
    files = {
        index: Path(swapper.swap_params_info[swapper.parameter_id(partition)].get_swap_paths()[0])
        for index, partition in partitions
        if optimizer._swappable_optimizer_subgroup(index)
    }
    aio = swapper.aio_config
    names = ("block_size", "queue_depth", "single_submit", "overlap_events", "intra_op_parallelism")
    new_handle = partial(AsyncIOBuilder().load(verbose=False).aio_handle, **{name: aio[name] for name in names})
    optimizer.swap_optimizer, optimizer.optimizer_swapper = False, None
    settings = SwapSettings(Path(swapper.swap_config.nvme_path), aio["intra_op_parallelism"], new_handle)
    return settings, files


@contextmanager
def swapped_weights_follow(optimizer: DeepSpeedZeroOptimizer_Stage3) -> Iterator[None]:
    """Inside, ZeRO-3 may load a checkpoint also where it has model weights on NVMe; they follow the master weights.

    Its load copies masters to the flat weights of every sub-group, and such a one has none (stage3.py:3578): inside,
    all of those share one buffer, whose content is discarded.
    """
    flats = optimizer.fp16_partitioned_groups_flat
    swapped = [index for index, flat in enumerate(flats) if flat is None]
    numels = optimizer.fp16_partitioned_groups_flat_numel
    sink = torch.empty(max((numels[index] for index in swapped), default=0), dtype=optimizer.dtype)
    before = {index: [partition.data for partition in optimizer.fp16_partitioned_groups[index]] for index in swapped}
    for index in swapped:
        flats[index] = sink.narrow(0, 0, numels[index])
    try:
        yield
    finally:
        for index in swapped:
            flats[index] = None
            for partition, data in zip(optimizer.fp16_partitioned_groups[index], before[index], strict=True):
                partition.data = data
            optimizer._partitioned_params_swap_out(index)
