"""A plain DeepSpeed loop. `deepspeed launch/examples/raw_deepspeed.py` (on a CPU: DS_ACCELERATOR=cpu).

It needs no line of ours when started as `deepspeed --module ds_agsel.run launch/examples/raw_deepspeed.py`.
"""

import argparse
import json

import deepspeed
import tiny
import torch

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="hub name or folder; not given: a tiny random Llama")
parser.add_argument("--deepspeed_config", help="ds_config JSON; not given: the one below")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--install", action="store_true", help="call ds_agsel.install() here")
parser.add_argument("--local_rank", type=int, default=0)
options = parser.parse_args()

if options.install:
    import ds_agsel

    ds_agsel.install()  # <- the one line; the section in the ds_config does the rest

torch.manual_seed(0)
model, _ = tiny.model_and_tokenizer(options.model)
rows = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(0, model.config.vocab_size, (24, 16))]

ds_config = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "zero_optimization": {"stage": 2},
    "adagrad_select": {"select_percent": 40},
}
engine, _, loader, _ = deepspeed.initialize(
    model=model,
    model_parameters=model.parameters(),
    training_data=rows,
    config=options.deepspeed_config or ds_config,
)
for epoch in range(options.epochs):
    for batch in loader:
        loss = engine(**{name: tensor.to(engine.device) for name, tensor in batch.items()}).loss
        engine.backward(loss)
        engine.step()
    if engine.global_rank == 0:
        print(f"epoch {epoch}: loss {loss.item():.3f}")
if engine.global_rank == 0:
    selection = getattr(engine, "selection", None)
    print("update counts:", json.dumps(None if selection is None else selection.update_counts))
