"""TRL's DPOTrainer. `deepspeed launch/examples/trl_dpo.py --model MODEL` (on a CPU: DS_ACCELERATOR=cpu)."""

import argparse
import copy

import tiny
import torch
from trl import DPOConfig, DPOTrainer

import ds_agsel
from ds_agsel.hf import SelectionCallback

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="hub name or folder; not given: a tiny random Llama")
parser.add_argument("--dataset", help="hub name with 'prompt', 'chosen', 'rejected'; not given: sums")
parser.add_argument("--output", default="runs/trl_dpo")
parser.add_argument("--epochs", type=float, default=2)
parser.add_argument("--local_rank", type=int, default=0)
options = parser.parse_args()

ds_agsel.install()  # <- the one line; the section in the ds_config does the rest

ds_config = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
    "zero_optimization": {"stage": 2},
    "adagrad_select": {"select_percent": 40},
}
arguments = DPOConfig(
    output_dir=options.output, deepspeed=ds_config, num_train_epochs=options.epochs, learning_rate=1e-2, max_length=512,
    per_device_train_batch_size=4, gradient_accumulation_steps=2, logging_steps=1, report_to=[], save_strategy="no",
    use_cpu=not torch.accelerator.is_available(), bf16=torch.accelerator.is_available(),
    gradient_checkpointing_kwargs={"use_reentrant": False},  # the reentrant kind drops gradients of frozen inputs
)  # fmt: skip
model, tokenizer = tiny.model_and_tokenizer(options.model)
data = tiny.rows(options.dataset, lambda a, b: {"prompt": f"{a} + {b} =", "chosen": f" {a + b}", "rejected": f" {a}"})
trainer = DPOTrainer(
    model,
    ref_model=copy.deepcopy(model),  # TRL gives it the same ds_config and no optimizer: it stays plain DeepSpeed
    args=arguments,
    train_dataset=data,
    processing_class=tokenizer,
    callbacks=[SelectionCallback()],
)
trainer.train()
if trainer.is_world_process_zero():
    print("update counts:", list(trainer.model_wrapped.selection.update_counts))
