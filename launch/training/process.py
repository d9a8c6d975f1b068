"""A job in this process: signals, process group, and errors as one line."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import sys

import datasets
import transformers
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from ds_agsel.errors import AgselError, CheckpointError
from ds_agsel.zero import build_ops, compat

from . import job, ranks
from .console import say
from .stopping import StopRequest

FAILED = 2
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_job(wanted: argparse.Namespace) -> int:
    """Run the job of the options ``wanted``.

    Returns the exit code: 0, 2 after an error that was reported, 128 + n after signal n.
    """
    try:
        stop = StopRequest()
        stop.listen()
        _set_verbosity()
        if get_accelerator().device_name() == "cpu" and ranks.is_first_here():
            build_ops.announce([build_ops.COLLECTIVES_OP], say)
        compat.start_process_group()
        try:
            return stop.exit_code if job.run(wanted, stop) else 0
        finally:
            with contextlib.suppress(OSError):  # there is something in it
                os.rmdir(wanted.output)
            dist.destroy_process_group()
    except AgselError as error:
        # Every rank meets the same error at the same place, except those of a disk that one rank alone writes to.
        if ranks.is_main() or isinstance(error, CheckpointError):
            print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return FAILED
    except OSError as error:  # of the logs; checkpoints and the model have errors of their own
        if error.errno not in _NO_ROOM:
            raise
        print(
            f"\nerror: --output={wanted.output!r} can't be written to: {error.strerror}. Make room, then go on with "
            "--resume.",
            file=sys.stderr,
            flush=True,
        )
        return FAILED
    except ranks.MainRankFailed:
        return FAILED


def _set_verbosity() -> None:
    """Print ds_agsel's log at INFO on the main rank; silence the libraries, on other ranks their progress bars too."""
    transformers.logging.set_verbosity_error()
    if not ranks.is_main():
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()
        return
    logger = logging.getLogger("ds_agsel")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler(sys.stdout))
    logger.propagate = False
