"""Write the table of SIMULATED transfer times of `step_device: "accelerator"`.

Usage: python -m launch.pages.transfers. The model is `ds_agsel.estimate.timeline`; the rates are assumed
(`ds_agsel.estimate.cards`), and no GPU was used.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from ds_agsel.config import SelectionConfig
from ds_agsel.estimate.cards import CARDS, LINK_SHARE, MATMUL_SHARE, MEMORY_SHARE, Card
from ds_agsel.estimate.setup import Setup
from ds_agsel.estimate.shapes import ModelShape, read_shape
from ds_agsel.estimate.table import estimate
from ds_agsel.estimate.timeline import Exposure, hiding_tokens, simulate, timeline_of
from ds_agsel.policies import num_selected

from .output import add_output, put

ROOM_PERCENT = 20
LEAN = {"state_dtype": "int8", "master_weights": "split"}
# Forms of states, and the share of all of them that has room on the accelerator; None: the default budget.
ROOMS: tuple[tuple[str, dict[str, str], float | None], ...] = (
    ("fp32", {}, None), ("fp32", {}, 0.5), ("fp32", {}, 1.0), ("split, int8", LEAN, None), ("split, int8", LEAN, 0.5)
)  # fmt: skip
MODELS = ("qwen2.5-0.5b", "llama-3.2-1b", "phi-4-mini")
PERCENTAGES = (10, 20, 30)
SELECT_EVERY = (1, 5, 20)
BATCH, SEQUENCE = 8, 512
TOKENS = BATCH * SEQUENCE


def main() -> None:
    """Write or print the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--select-percent", type=float, nargs="+", default=PERCENTAGES)
    parser.add_argument("--batch", type=int, default=BATCH, help="rows per step and rank, of all micro-steps together")
    parser.add_argument("--sequence", type=int, default=SEQUENCE, help="tokens of a row")
    add_output(parser)
    options = parser.parse_args()
    put(page(options.models, options.select_percent, options.batch, options.sequence), options.output)


INTRODUCTION = """\
# Transfers, simulated

**Every time on this page is simulated.** On an H100 the step of a model of 0.5B took longer: it waits for the
processor, of which the model of a step knows nothing ([measured](gpu/2026-11-26-h100.md)). `launch/pages/transfers.py`
wrote this page (`make docs`).

With `step_device: "accelerator"` the states of newly selected blocks (12 bytes for each element: master weight and two
moments) travel to the accelerator, and those of blocks no longer selected travel back: the table is for the default
budget, of the k + 2 largest blocks. A larger `state_budget_bytes` is a cache, in which they stay until their room is
needed; with room for all, each block travels once and nothing after that. The model in
`ds_agsel/estimate/timeline.py` puts the moves of `residency.plan_moves` on two links beside a compute stream. *Exposed*
is the time that updates wait for arrivals; *lean* is that with `"master_weights": "split"` and `"state_dtype": "int8"`,
of which 4 bytes travel for each element (packing on the card is not counted). Selections are drawn uniformly, 64 steps,
which moves more than the policy's own draws, as those repeat. Copies that close gaps in the memory for states
(docs/states.md) are left out: they stay on the accelerator.

Assumed rates:
"""


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    model: ModelShape
    card: Card
    percent: float
    num_selected: int
    exploit: Exposure
    explore: Exposure
    hidden_from_tokens: int | None
    lean: tuple[Exposure, Exposure]  # exploit, explore


def page(models: Sequence[str], percentages: Sequence[float], batch: int, sequence: int) -> str:
    """Return the page in Markdown."""
    tokens = batch * sequence
    table = lines_of(models, CARDS, percentages, tokens)
    rates = [
        f"- {card.name}: {card.flops / 1e12:.1f} TFLOPS, {card.memory_bytes / 1e9:.0f} GB/s of memory, "
        f"{card.link_bytes / 1e9:.1f} GB/s each way to the host, {card.latency_seconds * 1e6:.0f} µs a copy. "
        f"From: {card.source}."
        for card in CARDS
    ]
    return "\n".join(
        [
            INTRODUCTION,
            *rates,
            f"- Of the data sheets' peaks {MATMUL_SHARE:.0%} is taken for matrix products, {MEMORY_SHARE:.0%} for "
            f"memory, {LINK_SHARE:.0%} for PCIe.",
            f"- bf16, one rank, {batch} × {sequence} = {tokens} tokens a step, no recomputation of activations.",
            "",
            *as_table(table),
            "",
            *_reading(table, tokens),
            "",
            *_rooms(models, tokens),
            "",
            *_rounds(models, tokens),
            "",
        ]
    )


