"""Validate a policy's answers before they are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ds_agsel.config import SECTION
from ds_agsel.errors import TrainingError
from ds_agsel.policies.base import Policy

_OWN_POLICIES = "ds_agsel.policies."  # known to be deterministic


def checked_plan(policy: Policy, step: int, update_counts: Sequence[int]) -> tuple[int, ...] | None:
    """Return the checked answer of `Policy.plan`, ascending; None for a step that explores."""
    return _checked(policy, "plan", step, lambda: policy.plan(step, list(update_counts)))


def checked_choice(policy: Policy, step: int, scores: Sequence[float]) -> tuple[int, ...]:
    """Return the checked answer of `Policy.choose`, ascending."""
    return _checked(policy, "choose", step, lambda: policy.choose(step, list(scores))) or ()


def _checked(policy: Policy, method: str, step: int, ask: Callable[[], Any]) -> tuple[int, ...] | None:
    """Return the blocks that ``ask()``, a call of ``policy``'s ``method``, answers; None for a plan of None.

    A third-party policy is called twice: if its answers differ, ranks would select different blocks. Raises
    TrainingError that names the policy for anything but distinct indices of blocks in the lottery, at least one and at
    most `max_selected`, as a sequence of integers.
    """
    answer = ask()
    blocks = _as_blocks(policy, method, step, answer)
    if not type(policy).__module__.startswith(_OWN_POLICIES):
        again = ask()
        if _as_blocks(policy, method, step, again) != blocks:
            raise _error(
                policy, method, step, answer, f"and then {again!r:.80}. The same arguments must give the same answer"
            )
    return blocks


def _as_blocks(policy: Policy, method: str, step: int, answer: Any) -> tuple[int, ...] | None:
    if answer is None and method == "plan":
        return None
    context = policy.context
    if isinstance(answer, np.ndarray) and answer.ndim == 1:
        answer = tuple(answer)
    if not isinstance(answer, Sequence) or isinstance(answer, str | bytes):
        raise _error(policy, method, step, answer, "which is not a tuple of block indices")
    odd = [block for block in answer if isinstance(block, bool) or not isinstance(block, int | np.integer)]
    if odd:
        raise _error(policy, method, step, answer, f"in which {odd[0]!r:.80} is not an integer")
    blocks = tuple(sorted(int(block) for block in answer))
    if not blocks:
        raise _error(policy, method, step, answer, "which selects nothing")
    if len(set(blocks)) < len(blocks):
        raise _error(policy, method, step, answer, "which names a block twice")
    if blocks[0] < 0 or blocks[-1] >= context.num_blocks:
        raise _error(policy, method, step, answer, f"and the blocks in the lottery are 0 to {context.num_blocks - 1}")
    if len(blocks) > policy.max_selected:
        raise _error(policy, method, step, answer, f"more than the {policy.max_selected} blocks of its max_selected")
    share = context.share if policy.keeps_to_quota else None
    if share is not None and len(blocks) > 1 and sum(share.costs[block] for block in blocks) > share.limit:
        raise _error(
            policy, method, step, answer,
            f"which has {sum(share.costs[block] for block in blocks)} parameters, more than the {share.limit} of "
            f"{SECTION}.select_percent={context.config.select_percent:g}: answer with context.admit(ranking)",
        )  # fmt: skip
    return blocks


def _error(policy: Policy, method: str, step: int, answer: Any, what: str) -> TrainingError:
    name = getattr(policy, "name", type(policy).__qualname__)
    return TrainingError(
        f'{SECTION}.policy="{name}": {type(policy).__qualname__}.{method} answered {answer!r:.80} for step {step}, '
        f"{what}. Answer a tuple of distinct block indices, ascending; nothing was changed."
    )
