"""How far frozen layers move under ZeRO: plain DeepSpeed with `requires_grad = False`, and ds_agsel.

    deepspeed --num_accelerators 1 launch/frozen_drift.py

One full step on a six-layer model in bf16 with AdamW at lr 1e-2, then all but two layers frozen for three steps.
Printed: the mean |Δw| of a layer that is frozen in them, for each step, which ought to be 0.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import ds_agsel
from ds_agsel import policies

TRAINED_LAYERS = ("model.layers.4", "model.layers.5")
WATCHED_LAYER = 1
STEPS = 3


@policies.register("all_then_two")
class AllThenTwo(policies.Policy):
    """Every block at the first step, the two last layers after it."""

    def plan(self, step: int, update_counts: Sequence[int]) -> tuple[int, ...]:
        names = self.context.block_names
        return tuple(i for i, name in enumerate(names) if step == 0 or name in TRAINED_LAYERS)


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=4, tie_word_embeddings=True,
        )
    )  # fmt: skip


def ds_config(offload: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": offload}},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.0}},
    }


def freeze_by_hand(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(f"{layer}." for layer in TRAINED_LAYERS)))


def drift(offload: str, selective: bool) -> list[float]:
    """Mean |Δw| of the watched layer's model weights in each of the steps in which it is frozen."""
    model = tiny_model()
    config = ds_config(offload)
    if selective:
        config["adagrad_select"] = {"policy": "all_then_two"}
    engine, *_ = ds_agsel.initialize(model=model, model_parameters=model.parameters(), config=config)
    watched = list(model.model.layers[WATCHED_LAYER].parameters())
    moves = []
    for step in range(1 + STEPS):
        before = [p.detach().float().clone() for p in watched]
        tokens = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(step)).to(engine.device)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
        moved = torch.cat([(p.detach().float() - old).abs().flatten() for p, old in zip(watched, before)])
        moves.append(moved.mean().item())
        if step == 0 and not selective:
            freeze_by_hand(model)
    engine.destroy()
    return moves[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")
    parser.parse_args()
    deepspeed.utils.logger.setLevel(logging.ERROR)
    print(
        f"{'ZeRO-2, offload_optimizer':28}{'frozen by':36}" + "".join(f"{f'step {s}':>10}" for s in range(1, 1 + STEPS))
    )
    for offload in ("none", "cpu"):
        for selective in (False, True):
            way = "ds_agsel" if selective else "requires_grad = False, plain DeepSpeed"
            print(f"{offload:28}{way:36}" + "".join(f"{move:10.1e}" for move in drift(offload, selective)), flush=True)


if __name__ == "__main__":
    main()
