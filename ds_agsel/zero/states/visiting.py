"""States that visit the accelerator: DeepSpeed's step finds, group by group, what `residency` has brought there.

[Note: Substitution] A partition's master weights live on the host, and DeepSpeed's lists, the optimizer's param group
and its state dict name that host tensor. For the length of a group's update they name the tensors on the accelerator
instead. Nothing that outlives a step (links for the accessors, checkpoints, state dicts) ever sees those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from deepspeed.accelerator import get_accelerator

from ds_agsel.residency import Move, default_budget_bytes, plan_moves, update_order
from ds_agsel.residency.plan import check_budget
from ds_agsel.residency.transfer import MASTER, MOMENTS, HostState, StateTransfer, pinned
from ds_agsel.zero import compat


class VisitingStates:
    """The states of a ZeRO optimizer that steps on the accelerator, and the moves that its steps need.

    Args:
        budget_bytes: what states may take on the accelerator, on this rank; None: [Note: Budget] in residency/plan.
        keep_master: "host", or "accelerator" where the master weights of all blocks stay there.
        num_selected: blocks of a step, at most.
    Raises ConfigError where a block does not fit the budget.
    """

    def __init__(
        self,
        optimizer: compat.ZeROOptimizer,
        block_of_group: Sequence[int],
        block_names: Sequence[str],
        num_selected: int,
        budget_bytes: int | None,
        keep_master: str,
        count: Callable[[str, int], None],
    ) -> None:
        self._optimizer = optimizer
        self._block_of_group = tuple(block_of_group)
        self._groups_of_block: dict[int, list[int]] = {}
        for group, block in enumerate(block_of_group):
            self._groups_of_block.setdefault(block, []).append(group)
        self._keys = (MASTER, *MOMENTS) if keep_master == "host" else MOMENTS
        self._count = count
        if keep_master == "host":
            compat.replace_masters(optimizer, lambda master: pinned(master.detach().cpu(), get_accelerator()))
        self.transfer = self._new_transfer()
        self._block_bytes = self.transfer.block_bytes()
        self.budget_bytes = budget_bytes or default_budget_bytes(self._block_bytes, num_selected)
        check_budget(self.budget_bytes, self._block_bytes, block_names)
        self._moves: tuple[Move, ...] = ()
        self._entered: tuple[int, int] | None = None  # index in DeepSpeed's view, group

    def _new_transfer(self) -> StateTransfer:
        base = self._optimizer.optimizer
        states = []
        for partition in compat.masters(self._optimizer):
            state = base.state.get(partition, {})
            for key in MOMENTS:
                if key in state:
                    state[key] = pinned(state[key].cpu(), get_accelerator())
            states.append(HostState(partition, state))
        return StateTransfer(get_accelerator(), states, self._groups_of_block, self._keys, self._count)

    # ------------------------------------------------------------------------- step

    def prefetch(self, blocks: Sequence[int] | None) -> None:
        """Start what the planned ``blocks`` need; None, before an explore step: nothing moves."""
        if blocks is not None:
            moves = plan_moves(self.transfer.resident, blocks, self._block_bytes, self.budget_bytes)
            self.transfer.carry_out(move for move in moves if move.after is None)

    def begin(self, blocks: Sequence[int]) -> list[int]:
        """Start the moves of the step on ``blocks`` as far as can be; returns its groups in the order of update."""
        resident = self.transfer.resident
        self._moves = plan_moves(resident, blocks, self._block_bytes, self.budget_bytes)
        self._carry_out_after(None)
        return [group for block in update_order(resident, blocks) for group in self._groups_of_block[block]]

    def _carry_out_after(self, block: int | None) -> None:
        self.transfer.carry_out(move for move in self._moves if move.after == block)

    def enter(self, shown: int, group: int) -> None:
        """Put the accelerator's tensors of ``group`` in its place, index ``shown`` of DeepSpeed's view."""
        self.leave_entered(next_block=self._block_of_group[group])
        self.transfer.wait_for(self._block_of_group[group])
        tensors = self.transfer.on_device(group)
        master = tensors.get(MASTER, compat.masters(self._optimizer)[shown])
        base = self._optimizer.optimizer
        param_group = compat.param_group_of(self._optimizer, shown)
        step = compat.adam_step(base, self._count_of(group), param_group, master.device)
        compat.set_master(self._optimizer, shown, master)
        base.state[master] = {"step": step, **{key: tensors[key] for key in MOMENTS}}
        self._entered = (shown, group)

    def leave_entered(self, next_block: int | None = None) -> None:
        """Put the host's tensors of the group that was entered last back; with its block's last, what follows moves."""
        if self._entered is None:
            return
        shown, group = self._entered
        self._entered = None
        block = self._block_of_group[group]
        base = self._optimizer.optimizer
        host = self.transfer.on_host(group)
        host.state["step"] = compat.adam_step(base, self._count_of(group) + 1)
        base.state.pop(compat.masters(self._optimizer)[shown])
        compat.set_master(self._optimizer, shown, host.master)
        base.state[host.master] = host.state
        if block != next_block:
            self.transfer.updated(block)
            self._carry_out_after(block)

    # -------------------------------------------------------- accessors, checkpoints

    def bring_home(self, blocks: Iterable[int] | None = None) -> None:
        """Make the host's states of ``blocks`` (None: of all) current. They stay where they are. The host waits."""
        self.transfer.bring_home(self._groups_of_block if blocks is None else blocks)

    def send_home(self, blocks: Iterable[int] | None = None) -> None:
        """Bring the states of ``blocks`` (None: of all) back to the host alone, which may then change them."""
        self.transfer.send_home(self._groups_of_block if blocks is None else blocks)

    def adopt_loaded(self) -> None:
        """Take up the states that a checkpoint has put into the optimizer. All must be at home."""
        self.transfer = self._new_transfer()

    def _count_of(self, group: int) -> int:
        return int(self.transfer.on_host(group).state.get("step", 0))
