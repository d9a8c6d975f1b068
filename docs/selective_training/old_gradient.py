"""With CPU offload a frozen layer's last gradient is applied again. beta1 = 0: what moves here is no momentum.
deepspeed --num_accelerators 1 docs/selective_training/old_gradient.py
"""

import deepspeed
import torch
from torch import nn

import ds_agsel
from ds_agsel import policies


@policies.register("mine")
class AllThenLast(policies.Policy):
    def plan(self, step, update_counts):
        return (5,) if step else tuple(range(6))


def move(stage, offload, select):
    """Mean |Δw| of layer 1 in the two steps after one full step."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    weights, zero = [], {"stage": stage, "offload_optimizer": {"device": offload}}
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, **select}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.0, 0.999], "weight_decay": 0.0}}
    engine, *_ = ds_agsel.initialize(model=model, model_parameters=model.parameters(), config=config)
    for _ in range(3):
        engine.backward(engine(torch.randn(4, 64, device=engine.device)).square().mean())
        engine.step()
        model[:5].requires_grad_(bool(select))
        with deepspeed.zero.GatheredParameters(model[1].weight):
            weights.append(model[1].weight.detach().clone())
    return (weights[2] - weights[0]).abs().mean().item()


deepspeed.utils.logger.setLevel("ERROR")
print(f"{'ZeRO, offload_optimizer':24}| plain DeepSpeed | ds_agsel")
for stage, offload in ((2, "none"), (1, "cpu"), (2, "cpu"), (3, "cpu")):
    plain, ours = (move(stage, offload, s) for s in ({}, {"adagrad_select": {"policy": "mine", "select_percent": 100}}))
    print(f"{stage}, {offload:21}| {plain:15.1e} | {ours:.1e}")
deepspeed.comm.destroy_process_group()
