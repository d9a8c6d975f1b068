"""A matrix of which some entries are trained, as the choice of rows sees it: scores and gradients of its carrier."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference_gast as twin
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ds_agsel.gast_section import GastConfig
from ds_agsel.samples.matrices import Entries
from ds_agsel.samples.record import Samples
from ds_agsel.samples.rows import RowChoice
from ds_agsel.samples.scores import Use
from ds_agsel.sparse.basis import choose
from ds_agsel.sparse.targets import Target, find_targets
from ds_agsel.sparse_grad_section import SparseGradConfig

ROWS, TOKENS = 5, 3


def target_of(rotation: str, d_in: int, d_out: int) -> Target:
    """The target of a Linear, its entries chosen by made-up energies."""
    section = SparseGradConfig(entries_percent=30.0, rotation=rotation, modules=["0.weight"])  # type: ignore[arg-type]
    model = nn.Sequential(nn.Linear(d_in, d_out, bias=False).double())
    (target,) = find_targets(model, section)
    target.attach()
    energy = target.new_energy(section.rotation, torch.device("cpu"))
    energy.add(torch.randn(target.num_lines, target.num_directions, generator=torch.Generator().manual_seed(1)))
    target.support = choose(energy, target.entries, torch.float64)
    return target


@pytest.mark.parametrize(("d_in", "d_out"), [(4, 7), (7, 4)])
@pytest.mark.parametrize("rotation", ["model", "both", "none"])
def test_scores_and_gradients_are_those_of_the_carriers_per_row_by_torch_func(
    rotation: str, d_in: int, d_out: int
) -> None:
    target = target_of(rotation, d_in, d_out)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, TOKENS, d_in, generator=generator, dtype=torch.float64)
    wanted = torch.randn(ROWS, TOKENS, d_out, generator=generator, dtype=torch.float64)
    linear, weight = nn.Linear(d_in, d_out, bias=False).double(), target.weight.detach()
    of_values = twin.what_entries_add(target).double()

    def loss(values: Tensor, x: Tensor, wanted: Tensor) -> Tensor:
        moved = weight + torch.tensordot(values, of_values, 1)
        return (functional_call(linear, {"weight": moved}, (x,)) - wanted).square().sum() / 2

    per_row = vmap(grad(loss), in_dims=(None, 0, 0))(torch.zeros_like(target.carrier), x, wanted)
    uses, matrix = [Use(x, x @ weight.T - wanted)], Entries(target)
    first = per_row[:2] @ per_row[2:].mean(0)
    second = per_row[2:] @ per_row[:2].mean(0)
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}  # `added_rows` is in fp32
    torch.testing.assert_close(matrix.of_halves(uses), torch.cat((first, second)).double(), **close)
    support = matrix.support_of([Use(x[3:], uses[0].dy[3:])])
    torch.testing.assert_close(matrix.against(uses, support), per_row @ per_row[3:].mean(0), **close)
    rows = torch.tensor([0, 3])
    torch.testing.assert_close(matrix.gradient(uses, rows, 2.5), 2.5 * per_row[rows].sum(0), **close)
    torch.testing.assert_close(matrix.gradient(uses, None, 1.0), per_row.sum(0), **close)


def test_energy_is_that_of_the_gradient_that_is_applied() -> None:
    target = target_of("none", 4, 7)
    use = Use(torch.randn(ROWS, TOKENS, 4).double(), torch.randn(ROWS, TOKENS, 7).double())
    target.energy = target.new_energy("none", torch.device("cpu"))
    Entries(target).gradient([use], torch.tensor([1]), 5.0)
    expected = 5 * use.dy[1].T @ use.x[1]
    torch.testing.assert_close(target.energy.lines, expected.square().sum(1).float())


def test_a_copy_of_the_model_has_no_tap() -> None:
    target = target_of("none", 4, 7)
    layers = nn.ModuleList([target.module])
    choice = RowChoice(layers, layers, {id(target.carrier): 0}, GastConfig(), 0, 0, Samples(1))
    assert choice.blocks == (0,) and target.tap is not None
    assert copy.copy(target.tap) is None and copy.deepcopy(target.tap) is None
    choice.remove()
    assert target.tap is None
