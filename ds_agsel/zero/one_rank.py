"""ZeRO-2 and 3 on one data-parallel rank, without a reduction that would change nothing.

[Note: One rank] With a single data-parallel rank, the trip through the reduction bucket (a copy in, with stage 3 a
second into one flat tensor, a division by 1, a collective of one, a copy out) changes no bit and is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from ds_agsel.zero import compat
from ds_agsel.zero.gradient_places import AcceleratorGradients
from ds_agsel.zero.selective import SelectiveStep


def _changes_no_bit(dtype: torch.dtype, comm_dtypes: Iterable[torch.dtype], predivide_factor: float) -> bool:
    """Return whether one rank's reduction of gradients of ``dtype`` changes none: in a narrower dtype it rounds."""
    are_wide = all(torch.promote_types(comm_dtype, dtype) == comm_dtype for comm_dtype in comm_dtypes)
    return are_wide and predivide_factor == 1.0


class Zero12OneRank(SelectiveStep, compat.Zero12Base):
    """Takes a gradient as it is if there is no other rank.

    Attributes:
        _holds_gradients: whether gradients stay where they are now, until their block has been scored.
    """

    ready_for_gradients: bool
    _gradients: AcceleratorGradients
    _holds_gradients: bool

    def _has_nobody_to_reduce_with(self, param: nn.Parameter) -> bool:
        """Return whether [Note: One rank] applies."""
        return (
            self.partition_gradients
            and dist.get_world_size(group=self.dp_process_group) == 1
            and _changes_no_bit(self.dtype, self.ipg_buckets, self.gradient_predivide_factor)
            and not self.params_already_reduced[self.get_param_id(param)]
            and compat.is_in_bucket(param)
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


class Zero3OneRank(SelectiveStep, compat.Zero3Base):
    """Gives a gradient to its partition, which is the whole, if there is no other rank."""

    _numel_on_its_way = 0  # elements of gradients since backward was bounded last

    def _has_nobody_to_reduce_with(self, param: Any, comm_dtype: torch.dtype) -> bool:
        """Return whether [Note: One rank] applies."""
        return (
            dist.get_world_size() == 1
            and _changes_no_bit(self.dtype, (comm_dtype,), self.gradient_predivide_factor)
            and compat.is_in_bucket(param)
            and not compat.is_coalescing(self)
        )

    def _take_gradient(self, param: Any) -> None:
        accelerator = get_accelerator()
        if not accelerator.resolves_data_dependency():
            self.reduce_and_partition_stream.wait_stream(accelerator.current_stream())
        with accelerator.stream(self.reduce_and_partition_stream):
            self.partition_grads([param], [param.grad.reshape(-1)])
            self._numel_on_its_way += param.ds_numel
            if self._numel_on_its_way >= self.reduce_bucket_size and not accelerator.handles_memory_backpressure():
                self._numel_on_its_way = 0
                self._bound_what_is_on_its_way()

    def _bound_what_is_on_its_way(self) -> None:
        """Let backward be no more buckets ahead of the copies than plain DeepSpeed does (stage3.py:1663, 1697)."""
        events = self.param_reduce_events
        while events and events[0].query():
            events.popleft()
        if len(events) > self.max_param_reduce_events:
            events.popleft().synchronize()
        events.append(get_accelerator().Event())
        events[-1].record()
