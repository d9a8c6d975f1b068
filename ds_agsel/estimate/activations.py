"""What forward keeps for backward, which the exact tables leave out: counted on the meta device, without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ds_agsel.blocks import repeated_layers

# For each logit: in the model's dtype, in fp32, its softmax and its gradient.
_LOGIT_BYTES = 2 + 3 * 4
_TOKENS = 16  # of the forward that is counted: what it keeps is in proportion to them
_ATTENTION = "ds_agsel_counted"
# A layer that is computed anew exists beside the gradients of about half of what it keeps.
_RECOMPUTED = 1.5
# Of the inputs and outputs of a layer's matrices, where forward can't run on the meta device.
_RULE = 1.6


@dataclass(frozen=True)
class Activations:
    """What a token of a micro-step keeps, in bytes, with an attention that keeps no scores (flash, memory-efficient).

    Attributes:
        saved_bytes: all tensors that autograd keeps from the embedding to the head's input.
        input_bytes: the input of one repeated layer, which is all that stays of a checkpointed one.
        logits_bytes: the loss's: all logits, in the forms in which they exist at the same time.
        layers: the number of repeated layers.
    """

    saved_bytes: float
    input_bytes: int
    logits_bytes: int
    layers: int

    def peak_bytes(self, tokens: int, *, checkpointing: bool) -> int:
        """Return the most that a micro-step over ``tokens`` tokens holds, its layers checkpointed or not."""
        kept = self.saved_bytes
        if checkpointing:
            kept = self.layers * self.input_bytes + _RECOMPUTED * self.saved_bytes / self.layers
        return round(tokens * (kept + self.logits_bytes))


def activations_of(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Activations:
    """Return the activations of a causal language model on the meta device, whose weights become ``dtype``."""
    config: Any = model.config
    layers = repeated_layers(model)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    item_bytes = dtype.itemsize
    try:
        saved = _counted(model.to(dtype)) / _TOKENS
    except Exception:  # an operation without a meta kernel, or a model that wants other inputs
        matrices = [parameter for layer in layers for parameter in layer.parameters() if parameter.dim() == 2]
        saved = _RULE * item_bytes * sum(sum(matrix.shape) for matrix in matrices)
    return Activations(saved, item_bytes * int(text.hidden_size), _LOGIT_BYTES * int(text.vocab_size), len(layers))


def _counted(model: nn.Module) -> int:
    """Return the bytes that autograd keeps of a forward over `_TOKENS` tokens, weights and logits left out."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # by storage, held so that none is used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    config: Any = model.config
    _register()
    before = config._attn_implementation, getattr(config, "pad_token_id", None)
    config._attn_implementation, config.pad_token_id = (
        _ATTENTION,
        None,
    )  # else transformers looks for padding in the row
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            rows = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
            output = model.train()(input_ids=rows, use_cache=False)
    finally:
        config._attn_implementation, config.pad_token_id = before
    logits = output.logits.untyped_storage()._cdata
    return sum(storage.nbytes() for key, storage in kept.items() if key != logits)


class _Attention(torch.autograd.Function):
    """Keeps what a fused attention keeps: its inputs, its output and a sum for each row. It computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        rows, heads, tokens, _ = query.shape
        output = query.new_empty(rows, tokens, heads, value.shape[-1])
        sums = query.new_empty(rows, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    return _Attention.apply(query, key, value), None


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attend)
