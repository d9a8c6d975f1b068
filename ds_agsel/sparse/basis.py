"""The rotation of a matrix's shorter side, from the gradients of the calibration steps.

[Note: Grams] The singular vectors of the gradients stacked side by side are the eigenvectors of the sum of their Gram
matrices, d x d for a side of d, so that no gradient is kept. HOSVD of the paper (arXiv:2410.07383, section 3) in other
words.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ds_agsel.sparse.staircase import captured_fraction, prefix_lengths

Rotation = Literal["model", "both", "none"]
TILE_LINES = 512  # lines whose products are held at once, at most
LEAST_LINES = 32  # of a tile, if there are as many


@dataclass
class Energy:
    """What the gradients of the gathered windows leave behind; [Note: Grams]. All fp32, on the model's device.

    Attributes:
        lines: energy of each line, (L,).
        directions: the Gram matrix of the shorter side, (d, d); with ``rotation`` "none" its diagonal, (d,).
        line_gram: with "both" the Gram matrix of the longer side, (L, L).
        lost: whether a gradient since it was last cleared was left out, as it was not finite, (), bool.
    """

    rotation: Rotation
    lines: Tensor
    directions: Tensor
    line_gram: Tensor | None
    lost: Tensor

    @classmethod
    def zero(cls, rotation: Rotation, num_lines: int, num_directions: int, device: torch.device) -> Energy:
        """Return the energy of no gradient."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        gram = zeros(num_directions) if rotation == "none" else zeros(num_directions, num_directions)
        return cls(
            rotation,
            zeros(num_lines),
            gram,
            zeros(num_lines, num_lines) if rotation == "both" else None,
            zeros().bool(),
        )

    def add(self, gradient: Tensor) -> None:
        """Add a gradient, (L, d), in any dtype; one that is not finite is left out. The host does not wait."""
        gradient = gradient.float()
        finite = torch.isfinite(gradient.sum())
        self.lost |= ~finite
        gradient = torch.where(finite, gradient, 0.0)
        squares = gradient.square()
        self.lines += squares.sum(1)
        self.directions += squares.sum(0) if self.rotation == "none" else gradient.T @ gradient
        if self.line_gram is not None:
            self.line_gram += gradient @ gradient.T

    def tensors(self) -> list[Tensor]:
        """Return what is summed over ranks."""
        return [self.lines, self.directions] + ([] if self.line_gram is None else [self.line_gram])


@dataclass(frozen=True)
class Tile:
    """Some lines whose entries are computed at once.

    Attributes:
        lines: their indices, (n,), int64.
        width: how many directions the longest has.
        places: of their entries in the flattened (n, width) products, (entries,), int32.
    """

    lines: Tensor
    width: int
    places: Tensor


