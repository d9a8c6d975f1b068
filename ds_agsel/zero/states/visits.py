"""Which blocks' states are on the accelerator: what all homes share whose states visit it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ds_agsel.residency import Move, default_budget_bytes, eviction_order, page_locked, plan_moves, update_order
from ds_agsel.residency.plan import check_budget
from ds_agsel.residency.slab import Slab
from ds_agsel.residency.states import MASTER
from ds_agsel.residency.transfer import HostState, StateTransfer, block_bytes
from ds_agsel.selection import Selection
from ds_agsel.zero.states.home import StateHome


class Visits(StateHome):
    """The moves that a step needs of states that live in page-locked host memory.

    The section's ``state_budget_bytes`` is what states may take on the accelerator, on this rank, and is filled; None:
    [Note: Budget] in residency/plan. With ``keep_master`` "accelerator" the master weights of all blocks stay there.
    """

    _selection: Selection
    transfer: StateTransfer
    _locked_moments: Mapping[tuple[int, str], Tensor] = {}  # by group and name: the place of each that can exist

    def _begin_visits(self, selection: Selection, states: Sequence[HostState], moments: Sequence[str]) -> None:
        """Take charge of the ``states`` of each group, with moments in tensors of those names.

        Raises ConfigError if a block does not fit the budget.
        """
        self._selection = selection
        keys = (MASTER, *moments) if selection.config.keep_master == "host" else tuple(moments)
        self._block_bytes = block_bytes(states, self.groups_of_block, keys)
        budget = selection.config.state_budget_bytes
        self.budget_bytes = budget or default_budget_bytes(self._block_bytes, selection.bound)
        check_budget(self.budget_bytes, self._block_bytes, [block.name for block in selection.blocks])
        if selection.config.on_reentry != "reset":  # with which few blocks have moments at a time
            self._lock_moments(states, moments)
        self.transfer = StateTransfer(
            get_accelerator(), states, self.groups_of_block, keys, self._count, self.budget_bytes, self._new_moment
        )
        self._moves: tuple[Move, ...] = ()
        # On an explore step a block that leaves is released after `begin`: its moments must not have travelled.
        self._moves_late = selection.config.on_reentry == "reset"
        self._moves_are_due = False
        # With "reset" there is nothing to come back for but master weights: what is not selected leaves.
        self._is_cache = budget is not None and not self._moves_late

    def _lock_moments(self, states: Sequence[HostState], moments: Sequence[str]) -> None:
        """Allocate page-locked memory for the moments of all groups that can be selected: [Note: Slab] in slab."""
        groups = self.groups_of(self._selection.lottery.active)
        places = [(group, name) for group in groups for name in moments]
        slab = Slab([states[group].room(name) for group, name in places], get_accelerator())
        self._locked_moments = {place: slab.tensor(index) for index, place in enumerate(places)}

    def _new_moment(self, group: int, name: str) -> Tensor:
        """Return page-locked memory for a moment's tensor, uninitialised."""
        if (group, name) in self._locked_moments:
            return self._locked_moments[group, name]
        return page_locked.empty_if_possible(*self.transfer.on_host(group).room(name), get_accelerator())

    def _locked(self, group: int, name: str, tensor: Tensor) -> Tensor:
        """Return ``tensor``, of a moment, in page-locked memory: in its place there, if it has one."""
        place = self._locked_moments.get((group, name))
        if place is None:
            return page_locked.pinned(tensor.cpu(), get_accelerator())
        return place if tensor.data_ptr() == place.data_ptr() else place.copy_(tensor)

    def _count(self, direction: str, num_bytes: int) -> None:
        name, traffic = f"{direction}_bytes", self._selection.current_traffic
        setattr(traffic, name, getattr(traffic, name) + num_bytes)

    def prefetch(self, blocks: Sequence[int] | None) -> None:
        if blocks is None:
            return  # an explore step may choose any block: nothing moves before it has chosen
        moves = self._plan(blocks)
        # What arrives after an update of this step waits for it; `begin` plans it again.
        self.transfer.carry_out(move for move in moves if move.after is None)

    def begin(self, blocks: Sequence[int]) -> list[int]:
        resident = self.transfer.resident
        self._moves = self._plan(blocks)
        self._moves_are_due = self._moves_late
        if not self._moves_late:
            self._carry_out_after(None)
        # ``resident`` is what it was before these moves: blocks that were there then have had longest to arrive.
        return [group for block in update_order(resident, blocks) for group in self.groups_of_block[block]]

    def _plan(self, blocks: Sequence[int]) -> tuple[Move, ...]:
        resident = self.transfer.resident
        may_stay = eviction_order(resident, self._selection.update_counts) if self._is_cache else ()
        return plan_moves(resident, blocks, self._block_bytes, self.budget_bytes, may_stay)

    def _carry_out_after(self, block: int | None) -> None:
        self.transfer.carry_out(move for move in self._moves if move.after == block)

    def _arrive(self, group: int) -> None:
        """Let the current stream wait for the state of ``group``, which is updated next."""
        if self._moves_are_due:
            self._moves_are_due = False
            self._carry_out_after(None)
        self.transfer.wait_for(self.block_of_group[group])

    def _depart(self, group: int) -> None:
        """Note that ``group`` was updated, and let its block make room where the plan says so."""
        block = self.block_of_group[group]
        # For each group, not once a block: an exception may end the step between two groups of one block.
        self.transfer.updated(block)
        if group == self.groups_of_block[block][-1]:
            self._carry_out_after(block)

    def _blocks_of(self, groups: Sequence[int] | None) -> list[int]:
        return sorted(self.groups_of_block if groups is None else {self.block_of_group[group] for group in groups})
