"""What the ZeRO optimizers of older releases of DeepSpeed lack: the bases of the restricted optimizers.

[Note: Older releases] The rest of this package is written for the newest known DeepSpeed. Where an older one differs,
a class here has the difference: it stands between our optimizers and DeepSpeed's, has the methods of the newer release,
and says in its name up to which release it is needed. `Zero12Base` and `Zero3Base` join those that the installed
release needs; with the newest one they are DeepSpeed's own classes. Differences outside these classes ask
`versions.until`. The guard treats these methods as DeepSpeed's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ds_agsel.zero.compat.versions import until
from ds_agsel.zero.compat.views import attribute

_Stock: Any = object  # what these classes are joined with in the end has every method that they call


def invalid(norms: Sequence[Any]) -> bool:
    """Return whether one of the ``norms`` is not finite; stock code writes -1 for such a norm. Waits for the host."""
    found = torch.stack([torch.as_tensor(norm, dtype=torch.float32) for norm in norms])
    return bool((~torch.isfinite(found) | (found < 0)).any())


def without_history_until_0189(zero: Any) -> None:
    """Detach the flat model weights of stages 1 and 2 from their autograd history; see `Zero12Until0189`."""
    for group, flat in enumerate(zero.bit16_groups_flat):
        if flat.requires_grad:
            zero.bit16_groups_flat[group] = flat.detach()
            partitions = zero.get_data_parallel_partitions(zero.bit16_groups_flat[group], group)
            zero.parallel_partitioned_bit16_groups[group] = partitions


class Zero12Until0184(_Stock):
    """Reduces all buckets at once, and ends backward with `zero_grad`, which is not the user's call of it."""

    __slots__ = ()

    def independent_gradient_partition_epilogue(self: Any) -> None:
        self.__dict__["zero_grad"] = partial(DeepSpeedZeroOptimizer.zero_grad, self)
        try:
            super().independent_gradient_partition_epilogue()
        finally:
            del self.__dict__["zero_grad"]

    def reduce_ipg_grads(self: Any, comm_dtype: torch.dtype | None = None) -> None:
        buckets = self.ipg_buckets if comm_dtype is None else {comm_dtype: self.ipg_buckets[comm_dtype]}
        with attribute(self, ipg_buckets=buckets):
            super().reduce_ipg_grads()


class Zero12Until0189(_Stock):
    """With CPU offload keeps the gradients of two micro-steps of a window only: the first and the last.

    Here, as in 0.19.0 and newer, each is added to the sum on the host. From 0.18.7 on its flat model weights may also
    have an autograd history (stage_1_and_2.py:420), with which the all-gather of `step` fails on two ranks or more.
    """

    __slots__ = ()

    def _link_all_hp_params(self: Any) -> None:
        without_history_until_0189(self)
        super()._link_all_hp_params()

    def async_accumulate_grad_in_cpu_via_gpu(self: Any, param: Any) -> None:
        super().async_accumulate_grad_in_cpu_via_gpu(param)
        if self.micro_step_id > 0:
            _, start, _, numel = self.grad_position[self.get_param_id(param)]
            total = self.get_param_gradient_attribute(param).data.view(-1)
            kept = self.accumulated_grads_in_cpu[self.get_param_id(param)]
            kept.data.copy_(total.narrow(0, start, numel) if self.low_precision_master_weights_and_grads else total)

    def copy_grads_in_partition(self: Any, param: Any) -> None:
        alone = self.micro_step_id == 0 and self.is_gradient_accumulation_boundary
        with attribute(self, gradient_accumulation_steps=1 if alone else 2):  # all that is asked: is it more than 1?
            super().copy_grads_in_partition(param)


class Zero12Until0191(_Stock):
    """Has no hook at the point where `step` comes to a group: `_get_preflattened_grad_partition` is called there."""

    __slots__ = ()

    def _get_preflattened_grad_partition(self: Any, group_idx: int) -> None:
        return None

    def free_grad_in_param_list(self: Any, param_list: list[Any]) -> None:
        """Free gradients; `step` calls this first for each group, with what is not in the group's partition."""
        for group, params in enumerate(self.params_not_in_partition):
            if params is param_list:
                self._get_preflattened_grad_partition(group)
        super().free_grad_in_param_list(param_list)


