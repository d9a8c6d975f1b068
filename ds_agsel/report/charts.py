"""The report's charts, each as an SVG for light and dark pages, wide and narrow ones."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ds_agsel.report.runs import PARTS, Run
from ds_agsel.report.text import bytes_text, seconds_text

WIDTH, NARROW_WIDTH = 9.0, 4.4  # inches; 400 pixels show the narrow ones with letters of 11 pixels
MAX_SINGLE_STEPS = 480  # a step a column up to here
MANY_STEPS_COLUMNS = 240  # else several share one, and shades tell how many of them
MAX_NAME_LETTERS, MAX_NARROW_NAME_LETTERS = 34, 18  # of a run's or block's name beside a chart
MAX_ROWS = 160  # of blocks, before rows get thinner and names are left out
MAX_POINTS = 2000  # of a curve; more are drawn as their means
MAX_NOISE_RUNS = 3  # whose single losses are drawn behind their means
STATE_WORDS = {"on_card": "on the card", "measured": "kept"}
TRAFFIC_LABELS = {
    "reduced_bytes": "gradients reduced",
    "d2h_bytes": "gradients to host",
    "h2d_bytes": "weights to device",
    "gathered_bytes": "weights gathered",
    "nvme_read_bytes": "states read from NVMe",
    "nvme_written_bytes": "states written to NVMe",
}


@dataclass(frozen=True)
class Theme:
    """Okabe and Ito's colours, told apart by the colour-blind, on a light or a dark page; ``narrow``: of a phone."""

    name: str
    text: str
    muted: str
    grid: str
    reference: str
    explore: str
    exploit: str
    series: tuple[str, ...]
    narrow: bool = False


LIGHT = Theme(
    "light", "#1b1f24", "#59636e", "#d9dee4", "#b4bdc7", "#d98200", "#0072b2",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a6a00", "#56b4e9"),
)  # fmt: skip
DARK = Theme(
    "dark", "#e8ebee", "#9aa4af", "#39424c", "#56626e", "#f0a830", "#56b4e9",
    ("#56b4e9", "#f08048", "#2fc79c", "#e39ac3", "#e5d85c", "#6fa8dc"),
)  # fmt: skip
THEMES = {
    "light": LIGHT,
    "dark": DARK,
    "light_narrow": replace(LIGHT, narrow=True),
    "dark_narrow": replace(DARK, narrow=True),
}

Draw = Callable[[Figure, Theme], None]


class Drawing(NamedTuple):
    """How a chart is drawn, and how high it is, in inches, on a wide and on a narrow page."""

    draw: Draw
    height: float
    narrow_height: float


