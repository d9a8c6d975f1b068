"""DeepSpeed's accessors (`deepspeed.utils.safe_get_*` and `safe_set_*`) of a parameter's states and gradient.

[Note: What accessors answer] The same with every stage and wherever states are kept:

- Master weights and moments are those of the last step, of every block. The moments of a block that was never updated
  are zeros.
- A gradient exists from backward to step, in the blocks that the step may still update: the selected ones, or on an
  explore step those that have not been dropped. There, a parameter that the forward pass did not use has gradient 0.
  In all other blocks a getter returns None, and a setter raises TrainingError: no step would apply the gradient.
- A parameter that is in no block, because it was frozen before `initialize`, is not optimized: getters return None
  and setters do nothing, as in plain DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from ds_agsel.errors import TrainingError
from ds_agsel.residency.states import MOMENTS
from ds_agsel.zero import compat
from ds_agsel.zero.repartition import Layout, Slice
from ds_agsel.zero.selective import SelectiveStep

ZeroParameter = Any  # an nn.Parameter with what ZeRO-3 attaches to it: ds_id, ds_numel, ds_shape, ds_tensor, ...


class AccessibleStep(SelectiveStep):
    """What the accessors of all stages share."""

    def _has_state(self, group: int) -> bool:
        return bool(self.optimizer.state.get(compat.masters(self)[group]))

    def _lacks_moment(self, group: int, optim_state_key: str | None) -> bool:
        """Return whether ``optim_state_key`` names a moment, and ``group`` has none yet."""
        return optim_state_key in MOMENTS and not self._has_state(group)

    def _make_state(self, group: int) -> None:
        """Give ``group`` moments of 0 at step 0. Inside `StateHome.writable`."""
        partition = compat.masters(self)[group]
        self.optimizer.state[partition] = compat.new_adam_state(self.optimizer, partition)

    def _refuse_gradient_of(self, block: int) -> None:
        """Raise TrainingError: no step would apply a gradient of ``block``."""
        selection = self.selection
        raise TrainingError(
            f"step {selection.plan.step}: a gradient of block {selection.blocks[block].name} can't be set now: no step "
            "would apply it. Set gradients between backward and step, where safe_get_full_grad(param) is not None."
        )


class Zero12Accessors(AccessibleStep, compat.Zero12Base):
    """With stages 1 and 2 each parameter carries its accessors, which DeepSpeed links to the flat partitions."""

    def _link_accessors(self) -> None:
        """Link all parameters. Once, when the optimizer has been restricted."""
        self._states_linked: set[int] = set()
        self._params_of_group = [tuple(params) for params in self.bit16_groups]  # also while few of them are shown
        self._link_all_hp_params()

    @compat.overrides
    def _lazy_init_hp_params_optimizer_state(self) -> None:
        """Do nothing: stock code links once, after the first group's first step (stage_1_and_2.py:2987)."""

    def _link_state(self, group: int) -> None:
        if self.home.are_temporary:
            return  # `_linked` links them for as long as they are there
        if group not in self._states_linked and self._has_state(group):
            compat.link_adam_state(self, group)
            self._states_linked.add(group)

    @contextmanager
    def _linked(self, group: int) -> Iterator[None]:
        """Inside, the accessors find the state of ``group``, also what is there only now."""
        links = self.home.are_temporary and self._has_state(group)
        if links:
            compat.link_adam_state(self, group)
        if self.home.masters_are_split:
            compat.link_masters(self, group)
        try:
            yield
        finally:
            if links:
                compat.unlink_adam_state(self._params_of_group[group])
            if self.home.masters_are_split:
                compat.unlink_masters(self._params_of_group[group])

    def _unlink_states(self, groups: Sequence[int]) -> None:
        for group in groups:
            compat.unlink_adam_state(self._params_of_group[group])
        self._states_linked.difference_update(groups)

    def _relink_states(self) -> None:
        """Link the moments again, which a load has replaced."""
        self._states_linked.clear()
        for group in range(len(self.bit16_groups)):
            self._link_state(group)

    @compat.overrides
    def _link_all_hp_params(self) -> None:
        super()._link_all_hp_params()
        if self.round_robin_gradients:
            compat.link_reordered_params(self)
            self._param_slice_mappings = self._create_param_mapping()  # what checkpoints say of it
        self._relink_states()
        for group, params in enumerate(self.bit16_groups):
            if self.home.masters_are_split:
                compat.unlink_masters(params)
            for param in params:
                param.get_full_hp_param = partial(self._get_full_hp_param, param, group, param.get_full_hp_param)
                param.set_full_hp_param = partial(self._set_full_hp_param, param, group, param.set_full_hp_param)
                param.get_full_hp_grad = partial(self._get_full_hp_grad, group, param.get_full_hp_grad)
                param.set_full_hp_grad = partial(self._set_full_hp_grad, group, param.set_full_hp_grad)

    def layouts(self) -> list[Layout]:
        """Return what lies in this rank's partition of each param group."""
        found = []
        for params, partition in zip(self.bit16_groups, self.single_partition_of_fp32_groups):
            names = tuple(self.param_names[param] for param in params)
            places = [compat.place_in_partition(param) for param in params]
            slices = tuple(Slice(name, *place) for name, place in zip(names, places) if place is not None)
            found.append(Layout(names, partition.numel(), slices))
        return found

    def _get_full_hp_param(
        self, param: nn.Parameter, group: int, stock: Callable[..., Tensor], optim_state_key: str | None = None
    ) -> Tensor:
        """As `deepspeed.utils.safe_get_full_optimizer_state`; zeros for a block never updated. Collective."""
        if self._lacks_moment(group, optim_state_key):
            return torch.zeros_like(param, dtype=torch.float32, requires_grad=False)
        with self.home.readable((group,)), self._linked(group):
            return stock(optim_state_key)

    def _set_full_hp_param(
        self,
        param: nn.Parameter,
        group: int,
        stock: Callable[..., None],
        value: Tensor,
        optim_state_key: str | None = None,
    ) -> None:
        """As `deepspeed.utils.safe_set_full_*`; the model weight follows at once, as no step may come for its block."""
        if self._lacks_moment(group, optim_state_key):
            with self.home.writable((group,)):
                self._make_state(group)
            self._link_state(group)  # only now: the home may have replaced the new tensors
        with self.home.writable((group,)), self._linked(group):
            stock(value, optim_state_key)
        if optim_state_key is None:
            param.data.copy_(self.home.as_weight(value))

    def _get_full_hp_grad(self, group: int, stock: Callable[[], Tensor]) -> Tensor | None:
        """As `deepspeed.utils.safe_get_full_grad`, [Note: What accessors answer]. Collective."""
        block = self._block_of_group[group]
        if block not in self._blocks_to_keep():
            return None
        if compat.at_boundary(self):
            self._complete_gradients((block,))
        return stock()

    def _set_full_hp_grad(self, group: int, stock: Callable[[Tensor], None], value: Tensor) -> None:
        """As `deepspeed.utils.safe_set_full_grad`, [Note: What accessors answer]."""
        if self._block_of_group[group] not in self._blocks_to_keep():
            self._refuse_gradient_of(self._block_of_group[group])
        stock(value)
        self._gradients_were_set()


