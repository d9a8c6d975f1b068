"""The simulated accelerator keeps the promises that tests on it rely on: late work, honoured waits, loud omissions.

Jobs run in a process of their own: a process is simulated or is not.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulator import Hazard, simulated
from support import Case, assert_identical, batch, tiny_model
from torch import Tensor
from workers import Workers

SEEDS = range(12)


def in_simulation(job: Callable[[], None]) -> Callable[..., None]:
    """Make a test of ``job``, which runs in the session's simulated process."""

    def test(simulated_workers: Callable[[int], Workers]) -> None:
        simulated_workers(1).run(job)

    job.__qualname__ += ".job"  # how the worker finds it
    test.job = job  # type: ignore[attr-defined]
    test.__name__ = job.__name__
    test.__doc__ = job.__doc__
    return test


# ---------------------------------------------------------------- copies run late


def pinned(values: Tensor) -> Tensor:
    return values.clone().pin_memory()


@in_simulation
def test_a_copy_to_pinned_memory_lands_when_waited_for():
    accelerator = simulated(seed=1)
    source = torch.arange(6.0).to(accelerator.device())
    target = pinned(torch.zeros(6))
    target.copy_(source, non_blocking=True)
    assert target.tolist() == [0] * 6
    assert accelerator.queue.pending() == 1
    torch.accelerator.synchronize()
    assert accelerator.queue.pending() == 0
    assert target.tolist() == list(range(6))


@in_simulation
def test_a_copy_from_pinned_memory_reads_when_it_runs():
    device = simulated(seed=1).device()
    source = pinned(torch.ones(6))
    target = source.to(device, non_blocking=True)
    source.fill_(7)
    assert target.tolist() == [7] * 6


@in_simulation
def test_pageable_memory_is_read_before_the_call_returns():
    device = simulated(seed=1).device()
    source = torch.ones(6)
    target = source.to(device, non_blocking=True)
    source.fill_(7)
    assert target.tolist() == [1] * 6


@in_simulation
def test_a_pinned_source_of_another_dtype_is_read_before_the_call_returns():
    device = simulated(seed=1).device()
    source = pinned(torch.ones(6))
    target = torch.empty(6, dtype=torch.bfloat16, device=device)
    target.copy_(source, non_blocking=True)
    source.fill_(7)
    assert target.tolist() == [1] * 6


@in_simulation
def test_copies_to_pageable_memory_and_blocking_copies_are_waited_for():
    device = simulated(seed=1).device()
    source = torch.arange(6.0).to(device)
    for target, non_blocking in [(torch.zeros(6), True), (pinned(torch.zeros(6)), False)]:
        target.copy_(source, non_blocking=non_blocking)
        assert target.tolist() == list(range(6))


@in_simulation
def test_host_and_device_tensors_do_not_mix():
    device = simulated().device()
    with pytest.raises(RuntimeError, match="on the same device"):
        torch.ones(3, device=device) + torch.ones(3)
    with pytest.raises(RuntimeError, match="on the same device"):
        torch.ones(3).add_(torch.ones(3, device=device))
    assert (torch.ones(3, device=device) + torch.tensor(1.0)).tolist() == [2, 2, 2]


@in_simulation
def test_a_device_pointer_is_no_host_pointer():
    tensor = torch.ones(3, device=simulated().device())
    assert tensor.data_ptr() >> 62 == 1
    assert tensor[1:].data_ptr() == tensor.data_ptr() + 4


# ------------------------------------------------------------------ waits


ELEMENTS = 8


def pipeline(accelerator: Any) -> list[list[float]]:
    """Three chunks come from pinned memory through one staging buffer, are doubled, and go back; the results."""
    device = accelerator.device()
    sources = [pinned(torch.full((ELEMENTS,), float(i + 1))) for i in range(3)]
    results = [pinned(torch.zeros(ELEMENTS)) for _ in range(3)]
    staging = torch.zeros(ELEMENTS, device=device)
    doubled = [torch.zeros(ELEMENTS, device=device) for _ in range(3)]
    accelerator.queue.finish()
    compute, coming, leaving = accelerator.current_stream(), accelerator.Stream(), accelerator.Stream()
    consumed = accelerator.Event()
    for source, result, double in zip(sources, results, doubled, strict=True):
        arrived, computed = accelerator.Event(), accelerator.Event()
        with accelerator.stream(coming):
            coming.wait_event(consumed)
            staging.copy_(source, non_blocking=True)
            arrived.record(coming)
        compute.wait_event(arrived)
        torch.mul(staging, 2, out=double)
        consumed.record(compute)
        computed.record(compute)
        with accelerator.stream(leaving):
            leaving.wait_event(computed)
            result.copy_(double, non_blocking=True)
    leaving.synchronize()
    seen = [result.tolist() for result in results]
    accelerator.queue.finish()
    return seen


