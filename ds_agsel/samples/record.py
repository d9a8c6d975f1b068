"""The record of rows: which of its micro-batches' rows each block took, step by step. `engine.selection.samples`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

RowId = int | str


@dataclass(frozen=True)
class BlockRows:
    """A block's choice in one micro-step: ``taken`` of ``rows``; None: all of them. `indices` reads the device."""

    rows: int
    taken: Tensor | None

    def indices(self) -> tuple[int, ...]:
        """Return the taken rows, ascending. The host waits for the device."""
        return tuple(range(self.rows)) if self.taken is None else tuple(self.taken.tolist())


@dataclass(frozen=True)
class StepRows:
    """An applied step on this rank.

    Attributes:
        blocks: block index -> micro-step -> its choice; a block that none of its Linears ran in is left out.
        ids: micro-step -> the ids that `Samples.name_rows` was given for it.
    """

    step: int
    blocks: dict[int, dict[int, BlockRows]]
    ids: dict[int, tuple[RowId, ...]]

    def taken(self, block: int) -> dict[int, tuple[int, ...]]:
        """Return the rows that ``block`` took, by micro-step. The host waits for the device."""
        return {micro_step: found.indices() for micro_step, found in sorted(self.blocks.get(block, {}).items())}

    def as_json(self) -> dict[str, Any]:
        """Return rows of each micro-step, the taken ones of each block, and ids where there are any."""
        rows = {micro_step: found.rows for chosen in self.blocks.values() for micro_step, found in chosen.items()}
        order = sorted(rows)
        line: dict[str, Any] = {
            "rows": [rows[micro_step] for micro_step in order],
            "taken": {
                str(block): [list(chosen[m].indices()) if m in chosen else [] for m in order]
                for block, chosen in sorted(self.blocks.items())
            },
        }
        if self.ids:
            line["ids"] = [list(self.ids.get(micro_step, ())) for micro_step in order]
        return line


class Samples:
    """Which rows each block took on this rank, for the last ``tail`` applied steps: `history`, the newest last."""

    def __init__(self, tail: int) -> None:
        self.history: list[StepRows] = []
        self._tail = tail
        self._blocks: dict[int, dict[int, BlockRows]] = {}
        self._ids: dict[int, tuple[RowId, ...]] = {}
        self._next_ids: tuple[RowId, ...] | None = None

    def name_rows(self, ids: Sequence[RowId]) -> None:
        """Give the rows of the next forward their ids, which the record then carries. Optional."""
        self._next_ids = tuple(ids)

    def begin_forward(self, micro_step: int) -> None:
        """Note that a forward of the window begins."""
        if self._next_ids is not None:
            self._ids[micro_step], self._next_ids = self._next_ids, None

    def note(self, block: int, micro_step: int, chosen: BlockRows) -> None:
        """Note a block's choice."""
        self._blocks.setdefault(block, {})[micro_step] = chosen

    def commit(self, step: int, blocks: Collection[int]) -> None:
        """Record the step that was applied, which updated ``blocks``."""
        self.history.append(StepRows(step, {b: self._blocks[b] for b in blocks if b in self._blocks}, self._ids))
        del self.history[: -self._tail]
        self.forget()

    def forget(self) -> None:
        """Forget a window that was not applied, or that is recorded."""
        self._blocks, self._ids = {}, {}
