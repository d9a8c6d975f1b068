"""From a parameter to its slice of ZeRO-1/2's flat buffers, for `deepspeed.utils.safe_get_full_*`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from deepspeed import comm as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state, link_hp_params

from ds_agsel.zero.compat.versions import until


def link_reordered_params(optimizer: DeepSpeedZeroOptimizer) -> None:
    """Link every parameter to its slice of the flat buffer where `round_robin_gradients` has reordered them.

    Stock code looks for them in their old order there, unless alignment padding happens to be in the way
    (stage_1_and_2.py:834), so that `deepspeed.utils.safe_get_full_*` answers with other parameters' numbers.
    """
    for group, params in enumerate(optimizer.bit16_groups):
        if until("0.19.6"):  # no padding between parameters: their order says where they are
            order: dict[str, Any] = {"lp_param_list": optimizer.round_robin_bit16_groups[group]}
        else:
            reordered = map(id, optimizer.round_robin_bit16_groups[group])
            offsets = dict(zip(reordered, optimizer.round_robin_bit16_offsets[group]))
            order = {"lp_param_list": params, "param_offsets": [offsets[id(param)] for param in params]}
        process_group = optimizer.real_dp_process_group[group]
        partition_size = int(optimizer.partition_size[group])
        link_hp_params(
            **order,
            flat_hp_partition=optimizer.single_partition_of_fp32_groups[group],
            gradient_dict=optimizer.averaged_gradients,
            offload_gradient_dict=optimizer.offload_gradient_dict,
            use_offload=optimizer.cpu_offload,
            param_group_index=group,
            partition_start=dist.get_rank(group=process_group) * partition_size,
            partition_size=partition_size,
            dp_group=process_group,
        )


def place_in_partition(param: Any) -> tuple[int, int, int] | None:
    """Return (first element of ``param`` in this rank's ZeRO-1/2 partition, its place there, how many), or None."""
    mapping = param._hp_mapping
    if mapping is None:
        return None
    return mapping.lp_fragment_address.start, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel


def link_masters(optimizer: DeepSpeedZeroOptimizer, group: int) -> None:
    """Let the accessors find the master weights of param group ``group`` where they are now."""
    partition = optimizer.single_partition_of_fp32_groups[group].detach()
    for param in optimizer.bit16_groups[group]:
        place = place_in_partition(param)
        if place is not None:
            param._hp_mapping.hp_fragment = partition.narrow(0, *place[1:])


def unlink_masters(params: Iterable[Any]) -> None:
    """Let go of the master weights of ``params``, whose links would keep their memory."""
    for param in params:
        place = place_in_partition(param)
        if place is not None:
            fragment = param._hp_mapping.hp_fragment
            param._hp_mapping.hp_fragment = fragment.new_zeros(1).detach().expand(place[2])


def link_adam_state(optimizer: DeepSpeedZeroOptimizer, group: int) -> None:
    """Let `deepspeed.utils.safe_get_full_optimizer_state` find the Adam state of param group ``group``."""
    partition = optimizer.single_partition_of_fp32_groups[group]
    lazy_init_hp_params_optimizer_state(optimizer.bit16_groups[group], partition, optimizer.optimizer.state)


def unlink_adam_state(params: Iterable[Any]) -> None:
    """Undo `link_adam_state` for ``params``, whose links would keep the moments' memory."""
    for param in params:
        if param._hp_mapping is not None:
            param._hp_mapping.optim_fragment = None
