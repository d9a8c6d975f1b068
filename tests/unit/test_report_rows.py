"""`ds-agsel report` and the rows that blocks took: what it reads, sums and shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_report import write_run

from ds_agsel import cli
from ds_agsel.report.rows import read_choices, share_of_rows, shares_of_blocks, uses_of_rows
from ds_agsel.report.runs import read_run
from ds_agsel.samples.record import BlockRows, Samples

SAMPLES = {
    "rows": [4, 4],
    "taken": {"1": [[0, 1], [0, 2]], "2": [[0, 3], [0, 1]]},
    "ids": [[7, 8, 9, "x"], [7, 8, 9, 6]],
}


def with_rows(folder: Path, samples: Any) -> Path:
    write_run(folder)
    path = folder / "selection.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["samples"] = samples
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_record_is_written_and_read_again() -> None:
    import torch

    samples = Samples(tail=2)
    for step in range(3):
        samples.name_rows(["a", "b"])
        samples.begin_forward(0)
        samples.note(1, 0, BlockRows(2, torch.tensor([1])))
        samples.note(3, 0, BlockRows(2, None))
        samples.note(5, 0, BlockRows(2, torch.tensor([0])))  # in an explore step: was not chosen
        samples.commit(step, (1, 3))
    assert [record.step for record in samples.history] == [1, 2]
    line = json.loads(json.dumps(samples.history[-1].as_json()))
    assert line == {"rows": [2], "taken": {"1": [[1]], "3": [[0, 1]]}, "ids": [["a", "b"]]}
    assert [(c.block, c.taken) for c in read_choices(line, 4)] == [(1, (1,)), (3, (0, 1))]
    samples.forget()
    samples.commit(3, (1, 3))
    assert samples.history[-1].as_json() == {"rows": [], "taken": {}}


def test_rows_are_summed_and_the_most_refused_come_first() -> None:
    choices = read_choices(SAMPLES, 4)
    assert shares_of_blocks(choices) == {1: 0.5, 2: 0.5}
    assert share_of_rows(choices, {7, 9}) == 5 / 8  # of 7, 8 | 7, 9 | 7, "x" | 7, 8
    assert share_of_rows(choices[:0], {7}) is None
    uses = uses_of_rows(choices)
    assert [(use.id, use.taken, use.choices) for use in uses] == [
        (6, 0, 2),
        (9, 1, 4),
        (8, 2, 4),
        ("x", 1, 2),
        (7, 4, 4),
    ]
    assert uses[-1].z == pytest.approx(2.0) and uses[-1].expected == 2


@pytest.mark.parametrize(
    "wrong",
    [
        3, {"rows": [4]}, {"rows": [4], "taken": {"9": [[0]]}}, {"rows": [4], "taken": {"1": [[4]]}},
        {"rows": [4], "taken": {"1": [[0, 0]]}}, {"rows": [4], "taken": {"1": [[0], [1]]}},
        {"rows": [4], "taken": {"1": [[0]]}, "ids": [[1]]}, {"rows": [1], "taken": {"1": [[0]]}, "ids": [[None]]},
    ],
)  # fmt: skip
def test_a_wrong_record_is_a_problem_and_no_crash(tmp_path: Path, wrong: Any) -> None:
    run = read_run(with_rows(tmp_path / "run", wrong))
    assert len(run.problems) == 1 and '"samples" is' in run.problems[0]


def test_the_report_lists_the_rows_that_were_refused_most(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_rows(tmp_path / "run", SAMPLES)
    assert cli.main(["report", str(folder)]) in (None, 0)
    printed = capsys.readouterr().out
    assert (
        "run: rows that blocks refused most, on rank 0\n  row 6: taken 0 of 2 times, 1.0 expected (z -1.4)" in printed
    )
    page = (folder / "report.html").read_text()
    assert "The rows that were refused most" in page and re.search(r"<td>6</td><td>2</td><td>0</td>", page)
    assert "model.layers.0</td><td>50.0 %" in page
    write_run(tmp_path / "plain")
    cli.main(["report", str(tmp_path / "plain")])
    assert "refused" not in capsys.readouterr().out
