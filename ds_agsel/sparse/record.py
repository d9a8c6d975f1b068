"""What a user sees of sparse training: ``engine.selection.sparse``."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class MatrixRecord:
    """One matrix of which some entries are trained.

    Attributes:
        entries: how many of its ``numel`` elements.
        captured: share of the gradients' energy in the trained entries, in the rotated basis; None before they are
            chosen. It is computed as if each entry had the product of its line's and its direction's energy.
        captured_plain: the same for as many entries in the plain basis.
        chosen: how often its entries were chosen.
        lines: the length of its longer side.
        reach: how many of the lines have more than 0, 1, 2, 4, … trained entries; empty before they are chosen.
    """

    entries: int
    numel: int
    captured: float | None = None
    captured_plain: float | None = None
    chosen: int = 0
    lines: int = 0
    reach: tuple[int, ...] = ()


@dataclass
class SparseRecord:
    """The matrices by the name of their weight, and how far calibration is.

    Attributes:
        calibration_left: steps that still change no weight.
    """

    matrices: dict[str, MatrixRecord] = field(default_factory=dict)
    calibration_left: int = 0

    @property
    def trained_fraction(self) -> float:
        """The trained share of these matrices' elements."""
        total = sum(matrix.numel for matrix in self.matrices.values())
        return sum(matrix.entries for matrix in self.matrices.values()) / total

    @property
    def captured(self) -> float | None:
        """The mean of the matrices' captured energy; None before all entries are chosen."""
        known = [matrix.captured for matrix in self.matrices.values() if matrix.captured is not None]
        return sum(known) / len(known) if len(known) == len(self.matrices) else None
