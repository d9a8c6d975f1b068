"""Granularity "module": what is a unit, in many architectures, and which of them are in the lottery."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from tiny_models import TinyNet, tiny_llama
from torch import nn

from ds_agsel import cli
from ds_agsel.blocks import Block, block_names, find_blocks
from ds_agsel.config import SelectionConfig
from ds_agsel.errors import BlockError, ConfigError, ConfigErrors
from ds_agsel.lottery import Lottery, build_lottery
from ds_agsel.policies import Quota, share_of
from ds_agsel.units import find_units

SMALL = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "moe_intermediate_size", "shared_expert_intermediate_size"), 16
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("intermediate_size", "max_position_embeddings", "n_positions", "ffn_dim"), 32),
    **{"head_dim": 8, "vocab_size": 64, "num_experts_per_tok": 2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
MODEL_TYPES = """
    llama qwen2 qwen3 qwen3_moe qwen2_moe mistral mixtral phi phi3 phimoe gemma gemma2 gemma3_text gpt2 gpt_neox gptj
    gpt_bigcode opt bloom mpt codegen stablelm starcoder2 olmo olmo2 olmoe cohere cohere2 granite granitemoe deepseek_v2
    deepseek_v3 glm glm4 mamba falcon_mamba jamba rwkv xglm persimmon nemotron exaone4 smollm3 gpt_oss hunyuan_v1_dense
    ernie4_5 lfm2 recurrent_gemma minimax llama4_text biogpt ctrl
"""


def on_meta(model_type: str) -> nn.Module:
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    names = transformers.AutoConfig.for_model(model_type)
    fields = {key: value for key, value in SMALL.items() if hasattr(names, key) or key in names.attribute_map}
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(model_type, **fields)
        )
    return model


def of(units: tuple[Block, ...], kind: str, layer: str) -> list[str]:
    """The names within ``layer`` of its units of ``kind``."""
    return [unit.name.removeprefix(f"{layer}.") for unit in units if unit.kind == kind and unit.layer == layer]


@pytest.mark.parametrize("model_type", sorted(MODEL_TYPES.split()))
def test_each_parameter_is_in_one_unit_and_units_are_the_blocks_divided(model_type: str) -> None:
    model = on_meta(model_type)
    parameters = dict(model.named_parameters())
    blocks, units = find_blocks(model), find_units(model, None, "module")
    assert [unit.index for unit in units] == list(range(len(units)))
    assert len(set(block_names(units))) == len(units)
    assert sorted(name for unit in units for name in unit.parameter_names) == sorted(parameters)
    joined: dict[str, list[str]] = {}
    for unit in units:
        joined.setdefault(unit.layer or unit.name, []).extend(unit.parameter_names)
        assert unit.numel == sum(parameters[name].numel() for name in unit.parameter_names)
    assert list(joined) == list(block_names(blocks)), "in the blocks' order"
    assert all(set(joined[block.name]) == set(block.parameter_names) for block in blocks)
    for unit in units:
        assert (unit.kind == "rest") == (unit.layer is None)
        if unit.kind == "matrix":
            (name,) = unit.parameter_names
            assert name in (unit.name, f"{unit.name}.weight") and parameters[name].squeeze().dim() >= 2
        else:
            assert unit.layer is None or all(
                parameters[name].squeeze().dim() <= 1 or name.endswith("bias") for name in unit.parameter_names
            )


@pytest.mark.parametrize(
    ("model_type", "layer", "matrices", "others"),
    [
        ("llama", "model.layers.1", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                                     "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"], ["norms"]),
        ("gpt2", "transformer.h.0", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], ["norms", "vectors"]),
        ("gpt_neox", "gpt_neox.layers.0", ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h",
                                           "mlp.dense_4h_to_h"], ["norms", "vectors"]),
        ("mixtral", "model.layers.0", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                                       "mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"], ["norms"]),
        ("gpt_oss", "model.layers.0", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                                       "mlp.router", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
         ["norms", "vectors"]),
        ("mamba", "backbone.layers.0", ["mixer.A_log", "mixer.conv1d", "mixer.in_proj", "mixer.x_proj",
                                        "mixer.out_proj"], ["norms", "vectors"]),
    ],
)  # fmt: skip
def test_the_units_of_a_layer(model_type: str, layer: str, matrices: list[str], others: list[str]) -> None:
    units = find_units(on_meta(model_type), None, "module")
    assert of(units, "matrix", layer) == matrices
    names = [unit.name.removeprefix(f"{layer}.") for unit in units if unit.layer == layer]
    assert names == [*others, *matrices], "norms and vectors first"


def test_a_tied_head_is_in_the_embedding_and_what_is_frozen_is_in_no_unit() -> None:
    model = tiny_llama()
    model.model.layers[0].mlp.requires_grad_(False)
    units = find_units(model, None, "module")
    assert [unit.name for unit in units if unit.kind == "rest"] == ["embedding", "final_norm"]
    assert of(units, "matrix", "model.layers.0") == [f"self_attn.{side}_proj" for side in "qkvo"]


def test_adapter_matrices_are_units() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    units = find_units(model, None, "module")
    assert {unit.kind for unit in units} == {"matrix"} and len(units) == 4 * 2 * 2
    layer = "base_model.model.model.layers.0"
    assert of(units, "matrix", layer)[:2] == [f"self_attn.q_proj.lora_{side}.default" for side in "AB"]


class Odd(nn.Module):
    """A layer whose own parameters and modules have the names of our units."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))
        self.flat = nn.Parameter(torch.ones(1, 5))
        self.norms = nn.Linear(2, 2)


