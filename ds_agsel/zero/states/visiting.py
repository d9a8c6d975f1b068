"""States that visit the accelerator: DeepSpeed's step finds, group by group, what `residency` has brought there.

[Note: Substitution] A partition's master weights live on the host, and DeepSpeed's lists, the optimizer's param group
and its state dict name that host tensor. For the length of a group's update they name the tensors on the accelerator
instead. Nothing that outlives a step (links for the accessors, checkpoints, state dicts) ever sees those.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from deepspeed.accelerator import get_accelerator

from ds_agsel.residency.slab import locked_copies
from ds_agsel.residency.states import MASTER, MOMENTS
from ds_agsel.residency.transfer import HostState
from ds_agsel.selection import Selection
from ds_agsel.zero import compat
from ds_agsel.zero.states.home import StateBytes, moment_bytes
from ds_agsel.zero.states.visits import Visits


class VisitingStates(Visits):
    """The states of a ZeRO optimizer that steps on the accelerator, in fp32 wherever they are.

    Raises ConfigError if a block does not fit the budget.
    """

    def __init__(self, optimizer: compat.ZeROOptimizer, block_of_group: Sequence[int], selection: Selection) -> None:
        super().__init__(optimizer, block_of_group)
        if selection.config.keep_master == "host":
            locked = iter(locked_copies(self._masters, get_accelerator()))
            compat.replace_masters(optimizer, lambda _: next(locked))
            self._masters = tuple(compat.masters(optimizer))
        states = [self._host_state(group) for group in range(len(self.block_of_group))]
        self._begin_visits(selection, states, MOMENTS)

    def _host_state(self, group: int) -> HostState:
        """Return DeepSpeed's state of ``group``, its moments moved to page-locked memory."""
        master = compat.masters(self.optimizer)[group]
        state = self.optimizer.optimizer.state.get(master, {})
        for key in MOMENTS:
            if key in state:
                state[key] = self._locked(group, key, state[key])
        return HostState(master, state)

    # ------------------------------------------------------------------------- step

    def can_enter_all(self) -> bool:
        return all(move.after is None for move in self._moves)  # else one block waits for another to leave

    def enter(self, shown: int, group: int) -> None:
        self._arrive(group)
        tensors = self.transfer.on_device(group)
        master = tensors.get(MASTER, compat.masters(self.optimizer)[shown])
        base = self.optimizer.optimizer
        param_group = compat.param_group_of(self.optimizer, shown)
        step = compat.adam_step(base, self._count_of(group), param_group, master.device)
        compat.set_master(self.optimizer, shown, master)
        base.state[master] = {"step": step, **{key: tensors[key] for key in MOMENTS}}

    def leave(self, shown: int, group: int) -> None:
        base = self.optimizer.optimizer
        host = self.transfer.on_host(group)
        host.state["step"] = compat.adam_step(base, self._count_of(group) + 1)
        # The host's tensors are restored before any other code can see the lists.
        base.state.pop(compat.masters(self.optimizer)[shown])
        compat.set_master(self.optimizer, shown, host.master)
        base.state[host.master] = host.state
        self._depart(group)

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

    def bytes(self) -> StateBytes:
        transfer = self.transfer
        return StateBytes(
            moment_bytes(self.optimizer),
            visiting=transfer.resident_bytes(),
            visiting_moments=sum(map(transfer.resident_bytes, MOMENTS)),
        )
