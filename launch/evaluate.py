r"""Zero-shot accuracy of a model on GSM8K, MATH or other problems: greedy answers, judged by math-verify.

    python launch/evaluate.py --model runs/first/model --dataset gsm8k --output runs/first/gsm8k

No example and no system turn of ours is put before a problem (a chat template may bring its own; ``--system ""``
empties it). ``answers.jsonl`` gets a line a problem as it is answered, ``accuracy.json`` the share of right ones with
its 95 % Wilson interval. An evaluation that was stopped goes on with ``--resume``. One process, one accelerator.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started by its path: `launch` is imported from the folder above (PEP 366)
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "launch"
    import launch  # noqa: F401

from .evaluation.command import main

if __name__ == "__main__":
    sys.exit(main())
