"""The simulated accelerator counts what is asked of a device, and has devices of its own for several ranks."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from simulator import simulated
from test_simulator import in_simulation, pinned
from workers import WorkerError, Workers

# ----------------------------------------------------------------- counts


@in_simulation
def test_operations_and_host_waits_are_counted_by_the_line_that_asks():
    accelerator = simulated(strict=False)
    on_host, numbers = pinned(torch.zeros(4)), torch.ones(4, device=accelerator.device())
    with accelerator.counting() as quiet:
        numbers.mul_(2).add_(1)
        on_host.copy_(numbers, non_blocking=True)
        event = accelerator.Event()
        event.record()
    assert quiet.operations_by_name() == {"aten.mul.out": 1, "aten.add.out": 1, "copy D2H": 1}
    assert quiet.num_waits == 0
    with accelerator.counting() as loud:
        numbers.sum().item()
        torch.zeros(4).copy_(numbers, non_blocking=True)  # into pageable memory
        numbers.copy_(torch.zeros(4))
        event.synchronize()
        accelerator.current_stream().synchronize()
        torch.accelerator.synchronize()
        numbers.nonzero()
    assert loud.waits_by_name() == {
        "aten._local_scalar_dense.default": 1, "copy D2H": 1, "copy H2D": 1, "synchronize event": 1,
        "synchronize stream": 1, "synchronize": 1, "aten.nonzero.default": 1,
    }  # fmt: skip
    assert loud.waits_at("test_simulated_counts.py") == loud.waits


@in_simulation
def test_page_locked_memory_is_counted_as_torch_takes_it():
    accelerator = simulated()
    gc.collect()
    taken, size = accelerator.pinned_taken_bytes(), 3 << 20  # a size that no other test asks for
    with accelerator.counting() as first:
        kept, freed = (torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    assert (first.pinned_allocations, accelerator.pinned_taken_bytes() - taken) == (2, 2 * (4 << 20))
    del freed
    with accelerator.counting() as second:
        again = torch.empty(size + 1, dtype=torch.uint8, pin_memory=True)
    assert (second.pinned_allocations, accelerator.pinned_taken_bytes() - taken) == (0, 2 * (4 << 20))
    del again
    accelerator.empty_pinned_cache()
    gone = accelerator.pinned_taken_bytes()
    del kept
    accelerator.empty_pinned_cache()
    assert gone - accelerator.pinned_taken_bytes() == 4 << 20


# ---------------------------------------------------------------- devices


@in_simulation
def test_devices_have_indices_streams_and_an_order_of_first_uses():
    accelerator = simulated()
    assert accelerator.current_device_name() == "sim:0" and accelerator.device_count() == 4
    accelerator.set_device(2)
    here, there = torch.ones(2, device="sim"), torch.ones(2, device="sim:1")
    assert (str(here.device), str((here * 2).device), str((there + 1).device)) == ("sim:2", "sim:2", "sim:1")
    assert torch.zeros_like(there).device.index == torch.arange(3, device="sim:1").device.index == 1
    assert accelerator.current_stream() == accelerator.default_stream()
    assert accelerator.current_stream().device_index == accelerator.Stream().device_index == 2
    assert accelerator.order() == [("set_device", 2), ("tensor", 2), ("tensor", 1)]
    with pytest.raises(RuntimeError, match="two devices, sim:2 and sim:1"):
        here + there
    with pytest.raises(RuntimeError, match="no device 7"):
        accelerator.set_device(7)
    weight = torch.ones(3, device="sim", requires_grad=True)
    (weight * 3).sum().backward()
    assert weight.grad.tolist() == [3, 3, 3] and weight.grad.device == weight.device
    simulated()
    assert accelerator.current_device() == 0 and accelerator.order() == []


def meet(devices: list[int]) -> None:
    import torch.distributed as dist

    accelerator = simulated()
    accelerator.set_device(devices[dist.get_rank()])
    group = dist.new_group(backend="simccl")
    dist.all_reduce(torch.ones(2, device="sim"), group=group)
    accelerator.synchronize()


def test_ranks_on_one_device_are_refused_as_by_nccl(simulated_workers: Callable[[int], Workers]) -> None:
    simulated_workers(2).run(meet, [0, 1])
    with pytest.raises(WorkerError, match=r"Duplicate GPU detected: ranks \[0, 1\] of a group are all on sim:1"):
        simulated_workers(2).run(meet, [1, 1])
