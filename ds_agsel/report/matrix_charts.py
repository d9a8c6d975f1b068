"""The charts of matrices of which some entries are trained: the energy in them, and which they are."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ds_agsel.report.charts import Drawing, Theme
from ds_agsel.report.matrices import Matrix, by_kind


def captured_energy(matrices: Sequence[Matrix]) -> Drawing:
    """Draw the share of the gradients' energy in the trained entries, and in as many of the plain basis, by layer."""
    kinds = by_kind(matrices)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for number, (_, members) in enumerate(kinds.items()):
            colour, places = theme.series[number % len(theme.series)], range(len(members))
            axes.plot(places, [m.captured for m in members], "o-", color=colour, markersize=3.5, linewidth=1.4)
            axes.plot(places, [m.captured_plain for m in members], "x:", color=colour, markersize=4, linewidth=1.2)
        axes.set_ylim(0, 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.set(xlabel="layer, from the input", ylabel="share of the energy")
        axes.grid(linewidth=0.5)
        handles = _kinds_legend(kinds, theme)
        handles += [
            Line2D([], [], color=theme.text, marker="o", markersize=3.5, label="trained entries"),
            Line2D([], [], color=theme.text, marker="x", linestyle=":", label="as many of the plain basis"),
        ]
        _legend(figure, handles, theme)

    return Drawing(draw, 3.6, 4.2)


def entries_by_line(matrices: Sequence[Matrix]) -> Drawing:
    """Draw which entries are trained: the share of lines that have more than so many, each kind's mean over layers."""
    kinds = by_kind(matrices)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for number, members in enumerate(kinds.values()):
            places = max(len(m.reach) for m in members)
            more_than = [0, *(2**power for power in range(places - 1))]
            shares = [
                sum(m.reach[place] / m.lines for m in members if place < len(m.reach)) / len(members)
                for place in range(places)
            ]
            axes.plot(more_than, shares, "o-", color=theme.series[number % len(theme.series)], markersize=3.5)
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        axes.set_ylim(-0.02, 1.03)
        axes.set(xlabel="more than so many trained entries", ylabel="share of the lines")
        axes.grid(linewidth=0.5)
        _legend(figure, _kinds_legend(kinds, theme), theme)

    return Drawing(draw, 3.2, 3.8)


def _kinds_legend(kinds: dict[str, list[Matrix]], theme: Theme) -> list[Line2D]:
    colours = theme.series
    return [
        Line2D([], [], color=colours[number % len(colours)], linewidth=2, label=kind)
        for number, kind in enumerate(kinds)
    ]


def _legend(figure: Figure, handles: Sequence[Line2D], theme: Theme) -> None:
    columns = 1 if theme.narrow else 3
    figure.legend(handles=handles, loc="outside upper right", ncols=columns, fontsize=8 if theme.narrow else 9)
