"""Page-locked memory is allocated as such, and after the first steps no more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from simulator import simulated
from support import SELECT, VISIT, Case, build, case_id, run_steps
from test_training import ON_DEVICE, ON_HOST
from torch.utils._python_dispatch import TorchDispatchMode
from workers import Workers


class _Copies(TorchDispatchMode):
    """Counts what is copied into new page-locked memory: `Tensor.pin_memory`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "pin_memory" in str(func)
        return func(*args, **(kwargs or {}))


def allocations(case: Case, steps_before: int) -> tuple[int, int]:
    """Page-locked allocations after the first ``steps_before`` steps, and copies into new page-locked memory in all."""
    accelerator = simulated(seed=1, strict=False)
    engine = build(case)
    with _Copies() as copies:
        run_steps(engine, case, last=steps_before)
        with accelerator.counting() as counts:
            run_steps(engine, case, first=steps_before)
    engine.destroy()
    accelerator.queue.finish()
    torch.accelerator.synchronize()
    return counts.pinned_allocations, copies.count


@pytest.mark.parametrize(
    ("case", "steps_before"),
    [
        (ON_DEVICE.but(section={**SELECT, **VISIT}, dtype="bf16", steps=24), 1),
        (ON_HOST.but(dtype="bf16", steps=24), 16),
        (ON_HOST.but(stage=3, dtype="bf16", steps=24), 16),
    ],
    ids=lambda value: case_id(value) if isinstance(value, Case) else "",
)
def test_page_locked_memory_is_made_once_and_never_copied_into(
    case: Case, steps_before: int, simulated_workers: Callable[[int], Workers]
) -> None:
    """States that visit have theirs before the first step, also those of blocks that are selected later."""
    [(late, copied)] = simulated_workers(1).run(allocations, case, steps_before)
    assert (late, copied) == (0, 0)
