"""A rule of thumb for activations, which the exact tables leave out."""

from __future__ import annotations

from ds_agsel.blocks import EMBEDDING, FINAL_NORM, HEAD
from ds_agsel.estimate.shapes import ModelShape

# For each logit: bf16, fp32, its softmax and its gradient.
_LOGIT_BYTES = 2 + 3 * 4


def checkpointed_activation_bytes(model: ModelShape, tokens: int, item_bytes: int = 2) -> int:
    """Estimate what a micro-step over ``tokens`` tokens keeps, with every layer checkpointed and a fused attention.

    The input of each layer, all inputs and outputs of one layer's linear layers and their gradients, and the logits.
    """
    outside = (EMBEDDING, FINAL_NORM, HEAD)  # also with a stack's path before it
    wholes = {block.layer or block.name for block in model.blocks}
    layers = sum(name.rpartition(".")[2] not in outside for name in wholes)
    hidden = model.linears[0][0]
    one_layer = sum(inputs + outputs for inputs, outputs in model.linears) // layers
    head = next(block for name in (HEAD, EMBEDDING) for block in model.blocks if block.name == name)
    return tokens * (item_bytes * (layers * hidden + 2 * one_layer) + _LOGIT_BYTES * (head.numel // hidden))
