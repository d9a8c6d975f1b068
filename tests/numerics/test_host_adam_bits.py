"""`HostAdam` on DeepSpeed's compiled op: resumed at a count, it has the bits of the calls that it leaves out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_agsel.zero import compat
from ds_agsel.zero.host_adam import HostAdam

SIZE = 1024  # more than one vector of every instruction set, and a whole number of them


class Counted:
    """The compiled module, with its calls of `adam_update` counted."""

    def __init__(self, op: Any) -> None:
        self._op = op
        self.calls = 0

    def adam_update(self, *args: Any) -> None:
        self.calls += 1
        self._op.adam_update(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._op, name)


def resumed_at(count: int) -> tuple[Any, Any]:
    """An optimizer with one partition whose state says ``count`` steps, and the partition."""
    random = torch.Generator().manual_seed(7)
    partition = torch.nn.Parameter(torch.randn(SIZE, generator=random))
    partition.grad = torch.randn(SIZE, generator=random)
    optimizer = compat.DeepSpeedCPUAdam([partition], lr=1e-2, weight_decay=0.01)
    optimizer.ds_opt_adam = Counted(optimizer.ds_opt_adam)
    optimizer.state[partition] = {
        "step": count,
        "exp_avg": torch.randn(SIZE, generator=random),
        "exp_avg_sq": torch.rand(SIZE, generator=random),
    }
    return optimizer, partition


def tensors(optimizer: Any, partition: Any) -> list[torch.Tensor]:
    state = optimizer.state[partition]
    return [partition.detach(), state["exp_avg"], state["exp_avg_sq"]]


@pytest.mark.parametrize(("count", "calls"), [(500, 500), (18_013, 18_013), (18_014, 1)])
def test_bits_are_those_of_every_call(count: int, calls: int) -> None:
    """``plain`` makes all ``count`` calls on DeepSpeed's own object."""
    plain, plain_partition = resumed_at(count)
    nothing = torch.empty(0)
    for step in range(1, count + 1):
        plain.ds_opt_adam.adam_update(plain.opt_id, step, 1e-2, 0.9, 0.999, 1e-8, 0.01, True, *[nothing] * 4)
    ours, our_partition = resumed_at(count)
    adam = HostAdam(ours)
    for step in range(3):
        plain.step()
        with adam.stepping((0,), (our_partition,), ours.param_groups):
            ours.step()
        assert ours.ds_opt_adam.calls == calls + step + 1
        for one, other in zip(tensors(plain, plain_partition), tensors(ours, our_partition), strict=True):
            assert torch.equal(one, other)


def test_without_the_calls_the_bits_are_others() -> None:
    """So that the test above notices a hidden count that is not advanced."""
    plain, plain_partition = resumed_at(500)
    plain.step()
    ours, our_partition = resumed_at(500)
    with HostAdam(ours).stepping((0,), (our_partition,), ours.param_groups):
        ours.step()
    assert not torch.equal(plain_partition, our_partition)
