"""The arguments of `deepspeed.initialize`: the ds_config among them, and their replacements for DeepSpeed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from ds_agsel.ds_config import (
    with_offload_to_cpu,
    with_scheduler_for_groups,
    with_torch_adam,
    without_pipelined_swapping,
    without_synchronizing_timer,
)
from ds_agsel.entry.preparation import Preparation
from ds_agsel.param_groups import ParamGroup
from ds_agsel.zero import compat
from ds_agsel.zero.step_device import StepDevice

logger = logging.getLogger("ds_agsel")


def read_config(arguments: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the ds_config that `deepspeed.initialize` will use (deepspeed/__init__.py:514).

    None if it will raise an error instead.
    """
    config = arguments.get("config")
    if config is None:
        config = arguments.get("config_params")
    if config is None:
        config = getattr(arguments.get("args"), "deepspeed_config", None)
    if config is None or isinstance(config, Mapping):
        return config
    return compat.load_ds_config(config)


def for_deepspeed(
    arguments: Mapping[str, Any], ds_config: Mapping[str, Any], prepared: Preparation, choice: StepDevice
) -> dict[str, Any]:
    """Return ``arguments`` with the split param groups, and the ds_config that stepping at ``choice`` needs."""
    ds_config = _stepping_there(ds_config, choice)
    ds_config = with_scheduler_for_groups(ds_config, len(prepared.user_groups), prepared.split.parents)
    changed = {**_split_arguments(arguments, prepared), **_with_ds_config(arguments, ds_config)}
    return {**arguments, **changed}


def _split_arguments(arguments: Mapping[str, Any], prepared: Preparation) -> dict[str, Any]:
    """Return what to hand DeepSpeed instead of the caller's optimizer, parameters and scheduler factory."""
    user_optimizer, groups = prepared.user_optimizer, prepared.split.groups
    if user_optimizer is None:
        return {"model_parameters": groups}
    changed: dict[str, Any] = {"optimizer": _same_optimizer(user_optimizer, groups), "model_parameters": None}
    scheduler = arguments.get("lr_scheduler")
    if callable(scheduler) and not hasattr(scheduler, "step"):
        changed["lr_scheduler"] = lambda _: scheduler(user_optimizer)
    _note_a_step(user_optimizer)
    return changed


def _note_a_step(optimizer: torch.optim.Optimizer) -> None:
    """Let torch note that ``optimizer`` has stepped; else a scheduler made on it warns that it was called too early.

    Without gradients a step changes nothing more, except a count that FusedAdam puts into the groups.
    """
    if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
        return
    before = [set(group) for group in optimizer.param_groups]
    optimizer.step()
    for group, keys in zip(optimizer.param_groups, before):
        for key in set(group) - keys:
            del group[key]


def _same_optimizer(optimizer: torch.optim.Optimizer, groups: list[ParamGroup]) -> torch.optim.Optimizer:
    """Return an optimizer of the same class over ``groups``, which carry every hyperparameter themselves."""
    if isinstance(optimizer, compat.DeepSpeedCPUAdam):
        return compat.DeepSpeedCPUAdam(
            groups, adamw_mode=optimizer.adam_w_mode, fp32_optimizer_states=optimizer.fp32_optimizer_states
        )
    if isinstance(optimizer, compat.FusedAdam):
        return compat.FusedAdam(groups, adam_w_mode=bool(optimizer.adam_w_mode), set_grad_none=optimizer.set_grad_none)
    adam: Any = type(optimizer)
    return adam(groups)


def _stepping_there(ds_config: Mapping[str, Any], choice: StepDevice) -> Mapping[str, Any]:
    """Return a ds_config with which DeepSpeed makes the optimizer that ``choice`` needs."""
    if choice is StepDevice.HOST:
        return without_pipelined_swapping(with_offload_to_cpu(ds_config))  # reads and writes overlap in `residency`
    if choice is not StepDevice.VISIT:
        return ds_config
    if not get_accelerator().is_synchronized_device():
        ds_config = _with_steps_that_overlap(ds_config)
    return ds_config if compat.has_fused_adam() else with_torch_adam(ds_config)


def _with_steps_that_overlap(ds_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a ds_config whose timer does not wait for states that travel under the next forward and backward."""
    changed = without_synchronizing_timer(ds_config)
    if changed != ds_config and torch.distributed.get_rank() == 0:
        logger.info(
            "adagrad_select: timers.throughput.synchronized is set to false: DeepSpeed's throughput timer would wait "
            "for the device at each step, and so for the states that travel under it. Set it yourself to keep it."
        )
    return changed


def _with_ds_config(arguments: Mapping[str, Any], ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that hand DeepSpeed ``ds_config`` in the place of the one it would find."""
    if read_config(arguments) == ds_config:
        return {}
    args = copy.copy(arguments.get("args"))
    if args is not None and getattr(args, "deepspeed_config", None) is not None:
        args.deepspeed_config = None
    return {"args": args, "config": dict(ds_config), "config_params": None}
