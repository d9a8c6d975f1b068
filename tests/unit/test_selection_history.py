"""A long run: counts are of all steps; the history in memory and in checkpoints is a tail; selection.jsonl is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_selection import make, step
from test_selection_log import _lines, _optimizer, _train

from ds_agsel import selection as selection_module
from ds_agsel.report.log import SelectionLog

STEPS, TAIL = 25, 7


@pytest.fixture
def short_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection_module, "TAIL_STEPS", TAIL)


def long_run() -> Any:
    whole = make(select_percent=40)
    for _ in range(STEPS):
        whole.current_traffic.d2h_bytes = whole.num_steps
        step(whole)
    return whole


def test_the_default_tail_is_small_in_a_checkpoint() -> None:
    assert selection_module.TAIL_STEPS == 1000


def test_counts_are_of_all_steps_and_history_and_traffic_are_tails(short_tail: None) -> None:
    whole = long_run()
    assert whole.num_steps == sum(whole.steps_by_phase.values()) == STEPS
    assert sum(whole.update_counts) == 2 * STEPS and min(whole.steps_by_phase.values()) > 0
    assert [record.step for record in whole.history] == list(range(STEPS - TAIL, STEPS))
    assert [entry.step for entry in whole.traffic] == list(range(STEPS - TAIL, STEPS))
    assert whole.mean_traffic["d2h_bytes"] == sum(range(STEPS)) / STEPS
    assert len(whole.state_dict()["history"]) == TAIL


def test_a_resume_from_a_tail_equals_not_stopping(short_tail: None) -> None:
    whole, first = long_run(), make(select_percent=40)
    for _ in range(11):
        step(first)
    second = make(select_percent=40)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.num_steps == 11 and second.mean_traffic is None
    for _ in range(STEPS - 11):
        step(second)
    assert second.state_dict() == whole.state_dict()


def test_a_checkpoint_of_an_older_ds_agsel_has_its_steps_counted(short_tail: None, monkeypatch) -> None:
    monkeypatch.setattr(selection_module, "TAIL_STEPS", STEPS)
    state = long_run().state_dict()
    old = {key: value for key, value in state.items() if not key.endswith("_steps")} | {"version": 1}
    monkeypatch.setattr(selection_module, "TAIL_STEPS", TAIL)
    found = make(select_percent=40)
    found.load_state_dict(old)
    assert found.state_dict() == {**state, "history": state["history"][-TAIL:]}


def test_the_log_has_every_step_also_after_a_resume(short_tail: None, tmp_path: Path, caplog) -> None:
    optimizer = _optimizer()
    log = SelectionLog(tmp_path, optimizer)
    _train(optimizer, STEPS, log)
    state = optimizer.selection.state_dict()
    _train(optimizer, 3, log)
    log.close()
    lines = _lines(tmp_path)
    resumed = _optimizer()
    resumed.selection.load_state_dict(state)
    log = SelectionLog(tmp_path, resumed)
    assert _lines(tmp_path) == lines[:STEPS]
    _train(resumed, 3, log)
    assert _lines(tmp_path) == lines
    _train(resumed, TAIL + 2)
    log.update()
    assert "lacks 2 steps" in caplog.text and _lines(tmp_path)[-1]["step"] == STEPS + 3 + TAIL + 1
