"""The figures: loss curves, loss and accuracy by percent, time and memory by method."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from . import results
from .plan import SweepPlan
from .results import CellResult, Point

_CURVES: dict[str, tuple[str, Callable[[Point], float | None]]] = {
    "loss_by_step": ("step", lambda point: point.step),
    "loss_by_wall_time": ("seconds of training", lambda point: point.wall_seconds),
    "loss_by_processor_time": ("processor seconds of training", lambda point: point.processor_seconds),
}
_SWEPT = {"adagrad_select": "AdaGradSelect", "gradient_topk": "gradient_topk"}  # policies drawn by their percent


def draw_all(plan: SweepPlan, cells: Sequence[CellResult], folder: Path) -> list[Path]:
    """Write each figure that has data, one per model and kind; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for model in plan.models:
        whole = [m for m in cells if m.model == model and m.is_whole and m.points]
        if not whole:
            continue
        for name, (label, along) in _CURVES.items():
            if any(along(point) is not None for m in whole for point in m.points[1:]):
                written.append(_save(_curves(plan, whole, label, along), folder / f"{model}_{name}.png"))
        if any(_by_percent(plan, policy) for policy in _SWEPT):
            written.append(_save(_percents(plan, model, whole), folder / f"{model}_by_percent.png"))
        written.append(_save(_time_and_memory(plan, whole), folder / f"{model}_time_and_memory.png"))
    return written


def _curves(plan: SweepPlan, cells: Sequence[CellResult], label: str, along: Callable[[Point], float | None]) -> Figure:
    """Draw held-out loss, a line per seed, a colour per method."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for method, style in _styles(plan, cells):
        for number, m in enumerate(m for m in cells if m.method == method):
            known = [(x, point.loss) for point in m.points if (x := along(point)) is not None]
            width = 2.6 if method == plan.reference else 1.3
            axes.plot(*zip(*known), **style, label=plan.label(method) if number == 0 else None, linewidth=width)
    axes.set(xlabel=label, ylabel="held-out loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    return figure


def _percents(plan: SweepPlan, model: str, cells: Sequence[CellResult]) -> Figure:
    """Draw loss after equal steps, and accuracy with its intervals, by the percent of blocks that a step updates."""
    losses = results.losses_at_equal_steps(cells)
    datasets = list(dict.fromkeys(name for m in cells for name in m.accuracy))
    figure = Figure(figsize=(4.5 * (1 + len(datasets)), 3.8), layout="constrained")
    axes = figure.subplots(1, 1 + len(datasets), squeeze=False)[0]
    for policy, label in _SWEPT.items():
        methods = _by_percent(plan, policy)
        found = {p: s for p, name in methods.items() if (s := results.over_seeds(losses, model, name))}
        _errors(axes[0], label, {p: (s.mean, s.half, s.half) for p, s in found.items()})
        for place, dataset in zip(axes[1:], datasets):
            right = {p: a for p, name in methods.items() if (a := results.mean_accuracy(cells, model, name, dataset))}
            bars = {p: (a.percent, a.percent - a.interval[0], a.interval[1] - a.percent) for p, a in right.items()}
            _errors(place, label, bars)
            place.set(ylabel=f"{dataset}, %")
    axes[0].set(ylabel="held-out loss after equal steps")
    for place in axes:
        place.set(xlabel="blocks a step, %")
        place.grid(alpha=0.3)
        if place.get_legend_handles_labels()[0]:
            place.legend(frameon=False)
    return figure


def _errors(axes: Axes, label: str, points: Mapping[float, tuple[float, float, float]]) -> None:
    if points:
        x = sorted(points)
        middle, below, above = zip(*(points[p] for p in x))
        axes.errorbar(x, middle, yerr=(below, above), marker="o", capsize=3, label=label)


def _by_percent(plan: SweepPlan, policy: str) -> dict[float, str]:
    found = {}
    for name, method in plan.methods.items():
        if method.options.get("policy") == policy and (percent := method.options.get("select-percent")) is not None:
            found[float(percent)] = name
    return dict(sorted(found.items()))


def _time_and_memory(plan: SweepPlan, cells: Sequence[CellResult]) -> Figure:
    """Draw median step seconds with the 90th percentile, and peak memory, a bar per method."""
    figure = Figure(figsize=(10, 1 + 0.3 * len(plan.methods)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for method in reversed(plan.methods):
        own = [m for m in cells if m.method == method and m.step_seconds]
        if not own:
            continue
        label = plan.label(method)
        median = statistics.median(m.step_median for m in own if m.step_median is not None)
        late = statistics.median(m.step_p90 for m in own if m.step_p90 is not None)
        left.barh(label, median, xerr=[[0], [max(0.0, late - median)]], color="#0072b2", capsize=2)
        peaks = [m.peak_in_steps_bytes / 2**30 for m in own if m.peak_in_steps_bytes is not None]
        right.barh(label, statistics.median(peaks) if peaks else 0, color="#009e73")
    left.set(xlabel="seconds a step: median, and up to the 90th percentile")
    right.set(xlabel="peak memory in steps, GiB")
    return figure


def _styles(plan: SweepPlan, cells: Sequence[CellResult]) -> Iterator[tuple[str, dict[str, Any]]]:
    present = [method for method in plan.methods if any(m.method == method for m in cells)]
    colors = [matplotlib.colormaps["tab10"](number) for number in range(10)]
    for number, method in enumerate(present):
        yield method, {"color": colors[number % 10], "linestyle": ("-", "--", ":")[number // 10 % 3]}


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)
    return path