@dataclass(frozen=True)
class Support:
    """The trained entries of one matrix, in the order of their values in the carrier.

    The carrier's values are laid out line after line, the longest first (ties: lower line); those of a line by
    direction.

    Attributes:
        lengths: (L,), int64, on the host: how many directions each line has, in the lines' natural order: its first
            ones, unless they are ``scattered``.
        directions: the first directions as columns, (d, widest), in the model's dtype; with ``rotation`` "none" the
            columns of the matrix that they are, (widest,), int64.
        num_directions: d, the matrix's shorter side.
        lines: with "both" the rotation of the lines, (L, L), in the model's dtype; line a is its column a.
        captured: share of the energy of the calibration's gradients in these entries; `captured_fraction`.
        captured_plain: the same for the best entries of the plain basis.
        scattered: entries that are no prefixes: their places in the flattened (L, widest), (K,), int64, on the host.
    """

    lengths: Tensor
    directions: Tensor
    num_directions: int
    lines: Tensor | None
    captured: float
    captured_plain: float
    scattered: Tensor | None = None

    @property
    def widest(self) -> int:
        """How many directions are used: with prefixes the length of the longest line."""
        return self.directions.shape[-1]

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """The lines with entries, on the directions' device, in tiles of lines of about one length."""
        order = self.lengths.argsort(descending=True, stable=True)
        order = order[: int((self.lengths > 0).sum())]
        device, mask = self.directions.device, self._scattered_mask()
        tiles = []
        for lines in order.split(_tile_sizes(self.lengths[order]) if mask is None else TILE_LINES):
            if mask is None:
                width = int(self.lengths[lines[0]])
                among = torch.arange(width) < self.lengths[lines, None]
            else:
                width, among = self.widest, mask[lines]
            places = among.flatten().nonzero().flatten()
            tiles.append(Tile(lines.to(device), width, places.to(torch.int32).to(device)))
        return tuple(tiles)

    def _scattered_mask(self) -> Tensor | None:
        if self.scattered is None:
            return None
        mask = torch.zeros(len(self.lengths) * self.widest, dtype=torch.bool)
        mask[self.scattered] = True
        return mask.view(-1, self.widest)

    def to(self, device: torch.device) -> Support:
        """Return the support with its vectors on ``device``."""
        lines = None if self.lines is None else self.lines.to(device)
        return replace(self, directions=self.directions.to(device), lines=lines)

    def rotate(self, activation: Tensor) -> Tensor:
        """Return ``activation`` of the shorter side, (T, d), in the used directions, (T, widest)."""
        if self.directions.dim() == 1:
            return activation.index_select(1, self.directions)
        return activation @ self.directions.to(activation.dtype)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds: tensors on the host and numbers."""
        return {
            field.name: value.cpu() if isinstance(value := getattr(self, field.name), Tensor) else value
            for field in fields(self)
        }


def _tile_sizes(lengths: Tensor) -> list[int]:
    """Return the sizes of tiles of ``lengths``, which descend: the products that a tile has too many stay few."""
    sizes, found = [], lengths.tolist()
    start = 0
    while start < len(found):
        shorter = int((lengths[start:] > found[start] // 2).sum())  # the next line that is half as long
        size = min(max(shorter, LEAST_LINES), TILE_LINES, len(found) - start)
        sizes.append(size)
        start += size
    return sizes


def choose(energy: Energy, entries: int, dtype: torch.dtype) -> Support:
    """Return the support of ``entries`` entries for gradients of ``energy``. On the host; deterministic there.

    Directions are eigenvectors by descending eigenvalue, each with its largest component positive.
    """
    plain_directions = energy.directions if energy.rotation == "none" else energy.directions.diagonal()
    by_energy = plain_directions.cpu().sort(descending=True, stable=True)
    lines, line_vectors = energy.lines.cpu(), None
    plain = prefix_lengths(lines, by_energy.values, entries)
    captured_plain = captured_fraction(lines, by_energy.values, plain)
    if energy.rotation == "none":
        values, vectors = by_energy.values, by_energy.indices
    else:
        values, vectors = _eigen(energy.directions)
    if energy.line_gram is not None:
        lines, line_vectors = _eigen(energy.line_gram)
    lengths = prefix_lengths(lines, values, entries)
    widest = int(lengths.max())
    used = vectors[:widest] if vectors.dim() == 1 else vectors[:, :widest].to(dtype).contiguous()
    return Support(
        lengths=lengths,
        directions=used,
        num_directions=len(values),
        lines=None if line_vectors is None else line_vectors.to(dtype).contiguous(),
        captured=captured_fraction(lines, values, lengths),
        captured_plain=captured_plain,
    )


def draw(energy: Energy, entries: int, seed: int) -> Support:
    """Return a support of ``entries`` entries of the plain matrix, each as likely as any other. On the host.

    Args:
        energy: with ``rotation`` "none"; what the entries hold of it is noted.
        seed: of the draw; torch's global generator is not touched.
    """
    lines, columns = energy.lines.cpu(), energy.directions.cpu()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(lines.numel() * columns.numel(), generator=generator)[:entries].sort().values
    line, column = drawn // columns.numel(), drawn % columns.numel()
    used, place = column.unique(return_inverse=True)
    total = float(lines.double().sum() * columns.double().sum())
    best = choose(energy, entries, torch.float32)
    return replace(
        best,
        lengths=torch.bincount(line, minlength=lines.numel()),
        directions=used,
        captured=float((lines[line].double() * columns[column].double()).sum()) / total if total else 0.0,
        scattered=line * len(used) + place,
    )


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return (eigenvalues, descending; eigenvectors as columns) of ``gram``, on the host."""
    values, vectors = torch.linalg.eigh(gram.cpu())
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values, vectors * torch.where(largest < 0, -1.0, 1.0)
