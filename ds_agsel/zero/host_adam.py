"""CPU Adam with one C++ object per param group, so that a step's bits depend on nothing but that group.

[Note: Hidden Adam state] csrc/includes/cpu_adam.h:71 (0.19.8) keeps a running product of each β in the C++ object: it
is multiplied on when a step count is the last one plus one, and recomputed by ``pow`` otherwise. The two differ in
the last bits. With one object for all groups and a step count per group, the bits would depend on the order of
calls, and a resumed run would differ from the one that went on. Here every group has an object of its own, which
is brought to the group's count before its first step (by calls on empty tensors), and DeepSpeed's own sequence of
multiplications is what each of them sees: with every group stepped every time, the bits are plain DeepSpeed's.

A product can't be set, only multiplied up, but it need not be for ever: it is read in ``1 - product`` alone, which is
1 in fp32 from 2**-25 downwards. Once both products are below that, one call brings an object to any count. So the
number of calls is bounded by the β and not by the count: at most 18,013 for β2 = 0.999 (15 ms on two CPU cores), and
1 from there on.

DeepSpeed 0.18 takes powers instead of products (`compat.takes_powers_anew`), from which two calls bring an object to
any count.

Where βs change on the way (a scheduler that cycles the momentum), an object takes its powers anew at that count, its
origin, and multiplies on from there. Origins go into checkpoints (`state_dict`), so that a resumed run does the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ds_agsel.zero import compat

# A product of βs below this has no bearing on a step: 1 - 2**-25 is 1 in fp32. The rest is room for its rounding,
# which at LAST_DRIFT_STEP multiplications is less than a factor of 2**22 * 2**-24, that is e**(1/4).
NEGLIGIBLE_PRODUCT = 2.0**-26
LAST_DRIFT_STEP = 2**22


class HostAdam:
    """The C++ Adam objects of a `DeepSpeedCPUAdam`, or of a `FusedAdam` on a CPU accelerator."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._op = compat.cpu_adam_op(optimizer)
        self._ids: dict[int, int] = {}
        self._counts: dict[int, int] = {}
        self._origins: dict[int, _Origin] = {}
        weakref.finalize(self, _destroy, self._op, self._ids)

    @contextmanager
    def stepping(
        self,
        groups: Sequence[int],
        partitions: Sequence[torch.Tensor],
        param_groups: Sequence[Mapping[str, Any]],
        before: Callable[[int], None] | None = None,
        after: Callable[[int], None] | None = None,
    ) -> Iterator[None]:
        """Let the optimizer's next ``step`` run on the C++ objects of ``groups``.

        It must step ``partitions`` alone, once, in their order.

        Args:
            groups: any numbers that stand for the partitions.
            param_groups: the hyperparameters of each.
            before, after: called with each partition's place just before and after its update; by CPU Adam alone.
        """
        state = self._optimizer.state
        counts = [state[partition].get("step", 0) if partition in state else 0 for partition in partitions]
        for count, group, param_group in zip(counts, groups, param_groups, strict=True):
            self._bring_to(count, group, param_group)
        identifiers = [self._ids[group] for group in groups]
        if isinstance(self._optimizer, compat.FusedAdam):
            bound = compat.attribute(self._optimizer, multi_tensor_adam=_FusedStep(self._op, identifiers))
        else:
            bound = compat.attribute(self._optimizer, ds_opt_adam=_InTurn(self._op, identifiers, before, after))
        with bound:
            yield
        for count, group, param_group in zip(counts, groups, param_groups, strict=True):
            self._counts[group] = count + 1
            betas = _fp32_betas(param_group)
            if self._origins[group].betas != betas:
                self._origins[group] = _Origin(count + 1, betas)

    def state_dict(self) -> dict[int, list[float]]:
        """Return what step counts do not tell, by group: the count of its origin, and the βs since."""
        return {group: [origin.count, *origin.betas] for group, origin in self._origins.items()}

    def load_state_dict(self, state: Mapping[int, Sequence[float]]) -> None:
        """Take up a `state_dict`; a group that is not in it has had its βs from the start. Objects are made anew."""
        self._counts.clear()
        self._origins = {group: _Origin(int(count), (b1, b2)) for group, (count, b1, b2) in state.items()}

    def _bring_to(self, count: int, group: int, param_group: Mapping[str, Any]) -> None:
        lr, eps, decay = float(param_group["lr"]), param_group["eps"], param_group["weight_decay"]
        if group not in self._ids:
            self._ids[group] = compat.new_cpu_adam_id()
        done = self._counts.get(group)
        if done is None or done > count:
            origin = self._origins.get(group)
            if origin is None or origin.count > count:
                origin = _Origin(0, _fp32_betas(param_group))
            self._origins[group] = origin
            adamw = bool(self._optimizer.adam_w_mode)  # type: ignore[attr-defined]
            self._op.create_adam(self._ids[group], lr, *origin.betas, eps, decay, adamw, False)
            done = max(0, origin.count - 1)  # its call is the first: from 0 to any other count but 1 it takes powers
        beta1, beta2 = self._origins[group].betas
        nothing = torch.empty(0)
        correction = bool(param_group["bias_correction"])
        next_step = done + 1
        if is_spent(beta1, count) and is_spent(beta2, count):
            next_step = max(next_step, count)
        steps: Sequence[int] = range(next_step, count + 1)
        if compat.takes_powers_anew():
            steps = (count + 1,) if group > 0 else (count, count)  # the call after the first takes powers
        for step in steps:
            self._op.adam_update(
                self._ids[group], step, lr, beta1, beta2, eps, decay, correction, nothing, nothing, nothing, nothing
            )


