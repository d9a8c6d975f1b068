"""`master_weights: "split"`: they rest as the 16 bits that bfloat16 model weights lack."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import (
    SELECT,
    STATES,
    Case,
    assert_identical,
    build,
    case_id,
    finish,
    partitions,
    run_steps,
    train,
    weights,
)
from test_overflow import check_a_bad_step
from test_resume import KINDS, check_resume
from test_travel import full_state, load, save
from test_unselected import of_block

from ds_agsel.zero import compat
from ds_agsel.zero.states.halves import rounded
from ds_agsel.zero.storage import storage_bytes
from launch.methods.zero import Zero

SLOW = pytest.mark.slow
SPLIT = {**SELECT, "master_weights": "split"}
CASES = [
    Case(dtype="bf16", section={**SPLIT, "on_reentry": "decay"}, decay_groups=True),
    Case(stage=1, offload="cpu", dtype="bf16", accumulation=2, clip=0.3, section={**SPLIT, "state_dtype": "bf16"}),
    Case(stage=3, offload="cpu", dtype="bf16", section={**SPLIT, "on_reentry": "reset"}, zero={"sub_group_size": 300}),
    Case(model="net", stage=3, dtype="bf16", section={**SPLIT, "policy": "all"}),
]
WIDE = [
    Case(stage=stage, offload=offload, dtype="bf16", section={**SPLIT, "state_dtype": state_dtype, "policy": policy})
    for stage, offload, state_dtype, policy in product(
        (1, 2, 3), ("none", "cpu"), ("fp32", "bf16"), ("adagrad_select", "all")
    )
]
SWEEP = [*CASES, *(pytest.param(case, marks=SLOW) for case in WIDE)]


def as_fp32(case: Case) -> Case:
    return case.but(section={**case.section, "master_weights": "fp32"})


def round_weights(event: str, engine: Any, step: int) -> None:
    """Give the model of a run with fp32 master weights the rounding that split ones have."""
    zero = engine.optimizer
    with torch.no_grad():
        for index, master in enumerate(compat.masters(zero)):
            compat.partition_weights(zero, index).copy_(rounded(master))
    compat.spread_weights(zero)


def train_from_ties(case: Case, by_hand: bool) -> dict[str, Any]:
    """A run whose every master weight is first an exact tie; with ``by_hand`` the model is rounded outside."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    engine = build(case)
    for parameter in engine.module.parameters():
        value = safe_get_full_fp32_param(parameter).clone()
        ties = (value.view(torch.int32) & -0x10000 | 0x8000).view(torch.float32)
        safe_set_full_fp32_param(parameter, ties)
        assert torch.equal(safe_get_full_fp32_param(parameter), ties)
    if by_hand:
        round_weights("start", engine, 0)
    before = {"weights": weights(engine), "partitions": partitions(engine)}
    result = run_steps(engine, case, observe=round_weights if by_hand else None)
    return {"start": before, **finish(engine, result)}


@pytest.mark.parametrize("case", SWEEP, ids=case_id)
def test_masters_are_those_of_an_fp32_run_that_rounds_the_same_way(workers, case):
    split = workers(2).run(train_from_ties, case, False)
    for expected, actual in zip(workers(2).run(train_from_ties, as_fp32(case), True), split, strict=True):
        for key in ("start", "losses", "weights", "partitions", "history", "counts"):
            assert_identical(expected[key], actual[key])


def update_ties(case: Case) -> list[Any]:
    """Each parameter's master and model weight after updates that change nothing: exact ties throughout."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    def observe(event: str, engine: Any, step: int) -> None:
        if (event, step) == ("start", 0):
            for parameter in engine.module.parameters():
                value = safe_get_full_fp32_param(parameter)
                safe_set_full_fp32_param(parameter, (value.view(torch.int32) & -0x10000 | 0x8000).view(torch.float32))
            for group in engine.optimizer.param_groups:
                group["lr"] = 0.0

    engine = build(case)
    run_steps(engine, case, 0, 2, observe=observe)
    masters = {name: safe_get_full_fp32_param(each).clone() for name, each in engine.module.named_parameters()}
    model = weights(engine)
    engine.destroy()
    return [(masters[name], model[name]) for name in model]


@pytest.mark.parametrize("case", CASES[1:], ids=case_id)
def test_an_update_rounds_ties_away_from_zero(workers, case):
    case = case.but(section={**case.section, "policy": "all"})
    for run in workers(2).run(update_ties, case):
        for master, weight in run:
            assert ((master.view(torch.int32) & 0xFFFF) == 0x8000).all()
            assert torch.equal(weight.float(), rounded(master))


@pytest.mark.parametrize("case", [CASES[1], pytest.param(CASES[0], marks=SLOW)], ids=case_id)
def test_unselected_blocks_are_bit_identical(trained, case):
    for run in trained(case, 2):
        for (_, _, selected), (before, after) in zip(run["history"], pairwise(run["observed"]), strict=True):
            for index, names in enumerate(run["blocks"].values()):
                if index not in selected:
                    assert_identical(of_block(before, names), of_block(after, names))


def most_linked(engine: Any) -> int:
    """The largest storage of master weights that a parameter's accessors hold, in bytes."""
    mappings = [getattr(parameter, "_hp_mapping", None) for parameter in engine.module.parameters()]
    return max((storage_bytes([mapping.hp_fragment]) for mapping in mappings if mapping is not None), default=0)


