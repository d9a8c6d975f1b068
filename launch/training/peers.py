"""Train as launch/train.py does, by AdaGradSelect or by a method that it is compared with.

    deepspeed --num_accelerators 1 launch/peers.py --method lora --method-option rank=128 alpha=256 \
        --deepspeed_config configs/zero2.json --model smollm2 --dataset builtin --output runs/lora

All options of launch/train.py, and its output; launch/methods has the methods. The summary has what a method did
other than it was to do, as sentences in ``faults``; a method that fails ends with exit code 2, without a summary,
and with a last line on stderr that starts with ``error:``.
"""

from __future__ import annotations

import sys
import traceback

from . import command, options


def main() -> int:
    """Return the exit code, as launch/train.py does; a method may raise anything."""
    try:
        return command.main(options.parse_peer)
    except Exception as error:
        traceback.print_exc()
        words = " ".join(str(error).split())
        print(f"\nerror: {type(error).__name__}: {words}", file=sys.stderr, flush=True)
        return command.FAILED
