"""From the command line of launch/train.py to its exit code. Light until the options are read."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable

from ds_agsel.errors import AgselError, ConfigError

from . import options
from .console import is_main, outlive_closed_pipes

FAILED = 2


def main(parse: Callable[[], argparse.Namespace] | None = None) -> int:
    """Run the job of the command line, read by ``parse``, else as `options.parse` does.

    Returns the exit code: 0, 2 after an error that was reported, 128 + n after signal n.
    """
    outlive_closed_pipes()
    try:
        wanted = (parse or options.parse)()
        _check_launched()
    except AgselError as error:
        if is_main():
            print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return FAILED
    from .process import run_job  # torch, transformers and deepspeed: seconds

    return run_job(wanted)


def _check_launched() -> None:
    """Raise ConfigError if neither a launcher nor MPI says which rank this is."""
    if "RANK" not in os.environ and importlib.util.find_spec("mpi4py") is None:
        script = os.path.splitext(os.path.basename(sys.argv[0]))[0]
        raise ConfigError(f"launch/{script}.py was started without a launcher. Use: {options.program(script)} …")
