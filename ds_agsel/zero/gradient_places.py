"""Where ZeRO-1 and ZeRO-2 keep reduced gradients until the step: on the accelerator, or with ZeRO-Offload on the host.

[Note: Old numbers] With ZeRO-Offload each fp32 partition has a ``.grad`` on the host. Stock code writes it where a
gradient arrives and never clears it. It thus applies an old gradient again to a parameter that got none
(stage_1_and_2.py:940, 1888). Here buffers exist only for the blocks that the step needs, and what this window did not
write there is zeroed before it is read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from ds_agsel.zero import compat
from ds_agsel.zero.gradient_buffers import FlatGradients
from ds_agsel.zero.staging import HostStaging


class AcceleratorGradients:
    """Gradients stay on the accelerator, in DeepSpeed's own lists. Most calls have nothing to do.

    Attributes:
        copies_each: whether each gradient is copied to another place as soon as it has been reduced.
    """

    copies_each = False

    def __init__(self, zero: compat.DeepSpeedZeroOptimizer) -> None:
        self._zero = zero

    def hold(self, groups: Sequence[int]) -> None:
        """Make ``groups`` the ones that buffers are held for."""

    def add(self, groups: Sequence[int]) -> None:
        """Hold buffers for ``groups`` too."""

    def let_go(self, groups: Sequence[int]) -> None:
        """Take the buffers of ``groups``, with what they hold, for those that come next."""

    def free_spare(self) -> None:
        """Free buffers that were taken and that no other group has."""

    def spare(self) -> list[Tensor]:
        """Return the buffers that `free_spare` would free."""
        return []

    def holds(self, group: int) -> bool:
        """Return whether a gradient of ``group`` can be taken now."""
        return True

    def fragments(self, group: int) -> list[Tensor] | None:
        """Return the parts of ``group``'s buffer on the host, one per parameter, (numel,); None without a buffer."""
        return None

    def copy_from_host(self, param: nn.Parameter) -> None:
        """Copy a gradient that the backward pass left on the host."""
        raise NotImplementedError

    def begin_window(self) -> None:
        """Start the sums of a new accumulation window from 0."""

    def before_copy(self, param: nn.Parameter, group: int) -> None:
        """Prepare for stock code to copy the gradient of ``param`` out of the bucket.

        Stock code makes room for the gradients of all groups at the first one (stage_1_and_2.py:2182).
        """
        zero = self._zero
        if zero.grads_in_partition is not None:
            return
        groups = zero._groups_of(zero.selection.active_blocks)
        if not compat.is_compact(zero, groups[0]):
            numel = sum(p.numel() for active in groups for p in zero.params_in_partition[active])
            device = get_accelerator().current_device_name()
            zero.grads_in_partition = torch.empty(numel, dtype=zero.dtype, device=device)
            zero.grads_in_partition_offset = 0

    def keep(self, params: Sequence[nn.Parameter]) -> None:
        """Move the gradients that ``params`` still hold to the place from which the step reads them."""

    def forget(self, param_id: int) -> None:
        """Forget that the parameter had a gradient in this window."""

    def drop(self, group: int) -> None:
        """Forget the records of ``group``'s gradients, which the choice has left out."""

    def complete(self, groups: Sequence[int]) -> None:
        """Leave only this window's numbers in the gradients of ``groups``; see [Note: Old numbers]."""

    def norms(self, group: int) -> list[tuple[int, Tensor]]:
        """Return (param id, L2 norm) of ``group``'s slices that were copied away, taken on the accelerator before."""
        return []

    def stage(self, groups: Sequence[int]) -> None:
        """Allocate staging for the updated weights of ``groups`` on their way to the accelerator."""

    def staged_bytes(self, group: int) -> int:
        """Return the bytes of ``group``'s updated weights that were copied to the accelerator."""
        return 0

    def staging_bytes(self) -> int:
        """Return the bytes of the host buffer through which updated weights are written back."""
        return 0

    def release(self) -> None:
        """Free page-locked memory, as the optimizer is destroyed."""


