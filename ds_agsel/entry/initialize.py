"""`initialize`: `deepspeed.initialize` that honours the ``adagrad_select`` section of the ds_config."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import os
from collections.abc import Mapping, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from ds_agsel import policies
from ds_agsel.blocks import Block, find_blocks, resolve_names
from ds_agsel.config import SECTION, SelectionConfig, find_section, parse_section
from ds_agsel.ds_config import DsConfig, with_offload_to_cpu, with_torch_adam, without_pipelined_swapping
from ds_agsel.entry import agreement, callers, install
from ds_agsel.errors import ConfigError
from ds_agsel.param_groups import HyperparameterLink, ParamGroup, SplitGroups, as_param_groups, split_param_groups
from ds_agsel.selection import Lottery, Selection
from ds_agsel.zero import compat, step_device
from ds_agsel.zero.adapters import restrict
from ds_agsel.zero.engine import SelectiveEngine
from ds_agsel.zero.step_device import StepDevice
from ds_agsel.zero.support import optimizer_problem, refuse_unsupported

logger = logging.getLogger("ds_agsel")

ADAM_CLASSES = (torch.optim.AdamW, torch.optim.Adam, compat.DeepSpeedCPUAdam, compat.FusedAdam)
_SIGNATURE = inspect.signature(deepspeed.initialize)  # now: what wraps it later need not say its own


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize`: its arguments, its result (engine, optimizer, dataloader, scheduler).

    Where the ds_config (``config``, ``config_params`` or ``args.deepspeed_config``; dict, path or base64) has no
    ``adagrad_select`` section, or a disabled one, the call is passed on as it is. Otherwise the engine updates the
    selected blocks at each step and has a `selection` (`ds_agsel.selection.Selection`). The caller's dict, groups
    and optimizer are not edited; the optimizer's param groups go on being followed, so that a scheduler made on it
    works. Without any optimizer (a DPO reference model) the engine only evaluates, and is DeepSpeed's own.
    Raises ConfigError, before DeepSpeed does anything, for what can't work.
    """
    with install.stock_initialize():
        number = agreement.next_call()
        call = _SIGNATURE.bind(*args, **kwargs)
        ds_config = _read_config(call.arguments)
        try:
            section = None if ds_config is None else find_section(ds_config)
            config = None if section is None else parse_section(section)
        except ConfigError as error:
            _tell_other_ranks(number, call.arguments, error)
            raise
        if ds_config is None or config is None or not config.enabled:
            agreement.post_plain(number)
            return deepspeed.initialize(*args, **kwargs)
        has_optimizer = call.arguments.get("optimizer") is not None or DsConfig.of(ds_config).has_optimizer
        if not has_optimizer or callers.only_evaluates():
            logger.warning("adagrad_select: this engine only evaluates, so it is left to DeepSpeed.")
            agreement.post_plain(number)
            return deepspeed.initialize(*args, **kwargs)
        return _initialize_selective(number, call.arguments, ds_config, config)


