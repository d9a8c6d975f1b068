"""A run in the terminal, while it goes on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ds_agsel.report.runs import Run, read_run
from ds_agsel.report.text import bytes_text, seconds_text

SPARKS = "▁▂▃▄▅▆▇█"
COLOURS = {"explore": "yellow", "exploit": "blue"}


def watch(folder: Path, *, interval_seconds: float = 2.0, once: bool = False, console: Console | None = None) -> None:
    """Show the run in ``folder`` until it is finished or Ctrl-C; ``once``: as it is now.

    Where the output is no terminal, a snapshot follows each change. Raises DataError where the folder is no run.
    """
    console = console or Console()
    run = read_run(folder)
    if once:
        console.print(view(run, console.width))
        return
    try:
        if not console.is_terminal:
            shown = -1
            while True:
                if len(run.steps) + len(run.measured) != shown:
                    shown = len(run.steps) + len(run.measured)
                    console.print(view(run, console.width))
                if run.is_finished:
                    return
                time.sleep(interval_seconds)
                run = read_run(folder)
        with Live(view(run, console.width), console=console, refresh_per_second=4) as live:
            while not run.is_finished:
                time.sleep(interval_seconds)
                run = read_run(folder)
                live.update(view(run, console.width))
    except KeyboardInterrupt:
        console.print("stopped watching; the run goes on")


def view(run: Run, width: int) -> Panel:
    """The run as it stands, for a terminal of ``width`` columns."""
    parts = [_head(run), _loss(run, width), _counts(run, width), _last(run)]
    if run.problems:
        parts.append(Text(f"{len(run.problems)} unreadable: {run.problems[-1]}", style="yellow"))
    state = "finished" if run.is_finished else "no summary yet"
    return Panel(Group(*[part for part in parts if part is not None]), title=Text(f"{run.name} ({state})"))


def _head(run: Run) -> Table:
    table = Table.grid(padding=(0, 3))
    explore, exploit = run.num_steps("explore"), run.num_steps("exploit")
    facts = [f"steps {len(run.steps) or len(run.measured)}", f"explore {explore}, exploit {exploit}"]
    if run.steps and run.steps[-1].explore_rate is not None:
        facts.append(f"ε {run.steps[-1].explore_rate:.3f}")
    share = run.share_of_parameters()
    if share is not None:
        facts.append(f"{100 * share:.1f} % of parameters a step")
    facts += [f"{phase} {seconds_text(times['all'])}" for phase, times in sorted(run.step_seconds().items())]
    states = run.state_bytes()
    if states is not None and "measured" in states:
        facts.append(f"states {bytes_text(states['measured'])} of {bytes_text(states['full'])}")
    for start in range(0, len(facts), 3):
        table.add_row(*[Text(fact) for fact in facts[start : start + 3]])
    return table


def _loss(run: Run, width: int) -> Text | None:
    losses = [line.loss for line in run.measured if line.loss is not None]
    if not losses:
        return None
    validation = f", validation {run.validation[-1][1]:.3f}" if run.validation else ""
    return Text(f"loss {losses[-1]:.3f}{validation}  ") + Text(sparkline(losses, max(10, width - 40)), style="green")


def _counts(run: Run, width: int) -> Table | None:
    if not run.steps:
        return None
    table = Table.grid(padding=(0, 1))
    explore, exploit = run.counts("explore"), run.counts("exploit")
    largest = max(1, *(sum(pair) for pair in zip(explore, exploit)))
    room = max(10, width - 16 - max(len(name) for name in run.block_names))
    selected = set(run.steps[-1].blocks)
    for index, name in enumerate(run.block_names):
        bar = Text("█" * round(exploit[index] / largest * room), style=COLOURS["exploit"])
        bar.append("█" * round(explore[index] / largest * room), style=COLOURS["explore"])
        mark = Text("●" if index in selected else " ", style=COLOURS[run.steps[-1].phase])
        table.add_row(mark, Text(name), Text(str(explore[index] + exploit[index]), justify="right"), bar)
    return table


def _last(run: Run) -> Text | None:
    if not run.steps:
        return None
    text = Text("last steps  ")
    for step in run.steps[-4:]:
        text.append(f"{step.step}: {','.join(map(str, step.blocks))}  ", style=COLOURS[step.phase])
    return text


def sparkline(values: Sequence[float], width: int) -> str:
    """``values`` as at most ``width`` bars, each the mean of its share of them."""
    groups = min(width, len(values))
    bounds = [index * len(values) // groups for index in range(groups + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    low, high = min(means), max(means)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0
    return "".join(SPARKS[round((mean - low) * scale)] for mean in means)
