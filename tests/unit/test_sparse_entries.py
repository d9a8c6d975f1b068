"""The trained entries of a matrix: the staircase, the basis, their gradient, and where they are found in a model."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from ds_agsel.errors import ConfigError
from ds_agsel.sparse import staircase
from ds_agsel.sparse.basis import Energy, Support, choose, draw
from ds_agsel.sparse.linear import added_rows, entries_gradient
from ds_agsel.sparse.targets import Target, detach_all, find_targets
from ds_agsel.sparse_grad_section import SparseGradConfig

LINES, DIRECTIONS = 37, 12
ROTATIONS = ["model", "both", "none"]


def gradients(count: int = 4, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    return [normal(LINES, 3) @ normal(3, DIRECTIONS) + 0.1 * normal(LINES, DIRECTIONS) for _ in range(count)]


def energy_of(rotation: str) -> Energy:
    energy = Energy.zero(rotation, LINES, DIRECTIONS, torch.device("cpu"))
    for gradient in gradients():
        energy.add(gradient)
    return energy


@pytest.mark.parametrize("entries", [1, 5, 100, LINES * DIRECTIONS])
@pytest.mark.parametrize("ties", [False, True])
def test_the_staircase_holds_the_largest_products_and_ties_go_to_the_lower_line(entries, ties):
    generator = torch.Generator().manual_seed(entries)
    lines = torch.rand(LINES, generator=generator)
    directions = torch.rand(DIRECTIONS, generator=generator).sort(descending=True).values
    if ties:
        lines, directions = (lines * 3).round(), (directions * 3).round()
    lengths = staircase.prefix_lengths(lines, directions, entries)
    products = [(-float(lines[a] * directions[b]), a, b) for a in range(LINES) for b in range(DIRECTIONS)]
    wanted = torch.zeros(LINES, dtype=torch.int64)
    for _, line, direction in sorted(products)[:entries]:
        wanted[line] = max(wanted[line], direction + 1)
    assert lengths.tolist() == wanted.tolist() and int(lengths.sum()) == entries


def test_how_many_entries():
    assert staircase.num_entries(1, 576 * 1536) == 8847
    assert staircase.num_entries(29, 100) == 29  # 29 / 100 * 100 is 28.999...
    assert staircase.num_entries(0.001, 100) == 1
    with pytest.raises(ValueError, match="5 entries of a matrix of 2 by 2"):
        staircase.prefix_lengths(torch.ones(2), torch.ones(2), 5)
    assert SparseGradConfig().lr_factor == 5 and SparseGradConfig(lr_scale=2.0).lr_factor == 2


def test_the_basis_is_that_of_the_svd_of_all_gradients_side_by_side():
    support = choose(energy_of("model"), LINES * DIRECTIONS, torch.float32)
    _, _, rows = torch.linalg.svd(torch.cat(gradients()), full_matrices=False)
    signs = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    torch.testing.assert_close(support.directions[:, :3], (signs * rows).T[:, :3].float(), atol=1e-4, rtol=1e-4)
    largest = support.directions.gather(0, support.directions.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_a_rotated_basis_holds_more_energy_than_the_plain_one_and_says_so():
    support = choose(energy_of("model"), 40, torch.float32)
    captured = torch.zeros(())
    for gradient in gradients(dtype=torch.float64):
        captured += entries_gradient(torch.eye(LINES), gradient.float(), support).square().sum()
    exact = float(captured / sum(g.float().square().sum() for g in gradients()))
    assert support.captured > 1.4 * support.captured_plain
    assert exact == pytest.approx(support.captured, rel=0.25)  # entries are products of energies only nearly


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("entries", [1, 40, LINES * DIRECTIONS])
def test_what_is_added_is_the_adjoint_of_the_gradient(rotation, entries):
    support = choose(energy_of(rotation), entries, torch.float32)
    generator = torch.Generator().manual_seed(5)
    lines, directions = (torch.randn(50, size, generator=generator) for size in (LINES, DIRECTIONS))
    values = torch.randn(entries, generator=generator)
    gradient = entries_gradient(lines, directions, support)
    added = added_rows(values, support, slice(None), lines_are_rows=True)
    assert gradient.shape == (entries,) and added.shape == (LINES, DIRECTIONS)
    torch.testing.assert_close(gradient @ values, ((lines.T @ directions) * added).sum(), rtol=1e-4, atol=1e-4)
    for rows in (slice(None), slice(3, 9)):
        torch.testing.assert_close(added_rows(values, support, rows, True), added[rows])
        torch.testing.assert_close(added_rows(values, support, rows, False), added.T[rows])


def test_without_a_rotation_nothing_but_the_entries_is_added():
    support = choose(energy_of("none"), 30, torch.float32)
    added = added_rows(torch.ones(30), support, slice(None), lines_are_rows=True)
    assert (added != 0).sum() == 30 and (added[added != 0] == 1).all()


def test_random_entries_are_anywhere_and_come_from_the_seed_alone():
    energy = energy_of("none")
    one, same, other = (draw(energy, 60, seed) for seed in (1, 1, 2))
    values = torch.arange(1.0, 61.0)
    added = [added_rows(values, support, slice(None), True) for support in (one, same, other)]
    assert torch.equal(added[0], added[1]) and not torch.equal(added[0], added[2])
    assert sorted(added[0][added[0] != 0].tolist()) == values.tolist()
    assert (one.lengths > 0).sum() > LINES / 2 and one.widest > DIRECTIONS / 2
    lines, directions = torch.randn(50, LINES), torch.randn(50, DIRECTIONS)
    gradient = entries_gradient(lines, directions, one)
    torch.testing.assert_close(gradient @ values, ((lines.T @ directions) * added[0]).sum(), rtol=1e-4, atol=1e-3)
    shares = [draw(energy, LINES * DIRECTIONS // 4, seed).captured for seed in range(40)]
    assert sum(shares) / 40 == pytest.approx(0.25, abs=0.05)  # of any energy, as each entry is as likely as another


def test_products_are_not_many_more_than_the_entries():
    generator = torch.Generator().manual_seed(8)
    for entries in (1, 20, 300, 4000, 300 * 64):
        energies = torch.rand(300, generator=generator) ** 8, torch.rand(64, generator=generator) ** 8
        lengths = staircase.prefix_lengths(energies[0], energies[1].sort(descending=True).values, entries)
        support = Support(lengths, torch.eye(64)[:, : int(lengths.max())], 64, None, 0.0, 0.0)
        assert support.layout.numel <= 10 * entries + 2 * 32 * 64
        assert len(support.layout.long_lines) <= 300 / 8 and len(support.layout.tiles) <= 10
        assert len(set(support.layout.places.tolist())) == entries
        longer = [int((lengths > least).sum()) for least in (0, 1, 2, 4, 8, 16, 32, 64)]
        assert list(support.reach) == longer[: len(support.reach)] and support.reach[-1] == 0


def test_a_gradient_that_is_not_finite_is_left_out_and_noted():
    energy, wanted = energy_of("both"), energy_of("both")
    energy.add(gradients(1)[0] * float("inf"))
    assert bool(energy.lost) and not bool(wanted.lost)
    for got, expected in zip(energy.tensors(), wanted.tensors()):
        assert torch.equal(got, expected)


def three_products(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The paper's weight: of `left @ weight~ @ right'`."""
    return left @ weight @ right.T


