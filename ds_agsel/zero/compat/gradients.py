"""Where DeepSpeed keeps gradients, and how it takes their norms."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.torch_autocast import sort_dtypes
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from ds_agsel.zero.compat.versions import until

STAGE3_PRIVATE = "_DeepSpeedZeroOptimizer_Stage3__"  # Python's mangling of a class-private name


def gradient_partitions(optimizer: DeepSpeedZeroOptimizer_Stage3) -> dict[int, torch.Tensor]:
    """Return by ``ds_id`` where a parameter's reduced gradient is accumulated, a slice of a flat buffer."""
    return getattr(optimizer, f"{STAGE3_PRIVATE}param_id_to_grad_partition")


def reduce_buckets(optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Reduce the gradients waiting in ZeRO-3's buckets and give each rank its partition. Collective."""
    for dtype in sort_dtypes(optimizer.ipg_buckets.keys()):
        getattr(optimizer, f"{STAGE3_PRIVATE}reduce_and_partition_ipg_grads")(dtype)


def is_coalescing(optimizer: DeepSpeedZeroOptimizer) -> bool:
    """Return whether the caller is inside `engine.coalesce_grad_reduction()` (0.19.1 and newer)."""
    return getattr(optimizer, "_coalesce_grad_reduction", False)


def is_in_bucket(param: Any) -> bool:
    """Return whether ZeRO-3 took the gradient of ``param``; False while tiles still add to it (stage3.py:1588)."""
    return getattr(param, "ds_grad_is_ready", True)


def norm_dtype() -> torch.dtype:
    """Return the dtype DeepSpeed takes gradient norms in: fp64 where the accelerator has it; until 0.19.5 always."""
    return torch.float64 if until("0.19.5") else zero_utils.get_norm_dtype()


def at_boundary(optimizer: ZeROOptimizer) -> bool:
    """Return whether the running micro-step is the last one of its window. An attribute until 0.19.4, then a method."""
    boundary = optimizer.is_gradient_accumulation_boundary
    return bool(boundary if until("0.19.4") else boundary())


def is_compact(optimizer: DeepSpeedZeroOptimizer, group: int) -> bool:
    """Return whether ZeRO-2 sums the gradients of param group ``group`` in a buffer of its partition's size."""
    return bool(optimizer._use_compact_grad_partition_buffer(group))


def offloaded_param_ids(optimizer: DeepSpeedZeroOptimizer) -> set[int]:
    """Return the params (by `get_param_id`) whose gradient this window has copied to the host. DeepSpeed's own set."""
    return optimizer._offload_accumulated_param_ids


def wait_for_offload_copies(optimizer: DeepSpeedZeroOptimizer) -> None:
    """Let the host wait for the gradient copies D2H that are under way."""
    optimizer._wait_for_offload_copies()


def restore_offloaded_gradient(optimizer: DeepSpeedZeroOptimizer, param: nn.Parameter) -> None:
    """Copy the sum of ``param``'s gradients, which is on the host, back to ``param.grad``."""
    optimizer._restore_cpu_offload_grad_to_gpu(param)
