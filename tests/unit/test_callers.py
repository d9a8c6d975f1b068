"""What is read off the call stack: the frameworks' own classes are looked for, and theirs alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import DataLoader, IterableDataset

from ds_agsel.entry import callers, frames


class Endless(IterableDataset[int]):
    def __iter__(self) -> Any:
        yield from range(100)


class Trainer(transformers.Trainer):
    """The locals of Trainer._prepare_for_training, which is where Accelerate is called from (transformers 5)."""

    def __init__(self) -> None:
        pass

    def prepare(self, train_dataloader: DataLoader[Any], max_steps: int) -> Any:
        return self.deeper()

    def deeper(self) -> Any:
        return callers.steps_per_epoch(accumulation=2)


@pytest.mark.parametrize(
    ("data", "max_steps", "expected"),
    [
        (list(range(9)), 40, (5, "the Trainer's data loader")),
        (Endless(), 40, (40, "the Trainer's max_steps, as its data have no length")),
        (Endless(), -1, None),
    ],
    ids=["length", "iterable", "iterable without max_steps"],
)
def test_a_trainers_epoch(data: Any, max_steps: int, expected: tuple[int, str] | None) -> None:
    assert Trainer().prepare(DataLoader(data, batch_size=1), max_steps) == expected


def test_nobody_knows_outside_a_framework() -> None:
    assert callers.steps_per_epoch(1) is None
    assert not callers.only_evaluates()


def test_methods_are_found_by_class_and_innermost_first() -> None:
    class Inner(torch.nn.Module):
        def forward(self, number: int) -> list[int]:
            if number:
                found: list[int] = self(number - 1)
                return found
            return [frame.f_locals["number"] for _, frame in frames.methods_of(*where) if "number" in frame.f_locals]

    where = ("torch.nn", "Module")
    assert Inner()(2) == [0, 1, 2]
    assert list(frames.methods_of("no_such_module", "Module")) == []
    assert list(frames.methods_of("torch.nn", "functional")) == []
