"""Page-locked memory as torch's host allocator takes it, and the room for states that visit, are the estimator's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from simulator import simulated
from support import NARROW, SELECT, VISIT, Case, build, case_id, ds_config, param_groups, run_steps, tiny_model
from test_training import LEAN, ON_DEVICE
from workers import Workers

CASES = [
    ON_DEVICE.but(section={**SELECT, **VISIT}, dtype="bf16"),
    ON_DEVICE.but(section={**SELECT, **NARROW, "keep_master": "accelerator", "state_budget_bytes": 20000}),
    ON_DEVICE.but(section={**SELECT, **VISIT, **LEAN, "never_select": ["model.layers.1"]}, dtype="bf16"),
    ON_DEVICE.but(section={**SELECT, **VISIT}, stage=3, dtype="bf16", zero={"sub_group_size": 300}),
    ON_DEVICE.but(section={**SELECT, **VISIT, "on_reentry": "reset"}, dtype="bf16", steps=12),
]


def held(case: Case) -> dict[str, Any]:
    """What a run has taken on the host and on the accelerator for states."""
    accelerator = simulated(seed=3, strict=False)
    accelerator.empty_pinned_cache()
    before = accelerator.pinned_taken_bytes()
    engine = build(case)
    run_steps(engine, case)
    found = {
        "page-locked": accelerator.pinned_taken_bytes() - before,
        "of scores": engine.optimizer._host_squares.nbytes,
        "arena": engine.optimizer.home.transfer.arena_bytes,
        "blocks": {record.blocks for record in engine.selection.history},
    }
    engine.destroy()
    accelerator.queue.finish()
    return found


def estimated(case: Case, section: Mapping[str, Any]) -> tuple[int, int]:
    """Page-locked bytes and those of the arena, between late steps."""
    from ds_agsel.config import parse_section
    from ds_agsel.estimate.memory import selective_memory
    from ds_agsel.estimate.setup import MASTER_BYTES, read_setup
    from ds_agsel.estimate.shapes import shape_of
    from ds_agsel.estimate.steps import typical_step
    from ds_agsel.estimate.table import with_section
    from ds_agsel.lottery import build_lottery

    config, model = parse_section(section), tiny_model(case)
    shape = shape_of("tiny", model, None, param_groups(model, case))
    setup = with_section(read_setup(ds_config(case)), config)
    numels = [block.numel for block in shape.blocks]
    step = typical_step(numels, build_lottery(shape.blocks, config), "exploit", "worst", streaming=True)
    memory = selective_memory(shape, setup, "accelerator", step, moment="rest")
    there = memory.accelerator
    arena = there.staging + there.states + (there.master_weights if setup.keep_master == "host" else 0)
    if setup.master_weights == "split":  # and the buffers in which moments and masters of a group are updated
        arena -= 3 * MASTER_BYTES * max(numels)
    return memory.host.total, arena


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_what_states_take_that_visit_is_what_is_estimated(
    case: Case, simulated_workers: Callable[[int], Workers]
) -> None:
    [seen] = simulated_workers(1).run(held, case)
    page_locked, arena = estimated(case, case.section)
    assert seen["arena"] == arena
    of_scores = 1 << (seen["of scores"] - 1).bit_length()
    assert seen["page-locked"] - of_scores == page_locked
