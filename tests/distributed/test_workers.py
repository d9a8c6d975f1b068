"""The process groups of tests/workers.py: a rank that fails is reported, and the next job gets a new group."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from workers import WorkerError


def misbehave(how: str) -> None:
    print("said before it failed", flush=True)
    if torch.distributed.get_rank() == 1:
        if how == "raises":
            raise KeyError("a rank's own error")
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


def process_and_rank() -> tuple[int, int]:
    return os.getpid(), torch.distributed.get_rank()


@pytest.mark.parametrize(
    ("how", "reported"),
    [("raises", "a rank's own error"), ("dies", "the process died"), ("hangs", "in misbehave")],
)
def test_a_rank_that_fails_is_reported_and_the_next_job_gets_a_new_group(workers, how, reported):
    before = workers(2).run(process_and_rank)
    with pytest.raises(WorkerError) as error:
        workers(2).run(misbehave, how, timeout_seconds=3)
    assert "failed on 1 of 2 ranks" in str(error.value)
    assert "--- rank 1" in str(error.value) and "said before it failed" in str(error.value)
    assert reported in str(error.value)
    after = workers(2).run(process_and_rank)
    assert [rank for _, rank in after] == [0, 1]
    assert not {process for process, _ in before} & {process for process, _ in after}
    for process, _ in before:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
