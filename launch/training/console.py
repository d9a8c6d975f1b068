"""Print a run's messages: on the main rank only, above a progress bar, and safely after the reader has ended."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Any, TextIO, cast

_READER_IS_GONE = (errno.EPIPE, errno.EIO)  # a pipe whose reader has ended; a terminal that was closed


def is_main() -> bool:
    """Return whether this is the rank that prints and writes; known before the process group is up."""
    return int(os.environ.get("RANK", "0")) == 0


def is_first_here() -> bool:
    """Return whether this is the first rank of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def say(text: str) -> None:
    """Print ``text`` on the main rank, above a progress bar if there is one."""
    if is_main():
        from tqdm import tqdm

        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def outlive_closed_pipes() -> None:
    """Drop from now on what is written to stdout or stderr after its reader has ended.

    Ctrl-C under ``2>&1 | tee log`` ends tee as well. Without this, the next line that is printed raises
    BrokenPipeError, before the checkpoint is saved.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Surviving):
            setattr(sys, name, cast(TextIO, _Surviving(stream)))


class _Surviving:
    """A text stream that drops its text once its reader is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._without_reader():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._without_reader():
            self._stream.flush()

    @contextlib.contextmanager
    def _without_reader(self) -> Any:
        try:
            yield
        except OSError as error:
            if error.errno not in _READER_IS_GONE:
                raise
            self._lead_into_the_void()

    def _lead_into_the_void(self) -> None:
        """Point the file descriptor at /dev/null, so that other writers (C code too) get no error either."""
        with contextlib.suppress(OSError, ValueError):
            void = os.open(os.devnull, os.O_WRONLY)
            os.dup2(void, self._stream.fileno())
            os.close(void)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
