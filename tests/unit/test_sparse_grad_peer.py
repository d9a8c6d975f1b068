"""The paper's SparseGrad of launch/peers.py: its layer is the plain one, and it chooses entries at each step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny_llama
from torch import nn

from ds_agsel.errors import ConfigError
from launch import methods
from launch.methods.base import RunContext
from launch.methods.sparse_grad import LargestEntriesAdam

CALIBRATION, PERCENT = 2, 10.0
OPTIMIZER = {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.9, 0.98], "eps": 1e-6}}


def started(monkeypatch: pytest.MonkeyPatch, dtype: str = "fp32", *words: str) -> tuple[Any, Any]:
    """The method and its engine, on a tiny Llama."""
    monkeypatch.setattr("launch.methods.plain_torch.dist.get_world_size", lambda: 1)
    words = words or (f"calibration_steps={CALIBRATION}", f"entries_percent={PERCENT}")
    method: Any = methods.make("sparse_grad", words)
    torch.manual_seed(0)
    config = {"optimizer": OPTIMIZER, "gradient_accumulation_steps": 1, dtype: {"enabled": True}}
    return method, method.start(tiny_llama(), RunContext(config, steps_per_epoch=1, seed=0))


def step(engine: Any, number: int) -> torch.Tensor:
    ids = torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(number))
    output = engine(input_ids=ids, labels=ids)
    engine.backward(output.loss)
    engine.step()
    return output.logits.detach()


def weights(method: Any) -> dict[str, torch.Tensor]:
    return {target.name: target.weight.detach().clone() for target in method._targets}


def test_the_layer_of_three_products_is_the_plain_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    method, engine = started(monkeypatch)
    start = {name: weight.clone() for name, weight in engine.module.state_dict().items()}
    for number in range(CALIBRATION):
        plain = step(engine, number)
        assert method.phase() == "skipped"
    assert len(method._layers) == len(method._targets) == 8  # up and down of four layers
    ids = torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(CALIBRATION - 1))
    torch.testing.assert_close(engine(input_ids=ids).logits, plain, rtol=1e-4, atol=1e-5)
    for name, weight in weights(method).items():
        assert not torch.allclose(weight, start[name], atol=1e-2)
    model, _ = method.result()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, start[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_each_step_moves_the_largest_entries_of_its_own_rotated_gradient(monkeypatch, dtype: str) -> None:
    method, engine = started(monkeypatch, dtype)
    for number in range(CALIBRATION):
        step(engine, number)
    seen: dict[str, torch.Tensor] = {}
    optimizer = engine.optimizer
    optimizer.register_step_pre_hook(lambda *_: seen.update({t.name: t.weight.grad.clone() for t in method._targets}))
    chosen = []
    for number in range(CALIBRATION, CALIBRATION + 2):
        before = weights(method)
        step(engine, number)
        assert method.phase() == "plain"
        for target in method._targets:
            moved = (target.weight != before[target.name]).flatten().nonzero().flatten()
            entries = optimizer.entries[target.weight]
            assert len(entries) == target.entries == int(PERCENT * target.weight.numel() / 100)
            assert set(moved.tolist()) <= set(entries.tolist()) and (dtype == "bf16" or len(moved) == len(entries))
            sizes = seen[target.name].flatten().abs()
            left = sizes.clone().index_fill_(0, entries, 0)
            assert sizes[entries].min() >= left.max()
        chosen.append([set(optimizer.entries[target.weight].tolist()) for target in method._targets])
    assert chosen[0] != chosen[1]
    trained = {name for name, p in engine.module.named_parameters() if p.requires_grad}
    assert trained == method.trained() == {target.name for target in method._targets}
    numel = sum(target.weight.numel() for target in method._targets)
    assert method.state_bytes() == 8 * numel and method.master_bytes() == (4 * numel if dtype == "bf16" else 0)


def test_the_optimizer_is_torch_s_sparse_adam_on_the_chosen_entries() -> None:
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(6, 10, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.flatten().clone())
    options = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-6}
    optimizer = LargestEntriesAdam([ours], 20.0, **options)
    expected = torch.optim.SparseAdam([theirs], **options)
    for _ in range(5):
        gradient = torch.randn(6, 10, generator=generator)
        ours.grad = gradient
        optimizer.step()
        entries = optimizer.entries[ours]
        theirs.grad = torch.sparse_coo_tensor(entries[None], gradient.flatten()[entries], (60,), check_invariants=True)
        expected.step()
        torch.testing.assert_close(ours.detach().flatten(), theirs.detach())


@pytest.mark.parametrize("word", ["entries_percent=0", "entries_percent=101", "calibration_steps=0"])
def test_options_outside_their_range_are_refused(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    with pytest.raises(ConfigError, match=f"{word.partition('=')[0]}=.* is outside"):
        started(monkeypatch, "fp32", word)
