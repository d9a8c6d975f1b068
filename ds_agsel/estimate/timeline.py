"""A discrete-event model of steps that bring states to the accelerator. Simulated, never measured.

Three things work at the same time: the compute stream (forward, backward, then the updates in the plan's order), the
link to the accelerator and the link from it. What moves, and after which update, is `residency.plan_moves`' own answer;
the waits are those of residency/transfer.py, [Note: Waits]: a state leaves after its update, what arrives later waits
for the copies of what left, an update waits for its own block's arrival and for nothing else.

On exploit steps the moves begin when the previous step has ended, on explore steps when backward has. The host's own
time counts as 0, as does attention's arithmetic beside its projections: both make compute shorter and hiding harder.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ds_agsel.blocks import EMBEDDING, HEAD
from ds_agsel.estimate.cards import Card
from ds_agsel.estimate.memory import partitions_of
from ds_agsel.estimate.setup import Setup
from ds_agsel.estimate.shapes import ModelShape
from ds_agsel.lottery import Bound
from ds_agsel.residency.plan import Move, default_budget_bytes, eviction_order, plan_moves, update_order
from ds_agsel.selection import Phase

# AdamW reads and writes master weight and moments (24), reads a gradient and writes a weight (2 each).
_UPDATE_BYTES = 28


@dataclass(frozen=True)
class Links:
    """Rates between host and accelerator, in bytes per second, and what every copy costs beside its bytes."""

    h2d_bytes: float
    d2h_bytes: float
    latency_seconds: float = 0.0


@dataclass(frozen=True)
class StepWork:
    """What a step computes: up to the end of backward, and for the update of each selected block."""

    phase: Phase
    before_update_seconds: float
    update_seconds: Mapping[int, float]

    @property
    def compute_seconds(self) -> float:
        """Seconds of computing, without transfers."""
        return self.before_update_seconds + sum(self.update_seconds.values())


@dataclass(frozen=True)
class Timing:
    """A simulated step: how long it took, and how much of that the compute stream waited for arrivals."""

    phase: Phase
    seconds: float
    exposed_seconds: float
    h2d_bytes: int
    d2h_bytes: int


@dataclass
class Timeline:
    """Steps one after the other, on links that may still be busy with an earlier one.

    Args:
        block_bytes: state of each block on this rank.
        budget_bytes: of states on the accelerator; `residency.default_budget_bytes` has the usual one.
        resident: blocks whose state is there before the first step.
        is_cache: a block that is not selected stays while there is room.
    """

    block_bytes: Mapping[int, int]
    budget_bytes: int
    links: Links
    resident: frozenset[int] = frozenset()
    is_cache: bool = False
    now: float = field(default=0.0, init=False)
    _h2d_free: float = field(default=0.0, init=False)
    _d2h_free: float = field(default=0.0, init=False)
    _arrived: dict[int, float] = field(default_factory=dict, init=False)
    _counts: Counter[int] = field(default_factory=Counter, init=False)

    def step(self, work: StepWork) -> Timing:
        """Simulate the step that updates the blocks of ``work``."""
        started = self.now
        selected = tuple(work.update_seconds)
        order = update_order(self.resident, selected)
        may_stay = eviction_order(self.resident, self._counts) if self.is_cache else ()
        moves = plan_moves(self.resident, selected, self.block_bytes, self.budget_bytes, may_stay)
        self._counts.update(selected)
        after_backward = started + work.before_update_seconds
        self._issue(moves, None, started if work.phase == "exploit" else after_backward)
        now = after_backward
        for block in order:
            now = max(now, self._arrived.pop(block, now)) + work.update_seconds[block]
            self._issue(moves, block, now)
        self.now = now
        gone = {move.block for move in moves if move.kind == "leave"}
        self.resident = (self.resident | set(selected)) - gone
        return Timing(
            phase=work.phase,
            seconds=now - started,
            exposed_seconds=max(0.0, now - started - work.compute_seconds),
            h2d_bytes=sum(self.block_bytes[move.block] for move in moves if move.kind == "arrive"),
            d2h_bytes=sum(self.block_bytes[move.block] for move in moves if move.kind == "leave"),
        )

    def _issue(self, moves: Iterable[Move], after: int | None, computed: float) -> None:
        """Put the moves that follow the update of ``after`` on the links; ``computed``: when that has ended."""
        for move in moves:
            if move.after != after:
                continue
            size = self.block_bytes[move.block]
            if move.kind == "leave":
                begin = max(self._d2h_free, computed)
                self._d2h_free = begin + self.links.latency_seconds + size / self.links.d2h_bytes
                self._h2d_free = max(self._h2d_free, self._d2h_free)
            else:
                begin = max(self._h2d_free, computed)
                self._h2d_free = begin + self.links.latency_seconds + size / self.links.h2d_bytes
                self._arrived[move.block] = self._h2d_free


def links_of(card: Card) -> Links:
    """Return ``card``'s link to the host, equally fast both ways."""
    return Links(card.link_bytes, card.link_bytes, card.latency_seconds)


