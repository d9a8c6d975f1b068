"""Gradient checkpointing as a Trainer switches it on: an exploit step's backward ends at its lowest selected layer."""

from __future__ import annotations

from typing import Any

import pytest
from support import Case, build, run_steps, tiny_model

FIXED = {"policy": "fixed", "fixed_blocks": ["model.layers.2", "model.layers.3"]}


def layer_runs(stage: int, reentrant: bool) -> tuple[list[int], list[float]]:
    """How often each layer ran in two steps after the first, which goes through all with stage 3, and all losses.

    A layer that backward reaches is computed again.
    """
    case = Case(stage=stage, steps=3, section=FIXED)
    model: Any = tiny_model(case)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    counts = [0] * len(model.model.layers)

    def count(index: int) -> None:
        counts[index] += 1

    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, index=index: count(index))
    engine = build(case, model)
    engine.train()
    losses = run_steps(engine, case, last=1)["losses"]
    counts[:] = [0] * len(counts)
    losses += run_steps(engine, case, first=1)["losses"]
    engine.destroy()
    return counts, losses


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
def test_layers_below_the_lowest_selected_are_not_computed_again(workers, stage: int, reentrant: bool) -> None:
    [(counts, losses)] = workers(1).run(layer_runs, stage, reentrant)
    assert counts == [2, 2, 4, 4]
    [plain] = workers(1).run(losses_without_checkpointing, stage)
    assert losses == pytest.approx(plain, rel=1e-5)


def losses_without_checkpointing(stage: int) -> list[float]:
    case = Case(stage=stage, steps=3, section=FIXED)
    engine = build(case)
    losses: list[float] = run_steps(engine, case)["losses"]
    engine.destroy()
    return losses
