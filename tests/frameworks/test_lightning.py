"""Lightning's DeepSpeedStrategy refuses CPUs: its example runs where a GPU and Lightning are."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "launch" / "examples" / "lightning_trainer.py"


def test_the_example_is_short_and_python():
    text = SCRIPT.read_text()
    ast.parse(text)
    assert len(text.splitlines()) <= 60 and "ds_agsel.install()" in text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Lightning's DeepSpeedStrategy needs a GPU")
def test_the_example_runs():
    pytest.importorskip("lightning")
    done = subprocess.run([sys.executable, str(SCRIPT), "--epochs", "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("update counts:")]
    assert sum(json.loads(line.removeprefix("update counts:"))) == 12 * 2  # 24 rows, 2 a step, 2 blocks
