"""Ranks that were started with different settings are told which, on every rank, before DeepSpeed is called."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest
import torch
from support import SELECT, Case, build, finish, run_steps

CASE = Case(model="net", steps=1)
BLOCKS = {"first": [r"(embedding|layers\.[01])\..*"], "rest": [r"(layers\.[23]|norm|head)\..*"]}
OTHER_BLOCKS = {"first": [r"(embedding|layers\.0)\..*"], "rest": [r"(layers\.[123]|norm|head)\..*"]}


def error_of(case: Case, of_rank_1: Case, changes: dict[str, Any]) -> tuple[str, float]:
    """What this rank's `initialize` raised, and after how many seconds; ``changes`` are rank 1's."""
    import ds_agsel
    from ds_agsel.errors import ConfigError

    rank = torch.distributed.get_rank()
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        if rank == 1 and "version" in changes:
            stack.enter_context(_attribute(ds_agsel, "__version__", changes["version"]))
        arguments = {}
        if rank == 1 and "lr" in changes:
            arguments["optimizer"] = lambda parameters: torch.optim.AdamW(parameters, lr=changes["lr"])
        elif "lr" in changes:
            arguments["optimizer"] = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)
        try:
            build(of_rank_1 if rank == 1 else case, **arguments)
        except ConfigError as error:
            return str(error), time.monotonic() - began
    raise AssertionError("no error")


@contextlib.contextmanager
def _attribute(target, name, value):
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before)


@pytest.mark.parametrize(
    ("case", "of_rank_1", "changes", "told"),
    [
        (CASE, CASE.but(section={**SELECT, "seed": 7}), {}, "adagrad_select.seed on rank 1 (7 there, 2 on rank 0)"),
        (CASE, CASE.but(section={**SELECT, "select_percent": 50}), {},
         "adagrad_select on rank 1 (select_percent: 50.0 there, 34.0 on rank 0)"),
        (CASE, CASE.but(model="llama"), {}, "model on rank 1 (embedding.weight: absent there, "),
        (CASE.but(section={**SELECT, "blocks": BLOCKS}), CASE.but(section={**SELECT, "blocks": OTHER_BLOCKS}), {},
         "; blocks on rank 1 ("),
        (CASE, CASE.but(zero={"reduce_bucket_size": 400}), {},
         "ds_config on rank 1 (zero_optimization.reduce_bucket_size: 400 there, 500 on rank 0)"),
        (CASE, CASE.but(config={"optimizer": {"type": "AdamW", "params": {"lr": 2e-3}}}), {},
         "ds_config on rank 1 (optimizer.params."),
        (CASE, CASE, {"lr": 2e-3}, "param groups on rank 1 ([0].lr: 0.002 there, 0.001 on rank 0)"),
        (CASE, CASE, {"version": "0.0.9"}, "versions on rank 1 (ds_agsel: 0.0.9 there, "),
        (CASE, CASE.but(section={**SELECT, "steps_per_epoch": 7}), {}, "steps_per_epoch on rank 1 (7 there, "),
    ],
    ids=["seed", "section", "model", "blocks", "ds_config", "optimizer", "param groups", "versions", "steps_per_epoch"],
)  # fmt: skip
def test_every_rank_is_told_what_differs_and_where(workers, case, of_rank_1, changes, told):
    for message, seconds in workers(2).run(error_of, case, of_rank_1, changes):
        assert message.startswith("the ranks of this job do not agree with rank 0 on: ")
        assert told in message and "Start every rank with the same" in message
        assert seconds < 30


def test_an_error_of_one_rank_is_raised_on_the_others(workers):
    bad = CASE.but(section={**SELECT, "select_percent": 140})
    (first, _), (second, _) = workers(2).run(error_of, CASE, bad, {})
    assert first.startswith("rank 1 can't start: adagrad_select.select_percent=140")
    assert second.startswith("adagrad_select.select_percent=140")


def without_the_section(case: Case) -> str:
    import deepspeed

    if torch.distributed.get_rank() == 1:

        def stop(*args, **kwargs):
            raise RuntimeError("as plain DeepSpeed")

        with _attribute(deepspeed, "initialize", stop), pytest.raises(RuntimeError, match="as plain DeepSpeed"):
            import ds_agsel

            ds_agsel.initialize(model=torch.nn.Linear(1, 1), config={"train_batch_size": 4})
        return ""
    return error_of(case, case, {})[0]


def test_a_rank_without_the_section_is_named(workers):
    message, _ = workers(2).run(without_the_section, CASE)
    assert message.startswith("rank 1 has no enabled adagrad_select section")


def without_the_other(case: Case) -> str:
    from ds_agsel.entry import agreement

    if torch.distributed.get_rank() == 1:
        agreement.next_call()
        return ""
    with _attribute(agreement, "ARRIVAL_TIMEOUT_SECONDS", 1):
        return error_of(case, case, {})[0]


def test_a_rank_that_never_comes_is_named(workers):
    message, _ = workers(2).run(without_the_other, CASE)
    assert message.startswith("rank 1 did not come to ds_agsel.initialize within 1 s")


def train_with_other_monitors(case: Case, directory: str) -> Any:
    if torch.distributed.get_rank() == 0:
        case = case.but(config={"tensorboard": {"enabled": True, "output_path": directory}})
    engine = build(case)
    return finish(engine, run_steps(engine, case))["history"]


def test_ranks_may_report_to_different_places(workers, tmp_path):
    first, second = workers(2).run(train_with_other_monitors, CASE, str(tmp_path))
    assert first == second and len(first) == 1
