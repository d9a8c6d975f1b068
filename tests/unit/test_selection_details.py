"""Details of the controller that no other fast test noticed when a mutation run changed them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ds_agsel import policies
from ds_agsel.blocks import Block
from ds_agsel.config import SelectionConfig
from ds_agsel.errors import CheckpointError
from ds_agsel.lottery import Lottery
from ds_agsel.policies import Policy, PolicyContext, registry
from ds_agsel.selection import Selection

NUM_BLOCKS = 5


def make(lottery: Lottery | None = None, **section: Any) -> Selection:
    parameters = {f"block{i}.weight": nn.Parameter(torch.ones(1)) for i in range(NUM_BLOCKS)}
    blocks = tuple(Block(i, f"block{i}", (f"block{i}.weight",), 1) for i in range(NUM_BLOCKS))
    lottery = lottery or Lottery(tuple(range(NUM_BLOCKS)))
    config = SelectionConfig(steps_per_epoch=10, **section)
    names = tuple(blocks[index].name for index in lottery.drawn)
    context = PolicyContext(config, len(names), policies.num_selected(config.select_percent, len(names)), names, 10)
    return Selection(blocks, policies.create(context), lottery, config, parameters)


def step(selection: Selection, scores: Sequence[float] = (1.0, 5.0, 2.0, 4.0, 3.0)) -> None:
    _ = selection.active_blocks
    if selection.plan.blocks is None:
        selection.choose(scores)
    selection.commit()


class Told(Policy):
    """Explores at every step and keeps what it was told, which is its state."""

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self.told: list[Any] = []

    def plan(self, step: int, update_counts: Sequence[int]) -> None:
        return None

    def choose(self, step: int, scores: Sequence[float]) -> tuple[int, ...]:
        if [step, list(scores)] not in self.told:  # it may be asked twice, to see that it says the same
            self.told.append([step, list(scores)])
        return (1,)

    def state_dict(self) -> dict[str, Any]:
        return {"told": self.told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.told = list(state["told"])


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_POLICIES", dict(registry._POLICIES))
    policies.register("told", Told)
    yield


def test_counts_add_up_over_steps() -> None:
    selection = make(policy="random", select_percent=40)
    for _ in range(30):
        step(selection)
    counted = Counter(block for record in selection.history for block in record.blocks)
    assert selection.update_counts == tuple(counted[block] for block in range(NUM_BLOCKS))
    assert sum(selection.update_counts) == 60


@pytest.mark.usefixtures("told")
def test_a_policy_is_told_the_step_and_the_scores_of_its_blocks() -> None:
    selection = make(Lottery((1, 3, 4), always=(0,)), policy="told")
    step(selection)
    step(selection, (9.0, 8.0, 7.0, 6.0, 5.0))
    assert selection.policy.told == [[0, [5.0, 4.0, 3.0]], [1, [8.0, 6.0, 5.0]]]
    assert selection.history[-1].blocks == (0, 3), "1 is the second of those that it chooses from"


@pytest.mark.usefixtures("told")
def test_a_resume_gives_a_policy_its_state_back() -> None:
    selection = make(policy="told")
    step(selection)
    resumed = make(policy="told")
    resumed.load_state_dict(json.loads(json.dumps(selection.state_dict())))
    assert resumed.policy.told == selection.policy.told
    assert (resumed.plan, resumed.update_counts) == (selection.plan, selection.update_counts)


def test_a_resume_takes_the_saved_plan_and_draws_none() -> None:
    selection = make(policy="random", select_percent=40)
    step(selection)
    state = json.loads(json.dumps(selection.state_dict()))
    drawn = selection.plan.blocks
    other = next([a, b] for a in range(NUM_BLOCKS) for b in range(a + 1, NUM_BLOCKS) if (a, b) != drawn)
    assert tuple(state["plan"]["blocks"]) == drawn
    state["plan"]["blocks"] = other
    resumed = make(policy="random", select_percent=40)
    resumed.load_state_dict(state)
    assert resumed.plan.blocks == resumed.selected_blocks == resumed.planned_blocks == tuple(other)


def test_a_resume_of_an_explore_step_chooses_again() -> None:
    selection = make(policy="gradient_topk", select_percent=40)
    step(selection)
    resumed = make(policy="gradient_topk", select_percent=40)
    resumed.load_state_dict(json.loads(json.dumps(selection.state_dict())))
    assert resumed.plan == selection.plan and resumed.plan.blocks is None and not resumed.has_chosen
    step(resumed, (5.0, 4.0, 3.0, 2.0, 1.0))
    assert resumed.update_counts == (1, 2, 0, 1, 0)


def test_a_policy_that_has_run_out_is_saved_and_resumed(tmp_path: Path) -> None:
    path = tmp_path / "selection.jsonl"
    path.write_text('{"step": 0, "blocks": [2]}\n')
    selection = make(policy="replay", replay_file=str(path))
    step(selection)
    state = json.loads(json.dumps(selection.state_dict()))
    assert state["plan"] is None
    path.write_text('{"step": 0, "blocks": [2]}\n{"step": 1, "blocks": [4]}\n')
    resumed = make(policy="replay", replay_file=str(path))
    resumed.load_state_dict(state)
    assert resumed.plan.blocks == (4,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(version=0), r"version=0; .*, or load the weights alone: load_module_only=True\.$"),
        (
            lambda state: state.update(blocks=state["blocks"][:4], update_counts=[0] * 4, last_updates=[None] * 4),
            r"saved with 4 blocks that are not this run's 5\. Use the model and the adagrad_select\.blocks it was "
            r"saved with, or load the weights alone: load_module_only=True\.$",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_with_the_remedy(change: Any, message: str) -> None:
    state = make().state_dict()
    change(state)
    with pytest.raises(CheckpointError, match=message):
        make().load_state_dict(state)


def test_missed_steps_are_counted_from_a_blocks_last_update() -> None:
    selection = make(policy="fixed", fixed_blocks=["block1"])
    assert selection.missed_steps(1) == 0
    step(selection)
    assert [selection.missed_steps(block) for block in (0, 1)] == [0, 0]
    selection.leave_out([1])
    selection.commit()
    selection.leave_out([1])
    selection.skip()  # no step was applied
    assert selection.missed_steps(1) == 1
    resumed = make(policy="fixed", fixed_blocks=["block1"])
    resumed.load_state_dict(json.loads(json.dumps(selection.state_dict())))
    assert resumed.missed_steps(1) == 1


def test_last_updates_of_an_older_state_come_from_its_history() -> None:
    selection = make(policy="cyclic", select_percent=20)
    for _ in range(8):
        step(selection)
    state = selection.state_dict()
    assert state["last_updates"] == [5, 6, 7, 3, 4]
    older = {key: value for key, value in state.items() if key != "last_updates"}
    older["history"] = older["history"][-4:]
    resumed = make(policy="cyclic", select_percent=20)
    resumed.load_state_dict(older)
    assert resumed.state_dict()["last_updates"] == [5, 6, 7, 3, 4]  # block 3: the step before the history


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ([0, None, None, None], "last_updates has 4 steps for 5 blocks"),
        ([None] * 5, "last_updates.0 is None, and the block was updated 1 times in 1 steps"),
        ([1, None, None, None, None], "last_updates.0 is 1"),
        ([0, 0, None, None, None], "last_updates.1 is 0, and the block was updated 0 times"),
    ],
)
def test_wrong_last_updates_are_refused(last: list[int | None], said: str) -> None:
    selection = make(policy="fixed", fixed_blocks=["block0"])
    step(selection)
    state = {**selection.state_dict(), "last_updates": last}
    with pytest.raises(CheckpointError, match=said):
        make(policy="fixed", fixed_blocks=["block0"]).load_state_dict(state)
