"""What a run writes of its selection, and the numbers for monitors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from ds_agsel import policies
from ds_agsel.blocks import find_blocks
from ds_agsel.config import SelectionConfig
from ds_agsel.lottery import Lottery
from ds_agsel.policies.replay import Replay
from ds_agsel.report import metrics
from ds_agsel.report.log import SelectionLog
from ds_agsel.selection import Selection


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 2)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(3)])


def _optimizer(**fields: object) -> SimpleNamespace:
    model = _Model()
    config = SelectionConfig(**{"policy": "cyclic", "select_percent": 50, **fields})
    blocks = find_blocks(model)
    indices = tuple(block.index for block in blocks)
    context = policies.PolicyContext(config, len(blocks), 2, tuple(b.name for b in blocks), steps_per_epoch=10)
    selection = Selection(blocks, policies.create(context), Lottery(indices), config, dict(model.named_parameters()))
    return SimpleNamespace(selection=selection, state_bytes=lambda: 7, accelerator_state_bytes=lambda: 3)


def _train(optimizer: SimpleNamespace, steps: int, log: SelectionLog | None = None) -> None:
    for _ in range(steps):
        if optimizer.selection.plan.blocks is None:
            optimizer.selection.choose([1.0, 9.0, 2.0, 8.0])
        optimizer.selection.current_traffic.stepped_numel = 5
        optimizer.selection.commit()
        if log is not None:
            log.update()


def _lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "selection.jsonl").read_text().splitlines()]


def test_each_step_is_a_line_and_the_blocks_stand_beside(tmp_path: Path) -> None:
    optimizer = _optimizer()
    log = SelectionLog(tmp_path / "run", optimizer)
    _train(optimizer, 3, log)
    log.update()  # nothing new
    log.close()
    lines = _lines(tmp_path / "run")
    assert [(line["step"], tuple(line["blocks"])) for line in lines] == [
        (record.step, record.blocks) for record in optimizer.selection.history
    ]
    assert all((line["state_bytes"], line["accelerator_state_bytes"]) == (7, 3) for line in lines)
    assert all(line["traffic"]["stepped_numel"] == 5 for line in lines)
    blocks = json.loads((tmp_path / "run" / "blocks.json").read_text())
    assert [block["name"] for block in blocks["blocks"]] == [block.name for block in optimizer.selection.blocks]
    assert blocks["total_numel"] == 4 * 2 + 3 * 6


def test_a_resumed_run_goes_on_where_its_checkpoint_was(tmp_path: Path) -> None:
    optimizer = _optimizer()
    log = SelectionLog(tmp_path, optimizer)
    _train(optimizer, 2, log)
    saved = optimizer.selection.state_dict()
    _train(optimizer, 3, log)
    log.close()
    with open(tmp_path / "selection.jsonl", "a") as file:
        file.write('{"step": 5, "ph')  # killed while writing
    resumed = _optimizer()
    resumed.selection.load_state_dict(saved)
    log = SelectionLog(tmp_path, resumed)
    _train(resumed, 2, log)
    log.close()
    assert [line["step"] for line in _lines(tmp_path)] == [0, 1, 2, 3]
    assert all("traffic" in line for line in _lines(tmp_path))


def test_a_resume_into_an_empty_folder_writes_the_steps_before_too(tmp_path: Path) -> None:
    optimizer = _optimizer()
    _train(optimizer, 2)
    log = SelectionLog(tmp_path, optimizer)
    _train(optimizer, 1, log)
    log.close()
    assert [("traffic" in line, line["step"]) for line in _lines(tmp_path)] == [(False, 0), (False, 1), (True, 2)]


def test_the_replay_policy_reads_it(tmp_path: Path) -> None:
    optimizer = _optimizer()
    log = SelectionLog(tmp_path, optimizer)
    _train(optimizer, 4, log)
    log.close()
    config = SelectionConfig(policy="replay", replay_file=str(tmp_path / "selection.jsonl"))
    names = tuple(block.name for block in optimizer.selection.blocks)
    replay = Replay(policies.PolicyContext(config, 4, 2, names, steps_per_epoch=None))
    assert [tuple(replay.plan(step, [0] * 4)) for step in range(4)] == [r.blocks for r in optimizer.selection.history]


def test_scalars_of_an_exploit_and_of_an_explore_step() -> None:
    optimizer = _optimizer()
    assert metrics.scalars(optimizer.selection) == {}
    _train(optimizer, 1)
    numels = [block.numel for block in optimizer.selection.blocks]
    updated = sum(numels[index] for index in optimizer.selection.history[-1].blocks)
    found = metrics.scalars(optimizer.selection)
    assert found["explore"] == 0 and found["blocks"] == 2
    assert found["share_of_parameters"] == updated / sum(numels)
    assert found["saved_gradient_bytes"] == 4 * (sum(numels) - updated)
    assert found["saved_state_bytes"] == 8 * (sum(numels) - updated)
    explorer = _optimizer(policy="gradient_topk")
    _train(explorer, 1)
    assert explorer.selection.history[-1].blocks == (1, 3)
    found = metrics.scalars(explorer.selection)
    assert found["explore"] == 1 and found["explore_rate"] == 1 and found["saved_gradient_bytes"] == 0
    assert metrics.block_counts(explorer.selection)["block_counts/layers.2"] == 1


def test_shares_of_the_steps_since_the_last_log() -> None:
    optimizer = _optimizer()
    _train(optimizer, 3)
    last = [record.blocks for record in optimizer.selection.history[-2:]]
    shares = metrics.block_shares(optimizer.selection, 2)
    assert list(shares) == [f"selected/{block.name}" for block in optimizer.selection.blocks]
    assert list(shares.values()) == [sum(index in blocks for blocks in last) / 2 for index in range(4)]
    assert sum(shares.values()) == 2  # blocks a step
    assert set(metrics.block_shares(optimizer.selection, 0).values()) == {0}


@pytest.mark.parametrize(
    ("counts", "entropy"), [((0, 0), 0), ((3, 0), 0), ((2, 2), 1), ((1, 1, 2), 1.5 * math.log(2) / math.log(3))]
)
def test_count_entropy(counts: tuple[int, ...], entropy: float) -> None:
    assert metrics.count_entropy(counts) == pytest.approx(entropy)
