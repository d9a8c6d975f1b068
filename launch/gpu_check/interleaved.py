"""Part `time`: steps of one method and of plain DeepSpeed in turn, in one process; never more than two at once.

A turn is several steps without a wait for the accelerator between them, as in training: states that visit travel from
the end of one step on, under the forward and backward of the next.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..benchmarking import processes
from .models import LEARNING_RATE, ds_config, engine_of, random_model, take_step, tokens, wait, with_lora
from .parts import STEPS_A_TURN, Size

WARMUP_TURNS = 1  # the first step is on all blocks: [Note: Steady state] in benchmarking/processes

Step = Callable[[torch.Tensor], Any]


def run(case: str, size: Size) -> dict[str, Any]:
    """Time model/row against plain DeepSpeed, ZeRO-2 in bf16; return the median ratio and seconds a step."""
    name, row = case.split("/")
    model, step = _method(row, name, size)
    _, plain = _method("full", name, size)
    steps = {"plain": plain, row: step}
    seconds: dict[str, list[float]] = {which: [] for which in steps}
    for number in range(WARMUP_TURNS + size.turns):
        batches = [tokens(model, size, STEPS_A_TURN * number + step) for step in range(STEPS_A_TURN)]
        for which in list(steps)[:: 1 if number % 2 else -1]:
            wait()
            started = time.perf_counter()
            for batch in batches:
                steps[which](batch)
            wait()
            if number >= WARMUP_TURNS:
                seconds[which].append((time.perf_counter() - started) / STEPS_A_TURN)
    ratios = [one / other for one, other in zip(seconds[row], seconds["plain"], strict=True)]
    of_row = statistics.median(seconds[row])
    return {
        "step_to_plain": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
        "tokens_a_second": size.micro_batch * size.sequence_length / of_row,
        "seconds_a_step": of_row, "seconds_of_plain": statistics.median(seconds["plain"]),
    }  # fmt: skip


def _method(row: str, name: str, size: Size) -> tuple[nn.Module, Step]:
    """Return a model of its own for ``row``, and what takes a step of it on a batch."""
    model = random_model(name, torch.bfloat16)
    if row == "torch":
        return model, _torch_step(model)
    config = ds_config(size, 2, "bf16")
    kind, _, number = row.partition("-")
    if kind == "lora":
        model = with_lora(model, int(number))
    elif row != "full":
        config["adagrad_select"] = processes.section(row)
    engine = engine_of(model, config)
    return engine.module, lambda batch: take_step(engine, batch)


def _torch_step(model: nn.Module) -> Step:
    """Return a step of torch's fused AdamW on fp32 master weights, clipped, without DeepSpeed."""
    weights: list[torch.Tensor] = list(model.parameters())
    masters: list[torch.Tensor] = [nn.Parameter(weight.detach().float()) for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, weight_decay=0.01, fused=True)

    def step(batch: torch.Tensor) -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)

    return step
