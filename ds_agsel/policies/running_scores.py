"""What a policy remembers of the scores that it has observed: an exponential average over periods, unit by unit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ds_agsel.errors import CheckpointError
from ds_agsel.policies.sampling import Floats


class RunningScores:
    """Each unit's average over periods of its mean score in a period. A period in which it got no score is not counted.

    Only `observe` changes it. The newest period enters when a later one has begun.

    Args:
        decay: weight of the average so far when a period enters it; the period's mean has 1 - decay.
        every: steps of a period.
        unbiased: the average starts at 0 and is divided by 1 - decay**periods, as Adam's moments are. Otherwise it
            starts with the first period's mean.
    """

    def __init__(self, num_units: int, decay: float, every: int, unbiased: bool) -> None:
        self._decay, self._every, self._unbiased = decay, every, unbiased
        self.first_step = 0  # of the first period; steps before it are a period of their own
        self._period: int | None = None  # that `_sums` and `_numbers` are of
        self._averages, self._sums = [0.0] * num_units, [0.0] * num_units
        self._periods, self._numbers = [0] * num_units, [0] * num_units

    def observe(self, step: int, units: Sequence[int], scores: Sequence[float]) -> None:
        """Add the ``scores`` of ``units`` at ``step``."""
        if self._is_over(step):
            self._averages, self._periods = self._entered()
            self._sums, self._numbers = [0.0] * len(self._sums), [0] * len(self._numbers)
        self._period = self._period_of(step)
        for unit, score in zip(units, scores, strict=True):
            self._sums[unit] += score
            self._numbers[unit] += 1

    def at(self, step: int) -> Floats:
        """Return the averages that ``step`` may use, (num_units,); NaN for a unit without any."""
        averages, periods = self._entered() if self._is_over(step) else (self._averages, self._periods)
        scale = [1 - self._decay**number if self._unbiased else 1.0 for number in periods]
        return np.array([a / s if n else math.nan for a, n, s in zip(averages, periods, scale)], dtype=np.float64)

    def _period_of(self, step: int) -> int:
        return (step - self.first_step) // self._every if step >= self.first_step else -1

    def _is_over(self, step: int) -> bool:
        return self._period is not None and self._period_of(step) > self._period

    def _entered(self) -> tuple[list[float], list[int]]:
        averages, periods = list(self._averages), list(self._periods)
        for unit, (total, number) in enumerate(zip(self._sums, self._numbers)):
            if number:
                is_first = not periods[unit] and not self._unbiased
                decay = 0.0 if is_first else self._decay
                averages[unit] = decay * averages[unit] + (1 - decay) * total / number
                periods[unit] += 1
        return averages, periods

    def state_dict(self) -> dict[str, Any]:
        """Return all that was observed, as JSON."""
        return {
            "first_step": self.first_step,
            "period": self._period,
            "averages": list(self._averages),
            "periods": list(self._periods),
            "sums": list(self._sums),
            "numbers": list(self._numbers),
        }

    def load_state_dict(self, state: Any) -> None:
        """Go on from a `state_dict`. Raises CheckpointError for one that is damaged or of other units."""
        if not isinstance(state, Mapping) or set(state) != set(self.state_dict()):
            raise CheckpointError("The checkpoint's policy state has no running scores.")
        period = state["period"]
        is_sound = all(
            isinstance(state[name], list)
            and len(state[name]) == len(self._sums)
            and all(type(value) in kinds and math.isfinite(value) for value in state[name])
            for name, kinds in (
                ("averages", (int, float)), ("sums", (int, float)), ("periods", (int,)), ("numbers", (int,)),
            )
        ) and type(state["first_step"]) is int and (period is None or type(period) is int)  # fmt: skip
        if not is_sound:
            raise CheckpointError(
                f"The checkpoint's policy state has running scores that are not those of {len(self._sums)} units."
            )
        self.first_step, self._period = state["first_step"], period
        self._averages, self._sums = list(map(float, state["averages"])), list(map(float, state["sums"]))
        self._periods, self._numbers = list(state["periods"]), list(state["numbers"])
