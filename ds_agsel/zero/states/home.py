"""The one interface to optimizer states, wherever they are kept.

The *state* of a group is its master weights, one flat partition on this rank, fp32, (numel,), and, from the group's
first update on, Adam's ``exp_avg`` and ``exp_avg_sq``, fp32, (numel,), and step count. DeepSpeed looks for them in its
lists of partitions and in the base optimizer's ``state``. A home decides what stands there, and when:

==============  =======================  ============================================================
home            between steps            during a group's update
==============  =======================  ============================================================
`in_place`      where the update runs    the same tensors
`visiting`      in page-locked memory    copies on the accelerator, kept there while a budget allows
`nvme`          in a file on NVMe        a buffer in page-locked memory
`packed`        in place, moments in     the master weights in place, moments in an fp32 scratch buffer
                another form
`split`         in place, half of the    master weights in an fp32 scratch buffer, moments as in the above
                master weights
`visiting_      in page-locked memory,   fp32 scratch buffers on the accelerator
packed`         packed
`nvme_packed`   in a file, packed        fp32 scratch buffers, from and to a buffer in page-locked memory
==============  =======================  ============================================================

[Note: Order of calls] A step calls `prefetch` as soon as its blocks are known, which is before forward, or never on an
explore step; `begin` when its blocks are final; then for each group, in the order that `begin` returned, `enter` before
DeepSpeed reads its state, `updated` when AdamW has changed it and the model's weights are still the old ones, and
`leave` after DeepSpeed has read the updated master weights for the last time. Where `can_enter_all` says so, several
groups may be entered before they are left, in the same order, and `updated` need not be called. `release_all_but` comes
before `prefetch`, or between `begin` and the first `enter`; it keeps the step's blocks. Between steps, read and write
states only inside `readable` or `writable`. Only `adapters.home_for` chooses a home; a new place or form of states is a
new subclass there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ds_agsel.residency.states import MOMENTS
from ds_agsel.zero import compat
from ds_agsel.zero.storage import storage_bytes


@dataclass(frozen=True)
class StateBytes:
    """Memory of states on this rank.

    Attributes:
        moments: bytes of the Adam moments that exist, wherever they are.
        visiting: bytes on the accelerator of states that visit it, master weights included; 0 for other homes.
        visiting_moments: those of them that are of moments; None for other homes.
    """

    moments: int
    visiting: int = 0
    visiting_moments: int | None = None


class StateHome(ABC):
    """Where the states of one ZeRO optimizer are kept; see [Note: Order of calls].

    Groups are numbered as DeepSpeed steps them: param groups with stages 1 and 2, sub-groups with stage 3.

    Args:
        optimizer: DeepSpeed's, whose states this home takes charge of, before any accessor is linked to them.
        block_of_group: block of each group.
    """

    is_on_disk: ClassVar[bool] = False
    """Whether all states together may be larger than the host's memory, so that a load must read them lazily."""

    are_temporary: ClassVar[bool] = False
    """Whether the moments' tensors in `readable` and `writable` are other ones each time, and gone afterwards."""

    masters_are_split: ClassVar[bool] = False
    """Whether master weights are put together from the model weights, and have storage inside those two alone."""

    def __init__(self, optimizer: compat.ZeROOptimizer, block_of_group: Sequence[int]) -> None:
        self.optimizer = optimizer
        self._masters = tuple(compat.masters(optimizer))  # all of them, also while DeepSpeed is shown only some
        self.block_of_group = tuple(block_of_group)
        self.groups_of_block: dict[int, list[int]] = {}
        for group, block in enumerate(self.block_of_group):
            self.groups_of_block.setdefault(block, []).append(group)

    def groups_of(self, blocks: Iterable[int]) -> list[int]:
        """Return the groups of ``blocks``, ascending."""
        wanted = set(blocks)
        return [group for group, block in enumerate(self.block_of_group) if block in wanted]

    def _all_or(self, groups: Sequence[int] | None) -> Sequence[int]:
        """Return ``groups``, or all if it is None."""
        return range(len(self._masters)) if groups is None else groups

    # -------------------------------------------------------------------------- a step

    @abstractmethod
    def prefetch(self, blocks: Sequence[int] | None) -> None:
        """Start to bring the states of ``blocks``, which the next step will update; None before an explore step.

        Returns at once: the transfers run during forward and backward. Idempotent.
        """

    @abstractmethod
    def begin(self, blocks: Sequence[int]) -> list[int]:
        """Begin the update of ``blocks``; return their groups in the order in which they must be updated."""

    @abstractmethod
    def enter(self, shown: int, group: int) -> None:
        """Let DeepSpeed find the state of ``group`` where its update runs.

        ``shown`` is the group's index in DeepSpeed's lists now, which hold the step's groups alone. The current stream,
        or with NVMe the host, waits for the state's arrival.
        """

    def can_enter_all(self) -> bool:
        """Return whether the step that has begun may enter all of its groups before it leaves the first one."""
        return False

    def updated(self, shown: int, group: int) -> None:  # noqa: B027 (most homes have nothing to do)
        """Take note that AdamW has updated ``group``, the last one entered; its master weights are cast next."""

    @abstractmethod
    def leave(self, shown: int, group: int) -> None:
        """Return the updated state of ``group``, the last one entered, to its home. Also called after an exception."""

    def release_all_but(self, kept: Collection[int]) -> list[int]:
        """Drop the moments and step counts of blocks that are not ``kept``; return the groups that had any.

        Their memory is freed, and the next update of such a block is its first again. Local to this rank; no transfer.
        Costs what the groups with moments cost, which may be few of many.
        """
        group_of = self._group_of_master
        state = self.optimizer.optimizer.state
        held = sorted(group_of[id(master)] for master, moments in state.items() if moments and id(master) in group_of)
        released = [group for group in held if self.block_of_group[group] not in kept]
        for group in released:
            self._drop_moments(group)
        return released

    @cached_property
    def _group_of_master(self) -> dict[int, int]:
        return {id(master): group for group, master in enumerate(self._masters)}

    def _drop_moments(self, group: int) -> None:
        """Free the moments of ``group``, which exist, wherever they are."""
        self.optimizer.optimizer.state.pop(self._masters[group]).clear()

    # ------------------------------------------------------------------- between steps

    @abstractmethod
    def readable(self, groups: Sequence[int] | None = None) -> AbstractContextManager[None]:
        """Inside, DeepSpeed's lists and the base optimizer hold the current states of ``groups`` (None: of all).

        The host waits for transfers in flight. The tensors are valid only inside; see `keep_readable`.
        """

    @abstractmethod
    def writable(self, groups: Sequence[int] | None = None) -> AbstractContextManager[None]:
        """As `readable`, and changes are kept: in place, by new tensors, or by new moments.

        No copy of the states of ``groups`` elsewhere outlives this.
        """

    @abstractmethod
    def adopt(self, groups: Sequence[int] | None = None) -> None:
        """Take charge of the states of ``groups`` (None: of all) that stand in DeepSpeed's place for them now.

        `writable` does it at its end; a caller needs it only for states that were put there in another way.
        """

    def as_saved(self) -> AbstractContextManager[None]:
        """As `readable`, of all groups, with states in the form in which a checkpoint has them."""
        return self.readable()

    def keep_readable(self, state_dict: dict[str, Any]) -> None:  # noqa: B027 (most homes have nothing to do)
        """Change ``state_dict``, which the optimizer made inside `as_saved`, so that it stays valid outside."""

    def before_load(self, state_dict: dict[str, Any]) -> None:  # noqa: B027 (most homes have nothing to do)
        """Take what only this home can read out of ``state_dict``, which DeepSpeed loads next, inside `writable`."""

    def as_weight(self, value: Tensor) -> Tensor:
        """Return a master weight's ``value`` so that a cast to the model's dtype gives its model weight."""
        return value

    # ------------------------------------------------------------------------- memory

    def fp32_room(self, numel: int, device: torch.device) -> Tensor:
        """Return (numel,) uninitialised fp32 numbers for states that are made of resting ones between steps.

        On ``device``, where they rest; on disk where all states together may be larger than the host's memory.
        """
        return torch.empty(numel, dtype=torch.float32, device=device)

    def bytes(self) -> StateBytes:
        """Return the bytes of states on this rank once all issued moves are done."""
        return StateBytes(moments=moment_bytes(self.optimizer))


def moment_bytes(optimizer: compat.ZeROOptimizer) -> int:
    """Return the bytes of the Adam moments that a ZeRO optimizer holds on this rank, plain DeepSpeed's too."""
    states = optimizer.optimizer.state.values()
    return storage_bytes(state[key] for state in states for key in MOMENTS if key in state)
