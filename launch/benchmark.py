"""The command line of `launch/benchmarking/command.py`, which says what it does."""

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
