"""An Accelerate loop. `accelerate launch launch/examples/accelerate_loop.py` (on a CPU: DS_ACCELERATOR=cpu)."""

import argparse
import json

import tiny
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

import ds_agsel

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="hub name or folder; not given: a tiny random Llama")
parser.add_argument("--offload", default="none", choices=["none", "cpu"])
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--local_rank", type=int, default=0)
options = parser.parse_args()

ds_agsel.install()  # <- the one line; the section in the ds_config does the rest

ds_config = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": options.offload}},
    "zero_force_ds_cpu_optimizer": False,
    "adagrad_select": {"select_percent": 40},
}
accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds_config))

torch.manual_seed(0)
model, _ = tiny.model_and_tokenizer(options.model)
rows = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(0, model.config.vocab_size, (24, 16))]
loader = DataLoader(rows, batch_size=2, shuffle=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = get_linear_schedule_with_warmup(optimizer, 2, options.epochs * len(loader) // 2)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
if not hasattr(model, "selection"):
    raise SystemExit("Accelerate did not hand the model to DeepSpeed (Accelerator(cpu=True)?): nothing is selected.")

for epoch in range(options.epochs):
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}, lr {scheduler.get_last_lr()[0]:.2e}")
accelerator.print("update counts:", json.dumps(model.selection.update_counts))
