"""ZeRO-1 and ZeRO-2, restricted to the param groups of the selected blocks.

[Note: The view] Every param group belongs to one block. DeepSpeed's own loops over groups (the epilogue of
backward, `step`) run inside `compat.only_groups`, which shows them the groups of this step's blocks and no others:
what is not shown is not zero-filled, flattened, copied, clipped, stepped, written back or gathered, and what is
shown goes through DeepSpeed's own arithmetic, so that with every block selected the bits are plain DeepSpeed's.

Each group's state is where the update runs when DeepSpeed's loop comes to it: see `states.home`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from ds_agsel.param_groups import HyperparameterLink
from ds_agsel.selection import Selection
from ds_agsel.zero import compat
from ds_agsel.zero.accessors import Zero12Accessors
from ds_agsel.zero.gradient_buffers import spare_buffers
from ds_agsel.zero.gradient_norms import BlockScores, l2_norms
from ds_agsel.zero.gradient_places import AcceleratorGradients, HostGradients
from ds_agsel.zero.one_pass import OnePass
from ds_agsel.zero.one_rank import Zero12OneRank
from ds_agsel.zero.states.home import StateHome
from ds_agsel.zero.storage import storage_bytes
from ds_agsel.zero.traffic import Zero12Traffic


class SelectiveZeroOptimizer(OnePass, Zero12Accessors, Zero12Traffic, Zero12OneRank):
    """A `DeepSpeedZeroOptimizer` whose step updates the selected blocks' groups. Made by `adapters.restrict`."""

    grads_in_partition: Tensor | None
    bit16_groups: list[list[nn.Parameter]]

    def attach(
        self, selection: Selection, block_of_group: Sequence[int], link: HyperparameterLink, home: StateHome
    ) -> None:
        """Attach the controller and the states' home. ``block_of_group[i]`` is the block of param group i."""
        self._group_of_param = {self.get_param_id(p): g for g, group in enumerate(self.bit16_groups) for p in group}
        self._attach(selection, block_of_group, link, home)
        self._ranks = [dist.get_rank(group=group) for group in self.real_dp_process_group]  # this one's, by group
        self._weights_at: dict[int, list[int]] = {}  # by group: where its flat weights and the model's are
        self._holds_gradients = False  # gradients stay where they are until their block has been scored
        self._gradients = HostGradients(self) if self.cpu_offload else AcceleratorGradients(self)
        self._link_accessors()

    @compat.overrides
    def destroy(self) -> None:
        self._gradients.release()
        super().destroy()

    # ------------------------------------------------------------------ window

    def _begin_window(self) -> None:
        super()._begin_window()
        self._gradients.begin_window()

    def _can_stream(self) -> bool:
        """Return the shared answer; False for ZeRO-1, which keeps whole gradients to the end."""
        return super()._can_stream() and self.partition_gradients

    def _hold_gradient_buffers(self) -> None:
        self._gradients.hold(self._groups_of(sorted(self._blocks_to_keep())))

    @compat.overrides
    def _get_offload_gradient_dict(self) -> None:
        for group in range(len(self.bit16_groups)):
            self.offload_gradient_dict[group] = self._gradients.fragments(group)

    # ---------------------------------------------------------------- backward

    @compat.overrides
    def process_gradients(self, param: nn.Parameter, i: int) -> None:
        self.window.open()
        if not self._is_wanted(param, i):
            return
        if self._arrivals is not None:
            self._arrivals.note(self._block_of_group[i])
        if self._stream is not None and compat.is_coalescing(self):
            self._stream = None  # all gradients come at once, when none can be freed early
        stream = self._stream
        if stream is not None and not stream.is_over and stream.wants(self._block_of_group[i]):
            with compat.attribute(self, _holds_gradients=True):
                self._process_wanted(param, i)
                stream.take(self._block_of_group[i], param)
        else:
            self._process_wanted(param, i)

    def _process_wanted(self, param: nn.Parameter, i: int) -> None:
        if not self._holds_gradients and not self._gradients.holds(i):
            self._hold_gradient_buffers()
        if self._has_nobody_to_reduce_with(param):  # [Note: One rank] in one_rank
            self._take_gradient(param, i)
        else:
            super().process_gradients(param, i)

    @compat.overrides
    def reduce_ready_partitions_and_remove_grads(self, param: nn.Parameter, i: int) -> None:
        if self._is_wanted(param, i):  # checked again: with stage 1 no hook may have passed process_gradients
            super().reduce_ready_partitions_and_remove_grads(param, i)

    def _is_wanted(self, param: nn.Parameter, group: int) -> bool:
        """Return whether this step needs ``param``'s gradient; one it does not need is dropped."""
        block = self._block_of_group[group]
        if block in self._wanted_blocks():
            self._blocks_with_gradient.add(block)
            return True
        param.grad = None  # backward ran without the engine's forward, so nothing was frozen
        return False

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
        self._gradients.before_copy(param, self._group_of_param[self.get_param_id(param)])
        super().copy_grads_in_partition(param, group_idx)

    @compat.overrides
    def reduce_ipg_grads(self, comm_dtype: torch.dtype | None = None) -> None:
        """Reduce the buckets that hold something; with [Note: One rank] in one_rank there may be none at all."""
        for dtype in [comm_dtype] if comm_dtype is not None else sorted(self.ipg_buckets, key=str):
            if self.ipg_buckets[dtype].params:
                super().reduce_ipg_grads(comm_dtype=dtype)

    @compat.overrides
    def independent_gradient_partition_epilogue(self) -> None:
        self.reduce_ipg_grads()  # before the view: its buckets name groups by their original index
        if self._stream is not None:
            self._stream.flush(and_score=self._explores_on_first_micro_batch())
            self._gradients.free_spare()
        groups = self._groups_of(sorted(self._blocks_to_keep()))
        with compat.only_groups(self, groups), self._waiting_for_reductions_alone():
            super().independent_gradient_partition_epilogue()
        if self._stream is not None and not compat.at_boundary(self):
            self._choose_on_first_micro_batch()

    @contextmanager
    def _waiting_for_reductions_alone(self) -> Iterator[None]:
        """Inside, the epilogue does not synchronize the device for `overlap_comm` (stage_1_and_2.py:1026).

        Whatever reads or frees gradients from here on runs on the current stream, which waits for the reductions.
        """
        if not self.overlap_comm or get_accelerator().resolves_data_dependency():
            yield
            return
        get_accelerator().current_stream().wait_stream(self.reduction_stream)
        self._clear_previous_reduced_grads()
        with compat.attribute(self, overlap_comm=False):
            yield

    # ------------------------------------------------- explore: [Note: Streaming top-k]

    def _streamed_scores(self, blocks: Sequence[int]) -> BlockScores:
        self.reduce_ipg_grads()
        if self.overlap_comm and self.reduction_stream is not None:
            get_accelerator().current_stream().wait_stream(self.reduction_stream)
        with compat.attribute(self, _holds_gradients=True):
            return self._start_scores(blocks)

    def _keep_gradients(self, block: int, params: list[nn.Parameter]) -> None:
        self._gradients.add(self._groups_of((block,)))
        self._gradients.keep(params)

    def _forget_block(self, block: int) -> None:
        self._drop_gradients({block})
        for group in self._groups_of((block,)):
            for param in self.bit16_groups[group]:
                param.grad = None
                self._gradients.forget(self.get_param_id(param))
        self._gradients.let_go(self._groups_of((block,)))

    def _held_slices(self, group: int) -> list[tuple[int, Tensor]]:
        """Return (param id, this rank's slice of its gradient) of ``group``'s parameters, in the middle of backward."""
        rank = dist.get_rank(group=self.real_dp_process_group[group])
        slices = []
        for param in self.params_in_partition[group]:
            if param.grad is not None:
                param_id = self.get_param_id(param)
                start = int(self.grad_start_offset[group][rank][param_id])  # a float until 0.19.6
                room = self.partition_size[group] - self.grad_partition_insertion_offset[group][rank][param_id]
                slices.append((param_id, param.grad.view(-1).narrow(0, start, min(param.numel() - start, int(room)))))
        return slices

    # ----------------------------------------------------------------- offload

    @compat.overrides
    def update_offload_overflow_tracker(self, grad: Tensor | None) -> None:
        """Do nothing: [Note: One norm] in gradient_norms."""

    @compat.overrides
    def set_norm_for_param_grad_in_gpu(self, param: nn.Parameter) -> None:
        param_id, gradient = self.get_param_id(param), self.get_param_gradient_attribute(param)
        _, source, _, numel = self.grad_position[param_id]
        [self.norm_for_param_grads[param_id]] = l2_norms([gradient.view(-1).narrow(0, source, numel)])

    @compat.overrides
    def async_inplace_copy_grad_to_fp32_buffer_from_gpu(self, param: nn.Parameter) -> None:
        numel = self.grad_position[self.get_param_id(param)][3]
        self.selection.current_traffic.d2h_bytes += numel * self.master_weights_and_grads_dtype.itemsize
        if self.get_param_gradient_attribute(param).device.type == "cpu":
            self._gradients.copy_from_host(param)
        else:
            super().async_inplace_copy_grad_to_fp32_buffer_from_gpu(param)

    @compat.overrides
    def has_overflow(self, partition_gradients: bool = True) -> bool:
        return self._overflow_is_known or self._is_overflow()

    def _complete_gradients(self, blocks: Sequence[int]) -> None:
        self._gradients.complete(self._groups_of(blocks))

    # -------------------------------------------------------------------- step

    @contextmanager
    def _only(self, groups: Sequence[int]) -> Iterator[None]:
        with compat.only_groups(self, groups), compat.attribute(self, bit16_groups=self.bit16_groups):
            yield

    def _before_update(self, groups: Sequence[int]) -> None:
        super()._before_update(groups)
        self._gradients.stage(groups)

    @compat.overrides
    def _update_scale(self, has_overflow: bool = False) -> None:
        """Before DeepSpeed's loop over groups, which has nothing left to do after [Note: One pass]."""
        super()._update_scale(has_overflow)
        at_once, self._at_once = self._at_once, False
        if at_once and not has_overflow:
            # DeepSpeed asks for the norm before, until 0.19.6 after this; it is taken once.
            self._update_at_once(self.scaled_global_norm() if self.compute_grad_norm else None)
            for shown, group in enumerate(self._shown_groups):
                self._point_to_weights(shown, group)
                self._release_gradients(shown)
            self.bit16_groups = []

    def _bring_gradients(self, shown: Sequence[int]) -> Tensor:
        masters = [self.single_partition_of_fp32_groups[index] for index in shown]
        flat = torch.empty(sum(m.numel() for m in masters), dtype=masters[0].dtype, device=masters[0].device)
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for index, master, target in zip(shown, masters, flat.split([m.numel() for m in masters])):
            pieces = self.averaged_gradients[index]
            whole = getattr(pieces, "flat_partition", None)
            at = 0
            for piece in pieces if whole is None else (whole,):
                targets.append(target[at : at + piece.numel()])
                sources.append(piece.view(-1))
                at += piece.numel()
            target[at:].zero_()  # the last rank's partition is padded
            master.grad = target
        torch._foreach_copy_(targets, sources)
        for index in shown:
            self._release_gradients(index)
        return flat

    def _release_gradients(self, shown: int) -> None:
        """Let go of the gradients of a group, of which the update has a copy or no need any more."""
        release = getattr(self.averaged_gradients.get(shown), "release_grad_buffers", None)
        if callable(release):
            release()
        self.averaged_gradients[shown] = None
        if not self.cpu_offload:
            self.all_grad_tensors[shown] = None
            for param in (*self.params_in_partition[shown], *self.params_not_in_partition[shown]):
                param.grad = param.grad_accum = None

    def _write_weights(self, shown: Sequence[int]) -> None:
        masters = self.single_partition_of_fp32_groups
        targets = [
            self.parallel_partitioned_bit16_groups[index][self._ranks[self._shown_groups[index]]].data
            for index in shown
        ]
        if not self.cpu_offload or targets[0].device.type == "cpu":
            torch._foreach_copy_(targets, [masters[index].data for index in shown])
            return
        for index, target in zip(shown, targets):
            staged = self.param_buffer_of_bit16_for_cpu_offload_groups[index]
            staged.data.copy_(masters[index].data)
            target.copy_(staged.data, non_blocking=True)

    def _point_to_weights(self, shown: int, group: int) -> None:
        """Let the model's parameters be the flat weights, as DeepSpeed does after each step, unless they are."""
        flat, params = self.bit16_groups_flat[shown], self.bit16_groups[shown]
        if self._weights_at.get(group) != [flat.data_ptr(), *(param.data_ptr() for param in params)]:
            self._update_model_bit16_weights(shown)
            self._weights_at[group] = [flat.data_ptr(), *(param.data_ptr() for param in params)]

    def _updates_on_host(self) -> bool:
        return bool(self.cpu_offload)

    def _needs_norm(self) -> bool:
        return self.compute_grad_norm or self.check_grad_overflow

    def _roots(self, sums: Tensor) -> Tensor:
        return sums.double().sqrt().float() if self.cpu_offload else super()._roots(sums)  # stage_1_and_2.py:1949

    @compat.overrides
    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        norm = self._global_norm()
        return norm.cpu() if self.cpu_offload else norm  # with offload the update waits for it on the host

    @compat.overrides
    def unscale_and_clip_grads(self, grad_groups_flat: Sequence[Tensor], total_norm: Tensor | None) -> None:
        factor = self._clip_factor(total_norm)
        if factor is not None:
            for gradient in grad_groups_flat:
                gradient.data.mul_(factor)

    @compat.overrides
    def _get_preflattened_grad_partition(self, group_idx: int) -> Tensor | None:
        """Return the gradient, and bring in the state: DeepSpeed's loop calls this first for a group it updates."""
        self._enter(group_idx)
        return super()._get_preflattened_grad_partition(group_idx)

    def _known_norms(self, group: int) -> list[tuple[int, Tensor]]:
        return [] if self._holds_gradients else self._gradients.norms(group)

    def _slices(self, group: int) -> list[tuple[int, Tensor]]:
        if self._holds_gradients and not self._use_compact_grad_partition_buffer(group):
            return self._held_slices(group)
        if self._gradients.copies_each and not self._holds_gradients:
            return []  # their norms are known
        slices = [g for g in self.averaged_gradients.get(group) or () if not getattr(g, "_zero_padding", False)]
        return [(self.get_param_id(param), piece) for param, piece in zip(self.params_in_partition[group], slices)]

    def _skip_step(self) -> None:
        with compat.attribute(self, check_grad_overflow=True):
            super()._skip_step()

    def _drop_gradients(self, blocks: set[int]) -> None:
        for group in self._groups_of(tuple(blocks)):
            self.averaged_gradients[group] = None
            self.all_grad_tensors[group] = None
            self._gradients.drop(group)

    @compat.overrides
    def _optimizer_step(self, group_no: int) -> None:
        if self.cpu_offload:  # DeepSpeed's loop has asked for no flat gradient before
            self._enter(group_no)
        partition = self.single_partition_of_fp32_groups[group_no]
        self.selection.current_traffic.stepped_numel += partition.numel()
        if self._host_adam is None:
            super()._optimizer_step(group_no)
        else:
            hyperparameters = self.optimizer.param_groups[group_no]
            with self._host_adam.stepping((self._shown_groups[group_no],), (partition,), (hyperparameters,)):
                super()._optimizer_step(group_no)
        self.home.updated(group_no, self._shown_groups[group_no])

    def _after_update(self, groups: Sequence[int]) -> None:
        self.selection.current_traffic.h2d_bytes += sum(map(self._gradients.staged_bytes, groups))
        self._count_gathered(groups)
        for group in groups:
            self._link_state(group)

    # ------------------------------------------------------------------ memory

    def held_gradient_bytes(self) -> tuple[int, int]:
        """Return the bytes held for gradients now, on this rank: (on the accelerator, on the host by ZeRO-Offload)."""
        tensors = [p.grad for group in self.bit16_groups for p in group]
        for by_group in (self.averaged_gradients, self.all_grad_tensors):
            for pieces in by_group.values():
                tensors += pieces or []
        tensors += [bucket for ipg in self.ipg_buckets.values() for bucket in ipg.buffer]
        host: list[Tensor] = []
        if self.cpu_offload:
            host = [p.grad for p in self.single_partition_of_fp32_groups]
            host += self.accumulated_grads_in_cpu.values()
            host += spare_buffers(self)
        return storage_bytes(tensors), storage_bytes(host)

    def staging_bytes(self) -> int:
        """Return the bytes of the host buffer through which CPU offload writes updated weights back, on this rank."""
        return self._gradients.staging_bytes()

    def group_of(self, param: nn.Parameter) -> int:
        """Return the param group of ``param``."""
        return self._group_of_param[self.get_param_id(param)]

    # --------------------------------------------------------------- states: checkpoints

    @compat.overrides
    def load_state_dict(self, state_dict_list: Sequence[dict[str, Any] | None], **kwargs: Any) -> None:
        super().load_state_dict(state_dict_list, **kwargs)
        self._relink_states()  # link to the tensors by which the home replaced the loaded ones

    @compat.overrides
    def update_lp_params(self) -> None:
        with self.home.readable():
            super().update_lp_params()
