"""Logs that are damaged, crafted or not there yet: the line is named, the rest is shown."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_report import NAMES, Terminal, write_run

from ds_agsel import cli
from ds_agsel.errors import DataError
from ds_agsel.report import charts, watch
from ds_agsel.report.runs import MAX_PROBLEMS, read_run


def shown(folder: Path) -> str:
    """What `watch` makes of the run."""
    terminal = Terminal()
    watch.watch(folder, once=True, console=terminal.console)
    return terminal.text()


def page(folder: Path) -> str:
    """What `report` makes of the run."""
    file = folder.parent / "report.html"
    assert cli.main(["report", str(folder), "--output", str(file)]) == 0
    return file.read_text()


def append(file: Path, *lines: Any) -> None:
    with open(file, "a") as log:
        log.writelines(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)


TRAIN = {"event": "train", "step": 7, "loss": 1.0, "seconds": 1.0}


@pytest.mark.parametrize(
    ("name", "line", "problem"),
    [
        ("metrics.jsonl", {**TRAIN, "phase": 3}, 'metrics.jsonl, line 8: "phase" is 3, not a text'),
        ("metrics.jsonl", {**TRAIN, "phase": ["explore"]}, "line 8: \"phase\" is ['explore'], not a text"),
        ("metrics.jsonl", {**TRAIN, "step": -1}, 'line 8: "step" is -1, not a step'),
        ("metrics.jsonl", {**TRAIN, "step": 10**40}, 'line 8: "step" is 1000'),
        ("metrics.jsonl", "[" * 100_000 + "\n", "line 8: JSON that is nested too deep"),
        ("selection.jsonl", "[" * 100_000 + "\n", "line 7: JSON that is nested too deep"),
        ("selection.jsonl", {"step": 6, "phase": 0, "blocks": [0]}, "line 7: step 6 with phase 0"),
        ("selection.jsonl", {"step": True, "phase": "explore", "blocks": [0]}, 'line 7: "step" is True'),
    ],
)
def test_a_line_that_can_not_be_is_named_and_the_rest_is_shown(
    tmp_path: Path, name: str, line: Any, problem: str
) -> None:
    folder = write_run(tmp_path / "run")
    append(folder / name, line)
    run = read_run(folder)
    assert len(run.problems) == 1 and problem in run.problems[0], run.problems
    assert (len(run.steps), len(run.measured)) == (6, 6)
    assert "1 unreadable" in shown(folder)


@pytest.mark.parametrize("with_blocks", [True, False])
@pytest.mark.parametrize("index", [400, 10**9])
def test_a_block_index_beyond_the_model_costs_nothing(tmp_path: Path, with_blocks: bool, index: int) -> None:
    folder = write_run(tmp_path / "run", blocks=with_blocks)
    append(folder / "selection.jsonl", {"step": 6, "phase": "exploit", "blocks": [index]})
    began = time.process_time()
    run = read_run(folder)
    if with_blocks or index > 4096:
        limit = "4 that blocks.json names" if with_blocks else "4096 that a log"
        assert f"line 7: block {index} is not one of the {limit}" in run.problems[0]
        assert len(run.block_names) == (4 if with_blocks else 3) and len(run.steps) == 6
    shown(folder)
    for drawing in (charts.heat_map(run), charts.update_counts(run)):  # of 401 rows they once cost 26 s and 2.5 GB
        assert drawing.height < 40
    assert time.process_time() - began < 10


@pytest.mark.parametrize("numels", [[0, 0, 0, 0], [0, 10, 0, 4]])
def test_blocks_without_elements_are_shown(tmp_path: Path, numels: list[int]) -> None:
    folder = write_run(tmp_path / "run")
    described = {"policy": "fixed", "blocks": [{"name": n, "numel": k} for n, k in zip(NAMES, numels)]}
    (folder / "blocks.json").write_text(json.dumps(described))
    assert read_run(folder).problems == []
    assert "model.layers.1" in shown(folder) and "model.layers.1" in page(folder)


@pytest.mark.parametrize("numel", ["Infinity", "NaN", "-1", "1e400", '"12"', "1.5", str(10**400)])
def test_sizes_that_can_not_be_are_named(tmp_path: Path, numel: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "blocks.json").write_text(f'{{"blocks": [{{"name": "a", "numel": {numel}}}]}}')
    [problem] = read_run(folder).problems
    assert "blocks.json: " in problem and "blocks are shown by their indices" in problem
    assert "block 1" in shown(folder)


def test_values_that_are_no_use_are_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    traffic = {"d2h_bytes": float("inf"), "h2d_bytes": -4, "reduced_bytes": 10**400, "gathered_bytes": 0}
    line = {"step": 6, "phase": "exploit", "blocks": [1, 1], "traffic": traffic, "state_bytes": float("nan")}
    append(folder / "selection.jsonl", line)
    append(folder / "metrics.jsonl", {**TRAIN, "loss": 1e308, "seconds": 10**400}, {**TRAIN, "step": 8, "loss": -1e308})
    run = read_run(folder)
    assert run.problems == [] and run.steps[-1].traffic == {} and run.steps[-1].blocks == (1,)
    assert run.counts()[1] == 4
    shown(folder)
    page(folder)


def test_names_can_not_write_to_the_terminal(tmp_path: Path) -> None:
    escape = "\x1b]0;owned\x07\x1b[2J"
    folder = write_run(tmp_path / f"run{escape}")
    described = {"policy": f"p{escape}", "blocks": [{"name": f"{n}{escape}\ud800", "numel": 1} for n in NAMES]}
    (folder / "blocks.json").write_text(json.dumps(described))
    append(folder / "metrics.jsonl", {**TRAIN, "phase": f"x{escape}\ud800"})
    append(folder / "selection.jsonl", {"step": 6, "phase": escape, "blocks": [0]})
    text = shown(folder)
    assert "\x1b" not in text and "\x07" not in text and "\\x1b]0;owned\\x07" in text
    assert "\x1b" not in page(folder)


def test_many_problems_are_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    append(folder / "metrics.jsonl", *["{}\n"] * (MAX_PROBLEMS + 50))
    run = read_run(folder)
    assert run.num_problems == MAX_PROBLEMS + 50 and len(run.problems) == MAX_PROBLEMS + 1
    assert run.problems[-1].endswith("50 problems more")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["explore", "train", "\ud800", "\x1b"]),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
FIELDS = ("step", "event", "phase", "blocks", "loss", "seconds", "lr", "explore_rate", "traffic", "state_bytes", "name",
          "accelerator_state_bytes")  # fmt: skip
LINES = st.lists(st.dictionaries(st.sampled_from(FIELDS), VALUES) | VALUES, max_size=4)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(LINES, LINES, VALUES | st.fixed_dictionaries({"blocks": LINES}), st.binary(max_size=8))
def test_any_logs_are_shown(tmp_path: Path, selection: list[Any], metrics: list[Any], blocks: Any, junk: bytes) -> None:
    for name, lines in (("selection.jsonl", selection), ("metrics.jsonl", metrics), ("blocks.json", [blocks])):
        (tmp_path / name).write_bytes("\n".join(map(json.dumps, lines)).encode() + junk)
    terminal = Terminal()
    watch.watch(tmp_path, once=True, console=terminal.console)
    assert "\x1b" not in terminal.text()


# -- a run that is not there yet


def test_watch_waits_for_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runs" / "first"
    events = iter([lambda: folder.mkdir(parents=True), lambda: write_run(folder / "x"), lambda: None])
    naps = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        next(events)()
        if len(naps) == 2:
            for file in (folder / "x").iterdir():
                file.rename(folder / file.name)

    monkeypatch.setattr(watch.time, "sleep", sleep)
    terminal = Terminal()
    watch.watch(folder, interval_seconds=0.5, console=terminal.console)
    text = terminal.text()
    assert naps == [0.5, 0.5] and text.count("waiting for the folder") == 1 and "steps 6" in text


def test_watch_once_and_a_file_are_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder: not a run"):
        watch.watch(tmp_path / "none", once=True, console=Terminal().console)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is not a folder: not a run"):
        watch.watch(tmp_path / "file", console=Terminal().console)


def test_ctrl_c_ends_the_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupted)
    terminal = Terminal()
    watch.watch(tmp_path / "none", console=terminal.console)
    assert "stopped watching" in terminal.text()


def test_a_console_that_knows_no_unicode_gets_the_view_too(tmp_path: Path) -> None:
    from rich.console import Console

    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    watch.watch(write_run(tmp_path / "run"), once=True, console=Console(file=stream, width=80))
    stream.flush()
