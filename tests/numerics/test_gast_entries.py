"""Rows chosen for matrices of which some entries are trained: gradients of the carriers, all rows as without gast."""

from __future__ import annotations

from typing import Any

import pytest
import reference_gast as twin
import torch
from support import BATCH, Case, assert_identical, batch, build, case_id, run_steps, tiny_model, train_all, weights
from torch import Tensor
from torch.func import functional_call

from ds_agsel.gast_section import GastConfig
from ds_agsel.samples.choice import DrawKey, take
from ds_agsel.sparse.targets import is_carrier

CALIBRATION, ROWS = 2, 2 * BATCH
SPARSE = {"entries_percent": 20.0, "calibration_steps": CALIBRATION, "refresh_steps": 3}
EVERY = {"policy": "all", "seed": 7, "sparse_grad": SPARSE}


@pytest.mark.parametrize(
    "case",
    [
        Case(stage=2, offload="cpu", accumulation=2, steps=7, section=EVERY),
        Case(stage=3, dtype="bf16", steps=7, section=EVERY),
    ],
    ids=case_id,
)
def test_all_rows_taken_is_training_without_gast(workers: Any, case: Case) -> None:
    every_row = {"gast": {"select_samples": BATCH}}
    cases = [case.but(section={**(case.section or {}), **more}) for more in ({}, every_row)]
    for plain, gast in workers(2).run(train_all, cases):
        assert_identical(plain, gast)


def masked(case: Case, checkpointing: str | None) -> dict[str, Any]:
    """The carriers' gradients in the first step that updates, and the twin's from row-by-row gradients."""
    from deepspeed.utils import safe_get_full_grad

    model: Any = tiny_model(case)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    engine = build(case, model)
    engine.train()
    run_steps(engine, case, last=CALIBRATION)
    before, carriers = weights(engine), engine.optimizer.carriers
    parts = [batch(case, CALIBRATION, part, torch.distributed.get_rank()) for part in range(2)]  # else scores are equal
    data = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    engine.backward(engine(**data).loss)
    found = {target.name: safe_get_full_grad(target.carrier) for target in carriers._targets}
    blocks = {block.index: list(block.parameter_names) for block in engine.selection.blocks}
    expected = by_rows(case, before, carriers, blocks, data)
    engine.step()
    history = [step.as_json() for step in engine.selection.samples.history]
    engine.destroy()
    return {"found": found, "expected": expected, "history": history}


def by_rows(
    case: Case, weights: dict[str, Tensor], carriers: Any, blocks: dict[int, list[str]], data: dict[str, Tensor]
) -> dict[str, Tensor]:
    model = tiny_model(case)
    fixed = {name: tensor for name, tensor in weights.items() if not is_carrier(name)}
    targets = {target.name: target for target in carriers._targets}
    of_values = {name: twin.what_entries_add(target) for name, target in targets.items()}
    trained = {name: torch.zeros(target.entries, requires_grad=True) for name, target in targets.items()}
    for names in blocks.values():
        for name in twin.gated_names(model, [n for n in names if "layers" in n]):
            trained[name] = fixed[name].clone().requires_grad_()
    block_of = {name: block for block, names in blocks.items() for name in names}
    block_of |= {name: carriers._block_of[name] for name in targets}

    def loss(row: int) -> Tensor:
        moved = {
            name: fixed[name] + torch.tensordot(value, of_values[name], 1) if name in targets else value
            for name, value in trained.items()
        }
        of_row = {key: value[row : row + 1] for key, value in data.items()}
        return functional_call(model, {**fixed, **moved}, kwargs=of_row, tie_weights=True).loss / ROWS

    rows = [dict(zip(trained, torch.autograd.grad(loss(row), list(trained.values())))) for row in range(ROWS)]
    config, rank = GastConfig(**(case.section or {})["gast"]), torch.distributed.get_rank()
    expected = {}
    for block in sorted(set(carriers._block_of.values())):
        names = [name for name in trained if block_of[name] == block]
        taken = take(config, ROWS, DrawKey(7, 0, 0, rank, block), twin.alignment(rows, names), torch.device("cpu"))
        assert taken is not None
        for name in set(names) & set(targets):
            expected[name] = sum(rows[row][name] for row in taken.tolist()) * ROWS / len(taken)
    for gradient in expected.values():
        torch.distributed.all_reduce(gradient)
        gradient /= torch.distributed.get_world_size()
    return expected


@pytest.mark.parametrize(
    ("stage", "checkpointing"), [(2, "reentrant"), (3, None), pytest.param(3, "non-reentrant", marks=pytest.mark.slow)]
)
def test_a_carriers_gradient_is_the_mean_of_each_ranks_masked_ones(
    workers: Any, stage: int, checkpointing: str | None
) -> None:
    case = Case(stage=stage, zero={"stage3_param_persistence_threshold": 0}, section={**EVERY, "gast": {}})
    for run in workers(2).run(masked, case, checkpointing):
        assert run["found"].keys() == run["expected"].keys() and len(run["found"]) == 12
        for name, gradient in run["expected"].items():
            torch.testing.assert_close(run["found"][name], gradient, rtol=1e-3, atol=1e-6)
        (step,) = run["history"]
        assert sorted(step["taken"]) == ["1", "2", "3", "4"], "no rows are chosen while nothing is trained"
