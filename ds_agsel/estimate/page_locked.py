"""Page-locked host memory as torch's caching host allocator takes it: a power of two for each piece, and for good."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from ds_agsel.estimate.setup import Setup
from ds_agsel.estimate.steps import Step
from ds_agsel.residency.arena import bytes_of
from ds_agsel.residency.rooms import master_room
from ds_agsel.residency.slab import plan_slab, power_of_two_above


class UpdateGroup(NamedTuple):
    """What DeepSpeed steps by itself: a param group, with stage 3 a sub-group; its elements on this rank."""

    block: int
    numel: int


def taken_by_visiting(groups: Sequence[UpdateGroup], setup: Setup, step: Step) -> int:
    """Return the bytes that states take which visit the accelerator: zero/states/visits.py.

    The masters of all groups are cut from one slab, the moments of all groups that can be selected from another. With
    "reset" each moment's tensor is by itself, and what a selection has given back is taken by the next.
    """
    taken = 0
    if setup.keep_master == "host":
        taken += slab_bytes(bytes_of(master_room(setup.master_weights, group.numel)) for group in groups)
    if setup.on_reentry == "reset":
        return taken + _taken_one_by_one(groups, setup, step)
    active = [group for group in groups if step.active[group.block]]
    return taken + slab_bytes(size for group in active for size in setup.moment_sizes(group.numel))


def slab_bytes(sizes: Iterable[int]) -> int:
    """Return the bytes that a slab of tensors of ``sizes`` bytes takes."""
    return _slab_bytes(tuple(sizes))


def power_of_two(size: int) -> int:
    """Return the bytes that are taken for a buffer of ``size`` bytes by itself."""
    return power_of_two_above(size) if size > 0 else 0


def beyond(size: int) -> int:
    """Return the bytes that are taken beside the ``size`` bytes that are asked for."""
    return power_of_two(size) - size


def _taken_one_by_one(groups: Sequence[UpdateGroup], setup: Setup, step: Step) -> int:
    """Return what the moments of all selections that can be take: of each size as many as one selection has at most."""
    by_size: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for group in groups:
        if step.active[group.block]:
            for size in setup.moment_sizes(group.numel):
                by_size[power_of_two(size)][group.block] += power_of_two(size)
    return sum(step.bound.most(of_blocks) for of_blocks in by_size.values())


@lru_cache
def _slab_bytes(sizes: tuple[int, ...]) -> int:
    return plan_slab(sizes).taken_bytes
