"""The report's charts, each as a PNG for light and for dark pages."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ds_agsel.report.runs import PARTS, Run
from ds_agsel.report.text import bytes_text

WIDTH = 9.0  # inches, at 2 x 100 dots
MAX_COLUMNS = 720  # of the heat map: more steps than that share a column
TRAFFIC_LABELS = {
    "reduced_bytes": "gradients reduced",
    "d2h_bytes": "gradients to host",
    "h2d_bytes": "weights to device",
    "gathered_bytes": "weights gathered",
}


@dataclass(frozen=True)
class Theme:
    """Okabe and Ito's colours, told apart by the colour-blind, on a light or a dark page."""

    name: str
    text: str
    muted: str
    grid: str
    explore: str
    exploit: str
    series: tuple[str, ...]


LIGHT = Theme(
    "light", "#1b1f24", "#59636e", "#d9dee4", "#d98200", "#0072b2",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a6a00", "#56b4e9"),
)  # fmt: skip
DARK = Theme(
    "dark", "#e8ebee", "#9aa4af", "#39424c", "#f0a830", "#56b4e9",
    ("#56b4e9", "#f08048", "#2fc79c", "#e39ac3", "#e5d85c", "#6fa8dc"),
)  # fmt: skip
THEMES = (LIGHT, DARK)

Draw = Callable[[Figure, Theme], None]