class Zero12Until0194(_Stock):
    """Keeps the boundary of accumulation as an attribute, and no record of what it has summed on the host."""

    __slots__ = ()

    def set_gradient_accumulation_boundary(self: Any, is_boundary: bool) -> None:
        self.is_gradient_accumulation_boundary = is_boundary

    @property
    def _offload_accumulated_param_ids(self: Any) -> set[int]:
        return self.__dict__.setdefault("_summed_on_host", set())

    def async_accumulate_grad_in_cpu_via_gpu(self: Any, param: Any) -> None:
        super().async_accumulate_grad_in_cpu_via_gpu(param)
        self._offload_accumulated_param_ids.add(self.get_param_id(param))

    def _restore_cpu_offload_grad_to_gpu(self: Any, param: Any) -> None:
        """As in 0.19.5 (stage_1_and_2.py:1092)."""
        param_id = self.get_param_id(param)
        _, start, _, numel = self.grad_position[param_id]
        summed = self.accumulated_grads_in_cpu[param_id].view(-1).to(param.device)
        if self.low_precision_master_weights_and_grads:
            whole = summed.new_zeros(param.numel())
            whole.narrow(0, start, numel).copy_(summed)
            summed = whole
        name = "grad_accum" if self.use_grad_accum_attribute else "grad"
        setattr(param, name, summed.view_as(param).clone())

    def step(self: Any, closure: Any = None) -> None:
        self._offload_accumulated_param_ids.clear()
        super().step(closure)


class Zero12Until0196(_Stock):
    """Takes a norm at every step."""

    __slots__ = ()
    compute_grad_norm = True


