"""How long backward takes to come to each block, for a policy that weighs scores against time.

On an accelerator by events in its stream, on a CPU by the clock. Events are read once, after the step's scores, whose
computation was queued behind the last of them: the host has then waited for all of them.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator


class ArrivalTimes:
    """When the last gradient of each block came, from the begin of its backward on: the shortest of the window's."""

    def __init__(self, num_blocks: int) -> None:
        self._event = get_accelerator().Event  # None on a CPU
        self._num_blocks = num_blocks
        self._backwards: list[tuple[Any, dict[int, Any]]] = []  # begin, block -> its last gradient

    def begin(self) -> None:
        """Note that a backward begins."""
        self._backwards.append((self._mark(), {}))

    def note(self, block: int) -> None:
        """Note that a gradient of ``block`` has come."""
        if not self._backwards:
            self.begin()  # by loss.backward()
        self._backwards[-1][1][block] = self._mark()

    def _mark(self) -> Any:
        if self._event is None:
            return time.perf_counter()
        event = self._event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begin: Any, end: Any) -> float:
        if self._event is None:
            return float(end - begin)
        if not end.query():
            end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def seconds(self, group: Any) -> list[float]:
        """Return the mean over the ranks of ``group`` of each block's time, (num_blocks,), equal on all. Collective.

        0 for a block that got no gradient. Of several ranks it costs one all-reduce and one wait for it.
        """
        shortest = [
            min((self._seconds(begin, ends[block]) for begin, ends in self._backwards if block in ends), default=0.0)
            for block in range(self._num_blocks)
        ]
        ranks = dist.get_world_size(group=group)
        if ranks == 1:
            return shortest
        of_ranks = torch.tensor(shortest, dtype=torch.float32, device=get_accelerator().current_device_name())
        dist.all_reduce(of_ranks, group=group)
        found: list[float] = (of_ranks.cpu() / ranks).tolist()
        return found
