"""Stop on SIGINT and SIGTERM at the same step on every rank."""

from __future__ import annotations

import signal
from types import FrameType

from . import ranks


class StopRequest:
    """Remembers the first stop signal; `agreed` tells all ranks of it at the same step.

    The launcher sends SIGTERM after a SIGINT that the terminal has already sent to the whole process group,
    and kills what is still there 30 s later (deepspeed/launcher/launch.py, 0.19.8): a second signal changes
    nothing.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def listen(self) -> None:
        """Catch SIGINT and SIGTERM from now on."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)

    @property
    def requested(self) -> bool:
        """Whether this rank was told to stop."""
        return self.signal is not None

    def agreed(self) -> bool:
        """Return whether any rank was told to stop. Collective."""
        return ranks.any_rank(self.requested)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it."""
        return 128 + (self.signal or signal.SIGTERM)
