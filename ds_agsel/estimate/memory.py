"""Bytes per rank, by kind and place: gradients and states when backward has ended, and the most that a step adds.

Gradients, master weights and states are exact: tests compare them with the buffers of real engines. So is the memory
for states that visit the accelerator, there and page-locked. Other staging is temporary: reduction buckets, gradients
on their way, copies between host and accelerator, weights that ZeRO-3 has gathered, gradients in fp32 for their update;
of backward and update, the one that needs more. With `sparse_grad` it has an upper bound of its bases and energies too,
and the host's weights are the matrices that the trained entries are added to. Activations, CUDA's own context and
libraries (60 to 70 MiB on an H100) and fragmentation are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from ds_agsel.estimate.page_locked import UpdateGroup, beyond, taken_by_visiting
from ds_agsel.estimate.partitions import Partition, flat_partition, parameter_partition, sub_groups
from ds_agsel.estimate.setup import MASTER_BYTES, MOMENT_BYTES, Setup
from ds_agsel.estimate.shapes import ModelShape, Numels
from ds_agsel.estimate.sparse_shape import SparseShape
from ds_agsel.estimate.steps import Step, full_step, weighted
from ds_agsel.residency.arena import capacity_for, spare_bytes
from ds_agsel.residency.plan import default_budget_bytes
from ds_agsel.residency.swap_plan import default_ring
from ds_agsel.zero.update_batches import largest_batch

Stepping = Literal["resident", "host", "accelerator"]
Moment = Literal["backward", "update", "rest"]  # "rest": between steps


@dataclass(frozen=True)
class Features:
    """Savings beyond DeepSpeed's own buffers, in one place; `BUILT` are those that ds_agsel has.

    Attributes:
        streaming_top_k: explore steps of ZeRO-2 and 3 keep few blocks' gradients beside those of the best where one
            backward decides: of one block, and where scores arrive late, as from an accelerator, of up to three.
        lean_host_staging: the bf16 staging buffer of host stepping holds one step's selection, not all parameters.
    """

    streaming_top_k: bool = False
    lean_host_staging: bool = False


BUILT = Features(streaming_top_k=True, lean_host_staging=True)


@dataclass(frozen=True)
class Bytes:
    """The bytes in one place, by kind. ``rounding``: page-locked memory that is taken beside the buffers in use."""

    weights: int = 0
    gradients: int = 0
    master_weights: int = 0
    states: int = 0
    staging: int = 0
    rounding: int = 0

    @property
    def total(self) -> int:
        """The sum of all fields, in bytes."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Memory:
    """One rank's bytes, by place."""

    accelerator: Bytes
    host: Bytes
    nvme: Bytes


def partitions_of(groups: Sequence[Numels], setup: Setup, rank: int) -> tuple[Partition, ...]:
    """Return this rank's share of each param group."""
    if setup.stage == 3:
        return _parameter_partitions(tuple(groups), setup.ranks, rank)
    return _flat_partitions(
        tuple(groups), setup.ranks, rank, setup.item_bytes, setup.parameter_alignment, setup.round_robin_gradients
    )


def update_groups(
    groups: Sequence[Numels], block_of_group: Sequence[int], setup: Setup, rank: int
) -> list[UpdateGroup]:
    """Return what is updated by itself on this rank: param groups; with stage 3 their sub-groups."""
    if setup.stage < 3:
        partitions = partitions_of(groups, setup, rank)
        return [UpdateGroup(block, part.numel) for block, part in zip(block_of_group, partitions, strict=True)]
    return [
        UpdateGroup(block, numel)
        for block, group in zip(block_of_group, groups, strict=True)
        for numel in sub_groups(group, setup.ranks, setup.sub_group_numel)
    ]


@lru_cache
def _parameter_partitions(groups: tuple[Numels, ...], ranks: int, rank: int) -> tuple[Partition, ...]:
    return tuple(parameter_partition(group, ranks, rank) for group in groups)


@lru_cache
def _flat_partitions(
    groups: tuple[Numels, ...], ranks: int, rank: int, item_bytes: int, aligned: bool, round_robin: bool
) -> tuple[Partition, ...]:
    return tuple(
        flat_partition(
            group, ranks, rank, item_bytes=item_bytes, align_parameters=aligned, round_robin=round_robin
        )
        for group in groups
    )  # fmt: skip