class Zero12Until0197(_Stock):
    """Has no compact gradient partitions, waits for its copies at once, and applies a step whose norm is not finite.

    A group's norm that is not finite counts as 1 there, and only fp16 looks for it by default until 0.19.3. Here such
    a step is skipped in every precision.
    """

    __slots__ = ()

    def _use_compact_grad_partition_buffer(self: Any, group_idx: int) -> bool:
        return False

    def _get_compact_grad_partition_slice(
        self: Any, group_idx: int, partition_id: int, param_id: int, num_elements: int
    ) -> None:
        return None

    def _wait_for_offload_copies(self: Any) -> None:
        return None

    def copy_grads_in_partition(self: Any, param: Any, group_idx: int | None = None) -> None:
        super().copy_grads_in_partition(param)

    def step(self: Any, closure: Any = None) -> None:
        self.overflow, self._looks_at_each = False, self.check_grad_overflow
        with attribute(self, check_grad_overflow=True):
            super().step(closure)

    def check_overflow(self: Any, partition_gradients: bool = True) -> None:
        if self._looks_at_each:
            super().check_overflow(partition_gradients)
        if not self.overflow:
            norm = self.scaled_global_norm()
            self.overflow = invalid([norm])
            self._norm_of_step = norm
        if self.overflow:
            self._norm_of_step = None

    def scaled_global_norm(self: Any, norm_type: int = 2) -> torch.Tensor:
        """Return the norm of all groups, infinite if one of them is; `step` asks for what its check has taken."""
        known = self.__dict__.pop("_norm_of_step", None)
        if known is not None:
            return known
        self.__dict__["_norms_of_groups"] = []
        norm = super().scaled_global_norm(norm_type)
        return norm.new_full((), float("inf")) if invalid(self._norms_of_groups) else norm

    def get_grad_norm_direct(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._noted(super().get_grad_norm_direct(*args, **kwargs))

    def complete_grad_norm_calculation_for_cpu_offload(self: Any, params: Any) -> Any:
        return self._noted(super().complete_grad_norm_calculation_for_cpu_offload(params))

    def _noted(self: Any, norm: Any) -> Any:
        self.__dict__.setdefault("_norms_of_groups", []).append(norm)
        return norm


class Zero3Until0192(_Stock):
    """Divides every parameter among all data-parallel ranks."""

    __slots__ = ()

    def _get_param_partition_rank(self: Any, param: Any) -> int:
        return dist.get_rank(group=self.dp_process_group)

    def _get_param_partition_world_size(self: Any, param: Any) -> int:
        return dist.get_world_size(group=self.dp_process_group)


class Zero3Until0194(_Stock):
    """Keeps the boundary of accumulation as an attribute, and copies gradients to the host inside `partition_grads`."""

    __slots__ = ()

    def set_gradient_accumulation_boundary(self: Any, is_boundary: bool) -> None:
        self.is_gradient_accumulation_boundary = is_boundary

    def partition_grads(self: Any, params_to_release: list[Any], grad_partitions: list[Any]) -> Any:
        if not (self.offload_optimizer and self.is_gradient_accumulation_boundary):
            return super().partition_grads(params_to_release, grad_partitions)
        with attribute(self, is_gradient_accumulation_boundary=False):
            kept = super().partition_grads(params_to_release, grad_partitions)
        came = zip(params_to_release, grad_partitions, strict=True)
        held = [
            pair
            for pair in came
            if pair[0].partition_numel() * self._get_param_partition_rank(pair[0]) < pair[0].ds_numel
        ]
        gradients: dict[int, list[Any]] = {}
        offsets: dict[int, list[Any]] = {}
        for (param, partition), gradient in zip(held, kept, strict=True):
            self._offload_grad_partition_at_boundary(param, gradient.to(partition.device), gradients, offsets)
        for sub_group in gradients:
            self.optimizer_swapper.swap_out_gradients(
                parameter=self.fp32_partitioned_groups_flat[sub_group],
                gradient_offsets=offsets[sub_group],
                gradient_tensors=gradients[sub_group],
            )
        return kept

    def _offload_grad_partition_at_boundary(
        self: Any,
        param: Any,
        grad_buffer: torch.Tensor,
        offload_fp32_gradients: dict[int, list[Any]],
        offload_fp32_offsets: dict[int, list[Any]],
    ) -> None:
        """As in 0.19.5 (stage3.py:1822)."""
        param_id = self.get_param_id(param)
        sub_group, offset, _ = self.grad_position[param_id]
        self.norm_for_param_grads[param_id] = self._constant_buffered_norm2(grad_buffer)
        gradient = grad_buffer.to(dtype=self.master_weights_and_grads_dtype)
        if self._swappable_optimizer_subgroup(sub_group):
            offload_fp32_gradients.setdefault(sub_group, []).append(gradient)
            offload_fp32_offsets.setdefault(sub_group, []).append(offset)
        else:
            self.fp32_partitioned_groups_flat[sub_group].grad.narrow(0, offset, gradient.numel()).copy_(gradient)


class Zero3Until0197(_Stock):
    """Applies a step whose norm is not finite, except in fp16. Here it is skipped in every precision."""

    __slots__ = ()

    def step(self: Any, closure: Any = None) -> None:
        self._norms_of_step = None
        super().step(closure)

    def check_overflow(self: Any, partition_gradients: bool = True) -> None:
        """Do nothing: the norms have said it."""

    def _overflow_check_and_loss_scale_update(self: Any) -> bool:
        norms = self._get_norm_groups()
        self.overflow = invalid(norms)
        return super()._overflow_check_and_loss_scale_update()

    def _get_norm_groups(self: Any) -> list[torch.Tensor]:
        """Return each sub-group's norm; `step` gets what its check has taken."""
        known = self._norms_of_step
        self._norms_of_step = super()._get_norm_groups() if known is None else None
        return self._norms_of_step if known is None else known


def _base(stock: type, *older: tuple[type, str]) -> Any:
    """Return ``stock`` with those in front that are needed up to the installed release or a later one."""
    needed = [cls for cls, newest in older if until(newest)]
    return type(f"Older{stock.__name__}", (*needed, stock), {"__slots__": ()}) if needed else stock


# The newest difference first: each is written for the release that follows the one in its name.
Zero12Base = _base(
    DeepSpeedZeroOptimizer,
    (Zero12Until0197, "0.19.7"),
    (Zero12Until0196, "0.19.6"),
    (Zero12Until0194, "0.19.4"),
    (Zero12Until0191, "0.19.1"),
    (Zero12Until0189, "0.18.9"),
    (Zero12Until0184, "0.18.4"),
)
Zero3Base = _base(
    DeepSpeedZeroOptimizer_Stage3,
    (Zero3Until0197, "0.19.7"),
    (Zero3Until0194, "0.19.4"),
    (Zero3Until0192, "0.19.2"),
)
