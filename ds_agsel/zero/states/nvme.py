"""ZeRO-3 with ``offload_optimizer.device: nvme``: states come from a file and go back to it as their group is updated.

[Note: Not there] A partition and a moment that lie in the file are expanded one-element zeros: right shape, no storage.
Read and write states only inside `readable` or `writable`, which map the file into memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ds_agsel.residency.rooms import moment_rooms
from ds_agsel.residency.states import MASTER, MOMENTS
from ds_agsel.selection import Selection
from ds_agsel.zero import compat
from ds_agsel.zero.repartition import detach_masters, sections
from ds_agsel.zero.states.home import StateBytes
from ds_agsel.zero.states.swaps import Swaps


class StatesOnNvme(Swaps):
    """The states of a ZeRO-3 optimizer in a file, in fp32.

    Raises ConfigError if a sub-group does not fit the buffers in host memory.
    """

    def __init__(
        self, optimizer: compat.DeepSpeedZeroOptimizer_Stage3, block_of_group: Sequence[int], selection: Selection
    ) -> None:
        super().__init__(optimizer, block_of_group)
        self._begin_swaps(selection, lambda numel: moment_rooms("fp32", numel))

    def _settle(self, group: int) -> None:
        self.adopt((group,))
        self._hide(group)

    # -------------------------------------------------------------------------- step

    def enter(self, shown: int, group: int) -> None:
        self._show(group, self.swapped.enter(group))

    def leave(self, shown: int, group: int) -> None:
        self._hide(group)
        self.swapped.leave(group)

    # ---------------------------------------------------------------- [Note: Not there]

    def _show(self, group: int, tensors: Mapping[str, Tensor]) -> None:
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
        nothing = torch.zeros(1).expand(partition.numel())
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
            if not moments:
                self.swapped.drop(group)
            self.swapped.store(group, {MASTER: self._masters[group].detach(), **moments})

    def keep_readable(self, state_dict: dict[str, Any]) -> None:
        """Keep the tensors valid after `readable`: they are parts of the mapped file, read when they are used."""
        base, _ = sections(state_dict)
        # `_hide` changes the partitions and the dicts of moments in place.
        base["state"] = {index: dict(state) for index, state in base["state"].items()}
        detach_masters(state_dict)

    # ------------------------------------------------------------------------- memory

    def bytes(self) -> StateBytes:
        states = self.optimizer.optimizer.state.values()  # without storage in memory: [Note: Not there]
        return StateBytes(
            sum(state[key].numel() * state[key].itemsize for state in states for key in MOMENTS if key in state)
        )
