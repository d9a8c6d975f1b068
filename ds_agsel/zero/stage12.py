"""ZeRO-1 and ZeRO-2, restricted to the param groups of the selected blocks.

[Note: The view] Every param group belongs to one block. DeepSpeed's own loops over groups (the epilogue of
backward, `step`) run inside `compat.only_groups`, which shows them the groups of this step's blocks and no others:
what is not shown is not zero-filled, flattened, copied, clipped, stepped, written back or gathered, and what is
shown goes through DeepSpeed's own arithmetic, so that with every block selected the bits are plain DeepSpeed's.

[Note: One rank] Where a gradient has nobody to be averaged with, the trip through the reduction bucket (a copy in,
a division by 1, a collective of one, a copy out) changes no bit and is left out.

Each group's state is where the update runs when DeepSpeed's loop comes to it: see `states.home`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from ds_agsel.param_groups import HyperparameterLink
from ds_agsel.selection import Selection
from ds_agsel.zero import compat
from ds_agsel.zero.accessors import Zero12Accessors
from ds_agsel.zero.gradient_buffers import HostGradientBuffers
from ds_agsel.zero.repartition import Layout, Slice
from ds_agsel.zero.staging import HostStaging
from ds_agsel.zero.states.home import StateHome
from ds_agsel.zero.storage import storage_bytes


class SelectiveZeroOptimizer(Zero12Accessors):
    """A `DeepSpeedZeroOptimizer` whose step updates the selected blocks' groups. Made by `adapters.restrict`."""

    ready_for_gradients: bool
    grads_in_partition: Tensor | None

    def attach(
        self,
        selection: Selection,
        block_of_group: Sequence[int],
        link: HyperparameterLink,
        home: StateHome,
    ) -> None:
        """Take the controller and the states' home on. ``block_of_group[i]`` is the block of param group i."""
        self._group_of_param = {self.get_param_id(p): g for g, group in enumerate(self.bit16_groups) for p in group}
        self._attach(selection, block_of_group, link, home)
        self._holds_gradients = False  # gradients stay where they are until their block has been scored
        self._gradient_buffers = HostGradientBuffers(self.single_partition_of_fp32_groups, self.cpu_offload_pin_memory)
        if self.cpu_offload:
            numels = [partition.numel() for partition in self.single_partition_of_fp32_groups]
            self._staging = HostStaging(numels, self.dtype, self.cpu_offload_pin_memory)
            self._free_stock_staging()
        self._link_accessors()

    def _free_stock_staging(self) -> None:
        buffers = self.param_buffer_of_bit16_for_cpu_offload_groups
        for group, buffer in enumerate(buffers):
            if self.cpu_offload_pin_memory:
                get_accelerator().unpin_memory(buffer)
            buffers[group] = buffer.new_empty(0)

    @compat.overrides
    def destroy(self) -> None:
        if self.cpu_offload:
            self._staging.release()
            self.param_buffer_of_bit16_for_cpu_offload_groups.clear()
        super().destroy()

    # ------------------------------------------------------------------ window

    def _begin_window(self) -> None:
        super()._begin_window()
        if self.cpu_offload:
            for gradient in self.accumulated_grads_in_cpu.values():
                gradient.zero_()  # sums start from 0 also for a parameter that misses the first micro-step

    def _can_stream(self) -> bool:
        """Not with ZeRO-1, which keeps whole gradients to the end."""
        return super()._can_stream() and self.partition_gradients

    def _hold_gradient_buffers(self) -> None:
        if not self.cpu_offload:
            return
        groups = self._groups_of(sorted(self._blocks_to_keep()))
        for group in self._gradient_buffers.hold(groups):
            self._zero_gradient(group, keep=[self.get_param_id(p) for p in self.params_in_partition[group]])
        held = set(groups)
        for group in range(len(self.bit16_groups)):
            if group not in held:
                self.offload_gradient_dict[group] = None
            elif self.offload_gradient_dict.get(group) is None:
                self.offload_gradient_dict[group] = self._gradient_fragments(group)
        for param_id in [i for i in self.accumulated_grads_in_cpu if self._group_of_param[i] not in held]:
            del self.accumulated_grads_in_cpu[param_id]

    def _gradient_fragments(self, group: int) -> list[Tensor]:
        flat = self.single_partition_of_fp32_groups[group].grad.view(-1)
        positions = [self.grad_position[self.get_param_id(p)] for p in self.params_in_partition[group]]
        return [flat.narrow(0, start, numel) for _, _, start, numel in positions]

    @compat.overrides
    def _get_offload_gradient_dict(self) -> None:
        for group, partition in enumerate(self.single_partition_of_fp32_groups):
            self.offload_gradient_dict[group] = None if partition.grad is None else self._gradient_fragments(group)

    def _zero_gradient(self, group: int, keep: Sequence[int]) -> None:
        """Zero ``group``'s host gradient but for the fragments of the parameters ``keep`` (param ids)."""
        flat = self.single_partition_of_fp32_groups[group].grad.view(-1)
        kept = sorted(tuple(self.grad_position[param_id][2:]) for param_id in keep)
        end = 0
        for start, numel in [*kept, (flat.numel(), 0)]:
            if start > end:
                flat.narrow(0, end, start - end).zero_()
            end = start + numel

    # ---------------------------------------------------------------- backward

    @compat.overrides
    def process_gradients(self, param: nn.Parameter, i: int) -> None:
        self.window.open()
        if not self._is_wanted(param, i):
            return
        if self._stream is not None and compat.is_coalescing(self):
            self._stream = None  # all gradients come at once, when nothing can be given back any more
        stream = self._stream
        if stream is not None and not stream.is_over and stream.wants(self._block_of_group[i]):
            with compat.attribute(self, _holds_gradients=True):
                self._process_wanted(param, i)
                stream.take(self._block_of_group[i], param)
        else:
            self._process_wanted(param, i)

    def _process_wanted(self, param: nn.Parameter, i: int) -> None:
        if self.cpu_offload and not self._holds_gradients and self.single_partition_of_fp32_groups[i].grad is None:
            self._hold_gradient_buffers()
        if self._has_nobody_to_reduce_with(param):
            self._take_gradient(param, i)
        else:
            super().process_gradients(param, i)

    @compat.overrides
    def reduce_ready_partitions_and_remove_grads(self, param: nn.Parameter, i: int) -> None:
        if self._is_wanted(param, i):  # asked again: with stage 1 no hook may have come through process_gradients
            super().reduce_ready_partitions_and_remove_grads(param, i)

    def _is_wanted(self, param: nn.Parameter, group: int) -> bool:
        """Whether this step needs ``param``'s gradient; one it does not need is dropped."""
        block = self._block_of_group[group]
        if block in self._wanted_blocks():
            self._blocks_with_gradient.add(block)
            return True
        param.grad = None  # backward ran without the engine's forward, so nothing was frozen
        return False

    def _has_nobody_to_reduce_with(self, param: nn.Parameter) -> bool:
        """[Note: One rank]. Not where the trip would round, in a communication dtype narrower than the gradients'."""
        return (
            self.partition_gradients
            and dist.get_world_size(group=self.dp_process_group) == 1
            and all(torch.promote_types(comm_dtype, self.dtype) == comm_dtype for comm_dtype in self.ipg_buckets)
            and self.gradient_predivide_factor == 1.0
            and not self.params_already_reduced[self.get_param_id(param)]
            and getattr(param, "ds_grad_is_ready", True)
            and not compat.is_coalescing(self)
        )

    def _take_gradient(self, param: nn.Parameter, group: int) -> None:
        if not self.ready_for_gradients:  # what setup_buckets does, without the buckets
            self.micro_step_id += 1
            self.ready_for_gradients = True
        param_id = self.get_param_id(param)
        self.params_already_reduced[param_id] = True
        gradient = self.get_param_gradient_attribute(param)
        if not gradient.is_contiguous():
            param.grad = gradient = gradient.contiguous()
        compact = self._get_compact_grad_partition_slice(group, 0, param_id, param.numel())
        if compact is not None:
            compact.add_(gradient.view(-1).to(compact.dtype))
        if self.cpu_offload and not self._holds_gradients:
            self.copy_grads_in_partition(param, group)
        elif compact is not None:
            self.clear_grad_attribute(param)

    @compat.overrides
    def setup_buckets(self) -> None:
        """Buckets no larger than this step's gradients; stock ones are always `reduce_bucket_size` large."""
        groups = self._groups_of(self.selection.active_blocks)
        numel = sum(p.numel() for group in groups for p in self.bit16_groups[group])
        with compat.attribute(self, reduce_bucket_size=min(self.reduce_bucket_size, numel)):
            super().setup_buckets()

    @compat.overrides
    def copy_grads_in_partition(self, param: nn.Parameter, group_idx: int | None = None) -> None:
        if self._holds_gradients:
            if group_idx is not None and self._use_compact_grad_partition_buffer(group_idx):
                self.clear_grad_attribute(param)  # it has been added to the buffer
            else:
                gradient = self.get_param_gradient_attribute(param)
                param.grad = gradient.clone()  # the bucket is written over
            return
        if not self.cpu_offload and self.grads_in_partition is None:
            # Stock code makes room for the gradients of all groups (stage_1_and_2.py:2182).
            groups = self._groups_of(self.selection.active_blocks)
            if not self._use_compact_grad_partition_buffer(groups[0]):
                numel = sum(p.numel() for group in groups for p in self.params_in_partition[group])
                device = get_accelerator().current_device_name()
                self.grads_in_partition = torch.empty(numel, dtype=self.dtype, device=device)
                self.grads_in_partition_offset = 0
        group = self._group_of_param[self.get_param_id(param)]
        at_boundary = self.is_gradient_accumulation_boundary()
        if self.cpu_offload and at_boundary and self._use_compact_grad_partition_buffer(group):
            numel = self.grad_position[self.get_param_id(param)][3]  # copied in there; other gradients count themselves
            self.selection.current_traffic.d2h_bytes += numel * self.master_weights_and_grads_dtype.itemsize
        super().copy_grads_in_partition(param, group_idx)

    @compat.overrides
    def reduce_ipg_grads(self, comm_dtype: torch.dtype | None = None) -> None:
        """Reduce the buckets that hold something; with [Note: One rank] there may be none at all."""
        for dtype in [comm_dtype] if comm_dtype is not None else sorted(self.ipg_buckets, key=str):
            if self.ipg_buckets[dtype].params:
                super().reduce_ipg_grads(comm_dtype=dtype)

    @compat.overrides
    def independent_gradient_partition_epilogue(self) -> None:
        self.reduce_ipg_grads()  # its buckets name groups by their own index: before the view
        if self._stream is not None:
            self._stream.flush(and_score=self._explores_on_first_micro_batch())
        with compat.only_groups(self, self._groups_of(sorted(self._blocks_to_keep()))):
            super().independent_gradient_partition_epilogue()
        if self._stream is not None and not self.is_gradient_accumulation_boundary():
            self._choose_on_first_micro_batch()

    # ------------------------------------------------- explore: [Note: Streaming top-k]

    def _streamed_score(self, block: int) -> float:
        self.reduce_ipg_grads()
        if self.overlap_comm and self.reduction_stream is not None:
            get_accelerator().current_stream().wait_stream(self.reduction_stream)
        with compat.attribute(self, _holds_gradients=True):
            return float(self._block_scores((block,))[block])

    def _keep_gradients(self, block: int, params: list[nn.Parameter]) -> None:
        self._hold_gradient_buffers()
        if self.cpu_offload:
            with compat.attribute(self, _holds_gradients=False):
                for param in params:
                    if self.is_param_in_current_partition[self.get_param_id(param)]:
                        self.copy_grads_in_partition(param, self._group_of_param[self.get_param_id(param)])

    def _forget_block(self, block: int) -> None:
        self._drop_gradients({block})
        for group in self._groups_of((block,)):
            for param in self.bit16_groups[group]:
                param.grad = None
                if self.cpu_offload:
                    self._offload_accumulated_param_ids.discard(self.get_param_id(param))

    def _held_slices(self, group: int) -> list[tuple[int, Tensor]]:
        """(param id, this rank's slice of its gradient) of ``group``'s parameters, in the middle of backward."""
        rank = dist.get_rank(group=self.real_dp_process_group[group])
        slices = []
        for param in self.params_in_partition[group]:
            if param.grad is not None:
                param_id = self.get_param_id(param)
                start = self.grad_start_offset[group][rank][param_id]
                room = self.partition_size[group] - self.grad_partition_insertion_offset[group][rank][param_id]
                slices.append((param_id, param.grad.view(-1).narrow(0, start, min(param.numel() - start, int(room)))))
        return slices

    @compat.overrides
    def allreduce_bucket(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._count_reduced(super().allreduce_bucket(*args, **kwargs))

    @compat.overrides
    def gradient_reduction_w_predivide(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._count_reduced(super().gradient_reduction_w_predivide(*args, **kwargs))

    def _count_reduced(self, reduced: Tensor) -> Tensor:
        if dist.get_world_size(group=self.dp_process_group) > 1:
            self.selection.current_traffic.reduced_bytes += reduced.numel() * reduced.element_size()
        return reduced

    # ----------------------------------------------------------------- offload

    @compat.overrides
    def update_offload_overflow_tracker_for_param_grad(self, param: nn.Parameter) -> None:
        """Nothing: the norm, taken for every gradient, is finite just where the gradient is; see `has_overflow`."""

    @compat.overrides
    def async_inplace_copy_grad_to_fp32_buffer_from_gpu(self, param: nn.Parameter) -> None:
        group, source, target, numel = self.grad_position[self.get_param_id(param)]
        self.selection.current_traffic.d2h_bytes += numel * self.master_weights_and_grads_dtype.itemsize
        gradient = self.get_param_gradient_attribute(param)
        if gradient.device.type != "cpu":
            super().async_inplace_copy_grad_to_fp32_buffer_from_gpu(param)
            return
        # Where the model is on the host too, one copy converts; stock code makes an fp32 tensor for it first.
        buffer = self.single_partition_of_fp32_groups[group].grad.view(-1)
        buffer.narrow(0, target, numel).copy_(gradient.view(-1).narrow(0, source, numel))
        self.clear_grad_attribute(param)

    @compat.overrides
    def async_accumulate_grad_in_cpu_via_gpu(self, param: nn.Parameter) -> None:
        traffic = self.selection.current_traffic
        traffic.d2h_bytes += param.numel() * param.element_size()
        if self.micro_step_id > 0:
            traffic.h2d_bytes += param.numel() * param.element_size()
        super().async_accumulate_grad_in_cpu_via_gpu(param)

    @compat.overrides
    def has_overflow(self, partition_gradients: bool = True) -> bool:
        if self._overflow_is_known:
            return True
        if self.cpu_offload and self.norm_for_param_grads:
            norms = torch.stack([norm.to(self.device) for norm in self.norm_for_param_grads.values()])
            self.local_overflow |= not bool(torch.isfinite(norms).all())
        return super().has_overflow(partition_gradients)

    def _complete_gradients(self, blocks: Sequence[int]) -> None:
        """Host gradients of this window and of nothing else: 0 where a parameter had none in it."""
        if not self.cpu_offload:
            return
        self._wait_for_offload_copies()
        for group in self._groups_of(blocks):
            written = []
            for param in self.params_in_partition[group]:
                param_id = self.get_param_id(param)
                if param_id not in self.norm_for_param_grads and param_id in self._offload_accumulated_param_ids:
                    # It had a gradient in an earlier micro-step but none in the last one.
                    self._restore_cpu_offload_grad_to_gpu(param)
                    self.set_norm_for_param_grad_in_gpu(param)
                    self.async_inplace_copy_grad_to_fp32_buffer_from_gpu(param)
                if param_id in self.norm_for_param_grads:
                    written.append(param_id)
            if len(written) < len(self.params_in_partition[group]):
                self._zero_gradient(group, keep=written)

    # -------------------------------------------------------------------- step

    def _only(self, groups: Sequence[int]) -> AbstractContextManager[None]:
        return compat.only_groups(self, groups)

    def _before_update(self, groups: Sequence[int]) -> None:
        if self.cpu_offload:
            for group, buffer in self._staging.slices(groups).items():
                self.param_buffer_of_bit16_for_cpu_offload_groups[group] = buffer

    @compat.overrides
    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """The norm of all shown gradients, added up in the groups' order, whatever order they are updated in."""
        with compat.only_groups(self, sorted(range(len(self._shown_groups)), key=self._shown_groups.__getitem__)):
            return super().scaled_global_norm(norm_type)

    @compat.overrides
    def _get_preflattened_grad_partition(self, group_idx: int) -> Tensor | None:
        """The first thing that DeepSpeed's loop asks of a group it updates: its state must be there from here on."""
        self._enter(group_idx)
        return super()._get_preflattened_grad_partition(group_idx)

    def _slice_norms(self, group: int) -> list[tuple[int, Tensor]]:
        """(param id, L2 norm of this rank's slice of its gradient) of each parameter with a slice here."""
        params = self.params_in_partition[group]
        if self._holds_gradients and not self._use_compact_grad_partition_buffer(group):
            return [
                (param_id, torch.linalg.vector_norm(piece.to(compat.norm_dtype())))
                for param_id, piece in self._held_slices(group)
            ]
        if self.cpu_offload and not self._holds_gradients:
            ids = [self.get_param_id(param) for param in params]
            return [(i, self.norm_for_param_grads[i]) for i in ids if i in self.norm_for_param_grads]
        slices = [g for g in self.averaged_gradients.get(group) or () if not getattr(g, "_zero_padding", False)]
        return [
            (self.get_param_id(param), torch.linalg.vector_norm(piece.to(compat.norm_dtype())))
            for param, piece in zip(params, slices)
        ]

    def _skip_step(self) -> None:
        with compat.attribute(self, check_grad_overflow=True):
            super()._skip_step()

    def _drop_gradients(self, blocks: set[int]) -> None:
        for group in self._groups_of(tuple(blocks)):
            self.averaged_gradients[group] = None
            self.all_grad_tensors[group] = None
            if self.cpu_offload:
                for param in self.params_in_partition[group]:
                    self.norm_for_param_grads.pop(self.get_param_id(param), None)

    @compat.overrides
    def _optimizer_step(self, group_no: int) -> None:
        partition = self.single_partition_of_fp32_groups[group_no]
        self.selection.current_traffic.stepped_numel += partition.numel()
        if self._host_adam is None:
            super()._optimizer_step(group_no)
            return
        hyperparameters = self.optimizer.param_groups[group_no]
        with self._host_adam.stepping(self._shown_groups[group_no], partition, hyperparameters):
            super()._optimizer_step(group_no)

    def _after_update(self, groups: Sequence[int]) -> None:
        self._count_written(groups)
        for group in groups:
            self._link_state(group)

    def _count_written(self, groups: Sequence[int]) -> None:
        traffic = self.selection.current_traffic
        many = dist.get_world_size(group=self.dp_process_group) > 1
        for group in groups:
            flat = self.bit16_groups_flat[group]
            if self.cpu_offload:
                staged = self.param_buffer_of_bit16_for_cpu_offload_groups[group]
                traffic.h2d_bytes += staged.numel() * staged.element_size()
            if many:
                traffic.gathered_bytes += flat.numel() * flat.element_size()

    # ------------------------------------------------------------------ memory

    def held_gradient_bytes(self) -> tuple[int, int]:
        """Bytes held for gradients now, on this rank: (on the accelerator, on the host by ZeRO-Offload)."""
        tensors = [p.grad for group in self.bit16_groups for p in group]
        for by_group in (self.averaged_gradients, self.all_grad_tensors):
            for pieces in by_group.values():
                tensors += pieces or []
        tensors += [bucket for ipg in self.ipg_buckets.values() for bucket in ipg.buffer]
        host: list[Tensor] = []
        if self.cpu_offload:
            host = [p.grad for p in self.single_partition_of_fp32_groups]
            host += list(self.accumulated_grads_in_cpu.values())
        return storage_bytes(tensors), storage_bytes(host)

    def staging_bytes(self) -> int:
        """Bytes of the host buffer through which CPU offload writes updated weights back, on this rank."""
        return self._staging.held_bytes() if self.cpu_offload else 0

    # --------------------------------------------------------------- states: checkpoints

    @compat.overrides
    def load_state_dict(self, state_dict_list: Sequence[dict[str, Any] | None], **kwargs: Any) -> None:
        super().load_state_dict(state_dict_list, **kwargs)
        self._relink_states()  # to what the home has put in place of the loaded tensors

    def layouts(self) -> list[Layout]:
        found = []
        for params, partition in zip(self.bit16_groups, self.single_partition_of_fp32_groups):
            names = tuple(self.param_names[param] for param in params)
            places = [compat.place_in_partition(param) for param in params]
            slices = tuple(Slice(name, *place) for name, place in zip(names, places) if place is not None)
            found.append(Layout(names, partition.numel(), slices))
        return found

    @compat.overrides
    def update_lp_params(self) -> None:
        with self.home.readable():
            super().update_lp_params()
