"""One step count for all: a layer that is first updated late takes a first step of the wrong size.
deepspeed --num_accelerators 1 docs/selective_training/step_count.py
"""

import deepspeed
import torch

import ds_agsel
from ds_agsel import policies

LAYER = {1: 0, 3: 1, 10: 2, 1000: 3}  # trained in these steps, from 1; in all others layer 4


@policies.register("one_by_one")
class OneByOne(policies.Policy):
    def plan(self, step, update_counts):
        return (LAYER.get(step + 1, 4),)


def first_updates(select):
    """Mean |Δw| / lr of each layer's first update. Adam's is 1, whatever the gradient."""
    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(5)))
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}, **select}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-12, "weight_decay": 0.0}}
    engine, *_ = ds_agsel.initialize(model=model, model_parameters=model.parameters(), config=config)
    for step in range(1, 1001):
        model.requires_grad_(bool(select))
        trained = model[LAYER.get(step, 4)].requires_grad_(True)
        old = trained.weight.detach().clone()
        engine.backward(engine(torch.randn(4, 16, device=engine.device)).square().mean())
        engine.step()
        if step in LAYER:
            yield (trained.weight.detach() - old).abs().mean().item() / 1e-3


deepspeed.utils.logger.setLevel("ERROR")
print(f"{'first updated in step':24}| plain DeepSpeed | ds_agsel")
for step, plain, ours in zip(LAYER, first_updates({}), first_updates({"adagrad_select": {"policy": "one_by_one"}})):
    print(f"{step:<24}| {plain:15.2f} | {ours:.2f}")
deepspeed.comm.destroy_process_group()
