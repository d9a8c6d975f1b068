"""ZeRO-3, restricted to the sub-groups of the selected blocks.

[Note: Sub-groups] Every param group belongs to one block; DeepSpeed cuts it into sub-groups of about `sub_group_size`
elements, each with one flat fp32 partition that is a torch parameter with Adam state of its own. DeepSpeed's loops
over sub-groups (the epilogue of backward, `step`) run inside `compat.only_sub_groups`: what is not shown is not
prepared, clipped, stepped or written back.

[Note: Gradient partitions] A parameter's partition, and with CPU offload its slice of the fp32 gradient, holds the
numbers of an earlier step where this window brought it none; stock ZeRO-3 applies those and counts them in the norm
(stage3.py:1456). Here a selected parameter without a gradient in the window has gradient 0: its moments decay and its
weight decay applies, as in an expert that got no token. Buffers exist only for the blocks that this step needs.

[Note: First backward] Every selection prefetches by one record of a whole backward ([Note: Trace] in compat/trace).
Until there is one, backward goes through all blocks, and the gradients of what was not selected are dropped on arrival.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ds_agsel.param_groups import HyperparameterLink
from ds_agsel.selection import Selection
from ds_agsel.zero import compat
from ds_agsel.zero.accessors import Zero3Accessors, ZeroParameter
from ds_agsel.zero.gradient_buffers import Zero3GradientBuffers, spare_buffers
from ds_agsel.zero.gradient_norms import BlockScores, l2_norms
from ds_agsel.zero.one_pass import OnePass
from ds_agsel.zero.one_rank import Zero3OneRank
from ds_agsel.zero.repartition import Layout, Slice
from ds_agsel.zero.states.home import StateHome
from ds_agsel.zero.storage import storage_bytes
from ds_agsel.zero.traffic import Zero3Traffic

MOST_WHOLE_WINDOWS = 3  # of [Note: First backward], for models of which no record lasts


class SelectiveZero3Optimizer(OnePass, Zero3Accessors, Zero3Traffic, Zero3OneRank):
    """A `DeepSpeedZeroOptimizer_Stage3` whose step updates the selected blocks. Made by `adapters.restrict`."""

    reduce_bucket_size: int
    grad_partitions_flat_buffer: Tensor
    parameter_offload: Any

    def attach(
        self, selection: Selection, block_of_group: Sequence[int], link: HyperparameterLink, home: StateHome
    ) -> None:
        """Attach the controller and the states' home. ``block_of_group[i]`` is the block of sub-group i."""
        members = [(param, sub_group) for sub_group, params in enumerate(self.fp16_groups) for param in params]
        self._number_of_param = {param.ds_id: number for number, (param, _) in enumerate(members)}
        self._group_of_param = {number: sub_group for number, (_, sub_group) in enumerate(members)}
        self._attach(selection, block_of_group, link, home)
        self._unreleased = compat.UnreleasedParameters(self.parameter_offload.module)
        compat.keep_recomputed_weights(self)
        compat.keep_trace(self)
        self._whole_windows, self._goes_through_all = 0, False
        self._received: set[int] = set()  # ds_ids of the parameters that got a gradient in this window
        self._stock_bucket_size = self.reduce_bucket_size
        self._gradients = Zero3GradientBuffers(self)
        self._free_buckets()

    def group_of(self, param: Any) -> int:
        """Return the sub-group of ``param``."""
        return self._group_of_param[self._number_of_param[param.ds_id]]

    # ------------------------------------------------------------------ window

    def _begin_window(self) -> None:
        self._received.clear()
        self._goes_through_all = self._whole_windows < MOST_WHOLE_WINDOWS and not compat.has_trace(self)
        self._whole_windows += self._goes_through_all
        super()._begin_window()

    def blocks_in_backward(self) -> Sequence[int]:
        """Return the blocks that this window's backward goes through: all until there is a [Note: First backward]."""
        return self.selection.lottery.active if self._goes_through_all else super().blocks_in_backward()

    def _forget_gradients(self) -> None:
        super()._forget_gradients()
        self._received.clear()

    @compat.overrides
    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none=set_to_none)
        self._received.clear()  # DeepSpeed's sums begin anew (stage3.py:2374)

    def _hold_gradient_buffers(self) -> None:
        active = self.selection.active_blocks
        self._gradients.hold(self._groups_of(sorted(active if self._stream is None else self._stream.held)))
        # Buckets no larger than this step's gradients; stock ones are always `reduce_bucket_size` large.
        active_numel = sum(param.ds_numel for group in self._groups_of(active) for param in self.fp16_groups[group])
        self.reduce_bucket_size = min(self._stock_bucket_size, active_numel)

    # ---------------------------------------------------------------- backward

    @compat.overrides
    def reduce_ready_partitions_and_remove_grads(self, param: ZeroParameter) -> None:
        self.window.open()
        block = self._block_of(param)
        if block not in self._wanted_blocks():  # a leaf module, or a backward without the engine's forward
            param.grad = None
            return
        if self._arrivals is not None:
            self._arrivals.note(block)
        if self._stream is not None and compat.is_coalescing(self):
            self._stream = None  # all gradients come at once, when none can be freed early
            self._hold_gradient_buffers()
        stream = self._stream
        is_streamed = stream is not None and not stream.is_over and stream.wants(block)
        if param.ds_id not in compat.gradient_partitions(self):
            self._gradients.add(self._groups_of((block,)))
        comm_dtype = self.get_param_comm_dtype(param)
        if self._has_nobody_to_reduce_with(param, comm_dtype):  # [Note: One rank] in one_rank
            self._take_gradient(param)
        else:
            self._make_bucket(comm_dtype)
            super().reduce_ready_partitions_and_remove_grads(param)
        if stream is not None and is_streamed and compat.is_in_bucket(param):
            stream.take(block, param)

    def _make_bucket(self, dtype: torch.dtype) -> None:
        bucket = self.ipg_buckets[dtype]
        if self.contiguous_gradients and bucket.buffer is None:
            device = get_accelerator().current_device_name()
            bucket.buffer = torch.empty(self.reduce_bucket_size, dtype=dtype, device=device)

    def _free_buckets(self) -> None:
        for bucket in self.ipg_buckets.values():
            bucket.buffer = None

    @compat.overrides
    def partition_grads(self, params_to_release: list[ZeroParameter], grad_partitions: list[Tensor]) -> list[Tensor]:
        for param in params_to_release:
            self._blocks_with_gradient.add(self._block_of(param))
            if param.ds_id not in self._received:
                self._received.add(param.ds_id)
                if self.micro_step_id > 0:
                    compat.gradient_partitions(self)[param.ds_id].zero_()  # [Note: Gradient partitions]
        return super().partition_grads(params_to_release, grad_partitions)

    @compat.overrides
    def independent_gradient_partition_epilogue(self) -> None:
        compat.reduce_buckets(self)  # before the view: it fills buffers indexed by sub-group
        if self._stream is not None:
            self._stream.flush(and_score=self._explores_on_first_micro_batch())
            self._gradients.free_spare()
        with compat.only_sub_groups(self, self._groups_of(sorted(self._blocks_to_keep()))):
            super().independent_gradient_partition_epilogue()
        if self._stream is not None and not compat.at_boundary(self):
            self._choose_on_first_micro_batch()
        self._free_buckets()

    # ------------------------------------------------- explore: [Note: Streaming top-k]

    def _streamed_scores(self, blocks: Sequence[int]) -> BlockScores:
        compat.reduce_buckets(self)
        if self.reduce_and_partition_stream is not None:
            get_accelerator().current_stream().wait_stream(self.reduce_and_partition_stream)
        return self._start_scores(blocks)

    def _keep_gradients(self, block: int, params: list[ZeroParameter]) -> None:
        self._gradients.add(self._groups_of((block,)))  # for a block that got none; the others have buffers already

    def _forget_block(self, block: int) -> None:
        self._drop_gradients({block})
        groups = self._groups_of((block,))
        self._received.difference_update(param.ds_id for group in groups for param in self.fp16_groups[group])
        self._gradients.let_go(groups)

    # -------------------------------------------------------------------- step

    @compat.overrides
    def _partition_all_parameters(self) -> None:
        with compat.attribute(self.parameter_offload, module=self._unreleased), compat.unwritten_messages():
            super()._partition_all_parameters()

    def _complete_gradients(self, blocks: Sequence[int]) -> None:
        """Zero the old numbers in gradients that this window did not bring; see [Note: Gradient partitions]."""
        partitions = compat.gradient_partitions(self)
        for group in self._groups_of(blocks):
            for param in self.fp16_groups[group]:
                if param.ds_id not in self._received:
                    self._gradients.zero(param, group)
                elif (
                    self.offload_optimizer
                    and self._holds_part_of(param)
                    and self.get_param_id(param) not in self.norm_for_param_grads
                ):
                    # It had a gradient in an earlier micro-step but none in the last one.
                    self._offload_grad_partition_at_boundary(param, partitions[param.ds_id], {}, {})

    def _known_norms(self, group: int) -> list[tuple[int, Tensor]]:
        known = self.norm_for_param_grads if self.offload_optimizer else {}  # at a boundary, by DeepSpeed
        return [
            (self._number_of_param[param.ds_id], known[self.get_param_id(param)])
            for param in self.fp16_groups[group]
            if self.get_param_id(param) in known
        ]

    def _slices(self, group: int) -> list[tuple[int, Tensor]]:
        partitions, device = compat.gradient_partitions(self), get_accelerator().current_device_name()
        known = self.norm_for_param_grads if self.offload_optimizer else {}
        return [
            (self._number_of_param[param.ds_id], partitions[param.ds_id].to(device))
            for param in self.fp16_groups[group]
            if param.ds_id in self._received and self.get_param_id(param) not in known
        ]

    def _updates_on_host(self) -> bool:
        return bool(self.offload_optimizer)

    def _norm_sum_dtype(self) -> torch.dtype:
        return torch.float32 if self.offload_optimizer else compat.norm_dtype()

    @compat.overrides
    def _constant_buffered_norm2(self, input: Tensor, buffer_size: int = 250000000) -> Tensor:
        return l2_norms([input])[0]

    def _drop_gradients(self, blocks: set[int]) -> None:
        for group in self._groups_of(tuple(blocks)):
            self.averaged_gradients.pop(group, None)
            if self.offload_optimizer:
                for param in self.fp16_groups[group]:
                    self.norm_for_param_grads.pop(self.get_param_id(param), None)

    @contextmanager
    def _shown(self, groups: Sequence[int]) -> Iterator[None]:
        shown = set(groups)
        updated: list[ZeroParameter] = []
        others: list[ZeroParameter] = []
        for param in self.persistent_parameters:
            number = self._number_of_param.get(param.ds_id)
            (updated if number is not None and self._group_of_param[number] in shown else others).append(param)
        with (
            compat.left_gathered(others),
            compat.attribute(self, persistent_parameters=updated),
            compat.only_sub_groups(self, groups),
        ):
            yield

    def _only(self, groups: Sequence[int]) -> AbstractContextManager[None]:
        return self._shown(groups)

    @compat.overrides
    def has_overflow(self, partition_gradients: bool = True) -> bool:
        """Return the known answer: the norm, taken at every step, is finite exactly if the gradients are."""
        return self._overflow_is_known

    @compat.overrides
    def _get_norm_groups(self) -> list[Tensor]:
        """Return the shown sub-groups' norms in sub-group order, the order of summation, not that of the update."""
        if self._overflow_is_known:
            return [torch.tensor(float("inf"))]
        norms = self._group_norms()
        return list((norms.cpu() if self.offload_optimizer else norms).unbind())

    @compat.overrides
    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Tensor) -> None:
        if self._at_once:
            if sub_group_id == 0:  # DeepSpeed's loop has come to its first sub-group, and has no work with the others
                self._update_at_once(total_norm)
            return
        factor = self._clip_factor(total_norm)
        if factor is not None:
            self.fp32_partitioned_groups_flat[sub_group_id].grad.mul_(factor)

    @compat.overrides
    def _prepare_sub_group(self, sub_group_id: int, timer_names: set[str]) -> None:
        if self._at_once:
            return
        self._enter(sub_group_id)  # first: the gradient is set on the tensor that will be updated
        super()._prepare_sub_group(sub_group_id, timer_names)

    @compat.overrides
    def _release_sub_group(self, sub_group_id: int, timer_names: set[str]) -> None:
        if self._at_once:
            return
        super()._release_sub_group(sub_group_id, timer_names)  # takes the gradient off the tensor that was updated
        self._leave()

    @compat.overrides
    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None:
        if not self._at_once:
            super()._reassign_or_swap_out_partitioned_parameters(sub_group_id)

    def _before_update(self, groups: Sequence[int]) -> None:
        super()._before_update(groups)
        if any(self.fp16_partitioned_groups_flat[group] is None for group in groups):
            self._at_once = False  # model weights on NVMe

    def _bring_gradients(self, shown: Sequence[int]) -> Tensor:
        masters = [self.fp32_partitioned_groups_flat[index] for index in shown]
        flat = torch.empty(sum(m.numel() for m in masters), dtype=masters[0].dtype, device=masters[0].device)
        sources = [piece for index in shown for piece in self.averaged_gradients[index]]
        torch._foreach_copy_(list(flat.split([piece.numel() for piece in sources])), [s.view(-1) for s in sources])
        for index, master, gradient in zip(shown, masters, flat.split([m.numel() for m in masters])):
            master.grad = gradient
            self.averaged_gradients[index] = None
            for param in self.fp16_groups[index]:
                param.grad = None
        if not get_accelerator().is_synchronized_device():
            for piece in sources:
                if get_accelerator().on_accelerator(piece):
                    piece.record_stream(get_accelerator().current_stream())
        return flat

    def _write_weights(self, shown: Sequence[int]) -> None:
        masters = [self.fp32_partitioned_groups_flat[index].data for index in shown]
        targets = [self.fp16_partitioned_groups_flat[index].data for index in shown]
        # The host goes on: what is copied from there does not change before the next step's norm, for which it waits.
        torch._foreach_copy_(targets, masters, non_blocking=True)
        for index in shown:
            self._unflatten_partitioned_parameters(index)

    @compat.overrides
    def _optimizer_step(self, sub_group_id: int) -> None:
        if self._at_once:
            return
        partition = self.fp32_partitioned_groups_flat[sub_group_id]
        self.selection.current_traffic.stepped_numel += partition.numel()
        group = self.optimizer.param_groups[self.sub_group_to_group_id[sub_group_id]]
        with (
            compat.attribute(self.optimizer, param_groups=[group]),  # stock code walks all groups
            compat.attribute(self, sub_group_to_group_id={sub_group_id: 0}),
        ):
            if self._host_adam is None:
                super()._optimizer_step(sub_group_id)
            else:
                with self._host_adam.stepping((self._shown_groups[sub_group_id],), (partition,), (group,)):
                    super()._optimizer_step(sub_group_id)
        self.home.updated(sub_group_id, self._shown_groups[sub_group_id])

    def _after_update(self, groups: Sequence[int]) -> None:
        self._count_written(groups)

    # ------------------------------------------------------------------ memory

    def held_gradient_bytes(self) -> tuple[int, int]:
        """Return the bytes held for gradients now, on this rank: (on the accelerator, on the host by ZeRO-Offload)."""
        buckets = [bucket.buffer for bucket in self.ipg_buckets.values()]
        accelerator = [param.grad for params in self.fp16_groups for param in params] + buckets
        partitions = [*compat.gradient_partitions(self).values(), *spare_buffers(self)]
        if not self.offload_optimizer:
            return storage_bytes(accelerator + partitions), 0
        return storage_bytes(accelerator), storage_bytes(
            partitions + [partition.grad for partition in self.fp32_partitioned_groups_flat]
        )

    # ------------------------------------------------------------- states: checkpoints

    def _weights_follow(self) -> AbstractContextManager[None]:
        return compat.swapped_weights_follow(self)

    @compat.overrides
    def _restore_from_bit16_weights(self) -> None:
        for group, partition in enumerate(self.fp32_partitioned_groups_flat):
            compat.read_weights(self, group, partition.data)

    def layouts(self) -> list[Layout]:
        """Return what lies in this rank's partition of each sub-group."""
        found = []
        for group, params in enumerate(self.fp16_groups):
            at, slices = 0, []
            for param in params:
                share, rank = param.partition_numel(), dist.get_rank(group=param.ds_process_group)
                numel = min(share, param.ds_numel - rank * share)
                if numel > 0:
                    slices.append(Slice(self.param_names[param], rank * share, at, numel))
                at += share
            names = tuple(self.param_names[param] for param in params)
            found.append(Layout(names, self.fp16_partitioned_groups_flat_numel[group], tuple(slices)))
        return found
