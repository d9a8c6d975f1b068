"""Algorithm 1 alone: every step explores."""

from __future__ import annotations

from collections.abc import Sequence

from ds_agsel.policies.base import Policy
from ds_agsel.policies.registry import register


@register("gradient_topk")
class GradientTopK(Policy):
    """The k blocks with the highest gradient score, at every step."""

    def plan(self, step: int, update_counts: Sequence[int]) -> tuple[int, ...] | None:
        return None

    def explore_probability(self, step: int) -> float:
        return 1.0
