"""The automatic rule on real architectures and on odd trees, the user's own blocks, and every refusal."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from ds_agsel.blocks import block_names, find_blocks, resolve_names
from ds_agsel.errors import BlockError, ConfigError

LLAMA_LIKE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER_LIKE = {key: LLAMA_LIKE[key] for key in LLAMA_LIKE if key != "num_key_value_heads"}
T5_SHAPE = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "vocab_size": 64, "num_layers": 3}


def llama(tied: bool, layers: int = 3) -> Any:
    shape = {**LLAMA_LIKE, "num_hidden_layers": layers}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, tie_word_embeddings=tied))


def qwen2() -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA_LIKE, tie_word_embeddings=True))


def phi3() -> Any:
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**LLAMA_LIKE, tie_word_embeddings=False))


def phi4_mini() -> Any:
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**LLAMA_LIKE, tie_word_embeddings=True))


def gemma() -> Any:
    config = transformers.GemmaConfig(**LLAMA_LIKE, head_dim=8, tie_word_embeddings=True)
    return transformers.GemmaForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=3, n_head=2, vocab_size=64, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def opt(projected: bool = False) -> Any:
    shape = {key: ENCODER_LIKE[key] for key in ENCODER_LIKE if key != "intermediate_size"}
    config = transformers.OPTConfig(
        **shape, ffn_dim=32, max_position_embeddings=32, word_embed_proj_dim=8 if projected else 16
    )
    return transformers.OPTForCausalLM(config)


def gpt_neox() -> Any:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**ENCODER_LIKE, tie_word_embeddings=False))


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER_LIKE, max_position_embeddings=32))


def bert_classifier() -> Any:
    config = transformers.BertConfig(**ENCODER_LIKE, max_position_embeddings=32)
    return transformers.BertForSequenceClassification(config)


def t5(tied: bool = True) -> Any:
    config = transformers.T5Config(**T5_SHAPE, num_decoder_layers=2, pad_token_id=0)
    model = transformers.T5ForConditionalGeneration(config)
    if not tied:  # by hand: transformers 5 ties it whatever the config says
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def layers(path: str, count: int = 3) -> list[str]:
    return [f"{path}.{index}" for index in range(count)]


T5_BLOCKS = [
    "embedding",
    *layers("encoder.block"),
    "encoder.final_norm",
    *layers("decoder.block", 2),
    "decoder.final_norm",
]

ARCHITECTURES: list[tuple[str, Callable[[], Any], Sequence[str]]] = [
    ("llama-tied", lambda: llama(True), ["embedding", *layers("model.layers"), "final_norm"]),
    ("llama-untied", lambda: llama(False), ["embedding", *layers("model.layers"), "final_norm", "head"]),
    ("qwen2", qwen2, ["embedding", *layers("model.layers"), "final_norm"]),
    ("phi3", phi3, ["embedding", *layers("model.layers"), "final_norm", "head"]),
    ("phi4-mini", phi4_mini, ["embedding", *layers("model.layers"), "final_norm"]),
    ("gemma", gemma, ["embedding", *layers("model.layers"), "final_norm"]),
    ("gpt2", gpt2, ["embedding", *layers("transformer.h"), "final_norm"]),
    ("opt", opt, ["embedding", *layers("model.decoder.layers"), "final_norm"]),
    ("opt-projected", lambda: opt(True), ["embedding", *layers("model.decoder.layers"), "final_norm"]),
    ("gpt-neox", gpt_neox, ["embedding", *layers("gpt_neox.layers"), "final_norm", "head"]),
    ("bert", bert, ["embedding", *layers("bert.encoder.layer"), "head"]),
    ("bert-classifier", bert_classifier, ["embedding", *layers("bert.encoder.layer"), "head"]),
    ("t5", t5, T5_BLOCKS),
    ("t5-untied", lambda: t5(False), [*T5_BLOCKS, "head"]),
]


@pytest.mark.parametrize(("make", "names"), [a[1:] for a in ARCHITECTURES], ids=[a[0] for a in ARCHITECTURES])
def test_the_rule_sees_the_blocks_of(make: Callable[[], Any], names: Sequence[str]) -> None:
    model = make()
    blocks = find_blocks(model)
    assert list(block_names(blocks)) == list(names)
    assert [block.index for block in blocks] == list(range(len(names)))
    parameters = dict(model.named_parameters())
    claimed = [name for block in blocks for name in block.parameter_names]
    assert sorted(claimed) == sorted(parameters)  # each in exactly one block
    for block in blocks:
        assert block.numel == sum(parameters[name].numel() for name in block.parameter_names)
        if block.name not in ("embedding", "head") and not block.name.endswith("final_norm"):
            assert all(name.startswith(f"{block.name}.") for name in block.parameter_names)


def parameters_of(model: nn.Module, block: str) -> tuple[str, ...]:
    return {found.name: found.parameter_names for found in find_blocks(model)}[block]


def test_what_stands_beside_the_layers_is_where_it_belongs() -> None:
    assert parameters_of(gpt2(), "embedding") == ("transformer.wte.weight", "transformer.wpe.weight")
    assert parameters_of(opt(), "final_norm") == (
        "model.decoder.final_layer_norm.weight",
        "model.decoder.final_layer_norm.bias",
    )
    assert set(parameters_of(opt(True), "embedding")) == {
        f"model.decoder.{name}.weight" for name in ("embed_tokens", "embed_positions", "project_in", "project_out")
    }
    assert parameters_of(t5(), "encoder.final_norm") == ("encoder.final_layer_norm.weight",)
    assert parameters_of(t5(False), "head") == ("lm_head.weight",)
    assert "bert.embeddings.LayerNorm.weight" in parameters_of(bert(), "embedding")
    assert "cls.predictions.bias" in parameters_of(bert(), "embedding")  # of the tied head
    assert set(parameters_of(bert(), "head")) == {
        f"cls.predictions.transform.{part}.{kind}" for part in ("dense", "LayerNorm") for kind in ("weight", "bias")
    }
    assert "bert.pooler.dense.weight" in parameters_of(bert_classifier(), "head")


@pytest.mark.parametrize(("name", "layer_count", "count"), [("Llama-3.2-1B", 16, 18), ("Qwen2.5-0.5B", 24, 26)])
def test_the_papers_models_at_their_real_shapes(name: str, layer_count: int, count: int) -> None:
    shapes = {
        "Llama-3.2-1B": transformers.LlamaConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
            tie_word_embeddings=True,
        ),
        "Qwen2.5-0.5B": transformers.Qwen2Config(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
    }
    numel = {"Llama-3.2-1B": 1_235_814_400, "Qwen2.5-0.5B": 494_032_768}  # as their model cards' safetensors
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(shapes[name])
    blocks = find_blocks(model)
    assert len(blocks) == count
    assert list(block_names(blocks)) == ["embedding", *layers("model.layers", layer_count), "final_norm"]
    assert sum(block.numel for block in blocks) == numel[name]


class Layer(nn.Module):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)


class OtherLayer(Layer):
    pass


class Tree(nn.Module):
    """A module with the given children, in the given order."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def stack(count: int = 2) -> nn.ModuleList:
    return nn.ModuleList(Layer() for _ in range(count))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        pytest.param(
            Tree(
                emb=nn.Embedding(4, 4),
                emb_norm=nn.LayerNorm(4),
                body=stack(),
                ln=nn.LayerNorm(4),
                out=Layer(),
            ),
            ["embedding", "body.0", "body.1", "final_norm", "head"],
            id="plain",
        ),
        pytest.param(
            Tree(out=nn.Linear(4, 4), body=stack(), position=nn.Embedding(4, 4)),
            ["embedding", "body.0", "body.1"],
            id="embedding-registered-last",
        ),
        pytest.param(
            nn.Sequential(nn.Embedding(4, 4), Layer(), Layer(), nn.LayerNorm(4), nn.Linear(4, 4)),
            ["embedding", "1", "2", "final_norm", "head"],
            id="sequential-of-everything",
        ),
        pytest.param(
            nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
            ["0", "2"],
            id="leaves-where-nothing-larger",
        ),
        pytest.param(
            Tree(projector=nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), body=stack()),
            ["embedding", "body.0", "body.1"],
            id="lists-of-leaves-beside-layers",
        ),
        pytest.param(
            Tree(body=nn.ModuleList([Layer(), OtherLayer(), Layer()])),
            ["body.0", "body.1", "body.2"],
            id="hybrid-layers",
        ),
        pytest.param(
            Tree(body=nn.ModuleList([nn.ModuleList([Layer(), Layer()]), nn.ModuleList([Layer(), Layer()])])),
            ["body.0", "body.1"],
            id="outermost-list",
        ),
        pytest.param(
            Tree(
                vision=Tree(patch=nn.Conv2d(3, 4, 2), body=stack(), post_norm=nn.LayerNorm(4), pool=Layer()),
                projector=nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)),
                text=Tree(emb=nn.Embedding(4, 4), body=stack(), norm=nn.LayerNorm(4)),
                head=nn.Linear(4, 4),
            ),
            [
                "embedding",
                "vision.embedding",
                "vision.body.0",
                "vision.body.1",
                "vision.final_norm",
                "vision.head",
                "projector",
                "text.body.0",
                "text.body.1",
                "text.final_norm",
                "head",
            ],
            id="vision-and-text",
        ),
        pytest.param(
            Tree(core=Tree(body=stack(), pooler=Layer()), norm=nn.LayerNorm(4)),
            ["core.body.0", "core.body.1", "final_norm", "head"],
            id="head-is-last",
        ),
    ],
)
def test_the_rule_reads_any_tree(model: nn.Module, names: list[str]) -> None:
    blocks = find_blocks(model)
    assert list(block_names(blocks)) == names
    assert sum(block.numel for block in blocks) == sum(p.numel() for p in model.parameters())


