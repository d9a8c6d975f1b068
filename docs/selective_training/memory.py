"""Freezing releases no memory: Adam's moments are there for every parameter, and a frozen one's gradient is zeros.
deepspeed --num_accelerators 1 docs/selective_training/memory.py
"""

import gc

import deepspeed
import torch
from torch import nn

import ds_agsel


def tensor_bytes():
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def held(offload, select):
    """Bytes of all tensors there are after backward with one of six layers trained, per byte of the parameters."""
    others = tensor_bytes()
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(6)))
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}, **select}
    config["zero_optimization"] = {"stage": 2, "offload_optimizer": {"device": offload}, "reduce_bucket_size": 1000}
    engine, *_ = ds_agsel.initialize(model=model, model_parameters=model.parameters(), config=config)
    model[:5].requires_grad_(bool(select))
    for _ in range(3):
        engine.backward(engine(torch.randn(1, 256, device=engine.device)).square().mean())
        found = tensor_bytes() - others
        engine.step()
    return found / (4 * 6 * (256 * 256 + 256))


deepspeed.utils.logger.setLevel("ERROR")
print(f"{'offload_optimizer':24}| plain DeepSpeed | ds_agsel")
for offload in ("none", "cpu"):
    plain, ours = held(offload, {}), held(offload, {"adagrad_select": {"policy": "fixed", "fixed_blocks": ["5"]}})
    print(f"{offload:24}| {plain:15.2f} | {ours:.2f}")
deepspeed.comm.destroy_process_group()
