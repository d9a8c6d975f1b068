"""A simulated accelerator for tests: DeepSpeed and torch see a device with memory, streams and late copies of its own.

``accelerator = simulated(seed=3, budget_bytes=10**6)`` at the start of a process makes it DeepSpeed's accelerator
there; later calls in the same process set seed, budget and strictness again. A process is simulated or is not.

device.py the accelerator object, backend.cpp memory and device guard, operators.py kernels, queue.py streams and
order, hazards.py missing waits, collectives.py ranks, counters.py what is asked of a device and where the host waits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from simulator.counters import Counts
from simulator.hazards import Hazard, Report, Site

_accelerator: Any = None


def simulated(
    budget_bytes: int = 1 << 40,
    seed: int = 0,
    strict: bool = True,
    allowed: Callable[[Report], bool] = lambda report: False,
    without: Collection[Site] = (),
    divides_as_cuda: bool = False,
) -> Any:
    """This process's `SimulatedAccelerator`, as DeepSpeed's accelerator too; the arguments are `configure`'s."""
    global _accelerator
    from deepspeed.accelerator import set_accelerator

    from simulator.device import SimulatedAccelerator

    if _accelerator is None:
        _accelerator = SimulatedAccelerator()
        set_accelerator(_accelerator)
    _accelerator.configure(budget_bytes, seed, strict, allowed, without, divides_as_cuda)
    return _accelerator


__all__ = ["Counts", "Hazard", "Report", "Site", "simulated"]
