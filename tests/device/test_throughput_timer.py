"""With states that visit, DeepSpeed's throughput timer does not wait for the device unless the user asks for it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from simulator import simulated
from support import SELECT, Case, build, run_steps
from workers import Workers

CASE = Case(steps=4, section=SELECT)
LINE = "timers.throughput.synchronized is set to false"
SYNCHRONIZED = {"timers": {"throughput": {"synchronized": True}}}


def waits_of_the_timer(case: Case) -> tuple[int, list[str]]:
    """How often the timer waited for the device in a run, and what was logged."""
    accelerator = simulated(seed=1)
    logged: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ds_agsel")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        engine = build(case)
        with accelerator.counting() as counts:
            run_steps(engine, case)
        engine.destroy()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        accelerator.queue.finish()
    return counts.waits_at("utils/timer.py").total(), [line for line in logged if LINE in line]


@pytest.mark.parametrize(
    ("case", "waits", "lines"),
    [
        (CASE, 0, 1),
        (CASE.but(config=SYNCHRONIZED), 4, 0),
        (CASE.but(offload="cpu"), 4, 0),  # nothing travels under the next step: left as it is
    ],
    ids=["visiting", "asked for", "on the host"],
)
def test_the_timer_waits_only_where_it_is_asked_to_or_does_no_harm(
    case: Case, waits: int, lines: int, simulated_workers: Callable[[int], Workers]
) -> None:
    [(found, logged)] = simulated_workers(1).run(waits_of_the_timer, case)
    assert (found, len(logged)) == (waits, lines)
