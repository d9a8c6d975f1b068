"""The measurements of the cells, read from their folders, and their comparisons."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ds_agsel.report.rows import share_of_rows
from ds_agsel.report.runs import read_run

from ..data.options import WRONG_ROWS_FILE
from ..intervals import wilson_interval
from . import plan as plans
from .differences import Rows
from .plan import Cell, SweepPlan
from .running import EVALUATIONS, RUN, Sweep

TEST = "the run's own test problems"


@dataclass(frozen=True)
class Point:
    """Held-out loss after ``step`` steps; seconds are of training alone, up to there. None: not measured.

    ``rows``: the same loss, row by row.
    """

    step: int
    loss: float
    wall_seconds: float | None
    processor_seconds: float | None
    rows: Rows | None = None


@dataclass(frozen=True)
class Accuracy:
    """``correct`` of ``rows`` problems; for a mean over seeds not a whole number."""

    correct: float
    rows: int

    @property
    def percent(self) -> float:
        """Correct answers in percent."""
        return 100 * self.correct / self.rows

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, in percent."""
        low, high = wilson_interval(self.correct, self.rows)
        return 100 * low, 100 * high


@dataclass(frozen=True)
class CellResult:
    """A final cell. ``message`` says why it is not complete; numbers that were not measured are None."""

    model: str
    method: str
    seed: int
    lr: float | None = None
    message: str | None = None
    points: tuple[Point, ...] = ()
    train_losses: tuple[float, ...] = ()
    step_seconds: tuple[float, ...] = ()
    seconds: float | None = None
    processor_seconds: float | None = None
    peak_memory_bytes: int | None = None
    peak_in_steps_bytes: int | None = None
    master_weight_bytes: int | None = None
    optimizer_state_bytes: int | None = None
    gradient_bytes: int | None = None
    accuracy: Mapping[str, Accuracy] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
    answers: tuple[float, ...] = ()  # 1 for each of the run's test problems that was solved, else 0
    wrong_share: float | None = None  # of wrong training rows among those that the blocks took; None without gast

    @property
    def is_whole(self) -> bool:
        """Whether the run ended without an error."""
        return self.message is None

    @property
    def step_median(self) -> float | None:
        """Median seconds per step; None without steps."""
        return statistics.median(self.step_seconds) if self.step_seconds else None

    @property
    def step_p90(self) -> float | None:
        """90th percentile of seconds per step; None without steps."""
        return percentile(self.step_seconds, 90) if self.step_seconds else None

    def as_dict(self) -> dict[str, Any]:
        """Return the cell in JSON's types."""
        accuracy = {name: {**asdict(a), "interval_percent": a.interval} for name, a in self.accuracy.items()}
        points = [{name: value for name, value in vars(point).items() if name != "rows"} for point in self.points]
        rest = {**asdict(replace(self, points=(), answers=())), "accuracy": accuracy, "points": points}
        del rest["answers"]
        return {**rest, "step_median_seconds": self.step_median, "step_p90_seconds": self.step_p90}


def collect(sweep: Sweep) -> list[CellResult]:
    """Return every final cell of the sweep's plan, in its order, also those that failed or were not run."""
    return [_measured(sweep, cell) for cell in plans.final_cells(sweep.plan)]


def _measured(sweep: Sweep, cell: Cell) -> CellResult:
    outcome = sweep.outcome(cell)
    name = (cell.model, cell.method, cell.seed)
    if outcome is None:
        lr, why = sweep.lr_of(cell)
        return CellResult(*name, lr=lr, message=why if lr is None else "not run yet")
    folder = sweep.folder(cell)
    try:
        return read_cell(*name, folder=folder, lr=outcome.lr, message=outcome.message, seconds=outcome.seconds)
    except (OSError, ValueError, KeyError) as error:
        broken = f"its files can't be read: {type(error).__name__}: {error}"
        return CellResult(*name, lr=outcome.lr, message=outcome.message or broken)


def read_cell(
    model: str, method: str, seed: int, *, folder: Path, lr: float, message: str | None, seconds: float
) -> CellResult:
    """Read the cell in ``folder``. Raises OSError, ValueError or KeyError if a whole cell's files are damaged."""
    run = folder / RUN
    metrics = run / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    train = [record for record in records if record["event"] == "train"]
    summary = json.loads((run / "summary.json").read_text()) if message is None else {}
    memory = summary.get("peak_memory_bytes") or {}
    return CellResult(
        model=model,
        method=method,
        seed=seed,
        lr=lr,
        message=message,
        points=points_of(records),
        train_losses=tuple(record["loss"] for record in train),
        step_seconds=tuple(record["seconds"] for record in train),
        seconds=seconds,
        processor_seconds=train[-1].get("processor_seconds") if train else None,
        peak_memory_bytes=memory.get("accelerator") or memory.get("host"),
        peak_in_steps_bytes=memory.get("accelerator") or memory.get("host_in_steps"),
        master_weight_bytes=summary.get("master_weight_bytes"),
        optimizer_state_bytes=summary.get("optimizer_state_bytes"),
        gradient_bytes=summary.get("gradient_bytes"),
        accuracy=_accuracy(folder),
        answers=_answers(folder),
        faults=tuple(summary.get("faults") or ()),
        wrong_share=_wrong_share(run),
    )


def _wrong_share(run: Path) -> float | None:
    file = run / WRONG_ROWS_FILE
    if not file.exists():
        return None
    wrong = set(json.loads(file.read_text(encoding="utf-8")))
    return share_of_rows(read_run(run).choices, wrong)


