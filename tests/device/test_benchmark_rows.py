"""On an accelerator the benchmark's rows move states where their name says so, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from simulator import simulated
from workers import Workers

STEPS = 4  # the first is on all blocks


def moved_bytes(row: str) -> list[float]:
    from launch.benchmarking.processes import DeepSpeedTrainer, Shape, Workload
    from launch.benchmarking.rows import section

    simulated(strict=False)
    shape = Shape(hidden_size=32, intermediate_size=64, layers=3, heads=4, kv_heads=2, vocab_size=128)
    workload = Workload(shape, micro_batch=2, sequence_length=16, precision="bf16", offload="none", seed=0)
    trainer = DeepSpeedTrainer(workload, section(row))
    traffic = [trainer.step(workload.tokens(step), None)["traffic"] for step in range(STEPS)]
    return [step["h2d_bytes"] + step["d2h_bytes"] for step in traffic]


@pytest.mark.parametrize(("row", "moves"), [("exploit-20", False), ("all", False), ("visit-20", True)])
def test_states_move_in_the_row_that_says_so(
    row: str, moves: bool, simulated_workers: Callable[[int], Workers]
) -> None:
    [moved] = simulated_workers(1).run(moved_bytes, row)
    assert any(moved[1:]) is moves, moved
