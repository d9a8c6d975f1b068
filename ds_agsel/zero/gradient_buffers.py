"""Flat gradient buffers, held only for the groups that this step needs.

Holding or letting go of a block's buffers costs what its own groups cost, however many others there are: an explore
step does it for each block, in the middle of backward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from ds_agsel.residency import page_locked
from ds_agsel.zero import compat


class FlatGradients:
    """A flat buffer for each group that needs one. Buffers of equal size are used again.

    Stock DeepSpeed keeps one for every group for good (stage_1_and_2.py:940; stage3.py:682 and 1456).

    Args:
        numels: elements of each group's buffer.
        zeroes: whether a buffer that is used again is zeroed. If not, it holds old numbers except in the partition's
            padding, which is 0 and stays so.

    Attributes:
        held: the buffers by group, (numel,).
    """

    def __init__(
        self, numels: Sequence[int], dtype: torch.dtype, device: str, pin_memory: bool, zeroes: bool = True
    ) -> None:
        self._numels = numels
        self._dtype = dtype
        self._device = device
        self._pin_memory = pin_memory
        self._zeroes = zeroes
        self._spare: dict[int, list[torch.Tensor]] = defaultdict(list)  # by numel
        self.held: dict[int, torch.Tensor] = {}

    def take_over(self, buffers: Mapping[int, torch.Tensor]) -> None:
        """Hold ``buffers``, by group, which DeepSpeed has made: page-locked if these are."""
        self.held.update(buffers)

    def let_go(self, groups: Iterable[int]) -> None:
        """Take the buffers of ``groups``; those that have none are passed over. They are `spare` from then on."""
        for group in groups:
            buffer = self.held.pop(group, None)
            if buffer is not None:
                self._spare[self._numels[group]].append(buffer)

    def add(self, groups: Iterable[int]) -> list[int]:
        """Give each of ``groups`` that has none a buffer; return those. Frees the spare ones that do not fit."""
        given = [group for group in groups if group not in self.held]
        allocated = []
        for group in given:
            spare = self._spare.get(self._numels[group])
            if spare:
                self.held[group] = spare.pop().zero_() if self._zeroes else spare.pop()
            else:
                allocated.append(group)
        if allocated:
            self.free_spare()  # first, so that the peak of memory does not grow by them
        for group in allocated:
            self.held[group] = self._allocate(self._numels[group])
        return given

    @property
    def spare(self) -> list[torch.Tensor]:
        """The buffers that no group has."""
        return [buffer for buffers in self._spare.values() for buffer in buffers]

    def free_spare(self) -> None:
        """Free the buffers that no group has."""
        for buffer in self.spare if self._pin_memory else ():
            compat.unpin_memory(buffer)
        self._spare.clear()

    def _allocate(self, numel: int) -> torch.Tensor:
        if self._pin_memory:
            return page_locked.zeros(numel, self._dtype, get_accelerator())
        return torch.zeros(numel, dtype=self._dtype, device=self._device)


class Zero3GradientBuffers:
    """The flat gradient partitions of a ZeRO-3 optimizer, and with CPU offload their fp32 copies, for active groups.

    Where the optimizer's states are offloaded both lie on the host. Parameters find their partition by
    `compat.gradient_partitions`, DeepSpeed's update finds the fp32 copy as its partition's ``.grad``.
    """

    def __init__(self, zero: compat.DeepSpeedZeroOptimizer_Stage3) -> None:
        self._zero = zero
        self._partitions = self._flat(zero.gradient_accumulation_dtype)
        self._fp32 = self._flat(zero.master_weights_and_grads_dtype) if zero.offload_optimizer else None
        self._free_stock_buffers()

    def _flat(self, dtype: torch.dtype) -> FlatGradients:
        zero = self._zero
        device = str(getattr(zero.device, "value", zero.device))
        return FlatGradients(zero.fp16_partitioned_groups_flat_numel, dtype, device, zero.offload_optimizer_pin_memory)

    def _free_stock_buffers(self) -> None:
        zero = self._zero
        if zero.offload_optimizer_pin_memory:
            compat.unpin_memory(zero.grad_partitions_flat_buffer)
            for partition in zero.fp32_partitioned_groups_flat:
                if partition.grad is not None:
                    compat.unpin_memory(partition.grad)
        zero.grad_partitions_flat_buffer = zero.grad_partitions_flat_buffer.new_empty(0)
        compat.gradient_partitions(zero).clear()
        for partition in zero.fp32_partitioned_groups_flat:
            partition.grad = None

    def hold(self, groups: Sequence[int]) -> None:
        """Make ``groups`` the ones that buffers are held for. A new buffer is zero."""
        self.let_go(sorted(self._partitions.held.keys() - set(groups)))
        self.add(groups)
        self.free_spare()

    def free_spare(self) -> None:
        """Free the buffers that no group has any more."""
        for buffers in self._of_both():
            buffers.free_spare()

    def spare(self) -> list[torch.Tensor]:
        """Return the buffers that no group has any more, and that are kept for the next one."""
        return [buffer for buffers in self._of_both() for buffer in buffers.spare]

    def _of_both(self) -> list[FlatGradients]:
        return [self._partitions] if self._fp32 is None else [self._partitions, self._fp32]

    def let_go(self, groups: Iterable[int]) -> None:
        """Take the buffers of ``groups``; those that have none are passed over."""
        zero, partitions = self._zero, compat.gradient_partitions(self._zero)
        for group in groups:
            for param in zero.fp16_groups[group]:
                partitions.pop(param.ds_id, None)
            zero.fp32_partitioned_groups_flat[group].grad = None
        self._partitions.let_go(groups)
        if self._fp32 is not None:
            self._fp32.let_go(groups)

    def add(self, groups: Iterable[int]) -> None:
        """Hold buffers for ``groups`` too. A new one is zero."""
        zero, partitions = self._zero, compat.gradient_partitions(self._zero)
        for group in self._partitions.add(groups):
            buffer = self._partitions.held[group]
            for param in zero.fp16_groups[group]:
                _, start, numel = zero.grad_position[zero.get_param_id(param)]
                partitions[param.ds_id] = buffer.narrow(0, start, numel)
        if self._fp32 is not None:
            for group in self._fp32.add(groups):
                zero.fp32_partitioned_groups_flat[group].grad = self._fp32.held[group]

    def holds(self, group: int) -> bool:
        """Return whether there is a buffer for ``group``."""
        return group in self._partitions.held

    def zero(self, param: Any, group: int) -> None:
        """Zero the gradient of ``param``, of ``group``, wherever the step will read it."""
        compat.gradient_partitions(self._zero)[param.ds_id].zero_()
        if self._fp32 is not None:
            _, start, numel = self._zero.grad_position[self._zero.get_param_id(param)]
            self._fp32.held[group].narrow(0, start, numel).zero_()


def spare_buffers(optimizer: compat.ZeROOptimizer) -> list[torch.Tensor]:
    """Return the buffers that no group of ``optimizer`` has; none of plain DeepSpeed's, which is measured too."""
    gradients: Any = getattr(optimizer, "_gradients", None)
    return [] if gradients is None else list(gradients.spare())
