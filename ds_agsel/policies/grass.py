"""GRASS: layers in proportion to the exponential of their running gradient scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ds_agsel.policies.registry import register
from ds_agsel.policies.sampling import generator, gumbel_order
from ds_agsel.policies.scoring import ScoringPolicy


@register("grass")
class Grass(ScoringPolicy):
    """arXiv:2604.07808: drawn without replacement from softmax(score / temperature), after a probing phase.

    docs/policies.md says what is the paper's and what is ours.
    """

    probes = True

    def plan(self, step: int, update_counts: Sequence[int]) -> tuple[int, ...] | None:
        if self.selects_nothing(step):
            return None
        log_p = np.nan_to_num(self.scores.at(step)) / self.context.config.temperature
        return self.context.admit(gumbel_order(log_p, generator(self.context.config.seed, step)))