def png(draw: Draw, height: float, theme: Theme) -> bytes:
    """What ``draw`` draws, ``WIDTH`` x ``height`` inches, transparent behind."""
    style = {
        "font.size": 10, "font.family": "DejaVu Sans", "text.color": theme.text, "axes.labelcolor": theme.text,
        "xtick.color": theme.muted, "ytick.color": theme.muted, "axes.edgecolor": theme.grid, "grid.color": theme.grid,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.axisbelow": True,
        "axes.titlelocation": "left", "axes.titlesize": 10.5, "axes.titlecolor": theme.text, "text.parse_math": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", transparent=True)
    return buffer.getvalue()


def heat_map(run: Run) -> tuple[Draw, float]:
    """Step x block: which blocks each step updated, explore and exploit apart."""
    num_blocks, last = len(run.block_names), run.steps[-1].step
    columns = min(MAX_COLUMNS, last + 1)
    shares = np.zeros((2, num_blocks, columns))
    steps_in = np.zeros(columns)
    for step in run.steps:
        column = step.step * columns // (last + 1)
        steps_in[column] += 1
        shares[int(step.phase == "explore"), list(step.blocks), column] += 1
    shares /= np.maximum(steps_in, 1)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        total = shares.sum(0)
        mix = shares / np.maximum(total, 1e-12)
        rgb = [np.asarray(matplotlib.colors.to_rgb(colour)) for colour in (theme.exploit, theme.explore)]
        image = np.zeros((num_blocks, columns, 4))
        image[..., :3] = mix[0][..., None] * rgb[0] + mix[1][..., None] * rgb[1]
        image[..., 3] = np.where(total > 0, 0.15 + 0.85 * np.minimum(total, 1), 0)
        axes.imshow(image, aspect="auto", interpolation="nearest", extent=(-0.5, last + 0.5, num_blocks - 0.5, -0.5))
        axes.set_yticks(range(num_blocks), run.block_names, fontsize=9 if num_blocks <= 20 else 7)
        axes.set_yticks(np.arange(-0.5, num_blocks), minor=True)
        axes.grid(which="minor", axis="y", linewidth=0.5)
        axes.tick_params(which="both", length=0)
        axes.set_xlabel("optimizer step" if columns == last + 1 else f"optimizer step ({columns} columns)")
        _phase_legend(axes, theme)

    return draw, 1.2 + 0.22 * num_blocks


def update_counts(run: Run) -> tuple[Draw, float]:
    """How often each block was updated, by phase."""
    explore, exploit = run.counts("explore"), run.counts("exploit")
    places = np.arange(len(run.block_names))

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        axes.barh(places, exploit, color=theme.exploit, height=0.72)
        axes.barh(places, explore, left=exploit, color=theme.explore, height=0.72)
        for place, count in enumerate(np.add(explore, exploit)):
            axes.annotate(str(count), (count, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(places, run.block_names, fontsize=9 if len(places) <= 20 else 7)
        axes.set_ylim(len(places) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("steps that updated the block")
        axes.grid(axis="x", linewidth=0.5)
        _phase_legend(axes, theme)

    return draw, 1.2 + 0.22 * len(places)


def timeline(run: Run) -> tuple[Draw, float]:
    """ε of each step, and which steps explored."""
    steps = [step.step for step in run.steps]
    window = max(1, len(steps) // 50)
    explored = np.asarray([step.phase == "explore" for step in run.steps], dtype=float)

    def draw(figure: Figure, theme: Theme) -> None:
        top, strip = figure.subplots(2, sharex=True, height_ratios=[4, 1])
        rates = [(step.step, step.explore_rate) for step in run.steps if step.explore_rate is not None]
        if rates:
            top.plot(*zip(*rates), color=theme.text, linewidth=1.5, label="ε, the probability to explore")
        smooth = np.convolve(explored, np.ones(window), "valid") / window
        if window > 1:
            top.plot(
                steps[window // 2 : window // 2 + len(smooth)], smooth, color=theme.explore, linewidth=1.2,
                label=f"share of {window} steps that explored",
            )  # fmt: skip
        top.set_ylim(-0.03, 1.05)
        top.set_ylabel("probability, share")
        top.grid(linewidth=0.5)
        if rates or window > 1:
            top.legend(loc="upper right")
        rgba = np.asarray([[matplotlib.colors.to_rgb(theme.explore if e else theme.exploit) for e in explored]])
        strip.imshow(rgba, aspect="auto", interpolation="nearest", extent=(steps[0] - 0.5, steps[-1] + 0.5, 0, 1))
        strip.set_yticks([])
        strip.set_xlabel("optimizer step")
        _phase_legend(strip, theme, y=-1.6)

    return draw, 3.2


def losses(runs: Sequence[Run]) -> tuple[Draw, float]:
    """Training and validation loss on steps and on wall time."""

    def draw(figure: Figure, theme: Theme) -> None:
        by_step, by_time = figure.subplots(1, 2, sharey=True)
        unit, divisor = "min", 60.0
        longest = max((points[-1][0] for run in runs if (points := run.wall_seconds())), default=0.0)
        if longest < 120:
            unit, divisor = "s", 1.0
        for index, run in enumerate(runs):
            colour = theme.series[index % len(theme.series)]
            dashes = "-" if index < len(theme.series) else "--"
            points = [(line.step + 1, line.loss) for line in run.measured if line.loss is not None]
            timed = [(seconds / divisor, loss) for seconds, loss in run.wall_seconds()]
            for axes, series in ((by_step, points), (by_time, timed)):
                if series:
                    x, y = np.asarray(series, dtype=float).T
                    axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.3)
                    axes.plot(x, _smoothed(y), color=colour, linewidth=1.6, linestyle=dashes, label=run.name)
            if run.validation:
                x, y = np.asarray(run.validation, dtype=float).T
                label = f"{run.name}, validation"
                by_step.plot(x, y, "o", color=colour, markersize=5, markeredgecolor=theme.text, label=label)
        by_step.set(xlabel="optimizer steps", ylabel="loss", title="on steps")
        by_time.set(xlabel=f"training time ({unit})", title="on wall time")
        for axes in (by_step, by_time):
            axes.grid(linewidth=0.5)
        if by_step.get_legend_handles_labels()[0]:
            by_step.legend(loc="upper right", fontsize=8.5)

    return draw, 3.6


def memory(runs: Sequence[Run]) -> tuple[Draw, float]:
    """Optimizer-state bytes beside full fine-tuning's and the paper's formula."""
    labels = {"full": "full fine-tuning, 2·P·4", "formula": "formula, 2·P_selected·4", "measured": "kept, measured"}
    return _bars(runs, lambda run: {labels[k]: v for k, v in (run.state_bytes() or {}).items()}, "optimizer states")


def traffic(runs: Sequence[Run]) -> tuple[Draw, float]:
    """Bytes moved in a mean step, by kind, beside full fine-tuning's."""

    def values(run: Run) -> dict[str, float]:
        moved = run.traffic() or {}
        return {
            f"{TRAFFIC_LABELS[kind]}, {what}": pair[index]
            for kind, pair in moved.items()
            for index, what in ((1, "full (computed)"), (0, "this run"))
        }

    return _bars(runs, values, "bytes a step, rank 0")


def step_seconds(runs: Sequence[Run]) -> tuple[Draw, float]:
    """Median step time by phase, and its parts where they were logged."""
    rows = [(f"{run.name}, {phase}", times) for run in runs for phase, times in sorted(run.step_seconds().items())]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for place, (_, times) in enumerate(rows):
            left = 0.0
            for part, colour in zip(PARTS, theme.series):
                if part in times:
                    axes.barh(place, times[part], left=left, color=colour, height=0.6)
                    left += times[part]
            if times["all"] > left:
                axes.barh(place, times["all"] - left, left=left, color=theme.grid, height=0.6)
            axes.annotate(f"{times['all']:.3g} s", (max(left, times["all"]), place), (4, 0),
                          textcoords="offset points", va="center", fontsize=8.5)  # fmt: skip
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.12)
        axes.set_xlabel("seconds a step, median (grey: what is neither of the parts)")
        axes.grid(axis="x", linewidth=0.5)
        handles = [matplotlib.patches.Patch(color=c, label=p) for p, c in zip(PARTS, theme.series)]
        figure.legend(handles=handles, loc="outside upper right", ncols=3)

    return draw, 1.3 + 0.34 * len(rows)


def _bars(runs: Sequence[Run], values: Callable[[Run], dict[str, float]], label: str) -> tuple[Draw, float]:
    rows = [(run.name, name, value, index) for index, run in enumerate(runs) for name, value in values(run).items()]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for place, (_, name, value, index) in enumerate(rows):
            reference = name.startswith("full") or name.endswith("(computed)")
            colour = theme.grid if reference else theme.series[index % len(theme.series)]
            axes.barh(place, value, color=colour, height=0.66)
            axes.annotate(bytes_text(value), (value, place), (4, 0), textcoords="offset points", va="center")
        prefix = len({run for run, *_ in rows}) > 1
        axes.set_yticks(range(len(rows)), [f"{run}: {name}" if prefix else name for run, name, *_ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.margins(x=0.14)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter(lambda value, _: bytes_text(value))
        axes.set_xlabel(label)
        axes.grid(axis="x", linewidth=0.5)

    return draw, 1.0 + 0.3 * len(rows)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Exponential mean over about a fiftieth of the curve."""
    weight = 1 - 1 / max(1.0, len(values) / 50)
    smooth, state = np.empty_like(values), values[0]
    for index, value in enumerate(values):
        state = weight * state + (1 - weight) * value
        smooth[index] = state
    return smooth


def _phase_legend(axes: Any, theme: Theme, y: float = 1.0) -> None:
    patch = matplotlib.patches.Patch
    handles = [patch(color=theme.explore, label="explore"), patch(color=theme.exploit, label="exploit")]
    location = "lower right" if y == 1.0 else "lower left"
    axes.legend(handles=handles, loc=location, bbox_to_anchor=(1.0 if y == 1.0 else 0.0, y), ncols=2, borderaxespad=0.2)
