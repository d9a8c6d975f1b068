"""What a block trains of a Linear's matrix, all of it or some entries: its gradient over rows, and the rows' scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ds_agsel.samples.scores import Support, Use, against, joined, of_halves, support_of
from ds_agsel.sparse.basis import Support as ChosenEntries
from ds_agsel.sparse.linear import entries_gradient, entries_products
from ds_agsel.sparse.targets import Target


class Matrix(Protocol):
    """A matrix, as the choice of rows sees it. ``uses`` are what the calls of its Linears left, at least one."""

    @property
    def parameter(self) -> nn.Parameter:
        """The trained parameter."""

    def gradient(self, uses: Sequence[Use], rows: Tensor | None, weight: float) -> Tensor:
        """Return the parameter's gradient over ``rows``, times ``weight``; over all, unweighted, if they are None."""

    def of_halves(self, uses: Sequence[Use]) -> Tensor:
        """Return the scores of all rows, each against the mean gradient of the other half, (rows,)."""

    def support_of(self, uses: Sequence[Use]) -> Support:
        """Return the support that ``uses`` are."""

    def against(self, uses: Sequence[Use], support: Support) -> Tensor:
        """Return the scores of the rows of ``uses`` against ``support``, (rows,)."""


@dataclass(frozen=True)
class WholeMatrix:
    """A weight of which every element is trained."""

    parameter: nn.Parameter

    def gradient(self, uses: Sequence[Use], rows: Tensor | None, weight: float) -> Tensor:
        """See `Matrix`."""
        parts = [use.gradient(rows, weight) for use in uses]
        return sum(parts[1:], start=parts[0])

    def of_halves(self, uses: Sequence[Use]) -> Tensor:
        """See `Matrix`."""
        return of_halves(uses)

    def support_of(self, uses: Sequence[Use]) -> Support:
        """See `Matrix`."""
        return support_of(uses)

    def against(self, uses: Sequence[Use], support: Support) -> Tensor:
        """See `Matrix`."""
        return against(uses, support)


@dataclass(frozen=True)
class Entries:
    """A matrix of which `adagrad_select.sparse_grad` trains some entries: rows are scored by these alone."""

    target: Target

    @property
    def parameter(self) -> nn.Parameter:
        """The carrier."""
        return self.target.carrier

    def gradient(self, uses: Sequence[Use], rows: Tensor | None, weight: float) -> Tensor:
        """See `Matrix`. Where energy is gathered, that of this gradient is."""
        total: Tensor | None = None
        for use in uses:
            lines, directions = self._sides(*use.of(rows))
            if rows is not None:
                lines = lines * weight
            if self.target.energy is not None:
                self.target.energy.add(lines.T @ directions)
            part = entries_gradient(lines, directions, self._chosen())
            total = part if total is None else total + part
        if total is None:
            raise ValueError("a gradient of no use")
        return total

    def of_halves(self, uses: Sequence[Use]) -> Tensor:
        """See `Matrix`."""
        x, dy = joined(uses)
        rows = x.shape[0]
        half = rows // 2
        halves = [(x[:half], dy[:half]), (x[half:], dy[half:])]
        first, second = (entries_gradient(*self._sides(*part), self._chosen()) for part in halves)
        return torch.cat((self._scores(*halves[0], second) / (rows - half), self._scores(*halves[1], first) / half))

    def support_of(self, uses: Sequence[Use]) -> Support:
        """See `Matrix`."""
        x, dy = joined(uses)
        return Support(entries_gradient(*self._sides(x, dy), self._chosen()), None, None, x.shape[0])

    def against(self, uses: Sequence[Use], support: Support) -> Tensor:
        """See `Matrix`."""
        if support.gradient is None:
            raise ValueError("a support of entries holds their gradient")
        return self._scores(*joined(uses), support.gradient) / support.rows

    def _chosen(self) -> ChosenEntries:
        if self.target.support is None:
            raise RuntimeError(f"no entries of {self.target.name} are chosen yet")
        return self.target.support

    def _sides(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        return (dy, x) if self.target.lines_are_outputs else (x, dy)

    def _scores(self, x: Tensor, dy: Tensor, gradient: Tensor) -> Tensor:
        """Return the inner product of each row's gradient with ``gradient``, (rows,)."""
        by_token = entries_products(*self._sides(x, dy), self._chosen(), gradient)
        return by_token.view(x.shape[0], -1).sum(1)
