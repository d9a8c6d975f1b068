"""ZeRO's arithmetic: the share of a param group that lies on one rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_START_ALIGNMENT = 2  # elements, times the ranks (stage_1_and_2.py, nccl_start_alignment_factor)
_PARAMETER_ALIGNMENT_BYTES = 16  # with zero_optimization.parameter_alignment


@dataclass(frozen=True)
class Partition:
    """One rank's share of one param group.

    Attributes:
        flat_numel: elements of the group's flat buffer on all ranks together, padding included.
        numel: elements of this rank's share, padding included; equal on all ranks.
        covered_numel: those of them that are a parameter's.
        whole_numel: elements of all parameters with at least one element in this share; with stage 3 of their
            shares, padding included.
        group_numel: elements of the group's parameters.
        largest_numel: elements of the group's largest parameter.
    """

    flat_numel: int
    numel: int
    covered_numel: int
    whole_numel: int
    group_numel: int
    largest_numel: int

    @property
    def padding_numel(self) -> int:
        """Elements of the partition that belong to no parameter."""
        return self.numel - self.covered_numel


def flat_partition(
    numels: Sequence[int], ranks: int, rank: int, *, item_bytes: int = 4, align_parameters: bool = False,
    round_robin: bool = False,
) -> Partition:  # fmt: skip
    """Return the partition of stages 1 and 2: the group flattened, padded to 2 · ranks elements, cut into equal slices.

    With ``align_parameters`` every parameter but the first starts at a multiple of 16 bytes of ``item_bytes``
    elements; with ``round_robin`` the parameters are first dealt out to the ranks in turn.
    """
    if round_robin:
        numels = [numels[i] for first in range(ranks) for i in range(first, len(numels), ranks)]
    step = _PARAMETER_ALIGNMENT_BYTES // math.gcd(_PARAMETER_ALIGNMENT_BYTES, item_bytes) if align_parameters else 1
    starts, end = [], 0
    for numel in numels:
        start = _round_up(end, step)
        starts.append(start)
        end = start + numel
    flat = _round_up(end, _START_ALIGNMENT * ranks)
    share = flat // ranks
    covered = [
        max(0, min(start + numel, (rank + 1) * share) - max(start, rank * share))
        for start, numel in zip(starts, numels, strict=True)
    ]
    return Partition(
        flat_numel=flat,
        numel=share,
        covered_numel=sum(covered),
        whole_numel=sum(numel for numel, here in zip(numels, covered, strict=True) if here),
        group_numel=sum(numels),
        largest_numel=max(numels, default=0),
    )


def parameter_partition(numels: Sequence[int], ranks: int, rank: int) -> Partition:
    """Return the partition of stage 3: every parameter is padded to a multiple of the ranks and cut by itself."""
    shares = [math.ceil(numel / ranks) for numel in numels]
    covered = [max(0, min(share, numel - rank * share)) for share, numel in zip(shares, numels, strict=True)]
    return Partition(
        flat_numel=sum(shares) * ranks,
        numel=sum(shares),
        covered_numel=sum(covered),
        whole_numel=sum(share for share, here in zip(shares, covered, strict=True) if here),
        group_numel=sum(numels),
        largest_numel=max(numels, default=0),
    )


def sub_groups(numels: Sequence[int], ranks: int, sub_group_size: int) -> list[int]:
    """Return the elements, on one rank, of each sub-group that stage 3 steps a param group in.

    Parameters are added until a sub-group has ``sub_group_size`` elements (stage3.py, _create_fp16_sub_groups).
    """
    shares = [math.ceil(numel / ranks) for numel in numels]
    if sub_group_size >= sum(shares):
        return [sum(shares)]
    found, open_numel = [], 0
    for index, share in enumerate(shares):
        open_numel += share
        if open_numel >= sub_group_size or index == len(shares) - 1:
            found.append(open_numel)
            open_numel = 0
    return found


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
