"""Each method against those of the plan's ``compare_with``, by seed and held-out row, as numbers and as tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Any

from ..texts import NONE, markdown_head, markdown_row
from . import results
from .differences import Difference, Rows, difference
from .plan import SweepPlan
from .results import CellResult

_Z_95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Comparison:
    """A method less ``reference``, on the same seeds; None where it can't be told.

    Attributes:
        equal_steps: of held-out losses after the last step.
        equal_time: of held-out losses at the processor time of the quickest whole run of the seed.
        no_more_memory: ``equal_steps`` if the method's peak memory in steps is not above the reference's.
        solved: of shares of test problems solved.
    """

    model: str
    method: str
    reference: str
    equal_steps: Difference | None
    equal_time: Difference | None
    no_more_memory: Difference | None
    solved: Difference | None

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison in JSON's types."""
        return asdict(self)


def compare(plan: SweepPlan, cells: Sequence[CellResult]) -> list[Comparison]:
    """Return every method's comparison with each of ``compare_with``, model by model."""
    return [
        _compared([cell for cell in cells if cell.model == model], model, method, reference)
        for model in plan.models
        for reference in plan.compare_with
        for method in plan.methods
        if method != reference
    ]


def _compared(cells: Sequence[CellResult], model: str, method: str, reference: str) -> Comparison:
    def apart(values: Mapping[tuple[str, int], Rows]) -> Difference | None:
        of = [{seed: rows for (name, seed), rows in values.items() if name == wanted} for wanted in (method, reference)]
        return difference(of[0], of[1])

    steps = apart(_at_end(cells))
    peaks = [_peak(cells, name) for name in (method, reference)]
    fits = peaks[0] is not None and peaks[1] is not None and peaks[0] <= peaks[1]
    return Comparison(
        model, method, reference, steps, apart(_at_equal_time(cells)), steps if fits else None, apart(_solved(cells))
    )


def _peak(cells: Sequence[CellResult], method: str) -> float | None:
    peaks = [cell.peak_in_steps_bytes for cell in cells if cell.method == method and cell.peak_in_steps_bytes]
    return statistics.median(peaks) if peaks else None


def _at_end(cells: Sequence[CellResult]) -> dict[tuple[str, int], Rows]:
    return {
        (cell.method, cell.seed): rows
        for cell in cells
        if cell.is_whole and cell.points and (rows := cell.points[-1].rows) is not None
    }


def _at_equal_time(cells: Sequence[CellResult]) -> dict[tuple[str, int], Rows]:
    found = {}
    for seed in {cell.seed for cell in cells}:
        beside = [cell for cell in cells if cell.seed == seed and cell.is_whole]
        budget = results.shared_budget(beside)
        for cell in beside if budget is not None else ():
            rows = rows_at(cell, budget or 0.0)
            if rows is not None:
                found[cell.method, seed] = rows
    return found


def rows_at(cell: CellResult, processor_seconds: float) -> Rows | None:
    """Return the held-out rows after so much processor time, as `results.loss_at` returns the loss."""
    known = [(p.processor_seconds, p.rows) for p in cell.points if p.processor_seconds is not None and p.rows]
    if len(known) < 2:
        return None
    for (start, before), (end, after) in pairwise(known):
        if start <= processor_seconds <= end:
            return before.toward(after, (processor_seconds - start) / (end - start)) if end > start else before
    return known[-1][1]


def _solved(cells: Sequence[CellResult]) -> dict[tuple[str, int], Rows]:
    return {
        (cell.method, cell.seed): Rows(cell.answers, (1.0,) * len(cell.answers))
        for cell in cells
        if cell.is_whole and cell.answers
    }


# -- tables


def lines(plan: SweepPlan, model: str, compared: Sequence[Comparison]) -> Iterator[str]:
    """Yield the tables of ``model``, one for each reference."""
    for reference in plan.compare_with:
        own = [c for c in compared if (c.model, c.reference) == (model, reference)]
        yield from [
            f"### Differences to {plan.label(reference)}",
            "",
            "Held-out loss less that of the same seed and rows there, mean over seeds, with the 95 % interval of a "
            "bootstrap over seeds and rows; **below 0 the method is better**. Bold: the interval leaves 0 out. Equal "
            "processor time: that of the quickest run of the seed. No more memory: where the method's peak in steps is "
            "not above the reference's. Solved: points of percent, **above 0 the method is better**.",
            "",
        ]
        head = ["method", "seeds", "equal steps", "equal processor time", "equal steps, no more memory", "solved"]
        yield from markdown_head(head)
        for c in own:
            known = (c.equal_steps, c.equal_time, c.no_more_memory)
            seeds = str(c.equal_steps.seeds) if c.equal_steps else "0"
            loss = [_text(found, 4) for found in known]
            yield markdown_row([plan.label(c.method), seeds, *loss, _text(c.solved, 1, scale=100)])
        yield ""


def _text(found: Difference | None, digits: int, scale: float = 1) -> str:
    if found is None:
        return NONE
    mean, low, high = (scale * value for value in (found.mean, found.low, found.high))
    text = f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"**{text}**" if found.is_beyond_chance else text


def published_lines(published: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the paper's table can tell: its differences to full fine-tuning, with their own noise.

    The paper gives neither seeds nor intervals. What is known is the noise of so many problems: the interval is that of
    the difference of two independent shares.
    """
    problems: Mapping[str, int] = published.get("problems") or {}
    rows = list(_published_rows(published, problems))
    if not rows:
        return
    yield from [
        "### Differences within the paper's table",
        "",
        "Points of percent to full fine-tuning, with the 95 % interval of two independent shares of "
        + ", ".join(f"{number:,} problems ({name})" for name, number in problems.items())
        + ". Seeds, which it does not report, would widen them. Bold: the interval leaves 0 out.",
        "",
    ]
    methods = list(dict.fromkeys(method for _, _, found in rows for method in found))
    yield from markdown_head(["data", "model", *methods])
    for dataset, model, found in rows:
        yield markdown_row([dataset, model, *(_text(found.get(method), 1) for method in methods)])
    yield ""


def _published_rows(
    published: Mapping[str, Any], problems: Mapping[str, int]
) -> Iterator[tuple[str, str, dict[str, Difference]]]:
    for dataset, models in (published.get("accuracy") or {}).items():
        for model, said in models.items():
            if dataset in problems and "full" in said:
                others = {method: percent for method, percent in said.items() if method != "full"}
                yield dataset, model, {m: _of_shares(p, said["full"], problems[dataset]) for m, p in others.items()}


def _of_shares(percent: float, other: float, problems: int) -> Difference:
    mean = percent - other
    half = _Z_95 * math.sqrt((percent * (100 - percent) + other * (100 - other)) / problems)
    return Difference(mean, mean - half, mean + half, 1)
