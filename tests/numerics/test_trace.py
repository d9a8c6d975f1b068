"""ZeRO-3's prefetch by a recorded order: one record serves every selection."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any
from unittest import mock

import pytest
from support import Case, case_id, train

GATHERING = {"stage3_param_persistence_threshold": 0}
RANDOM = {"policy": "random", "select_percent": 34, "steps_per_epoch": 4, "seed": 5}
CASES = [
    Case(stage=3, zero=GATHERING, steps=7),
    # little is gathered ahead, and weights go as soon as they can
    Case(stage=3, zero={**GATHERING, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 600}, steps=7),
]


def count(case: Case, checkpointing: bool = False) -> list[tuple[bool, int, int, int]]:
    """Of each step: whether it went by a record from its start, lost records, calls that gather weights, and the most
    elements that were whole at one of them."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    gather = "_PartitionedParameterCoordinator__all_gather_params_"
    calls: Counter[str] = Counter()
    has_record = False
    most_whole = 0
    parameters: list[Any] = []
    found: list[tuple[bool, int, int, int]] = []

    def observe(event: str, engine: Any, step: int) -> None:
        nonlocal most_whole
        if event == "start":
            if checkpointing:
                engine.module.gradient_checkpointing_enable({"use_reentrant": False})
            parameters[:] = engine.module.parameters()
            calls.clear()
            most_whole = 0
        elif event == "step":
            found.append((has_record, calls["_invalidate_trace"], calls[gather], most_whole))

    def counted(name: str) -> Any:
        stock = getattr(Coordinator, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal has_record, most_whole
            calls[name] += 1
            stock(self, *args, **kwargs)
            if name == "reset_step":
                has_record = self.is_complete_trace()
            elif name == gather:
                there = [p.ds_numel for p in parameters if p.ds_status is not ZeroParamStatus.NOT_AVAILABLE]
                most_whole = max(most_whole, sum(there))

        return mock.patch.object(Coordinator, name, call)

    with counted("reset_step"), counted("_invalidate_trace"), counted(gather):
        train(case, observe)
    return found


WIDE = [
    pytest.param(case, granularity, checkpointing, marks=pytest.mark.slow)
    for case, granularity, checkpointing in product(CASES, ("block", "module"), (False, True))
    if (case, granularity, checkpointing) not in ((CASES[0], "block", True), (CASES[1], "module", False))
]


@pytest.mark.parametrize(
    ("case", "granularity", "checkpointing"),
    [(CASES[0], "block", True), (CASES[1], "module", False), *WIDE],
    ids=lambda value: case_id(value) if isinstance(value, Case) else str(value),
)
def test_one_record_of_the_modules_order_serves_every_selection(
    workers: Any, case: Case, granularity: str, checkpointing: bool
) -> None:
    """No step gathers more than plain DeepSpeed's, or has more weights whole at once."""
    [plain] = workers(1).run(count, case.but(section=None), checkpointing)
    [ours] = workers(1).run(count, case.but(section={**RANDOM, "granularity": granularity}), checkpointing)
    assert [has_record for has_record, *_ in ours] == [False] + [True] * (case.steps - 1)
    assert not any(lost for _, lost, *_ in ours)
    _, _, gathers, whole = plain[-1]
    assert all(step[2] <= gathers and step[3] <= whole for step in ours[1:])
