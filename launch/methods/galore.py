"""GaLore (arXiv:2403.03507) by the package galore-torch, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from .base import Option, RunContext, package
from .plain_torch import PlainTorch, adam_options, projected_groups


class Galore(PlainTorch):
    """Moments of rank ``rank``; every ``update_proj_gap`` steps an SVD of each matrix's gradient.

    States and weights are in the model's precision, as in the package.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}

    def optimizer(self, model: nn.Module, context: RunContext) -> torch.optim.Optimizer:
        groups = projected_groups(model, **self.options)
        optimizer: Any = package("galore_torch", "galore-torch").GaLoreAdamW
        return optimizer(groups, no_deprecation_warning=True, **adam_options(context.config))

    def begin_step(self, step: int) -> None:
        self._projects = step % self.options["update_proj_gap"] == 0

    def phase(self) -> str:
        return "projection" if self._projects else "plain"
