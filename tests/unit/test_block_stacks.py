"""Stacks of one layer, shared layers, towers, and heads that are called a norm."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import transformers

from ds_agsel.blocks import find_blocks

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = {"image_size": 16, "patch_size": 8}


def counts(model: Any) -> dict[str, int]:
    """Block name -> number of its parameters."""
    return {block.name: len(block.parameter_names) for block in find_blocks(model)}


def bart(encoder_layers: int, decoder_layers: int) -> Any:
    config = transformers.BartConfig(
        vocab_size=64,
        d_model=16,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
    )
    return transformers.BartForConditionalGeneration(config)


@pytest.mark.parametrize(("encoder_layers", "decoder_layers"), [(3, 1), (1, 2), (1, 1), (2, 2)])
def test_a_stack_of_one_layer_is_a_layer(encoder_layers: int, decoder_layers: int) -> None:
    assert counts(bart(encoder_layers, decoder_layers)) == {
        "embedding": 3,
        **{f"model.encoder.layers.{index}": 16 for index in range(encoder_layers)},
        "model.encoder.final_norm": 2,
        **{f"model.decoder.layers.{index}": 26 for index in range(decoder_layers)},
        "model.decoder.final_norm": 2,
    }


def test_a_model_of_one_layer_has_that_layer() -> None:
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_hidden_layers=1))
    assert counts(llama) == {"embedding": 1, "model.layers.0": 9, "final_norm": 1, "head": 1}


@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_a_shared_layer_is_a_block_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, rank: str | None
) -> None:
    monkeypatch.delenv("RANK", raising=False) if rank is None else monkeypatch.setenv("RANK", rank)
    config = transformers.AlbertConfig(**SMALL, embedding_size=8, num_hidden_layers=4)
    with caplog.at_level(logging.WARNING, logger="ds_agsel.blocks"):
        found = counts(transformers.AlbertForMaskedLM(config))
    assert found == {"embedding": 8, "albert.encoder.albert_layer_groups.0": 16, "head": 4}
    said = (
        "AlbertForMaskedLM has 4 layers that share one module's parameters, so they are selected together: one block."
    )
    assert caplog.messages == ([] if rank == "1" else [said])


def test_a_head_that_is_called_a_norm_is_a_head() -> None:
    config = transformers.RobertaPreLayerNormConfig(**SMALL, num_hidden_layers=2)
    found = counts(transformers.RobertaPreLayerNormForSequenceClassification(config))
    assert (found["final_norm"], found["head"]) == (2, 4)
    found = counts(transformers.RobertaPreLayerNormForMaskedLM(config))
    assert (found["final_norm"], found["head"]) == (2, 4)


def llava() -> Any:
    text = transformers.LlamaConfig(**SMALL, num_hidden_layers=2)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, **IMAGE), text_config=text, image_token_index=63
    )
    return transformers.LlavaForConditionalGeneration(config)


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=4,
        max_source_positions=8,
        max_target_positions=8,
        pad_token_id=0,
    )
    return transformers.WhisperForConditionalGeneration(config)


def clip() -> Any:
    text = {"vocab_size": 64, **VISION}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config={**VISION, **IMAGE}))


def bert_to_bert() -> Any:
    config = transformers.BertConfig(**SMALL, num_hidden_layers=2)
    decoder = transformers.BertConfig(**SMALL, num_hidden_layers=2, is_decoder=True, add_cross_attention=True)
    return transformers.EncoderDecoderModel(
        encoder=transformers.BertModel(config), decoder=transformers.BertLMHeadModel(decoder)
    )


@pytest.mark.parametrize(
    ("make", "towers"),
    [
        (llava, ["model.vision_tower"]),
        (whisper, ["model.encoder"]),
        (clip, ["vision_model"]),
        (lambda: bart(2, 2), []),
        (bert_to_bert, []),
    ],
)
def test_the_front_of_a_tower_is_its_own_block(make: Callable[[], Any], towers: Sequence[str]) -> None:
    blocks = {block.name: block for block in find_blocks(make())}
    fronts = [name for name in blocks if name.endswith("embedding")]
    assert fronts == ["embedding", *(f"{tower}.embedding" for tower in towers)]
    for tower in towers:
        assert all(name.startswith(f"{tower}.") for name in blocks[f"{tower}.embedding"].parameter_names)
        assert not any(name.startswith(f"{tower}.") for name in blocks["embedding"].parameter_names)
