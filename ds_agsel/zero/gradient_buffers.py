"""Flat gradient buffers, held for the groups that this step needs and for no others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from deepspeed.accelerator import get_accelerator


class HostGradientBuffers:
    """Gives each needed fp32 partition its ``.grad`` and takes it back, reusing buffers of equal size.

    Stock ZeRO-Offload pins one for every partition for good (stage_1_and_2.py:940), and applies what an earlier
    step left in it to a partition that got no gradient since.
    """

    def __init__(self, partitions: Sequence[torch.Tensor], pin_memory: bool) -> None:
        self._partitions = partitions
        self._pin_memory = pin_memory

    def hold(self, groups: Iterable[int]) -> list[int]:
        """Make ``groups`` the ones that have a gradient buffer; returns those that were given one now.

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
        buffer = torch.zeros_like(partition, requires_grad=False)
        return get_accelerator().pin_memory(buffer) if self._pin_memory else buffer

    def _release(self, buffer: torch.Tensor) -> None:
        if self._pin_memory:
            get_accelerator().unpin_memory(buffer)

    def held_bytes(self) -> int:
        """Bytes of the buffers held now, on this rank."""
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
                    get_accelerator().unpin_memory(buffer)

    def _allocate(self, numel: int) -> torch.Tensor:
        buffer = torch.zeros(numel, dtype=self._dtype, device=self._device)
        return get_accelerator().pin_memory(buffer) if self._pin_memory else buffer
