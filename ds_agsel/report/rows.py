"""Which rows of a batch the blocks took: read from selection.jsonl, summed per block and per row."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_agsel.report.text import printable

RowId = int | str
MAX_ROWS = 2**20  # of a micro-batch, in a log


@dataclass(frozen=True)
class Choice:
    """One micro-step of a block: the ``taken`` of ``rows``; ``ids`` are empty where the rows have none."""

    block: int
    rows: int
    taken: tuple[int, ...]
    ids: tuple[RowId, ...]


@dataclass(frozen=True)
class RowUse:
    """How often a row was taken in so many choices, and how often uniform draws would have taken it.

    ``z``: the difference in standard deviations of uniform draws. Blocks mostly agree about a row, so that it is a
    measure to sort by and no test.
    """

    id: RowId
    choices: int
    taken: int
    expected: float
    z: float


def read_choices(samples: Any, num_blocks: int) -> tuple[Choice, ...]:
    """Return the choices in the field "samples" of a line of selection.jsonl. Raises ValueError for a wrong one."""
    if samples is None:
        return ()
    try:
        rows, taken, ids = samples["rows"], samples["taken"], samples.get("ids") or [[]] * len(samples["rows"])
        choices = [
            Choice(int(block), number, tuple(chosen), tuple(map(_id, names)))
            for block, of_block in taken.items()
            for number, chosen, names in zip(rows, of_block, ids, strict=True)
            if chosen
        ]
        if not all(_is_sound(choice, num_blocks) for choice in choices):
            raise ValueError("a row or block that there is not")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'"samples" is {samples!r:.80}: {error}') from None
    return tuple(choices)


def _is_sound(choice: Choice, num_blocks: int) -> bool:
    whole = all(type(row) is int for row in (choice.rows, *choice.taken))
    named = not choice.ids or len(choice.ids) == choice.rows
    return (
        whole
        and named
        and choice.rows <= MAX_ROWS
        and 0 <= choice.block < num_blocks
        and min(choice.taken) >= 0
        and max(choice.taken) < choice.rows
        and len(set(choice.taken)) == len(choice.taken)
    )


def _id(value: Any) -> RowId:
    if type(value) is int:
        return value
    if not isinstance(value, str):
        raise TypeError(f"the id {value!r:.40}")
    return printable(value)


def shares_of_blocks(choices: Iterable[Choice]) -> dict[int, float]:
    """Return the share of its rows that each block took, by block index."""
    sums: dict[int, tuple[int, int]] = {}
    for choice in choices:
        taken, rows = sums.get(choice.block, (0, 0))
        sums[choice.block] = taken + len(choice.taken), rows + choice.rows
    return {block: taken / rows for block, (taken, rows) in sorted(sums.items())}


def uses_of_rows(choices: Iterable[Choice]) -> list[RowUse]:
    """Return each row with an id, the most refused first."""
    sums: dict[RowId, list[float]] = {}
    for choice in choices:
        probability = len(choice.taken) / choice.rows
        taken = set(choice.taken)
        for row, name in enumerate(choice.ids):
            of_row = sums.setdefault(name, [0, 0, 0.0, 0.0])
            of_row[0] += 1
            of_row[1] += row in taken
            of_row[2] += probability
            of_row[3] += probability * (1 - probability)
    found = [
        RowUse(name, int(n), int(taken), expected, (taken - expected) / math.sqrt(variance) if variance else 0.0)
        for name, (n, taken, expected, variance) in sums.items()
    ]
    return sorted(found, key=lambda use: (use.z, str(use.id)))


def share_of_rows(choices: Iterable[Choice], ids: Collection[RowId]) -> float | None:
    """Return the share of the rows with ``ids`` among the taken ones; None if no row that was taken has an id."""
    taken = [choice.ids[row] for choice in choices if choice.ids for row in choice.taken]
    return sum(row in ids for row in taken) / len(taken) if taken else None


def refused_text(uses: Sequence[RowUse], limit: int = 10) -> str:
    """Return a line for each of the first ``limit`` rows that were taken less often than by uniform draws."""
    lines = [
        f"  row {use.id}: taken {use.taken} of {use.choices} times, {use.expected:.1f} expected (z {use.z:.1f})"
        for use in uses[:limit]
        if use.z < 0
    ]
    return "\n".join(lines)


def share_rows(choices: Sequence[Choice], block_names: Sequence[str]) -> list[Mapping[str, Any]]:
    """Return name and share of rows of each block that chose, for the page."""
    return [{"name": block_names[block], "share": share} for block, share in shares_of_blocks(choices).items()]