def work_of(
    model: ModelShape, setup: Setup, card: Card, tokens: int, phase: Phase, selected: Collection[int],
    active: Collection[int] | None = None,
) -> StepWork:  # fmt: skip
    """Return the computing of a step over ``tokens`` tokens on each rank, all its micro-steps together.

    Two operations for each weight and token in forward, two for the gradient of a layer's input where backward gets
    there, two for the gradient of each weight that needs one. ``active``: blocks an explore step gives gradients (all).
    """
    names = [block.name for block in model.blocks]
    numels = [block.numel for block in model.blocks]
    if HEAD in names:
        numels[names.index(EMBEDDING)] = 0  # a lookup; a tied one is the head's product
    with_gradient = set(selected if phase == "exploit" else range(len(numels)) if active is None else active)
    lowest = min(with_gradient)
    reached = sum(numel for index, numel in enumerate(numels) if index > lowest)
    if EMBEDDING in names and HEAD not in names and lowest > names.index(EMBEDDING):
        reached += numels[names.index(EMBEDDING)]  # the tied head is the first thing that backward goes through
    products = sum(numels) + reached + sum(numels[index] for index in with_gradient)
    shares = _shares(model, setup)
    return StepWork(
        phase=phase,
        before_update_seconds=2 * tokens * products / card.flops,
        update_seconds={block: shares[block] * _UPDATE_BYTES / card.memory_bytes for block in sorted(selected)},
    )


def _shares(model: ModelShape, setup: Setup) -> dict[int, int]:
    """Return the elements of each block on one rank."""
    shares = dict.fromkeys(range(len(model.blocks)), 0)
    for block, partition in zip(model.block_of_group, partitions_of(model.groups, setup, 0), strict=True):
        shares[block] += partition.numel
    return shares


def timeline_of(model: ModelShape, setup: Setup, card: Card, num_selected: int) -> Timeline:
    """Return an empty timeline for ``model`` with the setup's state budget, or else the default one."""
    block_bytes = {block: setup.visiting_bytes(share) for block, share in _shares(model, setup).items()}
    budget = setup.state_budget_bytes or default_budget_bytes(block_bytes, Bound(num_selected))
    return Timeline(block_bytes, budget, links_of(card), is_cache=setup.is_cache)


@dataclass(frozen=True)
class Exposure:
    """Simulated seconds that a step waits for states, takes in all, and the bytes that come: means over the steps."""

    exposed_seconds: float
    step_seconds: float
    h2d_bytes: float
    worst_exposed_seconds: float

    @property
    def is_hidden(self) -> bool:
        """Whether no step waits, apart from rounding."""
        return self.worst_exposed_seconds <= 1e-9 * self.step_seconds


def simulate(
    model: ModelShape, setup: Setup, card: Card, num_selected: int, tokens: int, phase: Phase, select_every: int = 1,
    rounds: int = 64, seed: int = 0,
) -> Exposure:  # fmt: skip
    """Simulate ``rounds`` rounds of ``select_every`` steps, each on blocks drawn uniformly.

    ``phase`` is that of a round's first step; the others are exploit steps on the same blocks, [Note: Rounds] in
    selection.py, and the means are over all of them. The first round, for which nothing is resident, is left out.
    Uniform draws repeat least and so move most; the policy's own draws grow more alike as training goes on.
    """
    timeline = timeline_of(model, setup, card, num_selected)
    generator = random.Random(seed)
    held: Phase = "exploit"
    phases = (phase, *[held] * (select_every - 1))
    timings = []
    for _ in range(rounds + 1):
        selected = generator.sample(range(len(model.blocks)), num_selected)
        works = {kind: work_of(model, setup, card, tokens, kind, selected) for kind in set(phases)}
        timings += [timeline.step(works[kind]) for kind in phases]
    timings = timings[select_every:]
    return Exposure(
        exposed_seconds=_mean([timing.exposed_seconds for timing in timings]),
        step_seconds=_mean([timing.seconds for timing in timings]),
        h2d_bytes=_mean([timing.h2d_bytes for timing in timings]),
        worst_exposed_seconds=max(timing.exposed_seconds for timing in timings),
    )


def hiding_tokens(model: ModelShape, setup: Setup, card: Card, num_selected: int, limit: int = 1 << 22) -> int | None:
    """Return the least tokens per step and rank at which each simulated exploit step hides all its transfers.

    None if ``limit`` are too few. By bisection: more tokens compute longer and move the same.
    """

    def hides(tokens: int) -> bool:
        return simulate(model, setup, card, num_selected, tokens, "exploit").is_hidden

    if not hides(limit):
        return None
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if hides(middle) else (middle, high)
    return high


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
