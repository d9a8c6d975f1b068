"""How blocks are scored and for how long they are held, against the reference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
from reference_runs import assert_follows_reference
from support import FIRST, SELECT, TOPK, VISIT, Case, assert_identical, build, case_id, run_steps, train
from test_reference import FP32
from test_resume import KINDS, SAVED_AT, check_resume, resume, save_and_go_on
from test_streaming import train_and_watch
from test_unselected import check_unselected


def last_by_default(cases: Sequence[Any]) -> list[Any]:
    """``cases`` to be parametrized over, all but the last of them slow."""
    return [*(pytest.param(case, marks=pytest.mark.slow) for case in cases[:-1]), cases[-1]]


SCORED = [
    Case(section={**SELECT, "score": "norm"}, stage=3, offload="cpu", accumulation=2, clip=0.3),
    Case(section={**TOPK, "score": "rms", **VISIT}, stage=1),
]
SCORED_WIDE = [
    Case(section={**TOPK, "score": score}, stage=stage, offload=offload)
    for score, stage, offload in product(("norm", "rms"), (1, 2, 3), ("none", "cpu"))
]


@pytest.mark.parametrize("case", last_by_default(SCORED), ids=case_id)
def test_selections_by_score_follow_the_reference(trained, case):
    assert_follows_reference(case, trained(case, 2), FP32)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", SCORED_WIDE, ids=case_id)
def test_selections_by_every_score_follow_the_reference(trained, case, ranks):
    assert_follows_reference(case, trained(case, ranks), FP32)


@pytest.mark.slow
def test_each_score_chooses_other_blocks(trained):
    histories = [trained(Case(section={**TOPK, "score": score}), 2)[0]["history"] for score in ("sum", "norm", "rms")]
    assert histories[0] != histories[1] != histories[2] != histories[0]


HELD = [
    Case(section={**SELECT, "select_every": 3}, accumulation=2, clip=0.3),
    Case(section={**TOPK, "select_every": 3, "score": "rms", **VISIT}, stage=3),
    Case(section={**FIRST, "select_every": 2, "always_select": ["final_norm"]}, offload="cpu", accumulation=2),
]
HELD_WIDE = [
    Case(section={**SELECT, "select_every": 3, "policy": policy}, stage=stage, offload=offload)
    for policy, stage, offload in product(("adagrad_select", "random", "cyclic"), (1, 2, 3), ("none", "cpu"))
]


@pytest.mark.parametrize("case", [pytest.param(HELD[0], marks=pytest.mark.slow), *HELD[1:]], ids=case_id)
def test_held_selections_follow_the_reference(trained, case):
    assert_follows_reference(case, trained(case, 2), FP32)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", HELD_WIDE, ids=case_id)
def test_held_selections_of_every_policy_follow_the_reference(trained, case, ranks):
    assert_follows_reference(case, trained(case, ranks), FP32)


@pytest.mark.parametrize("case", HELD[1:], ids=case_id)
def test_what_is_not_held_is_bit_identical(trained, case):
    check_unselected(trained(case, 2))


MISA_PRESET = {"preset": "misa", "select_percent": 50, "select_every": 3, "temperature": 0.05}  # modules, and reset
# The last of ten steps comes back, after the save, to what was updated before it.
CYCLIC_DECAY = {**SELECT, "policy": "cyclic", "on_reentry": "decay"}
IN_A_ROUND = [
    (HELD[1].but(dtype="bf16"), 2),
    (Case(section=MISA_PRESET, stage=1, offload="cpu", steps=10), 1),
    (Case(section={**CYCLIC_DECAY, "select_every": 3}, stage=3, offload="cpu", steps=10), 2),
]
IN_A_ROUND_WIDE = [
    (HELD[0], 2),
    *(
        (Case(section={**section, "select_every": 3}, stage=stage, offload=offload, steps=10), ranks)
        for section, stage, offload, ranks in product(
            (
                {**SELECT, "granularity": "module", "on_reentry": "reset"}, {**SELECT, "on_reentry": "reset", **VISIT},
                CYCLIC_DECAY, MISA_PRESET,
            ),
            (1, 2, 3), ("none", "cpu"), (1, 2),
        )
        if "step_device" not in section or offload == "none"
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "ranks"),
    [*IN_A_ROUND, *(pytest.param(*each, marks=pytest.mark.slow) for each in IN_A_ROUND_WIDE if each not in IN_A_ROUND)],
    ids=case_id,
)
def test_a_resume_in_the_middle_of_a_round_is_bit_identical(workers, other_workers, tmp_path, case, ranks):
    assert SAVED_AT % 3 == 1  # the round began a step before
    check_resume(workers, other_workers, tmp_path, case, KINDS[(case.stage + ranks) % 2], ranks)


# Steep enough for the scores to decide; the first two steps probe.
GRASS = {
    "policy": "grass", "select_percent": 34, "score": "norm", "temperature": 0.05, "probe_steps": 2, "select_every": 3,
}  # fmt: skip
MISA = {"policy": "misa", "select_percent": 50, "score": "norm", "temperature": 0.05, "select_every": 2}
OBSERVING = [
    Case(section={**GRASS, "always_select": ["final_norm"]}, accumulation=2, clip=0.3, steps=9),
    Case(section={**GRASS, **VISIT}, stage=3, steps=9),
    Case(section=MISA, offload="cpu", steps=9),
]
OBSERVING_WIDE = [
    Case(section=section, stage=stage, offload=offload, steps=9)
    for section, stage, offload in product((GRASS, MISA), (1, 2, 3), ("none", "cpu"))
]


@pytest.mark.parametrize("case", [pytest.param(OBSERVING[0], marks=pytest.mark.slow), *OBSERVING[1:]], ids=case_id)
def test_policies_that_observe_follow_the_reference(trained, case):
    runs = trained(case, 2)
    assert_follows_reference(case, runs, FP32)
    if case.section["policy"] == "grass":
        always = () if not case.section.get("always_select") else (5,)
        assert runs[0]["history"][:2] == [(0, "explore", always), (1, "explore", always)]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", OBSERVING_WIDE, ids=case_id)
def test_policies_that_observe_follow_the_reference_in_every_stage(trained, case, ranks):
    assert_follows_reference(case, trained(case, ranks), FP32)


@pytest.mark.parametrize("case", last_by_default(OBSERVING[:0:-1]), ids=case_id)
def test_a_resume_of_what_was_observed_is_bit_identical(workers, other_workers, tmp_path, case):
    check_resume(workers, other_workers, tmp_path, case, KINDS[case.stage == 3], ranks=2)


@pytest.mark.parametrize("stage", last_by_default([2, 3]))
def test_a_probing_step_holds_the_gradients_of_one_block(workers, stage):
    for run in workers(2).run(train_and_watch, Case(section=GRASS, stage=stage, steps=2)):
        assert [seen["most_blocks"] for seen in run["observed"]] == [1, 1]


def score_reads(case: Case) -> dict[str, int]:
    """How often scores were taken in each phase."""
    engine = build(case)
    selection, found = engine.selection, {"explore": 0, "exploit": 0}
    take = selection.take_scores

    def counted(blocks: Any, scores: Any) -> None:
        found[selection.plan.phase] += 1
        take(blocks, scores)

    selection.take_scores = counted
    run_steps(engine, case)
    engine.destroy()
    return found


def test_exploit_steps_take_scores_for_a_policy_that_observes_and_for_no_other(workers):
    assert workers(1).run(score_reads, Case(section=MISA, steps=4)) == [{"explore": 0, "exploit": 4}]
    assert workers(1).run(score_reads, Case(section={**SELECT, "policy": "random"}, steps=4)) == [
        {"explore": 0, "exploit": 0}
    ]


COST_AWARE = {
    "policy": "cost_aware", "select_percent": 34, "score": "norm", "probe_steps": 2, "select_every": 2,
    "never_select": ["final_norm"],
}  # fmt: skip


def times_and_choices(case: Case) -> tuple[dict[str, Any], list[Any]]:
    engine = build(case)
    run_steps(engine, case)
    selection = engine.selection
    found = selection.state_dict()["policy"], [record.blocks for record in selection.history]
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", last_by_default([1, 3, 2]))
def test_ranks_measure_the_same_times_and_choose_alike(workers, stage):
    case = Case(section=COST_AWARE, stage=stage, accumulation=1 + stage % 2)
    (state, choices), (of_other, choices_of_other) = workers(2).run(times_and_choices, case)
    assert state == of_other and choices == choices_of_other
    times = state["arrivals"]
    assert times == sorted(times, reverse=True) and times[-1] > 0  # backward comes to the embedding last
    assert choices[:2] == [(), ()] and all(choices[2:])


COST_CASES = [
    Case(section={**COST_AWARE, **extra}, stage=stage, offload=offload, clip=clip)
    for extra, stage, offload, clip in (
        ({}, 1, "none", 0.3), ({}, 1, "cpu", 0.0), ({}, 2, "none", 0.0), (VISIT, 3, "none", 0.3),
        ({}, 3, "none", 0.0), ({"always_select": ["embedding"]}, 2, "cpu", 0.3), ({}, 3, "cpu", 0.3),
    )
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        pytest.param(case, ranks, marks=[] if ranks == 2 and case in COST_CASES[-2:] else pytest.mark.slow)
        for case, ranks in product(COST_CASES, (1, 2))
    ],
    ids=case_id,
)
def test_what_cost_aware_has_chosen_is_updated_as_by_the_reference(trained, case, ranks):
    """Its choices hang on measured times: the reference takes them from the run. Rounds are its own."""
    runs = trained(case, ranks)
    history = runs[0]["history"]
    assert [phase for _, phase, _ in history] == ["explore"] * 2 + ["exploit"] * (case.steps - 2)
    assert_follows_reference(case, runs, FP32, history=history)


@pytest.mark.parametrize("stage", last_by_default([2, 3]))
def test_a_resume_goes_on_with_the_measured_times(workers, other_workers, tmp_path, stage):
    case = Case(section=COST_AWARE, stage=stage, offload=("none", "cpu")[stage == 3], steps=10)
    kept = ("weights", "partitions", "history", "counts")
    together = workers(2).run(save_and_go_on, case, tmp_path, KINDS[0])
    for saving, resumed in zip(together, other_workers(2).run(resume, case, tmp_path), strict=True):
        assert_identical({key: saving[key] for key in kept}, {key: resumed[key] for key in kept})


def state_traffic(case: Case) -> tuple[int, int]:
    """Bytes of states that came to the accelerator, and that left it, in the second half of the run."""
    engine = build(case)
    run_steps(engine, case)
    half = engine.selection.traffic[case.steps // 2 :]
    engine.destroy()
    return sum(step.h2d_bytes for step in half), sum(step.d2h_bytes for step in half)


def test_held_states_travel_once_a_round(workers):
    """The four layers, of equal size, in turn. Their first visits, in the first half, bring no moments."""
    section = {"policy": "cyclic", "select_percent": 25, "never_select": ["embedding", "final_norm"], **VISIT}
    case = Case(section=section, steps=24)
    in_out = {
        length: workers(1).run(state_traffic, case.but(section={**section, "select_every": length}))[0]
        for length in (1, 2, 3)
    }
    layer_bytes = in_out[1][0] // 12
    assert layer_bytes > 0
    assert in_out == {length: (12 // length * layer_bytes,) * 2 for length in (1, 2, 3)}


@pytest.mark.parametrize(("stage", "ranks"), [(2, 1), (3, 2)])
def test_a_replayed_run_of_rounds_is_the_same_run(workers, tmp_path, stage, ranks):
    case = Case(section={**SELECT, "select_every": 3}, stage=stage)
    whole = workers(ranks).run(train, case)
    lines = [{"step": step, "phase": phase, "blocks": blocks} for step, phase, blocks in whole[0]["history"]]
    file = tmp_path / "selection.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    replayed = workers(ranks).run(train, case.but(section={"policy": "replay", "replay_file": str(file)}, steps=7))
    for short, again in zip(workers(ranks).run(train, case.but(steps=7)), replayed, strict=True):
        assert_identical(
            {key: short[key] for key in ("weights", "partitions")},
            {key: again[key] for key in ("weights", "partitions")},
        )
