"""Numbers and tables as text, the same on every page and in every summary."""

from __future__ import annotations

from collections.abc import Sequence

MIB, GIB = 2**20, 2**30
NONE = "–"  # a cell for which there is no number


def number_text(value: float | None, digits: int, none: str = NONE) -> str:
    """Return ``value`` with ``digits`` decimals, ``none`` for None."""
    return none if value is None else f"{value:.{digits}f}"


def markdown_head(columns: Sequence[str]) -> list[str]:
    """Return the two lines that open a Markdown table."""
    return [markdown_row(columns), "|---" * len(columns) + "|"]


def markdown_row(cells: Sequence[str]) -> str:
    """Return a line of a Markdown table. Cells are Markdown: free text goes through `markdown_cell`."""
    return f"| {' | '.join(cells)} |"


def markdown_cell(text: str) -> str:
    """Return free text as the cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table for a terminal: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]
