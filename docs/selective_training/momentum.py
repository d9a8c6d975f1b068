"""Frozen layers go on moving: Adam's momentum is applied to gradients that are zero.
deepspeed --num_accelerators 1 docs/selective_training/momentum.py
"""

from itertools import pairwise

import deepspeed
import torch
from torch import nn

import ds_agsel
from ds_agsel import policies


@policies.register("mine")
class AllThenLast(policies.Policy):
    def plan(self, step, update_counts):
        return (5,) if step else tuple(range(6))


def moves(select):
    """Mean |Δw| of layer 1 in the three steps after one full step."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}, **select}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.0}}
    engine, *_ = ds_agsel.initialize(model=model, model_parameters=model.parameters(), config=config)
    weights = []
    for _ in range(4):
        engine.backward(engine(torch.randn(4, 64, device=engine.device)).square().mean())
        engine.step()
        weights.append(model[1].weight.detach().clone())
        model[:5].requires_grad_(bool(select))
    return [(new - old).abs().mean().item() for old, new in pairwise(weights)]


deepspeed.utils.logger.setLevel("ERROR")
print(f"{'step after the freeze':24}| plain DeepSpeed | ds_agsel")
for step, pair in enumerate(zip(moves({}), moves({"adagrad_select": {"policy": "mine", "select_percent": 100}})), 1):
    print(f"{step:<24}| {pair[0]:15.1e} | {pair[1]:.1e}")
deepspeed.comm.destroy_process_group()