@pytest.mark.parametrize("entries", [40, LINES * DIRECTIONS])
def test_training_the_entries_is_training_the_paper_s_layer_of_three_products(entries):
    """W + P scatter(S) Q', with S trained, equals W~ = P'WQ with the same entries of W~ trained, in every forward."""
    support = choose(energy_of("both"), entries, torch.float64)
    generator = torch.Generator().manual_seed(7)
    layer = nn.Linear(DIRECTIONS, LINES, bias=False, dtype=torch.float64)
    base = layer.weight.detach().clone()
    whole = choose(energy_of("both"), LINES * DIRECTIONS, torch.float64)
    rotated = nn.Parameter(support.lines.T @ base @ whole.directions)
    mask = torch.arange(DIRECTIONS) < support.lengths[:, None]
    values = nn.Parameter(torch.zeros(entries, dtype=torch.float64))
    options = {"lr": 1e-2, "betas": (0.9, 0.98), "weight_decay": 0.0}
    ours, theirs = torch.optim.AdamW([values], **options), torch.optim.AdamW([rotated], **options)
    for _ in range(10):
        x = torch.randn(20, DIRECTIONS, generator=generator, dtype=torch.float64)
        aim = torch.randn(20, LINES, generator=generator, dtype=torch.float64)
        weight = (base + added_rows(values.detach(), support, slice(None), True)).requires_grad_()
        output = x @ weight.T
        gradient = 2 * (output - aim)
        values.grad = entries_gradient(gradient.detach(), x, support)
        loss = (x @ three_products(rotated, support.lines, whole.directions).T - aim).square().sum()
        torch.testing.assert_close((output - aim).square().sum(), loss, rtol=1e-5, atol=1e-5)
        theirs.zero_grad()
        loss.backward()
        rotated.grad *= mask
        ours.step()
        theirs.step()
    weight = base + added_rows(values.detach(), support, slice(None), True)
    torch.testing.assert_close(weight, three_products(rotated, support.lines, whole.directions), rtol=1e-5, atol=1e-5)


