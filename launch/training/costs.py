"""Costs of training in this process: processor time, memory, bytes held. Work between steps is left out."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from deepspeed.accelerator import get_accelerator


class Costs:
    """Totals and maxima over the steps; `start_step` and `end_step` enclose each.

    Attributes:
        processor_seconds: of all steps, also of those before a resume if it was set.
        largest: bytes by name, the most that was noted since the process began.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.processor_seconds = 0.0
        self.largest: dict[str, int] = {}
        self._clock = clock
        self._started = 0.0
        self._peak_between_steps = 0
        self._peak_in_steps = 0

    def start_step(self) -> None:
        """Start the clock and the peak of a step."""
        self._peak_between_steps = max(self._peak_between_steps, peak_resident_bytes())
        reset_peak_resident()
        self._started = self._clock()

    def end_step(self) -> None:
        """Add up the step's processor time and peak."""
        self.processor_seconds += self._clock() - self._started
        self._peak_in_steps = max(self._peak_in_steps, peak_resident_bytes())

    def note(self, **held_bytes: int) -> None:
        """Remember each number if it is the largest of its name."""
        for name, number in held_bytes.items():
            self.largest[name] = max(number, self.largest.get(name, 0))

    def peak_memory_bytes(self) -> dict[str, int]:
        """Return peaks: resident memory of this process, the same within steps, and the accelerator's allocations.

        The first two are equal if the system can't tell them apart; the last is 0 on a CPU.
        """
        accelerator = get_accelerator()
        on_host = accelerator.device_name() == "cpu"
        return {
            "host": max(self._peak_between_steps, self._peak_in_steps, peak_resident_bytes()),
            "host_in_steps": self._peak_in_steps,
            "accelerator": 0 if on_host else accelerator.max_memory_allocated(),
        }


def peak_resident_bytes() -> int:
    """Return the process's largest resident memory since it began, or since `reset_peak_resident`."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts KiB, on macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_resident() -> None:
    """Reset the peak, if the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
