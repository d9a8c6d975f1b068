"""Part `matrix`: a tiny model trains in every configuration, followed by a plain PyTorch loop on the CPU.

The loop updates, at each step, the blocks that the engine has selected. Every weight of the other blocks must keep its
bits.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .models import Unavailable, ds_config, engine_of, random_model, take_step, tokens
from .parts import Size

# Relative. fp32 on both sides, kernels that add up in another order; bf16 rounds each activation.
LOSS_TOLERANCE = {"fp32": 2e-3, "bf16": 2e-2}
MOST_TOKENS = 64  # in a row: each step is repeated on the CPU
BATCHES = 4  # in turn, and at this rate, so that the loss falls far
LEARNING_RATE = 3e-3


def run(case: str, size: Size) -> dict[str, Any]:
    """Train ``case``; return what was seen. Raises RuntimeError where a promise is broken."""
    size = replace(size, sequence_length=min(size.sequence_length, MOST_TOKENS))
    stage_name, place, form = (*case.split("-"), "")[:3]
    precision = "bf16" if form == "split" else "fp32"  # which splits master weights
    model = random_model("tiny", torch.bfloat16 if precision == "bf16" else torch.float32)
    twin = _Twin(model)
    fields = {"steps_per_epoch": 3, "seed": 2, "select_percent": 40, **_states(place, form)}
    config = ds_config(size, int(stage_name.removeprefix("zero")), precision, "cpu" if place == "cpu" else "none")
    config["optimizer"]["params"]["lr"] = LEARNING_RATE
    engine = engine_of(model, {**config, "adagrad_select": fields})
    losses, off, moved = [], [], 0
    for step in range(size.matrix_steps):
        before = _weights(engine)
        batch = tokens(engine.module, size, step % BATCHES)
        loss = float(take_step(engine, batch))
        record = engine.selection.history[-1]
        selected = {name for block in record.blocks for name in engine.selection.blocks[block].parameter_names}
        changed = {name for name, weight in _weights(engine).items() if not torch.equal(weight, before[name])}
        if changed - selected:
            raise RuntimeError(f"step {step} ({record.phase}) changed {sorted(changed - selected)}, not selected.")
        reference = twin.step(batch.cpu(), selected)
        off.append(abs(loss - reference) / abs(reference))
        if off[-1] > LOSS_TOLERANCE[precision]:
            raise RuntimeError(f"step {step}: loss {loss:.6f}, and {reference:.6f} on the CPU.")
        losses.append(loss)
        moved += engine.selection.traffic[-1].h2d_bytes + engine.selection.traffic[-1].d2h_bytes
    phases = [record.phase for record in engine.selection.history]
    return {
        "steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1], "explored": phases.count("explore"),
        "most_off": max(off), "moved_bytes": moved,
    }  # fmt: skip


def _states(place: str, form: str) -> dict[str, Any]:
    """Return the fields of the section for states that are updated at ``place`` and rest in ``form``."""
    fields: dict[str, Any] = {"step_device": "accelerator"} if place == "visit" else {}
    if form == "all":  # a cache with room for all
        return {**fields, "state_budget_bytes": 2**30}
    if form == "split":
        return {**fields, "state_dtype": "bf16", "master_weights": "split"}
    if form == "int8" and importlib.util.find_spec("bitsandbytes") is None:
        raise Unavailable("bitsandbytes is not installed: pip install bitsandbytes")
    return {**fields, "state_dtype": form} if form else fields


def _weights(engine: Any) -> dict[str, torch.Tensor]:
    """Return copies of the model weights; with stage 3 of this rank's partitions."""
    return {
        name: getattr(parameter, "ds_tensor", parameter).detach().clone()
        for name, parameter in engine.module.named_parameters()
    }


class _Twin:
    """The same model on the CPU, with torch's AdamW on fp32 weights, which steps only those that have a gradient."""

    def __init__(self, model: nn.Module) -> None:
        import copy

        self._model = copy.deepcopy(model).cpu()
        self._masters = {name: nn.Parameter(p.detach().float()) for name, p in self._model.named_parameters()}
        self._optimizer = torch.optim.AdamW(self._masters.values(), lr=LEARNING_RATE, weight_decay=0.01)

    def step(self, batch: torch.Tensor, selected: set[str]) -> float:
        loss: torch.Tensor = self._model(input_ids=batch, labels=batch).loss
        loss.backward()
        for name, parameter in self._model.named_parameters():
            is_updated = name in selected and parameter.grad is not None
            self._masters[name].grad = parameter.grad.float() if is_updated and parameter.grad is not None else None
            parameter.grad = None
        nn.utils.clip_grad_norm_(self._masters.values(), 1.0)
        self._optimizer.step()
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(self._masters[name])
        return float(loss.detach())