def watch_memory(case: Case) -> dict[str, Any]:
    """At the start and after each step: storage of DeepSpeed's partitions and links, of the low halves and scratch."""

    def observe(event: str, engine: Any, step: int) -> Any:
        if event != "step" and (event, step) != ("start", 0):
            return None
        zero = engine.optimizer
        numels = [layout.numel for layout in zero.layouts()]
        return {
            "masters": storage_bytes(compat.masters(zero)),
            "links": most_linked(engine),
            "rests": (Zero.master_bytes(SimpleNamespace(engine=engine)), 2 * sum(numels)),
            "scratch": (zero.home.master_scratch_bytes(), 4 * max(numels) * (event == "step")),
        }

    return train(case, observe)


@pytest.mark.parametrize("case", CASES[:3], ids=case_id)
def test_no_fp32_master_weights_are_held(workers, case):
    for run in workers(2).run(watch_memory, case):
        for seen in run["observed"]:
            assert seen["masters"] <= 4 and seen["links"] <= 4  # zeros without storage
            assert seen["rests"][0] == seen["rests"][1]
            assert seen["scratch"][0] == seen["scratch"][1]


RESUMED = [
    pytest.param(case, kind, marks=[] if (index, KINDS.index(kind)) in ((1, 0), (2, 1)) else SLOW)
    for (index, case), kind in product(enumerate(CASES), KINDS)
]


@pytest.mark.parametrize(("case", "kind"), RESUMED, ids=case_id)
def test_resume_is_bit_identical_to_not_stopping(workers, other_workers, tmp_path, case, kind):
    check_resume(workers, other_workers, tmp_path, case, kind, ranks=2)


@pytest.mark.parametrize("case", [CASES[0], *(pytest.param(case, marks=SLOW) for case in CASES[1:])], ids=case_id)
def test_another_rank_count_goes_on_from_the_same_bits(workers, tmp_path, case):
    saved = workers(2).run(save, case, tmp_path)
    (loaded,) = workers(1).run(load, case, tmp_path)
    assert_identical(full_state(saved), full_state([loaded["loaded"]]))


def move_between_forms(case: Case, directory: Path) -> dict[str, Any]:
    """Save a run of each form, from exact ties on, and load it into one of the other: partitions, weights."""
    from deepspeed.utils import safe_set_full_fp32_param

    found: dict[str, Any] = {}
    for name, first, second in (("to split", as_fp32(case), case), ("to fp32", case, as_fp32(case))):
        engine = build(first)
        run_steps(engine, first, 0, 2)
        for parameter in engine.module.parameters():
            tie = torch.tensor(0x3F808000, dtype=torch.int32).view(torch.float32)
            safe_set_full_fp32_param(parameter, torch.full(getattr(parameter, "ds_shape", parameter.shape), tie.item()))
        engine.save_checkpoint(str(directory / name))
        before = partitions(engine)
        engine.destroy()
        engine = build(second.but(seed=99))
        engine.load_checkpoint(str(directory / name))
        found[name] = before, partitions(engine), weights(engine), most_linked(engine)
        finish(engine, run_steps(engine, second, 2, 4))
    return found


@pytest.mark.parametrize("case", [CASES[1], CASES[2], pytest.param(CASES[0], marks=SLOW)], ids=case_id)
def test_a_checkpoint_loads_into_the_other_form(workers, tmp_path, case):
    for found in workers(2).run(move_between_forms, case, tmp_path):
        for before, after, *_ in found.values():
            assert_identical(before, after)
        *_, loaded, linked = found["to split"]
        assert linked <= 4  # a zero without storage
        assert all((weight == 1.0078125).all() for weight in loaded.values())  # on every rank, whatever it holds


def test_a_skipped_step_changes_nothing(workers, trained):
    check_a_bad_step(workers, trained, CASES[1])


def read_and_set(case: Case) -> list[Any]:
    """A master weight and a moment by the accessors, before and after they are set, of two blocks."""
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
    )

    engine = build(case)
    run_steps(engine, case, 0, 1)
    counts = engine.selection.update_counts
    parameters = dict(engine.module.named_parameters())
    found = []
    for block in (counts.index(1), counts.index(0)):
        name = engine.selection.blocks[block].parameter_names[0]
        before = safe_get_full_fp32_param(parameters[name]).clone()
        value = torch.linspace(-1, 1, before.numel()).view(before.shape)
        safe_set_full_fp32_param(parameters[name], value)
        safe_set_full_optimizer_state(parameters[name], value, STATES[1])
        moment = safe_get_full_optimizer_state(parameters[name], STATES[1]).clone()
        found.append((value, safe_get_full_fp32_param(parameters[name]).clone(), weights(engine)[name], moment))
    finish(engine, run_steps(engine, case, 1, 3))
    return found


@pytest.mark.parametrize("case", [CASES[0], pytest.param(CASES[1], marks=SLOW), pytest.param(CASES[2], marks=SLOW)],
                         ids=case_id)  # fmt: skip
def test_accessors_answer_in_fp32_and_the_model_follows_what_is_set(workers, case):
    for rank in workers(2).run(read_and_set, case):
        for value, master, weight, moment in rank:
            assert torch.equal(master, value) and torch.equal(weight.float(), rounded(value))
            in_form = value.to(torch.bfloat16).float() if "state_dtype" in case.section else value
            assert torch.equal(moment, in_form)
