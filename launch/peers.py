"""Train as launch/train.py does, by AdaGradSelect or by a method that it is compared with.

    deepspeed --num_accelerators 1 launch/peers.py --method lora --method-option rank=128 alpha=256 \
        --deepspeed_config configs/zero2.json --model smollm2 --dataset builtin --output runs/lora

All options of launch/train.py, and its output; launch/methods has the methods. The summary has what a method did
other than it was to do, as sentences in ``faults``; a method that fails ends with exit code 2, without a summary,
and with a last line on stderr that starts with ``error:``.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started by its path: `launch` is imported from the folder above (PEP 366)
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "launch"
    import launch  # noqa: F401

from .training.peers import main

if __name__ == "__main__":
    sys.exit(main())
