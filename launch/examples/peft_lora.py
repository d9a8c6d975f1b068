"""LoRA with selection: a block is a layer's adapters. `deepspeed launch/examples/peft_lora.py --model MODEL`."""

import argparse

import tiny
import torch
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import ds_agsel
from ds_agsel.hf import SelectionCallback

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="hub name or folder; not given: a tiny random Llama")
parser.add_argument("--dataset", help="hub name with 'prompt' and 'completion'; not given: sums")
parser.add_argument("--output", default="runs/peft_lora")
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
arguments = SFTConfig(
    output_dir=options.output, deepspeed=ds_config, num_train_epochs=options.epochs, learning_rate=1e-2, max_length=512,
    per_device_train_batch_size=4, gradient_accumulation_steps=2, logging_steps=1, report_to=[], save_strategy="no",
    use_cpu=not torch.accelerator.is_available(), bf16=torch.accelerator.is_available(),
    gradient_checkpointing_kwargs={"use_reentrant": False},  # the reentrant kind drops gradients of frozen inputs
)  # fmt: skip
model, tokenizer = tiny.model_and_tokenizer(options.model)
data = tiny.rows(options.dataset, lambda a, b: {"prompt": f"{a} + {b} =", "completion": f" {a + b}"})
trainer = SFTTrainer(
    model,
    peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"]),
    args=arguments,
    train_dataset=data,
    processing_class=tokenizer,
    callbacks=[SelectionCallback()],
)
trainer.train()
if trainer.is_world_process_zero():
    print("update counts:", list(trainer.model_wrapped.selection.update_counts))
