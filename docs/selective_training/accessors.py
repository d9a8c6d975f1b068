"""With several param groups, DeepSpeed's accessors find Adam's moments in the first group only.
deepspeed --num_accelerators 1 docs/selective_training/accessors.py
"""

import deepspeed
import torch
from deepspeed.utils import safe_get_full_optimizer_state
from torch import nn

import ds_agsel


def answers(select):
    """What the accessor says of a parameter of either group after two steps."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "weight_decay": 0.0}]
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}, **select}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3}}
    engine, *_ = ds_agsel.initialize(model=model, model_parameters=groups, config=config)
    for _ in range(2):
        engine.backward(engine(torch.randn(4, 64, device=engine.device)).square().mean())
        engine.step()
    for layer in model:
        try:
            yield "moments" if safe_get_full_optimizer_state(layer.weight, "exp_avg") is not None else "None"
        except Exception as error:
            yield type(error).__name__


deepspeed.utils.logger.setLevel("ERROR")
print(f"{'param group':24}| plain DeepSpeed | ds_agsel")
for group, (plain, ours) in enumerate(zip(answers({}), answers({"adagrad_select": {"policy": "all"}}))):
    print(f"{group:<24}| {plain:>15} | {ours}")
deepspeed.comm.destroy_process_group()
