"""`make gpu-check DEVICE=cpu`: every part of the check runs through on a machine without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_dry_run_goes_through(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "gpu-check", "DEVICE=cpu", f"PYTHON={sys.executable}", f"ARGS=--output {tmp_path}"],
        cwd=ROOT, env={**os.environ, "MAKEFLAGS": ""}, capture_output=True, text=True, timeout=1400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    [folder] = tmp_path.iterdir()
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert {name: part["outcome"] for name, part in found.items()} == dict.fromkeys(
        ["matrix", "tests", "memory", "time", "floor", "trace", "transfers"], "ok"
    )
    assert {case["outcome"] for case in found["matrix"]["cases"]} == {"ok"}
    assert all(case["estimate"]["accelerator"] > 0 for case in found["memory"]["cases"] if case["outcome"] == "ok")
    page = (folder / "report.md").read_text()
    assert "| exploit-20 |" in page and "zero3-visit-all" in page
    assert "| exploit step, our bar | 0.7 |" in page and "step, our bar | 0.7 | not measured" not in page
