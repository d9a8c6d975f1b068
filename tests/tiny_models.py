"""The models that most tests train, as small as they can be with every kind of block."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

LENGTH, VOCABULARY = 8, 37


def tiny_llama(tied: bool = True) -> LlamaForCausalLM:
    """Four layers; weights large enough that the blocks' gradients differ."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        attn_implementation="eager",
        use_cache=False,
    )
    return LlamaForCausalLM(config)


class TinyLayer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.gain * torch.tanh(self.linear(hidden))


class TinyNet(nn.Module):
    """Four layers of odd sizes, each with a parameter of one element: partitions that are uneven, or empty.

    "net" has a width of 5, "net66" of 66.
    ``checkpointing`` "reentrant" or "non-reentrant" recomputes each layer in backward.
    """

    def __init__(self, name: str = "net", checkpointing: str | None = None):
        super().__init__()
        width = int(name.removeprefix("net") or 5)
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(TinyLayer(width) for _ in range(4))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)
        self.checkpointing = checkpointing

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, labels: Tensor) -> CausalLMOutput:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            if self.checkpointing:
                hidden = checkpoint(layer, hidden, use_reentrant=self.checkpointing == "reentrant")
            else:
                hidden = layer(hidden)
        logits = self.head(self.norm(hidden))
        return CausalLMOutput(loss=nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
