"""The choice of rows under ZeRO: what can't be used with it, and how it is made for an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from ds_agsel.blocks import repeated_layers
from ds_agsel.config import SelectionConfig
from ds_agsel.ds_config import DsConfig
from ds_agsel.errors import ConfigError, TrainingError
from ds_agsel.samples.linears import gated_linears
from ds_agsel.samples.rows import RowChoice
from ds_agsel.samples.support import SupportData, loss_of
from ds_agsel.selection import Selection
from ds_agsel.zero import compat

if TYPE_CHECKING:
    from ds_agsel.zero.selective import SelectiveStep


def row_choice(root: nn.Module, selection: Selection, block_of: Mapping[int, int]) -> RowChoice | None:
    """Return the choice of rows for the engine of ``root``; None without `adagrad_select.gast`."""
    config, record = selection.config, selection.samples
    if config.gast is None or record is None:
        return None
    return RowChoice(root, repeated_layers(root), block_of, config.gast, config.seed, dist.get_rank(), record)


def run_support(stage: SelectiveStep, root: nn.Module, rows: RowChoice, data: SupportData, step: int) -> None:
    """Take the support of ``step``: a forward of ``root`` in evaluation mode and a backward to its selected blocks.

    Called within a forward of ``root`` that begins. Draws no random number, and gives no parameter a gradient. The loss
    is scaled as that of the step, so that gradients do not underflow in fp16. Collective with ZeRO-3. Raises
    TrainingError if it reaches none of the blocks that choose.
    """
    device = torch.device(get_accelerator().current_device_name())
    arguments = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in data.batch(step).items()
    }
    trained = [module for module in root.modules() if module.training]
    is_partitioned = isinstance(stage, compat.DeepSpeedZeroOptimizer_Stage3)
    root.eval()
    try:
        with compat.own_trace(stage) if is_partitioned else nullcontext(), rows.collecting(device) as support:
            support.run(loss_of(root(**arguments)) * float(stage.loss_scale))
        if support.is_empty and rows.chooses:
            raise TrainingError(
                'adagrad_select.gast.support="data": the pass over support data reached none of the selected blocks, '
                "so that rows have no scores. Reentrant activation checkpointing that is on in evaluation mode, too, "
                'hides them: set use_reentrant=False, or use support "batch".'
            )
    finally:
        for module in trained:
            module.training = True


def support(config: SelectionConfig, data: Any, collate: Callable[[list[Any]], Any] | None) -> SupportData | None:
    """Return the support data of this rank; ``data`` is None where none was given.

    Raises ConfigError if ``config`` asks for data and there is none, or the other way round.
    """
    wanted = config.gast is not None and config.gast.needs_support_data
    if wanted and data is None:
        raise ConfigError(
            'adagrad_select.gast.support="data" needs support data, which was not given. Give rows by '
            'ds_agsel.initialize(..., support_data=...), or use support "batch".'
        )
    if not wanted and data is not None:
        raise ConfigError(
            'initialize(support_data=...) is read only with adagrad_select.gast.support="data". Set it, or leave '
            "support_data out."
        )
    if config.gast is None or data is None:
        return None
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return SupportData(data, collate, config.gast, config.seed, rank)


def problems(ds_config: DsConfig, config: SelectionConfig, model: nn.Module | None) -> Iterator[str]:
    """Yield a line for each setting, and part of ``model``, that can't be used with `adagrad_select.gast`."""
    if config.gast is None:
        return
    if ds_config.stage == 3 and _has_leaf_modules(ds_config, model):
        yield (
            "adagrad_select.gast can't be used with ZeRO-3's leaf modules: DeepSpeed reduces their gradients before "
            "rows are chosen (stage3.py:1532). Leave set_z3_leaf_modules, zero_optimization.leaf_module and "
            "stage3_module_granularity_threshold out, or remove gast."
        )
    if model is not None:
        yield from _model_problems(model)


def _model_problems(model: nn.Module) -> Iterator[str]:
    compiled = [name for name, part in model.named_modules() if getattr(part, "_compiled_call_impl", None) is not None]
    if any(isinstance(part, torch._dynamo.OptimizedModule) for part in model.modules()) or compiled:
        yield (
            "adagrad_select.gast can't be used with compiled layers: rows are chosen in the middle of backward, where "
            "a graph has no place for it. Give the model as it is, or remove gast."
        )
    every = {id(parameter): 0 for parameter in model.parameters() if parameter.requires_grad}
    if not gated_linears(repeated_layers(model), every):
        yield (
            f"adagrad_select.gast chooses rows for the torch.nn.Linear modules of repeated layers, of which "
            f"{type(model).__name__} trains none. Remove gast."
        )


def _has_leaf_modules(ds_config: DsConfig, model: nn.Module | None) -> bool:
    named = ds_config.value("zero_optimization.leaf_module") is not None
    by_size = ds_config.value("zero_optimization.stage3_module_granularity_threshold", 0) != 0
    return named or by_size or (model is not None and compat.has_leaf_modules(model))
