"""Where states are kept: which home is chosen, and what it leaves behind after loads, writes and exceptions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from support import SELECT, VISIT, Case, build, case_id, forward_backward, run_steps, where_it_runs
from torch import Tensor

from ds_agsel.zero import update_batches

VISITING = {**SELECT, **VISIT}
CASES = [
    Case(stage=2),
    Case(stage=2, offload="cpu"),
    Case(stage=3, section=VISITING),
    Case(stage=3, offload="nvme"),
    Case(stage=3, offload="nvme", section={**SELECT, "state_dtype": "bf16"}),
    Case(stage=3, offload="nvme", dtype="bf16", section={**SELECT, "master_weights": "split"}),
]
HOMES = [
    "StatesInPlace", "StatesInPlace", "VisitingStates", "StatesOnNvme", "PackedStatesOnNvme", "SplitStatesOnNvme",
]  # fmt: skip
MODES = pytest.mark.parametrize("stage", [2, 3])


def home_and_bytes(case: Case) -> tuple[str, int, int]:
    engine = build(case)
    run_steps(engine, case, 0, 1)
    found = engine.optimizer.home.bytes()
    name = type(engine.optimizer.home).__name__
    engine.destroy()
    return name, found.moments, found.visiting


@pytest.mark.parametrize("case", where_it_runs(CASES), ids=case_id)
def test_each_configuration_has_its_home(workers, case):
    [(name, moments, visiting)] = workers(1).run(home_and_bytes, case)
    assert name == HOMES[CASES.index(case)]
    assert moments > 0
    assert (visiting > 0) == (name == "VisitingStates")


def load_into_a_run(case: Case, folder: str) -> bool:
    engine = build(case)
    run_steps(engine, case, 0, 2)
    engine.save_checkpoint(folder, tag="a")
    transfer = engine.optimizer.home.transfer
    engine.load_checkpoint(folder)
    run_steps(engine, case, 2, 4)
    same = engine.optimizer.home.transfer is transfer
    engine.destroy()
    return same


@MODES
def test_a_load_keeps_the_streams_and_the_memory_of_visiting_states(workers, stage, tmp_path):
    """New ones would leave the allocator's pool of the old streams behind: as much as the budget, for good."""
    assert workers(1).run(load_into_a_run, Case(stage=stage, section=VISITING), str(tmp_path)) == [True]


def write_one_block(case: Case) -> dict[str, Any]:
    """Visiting bytes before and after the states of one resident block were written; its master then, and later."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    engine = build(case)
    run_steps(engine, case, 0, 2)
    home, selection = engine.optimizer.home, engine.selection
    resident = sorted(home.transfer.resident)
    name = selection.blocks[resident[0]].parameter_names[0]
    parameter = dict(engine.module.named_parameters())[name]
    before = home.bytes().visiting
    value = torch.full(getattr(parameter, "ds_shape", parameter.shape), 0.5)
    safe_set_full_fp32_param(parameter, value)
    after = sorted(home.transfer.resident)
    found = safe_get_full_fp32_param(parameter).clone()
    engine.destroy()
    return {"resident": resident, "before": before, "after": after, "is_set": torch.equal(found.cpu(), value)}


@MODES
def test_a_write_sends_its_own_block_home_and_no_other(workers, stage):
    section = {"policy": "fixed", "fixed_blocks": ["model.layers.1", "final_norm"], **VISIT}
    [seen] = workers(1).run(write_one_block, Case(stage=stage, section=section))
    assert seen["before"] > 0 and seen["is_set"]
    assert seen["after"] == seen["resident"][1:]


class Interrupt(Exception):
    """Raised in the middle of an update."""


def interrupt(case: Case) -> dict[str, Any]:
    """A step that an exception ends at its second group: what DeepSpeed's lists name then, and each master's change."""
    engine = build(case)
    run_steps(engine, case, 0, 2)
    zero = engine.optimizer
    masters = zero.fp32_partitioned_groups_flat if case.stage == 3 else zero.single_partition_of_fp32_groups
    before_names = [id(master) for master in masters]
    with zero.home.readable():
        before = [master.detach().clone() for master in masters]
    forward_backward(engine, case, 2, 0)
    bring, calls = zero._bring_gradients, []

    def failing(shown: Sequence[int]) -> Tensor:
        calls.append(shown)
        if len(calls) == 2:
            raise Interrupt
        return bring(shown)

    zero._bring_gradients = failing
    with mock.patch.object(update_batches, "BATCH_NUMEL", 1), pytest.raises(Interrupt):  # each group is a batch
        engine.step()
    same = before_names == [id(master) for master in masters]
    with zero.home.readable():
        changed = [not torch.equal(old, master.detach()) for old, master in zip(before, masters, strict=True)]
    engine.destroy()
    return {"same": same, "changed": sum(changed)}


@MODES
def test_an_exception_in_an_update_puts_the_hosts_tensors_back_and_keeps_what_was_updated(workers, stage):
    section = {"policy": "fixed", "fixed_blocks": ["model.layers.1", "model.layers.2"], **VISIT}
    case = Case(stage=stage, section=section, decay_groups=True)  # two groups a block: the exception parts them
    assert workers(1).run(interrupt, case) == [{"same": True, "changed": 1}]
