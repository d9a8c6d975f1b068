"""The report: one HTML file that opens from disk, and its charts as SVGs beside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from ds_agsel.files import write_atomically
from ds_agsel.report import charts, matrix_charts
from ds_agsel.report.outcome import outcome_table
from ds_agsel.report.rows import share_rows, uses_of_rows
from ds_agsel.report.runs import Run
from ds_agsel.report.text import bytes_text, printable, seconds_text

SHOWN_ROWS = 20  # of those that were refused most
WITHOUT_PERCENT = ("all", "fixed", "replay")  # policies that do not look at select_percent


@dataclass(frozen=True)
class Chart:
    """A chart on the page: ``images`` by theme name, as data URIs."""

    title: str
    note: str
    alt: str
    images: dict[str, str]


def write_report(runs: Sequence[Run], path: Path) -> list[Path]:
    """Write the page to ``path`` and the light SVGs to the folder ``STEM_files`` beside it; return all files."""
    folder = path.with_name(f"{path.stem}_files")
    folder.mkdir(parents=True, exist_ok=True)
    written = [path]

    def chart(name: str, title: str, note: str, drawing: charts.Drawing) -> Chart:
        images = {}
        for look, theme in charts.THEMES.items():
            data = charts.svg(drawing, theme)
            images[look] = f"data:image/svg+xml;base64,{base64.b64encode(data).decode()}"
            if look == "light":
                file = folder / f"{name}.svg"
                file.write_bytes(data)
                written.append(file)
        return Chart(title, note, f"{title}. {note}", images)

    together = _charts_of_all(runs, chart)
    sections = [
        {
            "run": run,
            "charts": _charts_of(run, chart, _file_name(run, runs)),
            "shares": share_rows(run.choices, run.block_names),
            "refused": [use for use in uses_of_rows(run.choices)[:SHOWN_ROWS] if use.z < 0],
        }
        for run in runs
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ds_agsel.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"bytes": bytes_text, "seconds": seconds_text, "printable": printable}
    html = environment.get_template("page.html.j2").render(
        title=" · ".join(run.name for run in runs),
        outcome=outcome_table(runs),
        rows=[_overview(run) for run in runs],
        together=together,
        sections=sections,
        problems=[problem for run in runs for problem in run.problems],
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    write_atomically(path, html)
    return written


def _charts_of_all(runs: Sequence[Run], chart: Any) -> list[Chart]:
    found = []
    if any(line.loss is not None for run in runs for line in run.measured):
        note = "Lines: an exponential mean of the logged steps, which are faint behind it. Dots: validation."
        found.append(chart("loss", "Loss", note, charts.losses(runs)))
    if any(run.step_seconds() for run in runs):
        found.append(chart("step_time", "Step time", "Medians, explore and exploit steps apart.",
                           charts.step_seconds(runs)))  # fmt: skip
    if any(run.state_bytes() for run in runs):
        note = (
            "Adam's moments, a rank's share. Full fine-tuning and the formula (of a mean step) are computed from the "
            "parameters. On the card: the most that rank 0 had there when a step had ended. Kept: on its card or its "
            "host at the last step, for every block updated so far."
        )
        found.append(chart("memory", "Optimizer-state memory", note, charts.memory(runs)))
    if any(run.traffic() for run in runs):
        note = (
            "This run's bytes were counted where they moved, on rank 0. Full fine-tuning's are computed: this run's "
            "bytes per element, times all parameters."
        )
        found.append(chart("traffic", "Traffic of a step", note, charts.traffic(runs)))
    return found


def _charts_of(run: Run, chart: Any, name: str) -> list[Chart]:
    if not run.steps:
        return []
    return [
        chart(f"{name}_selection", "Selected blocks", "Filled where a step updated the block.",
              charts.heat_map(run)),
        chart(f"{name}_counts", "Updates of each block", "Over all steps so far.", charts.update_counts(run)),
        chart(f"{name}_phases", "Explore and exploit", "ε, and below which steps explored.", charts.timeline(run)),
        *_charts_of_matrices(run, chart, name),
    ]  # fmt: skip


def _charts_of_matrices(run: Run, chart: Any, name: str) -> list[Chart]:
    if not run.matrices:
        return []
    share = sum(matrix.entries for matrix in run.matrices) / sum(matrix.numel for matrix in run.matrices)
    return [
        chart(f"{name}_energy", "Energy in the trained entries",
              f"Of the gradients before they were last chosen; {100 * share:.3g} % of the elements of "
              f"{len(run.matrices)} matrices.", matrix_charts.captured_energy(run.matrices)),
        chart(f"{name}_entries", "Which entries are trained",
              "The first directions of each line of the longer side; each kind's mean over the layers.",
              matrix_charts.entries_by_line(run.matrices)),
    ]  # fmt: skip


def _overview(run: Run) -> dict[str, Any]:
    losses = [line.loss for line in run.measured if line.loss is not None]
    return {
        "name": run.name,
        "policy": run.policy,
        "percent": None if run.policy in WITHOUT_PERCENT else run.select_percent,
        "blocks": len(run.block_names) or None,
        "explore": run.num_steps("explore") if run.steps else None,
        "exploit": run.num_steps("exploit") if run.steps else None,
        "share": run.share_of_parameters(),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "validation": run.validation[-1][1] if run.validation else None,
        "step_seconds": {phase: times["all"] for phase, times in sorted(run.step_seconds().items())},
        "state_bytes": run.state_bytes(),
        "finished": run.is_finished,
    }


def _file_name(run: Run, runs: Sequence[Run]) -> str:
    """Return a name for the run's files: its letters and digits, numbered."""
    letters = re.sub(r"[^A-Za-z0-9._-]+", "_", run.name).strip("._") or "run"
    return f"{runs.index(run) + 1}_{letters}"
