"""The policy `replay`: an earlier run's selections again, or the line of the file that stands against it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from policy_contexts import make, selection_file

from ds_agsel import policies
from ds_agsel.config import SelectionConfig
from ds_agsel.errors import ConfigError
from ds_agsel.policies import PolicyContext


def test_replay_gives_back_an_earlier_runs_blocks(tmp_path: Path) -> None:
    path = selection_file(
        tmp_path,
        {"step": 0, "phase": "explore", "blocks": [4, 1]},
        {"step": 1, "phase": "exploit", "blocks": [0, 5], "time": 3.2},
        "",
        {"step": 1, "phase": "exploit", "blocks": [0, 5]},  # written again after a resume
    )
    policy = make(policy="replay", replay_file=path, steps_per_epoch=None)
    assert [policy.plan(step, [0] * 6) for step in (0, 1)] == [(1, 4), (0, 5)]
    expected = f"adagrad_select.replay_file={json.dumps(path)} has no step 2; its steps are 0 to 1. Train no further"
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}"):
        policy.plan(2, [0] * 6)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "Expecting property name"),
        ("[1]", 'it is not an object with "step" and "blocks"'),
        ({"step": 1}, 'it is not an object with "step" and "blocks"'),
        ({"step": "1", "blocks": [1]}, "\"step\" is '1', not an integer from 0 on"),
        ({"step": -1, "blocks": [1]}, '"step" is -1, not an integer from 0 on'),
        ({"step": True, "blocks": [1]}, '"step" is True, not an integer from 0 on'),
        ({"step": 1, "blocks": []}, '"blocks" is [], not a list of block indices'),
        ({"step": 1, "blocks": 3}, '"blocks" is 3, not a list of block indices'),
        ({"step": 1, "blocks": [1.0]}, '"blocks" is [1.0], not a list of block indices'),
        ({"step": 1, "blocks": [2, 2]}, '"blocks" is [2, 2], which names a block twice'),
        ({"step": 1, "blocks": [1, 6]}, '"blocks" is [1, 6], and the blocks that can be chosen here are 0 to 5'),
        ({"step": 1, "blocks": [-1]}, '"blocks" is [-1], and the blocks that can be chosen here are 0 to 5'),
        ({"step": 0, "blocks": [2]}, "step 0 stands in an earlier line with other blocks"),
    ],
)
def test_replay_refuses_a_bad_line_with_its_number(tmp_path: Path, line: object, problem: str) -> None:
    path = selection_file(tmp_path, {"step": 0, "phase": "explore", "blocks": [1]}, line)
    with pytest.raises(ConfigError) as caught:
        make(policy="replay", replay_file=path)
    assert str(caught.value).startswith(f"adagrad_select.replay_file={json.dumps(path)}, line 2: {problem}")
    assert str(caught.value).endswith('A line is {"step": 0, "phase": "exploit", "blocks": [3, 7]}.')


def test_replay_reads_the_model_s_indices_where_blocks_stand_outside_the_lottery(tmp_path: Path) -> None:
    path = selection_file(tmp_path, {"step": 0, "phase": "explore", "blocks": [5, 2]})
    config = SelectionConfig(policy="replay", replay_file=path)
    lottery = PolicyContext(config, 3, 1, ("b", "c", "f"), None, block_indices=(1, 2, 5))
    assert policies.create(lottery).plan(0, [0] * 3) == (1, 2)
    with pytest.raises(ConfigError, match=r"and the blocks that can be chosen here are \[1, 3, 5\]\."):
        policies.create(dataclasses.replace(lottery, block_indices=(1, 3, 5)))


def test_replay_refuses_a_missing_a_binary_and_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.jsonl\" can't be read: .* Use the path of an earlier run's selection"):
        make(policy="replay", replay_file=str(tmp_path / "none.jsonl"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="binary\" can't be read: "):
        make(policy="replay", replay_file=str(tmp_path / "binary"))
    with pytest.raises(ConfigError, match=r"selection.jsonl\" is empty. Use the selection.jsonl of a run that took"):
        make(policy="replay", replay_file=selection_file(tmp_path, ""))


def test_a_file_of_a_run_with_other_blocks_is_refused(tmp_path: Path) -> None:
    """The same indices, as of a run of another granularity, would update other parameters."""
    path = selection_file(tmp_path, {"step": 0, "blocks": [2]})
    config = SelectionConfig(policy="replay", replay_file=path)
    here = PolicyContext(config, 3, 1, ("b", "c", "f"), None, block_indices=(1, 2, 5))
    for text in ("not JSON", "{}", json.dumps({"blocks": [{"index": 2, "name": "c"}]})):
        (tmp_path / "blocks.json").write_text(text)
        assert policies.create(here).plan(0, [0, 0, 0]) == (1,)
    (tmp_path / "blocks.json").write_text(json.dumps({"blocks": [{"index": 2, "name": "c.norms"}]}))
    with pytest.raises(ConfigError, match=r'was written with other blocks: 2 is "c.norms" there and "c" here. Use'):
        policies.create(here)
