"""The controller: windows, choices, records, its state, without DeepSpeed."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from ds_agsel import policies
from ds_agsel.blocks import Block
from ds_agsel.config import SelectionConfig
from ds_agsel.errors import CheckpointError, TrainingError
from ds_agsel.lottery import Lottery
from ds_agsel.selection import Record, Selection


def make(num_blocks=5, lottery=None, name="block", **section):
    parameters = {f"{name}{i}.weight": nn.Parameter(torch.ones(1)) for i in range(num_blocks)}
    blocks = tuple(Block(i, f"{name}{i}", (f"{name}{i}.weight",), 1) for i in range(num_blocks))
    lottery = lottery or Lottery(tuple(range(num_blocks)))
    config = SelectionConfig(steps_per_epoch=10, **section)
    context = policies.PolicyContext(
        config=config,
        num_blocks=len(lottery.drawn),
        num_selected=policies.num_selected(config.select_percent, len(lottery.drawn)),
        block_names=tuple(blocks[i].name for i in lottery.drawn),
        steps_per_epoch=10,
    )
    return Selection(blocks, policies.create(context), lottery, config, parameters)


def step(selection, scores=(1.0, 5.0, 2.0, 4.0, 3.0)):
    if selection.plan.blocks is None:
        selection.choose(scores)
    return selection.commit()


def test_an_explore_step_needs_all_gradients_and_takes_the_highest_scores():
    selection = make(policy="gradient_topk", select_percent=40)
    assert selection.active_blocks == (0, 1, 2, 3, 4)
    with pytest.raises(TrainingError, match="step 0 explores"):
        _ = selection.selected_blocks
    assert selection.choose([1.0, 5.0, 2.0, 4.0, 3.0]) == selection.active_blocks == (1, 3)
    assert selection.commit() == Record(0, "explore", (1, 3))
    assert selection.update_counts == (0, 1, 0, 1, 0)


def test_a_block_that_is_left_out_is_not_counted_and_comes_back_with_the_next_try():
    selection = make(policy="fixed", fixed_blocks=["block0", "block4"])
    selection.leave_out([4])
    assert selection.selected_blocks == (0,)
    selection.skip()
    assert selection.selected_blocks == (0, 4)
    selection.leave_out([0, 4])
    assert selection.commit() == Record(0, "exploit", ())
    assert selection.update_counts == (0,) * 5 and selection.plan.step == 1


def test_a_skipped_step_counts_for_nothing_and_its_plan_stands():
    selection = make(policy="random", select_percent=40)
    plan = selection.plan
    selection.current_traffic.reduced_bytes += 8
    selection.skip()
    assert selection.plan == plan and selection.selected_blocks == plan.blocks
    assert selection.history == [] and selection.update_counts == (0,) * 5
    assert selection.current_traffic.reduced_bytes == 0

    explore = make(policy="gradient_topk", select_percent=40)
    explore.choose([5.0, 4.0, 3.0, 2.0, 1.0])
    explore.skip()
    with pytest.raises(TrainingError):
        _ = explore.selected_blocks


def test_always_and_never_stand_outside_the_lottery():
    lottery = Lottery(drawn=(1, 3, 4), always=(0,), never=(2,))
    selection = make(lottery=lottery, policy="gradient_topk", select_percent=34)
    assert selection.active_blocks == (0, 1, 3, 4)
    assert selection.choose([0.0, 1.0, 99.0, 7.0, 3.0]) == (0, 3)


def test_going_on_from_a_state_equals_not_stopping():
    whole = make(select_percent=40)
    for _ in range(25):
        step(whole)

    first = make(select_percent=40)
    for _ in range(11):
        step(first)
    state = json.loads(json.dumps(first.state_dict()))
    second = make(select_percent=40)
    second.load_state_dict(state)
    assert second.plan == first.plan
    for _ in range(14):
        step(second)
    assert second.history == whole.history
    assert second.update_counts == whole.update_counts
    assert {record.phase for record in whole.history} == {"explore", "exploit"}


def test_a_changed_section_is_planned_anew(caplog):
    saved = make(policy="fixed", fixed_blocks=["block0"])
    step(saved)
    other = make(policy="fixed", fixed_blocks=["block3"])
    other.load_state_dict(saved.state_dict())
    assert "the section differs" in caplog.text
    assert other.plan.blocks == (3,) and other.plan.step == 1


def test_a_section_saved_before_a_field_existed_is_the_section_with_its_default(caplog):
    saved = make(policy="random")
    step(saved)
    state = saved.state_dict()
    state["section"] = {key: value for key, value in state["section"].items() if key != "score"}
    make(policy="random").load_state_dict(state)
    assert not caplog.text
    make(policy="random", score="rms").load_state_dict(state)
    assert "the section differs" in caplog.text


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (make(4).state_dict(), "saved with 4 blocks that are not this run's 5"),
        (make(name="layer").state_dict(), "first difference.*layer0.*block0.*load_module_only=True"),
        ({**make().state_dict(), "version": 99}, "version=99; this ds_agsel reads versions 1 to 2"),
    ],
)
def test_a_state_of_other_blocks_is_refused(state, message):
    with pytest.raises(CheckpointError, match=message):
        make().load_state_dict(state)


def test_a_policy_that_has_run_out_is_an_error_only_where_training_goes_on(tmp_path):
    log = tmp_path / "selection.jsonl"
    log.write_text('{"step": 0, "phase": "exploit", "blocks": [1]}\n')
    selection = make(policy="replay", replay_file=str(log))
    assert step(selection).blocks == (1,)
    assert selection.state_dict()["plan"] is None
    with pytest.raises(ValueError, match="step 1"):
        _ = selection.active_blocks


# Rounds


def test_a_selection_stands_for_a_round_and_the_policy_is_asked_at_its_first_step():
    selection, every = (
        make(policy="random", select_percent=40, select_every=3),
        make(policy="random", select_percent=40),
    )
    for _ in range(9):
        step(selection)
        step(every)
    asked = [record.blocks for record in every.history]
    assert [record.blocks for record in selection.history] == [asked[i] for i in (0, 0, 0, 3, 3, 3, 6, 6, 6)]
    assert sum(selection.update_counts) == 18


def test_a_round_that_explores_scores_once_and_holds_what_it_chose():
    selection = make(policy="gradient_topk", select_percent=40, select_every=3)
    assert step(selection) == Record(0, "explore", (1, 3))
    assert selection.active_blocks == (1, 3) and selection.plan.blocks == (1, 3)
    assert [step(selection) for _ in range(2)] == [Record(1, "exploit", (1, 3)), Record(2, "exploit", (1, 3))]
    assert selection.plan.blocks is None and selection.active_blocks == (0, 1, 2, 3, 4)
    assert step(selection, [9.0, 1.0, 1.0, 1.0, 8.0]) == Record(3, "explore", (0, 4))


def test_skipped_steps_do_not_shorten_a_round():
    selection = make(policy="gradient_topk", select_percent=40, select_every=2)
    selection.choose([5.0, 4.0, 3.0, 2.0, 1.0])
    selection.skip()  # nothing is held: the retry explores
    assert selection.plan.blocks is None
    step(selection)
    selection.skip()
    selection.skip()
    assert selection.plan.blocks == (1, 3)
    step(selection)
    assert selection.plan.blocks is None


def test_a_block_that_a_step_of_a_round_leaves_out_comes_back_with_the_next():
    selection = make(policy="gradient_topk", select_percent=40, select_every=3)
    selection.choose([5.0, 4.0, 3.0, 2.0, 1.0])
    selection.leave_out([1])
    assert selection.commit() == Record(0, "explore", (0,))
    assert step(selection).blocks == (0, 1)
    selection.leave_out([0, 1])
    assert selection.commit().blocks == ()
    assert selection.update_counts == (2, 1, 0, 0, 0)


def test_the_explore_probability_of_a_round_is_that_of_its_first_step():
    selection = make(select_percent=40, select_every=4, explore_decay=0.3)
    seen = []
    for _ in range(8):
        seen.append(selection.explore_probability)
        step(selection)
    assert seen[:4] == [1.0] * 4
    assert seen[4:] == [pytest.approx(2.718281828**-1.2)] * 4


def test_going_on_from_the_middle_of_a_round_equals_not_stopping():
    section = {"select_percent": 40, "select_every": 4, "explore_decay": 0.01}
    for saved_at in range(1, 9):
        whole, first, second = make(**section), make(**section), make(**section)
        for number in range(12):
            step(whole, scores=[(7 * number + 3 * block) % 11 for block in range(5)])
        for number in range(saved_at):
            step(first, scores=[(7 * number + 3 * block) % 11 for block in range(5)])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for number in range(saved_at, 12):
            step(second, scores=[(7 * number + 3 * block) % 11 for block in range(5)])
        assert second.history == whole.history


def test_a_changed_section_ends_the_round(caplog):
    saved = make(policy="fixed", fixed_blocks=["block0"], select_every=5)
    step(saved)
    other = make(policy="fixed", fixed_blocks=["block3"], select_every=5)
    other.load_state_dict(saved.state_dict())
    assert other.plan.blocks == (3,)


def test_cyclic_takes_the_next_blocks_each_round():
    selection = make(policy="cyclic", select_percent=40, select_every=2)
    assert [step(selection).blocks for _ in range(7)] == [(0, 1)] * 2 + [(2, 3)] * 2 + [(0, 4)] * 2 + [(1, 2)]


@pytest.mark.parametrize("wrong", [{"start": 1, "blocks": [0]}, {"start": 0, "blocks": [0, 0]}, {"start": 0}])
def test_a_round_that_can_not_be_is_refused(wrong):
    selection = make(policy="random", select_every=3)
    step(selection)
    with pytest.raises(CheckpointError, match="round"):
        make(policy="random", select_every=3).load_state_dict({**selection.state_dict(), "round": wrong})


# What a policy observes


class Watcher(policies.Policy):
    """Explores at every other step and keeps what it sees, which is its state."""

    def __init__(self, context):
        super().__init__(context)
        self.seen = []

    def plan(self, step, update_counts):
        return None if step % 2 == 0 else (0, 1)

    def observe(self, step, units, scores):
        self.seen.append([step, list(units), list(scores)])


def watched(lottery):
    selection = make(policy="random", select_percent=70, lottery=lottery)
    return Selection(
        selection.blocks, Watcher(selection.policy.context), lottery, selection.config, selection.parameters
    )


def test_a_policy_sees_all_scores_of_an_explore_step_and_those_of_what_an_exploit_step_updates():
    selection = watched(Lottery((1, 3, 4), always=(0,), never=(2,)))
    assert selection.wants_scores
    step(selection, [1.0, 5.0, 2.0, 4.0, 3.0])
    assert selection.wants_scores
    selection.take_scores(selection.selected_blocks, [7.0, 6.0, 0.0, float("nan"), 0.0])
    assert not selection.wants_scores
    selection.skip()
    assert selection.wants_scores and len(selection.policy.seen) == 1
    selection.take_scores(selection.selected_blocks, [7.0, 6.0, 0.0, float("nan"), 0.0])
    selection.commit()
    assert selection.policy.seen == [[0, [0, 1, 2], [5.0, 4.0, 3.0]], [1, [0], [6.0]]]


def test_a_policy_sees_a_score_of_0_for_a_block_that_was_left_out():
    selection = watched(Lottery((1, 3, 4), always=(0,), never=(2,)))
    selection.choose([1.0, 5.0, 2.0, 4.0, 0.0])
    selection.leave_out([3])  # chosen, and took no part in forward
    selection.commit()
    assert selection.policy.seen.pop()[1:] == [[0, 1, 2], [5.0, 4.0, 0.0]]
    selection.leave_out([1])  # planned, with 3: its score is not asked for
    selection.take_scores(selection.selected_blocks, [7.0, 6.0, 0.0, 2.0, 0.0])
    selection.commit()
    assert selection.policy.seen == [[1, [0, 1], [0.0, 2.0]]]


def test_a_policy_that_does_not_observe_wants_no_scores():
    selection = make(policy="random")
    assert not selection.wants_scores
    selection.take_scores((0,), [1.0] * 5)
    selection.commit()
