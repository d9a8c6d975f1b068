"""ZeRO-2 on one data-parallel rank, without a reduction that would change nothing.

[Note: One rank] With a single data-parallel rank, the trip through the reduction bucket (a copy in,
a division by 1, a collective of one, a copy out) changes no bit and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from ds_agsel.zero import compat
from ds_agsel.zero.gradient_places import AcceleratorGradients
from ds_agsel.zero.selective import SelectiveStep


class OneRankReduction(SelectiveStep, compat.Zero12Base):
    """Takes a gradient as it is if there is no other rank.

    Attributes:
        _holds_gradients: whether gradients stay where they are now, until their block has been scored.
    """

    ready_for_gradients: bool
    _gradients: AcceleratorGradients
    _holds_gradients: bool

    def _has_nobody_to_reduce_with(self, param: nn.Parameter) -> bool:
        """Return whether [Note: One rank] applies: not if a communication dtype narrower than the gradients' rounds."""
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
        if self._gradients.copies_each and not self._holds_gradients:
            with self._copying(param):
                self.copy_grads_in_partition(param, group)
        elif compact is not None:
            self.clear_grad_attribute(param)

    @contextmanager
    def _copying(self, param: nn.Parameter) -> Iterator[None]:
        """Inside, the current stream is the one on which plain DeepSpeed copies a gradient to the host.

        With `overlap_comm` that is beside the backward pass, which goes on.
        """
        accelerator = get_accelerator()
        if not self.overlap_comm or accelerator.resolves_data_dependency():
            yield
            return
        self.reduction_stream.wait_stream(accelerator.current_stream())
        self.get_param_gradient_attribute(param).record_stream(self.reduction_stream)
        with accelerator.stream(self.reduction_stream):
            yield
