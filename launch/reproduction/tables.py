"""The results as Markdown: nothing is left out, neither rows that lose nor rows that failed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..texts import MIB, NONE, markdown_cell, markdown_head, markdown_row, number_text
from . import comparisons, results
from .plan import SweepPlan
from .results import Accuracy, CellResult, Spread

Losses = Mapping[tuple[str, str, int], float]
Rates = Sequence[tuple[str, str, Mapping[float, float | None], float | None]]
MEAN = "Mean over seeds ± half of the range; no ± where there is one seed."


def page(plan: SweepPlan, cells: Sequence[CellResult], rates: Rates, published: Mapping[str, Any], machine: str) -> str:
    """Return all tables, by model."""
    compared = comparisons.compare(plan, cells)
    lines = [f"# {plan.name}: results", "", *filter(None, [plan.about.strip(), ""]), machine, ""]
    for model in plan.models:
        own = [m for m in cells if m.model == model]
        lines += [f"## {model}", ""]
        lines += [*_accuracy(plan, model, own, published), *_losses(plan, model, own), *_costs(plan, model, own)]
        lines += [*comparisons.lines(plan, model, compared), *_troubles(plan, own)]
    lines += [*_rates(rates), *_published(published), *comparisons.published_lines(published)]
    return "\n".join(lines).rstrip() + "\n"


def _accuracy(plan: SweepPlan, model: str, cells: Sequence[CellResult], published: Mapping[str, Any]) -> Iterator[str]:
    datasets = list(dict.fromkeys(name for m in cells for name in m.accuracy))
    if not datasets:
        return
    yield from [
        "### Accuracy",
        "",
        "Percent of problems solved, mean over seeds, with Wilson's 95 % interval for one "
        "seed's number of problems. Paper: – where its number could not be had.",
        "",
    ]
    columns = [column for name in datasets for column in (name, "paper")]
    yield from markdown_head(["method", *columns])
    for method in plan.methods:
        row = [_name(plan, cells, method)]
        for name in datasets:
            said = ((published.get("accuracy") or {}).get(name) or {}).get(model) or {}
            row += [_accuracy_text(results.mean_accuracy(cells, model, method, name)), number_text(said.get(method), 1)]
        yield markdown_row(row)
    yield ""


def _losses(plan: SweepPlan, model: str, cells: Sequence[CellResult]) -> Iterator[str]:
    steps, time = results.losses_at_equal_steps(cells), results.losses_at_equal_time(cells)
    reference = plan.label(plan.reference)
    budgets = [budget for seed in plan.seeds if (budget := results.shared_budget([m for m in cells if m.seed == seed]))]
    spent = f" ({', '.join(f'{budget:.0f} s' for budget in budgets)})" if budgets else ""
    yield from [
        "### Held-out loss",
        "",
        f"{MEAN} Equal steps: after {plan.steps}. Equal processor time: at that",
        f"of the quickest whole run without a fault of the same seed{spent}, between two measured losses by linear",
        "interpolation; processor time is that of training steps alone, and a slower run was then in the midst of its",
        f"learning-rate schedule. Last columns: the difference from {reference}, same seed and data: **above 0",
        f"{reference} is better, below 0 it loses.**",
        "",
    ]
    head = ["method", "seeds", "equal steps", "equal processor time", "Δ equal steps", "Δ equal processor time"]
    yield from markdown_head(head)
    for method in plan.methods:
        found = [results.over_seeds(losses, model, method) for losses in (steps, time)]
        apart = [results.against(losses, model, method, plan.reference) for losses in (steps, time)]
        if method == plan.reference:
            apart = [None, None]
        seeds = str(found[0].count) if found[0] else "0"
        yield markdown_row([
            _name(plan, cells, method), seeds, *map(_spread_text, found), *(_spread_text(a, sign="+") for a in apart)
        ])  # fmt: skip
    yield ""


def _costs(plan: SweepPlan, model: str, cells: Sequence[CellResult]) -> Iterator[str]:
    yield from [
        "### Time and memory",
        "",
        "Medians over seeds. A step's seconds are wall time, its processor seconds the mean over the run. Bytes are",
        "the most that was held. Peak memory is the accelerator's, on a CPU the process's resident memory; loading the",
        "model, in fp32, has a peak of its own.",
        "",
    ]
    yield from markdown_head([
        "method", "step median s", "step p90 s", "processor s / step", "optimizer state MiB",
        "master weights MiB", "gradients MiB", "peak memory MiB", "peak in steps MiB", "whole cell s",
        *(["wrong rows among the taken, %"] if any(m.wrong_share is not None for m in cells) else []),
    ])  # fmt: skip
    for method in plan.methods:
        own = [m for m in cells if m.method == method and m.is_whole]
        yield markdown_row([
            _name(plan, cells, method),
            _median(own, lambda m: m.step_median, 2),
            _median(own, lambda m: m.step_p90, 2),
            _median(own, lambda m: m.processor_seconds and m.processor_seconds / len(m.step_seconds), 2),
            _median(own, lambda m: _mib(m.optimizer_state_bytes), 0),
            _median(own, lambda m: _mib(m.master_weight_bytes), 0),
            _median(own, lambda m: _mib(m.gradient_bytes), 0),
            _median(own, lambda m: _mib(m.peak_memory_bytes), 0),
            _median(own, lambda m: _mib(m.peak_in_steps_bytes), 0),
            _median(own, lambda m: m.seconds, 0),
            *([_wrong_share(own)] if any(m.wrong_share is not None for m in cells) else []),
        ])  # fmt: skip
    yield ""


def _troubles(plan: SweepPlan, cells: Sequence[CellResult]) -> Iterator[str]:
    """Yield cells that are not complete, and faults of those that are; equal ones of several seeds once."""
    said: dict[tuple[str, str], list[int]] = {}
    for m in cells:
        for text in [f"**no result**: {m.message}"] if m.message is not None else m.faults:
            said.setdefault((m.method, text), []).append(m.seed)
    if not said:
        return
    yield from ["### Failed, or wrong", "", "† above: a fault was seen.", ""]
    yield from markdown_head(["method", "seeds", "what"])
    for (method, text), seeds in said.items():
        yield markdown_row([plan.label(method), ", ".join(map(str, seeds)), markdown_cell(text)])
    yield ""


def _name(plan: SweepPlan, cells: Sequence[CellResult], method: str) -> str:
    return plan.label(method) + (" †" if any(m.faults for m in cells if m.method == method) else "")


def _rates(rates: Rates) -> Iterator[str]:
    if not rates:
        return
    yield from [
        "## Learning rates",
        "",
        "Held-out loss at the end of a short run of each; the lowest is taken. At an edge a still better one may lie "
        "beyond.",
        "",
    ]
    yield from markdown_head(["model", "family", "short runs", "taken", ""])
    for model, family, losses, chosen in rates:
        tried = ", ".join(f"{lr:g}: {'failed' if loss is None else f'{loss:.4f}'}" for lr, loss in losses.items())
        edge = "edge" if chosen is not None and len(losses) > 1 and chosen in (min(losses), max(losses)) else ""
        yield markdown_row([model, family, tried or NONE, f"{chosen:g}" if chosen is not None else NONE, edge])
    yield ""


def _published(published: Mapping[str, Any]) -> Iterator[str]:
    yield from ["## What the paper says", "", f"{published['source']}:", ""]
    yield from (f"- {claim}" for claim in published["claims"])
    yield ""


def _spread_text(value: Spread | None, sign: str = "") -> str:
    if value is None:
        return NONE
    return f"{value.mean:{sign}.4f}" + (f" ± {value.half:.4f}" if value.count > 1 else "")


def _accuracy_text(value: Accuracy | None) -> str:
    if value is None:
        return NONE
    low, high = value.interval
    return f"{value.percent:.1f} [{low:.1f}, {high:.1f}] of {value.rows}"


def _median(cells: Sequence[CellResult], read: Callable[[CellResult], float | None], digits: int) -> str:
    values = [value for m in cells if (value := read(m)) is not None]
    return number_text(statistics.median(values) if values else None, digits)


def _wrong_share(cells: Sequence[CellResult]) -> str:
    """Return the mean over seeds, in percent: rows of single batches make single runs' shares differ."""
    values = [100 * m.wrong_share for m in cells if m.wrong_share is not None]
    return number_text(statistics.fmean(values) if values else None, 1)


def _mib(count: int | None) -> float | None:
    return None if count is None else count / MIB
