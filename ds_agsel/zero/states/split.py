"""Master weights that rest in the 16 bits which the bfloat16 model weights lack, and are fp32 for their update.

[Note: Put together] A group's master weights are put together ([Note: Halves] in halves) in one scratch buffer, as
large as the largest group, before DeepSpeed's optimizer reads them. After the update their low halves are kept, and the
buffer is rounded, so that the model weights which DeepSpeed casts from it are the other halves exactly. Between steps
DeepSpeed's partitions, the same tensor objects always, are expanded one-element zeros: right shape, no storage.

Model weights are a half of the state here. What changes them outside of a step and of a load changes the master weights
with them, where fp32 master weights would undo it at the block's next update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ds_agsel.zero import compat
from ds_agsel.zero.repartition import detach_masters
from ds_agsel.zero.states.halves import join, rounded, split
from ds_agsel.zero.states.in_place import StatesInPlace
from ds_agsel.zero.states.packed import PackedStates


class SplitStates(StatesInPlace):
    """As the home in place that comes next in a subclass's bases, with split master weights."""

    are_temporary = True
    masters_are_split = True

    def __init__(self, optimizer: compat.ZeROOptimizer, block_of_group: Sequence[int], *args: Any) -> None:
        super().__init__(optimizer, block_of_group, *args)
        device = self._masters[0].device
        self._nothing = torch.zeros(1, device=device)
        self._buffer: Tensor | None = None
        self._low: list[Tensor] = []
        self._take_all()

    def _take_all(self) -> None:
        for group, master in enumerate(self._masters):  # one after the other: each gives its fp32 memory back
            self._low.append(torch.empty(master.numel(), dtype=torch.int16, device=master.device))
            self._take(group)

    # ------------------------------------------------------------------------- a step

    def enter(self, shown: int, group: int) -> None:
        """Put the master weights of ``group`` together in the scratch buffer."""
        if self._buffer is None:
            numel = max(master.numel() for master in self._masters)
            self._buffer = torch.empty(numel, device=self._update_device())
        self._show(group, shown, self._buffer[: self._masters[group].numel()], self._half(group))
        super().enter(shown, group)

    def updated(self, shown: int, group: int) -> None:
        split(self._masters[group].data, self._half(group))
        super().updated(shown, group)

    def _update_device(self) -> torch.device:
        return self._nothing.device

    def _half(self, group: int) -> Tensor:
        """Return the low halves of ``group`` where its update runs."""
        return self._low[group]

    def _resting_half(self, group: int) -> Tensor:
        """Return the low halves of ``group`` where they rest. Between steps."""
        return self._low[group]

    def _split_off(self, group: int, master: Tensor) -> None:
        """Keep the low halves of ``master``, of ``group``, and round it. Between steps."""
        split(master, self._low[group])

    def leave(self, shown: int, group: int) -> None:
        super().leave(shown, group)
        self._put_away(group)

    def _show(self, group: int, shown: int, room: Tensor, low: Tensor) -> None:
        """Put the master weights of ``group`` together in ``room`` and let DeepSpeed see them there."""
        weights = compat.partition_weights(self.optimizer, shown)
        join(weights.to(room.device), low, room)
        self._masters[group].data = room

    def _put_away(self, group: int) -> None:
        master = self._masters[group]
        master.data = self._nothing.expand(master.numel())

    def _is_shown(self, group: int) -> bool:
        return self._masters[group].untyped_storage().data_ptr() != self._nothing.untyped_storage().data_ptr()

    def _take(self, group: int) -> None:
        """Keep the low halves of master weights that DeepSpeed sees, and give the model their rounding."""
        master = self._masters[group].data
        self._split_off(group, master)
        compat.partition_weights(self.optimizer, group).copy_(master)
        self._put_away(group)

    # ------------------------------------------------------------------- between steps

    @contextmanager
    def _shown(self, groups: Sequence[int] | None) -> Iterator[None]:
        """Inside, the master weights of ``groups`` (None: of all) are whole, in new memory."""
        hidden = [g for g in self._all_or(groups) if not self._is_shown(g)]
        for group in hidden:
            low = self._resting_half(group)
            self._show(group, group, self.fp32_room(low.numel(), low.device), low)
        try:
            yield
        finally:
            for group in hidden:
                self._put_away(group)

    @contextmanager
    def readable(self, groups: Sequence[int] | None = None) -> Iterator[None]:
        with self._shown(groups), super().readable(groups):
            yield

    @contextmanager
    def writable(self, groups: Sequence[int] | None = None) -> Iterator[None]:
        """As the base's. Of all groups (None): collective, for the model weights of other ranks follow."""
        with self._shown(groups):
            with super().writable(groups):
                yield
            self.adopt(groups)

    def adopt(self, groups: Sequence[int] | None = None) -> None:
        super().adopt(groups)
        shown = [g for g in self._all_or(groups) if self._is_shown(g)]
        for group in shown:
            self._take(group)
        if shown and groups is None:
            compat.spread_weights(self.optimizer)

    # --------------------------------------------------------------------- checkpoints

    @contextmanager
    def as_saved(self) -> Iterator[None]:
        with self._shown(None), super().as_saved():
            yield

    def keep_readable(self, state_dict: dict[str, Any]) -> None:
        """Keep the tensors that `as_saved` shows: the partitions themselves are put away."""
        super().keep_readable(state_dict)
        detach_masters(state_dict)

    def as_weight(self, value: Tensor) -> Tensor:
        return rounded(value)

    # ------------------------------------------------------------------------- memory

    def master_bytes(self) -> int:
        """Return the bytes in which master weights rest on this rank, beside the model weights."""
        return sum(low.nbytes for low in self._low)

    def master_scratch_bytes(self) -> int:
        """Return the bytes of the buffer in which master weights are updated; 0 before the first update."""
        return 0 if self._buffer is None else self._buffer.nbytes


class SplitPackedStates(SplitStates, PackedStates):
    """As `PackedStates`, with split master weights."""
