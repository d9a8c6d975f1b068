"""`ds-agsel report` and the matrices of which some entries are trained: what is written, read and shown."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_report import write_run

from ds_agsel import cli
from ds_agsel.report.log import SelectionLog
from ds_agsel.report.matrices import MATRICES_FILE, Matrix, by_kind
from ds_agsel.report.runs import read_run
from ds_agsel.selection import Selection
from ds_agsel.sparse.record import MatrixRecord, SparseRecord

NAMES = [f"model.layers.{layer}.mlp.{kind}_proj.weight" for layer in (0, 1) for kind in ("up", "down")]
CHOSEN = MatrixRecord(8, 400, captured=0.7, captured_plain=0.3, chosen=2, lines=20, reach=(6, 2, 0))


def written(**changes: Any) -> dict[str, Any]:
    return {"name": NAMES[0], **vars(CHOSEN), "reach": [6, 2, 0], **changes}


def test_what_is_chosen_is_written_when_it_changes_and_read_again(tmp_path: Path, monkeypatch) -> None:
    sparse = SparseRecord({name: MatrixRecord(8, 400, lines=20) for name in NAMES})
    selection = SimpleNamespace(sparse=sparse, num_steps=0, history=[], blocks=(), config=Selection, samples=None)
    monkeypatch.setattr(SelectionLog, "_blocks", lambda _: {})
    log = SelectionLog(tmp_path / "run", SimpleNamespace(selection=selection))
    file = tmp_path / "run" / MATRICES_FILE
    log.update()
    assert not file.exists()
    for times in (1, 2):
        sparse.matrices.update(dict.fromkeys(NAMES, MatrixRecord(**{**vars(CHOSEN), "chosen": times})))
        log.update()
        assert [matrix["chosen"] for matrix in json.loads(file.read_text())["matrices"]] == [times] * 4
    file.write_text("kept")
    log.update()
    assert file.read_text() == "kept"  # nothing was chosen
    log.close()


def test_the_report_has_the_energy_and_the_entries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / MATRICES_FILE).write_text(json.dumps({"matrices": [written(name=name) for name in NAMES]}))
    matrices = read_run(tmp_path / "run").matrices
    assert matrices[0] == Matrix(NAMES[0], 8, 400, 20, 0.7, 0.3, 2, (6, 2, 0))
    assert {kind: len(members) for kind, members in by_kind(matrices).items()} == {"mlp.up_proj": 2, "mlp.down_proj": 2}
    page = tmp_path / "report.html"
    assert cli.main(["report", str(tmp_path / "run"), "--output", str(page)]) == 0
    text = page.read_text()
    assert "Energy in the trained entries" in text and "Which entries are trained" in text
    assert "2 % of the elements of 4 matrices" in text and "<td>70.0 %</td><td>30.0 %</td><td>2</td>" in text
    energy = next((tmp_path / "report_files").glob("*_energy.svg")).read_text()
    assert "mlp.up_proj" in energy and "as many of the plain basis" in energy
    assert "more than so many trained entries" in next((tmp_path / "report_files").glob("*_entries.svg")).read_text()
    assert "problem" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        {}, {"matrices": 3}, {"matrices": [{}]}, {"matrices": [written(captured=2)]}, {"matrices": [written(lines=0)]},
        {"matrices": [written(reach=[21])]}, {"matrices": [written(reach=[])]}, {"matrices": [written(entries=1.5)]},
        {"matrices": [written(captured_plain=None)]}, {"matrices": [written(reach=5)]},
    ],
)  # fmt: skip
def test_a_wrong_file_is_a_problem_and_no_crash(tmp_path: Path, wrong: Any) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / MATRICES_FILE).write_text(json.dumps(wrong))
    run = read_run(tmp_path / "run")
    assert run.matrices == [] and len(run.problems) == 1 and MATRICES_FILE in run.problems[0]