class HostGradients(AcceleratorGradients):
    """ZeRO-Offload: gradients of the step's blocks are copied to fp32 buffers on the host as they come."""

    copies_each = True

    def __init__(self, zero: compat.DeepSpeedZeroOptimizer) -> None:
        super().__init__(zero)
        self._partitions = zero.single_partition_of_fp32_groups
        self._ids = [[zero.get_param_id(param) for param in params] for params in zero.params_in_partition]
        numels = [partition.numel() for partition in self._partitions]
        self._staging = HostStaging(numels, zero.dtype, zero.cpu_offload_pin_memory)
        self._free_stock_staging()
        dtype, pins = zero.master_weights_and_grads_dtype, zero.cpu_offload_pin_memory
        self._buffers = FlatGradients(numels, dtype, "cpu", pins, zeroes=False)
        of_stock = {group: partition.grad for group, partition in enumerate(self._partitions)}
        self._buffers.take_over({group: grad for group, grad in of_stock.items() if grad is not None})
        self._has_stock_buffers = bool(of_stock)

    def _free_stock_staging(self) -> None:
        buffers = self._zero.param_buffer_of_bit16_for_cpu_offload_groups
        for group, buffer in enumerate(buffers):
            if self._zero.cpu_offload_pin_memory:
                compat.unpin_memory(buffer)
            buffers[group] = buffer.new_empty(0)

    def _param_ids(self, group: int) -> list[int]:
        """Return the ids of the parameters with a slice in this rank's partition of ``group``."""
        return self._ids[group]

    # ------------------------------------------------------------------------- buffers

    def hold(self, groups: Sequence[int]) -> None:
        self.let_go(sorted(self._buffers.held.keys() - set(groups)))
        self.add(groups)
        self.free_spare()
        if self._has_stock_buffers:  # from here on what is freed is of use for the next step's blocks
            self._has_stock_buffers = False
            compat.give_back_page_locked()

    def free_spare(self) -> None:
        self._buffers.free_spare()

    def spare(self) -> list[Tensor]:
        return self._buffers.spare

    def let_go(self, groups: Iterable[int]) -> None:
        zero = self._zero
        for group in groups:
            self._partitions[group].grad = None
            zero.offload_gradient_dict[group] = None
            for param_id in self._ids[group]:
                zero.accumulated_grads_in_cpu.pop(param_id, None)
        self._buffers.let_go(groups)

    def add(self, groups: Sequence[int]) -> None:
        for group in self._buffers.add(groups):
            self._partitions[group].grad = self._buffers.held[group]
            # A reused buffer may hold old numbers in the gaps between parameters, where no gradient is written.
            self._zero_gradient(group, keep=self._ids[group])
            self._zero.offload_gradient_dict[group] = self.fragments(group)

    def holds(self, group: int) -> bool:
        return group in self._buffers.held

    def begin_window(self) -> None:
        for gradient in self._zero.accumulated_grads_in_cpu.values():
            gradient.zero_()  # sums start from 0 also for a parameter that misses the first micro-step

    def fragments(self, group: int) -> list[Tensor] | None:
        flat = self._partitions[group].grad
        if flat is None:
            return None
        flat = flat.view(-1)
        positions = [self._zero.grad_position[param_id] for param_id in self._param_ids(group)]
        return [flat.narrow(0, start, numel) for _, _, start, numel in positions]

    def _zero_gradient(self, group: int, keep: Collection[int]) -> None:
        """Zero ``group``'s buffer except for the fragments of the parameters ``keep`` (param ids)."""
        flat = self._partitions[group].grad.view(-1)
        kept = sorted(tuple(self._zero.grad_position[param_id][2:]) for param_id in keep)
        end = 0
        for start, numel in [*kept, (flat.numel(), 0)]:
            if start > end:
                flat.narrow(0, end, start - end).zero_()
            end = start + numel

    # ------------------------------------------------------------------------ backward

    def before_copy(self, param: nn.Parameter, group: int) -> None:
        zero = self._zero
        if compat.at_boundary(zero) and compat.is_compact(zero, group):
            # Stock code copies it to the host there; gradients on other paths are counted on those.
            numel = zero.grad_position[zero.get_param_id(param)][3]
            zero.selection.current_traffic.d2h_bytes += numel * zero.master_weights_and_grads_dtype.itemsize

    def copy_from_host(self, param: nn.Parameter) -> None:
        # One copy converts; stock code makes an fp32 tensor first.
        zero = self._zero
        group, source, target, numel = zero.grad_position[zero.get_param_id(param)]
        gradient = zero.get_param_gradient_attribute(param)
        buffer = self._partitions[group].grad.view(-1)
        buffer.narrow(0, target, numel).copy_(gradient.view(-1).narrow(0, source, numel))
        zero.clear_grad_attribute(param)

    def keep(self, params: Sequence[nn.Parameter]) -> None:
        zero = self._zero
        with compat.attribute(zero, _holds_gradients=False):
            for param in params:
                param_id = zero.get_param_id(param)
                if zero.is_param_in_current_partition[param_id]:
                    with zero._copying(param):
                        zero.copy_grads_in_partition(param, zero._group_of_param[param_id])

    def forget(self, param_id: int) -> None:
        compat.offloaded_param_ids(self._zero).discard(param_id)

    def drop(self, group: int) -> None:
        for param_id in self._param_ids(group):
            self._zero.norm_for_param_grads.pop(param_id, None)

    # ---------------------------------------------------------------------------- step

    def complete(self, groups: Sequence[int]) -> None:
        zero = self._zero
        compat.wait_for_offload_copies(zero)
        for group in groups:
            written = []
            for param in zero.params_in_partition[group]:
                param_id = zero.get_param_id(param)
                if param_id not in zero.norm_for_param_grads and param_id in compat.offloaded_param_ids(zero):
                    # It had a gradient in an earlier micro-step but none in the last one, at which stock code copies.
                    compat.restore_offloaded_gradient(zero, param)
                    zero.set_norm_for_param_grad_in_gpu(param)
                    zero.async_inplace_copy_grad_to_fp32_buffer_from_gpu(param)
                if param_id in zero.norm_for_param_grads:
                    written.append(param_id)
            if len(written) < len(zero.params_in_partition[group]):
                self._zero_gradient(group, keep=written)

    def norms(self, group: int) -> list[tuple[int, Tensor]]:
        known = self._zero.norm_for_param_grads
        return [(param_id, known[param_id]) for param_id in self._param_ids(group) if param_id in known]

    def stage(self, groups: Sequence[int]) -> None:
        for group, buffer in self._staging.slices(groups).items():
            self._zero.param_buffer_of_bit16_for_cpu_offload_groups[group] = buffer

    def staged_bytes(self, group: int) -> int:
        return self._zero.param_buffer_of_bit16_for_cpu_offload_groups[group].nbytes

    def staging_bytes(self) -> int:
        return self._staging.held_bytes()

    def release(self) -> None:
        self._staging.release()
        self._zero.param_buffer_of_bit16_for_cpu_offload_groups.clear()
