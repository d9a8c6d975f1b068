"""Round robin, as BAdam goes through the blocks."""

from __future__ import annotations

from collections.abc import Sequence

from ds_agsel.policies.base import Policy
from ds_agsel.policies.registry import register


@register("cyclic")
class Cyclic(Policy):
    """The next k blocks in model order, starting again after the last."""

    def plan(self, step: int, update_counts: Sequence[int]) -> tuple[int, ...]:
        k, n = self.context.num_selected, self.context.num_blocks
        return tuple(sorted((step * k + offset) % n for offset in range(k)))
