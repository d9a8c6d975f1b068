"""ZeRO-3's record of the order in which modules run, by which it prefetches their weights.

[Note: Trace] DeepSpeed records the modules of one forward and backward, and gathers the weights of those that come next
in the record ahead of time. It drops the record as soon as a step runs another module than the next one
(partitioned_param_coordinator.py:202). With frozen blocks a backward leaves modules out: those below the lowest
selected block, and within a layer those whose inputs and weights need no gradient. Here the record stays, and its place
moves on to the module that runs, so that one record of a whole backward serves every selection.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from ds_agsel.zero.compat.versions import refusal
from ds_agsel.zero.compat.views import attribute

_PRIVATE = "_PartitionedParameterCoordinator__"  # Python's mangling of class-private names
_NAMES = (f"{_PRIVATE}step_id", f"{_PRIVATE}submodule_order", f"{_PRIVATE}param_queue", "trace_prologue")


def has_trace(optimizer: DeepSpeedZeroOptimizer_Stage3) -> bool:
    """Return whether there is a record, or the step before has made one that the next forward takes over."""
    coordinator: Any = optimizer.parameter_offload.get_param_coordinator()
    return bool(coordinator.is_complete_trace() or (coordinator.is_record_trace() and _order(coordinator)))


def keep_trace(optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Let steps that leave modules out go on by the record: [Note: Trace]. Idempotent.

    Raises ConfigError if DeepSpeed keeps its record in another way.
    """
    coordinator: Any = optimizer.parameter_offload.get_param_coordinator()
    missing = [name for name in _NAMES if not hasattr(coordinator, name)]
    if missing:
        raise refusal([f"its {type(coordinator).__name__} has no {name}" for name in missing])
    if "trace_prologue" not in vars(coordinator):
        stock = coordinator.trace_prologue

        def prologue(module: Any) -> None:
            _move_on(coordinator, module)
            stock(module)

        coordinator.trace_prologue = prologue


@contextmanager
def own_trace(optimizer: DeepSpeedZeroOptimizer_Stage3) -> Iterator[None]:
    """Inside, a forward and backward of the model neither follow nor change the record: [Note: Trace].

    Nothing is gathered ahead of time, and weights whose module's backward did not end are released at the end. To be
    entered and left between steps, where no weight is in flight.
    """
    offload: Any = optimizer.parameter_offload
    apart = copy.copy(offload.param_coordinator)
    vars(apart).pop("trace_prologue", None)  # `keep_trace`'s is the other one's
    if apart.is_invalid_trace():
        apart._clear_trace_structures()  # else it would share its lists, which are appended to
    else:
        apart._invalidate_trace()
    with attribute(offload, param_coordinator=apart):
        try:
            yield
        finally:
            if hasattr(offload, "release_backward_leftovers"):  # 0.18.9 keeps no list of them
                offload.release_backward_leftovers()


def _order(coordinator: Any) -> Any:
    return getattr(coordinator, f"{_PRIVATE}submodule_order")


def _move_on(coordinator: Any, module: Any) -> None:
    """Let the place in the record be that of ``module``, if it comes later in it."""
    if not coordinator.is_complete_trace():
        return
    order, here = _order(coordinator), getattr(coordinator, f"{_PRIVATE}step_id")
    if here >= len(order) or order[here] is module:
        return
    there = next((place for place in range(here + 1, len(order)) if order[place] is module), None)
    if there is None:
        return
    setattr(coordinator, f"{_PRIVATE}step_id", there)
    queue = getattr(coordinator, f"{_PRIVATE}param_queue")
    while queue and queue[0].step_id_last_used_at < there:
        queue.popleft()
