"""Lean states that visit the accelerator: the bits of those that stay, and fewer bytes on the way."""

from __future__ import annotations

import importlib.util
from itertools import product
from typing import Any

import pytest
from support import SELECT, VISIT, Case, assert_identical, case_id, train
from test_packed import read_and_set
from test_resume import KINDS, resume, save_and_go_on

from ds_agsel.zero.states.forms import FORMS

SLOW = pytest.mark.slow
NEEDS_LIBRARY = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (ds-agsel[lowbit])"
)
SPLIT = {**SELECT, **VISIT, "master_weights": "split"}
EIGHT = Case(dtype="bf16", section={**SPLIT, "state_dtype": "int8", "on_reentry": "decay"}, decay_groups=True)
HALF = Case(
    stage=3, section={**SELECT, **VISIT, "state_dtype": "bf16", "state_budget_bytes": 8 * 1900},
    zero={"sub_group_size": 300},
)  # fmt: skip
LOW = Case(model="net", stage=1, dtype="bf16", accumulation=2, section={**SPLIT, "on_reentry": "reset"})
KEPT = Case(dtype="bf16", clip=0.3, section={**SPLIT, "state_dtype": "bf16", "keep_master": "accelerator"})
CASES = [pytest.param(EIGHT, marks=NEEDS_LIBRARY), HALF, LOW, KEPT]
WIDE = [
    pytest.param(
        Case(stage=stage, dtype="bf16", section={
            **SELECT, **VISIT, "state_dtype": form, "master_weights": masters, "keep_master": keep,
            "on_reentry": reentry,
        }), marks=[SLOW, NEEDS_LIBRARY],
    )
    for stage, form, masters, keep, reentry in product(
        (2, 3), ("bf16", "int8"), ("fp32", "split"), ("host", "accelerator"), ("keep", "reset")
    )
]  # fmt: skip


def in_place(case: Case) -> Case:
    left_out = ("step_device", "state_budget_bytes", "keep_master")
    return case.but(section={key: value for key, value in case.section.items() if key not in left_out})


@pytest.mark.parametrize("case", [*CASES, *WIDE], ids=case_id)
def test_the_bits_are_those_of_states_that_stay(trained, case):
    for expected, visiting in zip(trained(in_place(case), 2), trained(case, 2), strict=True):
        for key in ("losses", "weights", "partitions", "history", "counts"):
            assert_identical(expected[key], visiting[key])
        for stays, visits in zip(expected["observed"], visiting["observed"], strict=True):
            assert_identical(stays["partitions"], visits["partitions"])


def observe(event: str, engine: Any, step: int) -> dict[str, Any] | None:
    """After a step: what moved in it, and what each block takes where it rests."""
    if event != "step":
        return None
    zero, config, traffic = engine.optimizer, engine.selection.config, engine.selection.traffic[-1]
    moments, masters = [0] * len(engine.selection.blocks), [0] * len(engine.selection.blocks)
    for layout, block in zip(zero.layouts(), zero.home.block_of_group, strict=True):
        rooms = FORMS[config.state_dtype].rooms(layout.numel).values()
        moments[block] += sum(numel * dtype.itemsize for numel, dtype in rooms)
        if config.keep_master == "host":
            masters[block] += layout.numel * (2 if config.master_weights == "split" else 4)
    return {
        "moments": moments, "masters": masters, "moved": (traffic.h2d_bytes, traffic.d2h_bytes),
        "resident": zero.resident_state_bytes(), "planned": engine.selection.planned_blocks,
        "on accelerator": zero.accelerator_state_bytes(),
    }  # fmt: skip


@pytest.mark.parametrize("case", [CASES[0], KEPT], ids=case_id)
def test_they_travel_and_rest_there_as_they_are_kept(workers, case):
    for run in workers(2).run(train, case, observe):
        resident, updated = set(), set()
        for (_, _, blocks), seen in zip(run["history"], run["observed"], strict=True):
            selected, moments, masters = set(blocks), seen["moments"], seen["masters"]
            arriving = sum(masters[block] + moments[block] * (block in updated) for block in selected - resident)
            leaving = sum(masters[block] + moments[block] for block in resident - selected)
            assert seen["moved"] == (arriving, leaving)
            resident = selected
            updated |= selected
            there = selected if seen["planned"] is None else seen["planned"]
            assert seen["resident"] == sum(masters[block] + moments[block] for block in there)
            assert seen["on accelerator"] == sum(moments[block] for block in there)


@pytest.mark.parametrize("case", [CASES[0], pytest.param(HALF, marks=SLOW), pytest.param(LOW, marks=SLOW)], ids=case_id)
def test_resume_is_bit_identical_to_not_stopping(workers, other_workers, tmp_path, case):
    whole = workers(2).run(train, case)
    workers(2).run(save_and_go_on, case, tmp_path, KINDS[0])
    for expected, resumed in zip(whole, other_workers(2).run(resume, case, tmp_path), strict=True):
        for key in ("weights", "partitions", "history", "counts", "plan"):
            assert_identical(expected[key], resumed[key])


@pytest.mark.parametrize("case", [KEPT, pytest.param(HALF, marks=SLOW)], ids=case_id)
def test_accessors_answer_as_for_states_that_stay(workers, case):
    for expected, found in zip(
        workers(2).run(read_and_set, in_place(case)), workers(2).run(read_and_set, case), strict=True
    ):
        assert_identical(expected, found)