def lines_of(models: Sequence[str], cards: Sequence[Card], percentages: Sequence[float], tokens: int) -> list[Line]:
    """Return a line for each model, card and percentage, at ``tokens`` a step."""
    shapes = map(read_shape, models)
    return [_line(shape, card, percent, tokens) for shape in shapes for card in cards for percent in percentages]


def as_table(lines: Sequence[Line]) -> list[str]:
    """Return the lines as a table in Markdown."""
    return [
        "| model | card | select | k | moved in | exploit step | exposed | lean | explore step | exposed | lean "
        "| hidden from |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *map(_row, lines),
    ]


def _rooms(models: Sequence[str], tokens: int) -> Iterator[str]:
    """Yield the section on `state_budget_bytes` as a cache, and on leaner states."""
    return _section(
        "With more room, and with leaner states",
        f"As above, at {ROOM_PERCENT} %. A `state_budget_bytes` is a cache: states that are not selected any more stay "
        'until their room is needed. "Half" and "all" are the share of all states that has room; each block\'s first '
        'visit is among the 64 steps. `"master_weights": "split"` with `"state_dtype": "int8"` moves 4 bytes an '
        "element instead of 12; what unpacking them takes is not counted.",
        "| model | card | states | room | budget | moved in, exploit | exposed | moved in, explore | exposed |",
        (_room_row(shape, card, tokens, *room) for shape, card, room in product(map(read_shape, models), CARDS, ROOMS)),
    )


def _section(title: str, text: str, head: str, rows: Iterable[str]) -> Iterator[str]:
    """Yield a section: its title, a paragraph, and a table of ``rows`` under ``head``."""
    yield from (f"## {title}", "", *textwrap.wrap(text, 118), "")
    yield from (head, "|---" * (head.count("|") - 1) + "|", *rows)


def _room_row(
    shape: ModelShape, card: Card, tokens: int, form: str, fields: dict[str, str], share: float | None
) -> str:
    setup, k = Setup().but(**fields), num_selected(ROOM_PERCENT, len(shape.blocks))
    if share is not None:
        every = sum(timeline_of(shape, setup, card, k).block_bytes.values())
        setup = setup.but(state_budget_bytes=math.ceil(share * every))
    budget = timeline_of(shape, setup, card, k).budget_bytes
    exploit, explore = (simulate(shape, setup, card, k, tokens, phase) for phase in ("exploit", "explore"))
    moved = [f"{exposure.h2d_bytes / 2**20:,.0f} MiB | {_exposed(exposure)}" for exposure in (exploit, explore)]
    room = {None: "one step's and two blocks'", 0.5: "half", 1.0: "all"}[share]
    cells = (shape.name, card.name, form, room, f"{budget / 2**30:.1f} GiB", *moved)
    return f"| {' | '.join(cells)} |"


def _rounds(models: Sequence[str], tokens: int) -> Iterator[str]:
    """Yield the section on `select_every`."""
    return _section(
        "With selections that stand for several steps",
        f"As in the first table, at {ROOM_PERCENT} %. With `select_every` = n a selection stands for n steps, a round, "
        "and states that stay selected do not move: the first step of a round brings what the round before did not "
        "have, the others bring nothing, and bytes a step fall by the factor n. All columns are means over the steps "
        'of 64 rounds. *Explore round* is one whose first step explores; its others are exploit steps. "Estimate" is '
        "what `ds-agsel estimate` says of the expected exploit step, a mean over all draws, not over 64. For the "
        "blocks that a run chose, the engine's counters (`h2d_bytes`, `d2h_bytes`) are the estimate's to the byte.",
        "| model | card | select_every | estimate | moved in | exploit step | exposed | explore round | exposed |",
        (
            _round_row(shape, card, tokens, select_every)
            for shape, card, select_every in product(map(read_shape, models), CARDS, SELECT_EVERY)
        ),
    )


