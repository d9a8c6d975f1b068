"""The ds_config that `ds-agsel fit` writes trains through the launcher as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_train import lines_of, tiny_model, train  # noqa: F401

from ds_agsel import cli


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_fit_writes_trains(tiny_model: Path, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "ds_config.json"
    wanted = ["--card", "8GiB,10,100,4x16", "--host-memory", "16GiB", "--sequence-length", "128"]
    job = ["--tokens-per-step", "1024", "--no-nvme", "--output", str(file)]
    assert cli.main(["fit", "--model", str(tiny_model), *wanted, *job]) == 0
    result = train(tiny_model, tmp_path / "run", config=str(file), steps="4", test_rows="0")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert len(lines_of(tmp_path / "run" / "selection.jsonl")) == 4
