"""The tests of the simulated accelerator on a real one: `make test-device`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from rehearsal import rehearse
from support import NARROW, SELECT, TOPK, VISIT, Case, assemble, assert_identical, case_id, relative_error, train
from workers import Workers

from ds_agsel.residency import Move
from ds_agsel.residency.states import MASTER, MOMENTS
from ds_agsel.residency.transfer import HostState, StateTransfer

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator other than the CPU"),
]

CASES = [
    Case(section={**SELECT, **VISIT}),
    Case(section={**SELECT, **NARROW}, decay_groups=True, clip=0.3),
    Case(section={**SELECT, **VISIT, "keep_master": "accelerator"}, accumulation=2),
    Case(section=TOPK, zero={"overlap_comm": True}),
    Case(offload="cpu", zero={"offload_optimizer": {"device": "cpu", "pin_memory": True}, "overlap_comm": True}),
    Case(stage=3, section={**SELECT, **VISIT}, zero={"stage3_param_persistence_threshold": 50, "sub_group_size": 300}),
    Case(stage=3, offload="cpu", zero={"offload_optimizer": {"device": "cpu", "pin_memory": True}}),
    Case(section={**SELECT, **VISIT, "state_budget_bytes": 10**6}),  # a cache with room for all
]
# fp32: the kernels are others than the host's, and add up in another order, 1e-6 of a gradient, through AdamW's
# division as in test_reference. In bf16 small gradients change their sign, and AdamW's step with it: there, bits are
# compared on the device alone.
TOLERANCE = 3e-3
ROOM_FOR_ALL = {"state_budget_bytes": 10**9}
VISITING = [
    Case(section={**SELECT, **NARROW}, dtype="bf16", decay_groups=True, clip=0.3),
    Case(section={**SELECT, **VISIT}),
    Case(stage=3, section={**SELECT, **VISIT}, dtype="bf16", clip=0.3, zero={"sub_group_size": 300}),
]
ALL = [
    Case(section={"policy": "all"}, dtype="bf16"),
    Case(section={"policy": "all"}, dtype="bf16", clip=0.3),
    Case(section={"policy": "all"}, stage=3, dtype="bf16", clip=0.3),
]


@pytest.fixture(scope="module")
def device_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    workers = Workers(1, tmp_path_factory.mktemp("device"), "cuda")
    yield workers
    workers.stop()


def rehearse_here(seeds: range) -> None:
    from deepspeed.accelerator import get_accelerator

    for seed in seeds:
        rehearse(get_accelerator(), seed)


def test_visiting_states_are_those_that_stay(device_workers: Workers) -> None:
    device_workers.run(rehearse_here, range(30))


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_training_follows_the_host(case: Case, device_workers: Workers, workers: Callable[[int], Workers]) -> None:
    follows(case, device_workers, workers(1))


def follows(case: Case, device: Workers, host: Workers) -> None:
    """``case`` selects on ``device`` what it does on ``host``, and its fp32 master weights are near those there.

    What the host does not select after the first step keeps its bits. Model weights are the masters, rounded.
    """
    (host_start, host_end), (start, end) = (
        [ranks.run(train, case.but(steps=1)), ranks.run(train, case)] for ranks in (host, device)
    )
    assert all(rank["history"] == host_end[0]["history"] for rank in end)
    expected, expected_start, masters, masters_start = (
        assemble(states)["masters"] for states in (host_end, host_start, end, start)
    )
    for name, master in expected.items():
        if torch.equal(master, expected_start[name]):
            assert torch.equal(masters[name], masters_start[name]), name
        else:
            assert relative_error(master, masters[name], expected_start[name]) <= TOLERANCE, name
        assert torch.equal(end[0]["weights"][name], masters[name].to(end[0]["weights"][name].dtype)), name


@pytest.mark.parametrize("case", VISITING, ids=case_id)
def test_states_that_visit_leave_the_bits_of_states_that_stay(case: Case, device_workers: Workers) -> None:
    staying = case.but(section={**(case.section or {}), **ROOM_FOR_ALL})
    [expected], [found] = (device_workers.run(train, run) for run in (staying, case))
    for what in ("history", "weights", "partitions"):
        assert_identical(expected[what], found[what])


@pytest.mark.parametrize("case", ALL, ids=case_id)
def test_all_blocks_are_plain_deepspeed_bit_for_bit(case: Case, device_workers: Workers) -> None:
    expected, found = (device_workers.run(train, run) for run in (case.but(section=None), case))
    for what in ("losses", "norms", "weights"):
        assert_identical(expected[0][what], found[0][what])
    assert_identical(assemble(expected)["masters"], assemble(found)["masters"])


@pytest.mark.parametrize("stage", [2, 3])
def test_an_overflow_of_fp16_is_skipped_and_counted_once(stage: int, device_workers: Workers) -> None:
    [run] = device_workers.run(train, Case(dtype="fp16", stage=stage, section={**SELECT, **VISIT}))
    assert run["skipped"] > 0 and len(run["history"]) == Case().steps - run["skipped"]
    assert sum(run["counts"]) == sum(len(blocks) for _, _, blocks in run["history"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[5]], ids=case_id)
def test_two_ranks_meet_over_nccl_and_follow_the_host(
    case: Case, workers: Callable[[int], Workers], tmp_path_factory: pytest.TempPathFactory
) -> None:
    ranks = Workers(2, tmp_path_factory.mktemp("nccl"), "cuda")
    try:
        follows(case, ranks, workers(2))
    finally:
        ranks.stop()


def weigh(case: str) -> dict[str, Any]:
    from launch.gpu_check import memory
    from launch.gpu_check.parts import CARD

    return memory.run(case, CARD)


def test_memory_is_what_the_estimate_says(device_workers: Workers) -> None:
    """Between steps: weights, and states within their budget; activations and gradients are gone."""
    [found] = device_workers.run(weigh, "qwen2.5-0.5b/exploit-20")
    assert 0 < found["states_on_accelerator_bytes"] < found["estimate"]["between_steps"]
    assert 0.95 <= found["allocated_bytes"] / found["estimate"]["between_steps"] <= 1.05


def seconds_of_a_step(overlapping: bool, repeats: int = 7) -> list[float]:
    """Products on the compute stream while a block's states arrive and another's leave; or one after the other."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    numel = 32 * 2**20
    states = [
        HostState(
            accelerator.pin_memory(torch.zeros(numel)),
            {key: accelerator.pin_memory(torch.zeros(numel)) for key in MOMENTS},
        )
        for _ in range(2)
    ]

    def new_moment(group: int, key: str) -> torch.Tensor:
        return accelerator.pin_memory(torch.empty(numel))

    groups = {0: [0], 1: [1]}
    transfer = StateTransfer(accelerator, states, groups, (MASTER, *MOMENTS), lambda *_: None, 24 * numel, new_moment)
    factor = torch.randn(4096, 4096, device=accelerator.current_device_name())
    transfer.carry_out([Move("arrive", 0)])
    seconds = []
    for repeat in range(repeats):
        here, next_block = repeat % 2, 1 - repeat % 2
        transfer.wait_for(here)
        transfer.updated(here)
        accelerator.synchronize()
        start = time.perf_counter()
        transfer.carry_out([Move("arrive", next_block), Move("leave", here)])
        if not overlapping:
            accelerator.synchronize()
        for _ in range(60):
            torch.mm(factor, factor)
        accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def test_transfers_that_overlap_are_no_slower_than_one_after_the_other(device_workers: Workers) -> None:
    [overlapping], [serial] = (device_workers.run(seconds_of_a_step, wanted) for wanted in (True, False))
    assert sorted(overlapping)[len(overlapping) // 2] <= 1.02 * sorted(serial)[len(serial) // 2], (overlapping, serial)
