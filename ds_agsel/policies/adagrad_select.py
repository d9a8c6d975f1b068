"""AdaGradSelect: explore by gradient score, ever less in epoch 1; exploit by the record of past updates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ds_agsel.config import SECTION
from ds_agsel.errors import ConfigError
from ds_agsel.policies.base import Policy, PolicyContext
from ds_agsel.policies.registry import register
from ds_agsel.policies.sampling import generator, gumbel_top_k, log_dirichlet, top_k

# ε at the end of epoch 1 over ε at its start, where explore_decay is not set. The paper gives no λ.
_FINAL_FRACTION = 0.01


@register("adagrad_select")
class AdaGradSelect(Policy):
    """arXiv:2512.15764, Algorithm 2, as DESIGN.md section 1 fixes it."""

    needs_steps_per_epoch = True

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        config = context.config
        self._explore_steps = 0  # the steps of epoch 1
        self._decay = 0.0
        if config.explore_rate == 0:
            return
        if context.steps_per_epoch is None:
            raise ConfigError(
                f"{SECTION}.steps_per_epoch is not set and can't be taken from training_data, and exploring"
                f" ends with epoch 1. Set {SECTION}.steps_per_epoch to the optimizer steps in one pass over"
                f" the data, or {SECTION}.explore_rate=0."
            )
        self._explore_steps = context.steps_per_epoch
        default = -math.log(_FINAL_FRACTION) / context.steps_per_epoch
        self._decay = default if config.explore_decay is None else config.explore_decay

    def explore_probability(self, step: int) -> float:
        """ε_t = ε₀ · exp(-λt) in epoch 1, 0 from epoch 2 on."""
        if step >= self._explore_steps:
            return 0.0
        return self.context.config.explore_rate * math.exp(-self._decay * step)

    def plan(self, step: int, update_counts: Sequence[int]) -> tuple[int, ...] | None:
        config = self.context.config
        rng = generator(config.seed, step)
        if rng.random() < self.explore_probability(step):
            return None
        self._check_length("update counts", update_counts)
        log_p = log_dirichlet(np.asarray(update_counts) + config.smoothing, rng)
        if config.exploit_draw == "top":
            return top_k(log_p, self.context.num_selected)
        return gumbel_top_k(log_p, self.context.num_selected, rng)
