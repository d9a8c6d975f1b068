"""How long a step takes, predicted: rates are those of `estimate.cards`, bytes the estimator's. Nothing is measured.

Forward and backward hide what travels beside them: gradients on their way to the host, weights that ZeRO-3 fetches, the
states of an exploit step. What must come after backward is added: an update, states of an explore step, updated weights
on their way back, reading and writing NVMe, and what ranks send each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction

from ds_agsel.blocks import EMBEDDING, HEAD
from ds_agsel.estimate.cards import NVME_BYTES_PER_SECOND, Card
from ds_agsel.estimate.memory import Stepping
from ds_agsel.estimate.setup import Setup
from ds_agsel.estimate.shapes import ModelShape
from ds_agsel.estimate.steps import Step, full_step, weighted
from ds_agsel.estimate.traffic import TrafficBytes, full_traffic, selective_traffic

UPDATE_BYTES = (
    28  # AdamW reads and writes master weight and moments (24), reads a gradient and writes a weight (2 each)
)
# An update of leaner states reads them and writes them in fp32 before, and the other way round after it.
LEANER_BYTES = 24
SPLIT_BYTES = 18
HOST_BYTES_PER_SECOND = 50e9  # two channels of DDR5; all ranks of the machine share it
PAGEABLE_SHARE = 0.5  # of the link's rate, for copies from memory that is not page-locked


@dataclass(frozen=True)
class Rates:
    """What a step's parts run at, bytes per second beside the card's own rates; the host's and NVMe's are shared."""

    card: Card
    host_bytes: float = HOST_BYTES_PER_SECOND
    nvme_bytes: float = NVME_BYTES_PER_SECOND
    is_pinned: bool = True

    @property
    def link_bytes(self) -> float:
        """Bytes per second between host and accelerator, one way."""
        return self.card.link_bytes * (1.0 if self.is_pinned else PAGEABLE_SHARE)


@dataclass(frozen=True)
class Work:
    """The micro-steps of one rank's step: its tokens in all, those of a row, and whether layers are checkpointed.

    ``hidden`` and ``layers`` are for attention's own products, a causal half of all pairs of tokens.
    """

    tokens: int
    sequence_length: int
    checkpointing: bool
    hidden: int = 0
    layers: int = 0


@dataclass(frozen=True)
class Seconds:
    """A step's seconds by what they are spent on; what is hidden under another part is not counted."""

    compute: float = 0.0
    pcie: float = 0.0
    host_adam: float = 0.0
    update: float = 0.0
    nvme: float = 0.0
    ranks: float = 0.0

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def limit(self) -> str:
        """The part that takes longest."""
        return max(fields(self), key=lambda part: getattr(self, part.name)).name

    def mixed(self, other: Seconds, share: float) -> Seconds:
        """Return the mean of this step and, for ``share`` of all steps, ``other``."""
        return Seconds(
            *(
                (1 - share) * getattr(self, part.name) + share * getattr(other, part.name)
                for part in fields(self)
            )
        )  # fmt: skip


def selective_seconds(
    model: ModelShape, setup: Setup, stepping: Stepping, step: Step, work: Work, rates: Rates
) -> Seconds:
    """Return the expected seconds of ``step`` of ds_agsel on one rank."""
    traffic = selective_traffic(model, setup, stepping, step)
    fetched = traffic.h2d - selective_traffic(model, _at_rest(setup), stepping, step).h2d
    products = _products(model, step, work)
    trained = weighted(step.selected, [block.numel for block in model.blocks])
    return _seconds(setup, stepping, step.phase == "explore", traffic, fetched, products, trained, work, rates)


def full_seconds(model: ModelShape, setup: Setup, work: Work, rates: Rates) -> Seconds:
    """Return the expected seconds of a step of plain DeepSpeed with the same ds_config."""
    setup = setup.but(state_dtype="fp32", master_weights="fp32")
    model = model.dense or model
    groups, frozen = model.user_groups, model.frozen
    traffic = full_traffic(groups, frozen, setup)
    fetched = traffic.h2d - full_traffic(groups, frozen, _at_rest(setup)).h2d
    everything = full_step(len(model.blocks))
    stepping: Stepping = "resident" if setup.offload_optimizer == "none" else "host"
    trained = Fraction(sum(map(sum, groups)))
    products = _products(model, everything, work)
    return _seconds(setup, stepping, False, traffic, fetched, products, trained, work, rates)