def is_spent(beta: float, count: int) -> bool:
    """Return whether Adam's bias correction with ``beta`` is 1 in fp32 after ``count`` steps, however it is computed.

    True for the running product of fp32 multiplications, which never grows, and for ``pow``.
    """
    fp32_beta = float(np.float32(beta))
    return fp32_beta ** min(count, LAST_DRIFT_STEP) <= NEGLIGIBLE_PRODUCT


@dataclass(frozen=True)
class _Origin:
    """Where an object's products began: with ``betas`` at ``count``, as powers; 0: at the start."""

    count: int
    betas: tuple[float, float]


def _fp32_betas(param_group: Mapping[str, Any]) -> tuple[float, float]:
    """Return the βs as the op takes them."""
    beta1, beta2 = param_group["betas"]
    return float(np.float32(beta1)), float(np.float32(beta2))


class _InTurn:
    """The op of a `DeepSpeedCPUAdam`, whose n-th call is on the n-th of given C++ objects."""

    def __init__(
        self,
        op: Any,
        identifiers: Sequence[int],
        before: Callable[[int], None] | None,
        after: Callable[[int], None] | None,
    ) -> None:
        self._op, self._identifiers = op, identifiers
        self._before, self._after = before, after
        self._place = 0

    def adam_update(self, _: int, *arguments: Any) -> None:
        place, self._place = self._place, self._place + 1
        if self._before is not None:
            self._before(place)
        self._op.adam_update(self._identifiers[place], *arguments)
        if self._after is not None:
            self._after(place)


class _FusedStep:
    """`multi_tensor_adam` of DeepSpeed's CPU FusedAdam (csrc/cpu/adam/fused_adam.cpp), on given C++ objects in turn."""

    def __init__(self, op: Any, identifiers: Sequence[int]) -> None:
        self._op = op
        self._identifiers = iter(identifiers)

    def __call__(
        self,
        chunk_size: int,
        noop_flag: torch.Tensor,
        tensor_lists: list[list[torch.Tensor]],
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        step: int,
        adamw_mode: int,
        bias_correction: int,
        weight_decay: float,
    ) -> None:
        for grad, param, exp_avg, exp_avg_sq in zip(*tensor_lists):
            self._op.adam_update(
                next(self._identifiers), step, lr, beta1, beta2, eps, weight_decay, bool(bias_correction),
                param, grad, exp_avg, exp_avg_sq,
            )  # fmt: skip


def _destroy(op: Any, identifiers: dict[int, int]) -> None:
    for identifier in identifiers.values():
        op.destroy_adam(identifier)
