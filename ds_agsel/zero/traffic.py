"""Count the bytes that a step moves, where DeepSpeed moves them, for `selection.Traffic`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepspeed import comm as dist
from torch import Tensor, nn

from ds_agsel.zero import compat
from ds_agsel.zero.selective import SelectiveStep


class Zero12Traffic(SelectiveStep, compat.Zero12Base):
    """Stages 1 and 2."""

    @compat.overrides
    def allreduce_bucket(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._count_reduced(super().allreduce_bucket(*args, **kwargs))

    @compat.overrides
    def gradient_reduction_w_predivide(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._count_reduced(super().gradient_reduction_w_predivide(*args, **kwargs))

    def _count_reduced(self, reduced: Tensor) -> Tensor:
        if dist.get_world_size(group=self.dp_process_group) > 1:
            self.selection.current_traffic.reduced_bytes += reduced.nbytes
        return reduced

    @compat.overrides
    def async_accumulate_grad_in_cpu_via_gpu(self, param: nn.Parameter) -> None:
        traffic = self.selection.current_traffic
        traffic.d2h_bytes += param.nbytes
        if self.micro_step_id > 0:  # the sum so far is copied to the accelerator, added to and copied back
            traffic.h2d_bytes += param.nbytes
        super().async_accumulate_grad_in_cpu_via_gpu(param)

    def _count_gathered(self, groups: Sequence[int]) -> None:
        """Count the all-gather of the updated weights of ``groups``."""
        if dist.get_world_size(group=self.dp_process_group) > 1:
            self.selection.current_traffic.gathered_bytes += sum(
                self.bit16_groups_flat[group].nbytes for group in groups
            )


class Zero3Traffic(SelectiveStep, compat.Zero3Base):
    """Stage 3."""

    @compat.overrides
    def partition_grads(self, params_to_release: list[Any], grad_partitions: list[Tensor]) -> list[Tensor]:
        traffic = self.selection.current_traffic
        for param in params_to_release:
            world_size = self._get_param_partition_world_size(param)
            if world_size > 1:
                sent = param.partition_numel() * world_size if self.reduce_scatter else param.ds_numel
                traffic.reduced_bytes += sent * self.get_param_comm_dtype(param).itemsize
            if self.offload_optimizer and self._holds_part_of(param):
                # Stock code keeps the sum on the host, and brings it back for the norm and for the next addition.
                size = param.partition_numel() * self.gradient_accumulation_dtype.itemsize
                traffic.d2h_bytes += size
                traffic.h2d_bytes += size
        return super().partition_grads(params_to_release, grad_partitions)

    def _holds_part_of(self, param: Any) -> bool:
        """Return whether this rank's partition of ``param`` is more than padding."""
        return param.partition_numel() * self._get_param_partition_rank(param) < param.ds_numel

    @compat.overrides
    def _offload_grad_partition_at_boundary(
        self, param: Any, grad_buffer: Tensor, *fragments: dict[int, list[Any]]
    ) -> None:
        size = grad_buffer.numel() * self.master_weights_and_grads_dtype.itemsize
        self.selection.current_traffic.d2h_bytes += size
        super()._offload_grad_partition_at_boundary(param, grad_buffer, *fragments)

    def _count_written(self, groups: Sequence[int]) -> None:
        """Count what the update of ``groups`` sent to the model weights, and to other ranks."""
        traffic = self.selection.current_traffic
        updated = {param.ds_id for group in groups for param in self.fp16_groups[group]}
        for param in self.persistent_parameters:
            if param.ds_id not in updated:
                continue
            world_size = self._get_param_partition_world_size(param)
            if world_size > 1:
                traffic.gathered_bytes += param.partition_numel() * world_size * param.element_size()
        # Weights move where the update runs on one side and the partition of the model is kept on the other.
        written = sum(self.fp16_partitioned_groups_flat_numel[group] for group in groups) * self.dtype.itemsize
        if self.offload_optimizer and not self.offload_param:
            traffic.h2d_bytes += written
        elif self.offload_param and not self.offload_optimizer:
            traffic.d2h_bytes += written
