"""Packed rows: computed as each example alone, or refused by the layer that would not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from ds_agsel.errors import ConfigError
from launch.data import batches, packing
from launch.training.objective import completion_loss_sum

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "attn_implementation": "sdpa",
}


def model(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind.removesuffix('Text')}{'Text' * kind.endswith('Text')}Config")
    return getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config(**{**SIZES, **settings})).eval()


def difference(tested: Any) -> float:
    """How far the loss of three examples in one row is from that of each alone."""
    generator = torch.Generator().manual_seed(0)
    examples = [
        {"input_ids": torch.randint(4, 99, (n,), generator=generator).tolist(), "prompt_numel": prompt}
        for n, prompt in ((9, 4), (6, 2), (11, 7))
    ]

    def loss(rows: list[list[dict[str, Any]]], packed: bool) -> float:
        with torch.no_grad():
            batch = batches.collate(rows, 0, packed=packed)
            return float(completion_loss_sum(tested, batch, keeps_last_logits=False))

    return abs(sum(loss([[example]], False) for example in examples) - loss([examples], True))


JAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "use_mamba_kernels": False,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}
LFM2 = {"layer_types": ["conv", "full_attention"] * 2, "block_dim": 32, "block_ff_dim": 48, "block_multiple_of": 8}
QWEN3_NEXT = {
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}


@pytest.mark.parametrize(
    ("kind", "settings", "layer"),
    [
        ("Jamba", JAMBA, r"model\.layers\.0\.mamba \(JambaMambaMixer\)"),
        ("Lfm2", LFM2, r"model\.layers\.0\.conv \(Lfm2ShortConv\)"),
        ("Qwen3Next", QWEN3_NEXT, r"model\.layers\.0\.linear_attn \(Qwen3NextGatedDeltaNet\)"),
    ],
)
def test_a_layer_that_hands_on_a_state_is_named(kind: str, settings: dict[str, Any], layer: str) -> None:
    tested = model(kind, **settings)
    assert difference(tested) > 1e-3
    with pytest.raises(ConfigError, match=rf"--packing: {layer} of tiny lets the examples of a row see each other"):
        packing.check(tested, "tiny", longest=11)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Llama", {}),
        ("Qwen3", {"head_dim": 8}),
        ("SmolLM3", {"no_rope_layer_interval": 2, "pad_token_id": 0}),
        ("Olmo2", {}),
    ],
)
def test_a_model_with_full_attention_computes_packed_rows_as_examples_alone(
    kind: str, settings: dict[str, Any]
) -> None:
    tested = model(kind, **settings).train()
    packing.check(tested, "tiny", longest=64)
    assert tested.training and all(parameter.grad is None for parameter in tested.parameters())
    assert not any(module._forward_hooks for module in tested.modules())
    assert difference(tested.eval()) < 1e-3


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("Mistral", {"sliding_window": 8}), ("Gemma3Text", {"head_dim": 8, "sliding_window": 8, "pad_token_id": 0})],
)
def test_a_window_shorter_than_an_example_is_named(kind: str, settings: dict[str, Any]) -> None:
    tested = model(kind, **settings)
    assert difference(tested) > 1e-3
    message = r"--packing: layer 0 of tiny has sliding_attention over 8 tokens, .* has 11; .* --sequence-length=8"
    with pytest.raises(ConfigError, match=message):
        packing.check(tested, "tiny", longest=11)
    wide = model(kind, **{**settings, "sliding_window": 11})
    packing.check(wide, "tiny", longest=11)
    assert difference(wide) < 1e-3


def test_a_window_that_is_switched_off_is_none() -> None:
    packing.check(model("Qwen2", sliding_window=8, use_sliding_window=False), "tiny", longest=11)


def test_a_model_without_sdpa_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--packing needs a model with sdpa attention, .*; tiny has 'eager'"):
        packing.check(model("Llama", attn_implementation="eager"), "tiny", longest=11)
