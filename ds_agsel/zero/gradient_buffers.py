"""The fp32 host gradients of ZeRO-Offload, held for the groups that this step needs and for no others."""

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
