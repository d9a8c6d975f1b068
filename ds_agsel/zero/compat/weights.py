"""Model weights, wherever they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import get_z3_leaf_modules

from ds_agsel.zero.compat.versions import until
from ds_agsel.zero.compat.views import attribute


def is_gathered(parameter: Any) -> bool:
    """Return whether a ZeRO-3 parameter is whole on this rank now."""
    return parameter.ds_status is ZeroParamStatus.AVAILABLE


def has_leaf_modules(model: torch.nn.Module) -> bool:
    """Return whether `set_z3_leaf_modules` was called for a part of ``model``."""
    return bool(get_z3_leaf_modules(model))


def complete_gathers(parameters: Iterable[Any]) -> None:
    """Let ZeRO-3's ``parameters`` be whole when DeepSpeed says that they are, on a CPU too.

    Until 0.19.7 a gather of several parameters, as `step` ends with one, waits for the last of its collectives alone
    (partition_parameters.py:2092). NCCL finishes them in order, gloo does not: two ranks on a CPU go on with weights
    that have not come. Here such a gather is one of each parameter after the other.
    """
    if not until("0.19.7"):
        return
    for parameter in parameters:
        if torch.distributed.get_backend(parameter.ds_process_group) != "nccl":
            parameter.all_gather = partial(_gather_each, parameter.all_gather, parameter)


def _gather_each(
    gather: Any, parameter: Any, param_list: Sequence[Any] | None = None, async_op: bool = False, hierarchy: int = 0
) -> Any:
    asked = [parameter] if param_list is None else param_list
    if async_op:
        return gather(asked, async_op=True, hierarchy=hierarchy)  # each has a handle of its own
    for each in asked:
        gather([each], hierarchy=hierarchy)
    return None


def gather_again(parameters: Sequence[Any]) -> int:
    """Let those of ``parameters`` that are whole here now show their partitions as they are. Collective.

    Returns: the bytes gathered; 0 on one rank.
    """
    whole = [parameter for parameter in parameters if is_gathered(parameter)]
    if whole:
        whole[0].partition(whole)
        whole[0].all_gather(whole)
    return sum(map(gathered_bytes, whole))


def gathered_bytes(parameter: Any) -> int:
    """Return the bytes, with padding, that gathering ``parameter`` hands to a collective; 0 on one rank."""
    ranks = dist.get_world_size(group=parameter.ds_process_group)
    return int(parameter.ds_tensor.numel() * ranks * parameter.element_size()) if ranks > 1 else 0


def read_weights(optimizer: DeepSpeedZeroOptimizer_Stage3, sub_group: int, flat: torch.Tensor) -> None:
    """Copy the sub-group's partition of the model weights, wherever it is, to ``flat``."""
    held = optimizer.fp16_partitioned_groups_flat[sub_group]
    if held is None:
        optimizer._swap_in_sub_group_to_flat_buffer(flat, sub_group)
    else:
        flat.copy_(held)


def partition_weights(optimizer: ZeROOptimizer, index: int) -> torch.Tensor:
    """Return this rank's partition ``index`` of the model weights, (numel,), as DeepSpeed's loops see it now.

    It is what `masters` ``[index]`` is cast to. Not with ZeRO-3's weights on NVMe.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return optimizer.fp16_partitioned_groups_flat[index]
    rank = dist.get_rank(group=optimizer.real_dp_process_group[index])
    return optimizer.parallel_partitioned_bit16_groups[index][rank].data


def spread_weights(optimizer: ZeROOptimizer) -> None:
    """Let the model's parameters be what all ranks' `partition_weights` are now. Collective."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        gather_again([param for group in optimizer.fp16_groups for param in group])
        return
    partitions = range(len(optimizer.bit16_groups))
    # Stock code copies each partition from its master weights first; here from itself.
    with attribute(optimizer, single_partition_of_fp32_groups=[partition_weights(optimizer, i) for i in partitions]):
        optimizer.update_lp_params()


def write_weights(parameter: Any, value: torch.Tensor) -> None:
    """Put ``value`` in the place of this rank's partition of a ZeRO-3 parameter, wherever it is."""
    if parameter.ds_tensor.status is PartitionedParamStatus.NOT_AVAILABLE:
        parameter.nvme_swapper.swap_out_partitioned_params([parameter], [value.flatten()])
    else:
        parameter.ds_tensor.data.copy_(value.view(parameter.ds_tensor.shape))


def zero_weights(parameter: Any) -> None:
    """Set a model weight to 0, wherever it is: whole, or with ZeRO-3 this rank's partition of it, and what is whole."""
    if hasattr(parameter, "ds_tensor"):
        parameter.ds_tensor.data.zero_()
    parameter.data.zero_()
