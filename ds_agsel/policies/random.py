"""Uniform choice, as LISA makes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ds_agsel.policies.base import Policy
from ds_agsel.policies.registry import register
from ds_agsel.policies.sampling import generator, gumbel_order


@register("random")
class Random(Policy):
    """Blocks in a new random order at every step, as many as may be: each set of k is as likely as another."""

    def plan(self, step: int, update_counts: Sequence[int]) -> tuple[int, ...]:
        rng = generator(self.context.config.seed, step)
        return self.context.admit(gumbel_order(np.zeros(self.context.num_blocks), rng))
