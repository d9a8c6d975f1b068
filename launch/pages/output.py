"""Where a page goes: the option that all scripts of this folder have, and what it does."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--output``."""
    parser.add_argument("--output", type=Path, help="file to write; not given: print")


def put(page: str, output: Path | None) -> None:
    """Write ``page`` to ``output``, whose folder is made if need be; print it if that is None."""
    if output is None:
        print(page, end="")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
