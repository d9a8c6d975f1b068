"""The parts of a run before DeepSpeed is called: blocks, param groups, lottery, policy. For initialize and check."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ds_agsel import policies
from ds_agsel.blocks import Block
from ds_agsel.config import SelectionConfig
from ds_agsel.ds_config import DsConfig
from ds_agsel.errors import ConfigError
from ds_agsel.lottery import Bound, Lottery, build_lottery
from ds_agsel.param_groups import ParamGroup, SplitGroups, as_param_groups, split_param_groups, with_partners
from ds_agsel.sparse.targets import Target, detach_all, find_targets
from ds_agsel.units import find_units
from ds_agsel.zero import compat
from ds_agsel.zero.support import optimizer_problem

ADAM_CLASSES = (torch.optim.AdamW, torch.optim.Adam, compat.DeepSpeedCPUAdam, compat.FusedAdam)


@dataclass(frozen=True)
class Preparation:
    """Everything that is decided from the caller's arguments, which are not modified.

    Attributes:
        named: the model's parameters by name.
        user_optimizer: the caller's optimizer object, or the one that the caller's callable made; None: DeepSpeed's.
        user_groups: the caller's param groups, which `split` follows.
        steps_per_epoch: optimizer steps in epoch 1; None if unknown.
        targets: the matrices of which ``sparse_grad`` trains some entries, attached to the model.
    """

    config: SelectionConfig
    blocks: tuple[Block, ...]
    named: dict[str, torch.nn.Parameter]
    user_optimizer: torch.optim.Optimizer | None
    user_groups: list[ParamGroup]
    split: SplitGroups
    lottery: Lottery
    policy: policies.Policy
    steps_per_epoch: int | None
    targets: tuple[Target, ...] = ()

    @property
    def bound(self) -> Bound:
        """The most that a step can update."""
        return self.lottery.bound(self.policy)


def prepare(
    model: torch.nn.Module,
    config: SelectionConfig,
    optimizer: torch.optim.Optimizer | None,
    model_parameters: Any,
    steps_per_epoch: int | None,
    find_steps_per_epoch: Callable[[], int] | None = None,
) -> Preparation:
    """Return the parts of the run of ``model`` under ``config``.

    Args:
        optimizer: the caller's, or None if the ds_config names one, made over ``model_parameters``.
        model_parameters: None for all, parameters, or param groups.
        find_steps_per_epoch: called after the first step if ``steps_per_epoch`` is None.

    With ``sparse_grad`` its matrices are frozen and get their carriers (`sparse.targets`), the one change to ``model``.

    Raises ConfigError (ConfigErrors for several) for settings that can't work; ``model`` is then as it was. Not
    collective.
    """
    targets = _attach_targets(model, config)
    try:
        return _prepare(model, config, optimizer, model_parameters, steps_per_epoch, find_steps_per_epoch, targets)
    except BaseException:
        for target in targets:
            target.detach()
        raise


def _attach_targets(model: torch.nn.Module, config: SelectionConfig) -> tuple[Target, ...]:
    detach_all(model)  # of an earlier engine
    if config.sparse_grad is None:
        return ()
    targets = find_targets(model, config.sparse_grad)
    for target in targets:
        target.attach()
    return targets


def _prepare(
    model: torch.nn.Module,
    config: SelectionConfig,
    optimizer: torch.optim.Optimizer | None,
    model_parameters: Any,
    steps_per_epoch: int | None,
    find_steps_per_epoch: Callable[[], int] | None,
    targets: tuple[Target, ...],
) -> Preparation:
    groups = as_param_groups(model_parameters, model) if optimizer is None else optimizer.param_groups
    blocks = find_units(model, config.blocks, config.granularity)
    named = dict(model.named_parameters())
    carrier_of = {target.weight: target.carrier for target in targets}
    block_of = {named[name]: block.index for block in blocks for name in block.parameter_names}
    split = split_param_groups(with_partners(groups, carrier_of), block_of, apart=frozenset(carrier_of.values()))
    if not split.groups:
        raise ConfigError("adagrad_select: the optimizer was given no trainable parameter. Give it model.parameters().")
    lottery = build_lottery(blocks, config, optimized=frozenset(split.blocks))
    policy = _policy(blocks, lottery, config, steps_per_epoch, find_steps_per_epoch)
    return Preparation(config, blocks, named, optimizer, groups, split, lottery, policy, steps_per_epoch, targets)


def _policy(
    blocks: tuple[Block, ...],
    lottery: Lottery,
    config: SelectionConfig,
    steps_per_epoch: int | None,
    find_steps_per_epoch: Callable[[], int] | None,
) -> policies.Policy:
    return policies.create(
        policies.PolicyContext(
            config=config,
            num_blocks=lottery.num_drawn,
            num_selected=lottery.num_selected,
            block_names=tuple(blocks[index].name for index in lottery.drawn),
            steps_per_epoch=steps_per_epoch,
            block_indices=lottery.drawn,
            find_steps_per_epoch=find_steps_per_epoch,
            share=lottery.share,
        )
    )


def user_optimizer(arguments: Mapping[str, Any], ds_config: DsConfig) -> torch.optim.Optimizer | None:
    """Return the optimizer object in ``arguments``, or made by the callable there; None: the ds_config names one.

    Raises ConfigError if it is not an Adam.
    """
    optimizer = arguments.get("optimizer")
    if optimizer is None:
        problem = optimizer_problem(ds_config)
        if problem is not None:
            raise ConfigError(problem)
        return None
    if not isinstance(optimizer, torch.optim.Optimizer):
        parameters = arguments.get("model_parameters")
        optimizer = optimizer(list(arguments["model"].parameters()) if parameters is None else parameters)
    if type(optimizer) not in ADAM_CLASSES:
        raise ConfigError(
            f"optimizer={type(optimizer).__module__}.{type(optimizer).__qualname__} can't be used with adagrad_select. "
            f"{', '.join(cls.__name__ for cls in ADAM_CLASSES)} are allowed."
        )
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        raise ConfigError("optimizer amsgrad=True can't be used with adagrad_select. Set amsgrad=False.")
    return optimizer
