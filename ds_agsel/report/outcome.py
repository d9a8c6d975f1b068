"""The results of the runs, first on the page: quality, time, memory, and the model and data."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ds_agsel.report.runs import Run, number
from ds_agsel.report.text import bytes_text, printable, seconds_text

_MAX_LETTERS = 120  # characters of a text from a summary


def outcome_table(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Rows of the page's first table: a label and a text for each run. Rows without a value in any run are left out.

    "time of a step against plain" is there where one of the runs is plain DeepSpeed, or selects every block.
    """
    plain = next((run for run in runs if _is_plain(run) and _mean_step_seconds(run)), None)
    rows: list[tuple[str, Callable[[Run], str | None]]] = [
        ("state", lambda run: "finished" if run.is_finished else "unfinished"),
        ("exact match, before → after", _exact_match),
        ("training loss, first → last", lambda run: _from_to([line.loss for line in run.measured])),
        ("validation loss, first → last", lambda run: _from_to([loss for _, loss in run.validation])),
        ("time of the run", lambda run: _told(seconds_text, _summary_number(run, "seconds"))),
        ("time of a step, mean", lambda run: _told(seconds_text, _mean_step_seconds(run))),
        ("time of a step against plain", lambda run: _against(run, plain)),
        ("peak memory", _peak_memory),
        ("model", lambda run: _summary_text(run, "model")),
        ("data", _data),
        ("steps", lambda run: str(max(len(run.steps), len(run.measured))) or None),
        ("learning rate, largest", _learning_rate),
        ("precision", lambda run: _summary_text(run, "precision")),
        ("ranks", lambda run: _told(lambda value: f"{value:.0f}", _summary_number(run, "ranks"))),
        ("versions", _versions),
    ]
    table = [(label, [fact(run) for run in runs]) for label, fact in rows]
    return [(label, [text or "–" for text in texts]) for label, texts in table if any(texts)]


def _is_plain(run: Run) -> bool:
    return run.policy == "all" or (not run.steps and _summary_text(run, "method") == "full")


def _at(run: Run, *path: str) -> Any:
    value: Any = run.summary
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _summary_number(run: Run, *path: str) -> float | None:
    return number(_at(run, *path))


def _summary_text(run: Run, *path: str) -> str | None:
    value = _at(run, *path)
    return printable(value)[:_MAX_LETTERS] if isinstance(value, str) else None


def _told(words: Callable[[float], str], value: float | None) -> str | None:
    return None if value is None else words(value)


def _from_to(values: Sequence[float | None]) -> str | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return f"{known[0]:.3f} → {known[-1]:.3f}" if len(known) > 1 else f"{known[0]:.3f}"


def _exact_match(run: Run) -> str | None:
    before, after = (_summary_number(run, "exact_match_percent", when) for when in ("before", "after"))
    if before is None and after is None:
        return None
    return " → ".join("–" if value is None else f"{value:.1f} %" for value in (before, after))


def _mean_step_seconds(run: Run) -> float | None:
    seconds = [line.seconds for line in run.measured if line.seconds is not None]
    return statistics.fmean(seconds) if seconds else None


def _against(run: Run, plain: Run | None) -> str | None:
    here, there = _mean_step_seconds(run), None if plain is None else _mean_step_seconds(plain)
    if plain is None or here is None or not there:
        return None
    return "plain" if run is plain else f"{here / there:.2f} × {plain.name}"


def _peak_memory(run: Run) -> str | None:
    found = [
        f"{bytes_text(value)} {where}"
        for where in ("accelerator", "host")
        if (value := _summary_number(run, "peak_memory_bytes", where))
    ]
    return ", ".join(found) or None


def _data(run: Run) -> str | None:
    name, rows = _summary_text(run, "dataset"), _summary_number(run, "data", "training_rows")
    return name if name is None or rows is None else f"{name}, {rows:,.0f} rows"


def _learning_rate(run: Run) -> str | None:
    rates = [line.lr for line in run.measured if line.lr is not None]
    return f"{max(rates):.3g}" if rates else None


def _versions(run: Run) -> str | None:
    versions = _at(run, "versions")
    if not isinstance(versions, dict):
        return None
    return printable(", ".join(f"{name} {version}" for name, version in versions.items()))[: 2 * _MAX_LETTERS] or None
