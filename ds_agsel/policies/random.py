"""Uniform choice, as LISA makes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ds_agsel.policies.base import Policy
from ds_agsel.policies.registry import register
from ds_agsel.policies.sampling import generator, gumbel_top_k


@register("random")
class Random(Policy):
    """k distinct blocks at every step, each set of k as likely as another."""

    def plan(self, step: int, update_counts: Sequence[int]) -> tuple[int, ...]:
        rng = generator(self.context.config.seed, step)
        return gumbel_top_k(np.zeros(self.context.num_blocks), self.context.num_selected, rng)
