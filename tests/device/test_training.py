"""ZeRO-1, 2 and 3, stock and restricted, train on the simulated accelerator as on the host, with every wait declared.

The kernels are the host's, so that the bits must be the host's too, whatever order the seed gives to what is queued.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
from simulator import Site, simulated
from support import (
    BETAS,
    EPS,
    FIRST,
    LEARNING_RATE,
    NARROW,
    SELECT,
    TOPK,
    VISIT,
    WEIGHT_DECAY,
    Case,
    assemble,
    assert_identical,
    build,
    case_id,
    differences,
    finish,
    observe_state,
    run_steps,
    train,
)
from workers import Workers

# Without DeepSpeed's CUDA kernels, AdamW on the device is torch's; with offload it is DeepSpeed's on the host.
PARAMS = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
# The throughput timer synchronizes the device at every step, which would hide a missing wait.
UNTIMED = {"timers": {"throughput": {"enabled": False}}}
GATHERING = {"stage3_param_persistence_threshold": 50, "sub_group_size": 300}
TORCH_ADAM = {"optimizer": {"type": "AdamW", "params": {**PARAMS, "torch_adam": True}}}
LEAN = {"master_weights": "split"}  # bf16 moments need random numbers of the device, int8 ones a library's kernels
PINNED = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
ON_DEVICE = Case(config={**UNTIMED, **TORCH_ADAM}, steps=6)
ON_HOST = Case(config=UNTIMED, offload="cpu", zero=PINNED, steps=6)

CASES = [
    ON_DEVICE.but(section=None, zero={"overlap_comm": True}),
    ON_HOST.but(section=None, zero={**PINNED, "overlap_comm": True}),
    ON_DEVICE.but(stage=1, accumulation=2),
    ON_DEVICE.but(dtype="bf16", accumulation=2, clip=0.5, zero={"overlap_comm": True}),
    ON_DEVICE.but(zero={"overlap_comm": False}, model="net", tied=False),
    ON_HOST.but(zero={**PINNED, "overlap_comm": True}),
    ON_HOST.but(dtype="bf16", accumulation=2, clip=0.5, zero={**PINNED, "overlap_comm": True}),
    ON_HOST.but(stage=1, accumulation=2),
    ON_HOST.but(zero={}, dtype="bf16"),
    # Without offload the states visit, here and by default where the accelerator has memory of its own.
    ON_DEVICE.but(section={**SELECT, **NARROW}, dtype="bf16", decay_groups=True, clip=0.5),
    ON_DEVICE.but(section={**SELECT, **VISIT, "keep_master": "accelerator"}, model="net"),
    # Moments that leave are freed where they are, also while a copy of them to the host is under way.
    ON_DEVICE.but(section={**SELECT, **NARROW, "on_reentry": "reset"}, clip=0.5, steps=4),
    # Lean states, which are packed and put together there.
    ON_DEVICE.but(section={**SELECT, **NARROW, **LEAN}, dtype="bf16", clip=0.5, steps=4),
    # Streamed explore steps, on the reduction stream and off it.
    ON_DEVICE.but(section=TOPK, zero={"overlap_comm": True}, steps=3),
    ON_DEVICE.but(section={**FIRST, **VISIT}, accumulation=3),
    ON_HOST.but(section=TOPK, dtype="bf16", zero={**PINNED, "overlap_comm": True}, steps=3),
    ON_DEVICE.but(stage=3, section={**SELECT, **VISIT}, dtype="bf16", clip=0.5, zero={"overlap_comm": True}, steps=4),
    ON_DEVICE.but(stage=3, section={**FIRST, **VISIT, "keep_master": "accelerator"}, accumulation=2, model="net"),
]
SLOW_CASES = [
    ON_DEVICE.but(stage=3, section={**SELECT, **VISIT, **LEAN, "on_reentry": "reset"}, dtype="bf16", steps=4),
    ON_DEVICE.but(section={**SELECT, **VISIT, **LEAN, "keep_master": "accelerator"}, dtype="bf16", steps=4),
    ON_DEVICE.but(stage=3, section={**SELECT, **VISIT, "on_reentry": "reset"}, accumulation=2),
    ON_DEVICE.but(section={**SELECT, **VISIT, "on_reentry": "decay"}, dtype="bf16"),
    # GATHERING: most parameters are gathered anew in each forward and backward
    ON_DEVICE.but(stage=3, section=None, zero={"overlap_comm": True, **GATHERING}, steps=3),
    ON_DEVICE.but(stage=3, section={**SELECT, **NARROW}, decay_groups=True, accumulation=2, zero=GATHERING),
    ON_HOST.but(stage=3, section=TOPK, dtype="bf16", zero={**PINNED, "overlap_comm": True}, steps=3),
]
# Clipped at a number whose reciprocal is rounded.
PLAIN = [
    ON_DEVICE.but(section=None, clip=0.3),
    ON_DEVICE.but(section=None, clip=0.3, dtype="bf16", steps=12),
    ON_DEVICE.but(section=None, clip=0.3, stage=3),
    ON_HOST.but(section=None, clip=0.3),
    ON_HOST.but(section=None, clip=0.3, stage=3),
]


def train_simulated(
    case: Case, seed: int, without: Collection[Site] = ()
) -> tuple[dict[str, Any], list[str], set[Site]]:
    """`support.train` on the simulated accelerator, the hazards met, and the lines that declare waits."""
    accelerator = simulated(seed=seed, strict=False, without=without)
    try:
        result = train(case, observer(case))
    finally:
        accelerator.queue.finish()  # before the next job meets the other rank
    return result, [str(report) for report in accelerator.detector.found], accelerator.queue.declared_waits


@pytest.fixture(scope="module")
def on_host(workers: Callable[[int], Workers]) -> Callable[[Case, int], list[dict[str, Any]]]:
    """``on_host(case, n)``: the same run on the CPU accelerator; made once."""
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}

    def run(case: Case, world_size: int) -> list[dict[str, Any]]:
        key = (repr(case), world_size)
        if key not in runs:
            runs[key] = workers(world_size).run(train, case, observer(case))
        return runs[key]

    return run


def observer(case: Case) -> Callable[[str, Any, int], Any] | None:
    return observe_state if case.section is not None else None


def check(case: Case, expected: list[dict[str, Any]], ranks: Workers, seed: int) -> None:
    """``case`` on ``ranks`` leaves ``expected`` behind, bit for bit, and meets no hazard."""
    for host, (device, hazards, _) in zip(expected, ranks.run(train_simulated, case, seed), strict=True):
        assert not hazards, f"{len(hazards)} hazards, the first:\n{hazards[0]}"
        assert_identical(host, device)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_training_has_the_hosts_bits(
    case: Case, world_size: int, on_host: Any, simulated_workers: Callable[[int], Workers]
) -> None:
    check(case, on_host(case, world_size), simulated_workers(world_size), seed=world_size)


def test_fp16_with_an_overflow_takes_the_same_steps_in_every_order(
    simulated_workers: Callable[[int], Workers],
) -> None:
    """DeepSpeed refuses fp16 on a host without fp16 matrix instructions; the accelerator has it."""
    case = ON_HOST.but(dtype="fp16")
    ((first, hazards, _),) = simulated_workers(1).run(train_simulated, case, 0)
    assert first["skipped"] == 1 and len(first["history"]) == case.steps - 1
    assert not hazards
    check(case, [first], simulated_workers(1), seed=1)


def stop_and_resume(case: Case, seed: int, folder: str) -> tuple[dict[str, Any], list[str]]:
    """``case`` saved at its middle and gone on with by another engine, and the hazards met."""
    accelerator = simulated(seed=seed, strict=False)
    engine = build(case)
    run_steps(engine, case, last=case.steps // 2)
    engine.save_checkpoint(folder)
    engine.destroy()
    engine = build(case)
    engine.load_checkpoint(folder)
    result = finish(engine, run_steps(engine, case, first=case.steps // 2))
    accelerator.queue.finish()
    return result, [str(report) for report in accelerator.detector.found]


@pytest.mark.parametrize(
    "case",
    [
        ON_HOST.but(dtype="bf16", zero={**PINNED, "overlap_comm": True}),
        ON_DEVICE.but(section={**SELECT, **VISIT}),  # the next step's states are on their way when it saves
        ON_DEVICE.but(section={**SELECT, **NARROW}, dtype="bf16"),
        ON_DEVICE.but(stage=3, section={**SELECT, **VISIT}),
    ],
    ids=case_id,
)
def test_resume_equals_not_having_stopped(
    case: Case, simulated_workers: Callable[[int], Workers], tmp_path: Path
) -> None:
    ((whole, _, _),) = simulated_workers(1).run(train_simulated, case, 0)
    ((resumed, hazards),) = simulated_workers(1).run(stop_and_resume, case, 1, str(tmp_path))
    assert not hazards
    for key in ("weights", "partitions", "counts", "plan"):
        assert_identical(whole[key], resumed[key])


@pytest.mark.parametrize("case", CASES[:2], ids=case_id)
def test_waits_left_out_of_deepspeed_are_noticed(case: Case, simulated_workers: Callable[[int], Workers]) -> None:
    """With overlap_comm gradients are averaged, and copied to the host, on a side stream (stage_1_and_2.py:1586)."""
    case = case.but(steps=2)
    ((expected, _, sites),) = simulated_workers(1).run(train_simulated, case, 0)
    waits = [site for site in sites if os.path.join("deepspeed", "runtime") in site.file]
    assert "average_tensor" in {site.function for site in waits}
    for seed in range(2):
        ((result, hazards, _),) = simulated_workers(1).run(train_simulated, case, seed, waits)
        assert hazards
        assert differences(expected["weights"], result["weights"])


def test_waits_left_out_of_zero3_are_noticed(simulated_workers: Callable[[int], Workers]) -> None:
    """Ours before a gradient goes to its partition, and before a streamed block is scored."""
    case = ON_DEVICE.but(stage=3, section={**TOPK, **VISIT}, zero={"overlap_comm": True}, steps=2)
    ((_, hazards, sites),) = simulated_workers(1).run(train_simulated, case, 0)
    assert not hazards
    for function in ("_take_gradient", "_streamed_scores"):
        waits = [site for site in sites if site.function == function]
        ((_, hazards, _),) = simulated_workers(1).run(train_simulated, case, 0, waits)
        assert waits and hazards, function


def events_of_backward(case: Case) -> int:
    """How many buckets of gradients backward may be ahead by, as plain DeepSpeed bounds it."""
    accelerator = simulated(seed=0, strict=False)
    engine = build(case)
    run_steps(engine, case)
    left = len(engine.optimizer.param_reduce_events)
    engine.destroy()
    accelerator.queue.finish()
    return left


def test_backward_of_one_rank_is_not_far_ahead_of_its_copies(simulated_workers: Callable[[int], Workers]) -> None:
    case = ON_DEVICE.but(stage=3, section={**SELECT, **VISIT}, accumulation=3, steps=3)
    [left] = simulated_workers(1).run(events_of_backward, case)
    assert 1 <= left <= 3


@pytest.mark.parametrize(
    "case, function",
    [
        (ON_DEVICE.but(zero={"overlap_comm": True}), "_waiting_for_reductions_alone"),
        (ON_DEVICE.but(section=TOPK), "get"),
        (ON_HOST.but(zero={**PINNED, "overlap_comm": True}), "_copying"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_waits_left_out_of_norms_and_copies_are_noticed(
    case: Case, function: str, simulated_workers: Callable[[int], Workers]
) -> None:
    ranks = simulated_workers(2 if function == "_waiting_for_reductions_alone" else 1)
    waits: list[Site] = []
    for seed in range(8):  # in some orders of the device's work an event has come before the host asks for it
        ((expected, hazards, sites), *_) = ranks.run(train_simulated, case.but(steps=3), seed)
        assert not hazards
        waits = [site for site in sites if site.function == function]
        if waits:
            break
    runs = [ranks.run(train_simulated, case.but(steps=3), seed, waits)[0] for seed in range(4)]
    assert waits
    assert any(hazards or differences(expected["weights"], result["weights"]) for result, hazards, _ in runs)


# ZeRO-3's own synchronization (partition_parameters.py:2128) stands in for the wait before states leave.
@pytest.mark.parametrize(("stage", "functions"), [(2, ("wait_for", "_copy_to_host")), (3, ("wait_for",))])
def test_waits_left_out_of_visiting_states_are_noticed(
    stage: int, functions: tuple[str, ...], simulated_workers: Callable[[int], Workers]
) -> None:
    case = ON_DEVICE.but(stage=stage, section={**SELECT, **VISIT}, steps=4)
    ((_, hazards, sites),) = simulated_workers(1).run(train_simulated, case, 0)
    assert not hazards
    for function in functions:
        waits = [site for site in sites if site.function == function]
        ((_, hazards, _),) = simulated_workers(1).run(train_simulated, case, 0, waits)
        assert waits and hazards, function


def train_dividing_as_cuda(case: Case) -> dict[str, Any]:
    accelerator = simulated(divides_as_cuda=True)
    try:
        return train(case)
    finally:
        accelerator.queue.finish()


@pytest.mark.parametrize("case", PLAIN, ids=case_id)
def test_all_blocks_are_plain_deepspeed_bit_for_bit(case: Case, simulated_workers: Callable[[int], Workers]) -> None:
    """Where arithmetic runs matters to a bit: see [Note: Division] in tests/simulator/operators.py."""
    expected, found = (
        simulated_workers(1).run(train_dividing_as_cuda, run) for run in (case, case.but(section={"policy": "all"}))
    )
    for what in ("losses", "norms", "weights"):
        assert_identical(expected[0][what], found[0][what])
    assert_identical(assemble(expected)["masters"], assemble(found)["masters"])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", [*CASES, *SLOW_CASES], ids=case_id)
def test_training_has_the_hosts_bits_in_many_orders(
    case: Case, world_size: int, on_host: Any, simulated_workers: Callable[[int], Workers]
) -> None:
    for seed in range(10, 22):
        check(case, on_host(case, world_size), simulated_workers(world_size), seed)
