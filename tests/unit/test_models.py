"""What is no model is refused by its name, with what to use instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ds_agsel.errors import ConfigError
from launch import methods
from launch.training import models


@pytest.mark.parametrize("load", [models.load_tokenizer, models.load_model])
def test_a_folder_without_a_model_is_refused(tmp_path: Path, load) -> None:
    with pytest.raises(ConfigError) as caught:
        load(str(tmp_path))
    assert str(caught.value) == (
        f"model={str(tmp_path)!r} is a folder without a config.json. Use a folder made by save_pretrained."
    )


@pytest.mark.parametrize("load", [models.load_tokenizer, models.load_model])
def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, load) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"model='no/such-model' can't be loaded: .* or 'smollm2'\."):
        load("no/such-model")


def test_weights_read_in_bf16_are_those_that_the_engine_makes_of_fp32(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 99}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes)).save_pretrained(tmp_path)
    whole, half = (models.load_model(str(tmp_path), dtype=dtype) for dtype in ("float32", "bfloat16"))
    for (name, read), (_, made) in zip(half.named_parameters(), whole.named_parameters(), strict=True):
        assert read.dtype is torch.bfloat16 and torch.equal(read, made.bfloat16()), name
    for (name, read), (_, made) in zip(half.named_buffers(), whole.named_buffers(), strict=True):
        assert read.dtype is made.dtype and torch.equal(read, made), name


@pytest.mark.parametrize(
    ("method", "config", "dtype"),
    [
        ("adagrad_select", {"bf16": {"enabled": True}}, "bfloat16"),
        ("adagrad_select", {}, "float32"),
        ("adagrad_select", {"fp16": {"enabled": True}}, "float32"),
        ("full", {"bf16": {"enabled": True}}, "bfloat16"),
        ("lora", {"bf16": {"enabled": True}}, "float32"),
        ("lisa", {"bf16": {"enabled": True}}, "float32"),
    ],
)
def test_only_what_zero_makes_bf16_anyway_is_read_so(method, config, dtype) -> None:
    assert methods.make(method, []).loading_dtype(config) == dtype
