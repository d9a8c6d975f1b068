"""LISA (arXiv:2403.17919, algorithm 1), written from the paper: as plain PyTorch, and as a callback under ZeRO.

Embedding, head and final norm are trained at every step, and with them ``layers`` layers (the paper's gamma, 2 in
its E+H+2L), drawn anew every ``every`` steps (the paper's K).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from ds_agsel.blocks import find_blocks
from ds_agsel.errors import ConfigError

from .base import Option, RunContext
from .plain_torch import Masters, PlainTorch, adam_options
from .zero import Full

_LISA: Mapping[str, Option] = {"layers": 2, "every": 5}


class LayerDraw:
    """Which parameters are trained at a step, a function of (seed, step)."""

    def __init__(self, model: nn.Module, options: Mapping[str, Any], seed: int) -> None:
        blocks = find_blocks(model)
        layers = [block for block in blocks if block.name.rpartition(".")[2].isdigit()]
        self._layers = [block.parameter_names for block in layers]
        self._always = [name for block in blocks if block not in layers for name in block.parameter_names]
        self._count, self._every, self._seed = options["layers"], options["every"], seed
        if not 1 <= self._count <= len(layers):
            raise ConfigError(f"--method-option layers={self._count} is outside [1, {len(layers)}], layers there are.")
        if self._every < 1:
            raise ConfigError(f"--method-option every={self._every} is outside [1, inf). Use 1 or more.")
        self._parameters = dict(model.named_parameters())
        self.names: frozenset[str] = frozenset()

    def thaw(self, step: int) -> bool:
        """Let only the parameters of ``step`` require gradients; return whether they were drawn anew."""
        if step % self._every:
            return False
        random = np.random.default_rng((self._seed, step // self._every))
        drawn = random.choice(len(self._layers), self._count, replace=False)
        self.names = frozenset([*self._always, *(name for index in drawn for name in self._layers[index])])
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(name in self.names)
        return True

    def weights(self) -> list[nn.Parameter]:
        """Return the parameters that are trained now."""
        return [parameter for name, parameter in self._parameters.items() if name in self.names]


class Lisa(PlainTorch):
    """LISA in plain PyTorch.

    ``release`` 1 drops the states of frozen layers, as the paper's memory figures need; 0 keeps them.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {**_LISA, "release": 1}
    MASTERS: ClassVar[str] = "fp32 copies of the weights in training"

    def optimizer(self, model: nn.Module, context: RunContext) -> torch.optim.Optimizer:
        self._draw = LayerDraw(model, self.options, context.seed)
        self._draw.thaw(0)
        weights = self._draw.weights() if self.options["release"] else model.parameters()
        self._masters = Masters(weights, **adam_options(context.config))
        return self._masters.optimizer

    def begin_step(self, step: int) -> None:
        self._drawn = self._draw.thaw(step)
        if self._drawn and self.options["release"]:
            self._masters.keep_only(self._draw.weights())

    def phase(self) -> str:
        return "switch" if self._drawn else "plain"

    def trained(self) -> frozenset[str]:
        return self._draw.names

    def master_bytes(self) -> int:
        return self._masters.held_bytes()


class LisaZero(Full):
    """LISA's callback, which sets requires_grad, under ZeRO, which still steps frozen parameters."""

    OPTIONS: ClassVar[Mapping[str, Option]] = _LISA

    def start(self, model: Any, context: RunContext) -> Any:
        self._draw = LayerDraw(model, self.options, context.seed)
        return super().start(model, context)

    def begin_step(self, step: int) -> None:
        self._drawn = self._draw.thaw(step)

    def phase(self) -> str:
        return "switch" if self._drawn else "plain"

    def trained(self) -> frozenset[str]:
        return self._draw.names
