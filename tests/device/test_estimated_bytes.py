"""Page-locked memory as torch's host allocator takes it, and the room for states that visit, are the estimator's."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
from simulator import simulated
from support import NARROW, SELECT, VISIT, Case, build, case_id, ds_config, param_groups, run_steps, tiny_model
from test_training import LEAN, ON_DEVICE, ON_HOST, PINNED
from workers import Workers

CASES = [
    ON_DEVICE.but(section={**SELECT, **VISIT}, dtype="bf16"),
    ON_DEVICE.but(section={**SELECT, **NARROW, "keep_master": "accelerator", "state_budget_bytes": 20000}),
    ON_DEVICE.but(section={**SELECT, **VISIT, **LEAN, "never_select": ["model.layers.1"]}, dtype="bf16"),
    ON_DEVICE.but(section={**SELECT, **VISIT}, stage=3, dtype="bf16", zero={"sub_group_size": 300}),
    ON_DEVICE.but(section={**SELECT, **VISIT, "on_reentry": "reset"}, dtype="bf16", steps=12),
]
# Each step updates the same blocks, so that all of them need the same buffers.
FIXED = {**SELECT, "select_percent": 100, "never_select": ["model.layers.1"]}
OFFLOADED = [
    ON_HOST.but(section=FIXED, dtype="bf16", steps=3),
    ON_HOST.but(section={**FIXED, **LEAN}, dtype="bf16", accumulation=2, steps=3),
    ON_HOST.but(section=FIXED, stage=3, dtype="bf16", steps=3, zero={**PINNED, "sub_group_size": 300}),
]


def held(case: Case) -> tuple[int, int]:
    """The page-locked bytes that a run has taken, and those on the accelerator for states that visit."""
    from ds_agsel.zero import compat

    accelerator = simulated(seed=3, strict=False)
    accelerator.empty_pinned_cache()
    before = accelerator.pinned_taken_bytes()
    with mock.patch.object(compat, "give_back_page_locked", accelerator.empty_pinned_cache):
        engine = build(case)
        run_steps(engine, case)
    zero = engine.optimizer
    of_scores = 0 if zero._host_squares is None else 1 << (zero._host_squares.nbytes - 1).bit_length()
    page_locked = accelerator.pinned_taken_bytes() - before - of_scores
    arena = 0 if case.offload == "cpu" else zero.home.transfer.arena_bytes
    engine.destroy()
    accelerator.queue.finish()
    return page_locked, arena


def estimated(case: Case) -> tuple[int, int]:
    """What `held` returns, of the largest late step between steps."""
    from ds_agsel.config import parse_section
    from ds_agsel.estimate.memory import selective_memory
    from ds_agsel.estimate.setup import read_setup
    from ds_agsel.estimate.shapes import shape_of
    from ds_agsel.estimate.steps import typical_step
    from ds_agsel.estimate.table import with_section
    from ds_agsel.lottery import build_lottery

    config, model = parse_section(case.section), tiny_model(case)
    shape = shape_of("tiny", model, None, param_groups(model, case))
    setup = with_section(read_setup(ds_config(case)), config)
    lottery = build_lottery(shape.blocks, config)
    step = typical_step([block.numel for block in shape.blocks], lottery, "exploit", "worst", streaming=True)
    memory = selective_memory(shape, setup, "host" if case.offload == "cpu" else "accelerator", step, moment="rest")
    host, there = memory.host, memory.accelerator
    largest = 4 * max(map(sum, shape.groups)) * (setup.master_weights == "split")  # masters of a group, for its update
    if case.offload == "cpu":  # moments are not page-locked, nor are halves of master weights and those of stage 3
        masters = host.master_weights if case.stage < 3 and not largest else 0
        return masters + host.gradients + host.staging - largest + host.rounding, 0
    masters_there = there.master_weights if setup.keep_master == "host" else 0
    return host.total, there.staging - 3 * largest + there.states + masters_there


@pytest.mark.parametrize("case", [*CASES, *OFFLOADED], ids=case_id)
def test_what_is_taken_is_what_is_estimated(case: Case, simulated_workers: Callable[[int], Workers]) -> None:
    [seen] = simulated_workers(1).run(held, case)
    assert seen == estimated(case)
