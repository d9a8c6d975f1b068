"""What each step costs whatever it updates: collectives, and questions that the host asks of tensors."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from support import GRASS, MISA, MODULE, SELECT, TOPK, Case, case_id, train

ASKED = ("item", "tolist", "__bool__", "__float__", "__int__")
CASES = [
    Case(stage=stage, offload=offload, dtype="bf16", clip=0.5, steps=5)
    for stage, offload in product((1, 2, 3), ("none", "cpu"))
]
OF_MODULES, OBSERVING, PROBING = (
    [
        pytest.param(case.but(section=section), marks=() if place % 3 == number else pytest.mark.slow)
        for place, case in enumerate(CASES)
    ]
    for number, section in enumerate((MODULE, MISA, GRASS))
)


class StepWatch:
    """Counts, between backward and the end of each step, all-reduces by dtype, and questions asked of tensors."""

    def __init__(self) -> None:
        self.reductions: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self._patches = ExitStack()

    def observe(self, event: str, engine: Any, step: int) -> dict[str, Any] | None:
        if event == "backward":
            self._begin()
        elif event == "step":
            self._patches.close()
            return {"reductions": dict(self.reductions), "asked": self.asked.total()}
        return None

    def _begin(self) -> None:
        from deepspeed import comm

        self.reductions.clear()
        self.asked.clear()
        original = comm.all_reduce

        def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.reductions["float" if tensor.is_floating_point() else "flags"] += 1
            return original(tensor, *args, **kwargs)

        self._patches.enter_context(mock.patch.object(comm, "all_reduce", all_reduce))
        for name in ASKED:
            self._patches.enter_context(mock.patch.object(torch.Tensor, name, self._counted(name)))

    def _counted(self, name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def asked(tensor: torch.Tensor, *args: Any) -> Any:
            self.asked[name] += 1
            return original(tensor, *args)

        return asked


def watched(case: Case) -> list[tuple[str, dict[str, Any]]]:
    """(phase, what `StepWatch` counted) of each step."""
    run = train(case, StepWatch().observe)
    phases = [phase for _, phase, _ in run["history"]] if "history" in run else ["plain"] * case.steps
    return list(zip(phases, run["observed"], strict=True))


@pytest.mark.parametrize("case", [*CASES, *OF_MODULES, *OBSERVING, *PROBING], ids=case_id)
def test_all_norms_of_a_step_take_one_all_reduce(workers, case):
    """Of an explore step they are those of its scores, which ZeRO-2 and 3 take in backward.

    A policy that observes has them from the same one.
    """
    phases = {"exploit"} if case.section == MISA else {"explore", "exploit"}
    for steps in workers(2).run(watched, case):
        assert {phase for phase, _ in steps} == phases
        for phase, seen in steps:
            in_step = 0 if phase == "explore" and case.stage > 1 else 1
            assert seen["reductions"].pop("flags", 0) <= 1  # which blocks ran
            assert seen["reductions"] == ({"float": in_step} if in_step else {})


@pytest.mark.parametrize("case", [*CASES, *OF_MODULES], ids=case_id)
def test_an_exploit_step_asks_tensors_no_more_than_a_plain_one(workers, case):
    """What policies that observe ask besides is of tensors on the host: see tests/device/test_waits.py."""
    [ours], [plain] = (workers(1).run(watched, each) for each in (case, case.but(section=None)))
    least = min(seen["asked"] for _, seen in plain)
    assert all(seen["asked"] <= least for phase, seen in ours if phase == "exploit")


def explore_twice(case: Case) -> list[dict[str, Any]]:
    """Explore steps with one block a batch of scores, and with three."""
    from ds_agsel.zero import explore_stream

    with mock.patch.object(explore_stream, "SCORED_AT_ONCE", 2):  # of six blocks
        batched = train(case)
    return [train(case), batched]


@pytest.mark.parametrize("stage, offload", [(2, "none"), (2, "cpu"), (3, "none")])
def test_scores_taken_in_batches_give_the_same_choice(workers, stage, offload):
    case = Case(section=TOPK, stage=stage, offload=offload, steps=3)
    for alone, batched in workers(2).run(explore_twice, case):
        assert alone["history"] == batched["history"]
        assert alone["losses"] == batched["losses"]


def set_a_gradient(case: Case) -> dict[str, Any]:
    """An explore step, between whose backward and update the embedding's gradient is made as large as can be."""
    from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

    def observe(event: str, engine: Any, step: int) -> None:
        if event == "backward":
            for parameter in engine.module.parameters():
                gradient = safe_get_full_grad(parameter)
                if gradient is not None:
                    safe_set_full_grad(parameter, gradient * 0 + 1)

    return train(case, observe)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_gradient_set_after_it_was_scored_is_clipped_by_its_new_norm(workers, stage):
    case = Case(section={**SELECT, "explore_rate": 1, "explore_decay": 0}, stage=stage, clip=0.5, steps=1)
    for run in workers(2).run(set_a_gradient, case):
        numel = sum(run["weights"][name].numel() for block in chosen(run) for name in run["blocks"][block])
        assert run["norms"] == [pytest.approx(numel**0.5, rel=1e-6)]


def chosen(run: dict[str, Any]) -> list[str]:
    names = list(run["blocks"])
    return [names[index] for index in run["history"][0][2]]
