"""States that stay where AdamW runs: on the accelerator, or with ZeRO-Offload on the host. Nothing moves."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from ds_agsel.zero.states.home import StateHome


class StatesInPlace(StateHome):
    """The tensors that DeepSpeed made are those that it steps, reads and writes."""

    def prefetch(self, blocks: Sequence[int] | None) -> None:
        """Do nothing: all states are in place."""

    def begin(self, blocks: Sequence[int]) -> list[int]:
        return self.groups_of(blocks)

    def can_enter_all(self) -> bool:
        return not self.are_temporary  # a subclass's, which has room for one group's at a time

    def enter(self, shown: int, group: int) -> None:
        """Do nothing: the state is in place."""

    def leave(self, shown: int, group: int) -> None:
        """Do nothing: the state stays."""

    def readable(self, groups: Sequence[int] | None = None) -> AbstractContextManager[None]:
        return nullcontext()

    def writable(self, groups: Sequence[int] | None = None) -> AbstractContextManager[None]:
        return nullcontext()

    def adopt(self, groups: Sequence[int] | None = None) -> None:
        """Do nothing: DeepSpeed's own tensors are the state."""