def _round_row(shape: ModelShape, card: Card, tokens: int, select_every: int) -> str:
    setup, k = Setup(), num_selected(ROOM_PERCENT, len(shape.blocks))
    rows = estimate(shape, setup, SelectionConfig(select_every=select_every), (ROOM_PERCENT,)).rows
    wanted = ("accelerator", "exploit", "expected")
    (expected,) = (row.traffic.h2d for row in rows if (row.stepping, row.phase, row.which) == wanted)
    exploit, explore = (
        simulate(shape, setup, card, k, tokens, phase, select_every) for phase in ("exploit", "explore")
    )
    moved = [f"{size / 2**20:,.0f} MiB" for size in (expected, exploit.h2d_bytes)]
    times = [cell for each in (exploit, explore) for cell in (f"{each.step_seconds * 1e3:.1f} ms", _exposed(each))]
    return f"| {' | '.join((shape.name, card.name, str(select_every), *moved, *times))} |"


def _line(model: ModelShape, card: Card, percent: float, tokens: int) -> Line:
    setup, k = Setup(), num_selected(percent, len(model.blocks))
    exploit = simulate(model, setup, card, k, tokens, "exploit")
    explore = simulate(model, setup, card, k, tokens, "explore")
    leaner = setup.but(master_weights="split", state_dtype="int8")
    lean = simulate(model, leaner, card, k, tokens, "exploit"), simulate(model, leaner, card, k, tokens, "explore")
    return Line(model, card, percent, k, exploit, explore, hiding_tokens(model, setup, card, k), lean)


def _row(line: Line) -> str:
    exploit, explore, least = line.exploit, line.explore, line.hidden_from_tokens
    return (
        f"| {line.model.name} | {line.card.name} | {line.percent:g} % | {line.num_selected} "
        f"| {exploit.h2d_bytes / 2**20:,.0f} MiB "
        f"| {exploit.step_seconds * 1e3:.1f} ms | {_exposed(exploit)} | {_exposed(line.lean[0])} "
        f"| {explore.step_seconds * 1e3:.1f} ms | {_exposed(explore)} | {_exposed(line.lean[1])} "
        f"| {'never' if least is None else f'{least:,} tokens'} |"
    )


def _exposed(exposure: Exposure) -> str:
    return f"{exposure.exposed_seconds * 1e3:.1f} ms ({exposure.exposed_seconds / exposure.step_seconds:.0%})"


def _reading(table: Sequence[Line], tokens: int) -> list[str]:
    """Return sentences on the table, with numbers taken from it."""
    hidden = sum(line.exploit.is_hidden for line in table)
    explore = [line.explore.exposed_seconds / line.explore.step_seconds for line in table]
    hidden_lean = sum(line.lean[0].is_hidden for line in table)
    lean = [line.lean[1].exposed_seconds / line.lean[1].step_seconds for line in table]
    text = (
        f"Of the {len(table)} lines, {hidden} hide every transfer of every exploit step at {tokens} tokens. Hiding "
        "ends where forward and backward are shorter than the states of the newly selected blocks take on the link; "
        "the last column is the tokens per step and rank from which all 64 exploit steps hide theirs. A card that "
        "computes faster over a link that is not as much faster needs more of them. What decides is the least "
        "computing that a draw can have (high blocks alone: backward ends at the lowest of them) and the largest "
        "block, the embedding.",
        "Explore steps know their blocks only when backward has ended, and an update is far shorter than an arrival: "
        f"what they move is exposed, here {min(explore):.0%} to {max(explore):.0%} of the step. Blocks that are there "
        "already cost nothing. More tokens make that share smaller, not the time.",
        f"With lean states {hidden_lean} of the lines hide every transfer of every exploit step, and of explore steps "
        f"{min(lean):.0%} to {max(lean):.0%} are exposed.",
    )
    return [line for paragraph in text for line in (*textwrap.wrap(paragraph, 118), "")][:-1]


if __name__ == "__main__":
    main()
