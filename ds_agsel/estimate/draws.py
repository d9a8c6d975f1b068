"""What a step's draw is on average, and at its largest: of k blocks exactly, of a share of the parameters sampled.

[Note: Sampled shares] Where select_percent counts parameters, a block's chance depends on the sizes of all others. It
is taken from rankings drawn uniformly, always the same ones, and is within 0.02 of the exact one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from fractions import Fraction

import numpy as np

from ds_agsel.lottery import Lottery
from ds_agsel.zero.explore_stream import most_beyond_the_best

Shares = tuple[Fraction, ...]

_RANKINGS = 4000  # three standard errors of a chance of a half are 0.024


def indicator(num_blocks: int, blocks: Collection[int]) -> Shares:
    """Return 1 for each of ``blocks``, else 0, (num_blocks,)."""
    return tuple(Fraction(int(block in blocks)) for block in range(num_blocks))


def uniform(num_blocks: int, lottery: Lottery) -> tuple[Shares, Shares, Shares]:
    """Return each block's probability of three things, under a uniform draw, each (num_blocks,).

    They are: that a step updates it; that a streaming explore step has its gradient when backward is at another one,
    which then is there as well; that backward reaches it, as it or one below it is updated.
    """
    if lottery.share is None:
        k = lottery.num_selected
        return _counted(num_blocks, lottery, k), _counted(num_blocks, lottery, k + 1), _reach(num_blocks, lottery)
    return _sampled(num_blocks, lottery)


def largest(numels: Sequence[int], lottery: Lottery) -> tuple[frozenset[int], frozenset[int]]:
    """Return the blocks of the largest step, and those whose gradients a streaming explore step can hold then.

    Of a share of the parameters it is the largest that filling up by size finds, from each size on.
    """
    by_size = sorted(lottery.drawn, key=lambda block: (-numels[block], block))
    chosen = by_size[: lottery.num_selected]
    if lottery.share is not None:
        alone = by_size[:1]  # also above the limit: [Note: Admission] in policies/quota
        sizes = sorted({numels[block] for block in by_size}, reverse=True)
        filled = [_filled(numels, [b for b in by_size if numels[b] <= size], lottery.share.limit) for size in sizes]
        chosen = max([alone, *filled], key=lambda blocks: sum(numels[block] for block in blocks))
    beside = most_beyond_the_best(len(lottery.active))
    arriving = [block for block in by_size if block not in chosen][:beside]
    always = frozenset(lottery.always)
    return always.union(chosen), always.union(chosen, arriving)


def _filled(numels: Sequence[int], blocks: Sequence[int], limit: int) -> list[int]:
    """Return those of ``blocks``, taken in their order, that fit the limit beside those before them."""
    chosen: list[int] = []
    for block in blocks:
        if numels[block] <= limit:
            chosen.append(block)
            limit -= numels[block]
    return chosen


def _counted(num_blocks: int, lottery: Lottery, count: int) -> Shares:
    chance = Fraction(min(count, lottery.num_drawn), lottery.num_drawn)
    drawn, always = frozenset(lottery.drawn), frozenset(lottery.always)
    return tuple(
        Fraction(1) if block in always else chance if block in drawn else Fraction(0) for block in range(num_blocks)
    )


def _reach(num_blocks: int, lottery: Lottery) -> Shares:
    ways = math.comb(lottery.num_drawn, lottery.num_selected)
    shares = []
    for block in range(num_blocks):
        if any(other <= block for other in lottery.always):
            shares.append(Fraction(1))
            continue
        above = sum(other > block for other in lottery.drawn)
        shares.append(1 - Fraction(math.comb(above, lottery.num_selected), ways))
    return tuple(shares)


def _sampled(num_blocks: int, lottery: Lottery) -> tuple[Shares, Shares, Shares]:
    """Return `uniform`'s shares by [Note: Sampled shares]."""
    quota, rng = lottery.quota, np.random.default_rng(0)
    orders = rng.permuted(np.tile(np.arange(lottery.num_drawn), (_RANKINGS, 1)), axis=1)
    used = np.cumsum(np.asarray(quota.costs)[orders], axis=1)
    in_order = used <= quota.limit
    in_order[:, 0] = True
    held_in_order = np.roll(in_order, 1, axis=1)  # the first that is not admitted, too
    held_in_order[:, 0] = True
    drawn = np.asarray(lottery.drawn)
    updated, held = (np.zeros((_RANKINGS, num_blocks), dtype=bool) for _ in range(2))
    for found, ordered in ((updated, in_order), (held, held_in_order)):
        np.put_along_axis(found, drawn[orders], ordered, axis=1)
        found[:, list(lottery.always)] = True
    reached = np.logical_or.accumulate(updated, axis=1)
    return _means(updated), _means(held), _means(reached)


def _means(found: np.ndarray) -> Shares:
    return tuple(Fraction(int(count), len(found)) for count in found.sum(axis=0))
