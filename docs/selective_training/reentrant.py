"""Reentrant activation checkpointing gives a layer no gradient when nothing that enters it requires one.
deepspeed --num_accelerators 1 docs/selective_training/reentrant.py
"""

import deepspeed
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ds_agsel


class Net(nn.Sequential):
    def forward(self, x):
        for layer in self[:3]:
            x = checkpoint(layer, x, use_reentrant=True)
        return self[3](x).square().mean()


def outcome(select):
    """What becomes of layers 1 and 3 of four when they alone are trained."""
    model = Net(*(nn.Linear(64, 64) for _ in range(4)))
    before = [model[index].weight.detach().clone() for index in (1, 3)]
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}, **select}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0}}
    engine, *_ = ds_agsel.initialize(model=model, model_parameters=model.parameters(), config=config)
    model[::2].requires_grad_(bool(select))
    try:
        engine.backward(engine(torch.randn(4, 64, device=engine.device)))
        engine.step()
    except Exception as error:
        return [type(error).__name__] * 2
    return ["trained" if (model[i].weight != old).any() else "not trained" for i, old in zip((1, 3), before)]


deepspeed.utils.logger.setLevel("ERROR")
print(f"{'layer':24}| plain DeepSpeed | ds_agsel")
plain, ours = outcome({}), outcome({"adagrad_select": {"policy": "fixed", "fixed_blocks": ["1", "3"]}})
print(f"{1:<24}| {plain[0]:>15} | {ours[0]}\n{3:<24}| {plain[1]:>15} | {ours[1]}")
deepspeed.comm.destroy_process_group()
