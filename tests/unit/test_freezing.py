"""Two masks over one `requires_grad`: the user's choice stays apart from ours, and comes back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ds_agsel.zero.freezing import FreezeMask


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(2, 2)


def trainable(layer: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in layer.parameters()]


def test_what_the_user_froze_before_stays_frozen(layer: nn.Linear) -> None:
    layer.bias.requires_grad_(False)
    mask = FreezeMask()
    mask.put(layer.parameters())
    assert trainable(layer) == [False, False]
    mask.lift()
    assert trainable(layer) == [True, False]


def test_a_freeze_of_what_is_held_is_kept(layer: nn.Linear) -> None:
    mask = FreezeMask()
    mask.put(layer.parameters())
    layer.requires_grad_(False)
    mask.put(layer.parameters())
    mask.lift()
    assert trainable(layer) == [False, False]


def test_thawing_what_is_held_waits_for_the_lift(layer: nn.Linear) -> None:
    """PEFT's disable_adapter(): off, and on again."""
    mask = FreezeMask()
    mask.put(layer.parameters())
    layer.requires_grad_(False)
    layer.requires_grad_(True)
    assert trainable(layer) == [False, False]
    mask.lift()
    assert trainable(layer) == [True, True]


def test_an_assigned_thaw_is_put_back_and_remembered(layer: nn.Linear) -> None:
    mask = FreezeMask()
    mask.put(layer.parameters())
    layer.weight.requires_grad_(False)
    layer.weight.requires_grad = True
    mask.put(layer.parameters())
    assert trainable(layer) == [False, False]
    mask.lift()
    assert trainable(layer) == [True, True]


def test_a_thaw_of_what_the_user_had_frozen_is_the_users_new_choice(layer: nn.Linear) -> None:
    layer.bias.requires_grad_(False)
    mask = FreezeMask()
    mask.put(layer.parameters())
    layer.bias.requires_grad_(True)
    mask.put(layer.parameters())
    assert trainable(layer) == [False, False]
    mask.lift()
    assert trainable(layer) == [True, True]


def test_nothing_is_left_behind(layer: nn.Linear) -> None:
    mask = FreezeMask()
    mask.put(layer.parameters())
    mask.put(layer.parameters())
    held = copy.deepcopy(layer)
    mask.lift()
    mask.lift()
    assert all("requires_grad_" not in vars(parameter) for parameter in layer.parameters())
    held.requires_grad_(True)
    assert trainable(held) == [True, True], "a copy of a held parameter is nobody's"
    layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad is not None
