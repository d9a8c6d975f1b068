"""Flat gradient buffers, held only for the groups that this step needs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from ds_agsel.residency import page_locked
from ds_agsel.zero import compat


class HostGradientBuffers:
    """Gives each needed fp32 partition its ``.grad`` and takes it back, reusing buffers of equal size.

    Stock ZeRO-Offload pins one for every partition for good (stage_1_and_2.py:940), and applies what an earlier
    step left in it to a partition that got no gradient since.
    """

    def __init__(self, partitions: Sequence[torch.Tensor], pin_memory: bool) -> None:
        self._partitions = partitions
        self._pin_memory = pin_memory

    def hold(self, groups: Iterable[int]) -> list[int]:
        """Make ``groups`` the ones that have a gradient buffer; return those that were given one now.

        A new holder's buffer, fp32 on the host like its partition, may hold old numbers except in the
        partition's padding, which is 0 and stays so.
        """
        wanted = set(groups)
        free: dict[int, list[torch.Tensor]] = defaultdict(list)
        for group, partition in enumerate(self._partitions):
            if group not in wanted and partition.grad is not None:
                free[partition.numel()].append(partition.grad)
                partition.grad = None
        given = [group for group in sorted(wanted) if self._partitions[group].grad is None]
        for group in given:
            partition = self._partitions[group]
            spare = free[partition.numel()]
            partition.grad = spare.pop() if spare else self._allocate(partition)
        for buffers in free.values():
            for buffer in buffers:
                self._release(buffer)
        return given

    def _allocate(self, partition: torch.Tensor) -> torch.Tensor:
        if self._pin_memory:
            return page_locked.zeros(partition.numel(), partition.dtype, get_accelerator())
        return torch.zeros_like(partition, requires_grad=False)

    def _release(self, buffer: torch.Tensor) -> None:
        if self._pin_memory:
            compat.unpin_memory(buffer)

    def held_bytes(self) -> int:
        """Return the bytes of the buffers held now, on this rank."""
        return sum(p.grad.numel() * p.grad.element_size() for p in self._partitions if p.grad is not None)


class FlatGradients:
    """A flat gradient buffer for each group that needs one, of the size of its partition; ZeRO-3's of either kind.

    Stock ZeRO-3 keeps all of them for good (stage3.py:682 and 1456).
    """

    def __init__(self, numels: Sequence[int], dtype: torch.dtype, device: str, pin_memory: bool) -> None:
        self._numels = numels
        self._dtype = dtype
        self._device = device
        self._pin_memory = pin_memory
        self.held: dict[int, torch.Tensor] = {}

    def hold(self, groups: Iterable[int]) -> None:
        """Make ``groups`` the ones in `held`. A new holder's buffer is zero; one that stays keeps what it has."""
        wanted = set(groups)
        free: dict[int, list[torch.Tensor]] = defaultdict(list)
        for group in self.held.keys() - wanted:
            free[self._numels[group]].append(self.held.pop(group))
        for group in sorted(wanted - self.held.keys()):
            spare = free[self._numels[group]]
            self.held[group] = spare.pop().zero_() if spare else self._allocate(self._numels[group])
        if self._pin_memory:
            for buffers in free.values():
                for buffer in buffers:
                    compat.unpin_memory(buffer)

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
        zero = self._zero
        self._partitions.hold(groups)
        partitions = compat.gradient_partitions(zero)
        partitions.clear()
        for group in groups:
            for param in zero.fp16_groups[group]:
                _, start, numel = zero.grad_position[zero.get_param_id(param)]
                partitions[param.ds_id] = self._partitions.held[group].narrow(0, start, numel)
        if self._fp32 is not None:
            for partition in zero.fp32_partitioned_groups_flat:
                partition.grad = None
            self._fp32.hold(groups)
            for group, gradient in self._fp32.held.items():
                zero.fp32_partitioned_groups_flat[group].grad = gradient

    def holds(self, group: int) -> bool:
        """Return whether there is a buffer for ``group``."""
        return group in self._partitions.held

    def zero(self, param: Any, group: int) -> None:
        """Zero the gradient of ``param``, of ``group``, wherever the step will read it."""
        compat.gradient_partitions(self._zero)[param.ds_id].zero_()
        if self._fp32 is not None:
            _, start, numel = self._zero.grad_position[self._zero.get_param_id(param)]
            self._fp32.held[group].narrow(0, start, numel).zero_()
