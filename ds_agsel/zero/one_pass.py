"""The update of all groups of a step at once, where their states can be in place together.

[Note: One pass] DeepSpeed's `step` clips, steps and writes back group by group, with a call of the base optimizer for
each. Here it still takes the norm, looks for overflow and moves the loss scale, and gathers the weights afterwards; in
between all groups are updated by one call of the base optimizer. On the host, CPU Adam takes one group after another:
its gradient is clipped before and its weights are written after, while they are in the processor's cache. On an
accelerator groups with equal hyperparameters are stepped together, by multi-tensor kernels; the fp32 copies of their
gradients, which exist only here, take no more than 64 MiB or those of the largest group. The arithmetic of an element
is the same. States that rest in another form, in a file, or whose blocks take each other's place while the step goes on
are updated group by group, as is what a gradient scaler steps.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_agsel.param_groups import ParamGroup
from ds_agsel.zero import compat
from ds_agsel.zero.selective import SelectiveStep
from ds_agsel.zero.update_batches import batches

MERGED = (compat.FusedAdam, torch.optim.AdamW, torch.optim.Adam)  # step tensors one by one, whatever stands beside them


class OnePass(SelectiveStep):
    """What the stages share of [Note: One pass].

    Attributes:
        _at_once: whether the step that is being taken updates its groups in one pass.
    """

    _at_once = False

    # --------------------------------------------------- what each stage does its way

    def _bring_gradients(self, shown: Sequence[int]) -> Tensor:
        """Give the shown groups' partitions fp32 gradients; return their one flat buffer. On the accelerator."""
        raise NotImplementedError

    def _write_weights(self, shown: Sequence[int]) -> None:
        """Cast the shown groups' master weights to the model weights."""
        raise NotImplementedError

    # --------------------------------------------------------------------------- step

    def _before_update(self, groups: Sequence[int]) -> None:
        super()._before_update(groups)
        base = self.optimizer
        self._at_once = (
            self.home.can_enter_all()
            and (type(base) in MERGED or type(base) is compat.DeepSpeedCPUAdam)
            and not getattr(self, "torch_autocast_gradscaler", None)
        )

    def _update_at_once(self, total_norm: Tensor | None) -> None:
        """Update the shown groups, inside `_only`."""
        factor = self._clip_factor(total_norm)
        masters = compat.masters(self)
        self.selection.current_traffic.stepped_numel += sum(master.numel() for master in masters)
        if self._updates_on_host():
            for shown in range(len(masters)):
                self._enter_too(shown)
        if type(self.optimizer) is compat.DeepSpeedCPUAdam:
            self._update_in_turn(factor)
        elif self._updates_on_host():
            if factor is not None:
                for gradient in self._gradients_of(masters):
                    gradient.mul_(factor)
            self._update_together(range(len(masters)))
        else:
            for batch in batches([master.numel() for master in masters]):
                for shown in batch:
                    self._enter_too(shown)
                flat = self._bring_gradients(batch)
                if factor is not None:
                    flat.mul_(factor)
                self._update_together(batch)
                for shown in batch:
                    masters[shown].grad = None
                self._leave()

    def _update_in_turn(self, factor: Tensor | float | None) -> None:
        """Clip, step and write back one group after another, by CPU Adam."""
        masters = compat.masters(self)
        gradients = self._gradients_of(masters)
        param_groups = [self._with_params(shown, [master]) for shown, master in enumerate(masters)]

        def clip(shown: int) -> None:
            if factor is not None:
                gradients[shown].mul_(factor)

        def write(shown: int) -> None:
            self._write_weights((shown,))

        if self._host_adam is None:
            raise RuntimeError("CPU Adam without its C++ objects")  # `_steps_with_hidden_state` makes them
        with (
            compat.attribute(self.optimizer, param_groups=param_groups),
            self._host_adam.stepping(self._shown_groups, masters, param_groups, clip, write),
        ):
            self.optimizer.step()

    def _update_together(self, batch: Sequence[int]) -> None:
        """Step the groups of ``batch`` whose hyperparameters are equal together, then write all back."""
        masters = compat.masters(self)
        alike: dict[Hashable, list[int]] = {}
        for shown in batch:
            alike.setdefault(self._kind_of(shown), []).append(shown)
        in_order = [shown for members in alike.values() for shown in members]
        merged = [self._with_params(members[0], [masters[shown] for shown in members]) for members in alike.values()]
        hyperparameters = [compat.param_group_of(self, shown) for shown in in_order]
        with compat.attribute(self.optimizer, param_groups=merged):
            if self._host_adam is None:
                self.optimizer.step()
            else:
                groups = [self._shown_groups[shown] for shown in in_order]
                with self._host_adam.stepping(groups, [masters[shown] for shown in in_order], hyperparameters):
                    self.optimizer.step()
        if isinstance(self.optimizer, compat.FusedAdam):
            compat.share_fused_steps(self.optimizer, merged)
            for group in hyperparameters:
                group.setdefault("step", 0)  # as its own step does
        self._write_weights(batch)

    def _gradients_of(self, masters: Sequence[Tensor]) -> list[Tensor]:
        return [master.grad for master in masters if master.grad is not None]  # held for all that are updated

    def _with_params(self, shown: int, params: list[Tensor]) -> ParamGroup:
        return {**compat.param_group_of(self, shown), "params": params}

    def _kind_of(self, shown: int) -> Hashable:
        """Return what is equal for groups that can be stepped together."""
        hyperparameters = {key: value for key, value in compat.param_group_of(self, shown).items() if key != "params"}
        kind = _hashable(hyperparameters)
        if isinstance(self.optimizer, compat.FusedAdam):  # which has one step count for all that it steps together
            state = self.optimizer.state.get(compat.masters(self)[shown], {})
            return kind, state.get("step", 0)
        return kind


def _hashable(value: Any) -> Hashable:
    """Return something that is equal for equal ``value``; for tensors, where they are the same object."""
    if isinstance(value, Mapping):
        return tuple((key, _hashable(value[key])) for key in sorted(value) if key != "step")
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    return ("tensor", id(value)) if isinstance(value, Tensor) or not isinstance(value, Hashable) else value
