"""The only package that uses undocumented names of DeepSpeed, with the versions it is known to work on.

What it relies on is checked by `guard.py` ([Note: What the guard holds] there) as this package is imported, as its
classes are made and as an engine is: a release that moved a name raises an error, and does not give wrong numbers.

Callers write ``from ds_agsel.zero import compat`` and ``compat.name``; no other names may be used.
"""

from ds_agsel.zero.compat.versions import KNOWN_VERSIONS, deepspeed_version, imports_of_deepspeed, is_known

with imports_of_deepspeed():
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    from ds_agsel.zero.compat.adam import (
        adam_step,
        architectures_by_number,
        cpu_adam_op,
        has_fused_adam,
        new_adam_state,
        new_cpu_adam_id,
        share_fused_steps,
        takes_powers_anew,
    )
    from ds_agsel.zero.compat.backward import forget_backward, remove_gradient_hooks
    from ds_agsel.zero.compat.collectives import start_process_group
    from ds_agsel.zero.compat.engine import (
        fp32_weights_of,
        loads_through,
        mark_compiled,
        swap_class,
        whole_state_dict,
        writes_through,
    )
    from ds_agsel.zero.compat.gradients import (
        at_boundary,
        gradient_partitions,
        is_coalescing,
        is_compact,
        is_in_bucket,
        norm_dtype,
        offloaded_param_ids,
        reduce_buckets,
        restore_offloaded_gradient,
        wait_for_offload_copies,
    )
    from ds_agsel.zero.compat.guard import ChecksOverrides, overrides, require_known_deepspeed, require_known_engine
    from ds_agsel.zero.compat.linking import (
        link_adam_state,
        link_masters,
        link_reordered_params,
        place_in_partition,
        unlink_adam_state,
        unlink_masters,
    )
    from ds_agsel.zero.compat.memory import give_back_page_locked, unpin_memory
    from ds_agsel.zero.compat.older import Zero3Base, Zero12Base
    from ds_agsel.zero.compat.partitions import (
        masters,
        masters_made_on_host,
        param_group_of,
        replace_masters,
        set_master,
    )
    from ds_agsel.zero.compat.recomputation import keep_recomputed_weights
    from ds_agsel.zero.compat.settings import ds_config_problems, load_ds_config, zero_section_problems
    from ds_agsel.zero.compat.swapper import SwapSettings, can_swap, swapped_weights_follow, take_swapper
    from ds_agsel.zero.compat.trace import has_trace, keep_trace, own_trace
    from ds_agsel.zero.compat.views import (
        UnreleasedParameters,
        attribute,
        left_gathered,
        only_groups,
        only_sub_groups,
        unwritten_messages,
    )
    from ds_agsel.zero.compat.weights import (
        complete_gathers,
        gather_again,
        gathered_bytes,
        has_leaf_modules,
        is_gathered,
        partition_weights,
        read_weights,
        spread_weights,
        write_weights,
        zero_weights,
    )

__all__ = [
    "KNOWN_VERSIONS",
    "ChecksOverrides",
    "DeepSpeedCPUAdam",
    "DeepSpeedEngine",
    "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3",
    "FusedAdam",
    "SwapSettings",
    "UnreleasedParameters",
    "ZeROOptimizer",
    "Zero3Base",
    "Zero12Base",
    "adam_step",
    "architectures_by_number",
    "at_boundary",
    "attribute",
    "can_swap",
    "complete_gathers",
    "cpu_adam_op",
    "deepspeed_version",
    "ds_config_problems",
    "forget_backward",
    "fp32_weights_of",
    "gather_again",
    "gathered_bytes",
    "give_back_page_locked",
    "gradient_partitions",
    "has_fused_adam",
    "has_leaf_modules",
    "has_trace",
    "is_coalescing",
    "is_compact",
    "is_gathered",
    "is_in_bucket",
    "is_known",
    "keep_recomputed_weights",
    "keep_trace",
    "left_gathered",
    "link_adam_state",
    "link_masters",
    "link_reordered_params",
    "load_ds_config",
    "loads_through",
    "mark_compiled",
    "masters",
    "masters_made_on_host",
    "new_adam_state",
    "new_cpu_adam_id",
    "norm_dtype",
    "offloaded_param_ids",
    "only_groups",
    "only_sub_groups",
    "overrides",
    "own_trace",
    "param_group_of",
    "partition_weights",
    "place_in_partition",
    "read_weights",
    "reduce_buckets",
    "remove_gradient_hooks",
    "replace_masters",
    "require_known_deepspeed",
    "require_known_engine",
    "restore_offloaded_gradient",
    "set_master",
    "share_fused_steps",
    "spread_weights",
    "start_process_group",
    "swap_class",
    "swapped_weights_follow",
    "take_swapper",
    "takes_powers_anew",
    "unlink_adam_state",
    "unlink_masters",
    "unpin_memory",
    "unwritten_messages",
    "wait_for_offload_copies",
    "whole_state_dict",
    "write_weights",
    "writes_through",
    "zero_section_problems",
    "zero_weights",
]
