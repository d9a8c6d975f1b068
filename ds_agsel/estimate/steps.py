"""One optimizer step as the estimator sees it: how much of each block is chosen, has a gradient, has moments."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from ds_agsel.estimate.draws import Shares, indicator, largest, uniform
from ds_agsel.lottery import Bound, Lottery
from ds_agsel.selection import Phase

Which = Literal["expected", "worst"]


@dataclass(frozen=True)
class Step:
    """A step, block by block: the probability, 0 to 1, that the block is in.

    Attributes:
        selected: it is updated by this step.
        with_gradient: its gradient exists when backward ends.
        reduced: its gradient was computed and reduced, though it may be gone when backward ends.
        active: some step may update it.
        with_moments: it was updated by this step or an earlier one.
        arriving: its states come to the accelerator for this step.
        leaving: its states leave the accelerator for this step.
        in_backward: backward reaches it.
        bound: the most that a step can update.
        streams: an explore step that drops gradients while backward goes on, and has chosen when it has ended.
    """

    phase: Phase
    selected: Shares
    with_gradient: Shares
    reduced: Shares
    active: Shares
    with_moments: Shares
    arriving: Shares
    leaving: Shares
    in_backward: Shares
    bound: Bound
    streams: bool = False


def exact_step(
    phase: Phase, num_blocks: int, selected: Collection[int], active: Collection[int], updated: Collection[int],
    resident: Collection[int] = (), streaming: bool = False,
) -> Step:  # fmt: skip
    """Return the step that updates the blocks ``selected`` of those ``active``.

    ``updated`` have moments at its end; the states of ``resident`` were on the accelerator before. With ``streaming``
    an explore step has freed all other gradients by the end of backward.
    """

    def shares(blocks: Collection[int]) -> Shares:
        return tuple(Fraction(int(block in blocks)) for block in range(num_blocks))

    gradients = active if phase == "explore" else selected
    lowest = min(gradients)
    return Step(
        phase=phase,
        selected=shares(selected),
        with_gradient=shares(selected if streaming else gradients),
        reduced=shares(gradients),
        active=shares(active),
        with_moments=shares(updated),
        arriving=shares(set(selected) - set(resident)),
        leaving=shares(set(resident) - set(selected)),
        in_backward=shares(range(lowest, num_blocks)),
        bound=Bound(len(selected)),
        streams=streaming and phase == "explore",
    )


def typical_step(
    numels: Sequence[int], lottery: Lottery, phase: Phase, which: Which, streaming: bool, select_every: int = 1,
    staying: Fraction | int = 0,
) -> Step:  # fmt: skip
    """Return a step late in training, when every block has moments.

    Its blocks are a uniform draw, or the largest ones, none of them resident: draws.py.

    With ``streaming`` an explore step keeps the gradients of one block more than it updates, the largest step of as
    many more as can wait for their scores; without, of all.
    Of the ``select_every`` steps for which a selection stands, one moves states; the expected exploit step is their
    mean.

    Args:
        numels: elements of each block, (num_blocks,).
        staying: the share of all states, 0 to 1, that has room on the accelerator and stays there.
    """
    num_blocks = len(numels)
    everything = indicator(num_blocks, lottery.active)
    if which == "worst":
        blocks, held = largest(numels, lottery)
        selected = indicator(num_blocks, blocks)
        arriving = selected if staying < 1 else indicator(num_blocks, ())
        streamed = indicator(num_blocks, held)
        reach = indicator(num_blocks, range(num_blocks))
    else:
        selected, streamed, reach = uniform(num_blocks, lottery)
        steps = select_every if phase == "exploit" else 1
        # Chosen now, and neither by the round before nor among those that have stayed.
        arriving = tuple(share * (1 - max(share, Fraction(staying))) / steps for share in selected)
    explores = phase == "explore"
    return Step(
        phase=phase,
        selected=selected,
        with_gradient=(streamed if streaming else everything) if explores else selected,
        reduced=everything if explores else selected,
        active=everything,
        with_moments=everything,
        arriving=arriving,
        leaving=arriving,  # as likely as the other way round
        in_backward=indicator(num_blocks, range(min(lottery.active), num_blocks)) if explores else reach,
        bound=lottery.bound(),
        streams=streaming and explores,
    )


def full_step(num_groups: int) -> Step:
    """Return a step of plain training, which holds the gradients and states of every group."""
    every = indicator(num_groups, range(num_groups))
    none = indicator(num_groups, ())
    return Step("explore", every, every, every, every, every, none, none, every, Bound(num_groups))


def weighted(shares: Sequence[Fraction], values: Sequence[int]) -> Fraction:
    """Return Σ share · value."""
    sums: dict[int, int] = {}  # by denominator: there are few of them, and fractions are slow
    for share, value in zip(shares, values, strict=True):
        numerator, denominator = share.as_integer_ratio()
        sums[denominator] = sums.get(denominator, 0) + numerator * value
    return sum((Fraction(total, denominator) for denominator, total in sums.items()), Fraction(0))
