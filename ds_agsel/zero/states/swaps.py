"""What a step reads and writes of states in a file on NVMe: what all homes share whose states are there.

[Note: Taken over] DeepSpeed's own swapper reads a sub-group's states and its gradients in one operation, so that states
can't be read before there are gradients, and the engine loads no checkpoint of what it holds (engine.py:4456). It makes
the fp32 partitions, which never are in memory all at once; then `SwappedStates` takes them over. To DeepSpeed's code
this is offload to the host from there on: gradients of the step's blocks are in host memory, checkpoints have the
form of offload to the host, and can be loaded with it and the other way round.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ds_agsel.errors import ConfigError
from ds_agsel.residency.rooms import master_room
from ds_agsel.residency.states import MASTER
from ds_agsel.residency.swap import Rooms, SwappedStates, layout_of
from ds_agsel.residency.swap_plan import FileLayout, default_ring
from ds_agsel.selection import Selection
from ds_agsel.zero import compat
from ds_agsel.zero.states.home import StateHome


class Swaps(StateHome):
    """The reads and writes that a step needs of states in a file."""

    is_on_disk = True

    swapped: SwappedStates

    def _begin_swaps(self, selection: Selection, moment_rooms: Callable[[int], Rooms]) -> None:
        """Take charge of the partitions of an optimizer that DeepSpeed swaps; ``moment_rooms`` of so many elements.

        Raises ConfigError if a sub-group does not fit the buffers in host memory.
        """
        optimizer = self.optimizer
        if not isinstance(optimizer, compat.DeepSpeedZeroOptimizer_Stage3):
            raise TypeError(f"states of {type(optimizer).__name__} are not swapped")
        self._selection = selection
        settings, files = compat.take_swapper(optimizer)  # [Note: Taken over]
        # DeepSpeed's op divides a transfer among its threads, and direct I/O wants each part aligned.
        alignment = mmap.ALLOCATIONGRANULARITY * settings.threads
        rooms = {
            group: {MASTER: master_room(selection.config.master_weights, numel), **moment_rooms(numel)}
            for group, numel in enumerate(optimizer.fp16_partitioned_groups_flat_numel)
        }
        capacity = ring_bytes(layout_of(rooms, alignment), self.groups_of_block, selection)
        self.swapped = SwappedStates(settings.folder, rooms, alignment, settings.new_handle, capacity, self._count)
        for group, partition in enumerate(self._masters):
            # One group at a time, so that the partitions are never all in memory.
            file = files.get(group)
            if file is not None:
                numel = optimizer.fp16_partitioned_groups_flat_numel[group]
                partition.data = torch.from_file(str(file), size=numel)
            self._settle(group)
            if file is not None:
                file.unlink()

    def _settle(self, group: int) -> None:
        """Put the master weights of ``group``, which DeepSpeed sees, into the file, and hide them."""
        raise NotImplementedError

    def _count(self, kind: str, size: int) -> None:
        traffic = self._selection.current_traffic
        if kind == "read":
            traffic.nvme_read_bytes += size
        else:
            traffic.nvme_written_bytes += size

    def prefetch(self, blocks: Sequence[int] | None) -> None:
        if blocks is not None:
            self.swapped.start(self.groups_of(blocks))

    def begin(self, blocks: Sequence[int]) -> list[int]:
        groups = self.groups_of(blocks)
        self.swapped.start(groups)
        return groups

    def _drop_moments(self, group: int) -> None:
        self.swapped.drop(group)
        super()._drop_moments(group)

    def fp32_room(self, numel: int, device: torch.device) -> Tensor:
        return self.swapped.room(numel)


def ring_bytes(layout: FileLayout, groups_of_block: Mapping[int, Sequence[int]], selection: Selection) -> int:
    """Return the page-locked host memory for states: ``state_budget_bytes`` or, where that is null, `default_ring`.

    Raises ConfigError if a sub-group does not fit.
    """
    sizes = [sum(map(layout.size, groups)) for groups in groups_of_block.values()]
    budget = selection.config.state_budget_bytes
    if budget is None:
        return default_ring(sizes, selection.bound.num_blocks)
    largest = max(map(layout.size, layout.sizes))
    if budget < largest:
        raise ConfigError(
            f"adagrad_select.state_budget_bytes={budget} is less than the states of the largest sub-group, which take "
            f"{largest} bytes of page-locked host memory on this rank. Give at least that, or null."
        )
    return budget