def _at_rest(setup: Setup) -> Setup:
    """Return ``setup`` with the weights on the accelerator, to tell their copies from the others."""
    return setup.but(offload_param="none")


def _seconds(
    setup: Setup, stepping: Stepping, explores: bool, traffic: TrafficBytes, fetched: int, products: float,
    trained: Fraction, work: Work, rates: Rates,
) -> Seconds:  # fmt: skip
    ranks, share = setup.ranks, float(trained) / setup.ranks
    compute = 2 * work.tokens * products / rates.card.flops
    link_under, link_after = _link_bytes(setup, stepping, explores, traffic, max(0, fetched), round(share))
    # With states there, NVMe is at work after backward; what is read alone are weights, which come under forward.
    states = 2 * min(traffic.nvme_read, traffic.nvme_write)
    weights_read = ranks * (traffic.nvme_read + traffic.nvme_write - states) / rates.nvme_bytes
    swapped = ranks * states / rates.nvme_bytes
    passed = (
        UPDATE_BYTES + LEANER_BYTES * (setup.state_dtype != "fp32") + SPLIT_BYTES * (setup.master_weights != "fp32")
    )
    adam = ranks * share * passed / rates.host_bytes if stepping == "host" else 0.0
    on_link = link_under / rates.link_bytes
    not_hidden = max(0.0, max(on_link, weights_read) - compute)
    passes = 2 if setup.stage == 2 else 1  # stage 2 reduces by all-reduce (use_multi_rank_bucket_allreduce)
    sent = (traffic.gathered + passes * traffic.reduced) * (ranks - 1) / ranks
    return Seconds(
        compute=compute,
        pcie=link_after / rates.link_bytes + (not_hidden if on_link >= weights_read else 0.0),
        host_adam=adam if adam >= swapped else 0.0,  # a block is stepped while others are read and written
        update=0.0 if stepping == "host" else share * passed / rates.card.memory_bytes,
        nvme=(swapped if swapped > adam else 0.0) + (not_hidden if weights_read > on_link else 0.0),
        ranks=sent / rates.card.peer_bytes,
    )


def _link_bytes(
    setup: Setup, stepping: Stepping, explores: bool, traffic: TrafficBytes, fetched: int, trained: int
) -> tuple[int, int]:
    """Return the bytes of the busier direction that travel under the computing, and after it.

    ``fetched``: weights that ZeRO-3 brings from the host, always under it.
    """
    others = traffic.h2d - fetched
    if stepping == "host":
        weights = min(others, trained * setup.item_bytes)  # updated ones, on their way back
        return max(fetched + others - weights, traffic.d2h), weights
    if explores:  # its blocks are known only when backward has ended
        return fetched, max(others, traffic.d2h)
    return max(fetched + others, traffic.d2h), 0


def _products(model: ModelShape, step: Step, work: Work) -> float:
    """Return the products per token, of two operations each: forward, both kinds of gradients, recomputation."""
    names = [block.name for block in model.blocks]
    numels = [block.numel for block in model.blocks]
    is_tied = HEAD not in names and EMBEDDING in names
    if HEAD in names and EMBEDDING in names:
        numels[names.index(EMBEDDING)] = 0  # a lookup; a tied one is the head's product
    # A layer's input needs a gradient if a block below it is trained.
    below: Sequence[Fraction] = (Fraction(0), *step.in_backward[:-1])
    reached = float(weighted(below, numels))
    if is_tied:
        place = names.index(EMBEDDING)
        reached += numels[place] * float(1 - below[place])  # the head is the first thing that backward goes through
    forward, trained = float(sum(numels)), float(weighted(step.reduced, numels))
    mean_reach = reached / max(1.0, forward)
    attention = work.layers * work.hidden * work.sequence_length
    again = reached + mean_reach * attention if work.checkpointing else 0.0
    return forward + reached + trained + again + attention * (1 + 2 * mean_reach)
