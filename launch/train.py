"""Fine-tune a causal language model with AdaGradSelect, from data to a saved model and a summary.

deepspeed launch/train.py --deepspeed_config configs/zero2_offload.json \
        --model smollm2 --dataset builtin --output runs/first

deepspeed --hostfile hostfile launch/train.py …   # several nodes: docs/checkpoints.md
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started by its path: `launch` is imported from the folder above (PEP 366)
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "launch"
    import launch  # noqa: F401

from .training.command import main

if __name__ == "__main__":
    sys.exit(main())