def test_a_tied_head_counts_once_under_its_first_name_wherever_it_stands() -> None:
    model: Any = Tree(head=nn.Linear(4, 8), emb=nn.Embedding(8, 4), body=stack())
    model.head.weight = model.emb.weight
    blocks = find_blocks(model)
    assert block_names(blocks) == ("embedding", "body.0", "body.1")
    assert blocks[0].parameter_names == ("head.weight", "head.bias")


def test_an_untied_head_is_the_last_block_wherever_it_stands() -> None:
    class HeadFirst(Tree):
        def get_output_embeddings(self) -> Any:
            return self.out

    model = HeadFirst(out=nn.Linear(4, 8), emb=nn.Embedding(8, 4), body=stack())
    assert block_names(find_blocks(model)) == ("embedding", "body.0", "body.1", "head")


def test_a_weight_shared_by_two_layers_is_in_the_first() -> None:
    model: Any = Tree(body=stack(3))
    model.body[2].linear.weight = model.body[0].linear.weight
    assert [block.parameter_names for block in find_blocks(model)] == [
        ("body.0.linear.weight", "body.0.linear.bias"),
        ("body.1.linear.weight", "body.1.linear.bias"),
        ("body.2.linear.bias",),
    ]


def test_frozen_parameters_are_in_no_block_and_empty_blocks_vanish() -> None:
    model = llama(True)
    model.get_input_embeddings().requires_grad_(False)
    model.model.layers[1].requires_grad_(False)
    model.model.layers[2].mlp.requires_grad_(False)
    blocks = find_blocks(model)
    assert block_names(blocks) == ("model.layers.0", "model.layers.2", "final_norm")
    assert [block.index for block in blocks] == [0, 1, 2]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for block in blocks for name in block.parameter_names} == trainable


