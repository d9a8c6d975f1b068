"""The interface of a policy: a pure choice of blocks from the step, the scores and the record of past updates."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, ClassVar

from ds_agsel.config import SECTION, SelectionConfig, fraction_hint
from ds_agsel.errors import CheckpointError, ConfigError, TrainingError
from ds_agsel.policies.quota import Quota
from ds_agsel.policies.sampling import descending

logger = logging.getLogger("ds_agsel")

# Absorbs the rounding of percent · B / 100, so that 29 % of 100 is 29; far below a block for any real B.
_FLOOR_TOLERANCE = 1e-9


@dataclass(frozen=True)
class PolicyContext:
    """The facts of the run that a policy is made with. ``always_select`` and ``never_select`` are not counted.

    Attributes:
        num_blocks: B, the blocks in the lottery; a policy names them 0 … B-1.
        num_selected: k, the most blocks per step.
        block_names: (num_blocks,), for messages and for policies that are told names.
        steps_per_epoch: optimizer steps in epoch 1; None if unknown.
        block_indices: (num_blocks,), what the model and selection.jsonl number them; None: 0 … B-1 too.
        find_steps_per_epoch: gives ``steps_per_epoch`` once the first step has been applied, equal on all ranks. Only
            `Policy.plan`, which all ranks call together, may call it; None: it can't be found.
        share: what a step may update where select_percent counts parameters; None: k blocks.
    """

    config: SelectionConfig
    num_blocks: int
    num_selected: int
    block_names: tuple[str, ...]
    steps_per_epoch: int | None
    block_indices: tuple[int, ...] | None = None
    find_steps_per_epoch: Callable[[], int] | None = None
    share: Quota | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_selected <= self.num_blocks or len(self.block_names) != self.num_blocks:
            raise ValueError(
                f"num_selected={self.num_selected}, num_blocks={self.num_blocks} and {len(self.block_names)}"
                " names do not fit: 1 <= num_selected <= num_blocks = number of names."
            )
        if self.share and (len(self.share.costs), self.share.max_selected) != (self.num_blocks, self.num_selected):
            raise ValueError(
                f"num_selected={self.num_selected}, num_blocks={self.num_blocks} and a share of {len(self.share.costs)}"
                f" blocks that admits {self.share.max_selected} do not fit."
            )

    @cached_property
    def quota(self) -> Quota:
        """What one step may update."""
        return self.share or Quota.of_blocks(self.num_blocks, self.num_selected)

    def admit(self, ranking: Iterable[int]) -> tuple[int, ...]:
        """Return the blocks of ``ranking`` (best first) that one step may update, ascending.

        The first k; where select_percent counts parameters, up to the first that would exceed the share, at least one.
        """
        return self.quota.admit(ranking)


class Policy(ABC):
    """Chooses the blocks of each step. Pure: the same arguments give the same answer, on every rank.

    Steps are numbered from 0 and count applied optimizer steps. A subclass gives `plan`, and `choose` only
    if its explore steps do not take the highest scores. With `select_every` = n it is asked at the first step of each
    round of n. What it learns from `observe` is part of its state: `state_dict` and `load_state_dict` carry it.
    """

    name: ClassVar[str]
    needs_steps_per_epoch: ClassVar[bool] = False
    measures_times: ClassVar[bool] = False  # explore steps are timed for `observe_times`

    def __init__(self, context: PolicyContext) -> None:
        self.context = context

    @classmethod
    def create(cls, context: PolicyContext) -> Policy:
        """Return a policy for this run. Raises ConfigError if the context lacks something the policy needs."""
        return cls(context)

    @abstractmethod
    def plan(self, step: int, update_counts: Sequence[int]) -> tuple[int, ...] | None:
        """Return the blocks of ``step``, ascending; None for an explore step, whose choice needs the scores.

        Args:
            update_counts: f, how many applied steps updated each block so far, (num_blocks,).
        """

    def choose(self, step: int, scores: Sequence[float]) -> tuple[int, ...]:
        """Return the blocks with the highest scores, as many as may be, ascending; ties go to the lower index.

        Algorithm 1 of arXiv:2512.15764. Only for steps whose plan is None. Raises TrainingError for NaN.

        Args:
            scores: (num_blocks,), non-negative.
        """
        self._check_length("scores", scores)
        for name, score in zip(self.context.block_names, scores):
            if math.isnan(score):
                raise TrainingError(
                    f'The gradient of block "{name}" is NaN at step {step}. Such a step must be skipped, not'
                    " chosen from; lower the learning rate or check the data."
                )
        return self.context.admit(descending(scores))

    def selects_nothing(self, step: int) -> bool:
        """Return whether ``step``, whose plan is None, only takes scores: no block of the lottery is updated."""
        return False

    def observe(self, step: int, units: Sequence[int], scores: Sequence[float]) -> None:  # noqa: B027
        """Learn from an applied step: called once after it, with the same arguments on every rank.

        Costs an exploit step the norms of what it updates: one all-reduce and one wait for the accelerator. A policy
        that does not override this costs nothing.

        Args:
            units: the blocks that were scored: those selected, or in an explore step all of the lottery. Ascending.
            scores: of each of ``units``, as the field `score` says; finite, and 0 for a block that was left out since
                it took no part in forward.
        """

    def observe_times(self, arrivals: Sequence[float], sunk: float) -> None:  # noqa: B027
        """Learn how long the backward of an applied explore step took, if `measures_times`. Equal on all ranks.

        Args:
            arrivals: seconds from the begin of backward until each block's last gradient came, (num_blocks,).
            sunk: seconds until the last gradient of `always_select` came; 0 without.
        """

    @property
    def observes(self) -> bool:
        """Whether `observe` is overridden."""
        return type(self).observe is not Policy.observe

    @property
    def max_selected(self) -> int:
        """The most blocks that a step can choose, by which memory for one step is sized."""
        return self.context.num_selected

    @property
    def keeps_to_quota(self) -> bool:
        """Whether all its answers are admitted by the context. If not, only their number is bounded, by `max_selected`.

        True unless the policy overrides `max_selected`.
        """
        return type(self).max_selected is Policy.max_selected

    @property
    def chooses_highest_scores(self) -> bool:
        """Whether `choose` is not overridden, so that a block may be dropped once others have taken its place."""
        return type(self).choose is Policy.choose

    def explore_probability(self, step: int) -> float:
        """Return ε_t, the probability that ``step`` explores."""
        return 0.0

    def _check_length(self, what: str, values: Sequence[float]) -> None:
        if len(values) != self.context.num_blocks:
            raise ValueError(
                f"{len(values)} {what} for the {self.context.num_blocks} blocks that a policy chooses from."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs beyond step and counts, as JSON. The policies here need nothing more."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state from `state_dict`. Raises CheckpointError for a state of another policy."""
        if state:
            raise CheckpointError(
                f'Policy "{self.name}" keeps no state, and the checkpoint has {sorted(state)} for it. Resume'
                " with the policy that wrote the checkpoint."
            )


