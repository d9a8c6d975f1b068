"""What ZeRO-3 does to a weight while a checkpointed layer is computed again in backward.

[Note: Recomputed weights] Non-reentrant checkpointing computes a layer again when backward first asks for one of its
saved tensors. ZeRO-3 has then gathered the module that backward is in, and its hooks release it again as the recomputed
forward leaves that module. This happens where backward enters the layer at a module after which the layer computes
more, such as a router whose scores nothing uses. A frozen weight is saved as it is (torch 2.13, checkpoint.py,
`_recomputation_hook`), and empty by then: CheckpointError, "different metadata". The gradient of one that is trained
meets an empty parameter: RuntimeError, "The size of tensor a (0)". Plain DeepSpeed 0.19.8 raises
the second.

[Note: Gathered twice] A frozen weight that a recomputed forward gathers stays, as a saved tensor, until the module is
released that backward was in then (partitioned_param_coordinator.py:398, 0.19.8). It is gathered again for its own
module's backward, soon after. Here it stays until that. Where no backward comes to its module, in a layer whose lower
part needs no gradient, it stays until the step.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from ds_agsel.zero.compat.versions import refusal

_IN_BACKWARD = "_PartitionedParameterCoordinator__active_backward_submodules"
_BEFORE, _AFTER = "pre_sub_module_forward_function", "post_sub_module_forward_function"


def keep_recomputed_weights(optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Let a module that backward is in keep its weights through a recomputed forward. Idempotent.

    They are released after the module's backward, as ever. Raises ConfigError if DeepSpeed's hooks are not there.
    """
    offload: Any = optimizer.parameter_offload
    missing = [name for name in (_BEFORE, _AFTER) if not hasattr(offload, name)]
    if missing:
        raise refusal([f"its {type(offload).__name__} has no {name}" for name in missing])
    if _BEFORE not in vars(offload):
        keeper = _Keeper(getattr(offload, _BEFORE), getattr(offload, _AFTER), offload.get_param_coordinator())
        setattr(offload, _BEFORE, keeper.before_forward)
        setattr(offload, _AFTER, keeper.after_forward)


class _Keeper:
    """Stands around the two functions of DeepSpeed's forward hooks. [Note: Recomputed weights, Gathered twice]."""

    def __init__(self, gather: Any, release: Any, coordinator: Any) -> None:
        self._gather, self._release, self._coordinator = gather, release, coordinator
        self._kept: set[int] = set()  # ds_ids of modules in a recomputed forward, which backward is in

    def before_forward(self, module: Any) -> None:
        """Gather as DeepSpeed does; note whether backward has gathered the weights already."""
        self._kept.discard(module.ds_id)  # of a forward that ended early
        if torch._C._current_graph_task_id() != -1 and _is_in_backward(module):
            self._kept.add(module.ds_id)
        self._gather(module)
        if torch._C._current_graph_task_id() != -1:
            self._keep_frozen(module)

    def _keep_frozen(self, module: Any) -> None:
        """Let frozen weights that go with the module that backward is in go with their own."""
        owners = getattr(self._coordinator, _IN_BACKWARD, None)
        if not owners:
            return
        owner = next(reversed(owners.values()))
        for weight in module.parameters(recurse=False):
            if weight in owner.ds_recompute_parameters:
                owner.ds_recompute_parameters.discard(weight)
                if all(weight is not own for own in owner.parameters(recurse=False)):
                    weight.ds_active_sub_modules.discard(owner.ds_id)
                self._kept.add(module.ds_id)

    def after_forward(self, module: Any) -> None:
        """Release as DeepSpeed does, unless backward needs the weights."""
        if module.ds_id in self._kept:
            self._kept.discard(module.ds_id)
        else:
            self._release(module)


def _is_in_backward(module: Any) -> bool:
    """Return whether weights of ``module`` itself are gathered for it now."""
    return any(module.ds_id in weight.ds_active_sub_modules for weight in module.parameters(recurse=False))
