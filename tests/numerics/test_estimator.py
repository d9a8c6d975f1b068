"""The estimator against real engines: gradients, master weights, states and traffic agree to the byte."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import pytest
import torch
from support import ALL, MOSTLY_TWO, Case, build, case_id, ds_config, param_groups, run_steps, tiny_model
from workers import Workers

from ds_agsel.config import parse_section
from ds_agsel.estimate.memory import Memory, full_memory, selective_memory
from ds_agsel.estimate.setup import Setup, read_setup
from ds_agsel.estimate.shapes import ModelShape, shape_of
from ds_agsel.estimate.steps import Step, exact_step
from ds_agsel.estimate.table import estimate
from ds_agsel.estimate.traffic import selective_traffic

HAS_LOWBIT = importlib.util.find_spec("bitsandbytes") is not None
LEAN = {"master_weights": "split", "state_dtype": "int8" if HAS_LOWBIT else "bf16"}
SHORT = {"select_percent": 34, "steps_per_epoch": 3, "explore_decay": 1.0, "seed": 2}
MODULE = {**SHORT, "granularity": "module", "select_percent": 15}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
CASES = [
    *(Case(stage=stage, offload=offload, dtype=dtype, accumulation=accumulation, steps=4, section=SHORT)
      for stage, offload, dtype, accumulation in product((1, 2), ("none", "cpu"), ("fp32", "bf16"), (1, 2))
      if (dtype == "bf16") ^ (accumulation == 2) ^ (stage == 1)),
    *(Case(model="net", stage=stage, offload=offload, dtype=dtype, steps=4, section=SHORT)
      for stage, offload, dtype in product((1, 2), ("none", "cpu"), ("fp32", "bf16"))),
    *(Case(model="net", stage=3, offload=offload, dtype=dtype, accumulation=accumulation, steps=4, section=SHORT)
      for offload, dtype, accumulation in product(("none", "cpu"), ("fp32", "bf16"), (1, 2))
      if (dtype == "bf16") ^ (accumulation == 2)),
    Case(stage=3, offload="cpu", steps=4, section=SHORT, zero={"sub_group_size": 100}),
    Case(model="net", decay_groups=True, steps=4, section={**SHORT, "never_select": ["layers.1"]}),
    Case(model="net", dtype="bf16", steps=4, section=SHORT, zero={"parameter_alignment": True}),
    Case(model="net", offload="cpu", steps=4, section=SHORT, zero={"round_robin_gradients": True}),
    Case(dtype="bf16", accumulation=2, steps=4, section=SHORT, config=FP32_SUMS),
    Case(dtype="bf16", offload="cpu", accumulation=2, steps=4, section=SHORT, config=FP32_SUMS),
    Case(dtype="bf16", steps=4, section=SHORT, zero={"overlap_comm": True}),
    Case(dtype="bf16", steps=4, section=MODULE),
    Case(stage=1, offload="cpu", steps=4, section=MODULE),
    Case(stage=3, offload="cpu", dtype="bf16", steps=4, section=MODULE),
    Case(model="net", offload="cpu", dtype="bf16", steps=4, section={**SHORT, "on_reentry": "reset"}),
    Case(model="net", stage=3, dtype="bf16", steps=4, section={**SHORT, "state_dtype": "bf16"}),
    Case(offload="cpu", dtype="bf16", steps=4, section={**SHORT, "state_dtype": "bf16"}),
    Case(model="net", dtype="bf16", steps=4, section={**SHORT, "master_weights": "split"}),
    Case(stage=3, offload="cpu", dtype="bf16", steps=4, section={**SHORT, "master_weights": "split"}),
    *([Case(offload="cpu", dtype="bf16", steps=4, section={**SHORT, "state_dtype": "int8"})] * HAS_LOWBIT),
]  # fmt: skip
VISITING = [
    Case(steps=6, section={**SHORT, "step_device": "accelerator"}),
    Case(model="net", stage=1, dtype="bf16", accumulation=2, steps=6, section={**SHORT, "step_device": "accelerator"}),
    Case(dtype="bf16", steps=6, section={**SHORT, "step_device": "accelerator", **LEAN}),
    pytest.param(
        Case(
            stage=3,
            dtype="bf16",
            steps=6,
            section={
                **SHORT,
                **LEAN,
                "step_device": "accelerator",
                "keep_master": "accelerator",
                "on_reentry": "reset",
            },
        ),
        marks=pytest.mark.slow,
    ),
    Case(dtype="bf16", steps=6, section={**SHORT, "step_device": "accelerator", "keep_master": "accelerator"}),
    Case(model="net", stage=3, dtype="bf16", steps=6, section={**SHORT, "step_device": "accelerator"}),
    Case(dtype="bf16", steps=6, section={**SHORT, "step_device": "accelerator", "on_reentry": "reset"}),
    Case(steps=7, section={**SHORT, "step_device": "accelerator", "select_every": 3}),
    Case(
        model="net", stage=3, dtype="bf16", steps=7, section={**SHORT, "step_device": "accelerator", "select_every": 3}
    ),
]
IN_TURN = {  # the four layers, of equal size
    "policy": "cyclic", "select_percent": 25, "never_select": ["embedding", "final_norm"], "step_device": "accelerator",
}  # fmt: skip
SPARSE = {**SHORT, "sparse_grad": {"entries_percent": 5.0, "calibration_steps": 1, "refresh_steps": 3}}
WITH_MATRICES = [
    Case(dtype="bf16", steps=5, section=SPARSE),
    Case(stage=3, offload="cpu", dtype="bf16", steps=5, section=SPARSE),
    pytest.param(Case(stage=1, offload="cpu", accumulation=2, steps=5, section=SPARSE), marks=pytest.mark.slow),
]  # fmt: skip
PLAIN = [
    Case(model=model, stage=stage, offload=offload, dtype="bf16", steps=2, section=None)
    for model, stage, offload in product(("llama", "net"), (1, 2, 3), ("none", "cpu"))
]


def measure(case: Case) -> dict[str, Any]:
    """What this rank held and moved at each step of ``case``; plain DeepSpeed, in one group, without a section."""
    arguments = {}
    if case.section is None:
        model = tiny_model(case)
        arguments = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    engine = build(case, **arguments)
    result = run_steps(engine, case, observe=_held)
    if case.section is not None:
        result["history"] = [(record.step, record.phase, record.blocks) for record in engine.selection.history]
    engine.destroy()
    return result


def _held(event: str, engine: Any, step: int) -> dict[str, Any] | None:
    from ds_agsel.zero.stage12 import SelectiveZeroOptimizer
    from ds_agsel.zero.states.home import moment_bytes

    zero = engine.optimizer
    stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
    if event == "backward" and engine.is_gradient_accumulation_boundary():
        if hasattr(zero, "held_gradient_bytes"):
            on_accelerator, on_host = zero.held_gradient_bytes()
        elif stage3:
            flat = zero.grad_partitions_flat_buffer.nbytes
            fp32 = sum(p.grad.nbytes for p in zero.fp32_partitioned_groups_flat if p.grad is not None)
            on_accelerator, on_host = (0, flat + fp32) if zero.offload_optimizer else (flat, 0)
        else:  # called as a function, so that plain DeepSpeed's optimizer is measured in the same way
            on_accelerator, on_host = SelectiveZeroOptimizer.held_gradient_bytes(zero)
        return {"accelerator": on_accelerator, "host": on_host}
    if event == "step":
        masters = zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups
        seen = {
            "masters": zero.home.master_bytes() if is_split(zero) else sum(master.nbytes for master in masters),
            "states": zero.state_bytes() if hasattr(engine, "selection") else moment_bytes(zero),
        }
        if hasattr(engine, "selection"):
            seen["on accelerator"] = zero.accelerator_state_bytes()
            seen["resident"] = zero.resident_state_bytes()  # what the next step needs is on its way already
            seen["planned"] = engine.selection.planned_blocks
            seen["matrices"] = _held_of_matrices(zero.carriers)
            traffic = [asdict(entry) for entry in engine.selection.traffic[-1:]]  # none while entries are chosen
            seen |= {"counts": engine.selection.update_counts, "traffic": traffic[-1] if traffic else None}
        return seen
    return None


def _held_of_matrices(carriers: Any) -> dict[str, int] | None:
    """The bytes of `sparse_grad` beside its carriers: in host memory, and on the accelerator."""
    if carriers is None or carriers.is_calibrating:
        return None
    kept = [tensor for energy in carriers._energies.values() for tensor in energy.tensors()]
    for target in carriers._targets:
        kept.append(target.support.directions)
        kept += [target.support.layout.long_lines, target.support.layout.places]
    return {"host": sum(base.nbytes for base in carriers._bases.values()), "accelerator": sum(t.nbytes for t in kept)}


def is_split(zero: Any) -> bool:
    return hasattr(zero, "home") and zero.home.masters_are_split


def measured_steps(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was seen of each step, joined."""
    return [{**before, **after} for before, after in zip(run["observed"][::2], run["observed"][1::2], strict=True)]


