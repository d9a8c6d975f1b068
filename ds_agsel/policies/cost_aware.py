"""Scores weighed against time: backward runs down to the lowest selected block, and a score high up is cheaper."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ds_agsel.errors import CheckpointError
from ds_agsel.policies.base import PolicyContext
from ds_agsel.policies.registry import register
from ds_agsel.policies.sampling import generator
from ds_agsel.policies.scoring import ScoringPolicy


@register("cost_aware")
class CostAware(ScoringPolicy):
    """Draws unit after unit in proportion to (score / added time)^(1 / temperature), after a phase that measures both.

    The added time hangs on the units that have been taken: below the lowest of them a unit costs the way down to it.
    docs/policies.md has the model of a step's time.
    """

    probes = True
    measures_times: ClassVar[bool] = True

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._arrivals: list[float] | None = None  # seconds from backward's begin, (num_blocks,)
        self._sunk = 0.0  # seconds that backward takes anyway, for always_select

    def observe_times(self, arrivals: Sequence[float], sunk: float) -> None:
        shortest = [min(pair) for pair in zip(arrivals, self._arrivals or arrivals, strict=True)]
        self._sunk = min(sunk, self._sunk) if self._arrivals else sunk
        self._arrivals = shortest

    def plan(self, step: int, update_counts: Sequence[int]) -> tuple[int, ...] | None:
        if self.selects_nothing(step):
            return None
        return self.context.admit(self._ranking(step))

    def _ranking(self, step: int) -> Iterator[int]:
        """Yield every unit, one after the other."""
        config, rng = self.context.config, generator(self.context.config.seed, step)
        scores = np.nan_to_num(self.scores.at(step))
        left, reached = list(range(self.context.num_blocks)), self._sunk
        while left:
            with np.errstate(divide="ignore"):
                keys = np.log(scores[left] / self.added_times(reached)[left]) / config.temperature
            if config.exploit_draw == "sample":
                keys = keys - np.log(np.maximum(rng.standard_exponential(len(left)), np.finfo(np.float64).tiny))
            unit = left.pop(int(np.argmax(keys)))
            yield unit
            if self._arrivals:
                reached = max(reached, self._arrivals[unit])

    def added_times(self, reached: float) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return twice the seconds that each unit adds to a step that reaches ``reached`` anyway, (num_blocks,).

        Backward computes two products for a weight that is trained, the one for its inputs alone where it is passed,
        and forward computes one. A unit has its share of forward, its own second product, and the way down to it.
        1 for every unit before anything was measured.
        """
        num_blocks = self.context.num_blocks
        if not self._arrivals or max(self._arrivals) <= 0:
            return np.ones(num_blocks)
        arrivals = np.array(self._arrivals)
        order = np.argsort(arrivals, kind="stable")
        own = np.empty(num_blocks)
        own[order] = np.diff(arrivals[order], prepend=0.0)
        forward = arrivals.max() / self.context.num_selected
        return forward + own + np.maximum(0.0, arrivals - reached)

    def state_dict(self) -> dict[str, Any]:
        """Return the running scores, and the measured times, by which a resumed run goes on choosing."""
        return {**super().state_dict(), "arrivals": self._arrivals, "sunk": self._sunk}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict`. Raises CheckpointError for a damaged one, or one of another policy."""
        arrivals, sunk = state.get("arrivals"), state.get("sunk")
        seconds = [sunk, *(arrivals if isinstance(arrivals, list) else [])]
        has_arrivals = isinstance(arrivals, list) and len(arrivals) == self.context.num_blocks
        if not (arrivals is None or has_arrivals) or any(
            type(value) not in (int, float) or not math.isfinite(value) or value < 0 for value in seconds
        ):
            raise CheckpointError(
                f'Policy "cost_aware" has no measured times of {self.context.num_blocks} units in the checkpoint. '
                "Resume with the policy that wrote the checkpoint."
            )
        super().load_state_dict(state)
        self._arrivals, self._sunk = arrivals, float(sunk or 0.0)
