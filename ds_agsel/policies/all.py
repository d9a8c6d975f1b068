"""Plain fine-tuning through the selection machinery."""

from __future__ import annotations

from collections.abc import Sequence

from ds_agsel.policies.base import Policy
from ds_agsel.policies.registry import register


@register("all")
class All(Policy):
    """Every block at every step, whatever select_percent says."""

    @property
    def max_selected(self) -> int:
        return self.context.num_blocks

    def plan(self, step: int, update_counts: Sequence[int]) -> tuple[int, ...]:
        return tuple(range(self.context.num_blocks))
