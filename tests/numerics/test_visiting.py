"""What states take on the accelerator, and what of them moves, is what the selection says, to the byte."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from support import ALL, NARROW, SELECT, VISIT, Case, assert_identical, case_id, train

CASES = [
    Case(section={**SELECT, **VISIT}, decay_groups=True),
    Case(section={**SELECT, **VISIT}, model="net", accumulation=2),
    Case(section={**SELECT, **VISIT, "keep_master": "accelerator"}, dtype="bf16"),
    Case(stage=3, section={**SELECT, **VISIT}, decay_groups=True, zero={"sub_group_size": 300}),
    Case(stage=3, section={**SELECT, **VISIT}, model="net", accumulation=2),
    Case(stage=3, section={**SELECT, **VISIT, "keep_master": "accelerator"}, dtype="bf16"),
]


def members_and_masters(zero: Any) -> Iterator[tuple[Any, Any]]:
    """The parameters and the fp32 partition of each group, of each sub-group with stage 3."""
    if hasattr(zero, "fp16_groups"):
        return zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)
    return zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)


def observe(event: str, engine: Any, step: int) -> dict[str, Any] | None:
    """Before a step's forward and after it: resident bytes; what moved since the step before."""
    if event == "backward":
        return None
    zero = engine.optimizer
    seen = {"event": event, "resident_bytes": zero.resident_state_bytes(), "counts": engine.selection.update_counts}
    if event == "step":
        numel = [0] * len(engine.selection.blocks)
        block_of = {name: block.index for block in engine.selection.blocks for name in block.parameter_names}
        for members, master in members_and_masters(zero):
            numel[block_of[zero.param_names[members[0]]]] += master.numel()
        traffic = engine.selection.traffic[-1]
        seen |= {"partition_numel": numel, "moved": (traffic.h2d_bytes, traffic.d2h_bytes)}
    return seen


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_states_on_the_accelerator_follow_the_formula(workers, case, ranks):
    moments_only = "keep_master" in case.section
    per_element = 8 if moments_only else 12
    for run in workers(ranks).run(train, case, observe):
        befores, afters = run["observed"][::2], run["observed"][1::2]
        numel = afters[0]["partition_numel"]
        resident: set[int] = set()
        updates = [0] * len(numel)
        for (_, phase, blocks), before, after in zip(run["history"], befores, afters, strict=True):
            selected = set(blocks)
            if phase == "exploit":  # there before the forward, so that the copies have all of it to hide under
                assert before["resident_bytes"] == per_element * sum(numel[block] for block in selected)
            # What arrives has the moments that its block has by now; what leaves was updated, so that it has all.
            arriving = sum(
                numel[block] * (0 if moments_only else 4) + numel[block] * (8 if updates[block] else 0)
                for block in selected - resident
            )
            leaving = per_element * sum(numel[block] for block in resident - selected)
            assert after["moved"] == (arriving, leaving)
            resident = selected
            for block in selected:
                updates[block] += 1
        last = afters[-1]["resident_bytes"]
        planned = run["plan"][2]
        assert last == per_element * sum(numel[block] for block in (resident if planned is None else planned))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("section", [SELECT, ALL])
def test_a_budget_is_kept(workers, section, stage):
    case = Case(stage=stage, section={**section, **NARROW}, steps=4)
    [run] = workers(1).run(train, case, observe)
    assert all(seen["resident_bytes"] <= case.section["state_budget_bytes"] for seen in run["observed"])
    assert any(seen["resident_bytes"] > 0 for seen in run["observed"])


def observe_repeats(event: str, engine: Any, step: int) -> tuple[int, int] | None:
    traffic = engine.selection.traffic
    return (traffic[-1].h2d_bytes, traffic[-1].d2h_bytes) if event == "step" else None


@pytest.mark.parametrize("stage", [2, 3])
def test_nothing_moves_where_the_selection_repeats(workers, stage):
    section = {"policy": "fixed", "fixed_blocks": ["model.layers.1", "final_norm"], **VISIT}
    case = Case(stage=stage, section=section, steps=4)
    [run] = workers(1).run(train, case, observe_repeats)
    assert run["observed"][0][0] > 0
    assert run["observed"][1:] == [(0, 0)] * 3
    assert all(first[2] == second[2] for first, second in pairwise(run["history"]))


def observe_all_moves(event: str, engine: Any, step: int) -> tuple[int, int] | None:
    traffic = engine.selection.traffic
    return (traffic[-1].h2d_bytes, traffic[-1].d2h_bytes) if event == "step" else None


@pytest.mark.parametrize(("stage", "budget_bytes"), [(2, 10**6), (3, 10**6), (2, 12 * 4500)])
def test_states_stay_where_there_is_room(workers, stage, budget_bytes):
    """In a million bytes all blocks have room: each comes once, and none leaves. In 54,000 some must."""
    case = Case(stage=stage, section={**SELECT, **VISIT, "state_budget_bytes": budget_bytes}, steps=12)
    [run] = workers(1).run(train, case, observe_all_moves)
    seen: set[int] = set()
    for (_, _, blocks), (h2d, d2h) in zip(run["history"], run["observed"], strict=True):
        if budget_bytes == 10**6:
            assert (h2d > 0) == bool(set(blocks) - seen) and d2h == 0
        seen |= set(blocks)
    assert sum(d2h for _, d2h in run["observed"]) > 0 or budget_bytes == 10**6
    [leaving] = workers(1).run(train, case.but(section={**SELECT, **VISIT}), observe_all_moves)
    assert_identical(leaving["weights"], run["weights"])
    assert sum(map(sum, run["observed"])) < sum(map(sum, leaving["observed"]))