def test_names_stay_unique_and_a_side_of_length_one_makes_no_matrix() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([Odd(), Odd()])
    units = find_units(model, None, "module")
    assert block_names(units)[:3] == ("layers.0.vectors", "layers.0.weight", "layers.0.norms.weight")
    assert units[0].parameter_names == ("layers.0.flat", "layers.0.norms.bias")
    assert len(set(block_names(units))) == len(units) == 6


def test_shapes_are_whole_where_zero3_has_partitioned_the_parameters() -> None:
    model = tiny_llama()
    whole = find_units(model, None, "module")
    for parameter in model.parameters():
        parameter.ds_shape, parameter.ds_numel = parameter.shape, parameter.numel()  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    assert find_units(model, None, "module") == whole


def test_granularity_block_is_the_blocks_and_no_layers_are_told() -> None:
    assert find_units(TinyNet()) == find_blocks(TinyNet())
    with pytest.raises(BlockError, match="has no repeated layers"):
        find_units(nn.Linear(2, 2), None, "module")


# ------------------------------------------------------------------------------ lottery

UNITS = find_units(TinyNet(), None, "module")  # of each of 4 layers: vectors (6 elements), a matrix of 25
MATRICES = (2, 4, 6, 8)


def lottery(**section: Any) -> Lottery:
    return build_lottery(UNITS, SelectionConfig(granularity="module", **section))


def test_only_matrices_are_drawn_and_the_share_is_of_their_parameters() -> None:
    never = tuple(unit.index for unit in UNITS if unit.index not in MATRICES)
    assert lottery(select_percent=50) == Lottery(MATRICES, (), never, 2, Quota((25,) * 4, 50))
    assert lottery(select_percent=49.9).num_selected == 1
    assert lottery(select_percent=100).quota.admit(range(4)) == (0, 1, 2, 3)


def test_patterns_take_in_and_out() -> None:
    found = lottery(always_select=["*.vectors", "head"], never_select=["layers.0.linear"])
    assert found.always == (1, 3, 5, 7, 10) and found.drawn == (4, 6, 8) and found.never == (0, 2, 9)
    assert found.quota.costs == (25, 25, 25)


def test_an_unknown_name_is_told_patterns_and_not_every_unit() -> None:
    shown = r'Its blocks: "embedding", "layers\.\*\.vectors", "layers\.\*\.linear", "final_norm", "head"\.$'
    with pytest.raises(ConfigErrors, match=shown):
        lottery(always_select=["*.norms"])
    with pytest.raises(ConfigErrors, match=shown):
        lottery(never_select=["layers.9.linear"])


@pytest.mark.parametrize(("percent", "limit"), [(29, 29), (57, 57), (0.1, 0), (33.33, 33), (100, 100)])
def test_the_limit_is_exact(percent: float, limit: int) -> None:
    assert share_of(percent, [40, 60]).limit == limit
    assert share_of(percent, [40 * 10**12, 60 * 10**12]).limit >= limit * 10**12


def test_a_share_below_every_unit_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="ds_agsel"):
        assert share_of(0.5, [40, 60]).admit([1, 0]) == (1,)
    assert caplog.messages == [
        "adagrad_select.select_percent=0.5 of the 100 parameters in the lottery is less than each of its 2 units: each "
        "step updates one. It is in percent: for 0.5 of the blocks set it to 50."
    ]
    caplog.clear()
    share_of(50, [40, 60])
    assert not caplog.records


def test_a_lottery_without_matrices_is_refused() -> None:
    with pytest.raises(ConfigError, match="finds no trainable matrix in the repeated layers to choose from"):
        lottery(never_select=["*.linear"])


def test_granularity_module_and_blocks_exclude_each_other() -> None:
    with pytest.raises(ConfigErrors, match=r"granularity=\"module\" and adagrad_select.blocks exclude each other"):
        SelectionConfig(granularity="module", blocks={"a": ["b"]})
    with pytest.raises(ConfigErrors, match=r'granularity="layer" is not "block" or "module"\. Use "block" to'):
        SelectionConfig(granularity="layer")


# -------------------------------------------------------------------------------- check


def test_check_prints_the_units_of_any_number_of_layers_in_few_lines(tmp_path: Any, capsys: Any) -> None:
    import json

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "adagrad_select": {"granularity": "module", "select_percent": 3, "always_select": ["*.norms"]},
    }
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config))
    assert cli.main(["check", str(file), "--model", "llama-3.2-1b"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{file}: sound",
        'granularity "module": 130 units',
        "  in the lottery, 973,078,528 parameters, of which a step updates at most 29,192,355 (3 %):",
        "      16 x     4,194,304  model.layers.*.self_attn.q_proj",
        "      16 x     1,048,576  model.layers.*.self_attn.k_proj",
        "      16 x     1,048,576  model.layers.*.self_attn.v_proj",
        "      16 x     4,194,304  model.layers.*.self_attn.o_proj",
        "      16 x    16,777,216  model.layers.*.mlp.gate_proj",
        "      16 x    16,777,216  model.layers.*.mlp.up_proj",
        "      16 x    16,777,216  model.layers.*.mlp.down_proj",
        "  updated at every step:",
        "      16 x         4,096  model.layers.*.norms",
        "  not trained, unless always_select names them:",
        "       1 x   262,668,288  embedding",
        "       1 x         2,048  final_norm",
    ]