class Zero3Accessors(AccessibleStep, compat.Zero3Base):
    """With stage 3 the optimizer has the accessors, as methods that parameters are passed to.

    Attributes:
        _number_of_param: by ``ds_id``, the number of each parameter that is in a block.
        _received: ``ds_id`` of each parameter that got a gradient in this window.
    """

    _number_of_param: dict[int, int]
    _received: set[int]

    def _is_optimized(self, param: ZeroParameter) -> bool:
        return param.ds_id in self._number_of_param

    def _sub_group_of(self, param: ZeroParameter) -> int:
        return self._group_of_param[self._number_of_param[param.ds_id]]

    def _block_of(self, param: ZeroParameter) -> int:
        return self._block_of_group[self._sub_group_of(param)]

    def _own_slice(self, value: Tensor, param: ZeroParameter) -> Tensor:
        """Return this rank's part of ``value``, its padding zero: stock setters can't do uneven parts."""
        numel = param.partition_numel()
        padded = value.new_zeros(numel * self._get_param_partition_world_size(param))
        padded[: value.numel()].copy_(value.flatten())
        return padded.narrow(0, numel * self._get_param_partition_rank(param), numel)

    # --------------------------------------------------------- master weights, moments

    @compat.overrides
    def get_full_hp_param(self, param: ZeroParameter, optim_state_key: str | None = None) -> Tensor | None:
        """As `deepspeed.utils.safe_get_full_optimizer_state`; zeros for a block never updated. Collective."""
        if not self._is_optimized(param):
            return None
        if self._lacks_moment(self._sub_group_of(param), optim_state_key):
            return _zeros(param.ds_shape)
        with self.home.readable((self._sub_group_of(param),)), _trainable(param):
            return super().get_full_hp_param(param, optim_state_key)

    @compat.overrides
    def get_local_fp32_param(self, param: ZeroParameter, optim_state_key: str | None = None) -> Tensor | None:
        """As `deepspeed.utils.safe_get_local_*`; zeros for a block never updated."""
        if not self._is_optimized(param):
            return None
        if self._lacks_moment(self._sub_group_of(param), optim_state_key):
            return _zeros(param.partition_numel())
        with self.home.readable((self._sub_group_of(param),)), _trainable(param):
            return super().get_local_fp32_param(param, optim_state_key)

    @compat.overrides
    def get_hp_param_device(self, param: ZeroParameter, optim_state_key: str | None = None) -> torch.device | None:
        """Device on which a state is kept between steps."""
        if not self._is_optimized(param):
            return None
        if self._lacks_moment(self._sub_group_of(param), optim_state_key):
            return torch.device(str(getattr(self.device, "value", self.device)))
        with _trainable(param):
            return super().get_hp_param_device(param, optim_state_key)

    @compat.overrides
    def set_full_hp_param(self, value: Tensor, param: ZeroParameter, optim_state_key: str | None = None) -> None:
        """As `deepspeed.utils.safe_set_full_*`; the model weight follows at once, as no step may come for its block."""
        if not self._is_optimized(param):
            return
        self.set_local_hp_param(self._own_slice(value, param), param, optim_state_key)
        if optim_state_key is None and compat.is_gathered(param):
            param.data.copy_(self.home.as_weight(value).view(param.ds_shape))

    @compat.overrides
    def set_local_hp_param(self, value: Tensor, param: ZeroParameter, optim_state_key: str | None = None) -> None:
        """As `deepspeed.utils.safe_set_local_*`; the partition of the model weight follows at once."""
        if not self._is_optimized(param):
            return
        group = self._sub_group_of(param)
        with self.home.writable((group,)), _trainable(param):
            if self._lacks_moment(group, optim_state_key):
                self._make_state(group)
            super().set_local_hp_param(value, param, optim_state_key)
        if optim_state_key is None:
            compat.write_weights(param, self.home.as_weight(value))

    # ----------------------------------------------------------------------- gradients

    def _gradient_is_gone(self, param: ZeroParameter) -> bool:
        """Return whether ``param`` has no gradient: not yet in this window, or its block can't be updated."""
        return not (self._is_optimized(param) and self._received and self._block_of(param) in self._blocks_to_keep())

    @compat.overrides
    def get_fp32_grad_for_param(self, param: ZeroParameter) -> Tensor | None:
        """As `deepspeed.utils.safe_get_full_grad`, [Note: What accessors answer]. Collective."""
        if self._gradient_is_gone(param):
            return None
        return super().get_fp32_grad_for_param(param) if param.ds_id in self._received else _zeros(param.ds_shape)

    @compat.overrides
    def get_local_fp32_grad_for_param(self, param: ZeroParameter) -> Tensor | None:
        """As `deepspeed.utils.safe_get_local_grad`, [Note: What accessors answer]."""
        if self._gradient_is_gone(param):
            return None
        if param.ds_id not in self._received:
            return _zeros(param.partition_numel())
        return super().get_local_fp32_grad_for_param(param)

    @compat.overrides
    def set_fp32_grad_for_param(self, value: Tensor, param: ZeroParameter) -> None:
        """As `deepspeed.utils.safe_set_full_grad`, [Note: What accessors answer]."""
        if self._is_optimized(param):
            self.set_local_grad_for_param(self._own_slice(value, param), param)

    @compat.overrides
    def set_local_grad_for_param(self, value: Tensor, param: ZeroParameter) -> None:
        """As `deepspeed.utils.safe_set_local_grad`, [Note: What accessors answer]."""
        if not self._is_optimized(param):
            return
        if self._gradient_is_gone(param):
            self._refuse_gradient_of(self._block_of(param))
        super().set_local_grad_for_param(value, param)
        self._gradients_were_set()
        self._received.add(param.ds_id)  # otherwise the step would zero it, as if this window had not produced it

    @compat.overrides
    def update_fp32_grad_for_param_vectorized(
        self, update_func: Callable[[Tensor, ZeroParameter], Tensor], param_list: list[ZeroParameter]
    ) -> None:
        """As `deepspeed.utils.safe_update_full_grad_vectorized`; parameters that have no gradient are left out."""
        for param in param_list:
            gradient = self.get_fp32_grad_for_param(param)
            if gradient is not None:
                self.set_fp32_grad_for_param(update_func(gradient, param), param)


def _zeros(shape: torch.Size | int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device=get_accelerator().current_device_name())


@contextmanager
def _trainable(param: ZeroParameter) -> Iterator[None]:
    """``param`` requires gradients inside: stock accessors answer None for one that is frozen."""
    required = param.requires_grad
    param.requires_grad = True  # not by requires_grad_, which on a frozen parameter counts as the user's choice
    try:
        yield
    finally:
        param.requires_grad = required