RIGHT = [[2.0 * (i + 1)] * ELEMENTS for i in range(3)]


@in_simulation
def test_declared_waits_are_honoured_in_every_order():
    for seed in SEEDS:
        accelerator = simulated(seed=seed)
        assert pipeline(accelerator) == RIGHT
        assert accelerator.detector.found == []


@in_simulation
def test_each_wait_left_out_gives_wrong_numbers_and_a_hazard():
    accelerator = simulated()
    pipeline(accelerator)
    *device_waits, host_wait = sorted(accelerator.queue.declared_waits)
    assert len(device_waits) == 3
    for site in (*device_waits, host_wait):
        wrong = found = 0
        for seed in SEEDS:
            accelerator = simulated(seed=seed, strict=False, without=[site])
            wrong += pipeline(accelerator) != RIGHT
            found += bool(accelerator.detector.found)
        assert wrong > 0, site
        assert found == (0 if site == host_wait else len(SEEDS)), site  # what the host reads is not seen


@in_simulation
def test_a_hazard_names_both_sides_and_raises_where_strict():
    accelerator = simulated(strict=True)
    with accelerator.stream(accelerator.Stream()):
        tensor = torch.zeros(4, device=accelerator.device())
    with pytest.raises(Hazard, match=r"(?s)zero_.*writes bytes 0-16.*test_simulator.py.*mul.*reads bytes 4-8"):
        tensor[1] * 2
    accelerator.synchronize()


@in_simulation
def test_a_known_hazard_of_others_is_kept_apart():
    accelerator = simulated(strict=True, allowed=lambda report: report.later.site.function == "theirs")

    def theirs(tensor: Tensor) -> None:
        tensor.add_(1)

    with accelerator.stream(accelerator.Stream()):
        tensor = torch.zeros(4, device=accelerator.device())
    theirs(tensor)
    assert {report.later.site.function for report in accelerator.detector.tolerated} == {"theirs"}
    assert accelerator.detector.found == []


@in_simulation
def test_disjoint_parts_of_one_storage_are_no_hazard():
    accelerator = simulated(strict=True)
    tensor = torch.zeros(4, device=accelerator.device())
    side = accelerator.Stream()
    side.wait_stream(accelerator.current_stream())
    with accelerator.stream(side):
        tensor[:2].add_(1)
    tensor[2:].add_(2)
    accelerator.synchronize()
    assert tensor.tolist() == [1, 1, 2, 2]


@in_simulation
def test_an_event_says_yes_only_when_it_has_passed():
    answers = set()
    for seed in SEEDS:
        accelerator = simulated(seed=seed)
        event = accelerator.Event()
        assert event.query()  # never recorded
        target = pinned(torch.zeros(3))
        target.copy_(torch.ones(3, device=accelerator.device()), non_blocking=True)
        event.record()
        first = event.query()
        answers.add(first)
        while not first and not event.query():
            pass
        assert target.tolist() == [1, 1, 1]
    assert answers == {True, False}


# ----------------------------------------------------------------- memory


@in_simulation
def test_memory_is_counted_to_the_byte_and_the_budget_kept():
    accelerator = simulated()
    gc.collect()
    start = accelerator.memory_allocated()  # what earlier tests of this process still hold
    budget_bytes = start + 10_000
    simulated(budget_bytes=budget_bytes)
    first = torch.empty(1000, dtype=torch.bfloat16, device=accelerator.device())
    second = torch.empty(500, device=accelerator.device())
    assert accelerator.memory_allocated() - start == 4000
    del second
    assert accelerator.memory_allocated() - start == 2000
    assert accelerator.max_memory_allocated() - start == 4000
    accelerator.reset_peak_memory_stats()
    assert accelerator.max_memory_allocated() - start == 2000
    with pytest.raises(torch.OutOfMemoryError, match=rf"to allocate 9000 bytes, .* the budget of {budget_bytes} bytes"):
        torch.empty(9000, dtype=torch.uint8, device=accelerator.device())
    simulated(budget_bytes=start + 11_000)
    assert torch.empty(9000, dtype=torch.uint8, device=accelerator.device()).numel() == 9000
    del first


def free_too_early(seed: int, record: bool) -> tuple[list[float], int]:
    """A tensor is freed while a side stream still copies from it; what arrived, and the hazards."""
    accelerator = simulated(seed=seed, strict=False)
    target = pinned(torch.zeros(4))
    source = torch.ones(4, device=accelerator.device())
    side = accelerator.Stream()
    side.wait_stream(accelerator.current_stream())
    with accelerator.stream(side):
        target.copy_(source, non_blocking=True)
    if record:
        source.record_stream(side)
    del source
    torch.full((4,), 5.0, device=accelerator.device()).sum().item()
    accelerator.synchronize()
    return target.tolist(), len(accelerator.detector.found)


