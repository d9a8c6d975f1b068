"""The paper's experiments (arXiv:2512.15764), and its neighbours beside it, as one list of runs.

    python launch/reproduce.py --scale tiny             # all of it, small: SmolLM2-135M, built-in data, a CPU
    python launch/reproduce.py --scale full --cost      # what the paper's own scale would take on one GPU
    python launch/reproduce.py --scale full             # and that

A scale is a YAML of runs in configs/paper/. First short runs choose each family's learning rate, then every cell
trains through the deepspeed launcher in a process of its own; one that fails is a row that says so. Started again, it
goes on where it was. What comes out below --output: results.json, tables.md, figures/, and each cell's log.
"""

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
