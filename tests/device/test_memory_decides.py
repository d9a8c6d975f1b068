"""`step_device: null` on an accelerator with memory of its own: states visit where they fit, else the host steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from simulator import simulated
from support import SELECT, Case, build, run_steps
from workers import Workers

CASE = Case(steps=2, config={"timers": {"throughput": {"enabled": False}}})


def where_it_steps(stage: int, section: dict[str, Any], available_bytes: int) -> tuple[bool, bool, int]:
    """Whether the run offloads, whether its states visit, and how many steps it took."""
    accelerator = simulated(seed=1)
    case = CASE.but(stage=stage, section=section)
    accelerator.available_memory = lambda device_index=None: available_bytes
    try:
        engine = build(case)
    finally:
        del accelerator.available_memory
    run_steps(engine, case)
    zero = engine.optimizer
    offloads = zero.offload_optimizer if stage == 3 else zero.cpu_offload
    found = (offloads, zero.resident_state_bytes() > 0, len(engine.selection.history))
    engine.destroy()
    accelerator.queue.finish()
    return found


@pytest.mark.parametrize(("stage", "ranks"), [(2, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize(
    ("budget_bytes", "available_bytes", "offloads"),
    [(None, 10**8, False), (None, 10**4, True), (10**12, 10**8, False)],  # a budget beyond all states needs them alone
)
def test_the_memory_there_is_decides(
    simulated_workers: Callable[[int], Workers],
    stage: int,
    ranks: int,
    budget_bytes: int | None,
    available_bytes: int,
    offloads: bool,
) -> None:
    section = {**SELECT, "state_budget_bytes": budget_bytes}
    for found in simulated_workers(ranks).run(where_it_steps, stage, section, available_bytes):
        assert found == (offloads, not offloads, 2)
