"""A run in the terminal, while it goes on."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ds_agsel.errors import DataError
from ds_agsel.report.runs import Run, read_run
from ds_agsel.report.text import bytes_text, printable, seconds_text

SPARKS = "▁▂▃▄▅▆▇█"
LEAST_BAR = 8  # characters of the longest bar, below which blocks do not share a line
COLOURS = {"explore": "yellow", "exploit": "blue"}


def watch(folder: Path, *, interval_seconds: float = 2.0, once: bool = False, console: Console | None = None) -> None:
    """Show the run in ``folder`` until it is finished or Ctrl-C; ``once``: as it is now.

    Waits for a run that has written nothing yet, its folder included. Where the output is no terminal, a snapshot
    follows each change. Raises DataError if ``once`` finds no run.
    """
    console = console or Console()
    if once:
        console.print(view(read_run(folder), console.width))
        return
    try:
        run = _first_sight(folder, interval_seconds, console)
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
        with Live(view(run, *console.size), console=console, refresh_per_second=4) as live:
            while not run.is_finished:
                time.sleep(interval_seconds)
                run = read_run(folder)
                live.update(view(run, *console.size))
    except KeyboardInterrupt:
        console.print("stopped watching; the run goes on")


def _first_sight(folder: Path, interval_seconds: float, console: Console) -> Run:
    """Wait for a run in ``folder`` and return it."""
    told = False
    while True:
        try:
            return read_run(folder)
        except DataError as error:
            if not told:
                where = "a run in" if folder.is_dir() else "the folder"
                console.print(Text(f"waiting for {where} {printable(str(folder))} (Ctrl-C leaves)"))
                told = True
            reason = error
        if folder.exists() and not folder.is_dir():
            raise reason
        time.sleep(interval_seconds)


def view(run: Run, width: int, height: int | None = None) -> Panel:
    """Return a panel of the run as it is now, ``width`` columns wide and at most ``height`` lines high."""
    inner = width - 4
    above = [*_facts(run, inner), *_loss(run, inner)]
    below = [*_last(run, inner)]
    if run.problems:
        last = run.problems[-1].removeprefix(printable(f"{run.folder}/"))
        below.append(_line(f"{run.num_problems} unreadable: {last}", inner, style="yellow"))
    room = None if height is None else max(1, height - 3 - len(above) - len(below))
    return Panel(Group(*above, *_counts(run, inner, room), *below), title=Text(f"{run.name} ({_state(run)})"))


def _state(run: Run) -> str:
    if run.is_finished:
        return "finished"
    if run.changed is None:
        return "unfinished"
    seconds = max(0, round(time.time() - run.changed))
    return f"unfinished, written {f'{seconds} s' if seconds < 60 else seconds_text(seconds)} ago"


def _line(text: str, width: int, style: str = "") -> Text:
    line = Text(text, style=style, no_wrap=True)
    line.truncate(width, overflow="ellipsis")
    return line


def _facts(run: Run, width: int) -> list[Text]:
    explore, exploit = run.num_steps("explore"), run.num_steps("exploit")
    facts = [f"steps {len(run.steps) or len(run.measured)}", f"explore {explore}, exploit {exploit}"]
    if run.steps and run.steps[-1].explore_rate is not None:
        facts.append(f"ε {run.steps[-1].explore_rate:.3f}")
    share = run.share_of_parameters()
    if share is not None:
        facts.append(f"{100 * share:.1f} % of parameters a step")
    for phase, times in sorted(run.step_seconds().items()):
        facts.append(f"{phase} step {seconds_text(times['all'])}" if phase != "step" else f"step {times['all']:.2f} s")
    states = run.state_bytes()
    if states is not None and "on_card" in states:
        facts.append(f"states on the card {bytes_text(states['on_card'])} of {bytes_text(states['full'])}")
    elif states is not None and "measured" in states:
        facts.append(f"states {bytes_text(states['measured'])} of {bytes_text(states['full'])}")
    lines = [facts[0]]
    for fact in facts[1:]:  # whole facts: as many to a line as fit
        if len(lines[-1]) + 3 + len(fact) <= width:
            lines[-1] += f" · {fact}"
        else:
            lines.append(fact)
    return [_line(line, width) for line in lines]


def _loss(run: Run, width: int) -> list[Text]:
    losses = [line.loss for line in run.measured if line.loss is not None]
    if not losses:
        return []
    validation = f", validation {run.validation[-1][1]:.3f}" if run.validation else ""
    told = f"loss {losses[-1]:.3f}{validation}  "
    return [Text(told) + Text(sparkline(losses, max(8, width - len(told))), style="green")]


def _counts(run: Run, width: int, room: int | None) -> list[Table | Text]:
    """Return one row per block, with its count as a bar.

    If ``room`` lines do not hold them all, they are set in several columns; if those would be too narrow, only the
    most updated blocks are shown.
    """
    if not run.steps or not run.block_names:
        return []
    blocks, more = list(range(len(run.block_names))), []
    counts = run.counts()
    name_width = max(len(name) for name in run.block_names)
    least_width = name_width + len(str(max(counts))) + 4 + LEAST_BAR
    columns = 1
    if room is not None and len(blocks) > room:
        columns = max(1, min(math.ceil(len(blocks) / room), (width + 2) // (least_width + 2)))
        if len(blocks) > room * columns:
            shown = max(1, room - 1) * columns
            by_count = sorted(blocks, key=lambda block: -counts[block])
            blocks, left = sorted(by_count[:shown]), by_count[shown:]
            more = [_line(f"… and {len(left)} blocks more, updated {counts[left[0]]} times at most", width)]
    rows = math.ceil(len(blocks) / columns)
    if columns == 1:
        return [_bars(run, blocks, width), *more]
    table = Table.grid(padding=(0, 2), expand=False)
    each = (width - 2 * (columns - 1)) // columns
    parts = [blocks[start : start + rows] for start in range(0, len(blocks), rows)]
    table.add_row(*[_bars(run, part, each) for part in parts])
    return [table, *more]


def _bars(run: Run, blocks: Sequence[int], width: int) -> Table:
    explore, exploit = run.counts("explore"), run.counts("exploit")
    largest = max(1, *(sum(pair) for pair in zip(explore, exploit)))
    digits = len(str(largest))
    name_width = min(max(len(name) for name in run.block_names), max(8, width - digits - 4 - LEAST_BAR))
    room = max(1, width - name_width - digits - 4)
    table = Table.grid(padding=(0, 1))
    selected = set(run.steps[-1].blocks)
    for index in blocks:
        bar = Text("█" * round(exploit[index] / largest * room), style=COLOURS["exploit"])
        bar.append("█" * round(explore[index] / largest * room), style=COLOURS["explore"])
        bar.truncate(room)
        mark = Text("●" if index in selected else " ", style=COLOURS[run.steps[-1].phase])
        name = run.block_names[index]
        if len(name) > name_width:  # layers differ at the end
            name = "…" + name[1 - name_width :]
        table.add_row(mark, Text(f"{name:{name_width}}"), Text(f"{explore[index] + exploit[index]:>{digits}}"), bar)
    return table


def _last(run: Run, width: int) -> list[Text]:
    if not run.steps:
        return []
    parts: list[Text] = []
    used = len("last steps")
    for step in reversed(run.steps[-4:]):
        part = f"  {step.step}: {','.join(map(str, step.blocks))}"
        if parts and used + len(part) > width:
            break
        used += len(part)
        parts.insert(0, Text(part, style=COLOURS[step.phase]))
    line = Text("last steps", no_wrap=True) + Text("").join(parts)
    line.truncate(width, overflow="ellipsis")
    return [line]


def sparkline(values: Sequence[float], width: int) -> str:
    """``values`` as at most ``width`` bars, each the mean of its share of them."""
    groups = min(width, len(values))
    bounds = [index * len(values) // groups for index in range(groups + 1)]
    means = [math.fsum(value / (b - a) for value in values[a:b]) for a, b in itertools.pairwise(bounds)]
    low, high = min(means), max(means)
    range_of_means = high / 2 - low / 2  # halves: the difference itself may be more than a float holds
    shares = [(mean / 2 - low / 2) / range_of_means if range_of_means else 0 for mean in means]
    return "".join(SPARKS[round(share * (len(SPARKS) - 1))] for share in shares)