def svg(drawing: Drawing, theme: Theme) -> bytes:
    """``drawing`` as an SVG, transparent behind; text stays text."""
    style = {
        "font.size": 10, "font.family": "DejaVu Sans", "text.color": theme.text, "axes.labelcolor": theme.text,
        "xtick.color": theme.muted, "ytick.color": theme.muted, "axes.edgecolor": theme.grid, "grid.color": theme.grid,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.axisbelow": True,
        "axes.titlelocation": "left", "axes.titlesize": 10.5, "axes.titlecolor": theme.text, "text.parse_math": False,
        "svg.fonttype": "none", "svg.hashsalt": "ds_agsel",
    }  # fmt: skip
    size = (NARROW_WIDTH, drawing.narrow_height) if theme.narrow else (WIDTH, drawing.height)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, dpi=100, layout="constrained")
        FigureCanvasSVG(figure)
        drawing.draw(figure, theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def heat_map(run: Run) -> Drawing:
    """Step x block: which blocks each step updated, explore and exploit apart."""
    num_blocks, last = len(run.block_names), run.steps[-1].step
    columns = _num_columns(last + 1)
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
        image[..., 3] = np.where(total > 0, 0.12 + 0.88 * total / max(total.max(), 1e-12), 0)
        axes.imshow(image, aspect="auto", interpolation="none", extent=(-0.5, last + 0.5, num_blocks - 0.5, -0.5))
        _name_blocks(axes, run.block_names, theme)
        axes.set_yticks(np.arange(-0.5, num_blocks), minor=True)
        axes.grid(which="minor", axis="y", linewidth=0.5)
        axes.tick_params(which="both", length=0)
        stronger = "" if theme.narrow else ": the stronger the colour, the more of them"
        shared = f" ({(last + 1) / columns:.0f} a column{stronger})"
        axes.set_xlabel("optimizer step" + (shared if columns <= last else ""))
        _phase_legend(axes, theme)

    return _of_rows(draw, num_blocks, 0.22, 0.22)


def update_counts(run: Run) -> Drawing:
    """Draw how often each block was updated, by phase."""
    explore, exploit = run.counts("explore"), run.counts("exploit")
    places = np.arange(len(run.block_names))

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        axes.barh(places, exploit, color=theme.exploit, height=0.72)
        axes.barh(places, explore, left=exploit, color=theme.explore, height=0.72)
        for place in range(0, len(places), _rows_a_name(len(places))):
            count = explore[place] + exploit[place]
            axes.annotate(str(count), (count, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
        _name_blocks(axes, run.block_names, theme)
        axes.set_ylim(len(places) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("steps that updated the block")
        axes.grid(axis="x", linewidth=0.5)
        _phase_legend(axes, theme)

    return _of_rows(draw, len(places), 0.22, 0.22)


def timeline(run: Run) -> Drawing:
    """Draw ε of each step, and which steps explored."""
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
            top.legend(loc="upper right", fontsize=8 if theme.narrow else None)
        columns = _num_columns(len(explored))
        shares = [part.mean() for part in np.array_split(explored, columns)]
        ends = [np.asarray(matplotlib.colors.to_rgb(colour)) for colour in (theme.exploit, theme.explore)]
        rgb = np.asarray([[(1 - share) * ends[0] + share * ends[1] for share in shares]])
        strip.imshow(rgb, aspect="auto", interpolation="none", extent=(steps[0] - 0.5, steps[-1] + 0.5, 0, 1))
        strip.set_yticks([])
        strip.set_xlabel("optimizer step")
        _phase_legend(strip, theme, y=-1.6)

    return Drawing(draw, 3.2, 3.0)


def losses(runs: Sequence[Run]) -> Drawing:
    """Draw training and validation loss on steps and on wall time."""
    names = [_short(run.name, LIGHT) for run in runs]

    def legend_columns(letters: int) -> int:
        return max(1, min(len(names), letters // (max(map(len, names)) + 8)))

    def draw(figure: Figure, theme: Theme) -> None:
        by_step, by_time = figure.subplots(2, 1) if theme.narrow else figure.subplots(1, 2, sharey=True)
        unit, divisor = "min", 60.0
        longest = max((points[-1][0] for run in runs if (points := run.wall_seconds())), default=0.0)
        if longest < 120:
            unit, divisor = "s", 1.0
        elif longest > 3 * 3600:
            unit, divisor = "h", 3600.0
        handles = []
        for index, (run, name) in enumerate(zip(runs, names)):
            colour = theme.series[index % len(theme.series)]
            dashes = ("-", "--", ":")[index // len(theme.series) % 3]
            handles.append(matplotlib.lines.Line2D([], [], color=colour, linestyle=dashes, label=name))
            points = [(line.step + 1, line.loss) for line in run.measured if line.loss is not None]
            timed = [(seconds / divisor, loss) for seconds, loss in run.wall_seconds()]
            points, timed = _thinned(points), _thinned(timed)
            for axes, series in ((by_step, points), (by_time, timed)):
                if series:
                    x, y = np.asarray(series, dtype=float).T
                    if len(runs) <= MAX_NOISE_RUNS:
                        axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.3)
                    axes.plot(x, _smoothed(y), color=colour, linewidth=1.6, linestyle=dashes)
            if run.validation:
                x, y = np.asarray(run.validation, dtype=float).T
                by_step.plot(x, y, "o", color=colour, markersize=4.5, markeredgecolor=theme.text, markeredgewidth=0.8)
        by_step.set(xlabel="optimizer steps", ylabel="loss", title="on steps")
        by_time.set(xlabel=f"training time ({unit})", title="on wall time")
        for axes in (by_step, by_time):
            axes.grid(linewidth=0.5)
        if not any(run.wall_seconds() for run in runs):
            by_time.set_xticks([])
            by_time.text(0.5, 0.5, "no times were logged", color=theme.muted, ha="center", transform=by_time.transAxes)
        columns = legend_columns(50 if theme.narrow else 110)
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9)

    return Drawing(
        draw,
        3.5 + 0.2 * math.ceil(len(runs) / legend_columns(110)),
        5.4 + 0.2 * math.ceil(len(runs) / legend_columns(50)),
    )


def memory(runs: Sequence[Run]) -> Drawing:
    """Draw the optimizer-state bytes of a rank on top of full fine-tuning's: on the card, and kept anywhere.

    The paper's formula is a mark. Older logs don't say what was on the card.
    """
    shown = [(run, states) for run in runs if (states := run.state_bytes()) is not None]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for place, (_, states) in enumerate(shown):
            axes.barh(place, states["full"], color=theme.reference, height=0.7)
            axes.barh(place, states.get("measured", 0), color=theme.series[1], height=0.5)
            if "on_card" in states:
                axes.barh(place, states["on_card"], color=theme.series[0], height=0.3)
            axes.plot([states["formula"]] * 2, [place - 0.42, place + 0.42], color=theme.text, linewidth=2.4)
            told = [f"{bytes_text(states[key])} {word}" for key, word in STATE_WORDS.items() if key in states]
            told += [f"{bytes_text(states['formula'])} formula", f"{bytes_text(states['full'])} full"]
            _beside_bar(axes, states["full"], place, ", ".join(told), theme)
        _finish_rows(axes, [_short(run.name, theme) for run, _ in shown])
        axes.set_xlabel("optimizer states of a rank")
        patch, line = matplotlib.patches.Patch, matplotlib.lines.Line2D
        handles = [
            patch(color=theme.reference, label="full fine-tuning, 2·P·4 bytes"),
            patch(color=theme.series[0], label="on the card, measured"),
            patch(color=theme.series[1], label="kept on card or host, measured"),
            line([], [], color=theme.text, linewidth=2.4, label="formula, 2·P_selected·4 bytes"),
        ]
        _figure_legend(figure, handles, 3, theme)

    return _of_rows(draw, len(shown), 0.36, 0.62, legend=0.7)


def traffic(runs: Sequence[Run]) -> Drawing:
    """Draw the bytes moved in a mean step, by kind, on top of full fine-tuning's."""
    rows: list[tuple[str, tuple[float, float] | None]] = []
    for run in runs:
        moved = run.traffic() or {}
        if moved and len(runs) > 1:
            rows.append((run.name, None))
        rows += [(TRAFFIC_LABELS[kind], pair) for kind, pair in moved.items()]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for place, (_, pair) in enumerate(rows):
            if pair is not None:
                here, full = pair
                axes.barh(place, full, color=theme.reference, height=0.7)
                axes.barh(place, here, color=theme.series[0], height=0.4)
                told = f"{bytes_text(here)} of {bytes_text(full)}, {100 * here / full:.0f} %"
                _beside_bar(axes, max(here, full), place, told, theme)
        _finish_rows(axes, [name if pair is not None else None for name, pair in rows])
        _head_rows(axes, [(place, name) for place, (name, pair) in enumerate(rows) if pair is None])
        axes.set_xlabel("bytes a step, rank 0")
        patch = matplotlib.patches.Patch
        handles = [
            patch(color=theme.reference, label="full fine-tuning, computed"),
            patch(color=theme.series[0], label="this run, measured"),
        ]
        _figure_legend(figure, handles, 2, theme)

    return _of_rows(draw, len(rows), 0.3, 0.56, legend=0.3)


def step_seconds(runs: Sequence[Run]) -> Drawing:
    """Draw the median step time by phase, and its parts if they were logged."""
    rows: list[tuple[str, dict[str, float] | None]] = []
    for run in runs:
        by_phase = sorted(run.step_seconds().items())
        if by_phase and len(runs) > 1:
            rows.append((run.name, None))
        rows += by_phase
    has_parts = any(part in times for _, times in rows if times for part in PARTS)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for place, (_, times) in enumerate(rows):
            if times is None:
                continue
            left = 0.0
            for part, colour in zip(PARTS, theme.series):
                if part in times:
                    axes.barh(place, times[part], left=left, color=colour, height=0.6)
                    left += times[part]
            if times["all"] > left:
                axes.barh(place, times["all"] - left, left=left, color=theme.reference, height=0.6)
            _beside_bar(axes, max(left, times["all"]), place, seconds_text(times["all"]), theme)
        _finish_rows(axes, [name if times is not None else None for name, times in rows], of_bytes=False)
        _head_rows(axes, [(place, name) for place, (name, times) in enumerate(rows) if times is None])
        axes.set_xlabel("seconds a step, median")
        if has_parts:
            parts = [*zip(PARTS, theme.series), ("other", theme.reference)]
            handles = [matplotlib.patches.Patch(color=colour, label=part) for part, colour in parts]
            _figure_legend(figure, handles, 4, theme)

    return _of_rows(draw, len(rows), 0.3, 0.56)


def _num_columns(num_steps: int) -> int:
    return num_steps if num_steps <= MAX_SINGLE_STEPS else MANY_STEPS_COLUMNS


def _of_rows(draw: Draw, rows: int, inches: float, narrow_inches: float, *, legend: float = 0.0) -> Drawing:
    """Return a chart with a height of ``inches`` per row, for MAX_ROWS rows at most.

    ``legend``: inches to add on a narrow page, where the legend takes several lines.
    """
    shown = min(rows, MAX_ROWS)
    return Drawing(draw, 1.3 + inches * shown, 1.4 + narrow_inches * shown + legend)


def _rows_a_name(rows: int) -> int:
    return math.ceil(rows / MAX_ROWS)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """``points``, or the means of MAX_POINTS groups of neighbours."""
    if len(points) <= MAX_POINTS:
        return points
    return [tuple(group.mean(0)) for group in np.array_split(np.asarray(points, dtype=float), MAX_POINTS)]


def _short(name: str, theme: Theme) -> str:
    """Return ``name``, its middle left out if it is too long: runs differ at both ends."""
    letters = MAX_NARROW_NAME_LETTERS if theme.narrow else MAX_NAME_LETTERS
    if len(name) <= letters:
        return name
    half = (letters - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def _name_blocks(axes: Any, names: Sequence[str], theme: Theme) -> None:
    places = range(0, len(names), _rows_a_name(len(names)))
    size = 9 if len(names) <= 20 and not theme.narrow else 7.5
    axes.set_yticks(places, [_short(names[place], theme) for place in places], fontsize=size)


def _beside_bar(axes: Any, end: float, place: int, text: str, theme: Theme) -> None:
    """Write a bar's value at its end, or below it on a narrow page."""
    if theme.narrow:
        axes.annotate(text, (0, place + 0.36), (2, 0), textcoords="offset points", va="top", fontsize=8)
    else:
        axes.annotate(text, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=8.5)


def _figure_legend(figure: Figure, handles: Sequence[Any], columns: int, theme: Theme) -> None:
    columns = (1 if columns == 3 else 2) if theme.narrow else columns
    figure.legend(handles=handles, loc="outside upper right", ncols=columns, fontsize=8 if theme.narrow else 9)


def _finish_rows(axes: Any, labels: Sequence[str | None], *, of_bytes: bool = True) -> None:
    """Set names, limits and scale of horizontal bars from the top down; a row without a label is a heading's."""
    named = [(place, label) for place, label in enumerate(labels) if label is not None]
    axes.set_yticks([place for place, _ in named], [label for _, label in named])
    axes.set_ylim(len(labels) - 0.3, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    if of_bytes:
        axes.xaxis.set_major_formatter(lambda value, _: bytes_text(value).replace(".00 ", " ").replace(".0 ", " "))
    axes.grid(axis="x", linewidth=0.5)


def _head_rows(axes: Any, heads: Sequence[tuple[int, str]]) -> None:
    for place, name in heads:
        axes.annotate(name, (0, place), (4, -2), textcoords="offset points", va="center", fontsize=9, weight="bold")


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Return the exponential mean over about a fiftieth of the curve."""
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
