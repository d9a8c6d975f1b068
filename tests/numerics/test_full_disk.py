"""A save that fails on one rank fails on all, leaves the checkpoint before whole, and does not stop training."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Case, assert_identical, build, finish, run_steps, train

from ds_agsel.errors import CheckpointError

CASE = Case(offload="cpu", dtype="bf16", steps=6)


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """This process's writes fail past 2 KB of a file, as on a full disk (Python has SIGXFSZ ignored)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_with_and_without_room(directory: Path, full_rank: int) -> dict[str, Any]:
    engine = build(CASE)
    run_steps(engine, CASE, 0, 2)
    engine.save_checkpoint(str(directory))
    run_steps(engine, CASE, 2, 3)
    message = None
    if torch.distributed.get_rank() == 0:
        time.sleep(0.5)  # the other rank is at the folder first
    try:
        with no_room() if torch.distributed.get_rank() == full_rank else contextlib.nullcontext():
            engine.save_checkpoint(str(directory))
    except CheckpointError as error:
        message = str(error)
    found = [path.name for path in directory.iterdir() if path.is_dir()]
    latest = (directory / "latest").read_text()
    torch.distributed.barrier()
    return {**finish(engine, run_steps(engine, CASE, 3)), "message": message, "found": found, "latest": latest}


def resume(directory: Path) -> dict[str, Any]:
    engine = build(CASE.but(seed=99))
    engine.load_checkpoint(str(directory))
    return finish(engine, run_steps(engine, CASE, 2))


@pytest.mark.parametrize(("ranks", "full_rank"), [(1, 0), (2, 0), (2, 1)])
def test_the_checkpoint_before_stays_whole(workers, tmp_path, ranks, full_rank):
    failed = workers(ranks).run(save_with_and_without_room, tmp_path, full_rank)
    for run in failed:
        assert "global_step3 could not be written" in run["message"] and "Make room" in run["message"]
        assert run["found"] == ["global_step2"]
        assert run["latest"] == "global_step2"
    expected = workers(ranks).run(train, CASE)
    resumed = workers(ranks).run(resume, tmp_path)
    for run, again, whole in zip(failed, resumed, expected, strict=True):
        for key in ("weights", "partitions"):
            assert_identical(whole[key], run[key])
            assert_identical(whole[key], again[key])