def found(model: nn.Module, **fields: object) -> dict[str, Target]:
    return {target.name: target for target in find_targets(model, SparseGradConfig(**fields))}


def test_the_matrices_of_mlps_are_found():
    llama = found(tiny_llama())
    assert [name for name in llama if ".0." in name] == [
        f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    ]
    assert len(llama) == 12 and {target.kind for target in llama.values()} == {
        f"model.layers.*.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    }
    up, down = llama["model.layers.0.mlp.up_proj.weight"], llama["model.layers.0.mlp.down_proj.weight"]
    assert (up.num_lines, up.num_directions, up.lines_are_rows, up.lines_are_outputs) == (20, 16, True, True)
    assert (down.num_lines, down.num_directions, down.lines_are_rows, down.lines_are_outputs) == (20, 16, False, False)
    bert = BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    )
    assert len(found(bert)) == 4
    gpt2 = found(GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2)))
    assert sorted(name.split(".", 3)[3] for name in gpt2) == sorted(2 * ["mlp.c_fc.weight", "mlp.c_proj.weight"])
    c_fc = gpt2["transformer.h.0.mlp.c_fc.weight"]
    assert isinstance(c_fc.module, Conv1D) and (c_fc.lines_are_rows, c_fc.lines_are_outputs) == (False, True)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize(("inputs", "outputs"), [(6, 10), (10, 6)])
def test_a_layer_s_carrier_gets_the_gradient_of_its_entries_and_forward_stays(kind, inputs, outputs):
    layer = nn.Linear(inputs, outputs) if kind is nn.Linear else Conv1D(outputs, inputs)
    model = nn.Sequential(layer)
    (target,) = find_targets(model, SparseGradConfig(modules=("0.weight",), entries_percent=30.0))
    x = torch.randn(2, 5, inputs)
    model(x).square().sum().backward()
    dense = layer.weight.grad.clone()
    plain = model(x)
    target.attach()
    assert torch.equal(model(x), plain)
    target.energy = target.new_energy("model", torch.device("cpu"))
    model(x).square().sum().backward()
    assert not layer.weight.requires_grad and (target.carrier.grad == 0).all()
    by_line = dense if target.lines_are_rows else dense.T
    torch.testing.assert_close(target.energy.directions, by_line.T @ by_line, rtol=1e-4, atol=1e-4)
    target.support, target.energy = choose(target.energy, target.entries, torch.float32), None
    target.carrier.grad = None
    model(x).square().sum().backward()
    moved = added_rows(target.carrier.grad, target.support, slice(None), target.lines_are_rows)
    torch.testing.assert_close((moved * dense).sum(), target.carrier.grad.square().sum(), rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        model(x)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    model.load_state_dict(model.state_dict())
    detach_all(model)
    assert layer.weight.requires_grad and [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]


def refused(model: nn.Module, message: str, **fields: object) -> None:
    with pytest.raises(ConfigError, match=message):
        find_targets(model, SparseGradConfig(**fields))


def test_what_can_t_be_a_target_is_refused_by_name():
    model = tiny_llama()
    refused(model, r"modules has 'up', which matches no parameter", modules=("up",))
    refused(model, r"matches model.*layernorm.weight: not the weight of a Linear", modules=(r".*norm\.weight",))
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    refused(model, r"model\.layers\.1\.mlp\.up_proj\.weight is frozen before training")
    refused(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "no repeated layers with Linears of two different sides")
    model = tiny_llama()
    up = model.model.layers[0].mlp.up_proj
    model.model.layers[1].mlp.up_proj.weight = up.weight
    refused(model, r'"model\.layers\.0\.mlp\.up_proj\.weight", "model\.layers\.1\.mlp\.up_proj\.weight" are one tied')
    model = tiny_llama()
    quantized = nn.Parameter(torch.zeros(20, 16, dtype=torch.int8), requires_grad=False)
    model.model.layers[0].mlp.up_proj.weight = quantized
    refused(model, "is quantized")
