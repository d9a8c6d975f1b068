"""Context managers that show DeepSpeed's own loops only a part of the groups or modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ds_agsel.zero.compat.versions import until

_print_rank_0 = partition_parameters.print_rank_0

# What a ZeRO-1/2 optimizer keeps per param group (stage_1_and_2.py, __init__ and
# initialize_gradient_partitioning_data_structures): lists indexed by group, dicts keyed by group.
GROUP_LISTS: tuple[str, ...] = (
    "bit16_groups",
    "bit16_groups_flat",
    "parallel_partitioned_bit16_groups",
    "single_partition_of_fp32_groups",
    "params_in_partition",
    "params_not_in_partition",
    "first_offset",
    "partition_size",
    "real_dp_process_group",
    "round_robin_bit16_groups",
    "round_robin_bit16_indices",
    "round_robin_bit16_meta",
)
if not until("0.19.6"):  # which pads parameters
    GROUP_LISTS += ("round_robin_bit16_padding", "round_robin_bit16_offsets")
OFFLOAD_GROUP_LISTS = ("param_buffer_of_bit16_for_cpu_offload_groups",)
GROUP_DICTS = (
    "averaged_gradients",
    "all_grad_tensors",
    "grad_start_offset",
    "grad_partition_insertion_offset",
)

# What a ZeRO-3 optimizer keeps per sub-group (stage3.py, _create_fp16_partitions_with_defragmentation and
# _create_fp32_partitions): lists indexed by sub-group, dicts keyed by it.
SUB_GROUP_LISTS: tuple[str, ...] = (
    "fp16_groups",
    "fp16_partitioned_groups",
    "fp16_partitioned_groups_flat",
    "fp16_partitioned_groups_flat_numel",
    "fp16_partitioned_groups_flat_id",
    "fp32_partitioned_groups_flat",
    "groups_padding",
)
if not until("0.19.2"):  # which can divide parameters among some of the ranks
    SUB_GROUP_LISTS += ("sub_group_process_groups", "sub_group_partition_counts")
SUB_GROUP_DICTS = ("averaged_gradients", "sub_group_to_group_id")
OFFLOAD_SUB_GROUP_DICTS = ("subgroup_to_device",)


@contextmanager
def only_groups(optimizer: DeepSpeedZeroOptimizer, indices: Sequence[int]) -> Iterator[None]:
    """Show ``optimizer`` only the param groups ``indices``, so that its own loops pass the others by.

    Inside, group i is what was group ``indices[i]``; what DeepSpeed stores under a group's key in one of
    `GROUP_DICTS` is filed under the old key on the way out, also after an exception. The dict objects
    themselves stay, because ``_hp_mapping`` of every parameter holds them (utils/tensor_fragment.py).
    """
    base = optimizer.optimizer
    all_base_groups = base.param_groups
    if list(indices) == list(range(len(all_base_groups))):
        yield
        return
    names = GROUP_LISTS + (OFFLOAD_GROUP_LISTS if optimizer.cpu_offload else ())
    lists = {name: getattr(optimizer, name) for name in names}
    dicts = {name: getattr(optimizer, name) for name in GROUP_DICTS}
    for name, values in lists.items():
        setattr(optimizer, name, [values[index] for index in indices])
    for name, by_group in dicts.items():
        shown = {new: by_group[old] for new, old in enumerate(indices) if old in by_group}
        setattr(optimizer, name, shown)
    base.param_groups = [all_base_groups[index] for index in indices]
    try:
        yield
    finally:
        base.param_groups = all_base_groups
        for name, by_group in dicts.items():
            shown = getattr(optimizer, name)
            by_group.update({indices[new]: value for new, value in shown.items()})
            setattr(optimizer, name, by_group)
        for name, values in lists.items():
            setattr(optimizer, name, values)


@contextmanager
def only_sub_groups(optimizer: DeepSpeedZeroOptimizer_Stage3, indices: Sequence[int]) -> Iterator[None]:
    """`only_groups` for ZeRO-3: inside, sub-group i is what was sub-group ``indices[i]``. Param groups stay."""
    lists = {name: getattr(optimizer, name) for name in SUB_GROUP_LISTS}
    names = SUB_GROUP_DICTS + (OFFLOAD_SUB_GROUP_DICTS if optimizer.offload_optimizer else ())
    dicts = {name: getattr(optimizer, name) for name in names}
    for name, values in lists.items():
        setattr(optimizer, name, [values[index] for index in indices])
    for name, by_group in dicts.items():
        setattr(optimizer, name, {new: by_group[old] for new, old in enumerate(indices) if old in by_group})
    try:
        yield
    finally:
        for name, by_group in dicts.items():
            shown = getattr(optimizer, name)
            for new, old in enumerate(indices):
                if new in shown:
                    by_group[old] = shown[new]
                else:
                    by_group.pop(old, None)
            setattr(optimizer, name, by_group)
        for name, values in lists.items():
            setattr(optimizer, name, values)


@contextmanager
def left_gathered(parameters: Sequence[Any]) -> Iterator[None]:
    """Inside, ZeRO-3 takes gathered ``parameters`` for partitioned, so that it neither frees nor gathers them."""
    gathered = [parameter for parameter in parameters if parameter.ds_status is ZeroParamStatus.AVAILABLE]
    for parameter in gathered:
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
    try:
        yield
    finally:
        for parameter in gathered:
            parameter.ds_status = ZeroParamStatus.AVAILABLE


class UnreleasedParameters:
    """A substitute for ``module`` that lists those of its parameters that ZeRO-3 has something to release of.

    ZeRO-3 walks all parameters three times a step (partitioned_param_coordinator.py:535, parameter_offload.py:242),
    with a call of several wrappers for each, to release what is still gathered. In SmolLM2-135M the walk of the tree
    takes 2.9 ms a step on a CPU, a walk of a list of all parameters 1.2 ms.
    """

    def __init__(self, module: Any) -> None:
        self._named = list(module.named_parameters())
        self.ds_external_parameters = module.ds_external_parameters

    def named_parameters(self, recurse: bool = True) -> list[tuple[str, Any]]:
        """Return them as they are now; ``recurse`` is accepted as torch does, and ignored."""
        return [
            named
            for named in self._named
            if named[1].ds_status is not ZeroParamStatus.NOT_AVAILABLE or named[1].ds_active_sub_modules
        ]


def unwritten_messages() -> AbstractContextManager[None]:
    """Inside, ZeRO-3 does not ask for its rank before it leaves out a message for debugging.

    It has four for each parameter that it releases (partition_parameters.py:126), a third of what the release takes.
    """
    return attribute(partition_parameters, print_rank_0=_print_if_asked)


def _print_if_asked(message: str, debug: bool = False, force: bool = False) -> None:
    if debug or force:
        _print_rank_0(message, debug, force)


@contextmanager
def attribute(target: Any, **values: Any) -> Iterator[None]:
    """Set attributes of ``target`` for the length of the block."""
    saved = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(target, name, value)
