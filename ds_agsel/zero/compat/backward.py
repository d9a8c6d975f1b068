"""Clear what DeepSpeed's ZeRO optimizers keep of a backward that is not to count."""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer

from ds_agsel.zero.compat.versions import until


def forget_backward(optimizer: ZeROOptimizer) -> None:
    """Bring ``optimizer`` into its state after a step: no gradient, full bucket, sum or running backward.

    Plain ZeRO-1 and 2 go on from an interrupted backward with "has already been reduced" (stage_1_and_2.py:1431);
    ZeRO-3 goes on, and with accumulation keeps what the interrupted one has added. Host waits.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        _forget_stage3(optimizer)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        _forget_stage12(optimizer)
    optimizer.zero_grad(set_to_none=True)
    optimizer._backward_active_depth = 0
    if until("0.18.4"):
        optimizer._remaining_grad_acc_hooks = 0
    else:
        ZeROOptimizer.clear_backward_seen_flag(optimizer)


def _forget_stage12(optimizer: DeepSpeedZeroOptimizer) -> None:
    if optimizer.overlap_comm and not get_accelerator().resolves_data_dependency():
        optimizer.reduction_stream.synchronize()
    for bucket in optimizer.ipg_buckets.values():
        bucket.clear()
    optimizer.extra_large_param_to_reduce.clear()
    optimizer._release_ipg_buffers()
    for index in range(len(optimizer.params_already_reduced)):
        optimizer.params_already_reduced[index] = False
    optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
    if optimizer.cpu_offload:
        optimizer.reset_cpu_buffers()
        optimizer._offload_accumulated_param_ids.clear()


def _forget_stage3(optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    if not get_accelerator().resolves_data_dependency():
        optimizer.reduce_and_partition_stream.synchronize()
    for params in optimizer.fp16_groups:
        for param in params:
            param.grad = None  # nothing runs on it; zero_grad would record streams, which fails on a CPU
    for bucket in optimizer.ipg_buckets.values():
        bucket.params.clear()
        bucket.elements = 0
    for key in optimizer.params_already_reduced:
        optimizer.params_already_reduced[key] = False
    optimizer.averaged_gradients.clear()
    if optimizer.offload_optimizer:
        optimizer.reset_cpu_buffers()


def remove_gradient_hooks(optimizer: ZeROOptimizer) -> None:
    """Remove the hooks that bring gradients to ``optimizer``, as its ``destroy`` does (stage_1_and_2.py:759)."""
    for hook in [*optimizer._grad_acc_hooks, *getattr(optimizer, "_leaf_module_hooks", ())]:
        hook.remove()
