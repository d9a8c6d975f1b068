"""The fp32 partitions that an optimizer updates, alike for all stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


def masters(optimizer: ZeROOptimizer) -> list[torch.Tensor]:
    """Return the fp32 partitions as DeepSpeed's loops see them now: of param groups, with ZeRO-3 of sub-groups."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return optimizer.fp32_partitioned_groups_flat
    return optimizer.single_partition_of_fp32_groups


def param_group_of(optimizer: ZeROOptimizer, index: int) -> dict[str, Any]:
    """Return the base optimizer's param group that `masters` ``[index]`` is stepped in."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        index = optimizer.sub_group_to_group_id[index]
    return optimizer.optimizer.param_groups[index]


def set_master(optimizer: ZeROOptimizer, index: int, master: torch.Tensor) -> None:
    """Let DeepSpeed step ``master`` as its partition ``index``."""
    masters(optimizer)[index] = master
    if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):  # which fills its groups for a step alone
        param_group_of(optimizer, index)["params"] = [master]


def replace_masters(optimizer: ZeROOptimizer, convert: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put ``convert(master)`` in the place of each fp32 partition. Before anything is linked to it."""
    for index, master in enumerate(masters(optimizer)):
        set_master(optimizer, index, convert(master).requires_grad_(True))


@contextmanager
def masters_made_on_host() -> Iterator[None]:
    """Inside, a new ZeRO optimizer makes its fp32 partitions in host memory, also without offload.

    Its constructor puts them on ``self.device`` (stage_1_and_2.py:278, 560; stage3.py:333, 1170), the accelerator;
    there they would take 4 bytes an element of all partitions, for the short time until they are taken away.
    """

    def keep(self: ZeROOptimizer, value: Any) -> None:
        self.__dict__["device"] = value  # the attribute's value once the property is removed

    classes = (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)
    for cls in classes:
        cls.device = property(lambda self: "cpu", keep)
    try:
        yield
    finally:
        for cls in classes:
            del cls.device
