"""Lightning, on GPUs: its strategy refuses CPUs. `python launch/examples/lightning_trainer.py --model MODEL`."""

import argparse

import lightning
import tiny
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.utils.data import DataLoader

import ds_agsel

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="hub name or folder; not given: a tiny random Llama")
parser.add_argument("--epochs", type=int, default=2)
options = parser.parse_args()

ds_agsel.install()  # <- the one line; the section in the ds_config does the rest


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model, _ = tiny.model_and_tokenizer(options.model)

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


module = Module()
rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, module.model.config.vocab_size, (24, 16))]
ds_config = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    # Lightning keeps the data to itself, so the steps of an epoch must be said.
    "adagrad_select": {"select_percent": 40, "steps_per_epoch": len(rows) // 2},
}
trainer = lightning.Trainer(
    max_epochs=options.epochs, accelerator="gpu", strategy=DeepSpeedStrategy(config=ds_config), logger=False,
    enable_checkpointing=False,
)  # fmt: skip
trainer.fit(module, DataLoader(rows, batch_size=2))
print("update counts:", list(trainer.strategy.deepspeed_engine.selection.update_counts))