def points_of(records: Iterable[Mapping[str, Any]]) -> tuple[Point, ...]:
    """Return the held-out losses of a metrics.jsonl, each with the training time spent before it."""
    wall, processor = 0.0, 0.0
    found = []
    for record in records:
        if record["event"] == "train":
            wall += record["seconds"]
            processor = record.get("processor_seconds", math.nan)
        elif record["event"] == "validation" and record["loss"] is not None:
            known = None if math.isnan(processor) else processor
            found.append(Point(record["step"], record["loss"], wall, known, _rows(record)))
    return tuple(found)


def _rows(record: Mapping[str, Any]) -> Rows | None:
    sums = record.get("row_sums")
    if not sums or not all(map(math.isfinite, sums)):
        return None
    return Rows(tuple(sums), tuple(map(float, record["row_tokens"])))


def _answers(folder: Path) -> tuple[float, ...]:
    answers = folder / RUN / "answers_after.jsonl"
    if not answers.exists():
        return ()
    return tuple(
        float(json.loads(line)["correct"]) for line in answers.read_text(encoding="utf-8").splitlines() if line
    )


def _accuracy(folder: Path) -> dict[str, Accuracy]:
    found = {}
    for file in sorted((folder / EVALUATIONS).glob("*/accuracy.json")):
        read = json.loads(file.read_text(encoding="utf-8"))
        found[file.parent.name] = Accuracy(read["correct"], read["rows"])
    right = _answers(folder)
    if not found and right:
        found[TEST] = Accuracy(sum(right), len(right))
    return found


# -- comparisons


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the percentile by linear interpolation between the sorted values."""
    ordered = sorted(values)
    place = percent / 100 * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def loss_at(points: Sequence[Point], processor_seconds: float) -> float | None:
    """Return the held-out loss after so much processor time, interpolated linearly between measurements.

    Beyond the last, its loss: the run had ended. None if processor time was not measured.
    """
    known = [(p.processor_seconds, p.loss) for p in points if p.processor_seconds is not None]
    if len(known) < 2:
        return None
    for (start, before), (end, after) in pairwise(known):
        if start <= processor_seconds <= end:
            return before if end == start else before + (after - before) * (processor_seconds - start) / (end - start)
    return known[-1][1]


def shared_budget(cells: Iterable[CellResult]) -> float | None:
    """Return the budget of "equal processor time": that of the quickest whole run without a fault."""
    spent = [m.processor_seconds for m in cells if m.is_whole and not m.faults and m.processor_seconds]
    return min(spent) if spent else None


def losses_at_equal_time(cells: Sequence[CellResult]) -> dict[tuple[str, str, int], float]:
    """Return (model, method, seed) -> held-out loss at the processor time of the model's and seed's quickest run."""
    found = {}
    for model, seed in dict.fromkeys((m.model, m.seed) for m in cells):
        beside = [m for m in cells if (m.model, m.seed) == (model, seed)]
        budget = shared_budget(beside)
        for m in beside:
            loss = loss_at(m.points, budget) if m.is_whole and budget is not None else None
            if loss is not None:
                found[model, m.method, seed] = loss
    return found


def losses_at_equal_steps(cells: Sequence[CellResult]) -> dict[tuple[str, str, int], float]:
    """Return (model, method, seed) -> held-out loss after the last step, which is the same for all whole runs."""
    return {(m.model, m.method, m.seed): m.points[-1].loss for m in cells if m.is_whole and m.points}


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, and half of the way from the lowest to the highest."""

    mean: float
    half: float
    count: int


def spread(values: Sequence[float]) -> Spread | None:
    """Return the mean and half the range of ``values``; None if there are none."""
    if not values:
        return None
    return Spread(statistics.fmean(values), (max(values) - min(values)) / 2, len(values))


def over_seeds(losses: Mapping[tuple[str, str, int], float], model: str, method: str) -> Spread | None:
    """Return the spread over seeds of the losses of ``model`` and ``method``."""
    return spread([loss for (m, name, _), loss in losses.items() if (m, name) == (model, method)])


def against(losses: Mapping[tuple[str, str, int], float], model: str, method: str, reference: str) -> Spread | None:
    """Return the loss of ``method`` less that of ``reference`` on the same seed and data: above 0, we win."""
    apart = [
        loss - losses[model, reference, seed]
        for (m, name, seed), loss in losses.items()
        if (m, name) == (model, method) and (model, reference, seed) in losses
    ]
    return spread(apart)


def mean_accuracy(cells: Iterable[CellResult], model: str, method: str, dataset: str) -> Accuracy | None:
    """Return the mean over seeds, its interval that of one seed's number of problems: seeds may share them."""
    found = [m.accuracy[dataset] for m in cells if (m.model, m.method) == (model, method) and dataset in m.accuracy]
    if not found:
        return None
    rows = min(accuracy.rows for accuracy in found)
    return Accuracy(rows * statistics.fmean(accuracy.percent / 100 for accuracy in found), rows)


def chosen_rates(sweep: Sweep) -> list[tuple[str, str, dict[float, float | None], float | None]]:
    """Return (model, family, loss of each short run, the one chosen) for every search of the plan."""
    plan: SweepPlan = sweep.plan
    pairs = dict.fromkeys((cell.model, cell.family) for cell in plans.search_cells(plan))
    found = []
    for model, family in pairs:
        losses = sweep.search_losses(model, family)
        found.append((model, family, losses, plans.choose_lr(losses)))
    return found
