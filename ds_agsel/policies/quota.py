"""How much of the lottery one step may update: of a ranking, best first, the blocks that are admitted.

[Note: Admission] Blocks are admitted in the ranking's order up to the first that would exceed the limit, where
admission ends. Smaller ones behind it are not looked at: they would be chosen for their size, and which blocks are out
would not be known before the last score has come (zero/explore_stream.py). The first of a ranking is admitted at any
cost.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Quota:
    """What one step may update of the blocks in the lottery, numbered 0 … B-1.

    Attributes:
        costs: of each block, at least 1: 1 where blocks are counted, its elements where parameters are.
        limit: what the costs of a step's blocks add up to at most.
    """

    costs: tuple[int, ...]
    limit: int

    @classmethod
    def of_blocks(cls, num_blocks: int, num_selected: int) -> Quota:
        """Return the quota of ``num_selected`` of ``num_blocks`` blocks."""
        return cls((1,) * num_blocks, num_selected)

    def admit(self, ranking: Iterable[int]) -> tuple[int, ...]:
        """Return the blocks of ``ranking`` (best first) that a step may update, ascending. [Note: Admission]."""
        return tuple(sorted(self.admitted(ranking)))

    def admitted(self, ranking: Iterable[int]) -> list[int]:
        """Return the admitted blocks in the order of ``ranking``, of which they are the first."""
        admitted: list[int] = []
        used = 0
        for block in ranking:
            used += self.costs[block]
            if used > self.limit and admitted:
                break
            admitted.append(block)
        return admitted

    @property
    def max_selected(self) -> int:
        """The most blocks that a step can have: as many of the cheapest as the limit takes, at least one."""
        return len(self.admitted(sorted(range(len(self.costs)), key=self.costs.__getitem__)))

    def most(self, values: Sequence[int]) -> int:
        """Return what ``values`` (one per block) of the blocks of one step add up to at most.

        Exact where all costs are equal; else the limit is taken as filled with the dearest by cost, the last one in
        part.
        """
        room, total = self.limit, 0
        for block in sorted(range(len(values)), key=lambda b: Fraction(values[b], self.costs[b]), reverse=True):
            part = min(room, self.costs[block])
            total += -(-values[block] * part // self.costs[block])
            room -= part
        return max(total, max(values))


class RunningAdmission:
    """`Quota.admit` of blocks by descending key, where keys come one by one: at any time those admitted so far.

    Ties go to the lower index. NaN counts as the largest key.
    """

    def __init__(self, quota: Quota) -> None:
        self._quota = quota
        self._best: list[tuple[float, int]] = []  # (-key, block), best first
        self._first_out: tuple[float, int] | None = None

    def add(self, block: int, key: float) -> tuple[int, ...]:
        """Add a block; return the blocks that it rules out for good, which may be ``block`` itself."""
        entry = (-math.inf if math.isnan(key) else -key, block)
        if self._first_out is not None and entry > self._first_out:
            return (block,)
        insort(self._best, entry)
        stay = len(self._quota.admitted(found for _, found in self._best))
        out = self._best[stay:]
        if out:
            self._first_out = out[0]
            del self._best[stay:]
        return tuple(found for _, found in out)
