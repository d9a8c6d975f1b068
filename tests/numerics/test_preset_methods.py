"""The presets LISA and BAdam train as a few lines of plain PyTorch do, which know nothing of this package.

MISA and GRASS, whose choices have few-line versions in test_scoring_policies, train as the reference does.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from reference_runs import assert_follows_reference
from support import (
    BETAS,
    EPS,
    LEARNING_RATE,
    MOSTLY_TWO,
    WEIGHT_DECAY,
    Case,
    batch,
    case_id,
    is_matrix,
    relative_error,
    tiny_model,
)
from test_reentry import steps_missed
from test_reference import FP32
from torch import Tensor, nn

LAYERS = 4
HOLD, STEPS = 3, 14  # every layer is left, and comes back


def layer_of(name: str) -> int | None:
    """The layer that a parameter of the tiny Llama belongs to; None outside the layers."""
    return int(name.split("layers.")[1].split(".")[0]) if "layers." in name else None


def adamw(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)


def lisa(model: nn.Module, seed: int, layers_at_once: int) -> Callable[[int], torch.optim.Optimizer]:
    """Embedding and final norm always, some layers drawn anew each round; every layer keeps its moments and step."""
    optimizer = adamw(list(model.parameters()))

    def before(step: int) -> torch.optim.Optimizer:
        if step % HOLD == 0:
            random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, step])))
            drawn = np.argsort(random.standard_exponential(LAYERS))[:layers_at_once]
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(layer_of(name) is None or layer_of(name) in drawn)
                parameter.grad = None
        return optimizer

    return before


def badam(model: nn.Module) -> Callable[[int], torch.optim.Optimizer]:
    """One layer after the other, each time with a new optimizer; nothing else is trained."""
    optimizers: list[torch.optim.Optimizer] = []

    def before(step: int) -> torch.optim.Optimizer:
        if step % HOLD == 0:
            layer = step // HOLD % LAYERS
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(layer_of(name) == layer)
                parameter.grad = None
            optimizers.append(adamw([parameter for parameter in model.parameters() if parameter.requires_grad]))
        return optimizers[-1]

    return before


def plain(case: Case, ranks: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights before and after."""
    model = tiny_model(case)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    is_lisa = case.section["preset"] == "lisa"
    before = lisa(model, case.section["seed"], 2) if is_lisa else badam(model)
    for step in range(case.steps):
        optimizer = before(step)
        optimizer.zero_grad()
        for rank in range(ranks):
            (model(**batch(case, step, 0, rank)).loss / ranks).backward()
        optimizer.step()
    return start, {name: parameter.detach() for name, parameter in model.named_parameters()}


LISA = {"preset": "lisa", "select_percent": 50, "select_every": HOLD, "seed": 11}
BADAM = {"preset": "badam", "select_every": HOLD}
CASES = [
    pytest.param(
        Case(section=section, stage=stage, offload=offload, steps=STEPS),
        marks=[] if (section, stage, offload) in ((LISA, 2, "cpu"), (BADAM, 3, "none")) else pytest.mark.slow,
    )
    for section, stage, offload in product((LISA, BADAM), (1, 2, 3), ("none", "cpu"))
]


@pytest.mark.parametrize("ranks", MOSTLY_TWO)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_preset_trains_as_its_few_lines_of_plain_pytorch(trained, case, ranks):
    start, expected = plain(case, ranks)
    for run in trained(case, ranks):
        for name, weight in expected.items():
            assert relative_error(weight, run["weights"][name], start[name]) <= FP32["masters"], name
            is_trained = case.section["preset"] == "lisa" or layer_of(name) is not None
            assert torch.equal(run["weights"][name], start[name]) is not is_trained, name


# Some fourteen of 28 matrices, and two of four layers: every unit once, or probed, and rounds that are drawn by scores.
MISA = {"preset": "misa", "select_percent": 50, "select_every": 2}
GRASS = {"preset": "grass", "select_percent": 50, "select_every": 3, "probe_steps": 2, "temperature": 0.05}
BY_DEFAULT = [(MISA, 1, "cpu"), (MISA, 2, "none"), (MISA, 3, "cpu"), (GRASS, 2, "cpu"), (GRASS, 3, "none")]
SCORING = [
    pytest.param(
        Case(section=section, stage=stage, offload=offload, steps=10),
        marks=[] if (section, stage, offload) in BY_DEFAULT else pytest.mark.slow,
    )
    for section, stage, offload in product((MISA, GRASS), (1, 2, 3), ("none", "cpu"))
]


@pytest.mark.parametrize("ranks", MOSTLY_TWO)
@pytest.mark.parametrize("case", SCORING, ids=case_id)
def test_a_preset_that_scores_trains_as_the_reference(trained, case, ranks):
    runs = trained(case, ranks)
    assert_follows_reference(case, runs, FP32)
    history, probes = runs[0]["history"], case.section.get("probe_steps", 0)
    assert [(phase, blocks) for _, phase, blocks in history[:probes]] == [("explore", ())] * probes
    rounds = [blocks for _, _, blocks in history[probes :: case.section["select_every"]]]
    assert min(map(len, rounds)) > 1 and len(set(rounds)) > 1 and any(steps_missed(history))
    assert all(is_matrix(list(runs[0]["blocks"])[block]) for block in set().union(*rounds))
