"""States that visit the accelerator: DeepSpeed's step finds, group by group, what `residency` has brought there.

[Note: Substitution] A partition's master weights live on the host, and DeepSpeed's lists, the optimizer's param group
and its state dict name that host tensor. For the length of a group's update they name the tensors on the accelerator
instead. Nothing that outlives a step (links for the accessors, checkpoints, state dicts) ever sees those.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from deepspeed.accelerator import get_accelerator

from ds_agsel.residency import Move, default_budget_bytes, eviction_order, plan_moves, update_order
from ds_agsel.residency.plan import check_budget
from ds_agsel.residency.states import MASTER, MOMENTS
from ds_agsel.residency.transfer import HostState, StateTransfer, pinned
from ds_agsel.selection import Selection
from ds_agsel.zero import compat
from ds_agsel.zero.states.home import StateBytes, StateHome, moment_bytes


class VisitingStates(StateHome):
    """The states of a ZeRO optimizer that steps on the accelerator, and the moves that its steps need.

    The section's ``state_budget_bytes`` is what states may take on the accelerator, on this rank, and is filled; None:
    [Note: Budget] in residency/plan. With ``keep_master`` "accelerator" the master weights of all blocks stay there.

    Raises ConfigError if a block does not fit the budget.
    """

    def __init__(self, optimizer: compat.ZeROOptimizer, block_of_group: Sequence[int], selection: Selection) -> None:
        super().__init__(optimizer, block_of_group)
        self._selection = selection
        moves_masters = selection.config.keep_master == "host"
        if moves_masters:
            compat.replace_masters(optimizer, lambda master: pinned(master.detach().cpu(), get_accelerator()))
            self._masters = tuple(compat.masters(optimizer))
        states = [self._host_state(group) for group in range(len(self.block_of_group))]
        keys = (MASTER, *MOMENTS) if moves_masters else MOMENTS
        self.transfer = StateTransfer(get_accelerator(), states, self.groups_of_block, keys, self._count)
        self._block_bytes = self.transfer.block_bytes()
        budget = selection.config.state_budget_bytes
        self.budget_bytes = budget or default_budget_bytes(self._block_bytes, selection.bound)
        check_budget(self.budget_bytes, self._block_bytes, [block.name for block in selection.blocks])
        self._moves: tuple[Move, ...] = ()
        # On an explore step a block that leaves is released after `begin`: its moments must not have travelled.
        self._moves_late = selection.config.on_reentry == "reset"
        self._moves_are_due = False
        # With "reset" there is nothing to come back for but master weights: what is not selected leaves.
        self._is_cache = budget is not None and not self._moves_late

    def _host_state(self, group: int) -> HostState:
        """Return DeepSpeed's state of ``group``, its moments moved to page-locked memory."""
        master = compat.masters(self.optimizer)[group]
        state = self.optimizer.optimizer.state.get(master, {})
        for key in MOMENTS:
            if key in state:
                state[key] = pinned(state[key].cpu(), get_accelerator())
        return HostState(master, state)

    def _count(self, direction: str, num_bytes: int) -> None:
        name, traffic = f"{direction}_bytes", self._selection.current_traffic
        setattr(traffic, name, getattr(traffic, name) + num_bytes)

    # ------------------------------------------------------------------------- step

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

    def enter(self, shown: int, group: int) -> None:
        if self._moves_are_due:
            self._moves_are_due = False
            self._carry_out_after(None)
        self.transfer.wait_for(self.block_of_group[group])
        tensors = self.transfer.on_device(group)
        master = tensors.get(MASTER, compat.masters(self.optimizer)[shown])
        base = self.optimizer.optimizer
        param_group = compat.param_group_of(self.optimizer, shown)
        step = compat.adam_step(base, self._count_of(group), param_group, master.device)
        compat.set_master(self.optimizer, shown, master)
        base.state[master] = {"step": step, **{key: tensors[key] for key in MOMENTS}}

    def leave(self, shown: int, group: int) -> None:
        block = self.block_of_group[group]
        base = self.optimizer.optimizer
        host = self.transfer.on_host(group)
        host.state["step"] = compat.adam_step(base, self._count_of(group) + 1)
        # The host's tensors are restored before any other code can see the lists.
        base.state.pop(compat.masters(self.optimizer)[shown])
        compat.set_master(self.optimizer, shown, host.master)
        base.state[host.master] = host.state
        # For each group, not once a block: an exception may end the step between two groups of one block.
        self.transfer.updated(block)
        if group == self.groups_of_block[block][-1]:
            self._carry_out_after(block)

    def _count_of(self, group: int) -> int:
        return int(self.transfer.on_host(group).state.get("step", 0))

    def _drop_moments(self, group: int) -> None:
        self.transfer.drop(group, MOMENTS)
        super()._drop_moments(group)

    # -------------------------------------------------------- accessors, checkpoints

    @contextmanager
    def readable(self, groups: Sequence[int] | None = None) -> Iterator[None]:
        self.transfer.bring_home(self._blocks_of(groups))
        yield

    @contextmanager
    def writable(self, groups: Sequence[int] | None = None) -> Iterator[None]:
        # A copy on the accelerator would go stale here, and overwrite the host's when it left.
        self.transfer.send_home(self._blocks_of(groups))
        try:
            yield
        finally:
            self.adopt(groups)

    def adopt(self, groups: Sequence[int] | None = None) -> None:
        for group in range(len(self.block_of_group)) if groups is None else groups:
            self.transfer.adopt(group, self._host_state(group))

    def _blocks_of(self, groups: Sequence[int] | None) -> list[int]:
        return sorted(self.groups_of_block if groups is None else {self.block_of_group[group] for group in groups})

    def bytes(self) -> StateBytes:
        transfer = self.transfer
        return StateBytes(
            moment_bytes(self.optimizer),
            visiting=transfer.resident_bytes(),
            visiting_moments=sum(map(transfer.resident_bytes, MOMENTS)),
        )
