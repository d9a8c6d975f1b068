"""What the methods of launch/peers.py are made of: the plain-PyTorch engine, LISA's draw, the look for faults."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn

from ds_agsel.errors import ConfigError
from launch import methods
from launch.methods.lisa import LayerDraw
from launch.methods.plain_torch import Masters, TorchEngine, cast_parameters, projected_groups
from launch.methods.tensors import held_by
from launch.training.faults import FaultWatch

ADAM = {"lr": 1e-2, "betas": (0.9, 0.98), "weight_decay": 0.1}
RECORD = {"step": 0, "loss": 1.0, "lr": 0.1, "phase": "plain"}


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).to(dtype)


def engine(module: nn.Module, optimizer: torch.optim.Optimizer, **config: Any) -> TorchEngine:
    return TorchEngine(module, optimizer, {"gradient_accumulation_steps": 1, **config})


def gradients(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def test_two_micro_steps_are_one_step_on_both_clipped_and_scheduled() -> None:
    batch = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    whole, parts = net(), net()
    expected = torch.optim.AdamW(whole.parameters(), **ADAM)
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 4}}
    trained = engine(
        parts, torch.optim.AdamW(parts.parameters(), **ADAM), gradient_accumulation_steps=2, gradient_clipping=0.01,
        scheduler=scheduler,
    )  # fmt: skip
    for _ in range(3):
        expected.param_groups[0]["lr"] = trained.get_lr()[0]
        whole(batch).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(whole.parameters(), 0.01)
        expected.step()
        whole.zero_grad()
        for part in batch.split(3):
            trained.backward(trained.module(part).square().mean())
            trained.step()
        assert trained.get_global_grad_norm() == pytest.approx(float(norm), rel=1e-5)
    assert trained.get_lr()[0] > 0
    for ours, theirs in zip(parts.parameters(), whole.parameters()):
        torch.testing.assert_close(ours, theirs)  # sums in another order


def test_masters_are_adamw_in_fp32_and_drop_what_is_frozen() -> None:
    half, full = net(torch.bfloat16), net(torch.bfloat16).float()
    masters = Masters(half.parameters(), **ADAM)
    expected = torch.optim.AdamW(full.parameters(), fused=True, **ADAM)
    for step in range(4):
        gradients(half, step)
        for ours, theirs in zip(half.parameters(), full.parameters()):
            theirs.grad = ours.grad.float()
        masters.optimizer.step()
        expected.step()
    for weight, theirs in zip(half.parameters(), full.parameters()):
        assert torch.equal(masters.of[weight], theirs) and torch.equal(weight, theirs.bfloat16())
    kept, dropped = list(half[0].parameters()), list(half[1].parameters())
    masters.keep_only(kept)
    assert len(masters.optimizer.state) == 2 and masters.held_bytes() == 4 * sum(w.numel() for w in kept)
    before = [weight.clone() for weight in dropped]
    gradients(half, 5)
    masters.optimizer.step()
    assert all(torch.equal(weight, old) for weight, old in zip(dropped, before))


def test_lisa_draws_layers_anew_each_period_and_always_trains_the_rest() -> None:
    model = tiny_llama()
    draw = LayerDraw(model, {"layers": 2, "every": 3}, seed=1)
    periods = []
    for step in range(12):
        assert draw.thaw(step) == (step % 3 == 0)
        assert draw.names == {name for name, p in model.named_parameters() if p.requires_grad}
        assert {"model.embed_tokens.weight", "model.norm.weight"} <= draw.names
        periods.append(frozenset(name.split(".")[2] for name in draw.names if "layers" in name))
    assert all(len(layers) == 2 for layers in periods)
    assert all(len(set(periods[at : at + 3])) == 1 for at in (0, 3, 6, 9)) and len(set(periods)) > 1
    again = LayerDraw(tiny_llama(), {"layers": 2, "every": 3}, seed=1)
    again.thaw(9)
    assert again.names == draw.names
    with pytest.raises(ConfigError, match=r"layers=5 is outside \[1, 4\]"):
        LayerDraw(tiny_llama(), {"layers": 5, "every": 3}, seed=1)


def test_buffers_keep_their_precision() -> None:
    model = tiny_llama()
    cast_parameters(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_only_matrices_of_layers_are_projected() -> None:
    model = tiny_llama()
    others, matrices = projected_groups(model, 2, scale=1.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert all("_proj" in names[parameter] for parameter in matrices["params"]) and matrices["rank"] == 2
    assert len(matrices["params"]) == 4 * 7 and len(others["params"]) + 4 * 7 == len(names)


def test_states_are_found_in_objects_too() -> None:
    class Projector:
        def __init__(self) -> None:
            self.ortho_matrix = [torch.zeros(3), torch.zeros(4)]

    state = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2), "projector": Projector(), "count": 3}
    assert [tensor.numel() for tensor in held_by([state])] == [2, 3, 4]


def test_faults_are_said_and_sound_training_has_none() -> None:
    module = net()
    watch = FaultWatch(module)
    watch.engine_made(module)

    def step(number: int, change: tuple[str, ...], trained: set[str] | None = None, **record: Any) -> None:
        watch.before_step()
        with torch.no_grad():
            for name in change:
                module.get_parameter(name).add_(0.5)
        watch.after_step({**RECORD, "step": number, **record}, trained)

    step(0, ("0.weight",), {"0.weight"})
    step(1, (), lr=0.0)
    step(2, (), phase="skipped")
    assert watch.sentences() == []
    step(3, ("0.weight", "1.bias"), {"0.weight"})
    step(4, ())
    step(5, ("0.weight",), loss=float("nan"))
    module[0].bias.requires_grad_(False)
    step(6, ("0.bias", "0.weight"))
    assert watch.sentences() == [
        "The loss was not finite in 1 of 7 steps (5).",
        "Frozen parameters moved in 2 of 7 steps (3, 6): mean |Δw| up to 5.0e-01 (1.bias, step 3).",
        "No weight changed in 1 of 7 steps (4).",
    ]


def test_a_step_too_small_for_bf16_is_no_fault() -> None:
    module = nn.Linear(64, 64).bfloat16()  # weights up to 1/8, which lie 2**-11 apart there
    watch = FaultWatch(module)
    for number, lr in enumerate((4e-8, 3e-4)):
        watch.before_step()
        watch.after_step({**RECORD, "step": number, "lr": lr}, None)
    assert watch.sentences() == ["No weight changed in 1 of 2 steps (1)."]


def test_an_engine_that_changes_the_weights_it_was_given_is_named() -> None:
    module = net()
    watch = FaultWatch(module)
    watch.engine_made(module.bfloat16())  # that it rounds is no fault
    assert watch.sentences() == []
    with torch.no_grad():
        module[0].weight.copy_(module[0].weight.t().clone())
    watch = FaultWatch(net())
    watch.engine_made(module)
    [sentence] = watch.sentences()
    assert sentence.startswith("1 of 4 parameters changed as the engine was made") and "(0.weight)" in sentence


def test_options_have_their_defaults_type_and_no_others() -> None:
    lora = methods.make("lora", ["rank=8"])
    assert lora.options == {"rank": 8, "alpha": 512.0, "dropout": 0.0}
    with pytest.raises(ConfigError, match="'rank=many' is no int"):
        methods.make("lora", ["rank=many"])
    with pytest.raises(ConfigError, match=r"'alfa=1' is unknown to lora. It has \(with defaults\): rank=256"):
        methods.make("lora", ["alfa=1"])


def test_matrices_that_follow_their_entries_are_trained_too() -> None:
    names = ("layers.0.up.sparse_grad_values", "layers.0.norm.weight")
    blocks = [SimpleNamespace(parameter_names=names), SimpleNamespace(parameter_names=("layers.1.norm.weight",))]
    method = methods.make("adagrad_select")
    method.selection = SimpleNamespace(blocks=blocks, history=[SimpleNamespace(blocks=(0,))])
    assert method.trained() == {*names, "layers.0.up.weight"}
