"""Round robin, as BAdam goes through the blocks."""

from __future__ import annotations

from collections.abc import Sequence

from ds_agsel.policies.base import Policy, PolicyContext
from ds_agsel.policies.registry import register


@register("cyclic")
class Cyclic(Policy):
    """The next blocks in model order, as many as may be, starting again after the last."""

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        # Where a step begins depends on where the one before ended; after a while the beginnings repeat.
        self._turns: list[tuple[int, ...]] = []
        number_of: dict[int, int] = {}
        start, n = 0, context.num_blocks
        while start not in number_of:
            number_of[start] = len(self._turns)
            taken = context.admit((start + offset) % n for offset in range(n))
            self._turns.append(taken)
            start = (start + len(taken)) % n
        self._again = number_of[start]

    def plan(self, step: int, update_counts: Sequence[int]) -> tuple[int, ...]:
        turn = step // self.context.config.select_every
        if turn < len(self._turns):
            return self._turns[turn]
        return self._turns[self._again + (turn - self._again) % (len(self._turns) - self._again)]