def num_selected(select_percent: float, num_blocks: int, warns: bool = True) -> int:
    """Return k = max(1, floor(select_percent / 100 · num_blocks)), the number of blocks updated per step.

    Warns, unless told not to, if select_percent is less than one block, as the paper's rule then still updates one.
    Raises ConfigError if no block is left to choose from.
    """
    if num_blocks < 1:
        raise ConfigError(
            f"{SECTION}.always_select and {SECTION}.never_select name every block, so that none is left to"
            ' choose from. Leave some out, or use policy "all" with always_select=[].'
        )
    blocks = math.floor(select_percent * num_blocks / 100 + _FLOOR_TOLERANCE)
    if blocks < 1 and warns:
        logger.warning(
            "%s.select_percent=%g is less than one of the %d blocks: each step updates one, which is %.4g %%.%s",
            SECTION, select_percent, num_blocks, 100 / num_blocks, fraction_hint(select_percent),
        )  # fmt: skip
    return max(1, blocks)


def share_of(select_percent: float, numels: Sequence[int]) -> Quota:
    """Return the quota of ``select_percent`` of the parameters of the units in the lottery, which have ``numels``.

    Warns if that is less than every unit, as a step then still updates one.
    Raises ConfigError if no unit is left to choose from.
    """
    if not numels:
        raise ConfigError(
            f'{SECTION}.granularity="module" finds no trainable matrix in the repeated layers to choose from, or'
            f" {SECTION}.always_select and {SECTION}.never_select name them all. Leave some out, or use"
            ' granularity "block".'
        )
    limit = math.floor(Fraction(repr(float(select_percent))) * sum(numels) / 100)
    if limit < min(numels):
        logger.warning(
            "%s.select_percent=%g of the %d parameters in the lottery is less than each of its %d units: each step "
            "updates one.%s", SECTION, select_percent, sum(numels), len(numels), fraction_hint(select_percent),
        )  # fmt: skip
    return Quota(tuple(numels), limit)
