"""The policy where the length of epoch 1 is found after the first step: asked once, by `plan` alone, and kept."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ds_agsel import policies
from ds_agsel.config import SelectionConfig
from ds_agsel.errors import CheckpointError


def policy(asked: list[int], steps_per_epoch: int | None = None, **section: Any) -> Any:
    def find() -> int:
        asked.append(1)
        return 20

    config = SelectionConfig(**section)
    names = tuple("abcdef")
    context = policies.PolicyContext(config, 6, 2, names, steps_per_epoch, find_steps_per_epoch=find)
    return policies.create(context)


def test_step_0_explores_without_a_length_and_step_1_asks_once() -> None:
    asked: list[int] = []
    found = policy(asked)
    assert found.plan(0, [0] * 6) is None and asked == []
    assert found.explore_probability(7) == 1.0 and asked == [], "only plan, which all ranks call, may ask"
    for step in range(1, 5):
        found.plan(step, [1] * 6)
    assert asked == [1] and found.steps_per_epoch == 20
    assert found.explore_probability(7) == pytest.approx(math.exp(-7 * math.log(100) / 20))
    assert found.explore_probability(20) == 0.0


def test_plans_are_those_of_a_run_that_was_told_the_length() -> None:
    found, told = policy([]), policy([], steps_per_epoch=20)
    for step in range(60):
        counts = [step % 5, 1, 0, 2, 3, 4]
        assert found.plan(step, counts) == told.plan(step, counts)


def test_a_length_that_was_told_and_a_policy_that_never_explores_are_not_asked_for() -> None:
    asked: list[int] = []
    policy(asked, steps_per_epoch=9).plan(3, [0] * 6)
    policy(asked, explore_rate=0).plan(3, [0] * 6)
    assert asked == []


def test_the_state_carries_what_was_found() -> None:
    first, asked = policy([]), []
    assert first.state_dict() == {}
    first.plan(1, [0] * 6)
    again = policy(asked)
    again.load_state_dict(first.state_dict())
    again.plan(2, [0] * 6)
    assert again.steps_per_epoch == 20 and asked == []
    told = policy([], steps_per_epoch=9)
    told.load_state_dict(first.state_dict())
    assert told.steps_per_epoch == 9 and told.state_dict() == {}


@pytest.mark.parametrize("value", [0, -1, "20", 2.5, True])
def test_a_length_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match="steps_per_epoch="):
        policy([]).load_state_dict({"steps_per_epoch": value})
