"""Gradient checkpointing as transformers switches it on: backward still ends at the lowest selected layer."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ds_agsel.zero.activation_checkpointing import InputGradients

LAYERS = 4


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=8, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def select(made: LlamaForCausalLM, layer: int) -> list[torch.nn.Parameter]:
    """Freeze all of ``made`` but one layer, whose parameters are returned."""
    made.requires_grad_(False)
    made.model.layers[layer].requires_grad_(True)
    return list(made.model.layers[layer].parameters())


def runs_of_layers(made: LlamaForCausalLM) -> list[int]:
    """How often each layer ran in a forward and backward: a layer that backward reaches is computed again."""
    counts = [0] * LAYERS

    def count(index: int) -> None:
        counts[index] += 1

    handles = [
        layer.self_attn.register_forward_pre_hook(lambda *_, index=index: count(index))
        for index, layer in enumerate(made.model.layers)
    ]
    ids = torch.arange(16).reshape(2, 8)
    made(input_ids=ids, labels=ids).loss.backward()
    for handle in handles:
        handle.remove()
    return counts


def gradients(made: LlamaForCausalLM, layer: int) -> list[torch.Tensor]:
    parameters = select(made, layer)
    made.zero_grad(set_to_none=True)
    runs_of_layers(made)
    return [p.grad.clone() for p in parameters]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_backward_ends_at_the_lowest_selected_layer(reentrant: bool, layer: int) -> None:
    made = model()
    expected = gradients(made, layer)
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    select(made, layer)
    assert InputGradients(made).take_over()
    assert runs_of_layers(made) == [1 + (index >= layer) for index in range(LAYERS)]
    for expect, actual in zip(expected, gradients(made, layer), strict=True):
        torch.testing.assert_close(actual, expect)


def test_left_alone_it_would_run_to_the_first_layer() -> None:
    """What the module is for: if this no longer holds, transformers has changed."""
    made = model()
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    select(made, 3)
    assert runs_of_layers(made) == [2] * LAYERS


def test_taken_over_again_after_a_framework_has_enabled_it_again() -> None:
    made = model()
    kept = InputGradients(made)
    assert not kept.take_over()  # nothing is checkpointed
    for _ in range(2):
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert kept.take_over()
        assert not kept.take_over()


def test_hooks_without_known_checkpointing_stay() -> None:
    made = model()
    made.enable_input_require_grads()
    assert not InputGradients(made).take_over()
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in made.model.layers:
        layer._gradient_checkpointing_func = lambda run, *args: run(*args)
    assert not InputGradients(made).take_over()
