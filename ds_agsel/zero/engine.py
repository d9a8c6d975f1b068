"""The engine: the methods that a user calls around a step, and the scalars for the monitor."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from ds_agsel.blocks import repeated_layers
from ds_agsel.errors import ConfigError, TrainingError
from ds_agsel.report import metrics
from ds_agsel.sparse.targets import is_carrier
from ds_agsel.zero import compat
from ds_agsel.zero.checkpointing import CheckpointingEngine

MONITOR_PREFIX = "AdaGradSelect"

logger = logging.getLogger("ds_agsel")


class SelectiveEngine(CheckpointingEngine):
    """A `DeepSpeedEngine` with a `selection`. Made by `ds_agsel.initialize`, not constructed."""

    @compat.overrides
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """`DeepSpeedEngine.forward`. Raises TrainingError if another engine trains the model now."""
        if torch.is_grad_enabled():
            self.optimizer.window.refuse_if_retired()
        return super().forward(*inputs, **kwargs)

    @compat.overrides
    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> Any:
        """`DeepSpeedEngine.backward`. With an exception the step's window ends: its gradients are dropped.

        Raises TrainingError, with the remedy, for a loss that depends on nothing selected; DeepSpeed would say that
        it is no scalar (engine.py:3397). If no selected block took part in forward, nothing is raised or done.
        """
        window = self.optimizer.window
        window.prepare()
        # DeepSpeed sets it at the outputs of `forward`, which a forward through `engine.module` bypasses.
        self.optimizer.set_gradient_accumulation_boundary(self.is_gradient_accumulation_boundary())
        if isinstance(loss, torch.Tensor) and not loss.requires_grad:
            if not window.explains_silence():
                raise TrainingError(
                    f"step {self.selection.plan.step}: the loss requires no gradient. With activation checkpointing, "
                    "set use_reentrant=False (TrainingArguments: gradient_checkpointing_kwargs): the reentrant form "
                    "drops the gradients of a segment whose inputs require none."
                )
            loss = loss.detach().requires_grad_() * 1  # DeepSpeed counts the micro-step; no parameter gets a gradient
        try:
            return super().backward(loss, *args, **kwargs)
        except BaseException:
            window.abandon()
            raise

    @compat.overrides
    def zero_grad(self) -> None:
        """`DeepSpeedEngine.zero_grad`; the scores of an explore step are dropped, and computed anew."""
        super().zero_grad()
        self.optimizer.window.zero_grad()

    @compat.overrides
    def load_checkpoint(
        self, load_dir: str | os.PathLike[str], tag: str | None = None, *args: Any, **kwargs: Any
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Load as `CheckpointingEngine.load_checkpoint` does, and end an open accumulation window.

        The window's gradients are dropped (plain DeepSpeed adds them to those of the loaded weights), and the next
        micro-step is the first.
        """
        result = super().load_checkpoint(load_dir, tag, *args, **kwargs)
        if result[0] is not None:
            self.optimizer.window.abandon()
            self.micro_steps -= self.micro_steps % self.gradient_accumulation_steps()
        return result

    @compat.overrides
    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """`DeepSpeedEngine.step`; an applied step is reported to DeepSpeed's monitor as ``AdaGradSelect/...`` scalars.

        The blocks' update counts follow every ``steps_per_print`` steps.
        """
        applied = self.selection.num_steps
        super().step(lr_kwargs)
        if self.selection.num_steps > applied and self.monitor.enabled and self.global_rank == 0:
            scalars = metrics.scalars(self.selection)
            if self.steps_per_print() and self.global_steps % self.steps_per_print() == 0:  # it may be null
                scalars.update(metrics.block_counts(self.selection))
            self.monitor.write_events(
                [(f"{MONITOR_PREFIX}/{name}", value, self.global_samples) for name, value in scalars.items()]
            )

    @compat.overrides
    def compile(
        self,
        backend: Any = None,
        compile_kwargs: Mapping[str, Any] | None = None,
        schedule: Any = None,
        compiled_autograd_enabled: bool = False,
    ) -> None:
        """`DeepSpeedEngine.compile`, layer by layer instead of the whole module; idempotent.

        A whole-model graph depends on which blocks are frozen: torch 2.13 compiles it anew for each selection and,
        after 8, silently goes back to eager. Layers share their graphs. Raises ConfigError for a model
        without repeated layers, a DeepCompile schedule and compiled autograd.
        """
        if schedule is not None or compiled_autograd_enabled:
            raise ConfigError(
                f"engine.compile(schedule={schedule!r}, compiled_autograd_enabled={compiled_autograd_enabled}) "
                "can't be used with adagrad_select: both build one graph of all blocks' gradients. Leave them out."
            )
        if self.selection.config.gast is not None:
            raise ConfigError(
                "engine.compile() can't be used with adagrad_select.gast: rows are chosen in the middle of backward, "
                "where a compiled layer's graph has no place for it. Leave the call out, or remove gast."
            )
        if self.is_compiled:
            return
        if self.selection.sparse is not None:
            raise ConfigError(
                "engine.compile() can't be used with adagrad_select.sparse_grad: the gradient of the trained entries "
                "is computed outside of torch's graphs. Leave compile() out, or sparse_grad."
            )
        layers = repeated_layers(self.module)
        if not layers:
            raise ConfigError(
                f"engine.compile(): {type(self.module).__name__} has no repeated layers to compile one by one. "
                "Call compile() on the parts of it that are worth it."
            )
        options = {**(compile_kwargs or {}), "backend": backend or get_accelerator().get_compile_backend()}
        for layer in layers:
            layer.compile(**options)
        compat.mark_compiled(self, options)
        logger.info("adagrad_select: compiled %d layers one by one, not the whole model.", len(layers))

    @compat.overrides
    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any] | None:
        """`DeepSpeedEngine`'s, the model's own weights alone: those of sparse_grad's carriers are in the matrices."""
        state = super()._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters)
        return state and {name: value for name, value in state.items() if not is_carrier(name)}

    @compat.overrides
    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        """Refused with a ConfigError: DeepSpeed's (engine.py:6035) copies states that most blocks do not have."""
        raise ConfigError(
            "engine.offload_states() can't be used with adagrad_select: it moves all blocks' states, of which most do "
            "not exist or are in host memory. Set adagrad_select.step_device='accelerator', with which states are on "
            "the accelerator during a step alone, or leave the call out."
        )
