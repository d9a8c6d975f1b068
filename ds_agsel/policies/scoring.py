"""The common part of policies that choose by running scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ds_agsel.errors import CheckpointError
from ds_agsel.policies.base import Policy, PolicyContext
from ds_agsel.policies.running_scores import RunningScores


class ScoringPolicy(Policy):
    """Observes what is updated. With ``probes`` its first `probe_steps` steps score every unit and update none."""

    probes: ClassVar[bool] = False
    unbiased: ClassVar[bool] = False

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        config = context.config
        every = config.refresh_every or config.select_every
        self.scores = RunningScores(context.num_blocks, config.score_decay, every, self.unbiased)
        self._probes_left = config.probe_steps if self.probes else 0

    def selects_nothing(self, step: int) -> bool:
        """Return whether ``step`` probes."""
        return self._probes_left > 0

    def explore_probability(self, step: int) -> float:
        """Return 1 while probing, then 0."""
        return float(self._probes_left > 0)

    def observe(self, step: int, units: Sequence[int], scores: Sequence[float]) -> None:
        if self._probes_left:
            self._probes_left -= 1
            self.scores.first_step = step + 1
        self.scores.observe(step, units, scores)

    def state_dict(self) -> dict[str, Any]:
        """Return the running scores, and how many probing steps are to come."""
        return {"scores": self.scores.state_dict(), "probes_left": self._probes_left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict`. Raises CheckpointError for a damaged one, or one of another policy."""
        left = state.get("probes_left")
        if type(left) is not int or left < 0 or "scores" not in state:
            raise CheckpointError(
                f'Policy "{self.name}" keeps running scores, and the checkpoint has {sorted(state)} for it. Resume with'
                " the policy that wrote the checkpoint."
            )
        self.scores.load_state_dict(state["scores"])
        self._probes_left = left
