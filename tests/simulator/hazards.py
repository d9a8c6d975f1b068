"""Finds accesses to the same bytes that no declared wait orders, whatever order they happened to run in.

Vector clocks, as in torch.cuda._sanitizer: every stream and the host know how far they have followed every stream;
a wait or a host synchronization joins clocks. Two accesses to overlapping bytes, one of them a write, from two
streams, where the later does not know of the earlier, are a `Hazard`. What the host itself does to a host tensor
is not seen here: there the late copies show the fault by wrong numbers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Clock = dict[int, int]

_HERE = os.path.dirname(os.path.abspath(__file__))
_TORCH = os.sep + os.path.join("site-packages", "torch") + os.sep


class Access(NamedTuple):
    """Bytes ``first`` to ``last`` (exclusive) of a block of device or pinned host memory."""

    block: int
    first: int
    last: int
    writes: bool


class Site(NamedTuple):
    """Where the code stood that queued an operation: the innermost frame outside torch and the simulator."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.function})"


class Past(NamedTuple):
    """One access that was made, and when."""

    stream: int
    time: int
    operation: str
    site: Site
    access: Access


@dataclass(frozen=True)
class Report:
    """Two accesses that nothing orders; ``later`` was queued after ``earlier``."""

    earlier: Past
    later: Past

    def __str__(self) -> str:
        def line(past: Past) -> str:
            kind = "writes" if past.access.writes else "reads"
            return (
                f"{past.operation} on stream {past.stream} {kind} bytes {past.access.first}-{past.access.last}, "
                f"queued at {past.site}"
            )

        return (
            f"block {self.later.access.block}: no wait orders\n  {line(self.earlier)}\nand\n  {line(self.later)}\n"
            "Let the later stream wait for an event recorded after the earlier operation, or call "
            "Tensor.record_stream where the later one reuses memory that was freed."
        )


class Hazard(RuntimeError):
    """A missing wait. ``report`` has both sides."""

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report


def call_site() -> Site:
    """The innermost Python frame that is neither torch's nor the simulator's."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_HERE) and _TORCH not in name and "contextlib" not in name:
            return Site(name, frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    return Site("autograd", 0, "backward")


class Detector:
    """Clocks of all streams and of the host, and the accesses that later ones must still be ordered after.

    Args:
        strict: raise `Hazard` at the operation that completes one; else collect them in ``found``.
        allowed: says of a report that it is known and not ours; such ones are collected in ``tolerated``.
    """

    def __init__(self, strict: bool = True, allowed: Callable[[Report], bool] = lambda report: False) -> None:
        self.strict = strict
        self.allowed = allowed
        self.found: list[Report] = []
        self.tolerated: list[Report] = []
        self._clocks: dict[int, Clock] = {}
        self._host: Clock = {}
        self._past: dict[int, list[Past]] = {}

    def clock_of(self, stream: int) -> Clock:
        """What ``stream`` knows at its end, the host's knowledge included: it queued the work."""
        clock = self._clocks.setdefault(stream, {})
        _join(clock, self._host)
        return dict(clock)

    def join(self, stream: int, clock: Clock) -> None:
        _join(self._clocks.setdefault(stream, {}), clock)

    def join_host(self, clock: Clock) -> None:
        _join(self._host, clock)

    def forget(self, block: int) -> None:
        """Drop a block's accesses: it is given back after all of them are known to have passed."""
        self._past.pop(block, None)

    def submit(self, stream: int, operation: str, accesses: Sequence[Access], site: Site) -> None:
        """Note that ``operation`` was queued on ``stream``; raises `Hazard` where strict."""
        clock = self._clocks.setdefault(stream, {})
        _join(clock, self._host)
        time = clock.get(stream, 0) + 1
        pasts = [Past(stream, time, operation, site, a) for a in accesses if a.block and a.first < a.last]
        for past in pasts:
            for earlier in self._past.get(past.access.block, ()):
                if _conflict(earlier.access, past.access) and not _follows(clock, stream, earlier):
                    self._meet(Report(earlier, past))
        clock[stream] = time
        for past in pasts:
            kept = self._past.get(past.access.block, ())
            # Whatever is ordered after this access is ordered after those it covers and follows.
            kept = [e for e in kept if not (_covers(past.access, e.access) and _follows(clock, stream, e))]
            self._past[past.access.block] = [*kept, past]

    def _meet(self, report: Report) -> None:
        if self.allowed(report):
            self.tolerated.append(report)
            return
        self.found.append(report)
        if self.strict:
            raise Hazard(report)


def _follows(clock: Clock, stream: int, past: Past) -> bool:
    return past.stream == stream or clock.get(past.stream, 0) >= past.time


def _conflict(one: Access, other: Access) -> bool:
    return (one.writes or other.writes) and one.first < other.last and other.first < one.last


def _covers(new: Access, old: Access) -> bool:
    return new.first <= old.first and old.last <= new.last and (new.writes or not old.writes)


def _join(clock: Clock, other: Clock) -> None:
    for stream, time in other.items():
        if clock.get(stream, 0) < time:
            clock[stream] = time
