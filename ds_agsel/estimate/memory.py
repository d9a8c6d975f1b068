"""Bytes per rank, by kind and place: gradients and states when backward has ended, and the most that a step adds.

Gradients, master weights and states are exact: tests compare them with the buffers of real engines. Staging is
temporary: reduction buckets, one gradient on its way, copies between host and accelerator, weights that ZeRO-3 has
gathered, a group's gradient in fp32 for its update; of backward and update, the one that needs more. With `sparse_grad`
it has an upper bound of its bases and energies too, and the host's weights are the matrices that the trained entries
are added to. Activations, CUDA's own context and fragmentation are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from ds_agsel.estimate.partitions import Partition, flat_partition, parameter_partition, sub_groups
from ds_agsel.estimate.setup import MASTER_BYTES, MOMENT_BYTES, Setup
from ds_agsel.estimate.shapes import ModelShape, Numels
from ds_agsel.estimate.sparse_shape import SparseShape
from ds_agsel.estimate.steps import Step, full_step, weighted
from ds_agsel.residency.plan import default_budget_bytes
from ds_agsel.residency.swap_plan import default_ring

Stepping = Literal["resident", "host", "accelerator"]
Moment = Literal["backward", "update"]


@dataclass(frozen=True)
class Features:
    """Savings beyond DeepSpeed's own buffers, in one place; `BUILT` are those that ds_agsel has.

    Attributes:
        streaming_top_k: explore steps of ZeRO-2 and 3 keep k + 1 blocks' gradients at most where one backward decides.
        lean_host_staging: the bf16 staging buffer of host stepping holds one step's selection, not all parameters.
    """

    streaming_top_k: bool = False
    lean_host_staging: bool = False


BUILT = Features(streaming_top_k=True, lean_host_staging=True)


@dataclass(frozen=True)
class Bytes:
    """The bytes in one place, by kind. ``rounding``: what torch takes for page-locked buffers beside their own size."""

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


def full_memory(groups: Sequence[Numels], frozen: Numels, setup: Setup, rank: int = 0) -> Memory:
    """Return the memory of plain DeepSpeed training ``groups``, with ``frozen`` parameters beside them."""
    stepping: Stepping = "resident" if setup.offload_optimizer == "none" else "host"
    return _Ledger(groups, range(len(groups)), frozen, setup, rank, full_step(len(groups)), stepping, None).memory()


def selective_memory(
    model: ModelShape, setup: Setup, stepping: Stepping, step: Step, rank: int = 0, features: Features = BUILT,
    moment: Moment | None = None,
) -> Memory:  # fmt: skip
    """Return the memory of ds_agsel at ``step``; with ``moment`` staging is that of backward, or of the update, alone.

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

    # ------------------------------------------------- master weights and states

    def _states(self) -> list[tuple[str, str, Fraction | int]]:
        shares = self._shares()
        plain = self._features is None
        setup = self._setup.but(state_dtype="fp32", master_weights="fp32") if plain else self._setup
        masters = sum(shares) * setup.resting_master_bytes
        # With "reset" those of the step before are given back before the step's own are made.
        with_moments = self._step.selected if self._setup.on_reentry == "reset" else self._step.with_moments
        moments = self._sum(with_moments, [setup.resting_bytes(share) for share in shares])
        home = "accelerator" if self._stepping == "resident" else "host"
        if self._setup.offload_optimizer == "nvme":
            home = "nvme"
        if self._stepping != "accelerator":
            return [(home, "master_weights", masters), (home, "states", moments)]
        fits = min(Fraction(1), Fraction(self._budget()) / (self._visiting() or 1))
        there = self._there([setup.resting_bytes(share) for share in shares])
        entries: list[tuple[str, str, Fraction | int]] = [
            ("host", "states", moments), ("accelerator", "states", fits * there)
        ]  # fmt: skip
        if self._setup.keep_master == "accelerator":
            return [*entries, ("accelerator", "master_weights", masters)]
        masters_there = fits * self._there(shares) * setup.resting_master_bytes
        return [*entries, ("host", "master_weights", masters), ("accelerator", "master_weights", masters_there)]

    def _visiting(self) -> Fraction:
        """Return the bytes of the states that are on the accelerator when the step ends, were there no budget."""
        return self._there([self._setup.visiting_bytes(share) for share in self._shares()])

    def _there(self, values: Sequence[int]) -> Fraction:
        """Return Σ of the groups' values over what is on the accelerator when the step ends, were there no budget."""
        stays = self._setup.is_cache  # what has been there
        return Fraction(sum(values)) if stays else self._sum(self._step.selected, values)

    def _block_bytes(self) -> dict[int, int]:
        """Return the bytes of each block's states where they are updated."""
        block_bytes = dict.fromkeys(range(len(self._step.selected)), 0)
        for block, share in zip(self._blocks, self._shares(), strict=True):
            block_bytes[block] += self._setup.visiting_bytes(share)
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

    # ----------------------------------------------------------------- staging

    def _staging(self) -> list[tuple[str, str, Fraction | int]]:
        """Return what is there for a while: what stays through a step, and the larger of backward's and an update's."""
        there, on_host = self._kept_staging()
        moments = {"backward": (self._in_backward(), 0), "update": self._in_update()}
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
        if self._features is not None:  # one group's states are fp32 in its update
            splits = setup.master_weights != "fp32"
            packs = setup.state_dtype != "fp32" or (splits and self._stepping == "accelerator")
            scratch = max(self._shares()) * (packs * MOMENT_BYTES + splits * MASTER_BYTES)
            there, on_host = (there, on_host + scratch) if self._on_host else (there + scratch, on_host)
        return there, on_host

    def _passing(self) -> Fraction | int:
        """Return the bytes that states take which are still leaving, or arrive early."""
        return max(Fraction(0), self._budget() - self._visiting()) if self._stepping == "accelerator" else 0

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
        needed = self._buckets(reduced_numel) + unreduced
        if self._on_host and setup.stage < 3 and self._item != MASTER_BYTES:
            needed += largest * MASTER_BYTES  # the same gradient in fp32, before it goes to the host
        if setup.stage == 3 and (setup.ranks > 1 or setup.offload_param != "none"):  # else weights are used in place
            every = [n for group in [*self._groups, self._frozen] for n in group]
            needed += min(sum(every), setup.max_live_numel + max(every)) * self._item
        return needed + (0 if step.phase == "explore" else self._passing())  # which knows no blocks to bring yet

    def _in_update(self) -> tuple[Fraction | int, Fraction | int]:
        """Return the bytes that the update of the largest group needs for a while, on the accelerator and the host."""
        setup, shares = self._setup, self._shares()
        if setup.stage == 3:
            shares = [max(sub_groups(group, setup.ranks, setup.sub_group_numel)) for group in self._groups]
        share = self._largest(self._step.selected, shares)
        packed: Fraction | int = 0  # a group's moments are packed before those that they replace are given up
        if self._features is not None and setup.state_dtype != "fp32":
            packed = setup.resting_bytes(share)
        if self._on_host:
            return 0, packed
        flat = 0 if setup.stage < 3 and setup.keeps_fp32_partitions else share * setup.accumulation_bytes
        in_fp32 = 0 if flat == share * MASTER_BYTES or not flat else share * MASTER_BYTES
        return flat + in_fp32 + packed + self._passing(), 0

    # ---------------------------------------------------------------- page-locked

    def _rounding(self) -> Fraction | int:
        """Return what torch's allocator takes beside the sizes of page-locked buffers: it takes powers of 2."""
        setup, step, shares = self._setup, self._step, self._shares()
        if not setup.rounds_page_locked:
            return 0
        if self._stepping == "accelerator":
            masters = [_beyond(share * setup.resting_master_bytes) for share in shares]
            with_moments = step.selected if setup.on_reentry == "reset" else step.with_moments
            moments = self._sum(with_moments, [2 * _beyond(setup.resting_bytes(share) // 2) for share in shares])
            return moments + (sum(masters) if setup.keep_master == "host" else 0)
        if not (self._on_host and setup.pin_memory and setup.offload_optimizer == "cpu"):
            return 0
        in_fp32 = [_beyond(share * MASTER_BYTES) for share in shares]
        extra = self._sum(step.with_gradient, in_fp32)
        if self._features is None or setup.master_weights == "fp32":
            extra += sum(in_fp32)
        if setup.stage == 3:
            return extra + self._sum(
                step.with_gradient, [_beyond(share * setup.accumulation_bytes) for share in shares]
            )
        if self._features is not None and self._features.lean_host_staging:
            return extra + _beyond(round(self._sum(step.selected, shares) * self._item))
        return extra + sum(_beyond(share * self._item) for share in shares)

    def _buckets(self, reduced_numel: Fraction) -> Fraction:
        setup = self._setup
        if not (setup.contiguous_gradients or self._on_host):
            return Fraction(0)
        numel = Fraction(setup.reduce_bucket_numel)
        if self._features is not None:
            if setup.stage == 2 and setup.ranks == 1:
                return Fraction(0)  # nobody to reduce with: stage12.py, [Note: One rank]
            numel = min(numel, reduced_numel)
        width = setup.accumulation_bytes if setup.stage == 1 and setup.keeps_fp32_partitions else self._item
        return numel * width * (2 if setup.overlap_comm and setup.stage < 3 else 1)


def _beyond(size: int) -> int:
    """Return by how much the next power of 2 is larger than ``size`` bytes."""
    return (1 << (size - 1).bit_length()) - size if size > 0 else 0
