"""Each rank uses its own device from the first tensor and collective on: two ranks on one device can not meet."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from simulator import simulated
from support import SELECT, Case, build, run_steps
from workers import Workers

CASE = Case(steps=1, section=SELECT)


def order_of_a_run(case: Case, args: Any = None) -> list[tuple[str, int]]:
    """What touched a device, in a process that has set none."""
    accelerator = simulated(seed=1)
    engine = build(case, args=args)
    run_steps(engine, case)
    engine.destroy()
    accelerator.queue.finish()
    return accelerator.order()


@pytest.mark.parametrize("stage", [2, 3])
def test_the_device_is_set_before_anything_is_on_it(stage: int, simulated_workers: Callable[[int], Workers]) -> None:
    found = simulated_workers(2).run(order_of_a_run, CASE.but(stage=stage))
    assert found == [[("set_device", rank), ("tensor", rank), ("collective", rank)] for rank in range(2)]


def order_with_device_rank() -> list[tuple[str, int]]:
    return order_of_a_run(CASE, SimpleNamespace(device_rank=3 - torch.distributed.get_rank()))


def test_args_device_rank_goes_before_the_local_rank(simulated_workers: Callable[[int], Workers]) -> None:
    for rank, order in enumerate(simulated_workers(2).run(order_with_device_rank)):
        assert order == [(what, 3 - rank) for what in ("set_device", "tensor", "collective")]
