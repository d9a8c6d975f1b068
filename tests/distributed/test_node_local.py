"""Nodes without a shared folder (`use_node_local_storage`): each has a manifest of its own, and all decide alike."""

from __future__ import annotations

import os
import unittest.mock
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Case, assert_identical, build, finish, run_steps, train

from ds_agsel import checkpoints
from ds_agsel.errors import CheckpointError

CASE = Case(steps=5, config={"checkpoint": {"use_node_local_storage": True}})


def engine_of_a_node(case: Case) -> Any:
    """Rank r as the only rank of node r."""
    with unittest.mock.patch.dict(os.environ, {"LOCAL_RANK": "0"}):
        return build(case)


def save(directory: Path) -> list[str]:
    own = directory / f"node{torch.distributed.get_rank()}"
    engine = engine_of_a_node(CASE)
    for step in range(4):
        run_steps(engine, CASE, step, step + 1)
        engine.save_checkpoint(str(own), keep=2)
    engine.destroy()
    return sorted(checkpoints.read_manifest(own / "global_step4").files)


def load(directory: Path, tag: str | None) -> dict[str, Any]:
    engine = engine_of_a_node(CASE.but(seed=99))
    try:
        path, _ = engine.load_checkpoint(str(directory / f"node{torch.distributed.get_rank()}"), tag)
    except CheckpointError as error:
        engine.destroy()
        return {"error": str(error)}
    return {"tag": Path(path).parent.name, **finish(engine, run_steps(engine, CASE, engine.global_steps))}


def test_each_node_has_its_own_manifest_and_all_decide_alike(workers, tmp_path):
    of_ranks = workers(2).run(save, tmp_path)
    for rank, files in enumerate(of_ranks):
        assert files == [
            "adagrad_select.json", "mp_rank_00_model_states.pt", f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        ]  # fmt: skip
        assert checkpoints.tags(tmp_path / f"node{rank}") == ["global_step4", "global_step3"]
    whole = workers(2).run(train, CASE)

    def check(tag: str) -> None:
        for expected, loaded in zip(whole, workers(2).run(load, tmp_path, None), strict=True):
            assert loaded["tag"] == tag
            assert_identical(expected["partitions"], loaded["partitions"])

    check("global_step4")
    damaged = tmp_path / "node1" / "global_step4" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for loaded in workers(2).run(load, tmp_path, "global_step4"):
        assert f"{damaged.name} has" in loaded["error"]
    check("global_step3")


def save_where_rank_1_writes_elsewhere(directory: Path) -> str:
    engine = build(CASE.but(config={}))
    run_steps(engine, CASE, 0, 1)
    with pytest.raises(CheckpointError) as caught:
        engine.save_checkpoint(str(directory / f"node{torch.distributed.get_rank()}"))
    engine.destroy()
    return str(caught.value)


def test_a_folder_that_is_not_shared_is_told_at_the_save(workers, tmp_path):
    first, _ = workers(2).run(save_where_rank_1_writes_elsewhere, tmp_path)
    assert "a rank wrote zero_pp_rank_1_mp_rank_00_optim_states.pt" in first and "use_node_local_storage=true" in first
    assert not list(tmp_path.glob("node0/global_step1"))
