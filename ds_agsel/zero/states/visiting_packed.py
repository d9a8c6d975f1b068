"""States that visit the accelerator in fewer bytes: they travel and rest packed, and are fp32 for their update.

[Note: Same tensors] DeepSpeed's partitions are the same tensor objects always. For a group's update their ``data`` is
what has arrived on the accelerator, or what is put together of it; between steps it is the host's copy, or nothing
where master weights are split. What is packed on the accelerator is what leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ds_agsel.residency.slab import locked_copies
from ds_agsel.residency.states import MASTER
from ds_agsel.residency.transfer import HostState
from ds_agsel.selection import Selection
from ds_agsel.zero import compat
from ds_agsel.zero.states.forms import MomentForm
from ds_agsel.zero.states.home import StateBytes
from ds_agsel.zero.states.packed import PackedStates
from ds_agsel.zero.states.split import SplitPackedStates
from ds_agsel.zero.states.visits import Visits


class VisitingPackedStates(Visits, PackedStates):
    """As `VisitingStates`, with moments that rest and travel in ``form``.

    Raises ConfigError if a block does not fit the budget.
    """

    def __init__(
        self, optimizer: compat.ZeROOptimizer, block_of_group: Sequence[int], selection: Selection, form: MomentForm
    ) -> None:
        self._moves_masters = selection.config.keep_master == "host"
        if self._moves_masters:
            self._bring_masters(optimizer)
        super().__init__(optimizer, block_of_group, selection, form)
        self._lock_masters()
        states = [self._host_state(group) for group in range(len(self.block_of_group))]
        self._begin_visits(selection, states, tuple(form.rooms(0)))

    def _bring_masters(self, optimizer: compat.ZeROOptimizer) -> None:
        """Put the master weights on the host, in page-locked memory where they rest there as they are."""
        locked = iter(locked_copies(compat.masters(optimizer), get_accelerator()))
        compat.replace_masters(optimizer, lambda _: next(locked))

    def _lock_masters(self) -> None:
        """Put in page-locked memory what rests of the master weights, if it is not there."""

    def _resting_master(self, group: int) -> Tensor:
        """Return what rests of the master weights of ``group``. Between steps."""
        return self._masters[group].detach()

    def _host_state(self, group: int) -> HostState:
        """Return the host's state of ``group``, its moments moved to page-locked memory."""
        packed = self._packed.get(group)
        if packed is not None:
            self._packed[group] = packed = {name: self._locked(group, name, tensor) for name, tensor in packed.items()}
        rooms = self._form.rooms(self._masters[group].numel())
        return HostState(self._resting_master(group), {} if packed is None else packed, rooms)

    # ------------------------------------------------------------------------- a step

    def enter(self, shown: int, group: int) -> None:
        self._arrive(group)
        self._show_master(group)
        super().enter(shown, group)
        state, master = self.optimizer.optimizer.state[self._masters[group]], self._masters[group]
        self._updates = int(state["step"])
        param_group = compat.param_group_of(self.optimizer, shown)
        state["step"] = compat.adam_step(self.optimizer.optimizer, self._updates, param_group, master.device)

    def _show_master(self, group: int) -> None:
        if self._moves_masters:
            self._masters[group].data = self.transfer.on_device(group)[MASTER]

    def leave(self, shown: int, group: int) -> None:
        super().leave(shown, group)
        base = self.optimizer.optimizer
        base.state[self._masters[group]]["step"] = compat.adam_step(base, self._updates + 1)
        self._hide_master(group)
        self._depart(group)
        self._packed[group] = dict(self.transfer.on_host(group).state)

    def _hide_master(self, group: int) -> None:
        if self._moves_masters:
            self._masters[group].data = self.transfer.on_host(group).master

    def _at_hand(self, group: int) -> Mapping[str, Tensor] | None:
        return self.transfer.on_device(group) if group in self._packed else None

    def _keep(self, group: int, packed: dict[str, Tensor]) -> None:
        there = self.transfer.on_device(group)
        for name, tensor in packed.items():
            there[name].copy_(tensor)

    def _drop_moments(self, group: int) -> None:
        self.transfer.drop(group, tuple(self._form.rooms(0)))
        super()._drop_moments(group)

    # ------------------------------------------------------------------- between steps

    @contextmanager
    def readable(self, groups: Sequence[int] | None = None) -> Iterator[None]:
        self.transfer.bring_home(self._blocks_of(groups))
        with super().readable(groups):
            yield

    @contextmanager
    def writable(self, groups: Sequence[int] | None = None) -> Iterator[None]:
        self.transfer.send_home(self._blocks_of(groups))
        with super().writable(groups):
            yield

    def adopt(self, groups: Sequence[int] | None = None) -> None:
        super().adopt(groups)
        for group in self._all_or(groups):
            self.transfer.adopt(group, self._host_state(group))

    @contextmanager
    def as_saved(self) -> Iterator[None]:
        self.transfer.bring_home(self._blocks_of(None))
        with super().as_saved():
            yield

    # ------------------------------------------------------------------------- memory

    def bytes(self) -> StateBytes:
        transfer = self.transfer
        return StateBytes(
            super().bytes().moments,
            visiting=transfer.resident_bytes(),
            visiting_moments=sum(map(transfer.resident_bytes, self._form.rooms(0))),
        )


class VisitingSplitStates(VisitingPackedStates, SplitPackedStates):
    """As `VisitingPackedStates`, with split master weights: of them the low halves travel."""

    def _bring_masters(self, optimizer: compat.ZeROOptimizer) -> None:
        compat.replace_masters(optimizer, lambda master: master.detach().cpu())

    def _lock_masters(self) -> None:
        if self._moves_masters:
            self._low = locked_copies(self._low, get_accelerator())

    def _resting_master(self, group: int) -> Tensor:
        return self._low[group]

    def _update_device(self) -> Any:
        return torch.device(get_accelerator().current_device_name())

    def _half(self, group: int) -> Tensor:
        return self.transfer.on_device(group).get(MASTER, self._low[group])

    def _show_master(self, group: int) -> None:
        """Do nothing: they are put together next."""

    def _hide_master(self, group: int) -> None:
        """Do nothing: they are put away."""