def described(case: Case, ranks: int) -> tuple[ModelShape, Setup]:
    model = tiny_model(case)
    groups = param_groups(model, case)
    section = case.section or {}
    setup = read_setup(ds_config(case), ranks).but(
        **{field: section[field] for field in ("on_reentry", "state_dtype", "master_weights") if field in section}
    )
    sparse_grad = parse_section(section).sparse_grad
    return shape_of("tiny", model, None, groups, section.get("granularity", "block"), sparse_grad), setup


def active_blocks(case: Case, model: ModelShape) -> list[int]:
    """What some step may update."""
    never = set(case.section.get("never_select", ()))
    return [block.index for block in model.blocks if block.name not in never and block.is_eligible]


def after_giving_back(step: Step, setup: Setup, planned: Sequence[int] | None) -> Step:
    """``step`` with what is left of its moments when the next one has been planned: with "reset" its blocks alone."""
    if setup.on_reentry == "keep" or planned is None:
        return step
    return replace(step, selected=tuple(share * (block in planned) for block, share in enumerate(step.selected)))


def assert_as_measured(
    estimated: Memory, seen: Mapping[str, Any], offloaded: bool, of_matrices: int | None = None,
    left: Memory | None = None,
) -> None:  # fmt: skip
    """``left``: what there is when the next step has been planned, if it is not the same."""
    after = left or estimated
    home = after.host if offloaded else after.accelerator
    assert estimated.accelerator.gradients == seen["accelerator"]
    assert (estimated.host.gradients if offloaded else 0) == seen["host"]
    assert home.master_weights == seen["masters"]
    assert home.states == seen["states"]
    assert after.accelerator.states == seen.get("on accelerator", after.accelerator.states)
    if of_matrices is not None:
        assert estimated.host.weights == of_matrices


