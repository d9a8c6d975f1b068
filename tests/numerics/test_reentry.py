"""`on_reentry`: moments that start anew or have decayed when their block is updated again; memory given back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from reference_runs import assert_follows_reference
from support import (
    FIRST,
    NARROW,
    SELECT,
    STATES,
    VISIT,
    Case,
    assert_identical,
    build,
    case_id,
    finish,
    forward_backward,
    observe_state,
    run_steps,
    train,
)
from test_overflow import EXPLOITS, EXPLORES, check_a_bad_step, poison
from test_reference import FP32
from test_resume import KINDS, check_resume
from test_travel import full_state, load, save
from torch.multiprocessing.reductions import StorageWeakRef

from ds_agsel.residency.states import MOMENTS

SLOW = pytest.mark.slow
RESET, DECAY = {**SELECT, "on_reentry": "reset"}, {**SELECT, "on_reentry": "decay"}
CASES = [
    Case(section=RESET),
    Case(stage=1, offload="cpu", accumulation=2, clip=0.3, section=RESET),
    Case(stage=3, offload="cpu", section=RESET, zero={"sub_group_size": 300}),
    Case(section={**RESET, **NARROW}),
    Case(stage=3, section={**RESET, **VISIT}, accumulation=2, clip=0.3),
    Case(stage=1, section=DECAY, decay_groups=True),
    Case(offload="cpu", section=DECAY, clip=0.3),
    Case(section={**DECAY, **VISIT}),
]
IN_PLACE = [CASES[0], Case(stage=1, section=RESET), Case(stage=3, section=RESET)]
WIDE = [
    Case(stage=stage, offload=offload, accumulation=accumulation, section=section)
    for stage, offload, accumulation, section in product((1, 2, 3), ("none", "cpu"), (1, 3), (RESET, DECAY))
] + [
    Case(section={**RESET, **FIRST, "on_reentry": "reset"}, accumulation=3, offload="cpu"),
    Case(section={**FIRST, **VISIT, "on_reentry": "reset"}, accumulation=2),
    Case(section={**RESET, **VISIT, "keep_master": "accelerator"}, stage=1),
    Case(section={**RESET, "policy": "random", "always_select": ["final_norm"]}),
    Case(section={**DECAY, **NARROW}, stage=3, zero={"sub_group_size": 300}),
    Case(section={**RESET, **VISIT, "policy": "cyclic", "select_every": 2}),
    Case(section={**DECAY, "policy": "cyclic", "select_every": 2}, offload="cpu"),
]
SWEEP = [
    *(pytest.param(case, marks=SLOW if index in (0, 2, 5) else []) for index, case in enumerate(CASES)),
    *(pytest.param(case, marks=SLOW) for case in WIDE if case not in CASES),
]
# Visiting with little room; in place, in every stage; on the host with stage 3.
HOMES = [CASES[3], *IN_PLACE, pytest.param(CASES[2], marks=SLOW)]
MOSTLY_TWO = [pytest.param(1, marks=SLOW), 2]


def steps_missed(history: list[tuple[int, str, tuple[int, ...]]]) -> list[int]:
    """For each update of a block after its first, the steps that it had missed."""
    last: dict[int, int] = {}
    missed = []
    for step, _, blocks in history:
        missed += [step - last[block] - 1 for block in blocks if block in last]
        last |= dict.fromkeys(blocks, step)
    return missed


@pytest.mark.parametrize("ranks", MOSTLY_TWO)
@pytest.mark.parametrize("case", SWEEP, ids=case_id)
def test_follows_the_reference(trained, case, ranks):
    runs = trained(case, ranks)
    assert any(steps_missed(runs[0]["history"]))
    assert_follows_reference(case, runs, FP32)


FROZEN = [
    CASES[3], CASES[6], CASES[1], CASES[4],
    *(pytest.param(case, marks=SLOW) for case in (*IN_PLACE, CASES[2], CASES[5], Case(stage=3, section=DECAY))),
]  # fmt: skip


@pytest.mark.parametrize("case", FROZEN, ids=case_id)
def test_unselected_blocks_are_as_they_were_but_for_what_is_given_back(trained, case):
    resets = case.section["on_reentry"] == "reset"
    for run in trained(case, 2):
        for (_, _, selected), (before, after) in zip(run["history"], pairwise(run["observed"]), strict=True):
            planned = after["plan"][2]
            for index, names in enumerate(run["blocks"].values()):
                of_block = [
                    (old, new)
                    for old, new in zip(before["partitions"], after["partitions"], strict=True)
                    if set(old["shapes"]) <= set(names)
                ]
                assert of_block
                for old, new in of_block:
                    if index not in selected:
                        kinds = STATES[:1] if resets else STATES
                        assert_identical({kind: old[kind] for kind in kinds}, {kind: new[kind] for kind in kinds})
                        assert_identical(before["weights"][names[0]], after["weights"][names[0]])
                        assert new["step"] == (0 if resets else old["step"])
                    if resets and not (index in selected and (planned is None or index in planned)):
                        assert new["step"] == 0 and not new["exp_avg"].any() and not new["exp_avg_sq"].any()
                    elif index in selected:
                        assert new["step"] == old["step"] + 1


def moments_by_block(engine: Any) -> dict[int, list[torch.Tensor]]:
    """The moments that exist, on the host and, where they visit, on the accelerator."""
    zero = engine.optimizer
    masters = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
    found: dict[int, list[torch.Tensor]] = {}
    for group, (block, master) in enumerate(zip(zero.home.block_of_group, masters, strict=True)):
        held = [zero.optimizer.state.get(master, {})]
        arrives = block in (engine.selection.planned_blocks or ())  # zeros may be made for its next update
        if hasattr(zero.home, "transfer") and group in zero.home.transfer._on_device and not arrives:
            held.append(zero.home.transfer.on_device(group))
        found.setdefault(block, []).extend(state[key] for state in held for key in MOMENTS if key in state)
    return found


def is_in_arena(engine: Any, tensor: torch.Tensor) -> bool:
    """Whether it is in the one piece of memory that all states on the accelerator have."""
    arena = getattr(getattr(engine.optimizer.home, "transfer", None), "_arena", None)
    return arena is not None and tensor.untyped_storage().data_ptr() == arena._memory.untyped_storage().data_ptr()


def watch_memory(case: Case) -> dict[str, Any]:
    """A run of ``case`` with, after each step, the bytes of moments, the moments' owners, and what outlives them."""
    held: dict[int, list[StorageWeakRef]] = {}

    def observe(event: str, engine: Any, step: int) -> Any:
        if event not in ("start", "step"):
            return None
        moments = moments_by_block(engine)
        owners = {block for block, tensors in moments.items() if tensors}
        kept = [block for block, storages in held.items() if block not in owners and not all(
            storage.expired() for storage in storages)]  # fmt: skip
        for block, tensors in moments.items():
            if engine.optimizer.home.is_on_disk:
                continue
            storages = [tensor.untyped_storage() for tensor in tensors if not is_in_arena(engine, tensor)]
            held.setdefault(block, []).extend(map(StorageWeakRef, storages))
        numel = {block: 0 for block in moments}
        for group, layout in enumerate(engine.optimizer.layouts()):
            numel[engine.optimizer.home.block_of_group[group]] += layout.numel
        return {
            "event": event,
            "owners": owners,
            "kept": kept,
            "bytes": engine.optimizer.state_bytes(),
            "expected": sum(8 * numel[block] for block in owners),
            "planned": engine.selection.planned_blocks,
        }

    return train(case, observe)


