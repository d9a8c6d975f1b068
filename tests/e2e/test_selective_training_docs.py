"""docs/selective-training-under-zero.md: its scripts print what it says, on plain DeepSpeed and on ours."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "selective-training-under-zero.md"
SCRIPTS = sorted((ROOT / "docs" / "selective_training").glob("*.py"))
QUICK = "momentum"  # the one that the default run has
# What ours says in every row of a script; elsewhere than in `memory`, where each row has its own.
OURS = {"momentum": "0.0e+00", "old_gradient": "0.0e+00", "resume": "0.0e+00", "step_count": "1.00",
        "accessors": "moments", "reentrant": "TrainingError"}  # fmt: skip


def tables() -> dict[str, str]:
    """The tables of the page, by the name of the script that is linked above each."""
    found = re.findall(r"^\[(\w+)\.py\]\(selective_training/\1\.py\)\n```\n(.*?)```", PAGE.read_text(), re.M | re.S)
    return dict(found)


def printed(script: Path) -> str:
    """The table that ``script`` prints, as the only rank of a job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, **rank, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return "".join(line + "\n" for line in result.stdout.splitlines() if "|" in line)


def test_the_page_has_a_table_of_each_script_and_each_is_short() -> None:
    assert sorted(tables()) == [script.stem for script in SCRIPTS]
    assert [script.name for script in SCRIPTS if len(script.read_text().splitlines()) > 40] == []


@pytest.mark.parametrize(
    "script",
    [pytest.param(s, marks=[] if s.stem == QUICK else pytest.mark.slow, id=s.stem) for s in SCRIPTS],
)
def test_a_script_shows_what_the_page_says(script: Path) -> None:
    table = printed(script)
    assert table == tables()[script.stem], "the page is out of date"
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()[1:]]
    assert any(plain != ours for _, plain, ours in rows)
    if script.stem == "memory":
        assert all(float(ours) < 0.5 * float(plain) for _, plain, ours in rows)
    else:
        assert {ours for *_, ours in rows} == {OURS[script.stem]}
