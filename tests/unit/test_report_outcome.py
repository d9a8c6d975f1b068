"""The report's page begins with what came of the runs, and is read on a phone too."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_report import write_run

from ds_agsel import cli
from ds_agsel.report.outcome import outcome_table
from ds_agsel.report.runs import read_run

SUMMARY = {
    "method": "adagrad_select",
    "model": "smollm2",
    "dataset": "gsm8k",
    "data": {"training_rows": 7473},
    "precision": "bf16",
    "ranks": 2,
    "seconds": 754.0,
    "exact_match_percent": {"before": 1.5, "after": 33.25},
    "peak_memory_bytes": {"host": 3_000_000_000, "accelerator": 1_500_000_000},
    "versions": {"deepspeed": "0.19.8", "torch": "2.13.0"},
}


def run_with(folder: Path, summary: Any, seconds: float = 1.0, policy: str = "adagrad_select") -> Path:
    write_run(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    extra = {"seconds": seconds, "lr": 3e-4}
    text = "".join(json.dumps(line | extra if line["event"] == "train" else line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    described = json.loads((folder / "blocks.json").read_text())
    (folder / "blocks.json").write_text(json.dumps(described | {"policy": policy}))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_the_outcome_of_a_run(tmp_path: Path) -> None:
    run = read_run(run_with(tmp_path / "run", SUMMARY))
    assert {label: texts[0] for label, texts in outcome_table([run])} == {
        "state": "finished",
        "exact match, before → after": "1.5 % → 33.2 %",
        "training loss, first → last": "3.000 → 2.500",
        "validation loss, first → last": "2.250",
        "time of the run": "12 min 34 s",
        "time of a step, mean": "1.00 s",
        "peak memory": "1.50 GB accelerator, 3.00 GB host",
        "model": "smollm2",
        "data": "gsm8k, 7,473 rows",
        "steps": "6",
        "learning rate, largest": "0.0003",
        "precision": "bf16",
        "ranks": "2",
        "versions": "deepspeed 0.19.8, torch 2.13.0",
    }


def test_time_is_told_against_plain_where_it_is_among_the_runs(tmp_path: Path) -> None:
    chosen = read_run(run_with(tmp_path / "chosen", SUMMARY, seconds=0.6))
    every = read_run(run_with(tmp_path / "every", SUMMARY, seconds=1.0, policy="all"))
    plain = run_with(tmp_path / "plain", {**SUMMARY, "method": "full"}, seconds=0.8)
    for name in ("selection.jsonl", "blocks.json"):
        (plain / name).unlink()
    for other, factor in ((every, "0.60 × every"), (read_run(plain), "0.75 × plain")):
        assert dict(outcome_table([chosen, other]))["time of a step against plain"] == [factor, "plain"]
    assert "time of a step against plain" not in dict(outcome_table([chosen, chosen]))


@pytest.mark.parametrize("value", [None, 3, "x\x1b\ud800", [1], {"a": 1}, float("inf"), {"before": "x", "host": -1}])
def test_a_summary_of_anything_is_no_obstacle(tmp_path: Path, value: Any) -> None:
    run = read_run(run_with(tmp_path / "run", dict.fromkeys(SUMMARY, value)))
    for _, texts in outcome_table([run]):
        assert all(text.isprintable() for text in texts)


def test_the_page_begins_with_the_outcome_and_has_charts_for_narrow_windows(tmp_path: Path) -> None:
    folder = run_with(tmp_path / "run", SUMMARY)
    assert cli.main(["report", str(folder), "--output", str(tmp_path / "report.html")]) == 0
    html = (tmp_path / "report.html").read_text()
    assert html.index("33.2 %") < html.index("Selection and what it saved") < html.index("<figure>")
    assert html.count('media="(max-width: 600px)"') == html.count("<figure>") == 7
    narrow = re.findall(r'max-width: 600px\)" srcset="data:image/svg\+xml;base64,([^"]+)"', html)
    assert len(narrow) == 7
    for encoded in narrow:
        drawing = ElementTree.fromstring(base64.b64decode(encoded))
        width = float(drawing.attrib["width"].removesuffix("pt"))  # the unit of the drawing's letters too
        styles = [text.attrib["style"] for text in drawing.iter("{http://www.w3.org/2000/svg}text")]
        letters = [float(size) for style in styles for size in re.findall(r"([\d.]+)px", style)]
        assert letters and min(letters) * 400 / width > 9  # pixels, in a window of 400