@pytest.mark.parametrize("case", HOMES, ids=case_id)
def test_the_memory_of_moments_follows_the_selection(workers, case):
    """Their storages are gone, on the host too; no link of an accessor keeps them."""
    for run in workers(2).run(watch_memory, case):
        after = [seen for seen in run["observed"] if seen["event"] == "step"]
        for (_, _, selected), seen in zip(run["history"], after, strict=True):
            expected = set(selected) if seen["planned"] is None else set(selected) & set(seen["planned"])
            assert seen["owners"] == expected
            assert seen["kept"] == []
            assert seen["bytes"] == seen["expected"]


@pytest.mark.parametrize("step", [EXPLORES, EXPLOITS])
@pytest.mark.parametrize("case", [CASES[3], *(pytest.param(case, marks=SLOW) for case in CASES[:2])],
                         ids=case_id)  # fmt: skip
def test_a_skipped_step_gives_nothing_back(workers, trained, case, step):
    check_a_bad_step(workers, trained, case, step)


# Its third step explores, and chooses none of the blocks that its second updates.
CHANGES = {**FIRST, "seed": 39, "on_reentry": "reset"}


def overflow_after_the_choice(case: Case, step: int) -> dict[str, Any]:
    """Train, with a try at ``step`` whose choice is made on the first micro-batch and whose second overflows."""
    engine = build(case)
    run_steps(engine, case, 0, step)
    before = observe_state("step", engine, step)
    chosen: list[Any] = []
    for micro_step in range(case.accumulation):
        remove: Callable[[], None] | None = None
        if micro_step:
            chosen = list(engine.selection.selected_blocks)
            name = engine.selection.blocks[chosen[0]].parameter_names[-1]
            remove = poison(dict(engine.module.named_parameters())[name], "all", float("inf"))
        forward_backward(engine, case, step, micro_step)
        engine.step()
        if remove is not None:
            remove()
    after = observe_state("step", engine, step)
    return finish(engine, run_steps(engine, case, step)) | {"before": before, "after": after, "chosen": chosen}


