"""Flat gradient buffers: who holds one, what is used again, and that one block's costs don't grow with the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from unittest import mock

import pytest
import torch
from support import SELECT, Case, case_id, train

from ds_agsel.zero.gradient_buffers import FlatGradients

NUMELS = [4, 4, 6, 4]
# Sixteen matrices of 28 in a step, the first of which explores.
MODULES = {**SELECT, "granularity": "module", "select_percent": 60}


@pytest.mark.parametrize("zeroes", [True, False])
def test_a_buffer_of_equal_size_is_used_again(zeroes):
    buffers = FlatGradients(NUMELS, torch.float32, "cpu", pin_memory=False, zeroes=zeroes)
    assert buffers.add([0, 2]) == [0, 2] and buffers.add([0]) == []
    first = buffers.held[0].fill_(1)
    buffers.let_go([0, 3])  # the second has none
    assert set(buffers.held) == {2} and buffers.spare[0] is first
    assert buffers.add([1]) == [1]
    assert buffers.held[1] is first and not buffers.spare
    assert buffers.held[1].eq(0).all() == zeroes


def test_a_buffer_that_fits_nobody_is_freed_before_another_is_made():
    buffers = FlatGradients(NUMELS, torch.float32, "cpu", pin_memory=False)
    buffers.add([2])
    buffers.let_go([2])
    spare_at_allocation: list[int] = []
    with mock.patch.object(
        buffers, "_allocate", lambda numel: spare_at_allocation.append(len(buffers.spare)) or torch.zeros(numel)
    ):
        buffers.add([0])
    assert spare_at_allocation == [0] and set(buffers.held) == {0}


def count(case: Case) -> list[dict[str, Any]]:
    """Of each step: its phase and units, how many groups were asked buffers for, and calls of the base optimizer."""
    asked, calls = [0], [0]
    seen: list[dict[str, Any]] = []
    original = FlatGradients.add

    def add(self: FlatGradients, groups: Iterable[int]) -> list[int]:
        groups = list(groups)
        asked[0] += len(groups)
        return original(self, groups)

    def observe(event: str, engine: Any, step: int) -> None:
        base = engine.optimizer.optimizer
        if event == "start":
            asked[0] = calls[0] = 0
            update = base.step

            def counted(*arguments: Any, **keywords: Any) -> Any:
                calls[0] += 1
                return update(*arguments, **keywords)

            base.step = counted
        elif event == "step":
            del base.step
            record = engine.selection.history[-1]
            seen.append({"phase": record.phase, "units": len(record.blocks), "asked": asked[0], "calls": calls[0]})

    with mock.patch.object(FlatGradients, "add", add):
        train(case, observe)
    return seen


CASES = [Case(stage=stage, offload=offload, section=MODULES, steps=3) for stage, offload in ((2, "cpu"), (3, "cpu"))]


@pytest.mark.parametrize("case", [*CASES, CASES[1].but(offload="none")], ids=case_id)
def test_one_call_of_adam_updates_all_units_and_each_holds_its_buffer_once(workers, case):
    [steps] = workers(1).run(count, case)
    assert {step["phase"] for step in steps} == {"explore", "exploit"}
    kinds = 1 if case.offload == "none" else 2  # of buffers: with CPU offload of ZeRO-3 also in fp32
    for step in steps:
        assert step["units"] >= 10
        assert step["calls"] == 1
        if step["phase"] == "explore":
            assert step["asked"] <= 3 * kinds * 28
