"""What the sub-section gast refuses at start-up, and what it warns of."""

from __future__ import annotations

import pytest
import torch
from support import Case, ds_config, tiny_model
from torch import nn

from ds_agsel.entry.check import problems_of
from ds_agsel.zero import compat

GAST = {"gast": {}}


def problem(case: Case, model: nn.Module | None = None) -> str:
    problems = problems_of(ds_config(case), model)
    assert len(problems) == 1
    return problems[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("support", ["batch", "data"])
def test_every_stage_and_offload_is_taken(stage: int, offload: str, support: str) -> None:
    case = Case(stage=stage, offload=offload, section={"gast": {"support": support}})
    assert problems_of(ds_config(case), tiny_model(case)) == []


@pytest.mark.parametrize(
    "zero",
    [{"leaf_module": {"classes": ["LlamaMLP"]}}, {"stage3_module_granularity_threshold": 1000}],
    ids=["leaf_module", "threshold"],
)
def test_leaf_modules_of_stage_3_are_refused(zero: dict[str, object]) -> None:
    assert "can't be used with ZeRO-3's leaf modules" in problem(Case(stage=3, zero=zero, section=GAST))
    assert problems_of(ds_config(Case(stage=2, zero=zero, section=GAST))) == []


def test_leaf_modules_of_the_model_are_refused() -> None:
    from deepspeed.utils import set_z3_leaf_modules

    model = tiny_model(Case())
    set_z3_leaf_modules(model, [type(model.model.layers[0].mlp)])  # type: ignore[union-attr, index]
    assert compat.has_leaf_modules(model)
    assert "can't be used with ZeRO-3's leaf modules" in problem(Case(stage=3, section=GAST), model)


def test_compiled_layers_are_refused() -> None:
    model = tiny_model(Case())
    model.model.layers[0].compile()  # type: ignore[union-attr, index]
    assert "can't be used with compiled layers" in problem(Case(section=GAST), model)
    assert problems_of(ds_config(Case()), model) == []


def test_a_model_without_linears_in_its_layers_is_refused() -> None:
    class Convolutions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv1d(2, 2, 1) for _ in range(3))
            self.head = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    assert problem(Case(section=GAST), Convolutions()) == (
        "adagrad_select.gast chooses rows for the torch.nn.Linear modules of repeated layers, of which Convolutions "
        "trains none. Remove gast."
    )