@pytest.mark.parametrize(
    "section",
    [pytest.param(CHANGES, marks=SLOW), {**CHANGES, **VISIT}],
    ids=["in place", "visiting"],
)
def test_a_choice_that_is_not_applied_gives_nothing_back(workers, trained, section):
    case = Case(section=section, accumulation=2, clip=0.3, steps=4)
    runs = workers(2).run(overflow_after_the_choice, case, 2)
    for expected, result in zip(trained(case, 2), runs, strict=True):
        assert [phase for _, phase, _ in expected["history"][:3]] == ["explore", "exploit", "explore"]
        assert set(expected["history"][1][2]).isdisjoint(result["chosen"])
        assert any(group["step"] for group in result["before"]["partitions"])
        assert_identical(result["before"], result["after"])
        for key in ("weights", "partitions", "history", "counts"):
            assert_identical(expected[key], result[key])


RESUMED = [
    Case(section=RESET, decay_groups=True),
    Case(stage=3, section={**DECAY, **VISIT}, accumulation=2),
    Case(offload="cpu", section=RESET, config={"scheduler": {"type": "OneCycle", "params": {
        "cycle_min_lr": 1e-3, "cycle_max_lr": 1e-2, "cycle_first_step_size": 3, "cycle_momentum": True}}}),
    Case(stage=3, offload="cpu", section=DECAY, clip=0.3),
    Case(section={**RESET, **NARROW}, stage=1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(case, kind, marks=[] if index < 2 and index == KINDS.index(kind) else SLOW)
        for (index, case), kind in product(enumerate(RESUMED), KINDS)
    ],
    ids=case_id,
)
def test_resume_is_bit_identical_to_not_stopping(workers, other_workers, tmp_path, case, kind):
    check_resume(workers, other_workers, tmp_path, case, kind, ranks=2)


@pytest.mark.parametrize("section", [RESET, pytest.param(DECAY, marks=SLOW)], ids=["reset", "decay"])
def test_another_rank_count_goes_on_from_the_same_state(workers, tmp_path, section):
    case = Case(section=section, offload="cpu")
    saved = workers(2).run(save, case, tmp_path)
    (loaded,) = workers(1).run(load, case, tmp_path)
    assert_identical(full_state(saved), full_state([loaded["loaded"]]))
    alone = workers(1).run(train, case)[0]  # other sums, the same steps
    assert loaded["history"] == alone["history"]


def read_moments(case: Case) -> list[dict[str, Any]]:
    """After each step, by parameter: whether its moments are zeros to the accessors, and its block."""
    from deepspeed.utils import safe_get_full_optimizer_state

    def observe(event: str, engine: Any, step: int) -> Any:
        if event != "step":
            return None
        owner = {name: block.index for block in engine.selection.blocks for name in block.parameter_names}
        return {
            "planned": engine.selection.planned_blocks,
            "has": {
                (owner[name], key): bool(safe_get_full_optimizer_state(parameter, key).any())
                for name, parameter in engine.module.named_parameters()
                for key in MOMENTS
            },
        }

    return train(case, observe)


@pytest.mark.parametrize("case", [CASES[0], *(pytest.param(case, marks=SLOW) for case in CASES[2:4])],
                         ids=case_id)  # fmt: skip
def test_accessors_answer_zeros_for_what_was_given_back(workers, case):
    for run in workers(2).run(read_moments, case):
        for (_, _, selected), seen in zip(run["history"], run["observed"], strict=True):
            kept = set(selected) if seen["planned"] is None else set(selected) & set(seen["planned"])
            assert {block for (block, _), has in seen["has"].items() if has} == kept