@pytest.fixture(scope="module")
def measured(workers: Callable[[int], Workers]) -> Callable[[Case, int], Sequence[Mapping[str, Any]]]:
    runs: dict[tuple[str, int], Sequence[Mapping[str, Any]]] = {}

    def run(case: Case, ranks: int) -> Sequence[Mapping[str, Any]]:
        key = (repr(case), ranks)
        if key not in runs:
            runs[key] = workers(ranks).run(measure, case)
        return runs[key]

    return run


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_memory_is_what_an_engine_holds(measured, case, ranks):
    model, setup = described(case, ranks)
    active = active_blocks(case, model)
    phases = set()
    for rank, run in enumerate(measured(case, ranks)):
        for (_, phase, selected), seen in zip(run["history"], measured_steps(run), strict=True):
            phases.add(phase)
            updated = [index for index, count in enumerate(seen["counts"]) if count]
            step = exact_step(phase, len(model.blocks), selected, active, updated, streaming=streams(case))
            stepping = "host" if case.offload == "cpu" else "resident"
            held = selective_memory(model, setup, stepping, step, rank)
            left = selective_memory(model, setup, stepping, after_giving_back(step, setup, seen["planned"]), rank)
            assert_as_measured(held, seen, case.offload == "cpu", left=left)
    assert phases == {"explore", "exploit"}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_traffic_is_what_an_engine_counts(measured, case, ranks):
    model, setup = described(case, ranks)
    active = active_blocks(case, model)
    for rank, run in enumerate(measured(case, ranks)):
        for (_, phase, selected), seen in zip(run["history"], measured_steps(run), strict=True):
            step = exact_step(phase, len(model.blocks), selected, active, active, streaming=streams(case))
            stepping = "host" if case.offload == "cpu" else "resident"
            moved = selective_traffic(model, setup, stepping, step, rank)
            counted = seen["traffic"]
            assert moved.gathered == counted["gathered_bytes"]
            assert moved.reduced == counted["reduced_bytes"]
            assert moved.h2d == counted["h2d_bytes"]
            if phase == "explore" and streams(case) and case.stage == 3:  # what was kept for a while went there too
                kept = replace(step, reduced=step.selected)
                assert selective_traffic(model, setup, stepping, kept, rank).d2h <= counted["d2h_bytes"] <= moved.d2h
            else:
                assert moved.d2h == counted["d2h_bytes"]


@pytest.mark.parametrize("ranks", MOSTLY_TWO)
@pytest.mark.parametrize("case", WITH_MATRICES, ids=case_id)
def test_with_sparse_grad_everything_is_of_the_entries_and_host_memory_has_the_matrices(measured, case, ranks):
    model, setup = described(case, ranks)
    assert model.numel == shape_of("tiny", tiny_model(case)).numel and len(model.sparse.matrices) == 12
    stepping, active = "host" if case.offload == "cpu" else "resident", range(len(model.blocks))
    for rank, run in enumerate(measured(case, ranks)):
        steps = measured_steps(run)[-len(run["history"]) :]  # those before are calibration
        assert len(steps) == case.steps - 1
        for (_, phase, selected), seen in zip(run["history"], steps, strict=True):
            updated = [index for index, count in enumerate(seen["counts"]) if count]
            step = exact_step(phase, len(model.blocks), selected, active, updated, streaming=streams(case))
            held = selective_memory(model, setup, stepping, step, rank)
            assert_as_measured(held, seen, case.offload == "cpu", of_matrices=seen["matrices"]["host"])
            assert seen["matrices"]["accelerator"] <= held.accelerator.staging
            moved = selective_traffic(model, setup, stepping, step, rank)
            assert (moved.gathered, moved.reduced) == tuple(
                seen["traffic"][f"{kind}_bytes"] for kind in ("gathered", "reduced")
            )
            assert moved.h2d == seen["traffic"]["h2d_bytes"]


