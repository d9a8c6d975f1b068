"""Which blocks ran in a forward, from any way in, and none that only evaluated, failed or was a copy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_agsel.zero.forward_watch import ForwardWatch


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.ParameterList([nn.Parameter(torch.ones(2))])
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.gains[0]


class Model(nn.Module):
    """Blocks 0 and 1 are layers, 2 a part that not every batch uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), Part())
        self.part = nn.ModuleList([nn.Linear(2, 2)])
        self.fails = False

    def forward(self, x: Tensor, image: Tensor | None = None, reentrant: bool | None = None) -> Tensor:
        if image is not None:
            x = x + (self.part[0](image) if reentrant is None else self._checkpointed(image, reentrant))
        if self.fails:
            raise RuntimeError("out of memory")
        return self.body(x)

    def _checkpointed(self, image: Tensor, reentrant: bool) -> Tensor:
        return checkpoint(self.part[0], image, use_reentrant=reentrant)


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def begun() -> list[str]:
    return []


@pytest.fixture
def watch(model: Model, begun: list[str]) -> ForwardWatch:
    parts = [model.body[0], model.body[1], model.part]
    block_of = {id(p): block for block, part in enumerate(parts) for p in part.parameters()}
    return ForwardWatch(model, block_of, lambda: begun.append("forward"))


ONES = torch.ones(1, 2)


def ran(watch: ForwardWatch) -> list[bool]:
    return [watch.has_run(block) for block in range(3)]


def test_what_ran_since_the_window_began(model: Model, watch: ForwardWatch, begun: list[str]) -> None:
    model(ONES)
    assert ran(watch) == [True, True, False] and begun == ["forward"]
    model(ONES, image=ONES)
    assert ran(watch) == [True, True, True]
    watch.forget()
    assert ran(watch) == [False, False, False]


def test_a_part_of_the_model_is_a_way_in(model: Model, watch: ForwardWatch, begun: list[str]) -> None:
    model.body(ONES)
    assert ran(watch) == [True, True, False] and begun == ["forward"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_segments_ran(model: Model, watch: ForwardWatch, begun: list[str], reentrant: bool) -> None:
    loss = model(ONES, image=ONES.clone().requires_grad_(), reentrant=reentrant).sum()
    assert ran(watch) == [True, True, True]
    loss.backward()
    assert begun == ["forward"], "what backward computes again is no forward"


def test_evaluation_counts_for_nothing(model: Model, watch: ForwardWatch, begun: list[str]) -> None:
    with torch.no_grad():
        model(ONES, image=ONES)
    assert ran(watch) == [False, False, False] and begun == []


def test_a_forward_that_fails_counts_for_nothing(model: Model, watch: ForwardWatch) -> None:
    model.fails = True
    with pytest.raises(RuntimeError):
        model(ONES, image=ONES)
    model.fails = False
    model(ONES)
    assert ran(watch) == [True, True, False]
    try:
        raise ValueError("the retry may stand in the handler")
    except ValueError:
        model(ONES, image=ONES)
    assert ran(watch) == [True, True, True]


def test_a_copy_of_the_model_is_not_watched(model: Model, watch: ForwardWatch, begun: list[str]) -> None:
    copy.deepcopy(model)(ONES, image=ONES)
    assert ran(watch) == [False, False, False] and begun == []


def test_a_block_without_a_module_to_see_counts_as_run(watch: ForwardWatch) -> None:
    assert watch.has_run(7)


def test_removed_hooks_leave_the_model_as_it_was(model: Model, watch: ForwardWatch, begun: list[str]) -> None:
    watch.remove()
    model(ONES)
    assert begun == [] and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_parts_of_one_layer_are_told_apart_and_its_modules_are_not_ways_in(model: Model) -> None:
    """With granularity "module" a layer has many units: hooks at each of its modules would be a cost of every step."""
    parts = [model.body[0].weight, model.body[0].bias, *model.body[1].parameters(), *model.part.parameters()]
    block_of = {id(parameter): block for block, parameter in enumerate(parts)}
    wholes = ["0", "0", "1", "1", "1", "part", "part"]
    begun: list[str] = []
    watch = ForwardWatch(model, block_of, lambda: begun.append("forward"), wholes)
    assert watch._trunk == {id(model), id(model.body)}
    model(torch.ones(2))
    assert begun == ["forward"] and [watch.has_run(block) for block in range(7)] == [True] * 5 + [False] * 2
