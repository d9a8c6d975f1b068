"""`HostAdam` on a model of DeepSpeed's C++ Adam object: it has the hidden state, counts its calls, needs no build."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from ds_agsel.zero import compat, host_adam

BETAS = (0.9, 0.999)
# From where on the bias corrections of BETAS are 1 in fp32: 0.999 ** 18_014 < 2**-26.
SPENT = 18_014


@dataclass
class Object:
    """`Adam_Optimizer` (csrc/includes/cpu_adam.h:22-92): what it keeps from one call to the next."""

    betas: tuple[np.float32, np.float32]
    adamw: bool
    products: tuple[np.float32, np.float32] = (np.float32(1), np.float32(1))
    step: int = 0

    def increment(self, step: int, betas: tuple[np.float32, np.float32]) -> None:
        if betas == self.betas and step == self.step + 1:
            self.products = (self.products[0] * betas[0], self.products[1] * betas[1])
        elif betas != self.betas or step != self.step:
            self.products = (
                np.float32(math.pow(float(betas[0]), step)),
                np.float32(math.pow(float(betas[1]), step)),
            )
        self.betas, self.step = betas, step


class Op:
    """The compiled `cpu_adam` module. ``corrections`` has what each call on elements read of the hidden state."""

    def __init__(self) -> None:
        self.objects: dict[int, Object] = {}
        self.empty_calls = 0
        self.corrections: list[tuple[float, float]] = []
        self.settings: list[tuple[float, ...]] = []
        self.tensors: list[list[float]] = []

    def create_adam(
        self, identifier: int, lr: float, beta1: float, beta2: float, eps: float, decay: float, adamw: bool, log: bool
    ) -> None:
        assert log is False
        assert (lr, eps, decay) == (0.1, 1e-8, 0.01)
        self.objects[identifier] = Object((np.float32(beta1), np.float32(beta2)), adamw)

    def adam_update(
        self, identifier: int, step: int, lr: float, beta1: float, beta2: float, eps: float, decay: float,
        bias_correction: bool, param: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor,
    ) -> None:  # fmt: skip
        assert len({tensor.numel() for tensor in (param, grad, exp_avg, exp_avg_sq)}) == 1
        held = self.objects[identifier]
        held.increment(step, (np.float32(beta1), np.float32(beta2)))
        self.settings.append((lr, eps, decay, bias_correction))
        if not param.numel():
            self.empty_calls += 1
            return
        self.tensors.append([float(tensor) for tensor in (param, grad, exp_avg, exp_avg_sq)])
        one = np.float32(1)
        self.corrections.append((float(one - held.products[0]), float(one / np.sqrt(one - held.products[1]))))

    def destroy_adam(self, identifier: int) -> None:
        del self.objects[identifier]


class Optimizer(torch.optim.Optimizer):
    """Steps as `DeepSpeedCPUAdam` does: counts, then calls the op on its own object."""

    def __init__(self, op: Op, params: list[torch.Tensor], betas: tuple[float, float] = BETAS) -> None:
        super().__init__(
            params, {"lr": 0.1, "betas": betas, "eps": 1e-8, "weight_decay": 0.01, "bias_correction": True}
        )
        self.op, self.ds_opt_adam, self.opt_id, self.adam_w_mode = op, op, -1, True

    def step(self, partition: torch.Tensor) -> None:  # type: ignore[override]
        state = self.state[partition]
        state["step"] = state.get("step", 0) + 1
        group = self.param_groups[0]
        self.ds_opt_adam.adam_update(
            self.opt_id, state["step"], group["lr"], *group["betas"], group["eps"], group["weight_decay"], True,
            partition, partition, partition, partition,
        )  # fmt: skip


class Run:
    """Partitions stepped one at a time; with ``counts`` as after a checkpoint that has them."""

    def __init__(self, op: Op, counts: tuple[int, ...] = (0,), betas: tuple[float, float] = BETAS) -> None:
        self.partitions = [torch.ones(1) for _ in counts]
        self.optimizer = Optimizer(op, self.partitions, betas)
        for partition, count in zip(self.partitions, counts, strict=True):
            if count:
                self.optimizer.state[partition]["step"] = count
        self.adam = host_adam.HostAdam(self.optimizer)

    def step(self, group: int = 0) -> tuple[float, float]:
        """Step one partition and return the bias corrections that it got."""
        partition = self.partitions[group]
        with self.adam.stepping((group,), (partition,), (self.optimizer.param_groups[0],)):
            self.optimizer.step(partition)
        return self.optimizer.op.corrections[-1]


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Op:
    made = Op()
    monkeypatch.setattr(compat, "cpu_adam_op", lambda optimizer: optimizer.op)
    return made


def product_corrections(count: int, betas: tuple[float, float] = BETAS) -> tuple[float, float]:
    """The bias corrections of step ``count`` by DeepSpeed's sequence of fp32 multiplications."""
    one = np.float32(1)
    first, second = (np.multiply.accumulate(np.full(count, beta, np.float32))[-1] for beta in betas)
    return float(one - first), float(one / np.sqrt(one - second))