@in_simulation
def test_a_block_freed_under_a_side_stream_is_used_again_unless_recorded():
    assert all(free_too_early(seed, record=True) == ([1.0] * 4, 0) for seed in SEEDS)
    careless = [free_too_early(seed, record=False) for seed in SEEDS]
    assert any(values != [1.0] * 4 for values, _ in careless)
    assert all(hazards == 1 for _, hazards in careless)


@in_simulation
def test_recorded_memory_comes_back_under_pressure():
    accelerator = simulated()
    gc.collect()
    simulated(budget_bytes=accelerator.memory_allocated() + 5000)
    side = accelerator.Stream()
    tensor = torch.empty(4000, dtype=torch.uint8, device=accelerator.device())
    tensor.record_stream(side)
    del tensor
    assert accelerator.available_memory() == 1000
    assert torch.empty(4000, dtype=torch.uint8, device=accelerator.device()).numel() == 4000


@in_simulation
def test_pinned_memory_is_known_and_counted():
    accelerator = simulated()
    before = accelerator.pinned_bytes()
    tensor = accelerator.pin_memory(torch.zeros(10))
    assert tensor.is_pinned() and tensor[3:].is_pinned() and not torch.zeros(10).is_pinned()
    assert accelerator.pin_empty(5, dtype=torch.float32).is_pinned()
    assert accelerator.pinned_bytes() - before == 40
    del tensor
    assert accelerator.pinned_bytes() == before


# ---------------------------------------------------------------- kernels


@in_simulation
def test_random_numbers_do_not_depend_on_the_order_of_work():
    drawn = []
    for seed in SEEDS:
        accelerator = simulated(seed=seed)
        accelerator.manual_seed(3)
        first = torch.rand(4, device=accelerator.device())
        second = torch.nn.functional.dropout(torch.ones(64, device=accelerator.device()), 0.5)
        drawn.append((second.tolist(), first.tolist()))
    assert all(pair == drawn[0] for pair in drawn)


@in_simulation
def test_modules_move_as_to_a_cuda_device():
    device = simulated().device()
    model = tiny_model(Case(tied=True))
    before = list(model.parameters())
    model.to(device)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.device for p in model.parameters()} == {device}


@in_simulation
def test_backward_runs_on_the_stream_of_forward():
    accelerator = simulated(seed=4, strict=True)
    weight = torch.ones(3, device=accelerator.device(), requires_grad=True)
    seen = []
    weight.register_hook(lambda gradient: seen.append(accelerator.current_stream().stream_id))
    side = accelerator.Stream()
    side.wait_stream(accelerator.current_stream())
    with accelerator.stream(side):
        loss = (weight * 3).sum()
    loss.backward()
    assert seen == [side.stream_id]
    assert weight.grad.tolist() == [3, 3, 3]


def llama_gradients(device: Any) -> list[Any]:
    """Losses and summed gradients of two batches, on the host."""
    case = Case()
    model = tiny_model(case).to(device)
    losses = []
    for step in range(2):
        data = {name: tensor.to(device) for name, tensor in batch(case, step, 0, 0).items()}
        loss = model(**data).loss
        loss.backward()
        losses.append(loss.detach())
    return [tensor.cpu() for tensor in losses + [parameter.grad for parameter in model.parameters()]]


@in_simulation
def test_llama_has_the_hosts_bits_in_every_order():
    expected = llama_gradients("cpu")
    for seed in range(4):
        accelerator = simulated(seed=seed, strict=True)
        assert_identical(expected, llama_gradients(accelerator.device()))


# ------------------------------------------------------------------ ranks


def gather_and_sum(seed: int, wait: bool) -> tuple[list[float], list[float], int]:
    """An all-gather and an all-reduce between two ranks, the second asynchronous; the hazards if nobody waits."""
    import torch.distributed as dist

    accelerator = simulated(seed=seed, strict=False)
    accelerator.set_device(dist.get_rank())
    mine = torch.full((2,), dist.get_rank() + 1.0, device=accelerator.device())
    gathered = torch.empty(4, device=accelerator.device())
    dist.all_gather_into_tensor(gathered, mine)
    work = dist.all_reduce(mine, async_op=True)
    if wait:
        work.wait()
    seen = mine.tolist()
    accelerator.synchronize()
    return gathered.tolist(), seen, len(accelerator.detector.found)


def test_collectives_are_ordered_by_wait(simulated_workers: Callable[[int], Workers]) -> None:
    ranks = simulated_workers(2)
    for seed in range(6):
        assert ranks.run(gather_and_sum, seed, True) == [([1, 1, 2, 2], [3, 3], 0)] * 2
    careless = [ranks.run(gather_and_sum, seed, False) for seed in range(6)]
    assert any(seen != [3, 3] for answers in careless for _, seen, _ in answers)
    assert all(hazards > 0 for answers in careless for _, _, hazards in answers)
