"""Choose the restricted optimizer, and the home of its states, for an optimizer of DeepSpeed's."""

from __future__ import annotations

from collections.abc import Sequence

from ds_agsel.errors import ConfigError
from ds_agsel.param_groups import HyperparameterLink
from ds_agsel.selection import Selection
from ds_agsel.zero import compat
from ds_agsel.zero.selective import SelectiveStep
from ds_agsel.zero.stage3 import SelectiveZero3Optimizer
from ds_agsel.zero.stage12 import SelectiveZeroOptimizer
from ds_agsel.zero.states.forms import new_form
from ds_agsel.zero.states.home import StateHome
from ds_agsel.zero.states.in_place import StatesInPlace
from ds_agsel.zero.states.nvme import StatesOnNvme
from ds_agsel.zero.states.nvme_packed import PackedStatesOnNvme, SplitStatesOnNvme
from ds_agsel.zero.states.packed import PackedStates
from ds_agsel.zero.states.split import SplitPackedStates, SplitStates
from ds_agsel.zero.states.visiting import VisitingStates
from ds_agsel.zero.states.visiting_packed import VisitingPackedStates, VisitingSplitStates


def adapter_for(optimizer: compat.ZeROOptimizer) -> type[SelectiveStep]:
    """Return the restricted class for DeepSpeed's ``optimizer``."""
    if isinstance(optimizer, compat.DeepSpeedZeroOptimizer_Stage3):
        return SelectiveZero3Optimizer
    return SelectiveZeroOptimizer


def home_for(
    optimizer: compat.ZeROOptimizer, block_of_group: Sequence[int], selection: Selection, states_visit: bool
) -> StateHome:
    """Return the home that the states of DeepSpeed's ``optimizer`` move into now. Only this function chooses one."""
    splits = selection.config.master_weights == "split"
    is_lean = splits or selection.config.state_dtype != "fp32"
    match optimizer:
        case compat.DeepSpeedZeroOptimizer_Stage3(swap_optimizer=True) if is_lean:
            swapping = SplitStatesOnNvme if splits else PackedStatesOnNvme
            return swapping(optimizer, block_of_group, selection, new_form(selection.config.state_dtype))
        case compat.DeepSpeedZeroOptimizer_Stage3(swap_optimizer=True):
            return StatesOnNvme(optimizer, block_of_group, selection)
        case _ if states_visit and is_lean:
            visiting = VisitingSplitStates if splits else VisitingPackedStates
            return visiting(optimizer, block_of_group, selection, new_form(selection.config.state_dtype))
        case _ if states_visit:
            return VisitingStates(optimizer, block_of_group, selection)
        case _ if selection.config.state_dtype != "fp32":
            form = new_form(selection.config.state_dtype)
            packed = SplitPackedStates if splits else PackedStates
            return packed(optimizer, block_of_group, selection, form)
        case _:
            return (SplitStates if splits else StatesInPlace)(optimizer, block_of_group)


def blocks_of_groups(optimizer: compat.ZeROOptimizer, block_of_param_group: Sequence[int]) -> tuple[int, ...]:
    """Return the block of each group that DeepSpeed steps: of each param group; with stage 3 of each sub-group."""
    if isinstance(optimizer, compat.DeepSpeedZeroOptimizer_Stage3):
        sub_groups = range(len(optimizer.fp16_groups))
        return tuple(block_of_param_group[optimizer.sub_group_to_group_id[index]] for index in sub_groups)
    return tuple(block_of_param_group)


def restrict(
    optimizer: compat.ZeROOptimizer,
    selection: Selection,
    block_of_group: Sequence[int],
    link: HyperparameterLink,
    states_visit: bool = False,
) -> SelectiveStep:
    """Make DeepSpeed's ``optimizer`` update the blocks that ``selection`` names. The same object, of a subclass.

    ``block_of_group[i]`` is the block of param group i. With ``states_visit``, its states live on the host from now
    on and visit the accelerator. Raises ConfigError if the installed DeepSpeed, or the groups it made, are not those
    that this package supports.
    """
    compat.require_known_deepspeed(optimizer)
    if len(optimizer.optimizer.param_groups) != len(block_of_group):
        raise ConfigError(
            f"DeepSpeed made {len(optimizer.optimizer.param_groups)} param groups of the {len(block_of_group)} it was "
            "given, one per block and hyperparameter set. Give it no param group that it drops or merges."
        )
    compat.swap_class(optimizer, adapter_for(optimizer))
    if isinstance(optimizer, compat.DeepSpeedZeroOptimizer_Stage3):
        compat.complete_gathers(optimizer.parameter_offload.module.parameters())
    blocks = blocks_of_groups(optimizer, block_of_group)
    optimizer.attach(selection, blocks, link, home_for(optimizer, blocks, selection, states_visit))
    compat.give_back_page_locked()  # staging and gradients for every group, and fp32 masters where they are split
    return optimizer
