"""What a policy of the user's own may answer: distinct indices of blocks in the lottery, the same at each call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ds_agsel import policies
from ds_agsel.blocks import Block
from ds_agsel.config import SelectionConfig
from ds_agsel.errors import TrainingError
from ds_agsel.policies import registry
from ds_agsel.selection import Lottery, Selection

BLOCKS, DRAWN = 5, (1, 2, 3, 4)


@pytest.fixture(autouse=True)
def own_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_POLICIES", dict(registry._POLICIES))
    yield


def selection(answer: Callable[[], Any], method: str = "plan") -> Selection:
    """A selection of 2 of 4 blocks by a policy whose ``method`` answers ``answer()``; block 0 is always selected."""

    class Own(policies.Policy):
        def plan(self, step: int, update_counts: Any) -> Any:
            return answer() if method == "plan" else None

        def choose(self, step: int, scores: Any) -> Any:
            return answer()

    policies.register("own", Own)
    names = [f"block{index}" for index in range(BLOCKS)]
    config = SelectionConfig(policy="own", select_percent=50, always_select=["block0"])
    context = policies.PolicyContext(config, len(DRAWN), 2, tuple(names[index] for index in DRAWN), None)
    blocks = tuple(Block(index, name, (f"{name}.weight",), 1) for index, name in enumerate(names))
    parameters = {f"{name}.weight": nn.Parameter(torch.ones(1)) for name in names}
    return Selection(blocks, policies.create(context), Lottery(DRAWN, always=(0,)), config, parameters)


WRONG = [
    ((0.0, 1.0), "in which 0.0 is not an integer"),
    ((True, 2), "in which True is not an integer"),
    (("1",), "in which '1' is not an integer"),
    (((1, 2),), r"in which \(1, 2\) is not an integer"),
    ("12", "which is not a tuple of block indices"),
    ({1, 2}, "which is not a tuple of block indices"),
    (1, "which is not a tuple of block indices"),
    (np.array([[1, 2]]), "which is not a tuple of block indices"),
    (np.array([1.0]), "is not an integer"),
    ((), "which selects nothing"),
    ((2, 2), "which names a block twice"),
    ((-1, 2), "the blocks in the lottery are 0 to 3"),
    ((4,), "the blocks in the lottery are 0 to 3"),
    ((0, 1, 2), "more than the 2 blocks of its max_selected"),
]


@pytest.mark.parametrize(("answer", "message"), WRONG, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("method", ["plan", "choose"])
def test_a_wrong_answer_is_an_error_before_anything_changes(method: str, answer: Any, message: str) -> None:
    wrong = selection(lambda: answer, method)
    with pytest.raises(TrainingError, match=rf'policy="own": .*Own\.{method} answered .* for step 0, .*{message}'):
        _ = wrong.plan
        wrong.choose([1.0] * BLOCKS)
    assert wrong.num_steps == 0 and wrong.update_counts == (0,) * BLOCKS and wrong.history == []


def test_a_choice_of_none_is_an_error_and_a_plan_of_none_explores() -> None:
    explores = selection(lambda: None)
    assert explores.plan.phase == "explore"
    with pytest.raises(TrainingError, match=r"Own\.choose answered None"):
        explores.choose([1.0] * BLOCKS)


@pytest.mark.parametrize("method", ["plan", "choose"])
def test_other_answers_at_each_call_are_an_error(method: str) -> None:
    calls = itertools.count()
    random = selection(lambda: (next(calls) % 4,), method)
    with pytest.raises(TrainingError, match="The same arguments must give the same answer"):
        _ = random.plan
        random.choose([1.0] * BLOCKS)


@pytest.mark.parametrize("answer", [(3, 0), [0, 3], np.array([3, 0])], ids=str)
def test_sequences_of_integers_are_taken_in_any_order(answer: Any) -> None:
    assert selection(lambda: answer).plan.blocks == (0, 1, 4)
    assert selection(lambda: answer, "choose").choose([1.0] * BLOCKS) == (0, 1, 4)


def test_a_wrong_plan_of_the_next_step_leaves_the_step_that_was_applied() -> None:
    """The next step is planned at the end of this one, whose error must not interrupt it."""
    answers = iter([(1,), (1,), ()])
    going = selection(lambda: next(answers, ()))
    _ = going.plan
    going.commit()
    assert going.num_steps == 1 and going.history[0].blocks == (0, 2)
    with pytest.raises(TrainingError, match="which selects nothing"):
        _ = going.plan
