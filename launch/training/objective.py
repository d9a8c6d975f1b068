"""The loss: cross-entropy, computed on completion tokens only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..data.batches import IGNORED


def completion_loss_sum(
    forward: Callable[..., Any], batch: dict[str, torch.Tensor], *, keeps_last_logits: bool
) -> torch.Tensor:
    """Sum over the batch's completion tokens of the cross-entropy of predicting them; fp32 scalar.

    A sum, so that the caller can divide by the tokens of the whole step, however they lie on ranks and
    micro-steps. With ``keeps_last_logits`` the head is not applied to the positions before every row's
    completion: with a large vocabulary it costs a small model a good part of its forward.
    """
    logits, targets = _wanted_logits(forward, batch, keeps_last_logits)
    wanted = targets != IGNORED
    return F.cross_entropy(logits[wanted].float(), targets[wanted], reduction="sum")


def completion_loss_of_rows(
    forward: Callable[..., Any], batch: dict[str, torch.Tensor], *, keeps_last_logits: bool
) -> torch.Tensor:
    """`completion_loss_sum` of each row; float64, (rows,), on the host."""
    logits, targets = _wanted_logits(forward, batch, keeps_last_logits)
    wanted = targets != IGNORED
    losses = F.cross_entropy(logits[wanted].float(), targets[wanted], reduction="none").cpu().double()
    rows = wanted.nonzero()[:, 0].cpu()
    return torch.zeros(len(targets), dtype=torch.float64).index_add_(0, rows, losses)


def _wanted_logits(
    forward: Callable[..., Any], batch: dict[str, torch.Tensor], keeps_last_logits: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of the positions from the first that any row's loss is on, and their targets."""
    labels = batch["labels"]
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    # Position t predicts token t + 1, so no label is at position 0.
    has_label = (labels != IGNORED).any(dim=0)
    first = max(1, int(has_label.to(torch.uint8).argmax())) if bool(has_label.any()) else 1
    if keeps_last_logits:
        # Positions, not their number, which would give the head a slice of the hidden states: torch multiplies one
        # that is not contiguous by a weight that needs no gradient row by row, and copies the weight for each row
        # (should_fold in ATen's LinearAlgebra.cpp). With a frozen head of 49,152 tokens that doubles forward.
        inputs["logits_to_keep"] = torch.arange(first - 1, labels.shape[1], device=labels.device)
    else:
        first = 1
    logits = forward(**inputs, use_cache=False).logits[:, :-1]
    return logits, labels[:, first:]
