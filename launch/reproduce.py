"""The command line of `launch/reproduction/command.py`, which says what it does."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

if not __package__:  # started by its path: `launch` is imported from the folder above (PEP 366)
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "launch"
    import launch  # noqa: F401

if find_spec(".reproduction", __package__) is None:  # the installed wheel
    print(
        "error: reproducing the paper's experiments needs a clone, which has configs/paper/. Clone the repository and "
        "run: python launch/reproduce.py",
        file=sys.stderr,
    )
    sys.exit(2)

from .reproduction.command import main

if __name__ == "__main__":
    sys.exit(main())