def test_a_run_that_goes_on_makes_no_call_of_its_own(op: Op) -> None:
    run = Run(op)
    got = [run.step() for _ in range(30)]
    assert got == [product_corrections(count) for count in range(1, 31)]
    assert op.empty_calls == 0
    assert run.optimizer.ds_opt_adam is op, "the optimizer has its own op back"


@pytest.mark.parametrize("count", [1, 7, 400, 3000])
def test_a_resumed_group_has_the_bits_of_the_one_that_went_on(op: Op, count: int) -> None:
    run = Run(op, (count,))
    assert run.step() == product_corrections(count + 1)
    assert op.empty_calls == count
    assert run.step() == product_corrections(count + 2)
    assert op.empty_calls == count, "the second step finds the object where the first left it"


def test_the_bits_compared_here_differ_between_product_and_power(op: Op) -> None:
    """Otherwise the tests around this one could not see a hidden count that is left behind."""
    by_power = 1.0 / np.sqrt(np.float32(1) - np.float32(math.pow(float(np.float32(0.999)), 3001)))
    assert product_corrections(3001)[1] != float(np.float32(by_power))


@pytest.mark.parametrize("count", [SPENT, SPENT + 1, 1_000_000, 10**12])
def test_a_long_run_is_resumed_by_one_call(op: Op, count: int) -> None:
    run = Run(op, (count,))
    assert run.step() == (1.0, 1.0)
    assert op.empty_calls == 1
    assert run.step() == (1.0, 1.0)
    assert op.empty_calls == 1


def test_a_million_steps_have_the_bits_of_the_replay() -> None:
    """The product of a million multiplications, which the one call stands in for, gives the same corrections."""
    assert product_corrections(1_000_001) == (1.0, 1.0)
    assert product_corrections(SPENT + 1) == (1.0, 1.0)
    assert product_corrections(SPENT - 1500)[1] > 1.0


def test_one_product_that_still_counts_is_replayed(op: Op) -> None:
    """0.9 is spent after 172 steps, 0.999 is not; and the other way round."""
    for betas in ((0.9, 0.999), (0.999, 0.9)):
        before = op.empty_calls
        run = Run(op, (500,), betas)
        assert run.step() == product_corrections(501, betas)
        assert op.empty_calls - before == 500


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9999])
def test_spent_products_change_nothing_more(beta: float) -> None:
    fp32 = np.float32(beta)
    products = np.multiply.accumulate(np.full(300_000, fp32))
    first = next(count for count in range(1, 300_000) if host_adam.is_spent(beta, count))
    power = np.float32(math.pow(float(fp32), first))
    assert np.float32(1) - products[first - 1] == 1 == np.float32(1) - power
    assert (np.float32(1) - products[first - 1 :] == 1).all()
    assert not host_adam.is_spent(beta, first - 1)


def test_the_bound_itself_is_spent() -> None:
    assert host_adam.is_spent(0.5, 26)
    assert not host_adam.is_spent(0.5, 25)


def test_beta_is_taken_as_the_op_takes_it() -> None:
    """In fp32: there this one is 0.5, whose product is spent after 26 steps, and not only after 27."""
    assert host_adam.is_spent(0.5 + 2.0**-30, 26)


def test_a_count_of_zero_is_never_spent() -> None:
    assert not host_adam.is_spent(0.0, 0)
    assert not host_adam.is_spent(0.999999, 10**9), "its product leaves its power behind: too much rounding to say"


CYCLE = [(0.9, 0.999)] * 3 + [(0.85, 0.99), (0.8, 0.99), (0.8, 0.99), (0.9, 0.999)] + [(0.9, 0.999)] * 6


def cycled(run: Run, first: int, last: int) -> list[tuple[float, float]]:
    """Steps ``first`` to ``last`` of a run whose βs follow `CYCLE`."""
    got = []
    for betas in CYCLE[first:last]:
        run.optimizer.param_groups[0]["betas"] = betas
        got.append(run.step())
    return got


@pytest.mark.parametrize("stop", range(1, len(CYCLE)))
def test_betas_that_change_on_the_way_are_resumed_with_the_same_bits(op: Op, stop: int) -> None:
    """As a scheduler that cycles the momentum changes them: at each change the op takes powers anew."""
    whole = cycled(Run(op), 0, len(CYCLE))
    begun = Run(op)
    assert cycled(begun, 0, stop) == whole[:stop]
    resumed = Run(op, (stop,))
    resumed.adam.load_state_dict(begun.adam.state_dict())
    assert cycled(resumed, stop, len(CYCLE)) == whole[stop:]


