"""Configs as other people wrote them: read as transformers reads them, or refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from ds_agsel import cli
from ds_agsel.errors import ConfigError
from ds_agsel.estimate.shapes import read_shape

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
}


def saved(config: Any, architecture: str, folder: Path) -> str:
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return str(folder)


def test_a_config_with_infinity_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    config = transformers.Mamba2Config(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=1
    )
    folder = saved(config, "Mamba2ForCausalLM", tmp_path)
    assert "__float__" in (tmp_path / "config.json").read_text()
    model = transformers.Mamba2ForCausalLM(config)
    assert read_shape(folder).numel == sum(parameter.numel() for parameter in model.parameters())


def test_a_model_is_what_its_architectures_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.WhisperConfig(
        vocab_size=99,
        d_model=32,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
    )
    folder = saved(config, "WhisperForConditionalGeneration", tmp_path)
    model = transformers.WhisperForConditionalGeneration(config)
    shape = read_shape(folder)
    assert shape.numel == sum(parameter.numel() for parameter in model.parameters())
    assert sum("encoder.layers" in block.name for block in shape.blocks) == 3
    (tmp_path / "ds.json").write_text(json.dumps({"train_batch_size": 1, "zero_optimization": {"stage": 2}}))
    assert cli.main(["estimate", "--model", folder, "--ds-config", str(tmp_path / "ds.json")]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": -1}, "The hidden size (-1) is not a multiple"),
        ({"hidden_size": "32"}, "Field 'hidden_size' expected int, got str"),
        ({"num_attention_heads": 0}, "by zero"),
        ({"num_attention_heads": 5}, "is not a multiple of the number of attention heads"),
        ({"vocab_size": 10**30}, "no causal language model can be built from its config: "),
        ({"vocab_size": -4, "architectures": ["LlamaForCausalLM"]}, "no LlamaForCausalLM can be built from its config"),
        ({"hidden_act": "nope"}, "'nope' is unknown"),
        ({"hidden_size": {"__float__": "NaN"}}, "Field 'hidden_size' expected int, got float"),
    ],
)
def test_values_out_of_range_are_refused_in_a_sentence(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | change))
    with pytest.raises(ConfigError) as caught:
        read_shape(str(tmp_path))
    assert message in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


def test_deep_json_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="is not JSON"):
        read_shape(str(tmp_path))
