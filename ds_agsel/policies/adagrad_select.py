"""AdaGradSelect: explore by gradient score, ever less in epoch 1; exploit by the record of past updates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ds_agsel.config import SECTION
from ds_agsel.errors import CheckpointError, ConfigError
from ds_agsel.policies.base import Policy, PolicyContext
from ds_agsel.policies.registry import register
from ds_agsel.policies.sampling import descending, generator, gumbel_order, log_dirichlet

# ε at the end of epoch 1 over ε at its start, where explore_decay is not set. The paper gives no λ.
_FINAL_FRACTION = 0.01


@register("adagrad_select")
class AdaGradSelect(Policy):
    """arXiv:2512.15764, Algorithm 2, as docs/design.md fixes it.

    If the length of epoch 1 is not known before training, it is found when step 1 is planned: step 0 explores with
    ε₀ at any length. The length found is part of the state, so that a resumed run uses it again.
    """

    needs_steps_per_epoch = True

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._steps_per_epoch = context.steps_per_epoch
        explores = context.config.explore_rate > 0
        if explores and self._steps_per_epoch is None and context.find_steps_per_epoch is None:
            raise ConfigError(
                f"{SECTION}.steps_per_epoch is not set and can't be taken from training_data, and exploring"
                f" ends with epoch 1. Set {SECTION}.steps_per_epoch to the optimizer steps in one pass over"
                f" the data, or {SECTION}.explore_rate=0."
            )

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps in epoch 1; None until it is known."""
        return self._steps_per_epoch

    def explore_probability(self, step: int) -> float:
        """Return ε_t = ε₀ · exp(-λt) in epoch 1, 0 from epoch 2 on.

        Only ε₀ is known before the length of epoch 1 is.
        """
        config = self.context.config
        if step == 0 or self._steps_per_epoch is None:
            return config.explore_rate
        if step >= self._steps_per_epoch:
            return 0.0
        default = -math.log(_FINAL_FRACTION) / self._steps_per_epoch
        decay = default if config.explore_decay is None else config.explore_decay
        return config.explore_rate * math.exp(-decay * step)

    def _find_length(self, step: int) -> None:
        find = self.context.find_steps_per_epoch
        if step > 0 and self._steps_per_epoch is None and find is not None and self.context.config.explore_rate > 0:
            self._steps_per_epoch = find()

    def state_dict(self) -> dict[str, Any]:
        """Return the length of epoch 1 if it was found during training rather than given."""
        found = self.context.steps_per_epoch is None and self._steps_per_epoch is not None
        return {"steps_per_epoch": self._steps_per_epoch} if found else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Use the length that the saved run found, unless this run was given one."""
        super().load_state_dict({key: value for key, value in state.items() if key != "steps_per_epoch"})
        found = state.get("steps_per_epoch")
        if found is None or self.context.steps_per_epoch is not None:
            return
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise CheckpointError(
                f"The checkpoint's policy has steps_per_epoch={found!r}, which is no number from 1 on."
            )
        self._steps_per_epoch = found

    def plan(self, step: int, update_counts: Sequence[int]) -> tuple[int, ...] | None:
        config = self.context.config
        self._find_length(step)
        rng = generator(config.seed, step)
        if rng.random() < self.explore_probability(step):
            return None
        self._check_length("update counts", update_counts)
        log_p = log_dirichlet(np.asarray(update_counts) + config.smoothing, rng)
        return self.context.admit(descending(log_p) if config.exploit_draw == "top" else gumbel_order(log_p, rng))