def test_a_state_has_the_groups_that_were_updated(op: Op) -> None:
    run = Run(op, (0, 0))
    run.step(1)
    first, second = (float(np.float32(beta)) for beta in BETAS)
    assert run.adam.state_dict() == {1: [0, first, second]}
    run.optimizer.param_groups[0]["betas"] = (0.5, 0.5)
    run.step(1)
    assert run.adam.state_dict() == {1: [2, 0.5, 0.5]}


def test_a_loaded_state_replaces_what_an_engine_did_before(op: Op) -> None:
    run = Run(op)
    cycled(run, 0, 8)
    run.adam.load_state_dict({})
    run.optimizer.param_groups[0]["betas"] = BETAS
    run.optimizer.state[run.partitions[0]]["step"] = 8
    assert run.step() == product_corrections(9)


def test_each_group_has_an_object_of_its_own(op: Op) -> None:
    run = Run(op, (0, 5))
    assert run.step(1) == product_corrections(6)
    assert run.step(0) == product_corrections(1)
    assert run.step(1) == product_corrections(7)
    assert run.step(0) == product_corrections(2)
    assert op.empty_calls == 5
    assert len(op.objects) == 2


def test_a_group_that_is_set_back_starts_anew(op: Op) -> None:
    """A checkpoint of an earlier step, loaded into an engine that has gone on."""
    run = Run(op)
    for _ in range(9):
        run.step()
    run.optimizer.state[run.partitions[0]]["step"] = 4
    assert run.step() == product_corrections(5)
    assert op.empty_calls == 4
    assert len(op.objects) == 1


def test_a_group_that_is_set_forward_is_brought_on(op: Op) -> None:
    run = Run(op)
    for _ in range(3):
        run.step()
    run.optimizer.state[run.partitions[0]]["step"] = 10
    assert run.step() == product_corrections(11)
    assert op.empty_calls == 7


def test_a_step_that_fails_is_repeated_with_the_same_bits(op: Op) -> None:
    run = Run(op)
    run.step()
    partition = run.partitions[0]
    with pytest.raises(RuntimeError, match="stop"), run.adam.stepping((0,), (partition,), run.optimizer.param_groups):
        run.optimizer.step(partition)
        raise RuntimeError("stop")
    run.optimizer.state[partition]["step"] = 1
    assert run.step() == product_corrections(2)
    assert run.optimizer.ds_opt_adam is op


@pytest.mark.parametrize("adamw", [True, False])
def test_an_object_is_made_as_the_optimizer_says(op: Op, adamw: bool) -> None:
    run = Run(op, (2,))
    run.optimizer.adam_w_mode = adamw
    run.step()
    (made,) = op.objects.values()
    assert made.adamw is adamw
    assert made.betas == (np.float32(0.9), np.float32(0.999))
    assert set(op.settings) == {(0.1, 1e-8, 0.01, True)}


def test_objects_go_with_their_owner(op: Op) -> None:
    run = Run(op, (0, 0))
    run.step(0)
    run.step(1)
    assert len(op.objects) == 2
    identifiers = set(op.objects)
    other = Run(op)
    other.step()
    assert not identifiers & (set(op.objects) - identifiers)
    del run
    gc.collect()
    assert len(op.objects) == 1


def test_fused_adam_on_a_cpu_steps_on_the_objects_too(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """`FusedAdam` calls `multi_tensor_adam`, whose CPU form has one object for all."""

    class Fused(Optimizer):
        multi_tensor_adam: Any = None

        def step(self, partition: torch.Tensor) -> None:  # type: ignore[override]
            state = self.state[partition]
            state["step"] = state.get("step", 0) + 1
            lists = [[partition * 2], [partition], [partition * 3], [partition * 4]]  # gradient first
            self.multi_tensor_adam(2048, torch.zeros(1), lists, 0.1, *BETAS, 1e-8, state["step"], 1, 1, 0.01)

    monkeypatch.setattr(compat, "FusedAdam", Fused)
    partition = torch.ones(1)
    optimizer = Fused(op, [partition])
    optimizer.state[partition]["step"] = 300
    adam = host_adam.HostAdam(optimizer)
    with adam.stepping((0,), (partition,), optimizer.param_groups):
        optimizer.step(partition)
    assert op.corrections == [product_corrections(301)]
    assert op.tensors == [[1, 2, 3, 4]], "parameter, gradient, exp_avg, exp_avg_sq"
    assert set(op.settings) == {(0.1, 1e-8, 0.01, True)}
    assert optimizer.multi_tensor_adam is None
