"""BAdam (arXiv:2404.02827) by its package: plain PyTorch, and the form it has for ZeRO-3, tried on all stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ds_agsel.blocks import find_blocks
from ds_agsel.ds_config import with_zero, without_optimizer
from ds_agsel.errors import ConfigError
from ds_agsel.zero.storage import storage_bytes

from .base import Option, RunContext, package
from .plain_torch import PlainTorch, adam_options
from .tensors import held_by
from .zero import Full

# 0: the paper's K = n / (B D), steps of an epoch over blocks.
_BADAM: Mapping[str, Option] = {"every": 0, "mode": "random"}
_MODES = ("random", "ascending", "descending")


def block_optimizer(model: nn.Module, base: Any, options: Mapping[str, Any], context: RunContext) -> Any:
    """Return a badam.BlockOptimizer around ``base``: a layer at a time; embedding, head and norm are never trained."""
    if options["mode"] not in _MODES or options["every"] < 0:
        raise ConfigError(
            f"--method-option mode={options['mode']} every={options['every']}: mode is one of {', '.join(_MODES)}, "
            "every is 0 (one epoch for all blocks) or the steps of a block."
        )
    layers = sum(block.name.rpartition(".")[2].isdigit() for block in find_blocks(model))
    return package("badam").BlockOptimizer(
        base_optimizer=base,
        named_parameters_list=list(model.named_parameters()),
        switch_block_every=options["every"] or max(1, context.steps_per_epoch // max(1, layers)),
        switch_mode=options["mode"],
    )


def in_training(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that BAdam has thawed."""
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)


class Badam(PlainTorch):
    """Plain PyTorch. The package makes fp32 copies of the block in turn and drops its states at a switch."""

    OPTIONS: ClassVar[Mapping[str, Option]] = _BADAM
    MASTERS: ClassVar[str] = "fp32 copies of the block in training"

    def optimizer(self, model: nn.Module, context: RunContext) -> torch.optim.Optimizer:
        base = torch.optim.AdamW(model.parameters(), **adam_options(context.config))
        self._optimizer = block_optimizer(model, base, self.options, context)
        return self._optimizer

    def begin_step(self, step: int) -> None:
        self._names = in_training(self.engine.module)

    def phase(self) -> str:
        return "plain" if self._names == in_training(self.engine.module) else "switch"

    def trained(self) -> frozenset[str]:
        return self._names

    def state_bytes(self) -> int:
        return storage_bytes(held_by(self._optimizer.base_optimizer.state.values()))

    def master_bytes(self) -> int:
        return storage_bytes(list(self._optimizer.param_idx2hp.values()))


class _BadamZero(Full):
    """Under DeepSpeed, as the package's README tells; written for ZeRO-3."""

    OPTIONS: ClassVar[Mapping[str, Option]] = _BADAM
    STAGE: ClassVar[int]

    def edit(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        # The optimizer is an object, and DeepSpeed must accept a class that it does not know.
        free = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        return {**with_zero(super().edit(config), stage=self.STAGE), **free}

    def start(self, model: Any, context: RunContext) -> Any:
        from transformers.integrations import HfDeepSpeedConfig

        config = dict(context.config)
        # While it is alive, the package detects ZeRO-3 by it, at import and later.
        self._seen_by_badam = HfDeepSpeedConfig(config)
        base = torch.optim.AdamW(model.parameters(), **adam_options(config))
        self._optimizer = block_optimizer(model, base, self.options, context)
        super().start(model, RunContext(without_optimizer(config), context.steps_per_epoch, context.seed))
        self._optimizer.ds_optimizer = self.engine.optimizer
        return self.engine

    def _initialize(self, model: Any, config: dict[str, Any], **more: Any) -> Any:
        return super()._initialize(model, config, optimizer=self._optimizer)

    def begin_step(self, step: int) -> None:
        self._names = in_training(self.engine.module)

    def phase(self) -> str:
        return "plain" if self._names == in_training(self.engine.module) else "switch"

    def trained(self) -> frozenset[str]:
        return self._names

    def state_bytes(self) -> int:
        return storage_bytes(held_by(self._optimizer.base_optimizer.state.values()))


class BadamZero1(_BadamZero):
    """With ZeRO stage 1."""

    STAGE = 1


class BadamZero2(_BadamZero):
    """With ZeRO stage 2."""

    STAGE = 2


class BadamZero3(_BadamZero):
    """With ZeRO stage 3."""

    STAGE = 3
