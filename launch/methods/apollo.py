"""APOLLO (arXiv:2412.05270) by the package apollo-torch, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from .base import Option, RunContext, package
from .plain_torch import PlainTorch, adam_options, projected_groups


class Apollo(PlainTorch):
    """Learning rates by channel from moments of rank ``rank`` under a random projection.

    APOLLO-Mini is rank=1 scale_type=tensor scale=128. States and weights are in the model's precision, as in the
    package.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "rank": 256, "proj": "random", "scale_type": "channel", "scale": 1.0, "update_proj_gap": 200,
        "proj_type": "std",
    }  # fmt: skip

    def optimizer(self, model: nn.Module, context: RunContext) -> torch.optim.Optimizer:
        groups = projected_groups(model, **self.options)
        optimizer: Any = package("apollo_torch", "apollo-torch").APOLLOAdamW
        return optimizer(groups, **adam_options(context.config))

    def begin_step(self, step: int) -> None:
        self._projects = step % self.options["update_proj_gap"] == 0

    def phase(self) -> str:
        return "projection" if self._projects else "plain"
