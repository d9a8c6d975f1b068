"""Measure what ds_agsel saves and costs: against plain DeepSpeed, and against the least that any code must do.

    python launch/benchmark.py                      # everything, SmolLM2-135M's shape, ZeRO-2 with and without offload
    python launch/benchmark.py --stage 2 3          # and ZeRO-3
    python launch/benchmark.py --offload cpu --rows exploit-20 floor-20 --steps 4

Rows: `plain` DeepSpeed; `exploit-P` and `explore-P`, ds_agsel's two kinds of steps at P %; `visit-20`, exploit steps
whose states visit the accelerator (ZeRO-2 without offload); `all`, ds_agsel with every block selected; `floor-20`, a
hand-written PyTorch loop on the blocks that `exploit-20` drew. Each row lives in a process of its own, and all take
their steps in turn, one at a time: a round is one step of each on the same batch. Ratios are taken within a round and
their median over the rounds is reported, so that the machine's noise cancels.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started by its path: `launch` is imported from the folder above (PEP 366)
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "launch"
    import launch  # noqa: F401

from .benchmarking.command import main

if __name__ == "__main__":
    sys.exit(main())
