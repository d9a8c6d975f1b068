"""A run that was stopped ends elsewhere than one that was not: the old gradients are in no checkpoint.
deepspeed --num_accelerators 1 docs/selective_training/resume.py
"""

import tempfile

import deepspeed
import torch
from torch import nn

import ds_agsel


def run(folder, stage, select, steps):
    """The weights after these steps. Saves before step 2, or begins with what was saved there."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(2)))
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, **select}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2}}
    engine, *_ = ds_agsel.initialize(model=model, model_parameters=model.parameters(), config=config)
    for step in steps:
        if step == 2:
            (engine.load_checkpoint if step == steps[0] else engine.save_checkpoint)(folder)
        torch.manual_seed(step)
        model[step % 2].requires_grad_(bool(select))
        model[1 - step % 2].requires_grad_(True)
        engine.backward(engine(torch.randn(4, 64, device=engine.device)).square().mean())
        engine.step()
    return model[0].weight.detach()


deepspeed.utils.logger.setLevel("ERROR")
print(f"{'ZeRO with CPU offload':24}| plain DeepSpeed | ds_agsel")
for stage in (1, 2):
    plain, ours = ((tempfile.mkdtemp(), stage, select) for select in ({}, {"adagrad_select": {"policy": "cyclic"}}))
    differences = [(run(*case, range(4)) - run(*case, range(2, 4))).abs().max().item() for case in (plain, ours)]
    print(f"{stage:<24}| {differences[0]:15.1e} | {differences[1]:.1e}")
deepspeed.comm.destroy_process_group()
