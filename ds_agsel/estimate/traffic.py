"""Bytes that one optimizer step moves on one rank, of all its micro-steps together.

The counts are of the tensors handed to collectives, as `selection.Traffic` counts them; what a ring puts on the wire
is (ranks - 1) / ranks of a gather or scatter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction

from ds_agsel.estimate.memory import Stepping, partitions_of, update_groups
from ds_agsel.estimate.setup import MASTER_BYTES, Setup
from ds_agsel.estimate.shapes import ModelShape, Numels
from ds_agsel.estimate.sparse_shape import SparseShape
from ds_agsel.estimate.steps import Step, full_step, weighted


@dataclass(frozen=True)
class TrafficBytes:
    """``reduced`` and ``gathered`` are 0 on one rank; ``h2d`` and ``d2h`` are copies to and from the accelerator."""

    gathered: int = 0
    reduced: int = 0
    h2d: int = 0
    d2h: int = 0
    nvme_read: int = 0
    nvme_write: int = 0

    @property
    def total(self) -> int:
        """The sum of all fields, in bytes."""
        return sum(getattr(self, field.name) for field in fields(self))


def full_traffic(groups: Sequence[Numels], frozen: Numels, setup: Setup, rank: int = 0) -> TrafficBytes:
    """Return the traffic of plain DeepSpeed training ``groups``."""
    stepping: Stepping = "resident" if setup.offload_optimizer == "none" else "host"
    plain = setup.but(master_weights="fp32", state_dtype="fp32", on_reentry="keep")
    traffic = _traffic(groups, range(len(groups)), frozen, plain, rank, full_step(len(groups)), stepping)
    if setup.offload_optimizer != "nvme":
        return traffic
    gradients = sum(p.numel for p in partitions_of(groups, setup, rank)) * MASTER_BYTES  # go to NVMe and come back
    return replace(traffic, nvme_read=traffic.nvme_read + gradients, nvme_write=traffic.nvme_write + gradients)


def selective_traffic(model: ModelShape, setup: Setup, stepping: Stepping, step: Step, rank: int = 0) -> TrafficBytes:
    """Return the traffic of ds_agsel at ``step``. A visiting block's first visit brings no moments and costs less."""
    traffic = _traffic(model.groups, model.block_of_group, model.frozen, setup, rank, step, stepping)
    return traffic if model.sparse is None else _with_matrices(traffic, model.sparse, setup, step, rank)


def _with_matrices(traffic: TrafficBytes, sparse: SparseShape, setup: Setup, step: Step, rank: int) -> TrafficBytes:
    """Return ``traffic`` with the matrices of `sparse_grad`, which are frozen weights there.

    After an update each needs its base on the accelerator. With stage 3 a matrix that backward doesn't reach is
    gathered once, not twice, carriers that are not kept whole are gathered to write it, and it after that if it is.
    """
    h2d = traffic.h2d + sparse.traffic_numel(step.selected, sparse.held_numels(setup.stage, setup.ranks, rank)) * (
        setup.item_bytes
    )
    if setup.stage < 3:
        return replace(traffic, h2d=round(h2d))
    kept_whole = setup.persistence_threshold_numel
    not_reached = [1 - share for share in step.in_backward]
    matrices = [matrix.numel if matrix.numel > kept_whole else 0 for matrix in sparse.matrices]
    written = [
        _padded(matrix.entries, setup.ranks) * (matrix.entries > kept_whole)
        + _padded(matrix.numel, setup.ranks) * (matrix.numel <= kept_whole)
        for matrix in sparse.matrices
    ]
    more = sparse.traffic_numel(step.selected, written)
    more -= sparse.traffic_numel(not_reached, matrices) * setup.accumulation_steps
    moved = more * setup.item_bytes
    share = moved / setup.ranks
    return replace(
        traffic,
        gathered=round(traffic.gathered + moved) if setup.ranks > 1 else 0,
        h2d=round(h2d + (share if setup.offload_param != "none" else 0)),
        nvme_read=round(traffic.nvme_read + (share if setup.offload_param == "nvme" else 0)),
    )


