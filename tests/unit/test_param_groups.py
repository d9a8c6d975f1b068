"""Param groups: split by block, and following the user's groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_agsel.errors import ConfigError
from ds_agsel.param_groups import HyperparameterLink, as_param_groups, split_param_groups


@pytest.fixture
def parameters():
    return [nn.Parameter(torch.ones(2)) for _ in range(6)]


def test_split_keeps_hyperparameters_and_order(parameters):
    a, b, c, d, e, f = parameters
    f.requires_grad_(False)
    block_of = {a: 1, b: 0, c: 1, d: 0, e: 2}
    groups = [{"params": [a, b, c, f], "weight_decay": 0.1}, {"params": [d, e], "weight_decay": 0.0, "lr": 2.0}]

    split = split_param_groups(groups, block_of)

    assert [[id(p) for p in g["params"]] for g in split.groups] == [[id(b)], [id(a), id(c)], [id(d)], [id(e)]]
    assert (split.blocks, split.parents) == ((0, 1, 0, 2), (0, 0, 1, 1))
    assert [g["weight_decay"] for g in split.groups] == [0.1, 0.1, 0.0, 0.0]
    assert groups[0]["params"] == [a, b, c, f], "the caller's groups are not edited"


def test_a_parameter_of_another_model_is_refused(parameters):
    with pytest.raises(ConfigError, match=r"param group 0 .* shape \(2,\) that is not in the model"):
        split_param_groups([{"params": parameters[:1]}], {})


def test_model_parameters_come_as_tensors_or_groups_or_not_at_all(parameters):
    model = nn.ParameterList(parameters)
    assert as_param_groups(None, model) == [{"params": parameters}]
    assert as_param_groups(iter(parameters[:2]), model) == [{"params": parameters[:2]}]
    assert as_param_groups([{"params": parameters[0], "lr": 1}], model) == [{"params": [parameters[0]], "lr": 1}]


def test_children_follow_what_changes_in_their_parent_and_nothing_else():
    parents = [{"params": [], "lr": 1.0, "betas": (0.9, 0.999)}, {"params": [], "lr": 2.0}]
    children = [{"params": ["x"], "lr": 1.0}, {"params": ["y"], "lr": 2.0}, {"params": ["z"], "lr": 1.0}]
    link = HyperparameterLink(parents, (0, 1, 0))

    children[0]["lr"] = 7.0  # a scheduler that works on the split groups themselves
    link.push(children)
    assert [child["lr"] for child in children] == [7.0, 2.0, 1.0]

    parents[0]["lr"] = 0.5  # a scheduler that works on the user's optimizer
    link.push(children)
    assert [child["lr"] for child in children] == [0.5, 2.0, 0.5]
    assert "betas" not in children[0] and children[0]["params"] == ["x"]


def test_pull_gives_the_parents_what_a_checkpoint_put_into_the_children():
    parents = [{"params": [], "lr": 1.0}]
    children = [{"params": ["x"], "lr": 0.25}, {"params": ["y"], "lr": 0.25}]
    link = HyperparameterLink(parents, (0, 0))
    link.pull(children)
    assert parents[0] == {"params": [], "lr": 0.25}
    link.push(children)
    assert children[0]["lr"] == 0.25
