"""Peak bytes on an accelerator with memory of its own, phase by phase, against numbers of elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from simulator import simulated
from support import NARROW, SELECT, VISIT, Case, case_id, train
from test_training import ON_DEVICE
from workers import Workers

SLACK_BYTES = 4096  # the batch, the loss, norms, step counts: what is not as large as the model

CASES = [
    ON_DEVICE.but(section={**SELECT, **VISIT}, steps=5),
    ON_DEVICE.but(section={**SELECT, **NARROW}, steps=5),
    ON_DEVICE.but(section={**SELECT, **VISIT, "policy": "random"}, dtype="bf16", steps=5),
    ON_DEVICE.but(stage=3, section={**SELECT, **VISIT}, dtype="bf16", steps=4),
]


def weight_bytes(zero: Any) -> int:
    """With stage 3 of this rank's partitions, and of the parameters that are gathered now."""
    from ds_agsel.zero.storage import storage_bytes

    if not hasattr(zero, "fp16_groups"):
        return sum(flat.nbytes for flat in zero.bit16_groups_flat)
    gathered = [param for group in zero.fp16_groups for param in group if param.data.numel() == param.ds_numel]
    return storage_bytes([zero.lp_param_buffer, *gathered])  # on one rank the same storage


def train_and_weigh(case: Case) -> tuple[dict[str, Any], list[str]]:
    """A run, with the accelerator's bytes before each forward, after each backward and after each step."""
    from ds_agsel.zero import compat

    accelerator = simulated(seed=3, strict=False)
    start = accelerator.memory_allocated()

    def observe(event: str, engine: Any, step: int) -> dict[str, Any]:
        zero = engine.optimizer
        accelerator.synchronize()
        seen = {
            "event": event,
            "allocated": accelerator.memory_allocated() - start,
            "peak": accelerator.max_memory_allocated() - start,
            "weights": weight_bytes(zero),
            "resident": zero.resident_state_bytes(),
            "arena": zero.home.transfer.arena_bytes,
            "gradients": zero.held_gradient_bytes()[0],
            "partitions": [4 * master.numel() for master in compat.masters(zero)],
        }
        accelerator.reset_peak_memory_stats()
        return seen

    result = train(case, observe)
    accelerator.queue.finish()
    return result, [str(report) for report in accelerator.detector.found]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_bytes_on_the_accelerator_follow_the_formula(case: Case, simulated_workers: Callable[[int], Workers]) -> None:
    ((run, hazards),) = simulated_workers(1).run(train_and_weigh, case)
    assert not hazards
    per_state = 3  # master weight and two moments, fp32
    gradients_before = 0
    for seen in run["observed"]:
        # What is there between phases: the weights, the room for states that visit, the gradients that are held.
        held = seen["weights"] + seen["arena"] + seen["gradients"]
        assert held <= seen["allocated"] <= held + SLACK_BYTES
        states = [per_state * size for size in seen["partitions"]]
        selection = sum(sorted(states)[-len(run["history"][0][2]) :])
        given = case.section.get("state_budget_bytes")  # a cache, which is filled
        budget = given or sum(sorted(states)[-len(run["history"][0][2]) - 2 :])
        assert seen["resident"] <= (given or selection)
        alignment = 128 * per_state * len(states)
        assert seen["arena"] <= min(budget, sum(states)) * 33 / 32 + 2 * alignment
        if seen["event"] == "step":
            # The step's own: the fp32 gradient of one partition, and what torch's AdamW needs beside it (foreach:
            # two tensors as large), with the states in between inside their arena.
            working = 4 * max(seen["partitions"])
            assert seen["peak"] <= seen["weights"] + seen["arena"] + gradients_before + working + SLACK_BYTES
        gradients_before = seen["gradients"]
