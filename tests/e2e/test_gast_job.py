"""Rows chosen block by block in the training job: support data, wrong answers with the truth aside, the report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_peers import assert_measured, peer, summary_of
from test_train import ROOT, environment, tiny_model, train  # noqa: F401

from ds_agsel import cli
from ds_agsel.report.runs import read_run

pytestmark = pytest.mark.timeout(300)


def test_a_job_scores_its_rows_against_support_data_and_names_them(
    tiny_model: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = json.loads((ROOT / "configs/zero2_offload.json").read_text())
    config["adagrad_select"] = {"select_percent": 50, "gast": {"support": "data", "support_samples": 2}}
    (tmp_path / "ds_config.json").write_text(json.dumps(config))
    output = tmp_path / "run"
    result = train(
        tiny_model, output, config=str(tmp_path / "ds_config.json"), steps="3", support="validation",
        builtin_wrong_percent="30", test_rows="0",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "each learns from 4 of the 8 rows of a micro-batch, drawn by alignment" in result.stdout + result.stderr
    assert len(json.loads((output / "wrong_rows.json").read_text())) == 48
    choices = read_run(output).choices
    assert choices and all(len(choice.taken) == 4 and len(set(choice.ids)) == 8 for choice in choices)
    assert {row for choice in choices for row in choice.ids} <= set(range(160))
    cli.main(["report", str(output)])
    assert "rows that blocks refused most" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("draw", ["sample", "random", "top"])
def test_gast_alone_is_a_method_to_compare_with(tiny_model: Path, tmp_path: Path, draw: str) -> None:  # noqa: F811
    result = peer(tiny_model, tmp_path, "gast", f"draw={draw}", "zero2")
    assert_measured(tmp_path, summary_of(tmp_path, result), "gast")
    assert all(2 * len(choice.taken) == choice.rows for choice in read_run(tmp_path).choices)


def test_wrong_answers_are_the_built_in_datas_alone(tmp_path: Path) -> None:
    result = train("nothing", tmp_path, dataset="gsm8k", builtin_wrong_percent="10")
    assert result.returncode != 0
    assert "--builtin-wrong-percent=10 is only for --dataset builtin" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "lines"),
    [(["cost", "--rounds", "4", "--layers", "2", "--length", "8", "--rows", "4"], 6),
     (["task", "--seeds", "2", "--steps", "3"], 17)],
)  # fmt: skip
def test_the_tables_of_the_page_are_printed(options: list[str], lines: int) -> None:
    words = [sys.executable, "-m", "launch.pages.gast", *options]
    result = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len([line for line in result.stdout.splitlines() if line.startswith("|")]) == lines
