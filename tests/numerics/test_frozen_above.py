"""Frozen layers above a selected one with activation checkpointing and ZeRO-3, which empties weights after their use.

Backward goes through the frozen layers, and needs their weights: those that the recomputed forward has saved.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import Case, build, finish, run_steps, tiny_model
from tiny_models import TinyNet
from torch import Tensor, nn

ZERO = {"stage3_param_persistence_threshold": 0}  # or small weights are never emptied
LLAMA = Case(stage=3, steps=3, zero=ZERO, section={"policy": "fixed", "fixed_blocks": ["model.layers.0"]})
NET = LLAMA.but(model="net", section={"policy": "fixed", "fixed_blocks": ["layers.0"]})
OWN, ROUTED = "own", "routed"


class Routed(nn.Module):
    """A layer that computes scores after its output, which nothing uses: backward enters it at ``linear``."""

    def __init__(self, width: int):
        super().__init__()
        self.linear, self.router = nn.Linear(width, width), nn.Linear(width, width)
        self.scores: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        output = hidden + self.linear(hidden)
        self.scores = self.router(hidden).square().detach()
        return output


def model_of(case: Case, layers: str) -> Any:
    model: Any = tiny_model(case)
    if layers == ROUTED:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model.layers = nn.ModuleList(Routed(5) for _ in range(4))
    return model


def train_checkpointed(case: Case, layers: str, kind: str | None) -> dict[str, Any]:
    """A run whose layers are computed again in backward: "reentrant", "non-reentrant" or not at all."""
    model = model_of(case, layers)
    if isinstance(model, TinyNet):
        model.checkpointing = kind
    elif kind is not None:
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    engine = build(case, model)
    result = run_steps(engine, case)
    gathered = [name for name, p in engine.module.named_parameters() if "layers." in name and p.numel()]
    return {**finish(engine, result), "gathered": gathered}


@pytest.mark.parametrize(
    "case, layers, kind",
    [(NET, OWN, "non-reentrant"), (NET, ROUTED, "non-reentrant"), (LLAMA, OWN, "non-reentrant")],
    ids=["own checkpoints", "more after the output", "transformers"],
)
def test_backward_goes_through_recomputed_frozen_layers(workers: Any, case: Case, layers: str, kind: str) -> None:
    plain = workers(2).run(train_checkpointed, case, layers, None)
    start = dict(model_of(case, layers).named_parameters())
    for expected, found in zip(plain, workers(2).run(train_checkpointed, case, layers, kind), strict=True):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert found["gathered"] == expected["gathered"]  # what backward kept is released after it
        moved = {name for name, weight in found["weights"].items() if not torch.equal(weight, start[name])}
        assert moved and all("layers.0." in name for name in moved)
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-5)
