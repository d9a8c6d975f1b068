"""From the command line of launch/evaluate.py to its exit code. Light until the options are read."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ds_agsel.errors import AgselError

from ..training.console import outlive_closed_pipes
from . import options

_FAILED, _INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate; return the exit code: 0, 2 after an error that was reported, 130 after Ctrl-C."""
    outlive_closed_pipes()
    try:
        wanted = options.parse(arguments)
        from .answering import evaluate  # torch, transformers and deepspeed: seconds

        accuracy = evaluate(wanted)
    except AgselError as error:
        print(f"error: {error}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print("\nstopped; go on with --resume", file=sys.stderr)
        return _INTERRUPTED
    print(
        f"{accuracy['dataset']}: {accuracy['correct']} of {accuracy['rows']} correct, "
        f"{accuracy['accuracy_percent']:.1f} % (95 %: {accuracy['low_percent']:.1f} to "
        f"{accuracy['high_percent']:.1f}), {accuracy['truncated']} truncated, {accuracy['unanswered']} without an "
        f"answer, {accuracy['seconds']:.0f} s"
    )
    return 0
