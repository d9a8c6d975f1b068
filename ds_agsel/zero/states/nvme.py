"""ZeRO-3 with ``offload_optimizer.device: nvme``: states come from a file and go back to it as their group is updated.

[Note: Taken over] DeepSpeed's own swapper reads a sub-group's states and its gradients in one operation, so that states
can't be read before there are gradients, and the engine loads no checkpoint of what it holds (engine.py:4456). It makes
the fp32 partitions, which never are in memory all at once; then `SwappedStates` takes them over. To DeepSpeed's code
this is offload to the host from there on: gradients of the step's blocks are in host memory, checkpoints have the
form of offload to the host, and can be loaded with it and the other way round.

[Note: Not there] A partition and a moment that lie in the file are expanded one-element zeros: right shape, no storage.
Read and write states only inside `readable` or `writable`, which map the file into memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ds_agsel.errors import ConfigError
from ds_agsel.residency.states import MASTER, MOMENTS
from ds_agsel.residency.swap import SwappedStates
from ds_agsel.residency.swap_plan import FileLayout, default_ring
from ds_agsel.selection import Selection
from ds_agsel.zero import compat
from ds_agsel.zero.repartition import sections, set_masters
from ds_agsel.zero.states.home import StateBytes, StateHome

_ELEMENT_BYTES = 4  # fp32


class StatesOnNvme(StateHome):
    """The states of a ZeRO-3 optimizer in a file, and the reads and writes that its steps need.

    Raises ConfigError if a sub-group does not fit the buffers in host memory.
    """

    is_on_disk = True

    def __init__(
        self, optimizer: compat.DeepSpeedZeroOptimizer_Stage3, block_of_group: Sequence[int], selection: Selection
    ) -> None:
        super().__init__(optimizer, block_of_group)
        self._selection = selection
        settings, files = compat.take_swapper(optimizer)  # [Note: Taken over]
        # DeepSpeed's op divides a transfer among its threads, and direct I/O wants each part aligned.
        alignment = mmap.ALLOCATIONGRANULARITY * settings.threads // _ELEMENT_BYTES
        layout = FileLayout(dict(enumerate(optimizer.fp16_partitioned_groups_flat_numel)), alignment)
        capacity = ring_bytes(layout, self.groups_of_block, selection) // _ELEMENT_BYTES
        self.swapped = SwappedStates(settings.folder, layout, settings.new_handle, capacity, self._count)
        for group, partition in enumerate(self._masters):
            # One group at a time, so that the partitions are never all in memory.
            file = files.get(group)
            master = partition if file is None else torch.from_file(str(file), size=layout.numels[group])
            self.swapped.store(group, {MASTER: master.detach()})
            self._hide(group)
            if file is not None:
                file.unlink()

    def _count(self, kind: str, size: int) -> None:
        traffic = self._selection.current_traffic
        if kind == "read":
            traffic.nvme_read_bytes += size
        else:
            traffic.nvme_written_bytes += size

    # -------------------------------------------------------------------------- step

    def prefetch(self, blocks: Sequence[int] | None) -> None:
        if blocks is not None:
            self.swapped.start(self.groups_of(blocks))

    def begin(self, blocks: Sequence[int]) -> list[int]:
        groups = self.groups_of(blocks)
        self.swapped.start(groups)
        return groups

    def enter(self, shown: int, group: int) -> None:
        self._show(group, self.swapped.enter(group))

    def leave(self, shown: int, group: int) -> None:
        self._hide(group)
        self.swapped.leave(group)

    # ---------------------------------------------------------------- [Note: Not there]

    def _show(self, group: int, tensors: dict[str, Tensor]) -> None:
        partition = self._masters[group]
        partition.data = tensors[MASTER]
        moments = {key: tensors[key] for key in MOMENTS if key in tensors}
        if moments:
            base = self.optimizer.optimizer
            state = base.state[partition]
            state.setdefault("step", compat.adam_step(base, 0))
            state.update(moments)

    def _hide(self, group: int) -> None:
        partition = self._masters[group]
        nothing = torch.zeros(1).expand(self.swapped.layout.numels[group])
        partition.data = nothing
        state = self.optimizer.optimizer.state.get(partition)
        if state:
            state.update(dict.fromkeys(MOMENTS, nothing))

    # --------------------------------------------------------- accessors, checkpoints

    @contextmanager
    def readable(self, groups: Sequence[int] | None = None) -> Iterator[None]:
        groups = self._all_or(groups)
        for group in groups:
            self._show(group, self.swapped.mapped(group))
        try:
            yield
        finally:
            for group in groups:
                self._hide(group)

    @contextmanager
    def writable(self, groups: Sequence[int] | None = None) -> Iterator[None]:
        self.swapped.forget()  # states read ahead for a step would later overwrite the changes made here
        with self.readable(groups):
            try:
                yield
            finally:
                self.adopt(groups)

    def adopt(self, groups: Sequence[int] | None = None) -> None:
        for group in self._all_or(groups):
            state = self.optimizer.optimizer.state.get(self._masters[group]) or {}
            moments = {key: state[key] for key in MOMENTS if key in state}
            self.swapped.store(group, {MASTER: self._masters[group].detach(), **moments})

    def _all_or(self, groups: Sequence[int] | None) -> tuple[int, ...]:
        return tuple(self.swapped.layout.numels if groups is None else groups)

    def keep_readable(self, state_dict: dict[str, Any]) -> None:
        """Keep the tensors valid after `readable`: they are parts of the mapped file, read when they are used."""
        base, masters = sections(state_dict)
        # `_hide` changes the partitions and the dicts of moments in place.
        base["state"] = {index: dict(state) for index, state in base["state"].items()}
        set_masters(state_dict, [master.detach() for master in masters])

    # ------------------------------------------------------------------------- memory

    def bytes(self) -> StateBytes:
        states = self.optimizer.optimizer.state.values()  # without storage in memory: [Note: Not there]
        return StateBytes(
            sum(state[key].numel() * state[key].itemsize for state in states for key in MOMENTS if key in state)
        )


def ring_bytes(layout: FileLayout, groups_of_block: Mapping[int, Sequence[int]], selection: Selection) -> int:
    """Return the page-locked host memory for states: ``state_budget_bytes`` or, where that is null, `default_ring`.

    Raises ConfigError if a sub-group does not fit.
    """
    sizes = {block: _ELEMENT_BYTES * sum(map(layout.size, groups)) for block, groups in groups_of_block.items()}
    budget = selection.config.state_budget_bytes
    if budget is None:
        return default_ring(sizes.values(), selection.bound.num_blocks)
    largest = _ELEMENT_BYTES * max(map(layout.size, layout.numels))
    if budget < largest:
        raise ConfigError(
            f"adagrad_select.state_budget_bytes={budget} is less than the states of the largest sub-group, which take "
            f"{largest} bytes of page-locked host memory on this rank. Give at least that, or null."
        )
    return budget
