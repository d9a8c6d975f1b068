"""The paper's experiments at `--scale smoke`, through the real launcher: cells that fail, a stop, going on, tables."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_train import tiny_model  # noqa: F401

ROOT = Path(__file__).parents[2]
CELLS = {
    "search/tiny/adagrad_select/lr-0.001",
    "search/tiny/adagrad_select/lr-0.01",
    "final/tiny/adagrad_select_20/seed-1",
    "final/tiny/full/seed-1",
    "final/tiny/refused/seed-1",
}
REFUSED = "final/tiny/refused/seed-1"
MESSAGE = 'adagrad_select.policy="fixed" needs adagrad_select.fixed_blocks, which is not set.'

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@contextlib.contextmanager
def sweep(model: Path, output: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "launch/reproduce.py", "--scale", "smoke", "--model", f"tiny={model}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*command, "--output", str(output), *words],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def marks(output: Path) -> dict[str, float]:
    """Cell -> when it was marked."""
    found = [*output.glob("*/*/*/*/done.json"), *output.glob("*/*/*/*/failed.json")]
    return {str(path.parent.relative_to(output)): path.stat().st_mtime for path in found}


def test_a_sweep_that_is_stopped_goes_on_and_one_failing_cell_is_a_row(
    tiny_model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    # Stopped in the midst of its first cells, with nothing left running.
    with sweep(tiny_model, tmp_path) as process:
        logs = [tmp_path / name / "log.txt" for name in CELLS if name.startswith("search")]
        deadline = time.monotonic() + 120
        while not all(log.exists() for log in logs):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) >= 2
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "start it again to go on" in said
    assert not any(child.is_running() for child in started)
    assert marks(tmp_path) == {}

    # A part of the cells.
    with sweep(tiny_model, tmp_path, "--only", "search/*", REFUSED) as process:
        said, _ = process.communicate(timeout=400)
    assert process.returncode == 1, said
    first = marks(tmp_path)
    assert set(first) == {name for name in CELLS if name.startswith("search") or name == REFUSED}
    assert f"{REFUSED}, lr 0.001: FAILED: {MESSAGE}" in said

    # The rest: what was run is not run again.
    with sweep(tiny_model, tmp_path) as process:
        said, _ = process.communicate(timeout=400)
    assert process.returncode == 1 and "smoke: 2 of 5 cells to run" in said, said
    second = marks(tmp_path)
    assert set(second) == CELLS and {name: second[name] for name in first} == first

    results: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
    [search] = results["learning_rates"]
    assert search["chosen"] in (0.001, 0.01) and all(loss > 0 for loss in search["losses"].values())
    ours, full, refused = results["cells"]
    assert [ours["method"], full["method"], refused["method"]] == ["adagrad_select_20", "full", "refused"]
    assert ours["lr"] == search["chosen"]
    for cell in (ours, full):
        assert [point["step"] for point in cell["points"]] == [0, 2, 4] and len(cell["step_seconds"]) == 4
        assert cell["points"][-1]["loss"] < cell["points"][0]["loss"]
        assert 0 < cell["points"][1]["processor_seconds"] < cell["processor_seconds"]
        assert cell["accuracy"]["builtin"]["rows"] == 4 and cell["peak_memory_bytes"] > 0
    # fp32 moments of every weight, but for ours, which has them for the blocks that were updated.
    assert 0 < ours["optimizer_state_bytes"] < full["optimizer_state_bytes"]
    assert refused["message"].startswith(MESSAGE)
    tables = (tmp_path / "tables.md").read_text()
    assert f"| refused | 1 | **no result**: {MESSAGE}" in tables and "| full fine-tuning | 1 | " in tables
    assert len(list((tmp_path / "figures").glob("tiny_*.png"))) == 5
    assert not list(tmp_path.glob("final/*/*/*/run/model"))
