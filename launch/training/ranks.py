"""Collectives of a job: agree, add up, let the main rank go first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from .console import is_first_here, is_main

__all__ = ["MainRankFailed", "add_up", "any_rank", "gather", "is_first_here", "is_main", "main_first"]

Result = TypeVar("Result")


class MainRankFailed(Exception):
    """The main rank met an error, which it reports itself; this rank has only to leave."""


def main_first(work: Callable[[], Result]) -> Result:
    """``work()`` of every rank, the main rank's before the others', which so find its caches. Collective.

    An error of the main rank is raised there, and MainRankFailed on the others.
    """
    failed = torch.zeros(1, dtype=torch.int32, device=get_accelerator().current_device_name())
    result: Any = None
    try:
        if is_main():
            result = work()
    except BaseException:
        failed.fill_(1)
        raise
    finally:
        dist.broadcast(failed, src=0)
    if failed.item():
        raise MainRankFailed
    return result if is_main() else work()


def any_rank(flag: bool) -> bool:
    """Return whether ``flag`` is set on at least one rank. Collective."""
    flags = torch.tensor([flag], dtype=torch.int32, device=get_accelerator().current_device_name())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


def add_up(*values: float) -> list[float]:
    """Return each value's sum over the ranks, in float64. Collective."""
    sums = torch.tensor(values, dtype=torch.float64, device=get_accelerator().current_device_name())
    dist.all_reduce(sums)
    return sums.tolist()


def gather(items: list[Any]) -> list[Any]:
    """Return the items of all ranks in rank order, on every rank; they must be picklable. Collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, items)
    return [item for theirs in everyone for item in theirs]
