"""A step with non-finite gradients is skipped: nothing changes, nothing is counted, the same rule applies again."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from support import (
    ALL,
    SELECT,
    Case,
    assert_identical,
    build,
    case_id,
    finish,
    forward_backward,
    fp16_allowed,
    observe_state,
    run_steps,
    train,
    train_all,
    where_it_runs,
)

CASES = [
    Case(stage=stage, offload=offload, dtype=dtype, clip=clip, steps=6)
    for stage, offload, dtype, clip in product((1, 2, 3), ("none", "cpu"), ("fp32", "bf16"), (0.0, 0.3))
    if (stage == 1) ^ (offload == "cpu") ^ (dtype == "bf16") ^ (clip > 0) and (stage != 3 or clip > 0)
]
CASES.append(Case(stage=3, offload="nvme", clip=0.3, steps=6))
EXPLORES, EXPLOITS = 3, 2  # of support.SELECT's steps


def poison(parameter: torch.nn.Parameter, ranks: str, value: float) -> Callable[[], None]:
    """Make every gradient of ``parameter`` ``value`` on rank 0, or on all, until the returned function is called."""
    here = ranks == "all" or torch.distributed.get_rank() == 0
    return parameter.register_hook(lambda grad: torch.full_like(grad, value) if here else grad).remove


def train_with_a_bad_step(case: Case, step: int, ranks: str, value: float) -> dict[str, Any]:
    """Train, with a bad try at ``step`` before the good one; what the bad one changed."""
    engine = build(case)
    run_steps(engine, case, 0, step)
    before = observe_state("step", engine, step)
    plan = engine.selection.plan
    block = plan.blocks[-1] if plan.blocks else 4
    parameters = dict(engine.module.named_parameters())
    remove = poison(parameters[engine.selection.blocks[block].parameter_names[-1]], ranks, value)
    run_steps(engine, case, step, step + 1)
    remove()
    after = observe_state("step", engine, step)
    skipped, traffic = engine.skipped_steps, len(engine.selection.traffic)
    result = finish(engine, run_steps(engine, case, step))
    return result | {"before": before, "after": after, "skipped_by_then": skipped, "traffic": traffic}


def check_a_bad_step(
    workers: Any, trained: Any, case: Case, step: int = EXPLORES, ranks: int = 2, value: float = float("inf")
) -> None:
    """Training of ``case`` in which ``step`` comes twice, with ``value`` in a gradient at first, is as without it."""
    runs = workers(ranks).run(train_with_a_bad_step, case, step, "one", value)
    for expected, result in zip(trained(case, ranks), runs, strict=True):
        assert result["skipped_by_then"] == 1 and result["traffic"] == step
        assert_identical(result["before"], result["after"])
        kept = ("weights", "partitions", "history", "counts", "plan")
        assert_identical({key: expected[key] for key in kept}, {key: result[key] for key in kept})


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("step", [EXPLORES, EXPLOITS])
@pytest.mark.parametrize("case", where_it_runs(CASES), ids=case_id)
def test_a_bad_step_changes_nothing(workers, trained, case, step, ranks):
    value = float("inf") if case.clip else float("nan")
    phase = trained(case, ranks)[0]["history"][step][1]
    assert phase == ("explore" if step == EXPLORES else "exploit")
    check_a_bad_step(workers, trained, case, step, ranks, value)


def poison_unselected(case: Case) -> dict[str, Any]:
    """Hooks that make every gradient of unselected blocks infinite, at the exploit steps."""

    def observe(event: str, engine: Any, step: int) -> None:
        for remove in removes:
            remove()
        removes.clear()
        if event == "start" and engine.selection.plan.blocks is not None:
            parameters = dict(engine.module.named_parameters())
            for block in engine.selection.blocks:
                if block.index not in engine.selection.plan.blocks:
                    removes.extend(poison(parameters[name], "all", float("inf")) for name in block.parameter_names)

    removes: list[Callable[[], None]] = []
    return train(case, observe)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage, offload", product((2, 3), ("none", "cpu")))
def test_what_is_not_selected_can_not_overflow(workers, trained, stage, offload, ranks):
    case = Case(stage=stage, offload=offload)
    for expected, result in zip(trained(case, ranks), workers(ranks).run(poison_unselected, case), strict=True):
        assert result["skipped"] == 0
        assert_identical(expected["weights"], result["weights"])


def two_bad_steps(case: Case) -> dict[str, Any]:
    """Overflow in the first micro-step of an accumulation window alone, twice in a row; then the run."""
    engine = build(case)
    name = engine.selection.blocks[2].parameter_names[0]
    for _ in range(2):
        remove = poison(dict(engine.module.named_parameters())[name], "all", float("inf"))
        for micro_step in range(case.accumulation):
            forward_backward(engine, case, 0, micro_step)
            engine.step()
            remove()
    skipped = engine.skipped_steps
    return finish(engine, run_steps(engine, case)) | {"skipped": skipped}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage, offload", product((1, 2, 3), ("none", "cpu")))
def test_overflow_in_an_accumulation_window_leaves_no_gradient_behind(workers, trained, stage, offload, ranks):
    case = Case(stage=stage, offload=offload, accumulation=3, steps=5)
    for expected, result in zip(trained(case, ranks), workers(ranks).run(two_bad_steps, case), strict=True):
        assert result["skipped"] == 2
        kept = ("weights", "partitions", "history", "counts", "plan")
        assert_identical({key: expected[key] for key in kept}, {key: result[key] for key in kept})


def train_in_fp16(cases: list[Case]) -> list[dict[str, Any]]:
    with fp16_allowed():
        return train_all(cases)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage, offload", [(2, "none"), (1, "cpu")])
def test_fp16_finds_its_loss_scale_and_trains(workers, stage, offload, ranks):
    """From 2**24 on down: seven steps overflow, whatever is selected, and every block is plain DeepSpeed."""
    scale = {"loss_scale": 0, "initial_scale_power": 24, "hysteresis": 1}
    case = Case(dtype="fp16", stage=stage, offload=offload, steps=10, config={"fp16": scale}, clip=0.3)
    cases = [case.but(section={**SELECT, "explore_rate": 0.5}), case.but(section=ALL), case.but(section=None)]
    for selective, whole, plain in workers(ranks).run(train_in_fp16, cases):
        assert selective["skipped"] >= 7
        assert len(selective["history"]) == case.steps - selective["skipped"]
        assert sum(selective["counts"]) == 2 * len(selective["history"])
        kept = ("losses", "norms", "weights", "partitions", "skipped")
        assert_identical({key: plain[key] for key in kept}, {key: whole[key] for key in kept})
