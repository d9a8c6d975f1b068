"""SparseGrad step by step in plain PyTorch, dense and in float64: the slow twin of ``sparse_grad``.

Nothing here knows ZeRO, carriers, tiles or partitions: a target's whole gradient is taken, rotated, and all but its
entries dropped; the values have their own AdamW; the matrix is put together from scratch. Which entries, and in which
basis, is given: what chooses them has its own test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


@dataclass
class Entries:
    """A target's basis, (d, d or fewer), as columns, and its entries, a mask (L, directions)."""

    basis: Tensor
    mask: Tensor


class SparseReference:
    """Trains ``model``, float64, every block at every step, without decay of the entries' values.

    Args:
        targets: of which entries are trained, by their weight's name.
        lines_are_rows: of each target.
        decay: weight decay of everything else.
    """

    def __init__(
        self, model: nn.Module, lines_are_rows: Mapping[str, bool], lr: float, betas: tuple[float, float], eps: float,
        decay: float, factor: float,
    ) -> None:  # fmt: skip
        self.model, self.lines_are_rows = model, lines_are_rows
        self.parameters = dict(model.named_parameters())
        others = [p for name, p in self.parameters.items() if name not in lines_are_rows]
        self.options = {"lr": lr * factor, "betas": betas, "eps": eps, "weight_decay": 0.0}
        self.dense = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=decay)
        self.entries: dict[str, Entries] = {}
        self.base: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.sparse: dict[str, torch.optim.AdamW] = {}

    def restart(self, entries: Mapping[str, Entries]) -> None:
        """Train other entries from here on."""
        for name, given in entries.items():
            self.entries[name] = given
            self.base[name] = self._by_line(name, self.parameters[name].detach()).clone()
            self.values[name] = nn.Parameter(torch.zeros(given.mask.shape, dtype=torch.float64))
            self.sparse[name] = torch.optim.AdamW([self.values[name]], **self.options)

    def _by_line(self, name: str, matrix: Tensor) -> Tensor:
        return matrix if self.lines_are_rows[name] else matrix.T

    def step(self, batches: Sequence[Batch]) -> None:
        """One step on the mean of the losses of ``batches``: all ranks' and micro-steps'."""
        self.model.zero_grad(set_to_none=True)
        for batch in batches:
            (self.model(**batch).loss / len(batches)).backward()
        self.dense.step()
        for name, given in self.entries.items():
            gradient = self._by_line(name, self.parameters[name].grad) @ given.basis
            self.values[name].grad = gradient * given.mask
            self.sparse[name].step()
            added = self.values[name].detach() @ given.basis.T
            self.parameters[name].data.copy_(self._by_line(name, self.base[name] + added))
