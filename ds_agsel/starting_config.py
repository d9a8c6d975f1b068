"""A commented ds_config to begin with, for `ds-agsel init`. Comments are Hjson's, which DeepSpeed and we read."""

from __future__ import annotations

from pathlib import Path

from ds_agsel.errors import ConfigError

_TEMPLATE = """\
// A ds_config for DeepSpeed with AdaGradSelect. `ds-agsel check FILE` says whether it is sound; then
//   ds-agsel train --deepspeed_config FILE --model MODEL --dataset DATA --output runs/first
// or pass it to ds_agsel.initialize(config=FILE). `ds-agsel train` fills each "auto"; in a script of your own write
// values instead.
{
  // Rows per accelerator in one forward. A step takes this x gradient_accumulation_steps x accelerators rows.
  "train_micro_batch_size_per_gpu": 8,
  "gradient_accumulation_steps": 1,

  // "auto": bf16 where the hardware computes it fast, else fp32.
  "bf16": {"enabled": "auto"},

  // The largest norm of the gradients that are applied.
  "gradient_clipping": 1.0,

  "zero_optimization": {
    // 1, 2 or 3. 3 also spreads the weights over the accelerators.
    "stage": @STAGE@@OFFLOAD@
  },

  "optimizer": {
    "type": "AdamW",
    "params": {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
  },

  // Without this section the learning rate is constant.
  "scheduler": {
    "type": "WarmupCosineLR",
    "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"}
  },

  "steps_per_print": 1000000,

  // Remove this section, or set "enabled": false, for plain DeepSpeed.
  "adagrad_select": {
    // The percentage of the model's blocks that each step updates, in (0, 100]. 100 is full fine-tuning.
    "select_percent": @PERCENT@,

    // adagrad_select: by gradients and by past choices. Others: gradient_topk, random, cyclic, fixed, all, replay.
    "policy": "adagrad_select",

    // Blocks that every step updates, or that none does, by name (`ds-agsel check FILE --model MODEL` checks them).
    "always_select": [],
    "never_select": [],

    // Draws are a function of the seed and the step.
    "seed": 42
  }
}
"""
_OFFLOAD = """,
    // The optimizer's states stay in host memory, and the host does AdamW. Remove it to keep them on the accelerator.
    "offload_optimizer": {"device": "cpu", "pin_memory": true}"""


def text(*, stage: int = 2, offload: bool = True, select_percent: float = 20) -> str:
    """Return the ds_config as text."""
    written = _TEMPLATE.replace("@STAGE@", str(stage)).replace("@OFFLOAD@", _OFFLOAD if offload else "")
    return written.replace("@PERCENT@", f"{select_percent:g}")


def write(path: Path, content: str, *, overwrite: bool) -> None:
    """Write ``content`` to ``path``. Raises ConfigError if it exists, unless ``overwrite``, or can't be written."""
    try:
        with open(path, "w" if overwrite else "x", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError:
        raise ConfigError(f"{path} exists. Give another file, or --overwrite.") from None
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}. Give a file in another folder.") from None
