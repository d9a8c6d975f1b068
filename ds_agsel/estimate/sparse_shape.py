"""What `sparse_grad` adds to a model's shape: its matrices, and the bytes that they need beside their carriers.

The carriers are parameters of K elements like any other, so that gradients, states and traffic follow from their sizes.
Here is the rest: the base of each matrix in host memory, bases on the accelerator, and what a moment needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from ds_agsel.estimate.partitions import parameter_partition

_FP32_BYTES = 4
_INDEX_BYTES = 8  # of a line, and of a direction that is a column of the matrix
_PLACE_BYTES = 4  # of an entry in its tile


@dataclass(frozen=True)
class Matrix:
    """A matrix of ``entries`` trained entries. Matrices with the same ``basis`` share it; see `Target` for the rest."""

    block: int
    lines: int
    directions: int
    entries: int
    basis: str

    @property
    def numel(self) -> int:
        """All of its elements."""
        return self.lines * self.directions

    @property
    def most_directions(self) -> int:
        """The most directions that its entries can use. Which they do is known after calibration alone."""
        return min(self.directions, self.entries)


@dataclass(frozen=True)
class SparseShape:
    """The matrices of a model whose section has `sparse_grad`."""

    matrices: tuple[Matrix, ...]
    rotation: Literal["model", "both", "none"]
    refreshes: bool

    def held_numels(self, stage: int, ranks: int, rank: int) -> tuple[int, ...]:
        """Return how many elements of each matrix this rank writes, and has the base of: with stage 3 its slice."""
        if stage < 3:
            return tuple(matrix.numel for matrix in self.matrices)
        return tuple(parameter_partition((matrix.numel,), ranks, rank).covered_numel for matrix in self.matrices)

    def traffic_numel(self, selected: Sequence[Fraction], numels: Sequence[int]) -> Fraction:
        """Return Σ over matrices of their number in ``numels``, times the share of their block in ``selected``."""
        pairs = zip(self.matrices, numels, strict=True)
        return sum((selected[matrix.block] * numel for matrix, numel in pairs), Fraction(0))

    def support_bytes(self, item_bytes: int) -> int:
        """Return the bytes of all entries' places and bases on the accelerator, at most."""
        return sum(self._support_bytes(matrix, item_bytes) for matrix in self._one_a_basis())

    def energy_bytes(self) -> int:
        """Return the bytes on the accelerator while the energies of all matrices are gathered."""
        return _FP32_BYTES * sum(map(self._energy_numel, self._one_a_basis()))

    def accelerator_bytes(self, item_bytes: int) -> int:
        """Return the most bytes on the accelerator beside weights, gradients and states.

        Bases and energies are there together where entries are chosen anew, else energies come first. To them comes
        what writing the largest matrix takes: its base, and in fp32 the base, values, what they add, and the sum.
        """
        kept = [self.support_bytes(item_bytes), self.energy_bytes()]
        largest = max((matrix.numel for matrix in self.matrices), default=0)
        return (sum(kept) if self.refreshes else max(kept)) + largest * (item_bytes + 4 * _FP32_BYTES)

    def _one_a_basis(self) -> list[Matrix]:
        return list({matrix.basis: matrix for matrix in self.matrices}.values())

    def _support_bytes(self, matrix: Matrix, item_bytes: int) -> int:
        places = _PLACE_BYTES * matrix.entries + _INDEX_BYTES * min(matrix.lines, matrix.entries)
        if self.rotation == "none":
            return places + _INDEX_BYTES * matrix.most_directions
        of_lines = matrix.lines**2 if self.rotation == "both" else 0
        return places + item_bytes * (matrix.directions * matrix.most_directions + of_lines)

    def _energy_numel(self, matrix: Matrix) -> int:
        if self.rotation == "none":
            return matrix.lines + matrix.directions
        return matrix.lines + matrix.directions**2 + (matrix.lines**2 if self.rotation == "both" else 0)