def _padded(numel: int, ranks: int) -> int:
    return -(-numel // ranks) * ranks


def _traffic(
    groups: Sequence[Numels], block_of_group: Sequence[int], frozen: Numels, setup: Setup, rank: int, step: Step,
    stepping: Stepping,
) -> TrafficBytes:  # fmt: skip
    partitions = partitions_of(groups, setup, rank)
    item, micro_steps, many = setup.item_bytes, setup.accumulation_steps, setup.ranks > 1

    def total(shares: Sequence[Fraction], values: Sequence[int]) -> Fraction:
        return weighted([shares[block] for block in block_of_group], values)

    numels = [p.numel for p in partitions]
    covered = [p.covered_numel for p in partitions]
    h2d, d2h, nvme = Fraction(0), Fraction(0), Fraction(0)
    width = setup.accumulation_bytes if setup.stage == 1 and setup.keeps_fp32_partitions else item
    sent = [p.flat_numel if setup.stage == 3 else p.group_numel for p in partitions]
    reduced = total(step.reduced, sent) * width
    if setup.stage > 1:
        reduced *= micro_steps
    if setup.stage < 3:
        gathered = total(step.selected, [p.flat_numel for p in partitions]) * item
    else:
        # Forward gathers every parameter, backward those that it reaches; persistent ones are gathered after an update.
        kept = [sum(n for n in group if n > setup.persistence_threshold_numel) for group in groups]
        frozen_numel = sum(n for n in frozen if n > setup.persistence_threshold_numel)
        gathered = (sum(kept) + total(step.in_backward, kept) + 2 * frozen_numel) * item * micro_steps
        small = [tuple(n for n in group if n <= setup.persistence_threshold_numel) for group in groups]
        gathered += total(step.selected, [p.flat_numel for p in partitions_of(small, setup, rank)]) * item
        if setup.offload_param != "none":
            h2d += gathered / setup.ranks
        if setup.offload_param == "nvme":
            nvme += gathered / setup.ranks
    if stepping == "host" and setup.stage == 3:
        # Each micro-step's sum goes to the host and comes back; the last goes there once more, in fp32, unpadded.
        sums = total(step.reduced, [p.whole_numel for p in partitions])
        d2h += sums * micro_steps * setup.accumulation_bytes + total(step.reduced, covered) * MASTER_BYTES
        h2d += sums * micro_steps * setup.accumulation_bytes
        if setup.offload_param == "none":
            h2d += total(step.selected, numels) * item
    elif stepping == "host":
        copied = step.selected if step.streams else step.reduced  # what is beaten does not go there
        d2h += total(copied, covered) * MASTER_BYTES
        h2d += total(step.selected, numels) * item
        if setup.stage == 2 and micro_steps > 1 and not setup.keeps_fp32_partitions:
            whole = total(copied, [p.whole_numel for p in partitions]) * item
            d2h += micro_steps * whole
            h2d += (micro_steps - 1) * whole
    if stepping == "host" and setup.master_weights == "split":
        d2h += total(step.selected, numels) * item  # the halves that the model weights are
    if stepping == "accelerator":
        resets = setup.on_reentry == "reset"  # moments then stay where they are made
        travelling = [setup.visiting_bytes(numel) - resets * setup.resting_bytes(numel) for numel in numels]
        h2d += total(step.arriving, travelling)
        d2h += total(step.leaving, travelling)
        if setup.offload_param != "none":
            d2h += total(step.selected, numels) * item
    read, written = Fraction(0), Fraction(0)
    if setup.offload_optimizer == "nvme":
        swapped = update_groups(groups, block_of_group, setup, rank)
        moments = [setup.resting_bytes(group.numel) for group in swapped]
        masters = [setup.resting_master_bytes * group.numel for group in swapped]
        written = read = weighted(
            [step.selected[group.block] for group in swapped], list(map(sum, zip(masters, moments)))
        )
        if setup.on_reentry == "reset":  # what comes anew has none
            read -= weighted([step.arriving[group.block] for group in swapped], moments)
    return TrafficBytes(
        gathered=round(gathered) if many else 0,
        reduced=round(reduced) if many else 0,
        h2d=round(h2d),
        d2h=round(d2h),
        nvme_read=round(nvme + read),
        nvme_write=round(written),
    )
