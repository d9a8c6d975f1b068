"""MISA: importance sampling of modules, none of which is forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ds_agsel.errors import CheckpointError
from ds_agsel.policies.base import PolicyContext
from ds_agsel.policies.registry import register
from ds_agsel.policies.sampling import generator, gumbel_order
from ds_agsel.policies.scoring import ScoringPolicy

_LARGEST_LOG_P = 5.0  # the paper's clip
_OLDEST = 2
_NEVER = -1


@register("misa")
class Misa(ScoringPolicy):
    """arXiv:2511.00056: every unit once; then the two that were used longest ago, and the rest drawn.

    p is proportional to exp(min(5, score² / temperature)). docs/policies.md says what is the paper's and what is ours.
    """

    unbiased = True

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._last_steps = [_NEVER] * context.num_blocks

    def observe(self, step: int, units: Sequence[int], scores: Sequence[float]) -> None:
        super().observe(step, units, scores)
        for unit in units:
            self._last_steps[unit] = step

    def plan(self, step: int, update_counts: Sequence[int]) -> tuple[int, ...]:
        by_age = sorted(range(self.context.num_blocks), key=lambda unit: (self._last_steps[unit], unit))
        first = [unit for unit in by_age if self._last_steps[unit] == _NEVER]
        if not first:  # with room for one alone, it is drawn: else this were a cycle
            first = by_age[: min(_OLDEST, self.context.num_selected - 1)]
        log_p = np.minimum(_LARGEST_LOG_P, np.nan_to_num(self.scores.at(step)) ** 2 / self.context.config.temperature)
        drawn = gumbel_order(log_p, generator(self.context.config.seed, step))
        return self.context.admit([*first, *(unit for unit in drawn if unit not in first)])

    def state_dict(self) -> dict[str, Any]:
        """Return the running scores, and when each unit was last used (-1: never)."""
        return {**super().state_dict(), "last_steps": list(self._last_steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict`. Raises CheckpointError for a damaged one, or one of another policy."""
        steps = state.get("last_steps")
        if (
            not isinstance(steps, list)
            or len(steps) != self.context.num_blocks
            or any(type(step) is not int or step < _NEVER for step in steps)
        ):
            raise CheckpointError(
                f'Policy "misa" has no last_steps of {self.context.num_blocks} units in the checkpoint. Resume with'
                " the policy that wrote the checkpoint."
            )
        super().load_state_dict(state)
        self._last_steps = list(steps)
