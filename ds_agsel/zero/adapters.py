"""Which restricted optimizer answers to which of DeepSpeed's."""

from __future__ import annotations

from collections.abc import Sequence

from ds_agsel.errors import ConfigError
from ds_agsel.param_groups import HyperparameterLink
from ds_agsel.selection import Selection
from ds_agsel.zero import compat
from ds_agsel.zero.selective import SelectiveStep
from ds_agsel.zero.stage3 import SelectiveZero3Optimizer
from ds_agsel.zero.stage12 import SelectiveZeroOptimizer
from ds_agsel.zero.states.nvme import NvmeZero3Optimizer


def adapter_for(optimizer: compat.ZeROOptimizer) -> type[SelectiveStep]:
    """The restricted class for DeepSpeed's ``optimizer``."""
    match optimizer:
        case compat.DeepSpeedZeroOptimizer_Stage3(swap_optimizer=True):
            return NvmeZero3Optimizer
        case compat.DeepSpeedZeroOptimizer_Stage3():
            return SelectiveZero3Optimizer
        case _:
            return SelectiveZeroOptimizer


def restrict(
    optimizer: compat.ZeROOptimizer,
    selection: Selection,
    block_of_group: Sequence[int],
    link: HyperparameterLink,
    states_visit: bool = False,
) -> SelectiveStep:
    """Make DeepSpeed's ``optimizer`` update the blocks that ``selection`` names. The same object, of a subclass.

    ``block_of_group[i]`` is the block of param group i. With ``states_visit``, its states live on the host from now
    on and visit the accelerator. Raises ConfigError where the installed DeepSpeed, or the groups it made, are not the
    ones this was written for.
    """
    compat.require_known_deepspeed(optimizer)
    if len(optimizer.optimizer.param_groups) != len(block_of_group):
        raise ConfigError(
            f"DeepSpeed made {len(optimizer.optimizer.param_groups)} param groups of the {len(block_of_group)} it was "
            "given, one per block and hyperparameter set. Give it no param group that it drops or merges."
        )
    compat.swap_class(optimizer, adapter_for(optimizer))
    optimizer.attach(selection, block_of_group, link, states_visit)
    return optimizer
