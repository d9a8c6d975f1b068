"""Where backward ends with activation checkpointing: at the lowest selected block, not at the embedding.

transformers 5 calls ``enable_input_require_grads()`` inside ``gradient_checkpointing_enable`` (modeling_utils.py), and
so do TRL's trainers: a hook makes the embedding's output require gradients. Every layer above it is then part of the
graph, and backward runs through all of them, whatever is frozen.

- Non-reentrant checkpointing needs no such hook: it is removed.
- Reentrant checkpointing gives a segment gradients only if one of its inputs requires any. The hook is removed as
  well, and the input of a segment is marked where the segment has trainable parameters and no input requires
  gradients: at the lowest selected layer.

transformers keeps the function that checkpoints a layer in the layer's ``_gradient_checkpointing_func``, a partial of
`torch.utils.checkpoint.checkpoint`. Where a layer has another function, or nothing is checkpointed, the hook stays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_FUNCTION = "_gradient_checkpointing_func"


class InputGradients:
    """Keeps a model's inputs from requiring gradients where no selected block needs it."""

    def __init__(self, model: nn.Module) -> None:
        self._owners = [module for module in model.modules() if hasattr(module, "disable_input_require_grads")]
        self._modules = list(model.modules())

    def take_over(self) -> bool:
        """Remove the hooks on the embeddings where checkpointing allows it; return whether any was removed.

        Idempotent. Call it before the first forward of a step: a framework may enable checkpointing at any time.
        """
        hooked: list[Any] = [owner for owner in self._owners if _has_hook(owner)]
        if not hooked:
            return False
        checkpointed = [layer for layer in self._modules if getattr(layer, "gradient_checkpointing", False)]
        kinds = [_is_reentrant(getattr(layer, _FUNCTION, None)) for layer in checkpointed]
        if not kinds or None in kinds:  # nothing is checkpointed, or an unknown function does it
            return False
        for layer, reentrant in zip(checkpointed, kinds):
            if reentrant and not isinstance(getattr(layer, _FUNCTION), _MarkedInputs):
                setattr(layer, _FUNCTION, _MarkedInputs(layer, getattr(layer, _FUNCTION)))
        for owner in hooked:
            owner.disable_input_require_grads()
        return True


class _MarkedInputs:
    """A reentrant checkpoint function that marks a segment's input if its parameters would else get no gradient."""

    def __init__(self, layer: nn.Module, function: Callable[..., Any]) -> None:
        self.layer = layer
        self.function = function

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.layer.parameters()):
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            inputs = [value for value in args if isinstance(value, torch.Tensor) and value.is_floating_point()]
            if inputs and not any(tensor.requires_grad for tensor in tensors):
                inputs[0].requires_grad_(True)  # a leaf, as nothing below requires gradients
        return self.function(run, *args, **kwargs)


def _is_reentrant(function: Any) -> bool | None:
    """Return whether ``function`` checkpoints in the reentrant form; None for one that is not transformers' partial."""
    if isinstance(function, _MarkedInputs):
        return True
    if not isinstance(function, functools.partial) or function.func is not checkpoint:
        return None
    return bool(function.keywords.get("use_reentrant", True))


def _has_hook(owner: nn.Module) -> bool:
    """Return whether the embedding of ``owner`` has the hook.

    transformers before 5 keeps only one, under another name.
    """
    hooks = getattr(owner, "_require_grads_hooks", None)
    return bool(hooks) or getattr(owner, "_require_grads_hook", None) is not None