def streams(case: Case) -> bool:
    return case.stage > 1 and case.accumulation == 1


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", VISITING, ids=case_id)
def test_what_visits_the_accelerator_is_what_an_engine_brings(measured, case, ranks):
    model, setup = described(case, ranks)
    blocks = range(len(model.blocks))
    setup = setup.but(keep_master=case.section.get("keep_master", "host"))
    for rank, run in enumerate(measured(case, ranks)):
        resident, before = (), set()
        for (_, phase, selected), seen in zip(run["history"], measured_steps(run), strict=True):
            updated = {index for index, count in enumerate(seen["counts"]) if count}
            step = exact_step(phase, len(blocks), selected, blocks, updated, resident, streams(case))
            held = selective_memory(model, setup, "accelerator", step, rank)
            there = exact_step(phase, len(blocks), seen["planned"] or selected, blocks, updated)
            visiting = selective_memory(model, setup, "accelerator", there, rank).accelerator
            assert held.accelerator.gradients == seen["accelerator"]
            left = selective_memory(model, setup, "accelerator", after_giving_back(step, setup, seen["planned"]), rank)
            assert left.host.states == seen["states"]
            assert held.host.master_weights == (seen["masters"] if setup.keep_master == "host" else 0)
            masters_there = visiting.master_weights if setup.keep_master == "host" else 0
            assert visiting.states + masters_there == seen["resident"]
            assert visiting.states == seen["on accelerator"]
            moved = selective_traffic(model, setup, "accelerator", step, rank)
            assert moved.d2h == seen["traffic"]["d2h_bytes"]
            if set(selected) - set(resident) <= before:  # a first visit brings no moments
                assert moved.h2d == seen["traffic"]["h2d_bytes"]
            resident, before = selected, updated


@pytest.mark.parametrize("ranks", MOSTLY_TWO)
@pytest.mark.parametrize("stage", [2, 3])
def test_of_rounds_states_travel_as_the_table_says(measured, stage, ranks):
    """Layers in turn never repeat, and uniform draws, which the table is of, do so with a chance of 1/4."""
    for length in (1, 2):
        case = Case(stage=stage, steps=8 * length, section={**IN_TURN, "select_every": length})
        model, setup = described(case, ranks)
        rows = estimate(model, setup, parse_section(case.section), (25,)).rows
        wanted = ("accelerator", "exploit", "expected")
        (expected,) = (row.traffic for row in rows if (row.stepping, row.phase, row.which) == wanted)
        for run in measured(case, ranks):
            traffic = [seen["traffic"] for seen in measured_steps(run)][4 * length :]  # after all first visits
            for counted, told in (("h2d_bytes", expected.h2d), ("d2h_bytes", expected.d2h)):
                assert sum(step[counted] for step in traffic) * 3 / 4 == len(traffic) * told > 0


@pytest.mark.parametrize("ranks", MOSTLY_TWO)
@pytest.mark.parametrize("case", PLAIN, ids=case_id)
def test_full_fine_tuning_is_what_plain_deepspeed_holds(measured, case, ranks):
    model, setup = described(case, ranks)
    for rank, run in enumerate(measured(case, ranks)):
        for seen in measured_steps(run):
            assert_as_measured(full_memory(model.user_groups, (), setup, rank), seen, case.offload == "cpu")


def test_every_block_selected_is_plain_deepspeeds_memory(measured):
    case = Case(model="net", steps=2, section=ALL)
    model, setup = described(case, 2)
    blocks = range(len(model.blocks))
    step = exact_step("exploit", len(model.blocks), blocks, blocks, blocks)
    for rank, run in enumerate(measured(case, 2)):
        ours = selective_memory(model, setup, "resident", step, rank)
        plain = full_memory(model.groups, (), setup, rank)
        assert_as_measured(ours, measured_steps(run)[-1], offloaded=False)
        assert ours.accelerator.gradients == plain.accelerator.gradients
        assert ours.accelerator.states == plain.accelerator.states