def full_memory(
    groups: Sequence[Numels], frozen: Numels, setup: Setup, rank: int = 0, moment: Moment | None = None
) -> Memory:
    """Return the memory of plain DeepSpeed training ``groups``, with ``frozen`` parameters beside them."""
    stepping: Stepping = "resident" if setup.offload_optimizer == "none" else "host"
    step = full_step(len(groups))
    return _Ledger(groups, range(len(groups)), frozen, setup, rank, step, stepping, None, moment=moment).memory()


def selective_memory(
    model: ModelShape, setup: Setup, stepping: Stepping, step: Step, rank: int = 0, features: Features = BUILT,
    moment: Moment | None = None,
) -> Memory:  # fmt: skip
    """Return the memory of ds_agsel at ``step``; with ``moment`` staging is what is there then alone.

    ``stepping``: "host" is `offload_optimizer`; "accelerator" keeps masters and moments in pinned host memory and has
    the selected blocks' on the accelerator; "resident" keeps all of them there.
    """
    return _Ledger(
        model.groups, model.block_of_group, model.frozen, setup, rank, step, stepping, features, model.sparse, moment
    ).memory()


class _Ledger:
    """All sums of one estimate. ``features`` None: plain DeepSpeed."""

    def __init__(
        self, groups: Sequence[Numels], block_of_group: Sequence[int], frozen: Numels, setup: Setup, rank: int,
        step: Step, stepping: Stepping, features: Features | None, sparse: SparseShape | None = None,
        moment: Moment | None = None,
    ) -> None:  # fmt: skip
        self._sparse, self._rank, self._moment = sparse, rank, moment
        self._setup, self._step, self._stepping, self._features = setup, step, stepping, features
        self._groups, self._frozen, self._blocks = groups, frozen, block_of_group
        self._partitions = partitions_of(groups, setup, rank)
        self._update_groups = update_groups(groups, block_of_group, setup, rank)
        self._item = setup.item_bytes
        self._on_host = stepping == "host"

    def memory(self) -> Memory:
        kinds = tuple(field.name for field in fields(Bytes))
        places = {place: dict.fromkeys(kinds, Fraction(0)) for place in ("accelerator", "host", "nvme")}
        for place, kind, amount in self._entries():
            places[place][kind] += amount
        return Memory(*(Bytes(**{kind: round(amount) for kind, amount in held.items()}) for held in places.values()))

    def _entries(self) -> list[tuple[str, str, Fraction | int]]:
        return [
            *self._weights(), *self._gradients(), *self._states(), *self._staging(), *self._entries_of_matrices(),
            ("host", "rounding", self._rounding()),
        ]  # fmt: skip

    def _sum(self, shares: Sequence[Fraction], values: Sequence[int]) -> Fraction:
        """Return Σ over groups of the group's value, times its block's share."""
        return weighted([shares[block] for block in self._blocks], values)

    def _largest(self, shares: Sequence[Fraction], values: Sequence[int]) -> int:
        """Return the largest value of the groups whose block may be in."""
        return max((value for block, value in zip(self._blocks, values, strict=True) if shares[block]), default=0)

    def _shares(self) -> list[int]:
        return [partition.numel for partition in self._partitions]

    # ----------------------------------------------------------------- weights

    def _weights(self) -> list[tuple[str, str, Fraction | int]]:
        setup = self._setup
        if setup.stage < 3:
            numel = sum(partition.flat_numel for partition in self._partitions) + sum(self._frozen)
            return [("accelerator", "weights", numel * self._item)]
        every = [*self._groups, self._frozen]
        numel = sum(parameter_partition(group, setup.ranks, 0).numel for group in every)
        place = {"none": "accelerator", "cpu": "host", "nvme": "nvme"}[setup.offload_param]
        kept_whole = sum(n for group in every for n in group if n <= setup.persistence_threshold_numel)
        return [(place, "weights", numel * self._item), ("accelerator", "weights", kept_whole * self._item)]

    def _entries_of_matrices(self) -> list[tuple[str, str, Fraction | int]]:
        """Return what `sparse_grad` needs beside its carriers: zero/carriers.py."""
        if self._sparse is None:
            return []
        bases = self._sparse.held_numels(self._setup.stage, self._setup.ranks, self._rank)
        staging = self._sparse.accelerator_bytes(self._item)
        return [("host", "weights", sum(bases) * self._item), ("accelerator", "staging", staging)]

    # --------------------------------------------------------------- gradients

    def _gradients(self) -> list[tuple[str, str, Fraction | int]]:
        setup, held = self._setup, self._step.with_gradient
        shares = self._shares()
        if self._waits_on_accelerator():
            held = self._step.selected
        if setup.stage == 3:
            flat = self._sum(held, shares)
            if not self._on_host:
                return [("accelerator", "gradients", flat * setup.accumulation_bytes)]
            # Plain DeepSpeed's go to NVMe too; ours wait in host memory for the states.
            swapped = setup.offload_optimizer == "nvme" and self._features is None
            stepped = 0 if swapped else MASTER_BYTES
            return [("host", "gradients", flat * (setup.accumulation_bytes + stepped))]
        if setup.keeps_fp32_partitions:
            on_accelerator = self._sum(held, shares) * setup.accumulation_bytes
        elif self._on_host:
            on_accelerator = Fraction(0)
        else:  # whole parameters, though only a slice is used, and zeros for the partition's padding
            numels = [partition.whole_numel + partition.padding_numel for partition in self._partitions]
            on_accelerator = self._sum(held, numels) * self._item
        if not self._on_host:
            return [("accelerator", "gradients", on_accelerator)]
        on_host = self._sum(held, shares) * MASTER_BYTES
        if setup.stage == 2 and setup.accumulation_steps > 1 and not setup.keeps_fp32_partitions:
            on_host += self._sum(held, [partition.whole_numel for partition in self._partitions]) * self._item
        return [("accelerator", "gradients", on_accelerator), ("host", "gradients", on_host)]

    def _waits_on_accelerator(self) -> bool:
        """Whether gradients go to the host when backward has ended and the blocks are chosen: explore_stream.py."""
        return self._on_host and self._step.streams and self._setup.stage < 3

    # ------------------------------------------------- master weights and states

    def _states(self) -> list[tuple[str, str, Fraction | int]]:
        plain = self._features is None
        setup = self._setup.but(state_dtype="fp32", master_weights="fp32") if plain else self._setup
        masters = sum(self._shares()) * setup.resting_master_bytes
        # With "reset" those of the step before are given back before the step's own are made.
        gives_back = self._setup.on_reentry == "reset" and self._setup.offload_optimizer != "nvme"  # a file keeps room
        with_moments = self._step.selected if gives_back else self._step.with_moments
        moments = self._sum_of_updates(with_moments, setup.resting_bytes)
        home = "accelerator" if self._stepping == "resident" else "host"
        if self._setup.offload_optimizer == "nvme":
            home = "nvme"
        if self._stepping != "accelerator":
            return [(home, "master_weights", masters), (home, "states", moments)]
        fits = min(Fraction(1), Fraction(self._budget()) / (self._visiting() or 1))
        there = self._there(setup.resting_bytes)
        entries: list[tuple[str, str, Fraction | int]] = [
            ("host", "states", moments), ("accelerator", "states", fits * there)
        ]  # fmt: skip
        if self._setup.keep_master == "accelerator":
            return [*entries, ("accelerator", "master_weights", masters)]
        masters_there = fits * self._there(lambda numel: numel * setup.resting_master_bytes)
        return [*entries, ("host", "master_weights", masters), ("accelerator", "master_weights", masters_there)]

    def _visiting(self) -> Fraction:
        """Return the bytes of the states that are on the accelerator when the step ends, were there no budget."""
        return self._there(self._setup.visiting_bytes)

    def _there(self, value: Callable[[int], int]) -> Fraction:
        """Return Σ of the groups' values over what is on the accelerator when the step ends, were there no budget."""
        if self._setup.is_cache:  # what has been there stays
            return Fraction(sum(value(group.numel) for group in self._update_groups))
        return self._sum_of_updates(self._step.selected, value)

    def _sum_of_updates(self, shares: Sequence[Fraction], value: Callable[[int], int]) -> Fraction:
        """Return Σ over what is updated by itself of the value of its elements, times its block's share."""
        groups = self._update_groups
        return weighted([shares[group.block] for group in groups], [value(group.numel) for group in groups])

    def _block_bytes(self) -> dict[int, int]:
        """Return the bytes of each block's states where they are updated."""
        block_bytes = dict.fromkeys(range(len(self._step.selected)), 0)
        for group in self._update_groups:
            block_bytes[group.block] += self._setup.visiting_bytes(group.numel)
        return block_bytes

    def _ring(self) -> int:
        """Return the bytes of host memory through which states on NVMe pass: zero/nvme.py."""
        default = default_ring(self._block_bytes().values(), self._step.bound.num_blocks)
        return self._setup.state_budget_bytes or default

    def _budget(self) -> int:
        """Return the most bytes that states take on the accelerator: residency/plan.py, [Note: Budget]."""
        block_bytes = self._block_bytes()
        if self._setup.state_budget_bytes is not None:
            return min(self._setup.state_budget_bytes, sum(block_bytes.values()))
        return default_budget_bytes(block_bytes, self._step.bound)

    def _arena(self) -> int:
        """Return the bytes that are allocated on the accelerator for states that visit: residency/arena.py."""
        sizes = [size for group in self._update_groups for size in self._setup.visiting_sizes(group.numel)]
        capacity = capacity_for(self._budget(), sizes)
        return capacity + spare_bytes(capacity)

    # ----------------------------------------------------------------- staging

    def _staging(self) -> list[tuple[str, str, Fraction | int]]:
        """Return what is there for a while: what stays through a step, and the larger of backward's and an update's."""
        there, on_host = self._kept_staging()
        moments = {"backward": (self._in_backward(), 0), "update": self._in_update(), "rest": (0, 0)}
        counted = [moments[self._moment]] if self._moment else moments.values()
        there, on_host = there + max(amount for amount, _ in counted), on_host + max(amount for _, amount in counted)
        return [("accelerator", "staging", there), ("host", "staging", on_host)]

    def _kept_staging(self) -> tuple[Fraction | int, Fraction | int]:
        """Return the bytes of buffers that stay, on the accelerator and on the host."""
        setup = self._setup
        largest = max(partition.largest_numel for partition in self._partitions)
        there: Fraction | int = 0
        on_host: Fraction | int = 0
        if self._on_host and setup.stage < 3:
            there += largest * self._item  # temp_grad_buffer_for_gpu_offload
            lean = self._features is not None and self._features.lean_host_staging
            staged = self._sum(self._step.selected, self._shares()) if lean else sum(self._shares())
            on_host = (staged + largest) * self._item
        if setup.stage == 3 and setup.offload_optimizer == "nvme" and self._features is not None:
            on_host += self._ring()
        elif setup.stage == 3 and setup.offload_optimizer == "nvme":
            largest_sub_group = max(max(sub_groups(g, setup.ranks, setup.sub_group_numel)) for g in self._groups)
            on_host += setup.nvme_buffer_count * largest_sub_group * MASTER_BYTES
        if self._stepping == "accelerator":  # room for states that leave, arrive, or are not there now
            there += self._arena() - min(Fraction(self._budget()), self._visiting())
        if self._features is not None:  # one group's states are fp32 in its update
            splits = setup.master_weights != "fp32"
            elsewhere = self._stepping == "accelerator" or setup.offload_optimizer == "nvme"
            packs = setup.state_dtype != "fp32" or (splits and elsewhere)
            scratch = max(group.numel for group in self._update_groups) * (packs * MOMENT_BYTES + splits * MASTER_BYTES)
            there, on_host = (there, on_host + scratch) if self._on_host else (there + scratch, on_host)
        return there, on_host

    def _in_backward(self) -> Fraction | int:
        """Return the bytes on the accelerator that backward needs for a while, at most."""
        setup, step = self._setup, self._step
        reduced_numel = self._sum(step.reduced, [partition.group_numel for partition in self._partitions])
        largest = self._largest(step.reduced, [partition.largest_numel for partition in self._partitions])
        unreduced = Fraction(largest * self._item)  # the one gradient that backward is at, at most
        if setup.stage == 1 and not setup.overlap_comm:
            # Reduced once backward has ended; until then all gradients are whole.
            width = setup.accumulation_bytes if setup.keeps_fp32_partitions else self._item
            unreduced = max(unreduced, reduced_numel * width)
        if self._waits_on_accelerator():
            whole = [partition.whole_numel for partition in self._partitions]
            unreduced = max(unreduced, self._sum(step.with_gradient, whole) * self._item)
        needed = self._buckets(reduced_numel) + unreduced
        if self._on_host and setup.stage < 3 and self._item != MASTER_BYTES:
            needed += largest * MASTER_BYTES  # the same gradient in fp32, before it goes to the host
        if setup.stage == 3 and (setup.ranks > 1 or setup.offload_param != "none"):  # else weights are used in place
            every = [n for group in [*self._groups, self._frozen] for n in group]
            needed += min(sum(every), setup.max_live_numel + max(every)) * self._item
        return needed

    def _in_update(self) -> tuple[Fraction | int, Fraction | int]:
        """Return the bytes that an update needs for a while, at most, on the accelerator and the host."""
        setup, selected = self._setup, self._step.selected
        share = max((group.numel for group in self._update_groups if selected[group.block]), default=0)
        packed: Fraction | int = 0  # a group's moments are packed before those that they replace are given up
        if self._features is not None and setup.state_dtype != "fp32":
            packed = setup.resting_bytes(share)
        if self._on_host:
            return 0, packed
        if self._updates_at_once():  # gradients in fp32: zero/one_pass.py
            every = self._sum_of_updates(selected, int)
            return min(every, Fraction(largest_batch([share]))) * MASTER_BYTES, packed
        flat = 0 if setup.stage < 3 and setup.keeps_fp32_partitions else share * setup.accumulation_bytes
        in_fp32 = 0 if flat == share * MASTER_BYTES or not flat else share * MASTER_BYTES
        return flat + in_fp32 + packed, 0

    def _updates_at_once(self) -> bool:
        """Whether an update takes many groups at once: their states are fp32 and can be in place together."""
        is_fp32 = (self._setup.state_dtype, self._setup.master_weights) == ("fp32", "fp32")
        arriving = self._sum_of_updates(self._step.selected, self._setup.visiting_bytes)
        fits = self._stepping != "accelerator" or arriving <= self._budget()
        return self._features is not None and is_fp32 and fits

    # ---------------------------------------------------------------- page-locked

    def _rounding(self) -> Fraction | int:
        """Return what torch's allocator takes beside the sizes of the page-locked buffers in use."""
        setup, step, shares = self._setup, self._step, self._shares()
        if not setup.rounds_page_locked:
            return 0
        bases = () if self._sparse is None else self._sparse.held_numels(setup.stage, setup.ranks, self._rank)
        extra = sum((beyond(numel * self._item) for numel in bases), Fraction(0))
        if self._stepping == "accelerator":
            in_use = sum((amount for place, _, amount in self._states() if place == "host"), Fraction(0))
            return extra + taken_by_visiting(self._update_groups, setup, step) - in_use
        if not (self._on_host and setup.pin_memory and setup.offload_optimizer == "cpu"):
            return extra
        held = step.selected if self._waits_on_accelerator() else step.with_gradient
        extra += self._sum_of_updates(held, lambda numel: beyond(numel * MASTER_BYTES))
        if setup.stage == 3:  # whose master weights are not page-locked
            return extra + self._sum_of_updates(held, lambda numel: beyond(numel * setup.accumulation_bytes))
        if self._features is None or setup.master_weights == "fp32":
            extra += sum(beyond(share * MASTER_BYTES) for share in shares)
        extra += beyond(max(partition.largest_numel for partition in self._partitions) * self._item)
        if setup.stage == 2 and setup.accumulation_steps > 1 and not setup.keeps_fp32_partitions:
            sums = [sum(beyond(numel * self._item) for numel in group) for group in self._groups]
            extra += self._sum(held, sums)  # of each parameter by itself
        if self._features is not None and self._features.lean_host_staging:
            return extra + beyond(round(self._sum(step.selected, shares) * self._item))
        return extra + sum(beyond(share * self._item) for share in shares)

    def _buckets(self, reduced_numel: Fraction) -> Fraction:
        setup = self._setup
        if not (setup.contiguous_gradients or self._on_host):
            return Fraction(0)
        numel = Fraction(setup.reduce_bucket_numel)
        if self._features is not None:
            if setup.stage > 1 and setup.ranks == 1:
                return Fraction(0)  # nobody to reduce with: zero/one_rank.py, [Note: One rank]
            numel = min(numel, reduced_numel)
        width = setup.accumulation_bytes if setup.stage == 1 and setup.keeps_fp32_partitions else self._item
        return numel * width * (2 if setup.overlap_comm and setup.stage < 3 else 1)