def test_a_parameter_without_elements_is_in_no_block() -> None:
    model = Tree(body=stack())
    model.empty = nn.Parameter(torch.empty(0))
    assert block_names(find_blocks(model)) == ("body.0", "body.1")


def test_blocks_of_the_users_own_in_the_users_order() -> None:
    blocks = find_blocks(
        llama(False),
        {
            "top": [r"model\.norm\.weight", r"lm_head\.weight"],
            "attention": [r"model\.layers\.\d+\.self_attn\..*"],
            "rest": [r"model\.layers\.\d+\.(mlp|\w*layernorm).*", r"model\.embed_tokens\.weight"],
        },
    )
    assert block_names(blocks) == ("top", "attention", "rest")
    assert blocks[0].parameter_names == ("model.norm.weight", "lm_head.weight")
    assert len(blocks[1].parameter_names) == 12


def test_the_users_blocks_need_no_repeated_layers_and_may_match_frozen_parameters() -> None:
    model: Any = Tree(a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model.a.bias.requires_grad_(False)
    blocks = find_blocks(model, {"frozen": [r"a\.bias"], "one": ["a.weight"], "two": ["b.weight", "b.bias"]})
    assert block_names(blocks) == ("one", "two")


def refusal(model: nn.Module, overrides: dict[str, list[str]] | None = None) -> str:
    with pytest.raises(BlockError) as caught:
        find_blocks(model, overrides)
    return str(caught.value)


def test_a_parameter_that_no_block_claims_is_listed() -> None:
    assert (
        refusal(Tree(body=stack()), {"one": [r"body\.0\..*", r"body\.1\.linear\.bias"]})
        == 'adagrad_select.blocks leaves 1 trainable parameter ("body.1.linear.weight") in no block. Add a'
        " pattern for each, or freeze it (requires_grad=False) before training starts."
    )
    said = refusal(Tree(body=stack(5)), {"one": [r"body\.0\..*"]})
    assert 'leaves 8 trainable parameters ("body.1.linear.weight", ' in said
    assert '"body.3.linear.weight" and 3 more) in no block' in said


def test_a_parameter_that_two_blocks_claim_is_listed_with_the_blocks() -> None:
    overrides = {"all": [".*"], "other": ["x|.*0.*"], "bias": [r"body\.0\.linear\.bias"]}
    assert (
        refusal(Tree(body=stack()), overrides)
        == 'adagrad_select.blocks puts 2 trainable parameters ("body.0.linear.weight", "body.0.linear.bias")'
        ' in two blocks or more (the first in "all", "other"). Narrow the patterns; each must match whole'
        " parameter names."
    )


def test_a_pattern_matches_whole_names_and_one_that_matches_none_is_refused() -> None:
    assert (
        refusal(Tree(body=stack()), {"a": [".*"], "b": ["body"]})
        == 'adagrad_select.blocks["b"] has the pattern "body", which matches no parameter of this model.'
        ' Patterns match whole names, such as "body.0.linear.weight".'
    )


def test_a_pattern_for_a_tied_name_is_told_the_first_name() -> None:
    said = refusal(llama(True), {"a": ["model.*"], "b": [r"lm_head\.weight"]})
    assert said.endswith('"lm_head.weight" is tied to "model.embed_tokens.weight": claim it under that name.')


def test_a_pattern_that_is_no_regular_expression_is_refused() -> None:
    assert refusal(Tree(body=stack()), {"a": ["("]}).startswith(
        'adagrad_select.blocks has "(", which is not a regular expression: missing )'
    )


def test_a_model_without_trainable_parameters_is_refused() -> None:
    expected = "Tree has no trainable parameters. Set requires_grad=True on what is to be trained"
    model = Tree(body=stack()).requires_grad_(False)
    assert refusal(model).startswith(expected)
    assert refusal(model, {"all": [".*"]}).startswith(expected)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), Tree(body=stack(1)), Tree(a=Layer(), b=Layer())])
def test_a_model_without_repeated_layers_is_sent_to_blocks(model: nn.Module) -> None:
    assert (
        refusal(model) == f"{type(model).__name__} has no repeated layers: no ModuleList or Sequential in it holds two"
        " modules of one class. Name its blocks with adagrad_select.blocks, a map from block name to"
        " regular expressions over parameter names."
    )


def test_names_resolve_to_ascending_indices_once() -> None:
    blocks = find_blocks(llama(False))
    assert resolve_names(blocks, ["head", "embedding", "head"], "always_select") == (0, 5)
    assert resolve_names(blocks, [], "always_select") == ()


def test_an_unknown_name_is_refused_with_the_nearest_and_all() -> None:
    expected = (
        'adagrad_select.never_select names "Embeddings", which is not a block of this model. Did you mean'
        ' "embedding"? Its blocks: "embedding", "body.0", "body.1".'
    )
    blocks = find_blocks(Tree(emb=nn.Embedding(4, 4), body=stack()))
    with pytest.raises(ConfigError, match=re.escape(expected)):
        resolve_names(blocks, ["Embeddings"], "never_select")
