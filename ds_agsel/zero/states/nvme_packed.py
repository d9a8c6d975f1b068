"""States on NVMe in fewer bytes: they are read, rest and are written packed, and are fp32 for their update.

A group is unpacked from the ring to fp32 scratch buffers of one group, and packed into the ring again. Between steps
what rests is mapped from the file; what is made fp32 of it is in a file too, a group at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ds_agsel.residency.arena import bytes_of
from ds_agsel.residency.states import MASTER
from ds_agsel.residency.swap import SwappedStates
from ds_agsel.selection import Selection
from ds_agsel.zero import compat
from ds_agsel.zero.repartition import detach_masters
from ds_agsel.zero.states.forms import MomentForm
from ds_agsel.zero.states.halves import split
from ds_agsel.zero.states.home import StateBytes
from ds_agsel.zero.states.packed import PackedStates
from ds_agsel.zero.states.split import SplitPackedStates
from ds_agsel.zero.states.swaps import Swaps


class _MomentsInFile(MutableMapping[int, dict[str, Tensor]]):
    """The packed moments of the groups that have some: mapped from the file when they are asked for, copied to it."""

    def __init__(self, swapped: SwappedStates) -> None:
        self._swapped = swapped

    def __getitem__(self, group: int) -> dict[str, Tensor]:
        if not self._swapped.has_moments(group):
            raise KeyError(group)
        return {name: tensor for name, tensor in self._swapped.mapped(group).items() if name != MASTER}

    def __setitem__(self, group: int, packed: Mapping[str, Tensor]) -> None:
        self._swapped.store(group, packed)

    def __delitem__(self, group: int) -> None:
        self._swapped.drop(group)

    def __contains__(self, group: object) -> bool:
        return isinstance(group, int) and self._swapped.has_moments(group)

    def __iter__(self) -> Iterator[int]:
        return iter([group for group in self._swapped.rooms if self._swapped.has_moments(group)])

    def __len__(self) -> int:
        return len(list(iter(self)))


class PackedStatesOnNvme(Swaps, PackedStates):
    """As `StatesOnNvme`, with moments that rest and travel in ``form``.

    Raises ConfigError if a sub-group does not fit the buffers in host memory.
    """

    def __init__(
        self, optimizer: compat.ZeROOptimizer, block_of_group: Sequence[int], selection: Selection, form: MomentForm
    ) -> None:
        super().__init__(optimizer, block_of_group, selection, form)
        self._in_ring: dict[str, Tensor] = {}  # what rests of the group that is being updated
        self._begin_swaps(selection, form.rooms)
        self._packed = _MomentsInFile(self.swapped)

    def _settle(self, group: int) -> None:
        self.swapped.store(group, {MASTER: self._masters[group].detach()})
        self._hide_master(group)

    # ------------------------------------------------------------------------- a step

    def enter(self, shown: int, group: int) -> None:
        self._in_ring = self.swapped.enter(group)
        self._show_master(group, self._in_ring)
        super().enter(shown, group)

    def leave(self, shown: int, group: int) -> None:
        super().leave(shown, group)
        self._hide_master(group)
        self._in_ring = {}
        self.swapped.leave(group)

    def _show_master(self, group: int, tensors: Mapping[str, Tensor]) -> None:
        self._masters[group].data = tensors[MASTER]

    def _hide_master(self, group: int) -> None:
        self._masters[group].data = self._zero.expand(self._masters[group].numel())

    def _at_hand(self, group: int) -> Mapping[str, Tensor] | None:
        return self._in_ring if group in self._packed else None

    def _keep(self, group: int, packed: dict[str, Tensor]) -> None:
        for name, tensor in packed.items():
            self._in_ring[name].copy_(tensor)

    # ------------------------------------------------------------------- between steps

    @contextmanager
    def _mapped(self, groups: Sequence[int] | None) -> Iterator[None]:
        """Inside, DeepSpeed sees the master weights of ``groups`` (None: of all) as mapped from the file."""
        for group in self._all_or(groups):
            self._show_master(group, self.swapped.mapped(group))
        try:
            yield
        finally:
            for group in self._all_or(groups):
                self._hide_master(group)

    @contextmanager
    def readable(self, groups: Sequence[int] | None = None) -> Iterator[None]:
        with self._mapped(groups), super().readable(groups):
            yield

    @contextmanager
    def writable(self, groups: Sequence[int] | None = None) -> Iterator[None]:
        with self._mapped(groups), super().writable(groups):
            yield  # `adopt` stores at least the master weights, and so forgets what was read ahead

    def adopt(self, groups: Sequence[int] | None = None) -> None:
        super().adopt(groups)
        for group in self._all_or(groups):
            self._adopt_master(group)

    def _adopt_master(self, group: int) -> None:
        if not self._is_hidden(self._masters[group]):
            self.swapped.store(group, {MASTER: self._masters[group].detach()})

    @contextmanager
    def as_saved(self) -> Iterator[None]:
        with self._mapped(None), super().as_saved():
            yield

    def keep_readable(self, state_dict: dict[str, Any]) -> None:
        super().keep_readable(state_dict)
        detach_masters(state_dict)

    def _loaded_moment(self, tensor: Tensor) -> Tensor:
        return tensor  # it stays in the checkpoint's file until it is copied to this one

    # ------------------------------------------------------------------------- memory

    def bytes(self) -> StateBytes:
        rooms = [self._form.rooms(self._masters[group].numel()) for group in self._packed]
        return StateBytes(sum(bytes_of(room) for of_group in rooms for room in of_group.values()))


class SplitStatesOnNvme(PackedStatesOnNvme, SplitPackedStates):
    """As `PackedStatesOnNvme`, with split master weights: of them the low halves are in the file."""

    def _take_all(self) -> None:
        """Do nothing: the file is not there yet, and `_settle` takes each group."""

    def _settle(self, group: int) -> None:
        self._take(group)

    def _half(self, group: int) -> Tensor:
        return self._in_ring[MASTER]

    def _resting_half(self, group: int) -> Tensor:
        return self.swapped.mapped(group)[MASTER]

    def _split_off(self, group: int, master: Tensor) -> None:
        low = torch.empty(master.numel(), dtype=torch.int16)
        split(master, low)
        self.swapped.store(group, {MASTER: low})

    def _show_master(self, group: int, tensors: Mapping[str, Tensor]) -> None:
        """Do nothing: they are put together next."""

    def _hide_master(self, group: int) -> None:
        """Do nothing: they are put away."""

    def _adopt_master(self, group: int) -> None:
        """Do nothing: they have been taken."""

    def master_bytes(self) -> int:
        return sum(bytes_of(rooms[MASTER]) for rooms in self.swapped.rooms.values())
