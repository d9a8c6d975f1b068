"""Fine-tune a causal language model with AdaGradSelect, from data to a saved model and a summary.

    deepspeed launch/train.py --deepspeed_config configs/zero2_offload.json \
        --model smollm2 --dataset builtin --output runs/first

    deepspeed --hostfile hostfile launch/train.py …   # several nodes: docs/checkpoints.md
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.util
import logging
import os
import sys
from collections.abc import Callable

import datasets
import deepspeed
import transformers
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from ds_agsel.errors import AgselError, CheckpointError, ConfigError

from . import options, ranks
from .job import Job
from .stopping import StopRequest

FAILED = 2
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(parse: Callable[[], argparse.Namespace] | None = None) -> int:
    """Run the job of the command line, read by ``parse``, else as `options.parse` does.

    Returns the exit code: 0, 2 after an error that was reported, 128 + n after signal n.
    """
    try:
        wanted = (parse or options.parse)()
        _check_launched()
        stop = StopRequest()
        stop.listen()
        if ranks.is_main():
            _show_what_is_decided()
        transformers.logging.set_verbosity_error()
        if not ranks.is_main():
            datasets.disable_progress_bars()
            transformers.logging.disable_progress_bar()
        deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name())
        try:
            return stop.exit_code if Job(wanted, stop).run() else 0
        finally:
            with contextlib.suppress(OSError):  # there is something in it
                os.rmdir(wanted.output)
            dist.destroy_process_group()
    except AgselError as error:
        # Every rank meets the same error at the same place, but for a disk that only one of them writes to.
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


def _show_what_is_decided() -> None:
    """Print what ds_agsel chooses where the ds_config leaves it open, with the reason."""
    logger = logging.getLogger("ds_agsel")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler(sys.stdout))
    logger.propagate = False


def _check_launched() -> None:
    """Raise ConfigError where neither a launcher nor MPI says which rank this is."""
    if "RANK" not in os.environ and importlib.util.find_spec("mpi4py") is None:
        script = f"launch/{os.path.basename(sys.argv[0])}"
        raise ConfigError(f"{script} was started without a launcher. Use: deepspeed {script} …")
