"""Epoch 1 of a raw training loop, which keeps its data loader to itself: found after the first step, and kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support import SELECT, Case, build, ds_config

SECTION = {key: value for key, value in SELECT.items() if key not in ("steps_per_epoch", "explore_decay")}
CASE = Case(model="net", section=SECTION)


def loader_of(case: Case, batches: int) -> torch.utils.data.DataLoader:
    rows = torch.zeros(batches, 8, dtype=torch.int64)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), batch_size=1)


def train_raw(case: Case, data: Any, steps: int, engine: Any = None) -> Any:
    """A loop of the user's own, which stops in epoch 1."""
    engine = engine or build(case)
    for index, (ids,) in enumerate(data):
        if index == steps * case.accumulation:
            break
        ids = torch.as_tensor(ids).to(engine.device)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    return engine


def lengths(case: Case, kind: str) -> Any:
    """The length that the policy knows before and after the first step, and the messages of this rank."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("ds_agsel")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        other = loader_of(case, 50)  # an evaluation's, not running
        if kind == "loader":
            # Rank 1 has a longer one: rank 0's counts.
            data: Any = loader_of(case, 12 + 2 * torch.distributed.get_rank())
        elif kind == "two loaders":
            running = iter(other)
            next(running)
            data = loader_of(case, 12)
        elif kind == "iterable":
            data = torch.utils.data.DataLoader(Endless())
        else:
            data = [(torch.zeros(1, 8, dtype=torch.int64),)] * 12
        engine = build(case)
        before = engine.selection.policy.steps_per_epoch
        train_raw(case, data, 2, engine)
        policy = engine.selection.policy
        found = {
            "before": before, "after": policy.steps_per_epoch, "rate": policy.explore_probability(1),
            "state": policy.state_dict(), "messages": messages, "phase": engine.selection.history[0].phase,
        }  # fmt: skip
        engine.destroy()
        return found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        while True:
            yield (torch.zeros(8, dtype=torch.int64),)


@pytest.mark.parametrize(
    ("case", "kind", "steps", "told"),
    [
        (CASE, "loader", 12, "epoch 1 is taken to have 12 steps: the DataLoader that the training loop iterates"),
        (CASE.but(accumulation=5), "loader", 3, "epoch 1 is taken to have 3 steps"),
        (CASE, "list", 1000, "assumed to have 1000 steps. Set adagrad_select.steps_per_epoch"),
        (CASE, "iterable", 1000, "assumed to have 1000 steps"),
        (CASE, "two loaders", 1000, "assumed to have 1000 steps"),
    ],
    ids=["loader", "accumulation", "list", "iterable", "two loaders"],
)
def test_the_running_loader_tells(workers, case, kind, steps, told):
    if kind in ("iterable", "list", "two loaders"):
        case = case.but(config={"steps_per_print": None})
    for rank, found in enumerate(workers(2).run(lengths, case, kind)):
        assert found["before"] is None and found["phase"] == "explore"
        assert found["after"] == steps and found["state"] == {"steps_per_epoch": steps}
        assert found["rate"] == pytest.approx(0.01 ** (1 / steps))
        assert any(told in message for message in found["messages"]) == (rank == 0)


def test_the_schedulers_length_is_taken_where_no_loader_runs(workers):
    scheduler = {"type": "WarmupDecayLR", "params": {"total_num_steps": 77, "warmup_num_steps": 2}}
    [found] = workers(1).run(lengths, CASE.but(config={"scheduler": scheduler}), "list")
    assert found["after"] == 77


def resumed(case: Case, folder: Path) -> list[Any]:
    engine = train_raw(case, loader_of(case, 12), 3)
    engine.save_checkpoint(str(folder))
    plan = engine.selection.plan
    engine.destroy()
    again = build(case)
    again.load_checkpoint(str(folder))
    found = [again.selection.policy.steps_per_epoch, again.selection.plan == plan]
    train_raw(case, loader_of(case, 40), 2, again)
    found.append(again.selection.policy.steps_per_epoch)
    again.destroy()
    return found


def test_a_resumed_run_keeps_the_length_that_was_found(workers, tmp_path):
    assert workers(1).run(resumed, CASE, tmp_path) == [[12, True, 12]]


def with_one_field(case: Case) -> int:
    assert ds_config(case)["adagrad_select"] == {"select_percent": 50}
    engine = train_raw(case, loader_of(case, 6), 6)
    steps = len(engine.selection.history)
    engine.destroy()
    return steps


def test_the_one_field_section_trains_in_a_raw_loop(workers):
    assert workers(1).run(with_one_field, CASE.but(section={"select_percent": 50})) == [6]
