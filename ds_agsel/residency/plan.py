"""What moves between host and accelerator for a step: pure, by block index and bytes, no tensors and no streams.

[Note: Budget] The states on the accelerator never take more than a budget. By default that is the largest possible
selection and the two next largest blocks: one that is still leaving and one that arrives early; what is not selected
leaves at once, so that a step holds the states of its blocks alone. With less, the blocks of a step pass through: a
block leaves right after its own update, and the one after next takes its place. A budget that the user gives is a
cache: a block that is not selected stays until its room is needed, and where all have room nothing moves any more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ds_agsel.errors import ConfigError
from ds_agsel.lottery import Bound

EXTRA_SLOTS = 2  # [Note: Budget]


@dataclass(frozen=True)
class Move:
    """One block's state changes place. ``after`` is the block whose update must have been issued; None: at once.

    Moves are carried out in their order: an arrival finds its memory because every leave before it has been issued.
    """

    kind: Literal["arrive", "leave"]
    block: int
    after: int | None = None


def default_budget_bytes(block_bytes: Mapping[int, int], bound: Bound) -> int:
    """Return the bytes of the largest selection within ``bound`` and two blocks more; see [Note: Budget]."""
    return bound.most(block_bytes, more=EXTRA_SLOTS)


def check_budget(budget_bytes: int, block_bytes: Mapping[int, int], names: Sequence[str]) -> None:
    """Raise ConfigError if a block by itself does not fit, naming the largest."""
    largest = max(block_bytes, key=lambda block: (block_bytes[block], -block))
    if block_bytes[largest] > budget_bytes:
        raise ConfigError(
            f"adagrad_select.state_budget_bytes={budget_bytes} is less than the state of block "
            f'"{names[largest]}", which takes {block_bytes[largest]} bytes on each rank. Give at least that, null '
            "for the largest selection and two blocks more, or name the block in never_select."
        )


def update_order(resident: Collection[int], selected: Collection[int]) -> tuple[int, ...]:
    """Return the order in which a step updates its blocks: resident ones first, then those that arrive."""
    return tuple(sorted(selected, key=lambda block: (block not in resident, block)))


def eviction_order(resident: Collection[int], update_counts: Sequence[int] | Mapping[int, int]) -> tuple[int, ...]:
    """Return ``resident``, the first to leave first: the block that was updated least often, then the lower index.

    An exploit step draws in proportion to these counts, so that a block with a low one is the least likely to return.
    """
    return tuple(sorted(resident, key=lambda block: (update_counts[block], block)))


def plan_moves(
    resident: Collection[int],
    selected: Collection[int],
    block_bytes: Mapping[int, int],
    budget_bytes: int,
    may_stay: Sequence[int] = (),
) -> tuple[Move, ...]:
    """Return the moves that a step on ``selected`` needs, from ``resident``; blocks that stay selected do not move.

    Blocks that are not selected leave at once, except those of ``may_stay`` (`eviction_order`), which leave in that
    order as far as their room is needed. The selected ones arrive in `update_order` as long as there is room; the rest
    arrive during the step, each after those updated before it have left. Afterwards resident are the last of
    `update_order` that fit, and what has stayed. The bytes on the accelerator, in the order of the moves, never exceed
    ``budget_bytes``, in which each block by itself must fit (`check_budget`).
    """
    order = update_order(resident, selected)
    unselected = set(resident) - set(selected)
    staying = [block for block in may_stay if block in unselected]
    leaving = sorted(unselected - set(staying))
    here = [block for block in order if block in resident]
    used = sum(block_bytes[block] for block in resident)
    moves: list[Move] = []
    after = None  # the last block that had to be updated to make room
    evicted = 0
    for block in order[len(here) :]:
        while used + block_bytes[block] > budget_bytes:
            if leaving or staying:
                gone = (leaving or staying).pop(0)
            else:
                gone = after = order[evicted]
                evicted += 1
            moves.append(Move("leave", gone, after))
            used -= block_bytes[gone]
        moves.append(Move("arrive", block, after))
        used += block_bytes[block]
    return (*moves, *(Move("leave", block) for block in leaving))