def _read_config(arguments: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The ds_config as `deepspeed.initialize` will find it (deepspeed/__init__.py:514); None where it will complain."""
    config = arguments.get("config")
    if config is None:
        config = arguments.get("config_params")
    if config is None:
        config = getattr(arguments.get("args"), "deepspeed_config", None)
    if config is None or isinstance(config, Mapping):
        return config
    return compat.load_ds_config(config)


def _initialize_selective(
    number: int, arguments: dict[str, Any], ds_config: Mapping[str, Any], config: SelectionConfig
) -> tuple[Any, Any, Any, Any]:
    try:
        prepared = _prepare(arguments, ds_config, config)
    except ConfigError as error:
        _tell_other_ranks(number, arguments, error)
        raise
    _init_distributed(arguments)
    agreement.require(number, _shared_parts(prepared, arguments["model"], ds_config, config))
    choice = _step_device(ds_config, config, prepared)
    changed = _split_arguments(arguments, prepared.user_optimizer, prepared.split)
    changed.update(_with_ds_config(arguments, _stepping_there(ds_config, choice)))
    visits = choice is StepDevice.VISIT

    with compat.masters_made_on_host() if visits and config.keep_master == "host" else nullcontext():
        engine, optimizer, dataloader, scheduler = deepspeed.initialize(**{**arguments, **changed})

    selection = Selection(prepared.blocks, prepared.policy, prepared.lottery, config, prepared.named)
    link = HyperparameterLink(prepared.user_groups, prepared.split.parents)
    compat.swap_class(engine, SelectiveEngine)
    engine.optimizer = restrict(optimizer, selection, prepared.split.blocks, link, states_visit=visits)
    engine.selection = selection
    if not compat.is_known():
        known = ", ".join(compat.KNOWN_VERSIONS)
        logger.warning("ds_agsel was tested with deepspeed %s, not yet with %s.", known, deepspeed.__version__)
    return engine, engine.optimizer, dataloader, scheduler


@dataclass(frozen=True)
class _Prepared:
    """What is made of the caller's arguments before DeepSpeed is called."""

    blocks: tuple[Block, ...]
    named: dict[str, torch.nn.Parameter]
    user_optimizer: torch.optim.Optimizer | None
    user_groups: list[ParamGroup]
    split: SplitGroups
    lottery: Lottery
    steps_per_epoch: int | None
    policy: policies.Policy


def _prepare(arguments: Mapping[str, Any], ds_config: Mapping[str, Any], config: SelectionConfig) -> _Prepared:
    model = arguments["model"]
    refuse_unsupported(DsConfig.of(ds_config), model, arguments.get("mpu"), config)
    callers.warn_of_unseen_ranks()
    callers.warn_of_replaced_optimizer(arguments.get("optimizer"))
    user_optimizer = _user_optimizer(arguments, ds_config)
    user_groups = (
        as_param_groups(arguments.get("model_parameters"), model)
        if user_optimizer is None
        else user_optimizer.param_groups
    )
    blocks = find_blocks(model, config.blocks)
    named = dict(model.named_parameters())
    split = split_param_groups(user_groups, {named[name]: b.index for b in blocks for name in b.parameter_names})
    if not split.groups:
        raise ConfigError("adagrad_select: the optimizer was given no trainable parameter. Give it model.parameters().")
    lottery = _lottery(blocks, split, config)
    steps = (
        config.steps_per_epoch
        or _steps_per_epoch(arguments.get("training_data"), ds_config)
        or callers.steps_per_epoch(ds_config)
    )
    policy = _policy(blocks, lottery, config, steps)
    return _Prepared(blocks, named, user_optimizer, user_groups, split, lottery, steps, policy)


def _shared_parts(
    prepared: _Prepared, model: torch.nn.Module, ds_config: Mapping[str, Any], config: SelectionConfig
) -> dict[str, Any]:
    """What all ranks must have alike."""
    return {
        **agreement.parts(ds_config, config, model),
        "versions": {**agreement.versions(), "deepspeed": deepspeed.__version__},
        "blocks": [[block.name, list(block.parameter_names)] for block in prepared.blocks],
        "param groups": [
            {key: value for key, value in group.items() if key != "params"} for group in prepared.split.groups
        ],
        "steps_per_epoch": prepared.steps_per_epoch,
    }


def _tell_other_ranks(number: int, arguments: Mapping[str, Any], error: ConfigError) -> None:
    """Let the other ranks raise what this one is about to."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _init_distributed(arguments)
    agreement.require(number, {}, failure=str(error))


def _init_distributed(arguments: Mapping[str, Any]) -> None:
    """As `deepspeed.initialize` will (deepspeed/__init__.py:501); nothing where it is done already."""
    given = {name: arguments[name] for name in ("distributed_port", "dist_init_required") if name in arguments}
    deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), **given)


def _user_optimizer(arguments: Mapping[str, Any], ds_config: Mapping[str, Any]) -> torch.optim.Optimizer | None:
    """The optimizer object the caller gave, or made by the callable that he gave; None: the ds_config names one."""
    optimizer = arguments.get("optimizer")
    if optimizer is None:
        problem = optimizer_problem(DsConfig.of(ds_config))
        if problem is not None:
            raise ConfigError(problem)
        return None
    if not isinstance(optimizer, torch.optim.Optimizer):
        parameters = arguments.get("model_parameters")
        optimizer = optimizer([p for p in arguments["model"].parameters()] if parameters is None else parameters)
    if type(optimizer) not in ADAM_CLASSES:
        raise ConfigError(
            f"optimizer={type(optimizer).__module__}.{type(optimizer).__qualname__} can't be used with adagrad_select. "
            f"{', '.join(cls.__name__ for cls in ADAM_CLASSES)} are allowed."
        )
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        raise ConfigError("optimizer amsgrad=True can't be used with adagrad_select. Set amsgrad=False.")
    return optimizer


def _split_arguments(
    arguments: Mapping[str, Any], user_optimizer: torch.optim.Optimizer | None, split: SplitGroups
) -> dict[str, Any]:
    """What to hand DeepSpeed instead of the caller's optimizer, parameters and scheduler factory."""
    if user_optimizer is None:
        return {"model_parameters": split.groups}
    changed: dict[str, Any] = {"optimizer": _same_optimizer(user_optimizer, split.groups), "model_parameters": None}
    scheduler = arguments.get("lr_scheduler")
    if callable(scheduler) and not hasattr(scheduler, "step"):
        changed["lr_scheduler"] = lambda _: scheduler(user_optimizer)
    _note_a_step(user_optimizer)
    return changed


def _note_a_step(optimizer: torch.optim.Optimizer) -> None:
    """Let torch note that ``optimizer`` has stepped; else a scheduler made on it warns that it was called too early.

    Without gradients a step changes nothing more, but for a count that FusedAdam puts into the groups.
    """
    if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
        return
    before = [set(group) for group in optimizer.param_groups]
    optimizer.step()
    for group, keys in zip(optimizer.param_groups, before):
        for key in set(group) - keys:
            del group[key]


def _step_device(ds_config: Mapping[str, Any], config: SelectionConfig, prepared: _Prepared) -> StepDevice:
    """Where AdamW runs, logged with the reason. Collective, where it hangs on the memory of all ranks."""
    lottery = prepared.lottery
    choice, reason = step_device.decide(
        config.step_device,
        step_device.situation(
            DsConfig.of(ds_config),
            config,
            prepared.blocks,
            lottery.drawn + lottery.always,
            prepared.policy.max_selected + len(lottery.always),
            prepared.user_optimizer is not None,
        ),
    )
    step_device.report(choice, reason)
    return choice


def _stepping_there(ds_config: Mapping[str, Any], choice: StepDevice) -> Mapping[str, Any]:
    """Return a ds_config with which DeepSpeed makes the optimizer that ``choice`` needs."""
    if choice is StepDevice.HOST:
        return without_pipelined_swapping(with_offload_to_cpu(ds_config))  # reads and writes overlap in `residency`
    if choice is StepDevice.VISIT and not compat.has_fused_adam():
        return with_torch_adam(ds_config)
    return ds_config


def _with_ds_config(arguments: Mapping[str, Any], ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that hand DeepSpeed ``ds_config`` in the place of the one it would find."""
    if _read_config(arguments) == ds_config:
        return {}
    args = copy.copy(arguments.get("args"))
    if args is not None and getattr(args, "deepspeed_config", None) is not None:
        args.deepspeed_config = None
    return {"args": args, "config": dict(ds_config), "config_params": None}


def _same_optimizer(optimizer: torch.optim.Optimizer, groups: list[ParamGroup]) -> torch.optim.Optimizer:
    """An optimizer of the same class over ``groups``, which carry every hyperparameter themselves."""
    if isinstance(optimizer, compat.DeepSpeedCPUAdam):
        return compat.DeepSpeedCPUAdam(
            groups, adamw_mode=optimizer.adam_w_mode, fp32_optimizer_states=optimizer.fp32_optimizer_states
        )
    if isinstance(optimizer, compat.FusedAdam):
        return compat.FusedAdam(groups, adam_w_mode=bool(optimizer.adam_w_mode), set_grad_none=optimizer.set_grad_none)
    adam: Any = type(optimizer)
    return adam(groups)


def _lottery(blocks: tuple[Block, ...], split: SplitGroups, config: SelectionConfig) -> Lottery:
    always = resolve_names(blocks, config.always_select, "always_select")
    never = resolve_names(blocks, config.never_select, "never_select")
    both = sorted(set(always) & set(never))
    if both:
        raise ConfigError(
            f"adagrad_select.always_select and never_select both name {blocks[both[0]].name!r}. Take it out of one."
        )
    unoptimized = set(range(len(blocks))) - set(split.blocks)
    for index in sorted(unoptimized & set(always)):
        raise ConfigError(
            f"adagrad_select.always_select names {blocks[index].name!r}, of which the optimizer has no parameter. "
            "Give the optimizer its parameters, or take the name out."
        )
    outside = set(always) | set(never) | unoptimized
    drawn = tuple(block.index for block in blocks if block.index not in outside)
    if not drawn:
        raise ConfigError(
            f"adagrad_select.always_select and never_select leave none of the {len(blocks)} blocks to choose from. "
            "Leave at least one out of both, or remove the section."
        )
    return Lottery(drawn, tuple(sorted(always)), tuple(sorted(set(never) | unoptimized)))


def _policy(
    blocks: tuple[Block, ...],
    lottery: Lottery,
    config: SelectionConfig,
    steps_per_epoch: int | None,
) -> policies.Policy:
    num_drawn = len(lottery.drawn)
    return policies.create(
        policies.PolicyContext(
            config=config,
            num_blocks=num_drawn,
            num_selected=policies.num_selected(config.select_percent, num_drawn),
            block_names=tuple(blocks[index].name for index in lottery.drawn),
            steps_per_epoch=steps_per_epoch,
            block_indices=lottery.drawn,
        )
    )


def _steps_per_epoch(training_data: Any, ds_config: Mapping[str, Any]) -> int | None:
    """Optimizer steps that one pass over ``training_data`` takes; None where its length can't be known."""
    if not isinstance(training_data, Sized):
        return None
    sizes = DsConfig.of(ds_config)
    batch = sizes.train_batch_size
    if batch is None:
        if sizes.micro_batch_size is None:
            return None
        deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name())
        batch = sizes.micro_batch_size * (sizes.accumulation_steps or 1) * deepspeed.comm.get_world_size()
    return max(1, math.ceil(len(training_data) / batch))


__all__ = ["SECTION", "initialize"]
