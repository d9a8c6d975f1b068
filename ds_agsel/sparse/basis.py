"""The rotation of a matrix's shorter side, from the gradients of the calibration steps.

[Note: Grams] The singular vectors of the gradients stacked side by side are the eigenvectors of the sum of their Gram
matrices, d x d for a side of d, so that no gradient is kept. HOSVD of the paper (arXiv:2410.07383, section 3) in other
words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ds_agsel.sparse.staircase import captured_fraction, prefix_lengths

Rotation = Literal["model", "both", "none"]
LONG_LINES = 1 / 8  # share of the lines whose prefixes are longer than what is computed of every line
LEAST_LINES = 32  # of a tile of long lines, if there are as many


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
    """Products of some lines with some directions, (lines, directions), computed at once.

    Attributes:
        lines: their places among the long lines; None for all lines of the matrix, in their order.
        directions: which.
        start: where the products begin in the buffer of all tiles' products.
    """

    lines: slice | None
    directions: slice
    shape: tuple[int, int]
    start: int

    def of(self, buffer: Tensor) -> Tensor:
        """Return its products in the flat ``buffer`` of all tiles, (lines, directions)."""
        lines, directions = self.shape
        return buffer[self.start : self.start + lines * directions].view(lines, directions)


@dataclass(frozen=True)
class Layout:
    """How the entries' products are computed: few large products, with not many more elements than there are entries.

    [Note: Tiles] Most lines have a short prefix, and picking lines out of the activations costs more than their
    products. So the directions that at least an eighth of the lines have are taken with every line at once: at most
    eight times the entries. The other lines are long; what they have beyond is tiled by length.

    Attributes:
        long_lines: (n,), int64, the longest first: at most an eighth of all.
        places: of the entries in the buffer of all tiles' products, in the carrier's order, (K,), int32.
        numel: the buffer's elements.
    """

    tiles: tuple[Tile, ...]
    long_lines: Tensor
    places: Tensor
    numel: int


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

    @property
    def reach(self) -> tuple[int, ...]:
        """How many lines have more than 0, 1, 2, 4, … entries, up to the longest's."""
        counts = [int((self.lengths > 0).sum())]
        least = 1
        while counts[-1]:
            counts.append(int((self.lengths > least).sum()))
            least *= 2
        return tuple(counts)

    @cached_property
    def layout(self) -> Layout:
        """How the entries' products are computed, on the directions' device. [Note: Tiles]."""
        if self.scattered is None:
            found = _layout(self.lengths)
        else:
            shape = len(self.lengths), self.widest
            whole = Tile(None, slice(0, self.widest), shape, 0)
            found = Layout((whole,), torch.empty(0, dtype=torch.int64), self.scattered, shape[0] * shape[1])
        device = self.directions.device
        places = found.places.to(device, torch.int32)
        return replace(found, long_lines=found.long_lines.to(device), places=places)

    def to(self, device: torch.device) -> Support:
        """Return the support with its vectors on ``device``."""
        lines = None if self.lines is None else self.lines.to(device)
        return replace(self, directions=self.directions.to(device), lines=lines)

    def rotate(self, activation: Tensor, directions: slice) -> Tensor:
        """Return ``activation`` of the shorter side, (T, d), in some of the used directions, (T, n)."""
        if self.directions.dim() == 1:
            return activation.index_select(1, self.directions[directions])
        return activation @ self.directions[:, directions].to(activation.dtype)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds: tensors on the host and numbers."""
        return {
            field.name: value.cpu() if isinstance(value := getattr(self, field.name), Tensor) else value
            for field in fields(self)
        }


def _layout(lengths: Tensor) -> Layout:
    """Return the layout of prefixes of ``lengths``, on the host. [Note: Tiles]."""
    order = lengths.argsort(descending=True, stable=True)
    order = order[: int((lengths > 0).sum())]
    by_length = lengths[order]
    rank = int(LONG_LINES * len(lengths))
    short = int(by_length[rank]) if rank < len(by_length) else 0
    tiles = [Tile(None, slice(0, short), (len(lengths), short), 0)] if short else []
    numel = len(lengths) * short
    long = by_length[by_length > short]
    starts: list[int] = []  # of each long line's products
    for size in _tile_sizes(long - short):
        first = len(starts)
        width = int(long[first]) - short
        tiles.append(Tile(slice(first, first + size), slice(short, short + width), (size, width), numel))
        starts += range(numel, numel + size * width, width)
        numel += size * width
    # Entry by entry, in the carrier's order: its line's number among the longest, its direction.
    number = torch.arange(len(order)).repeat_interleave(by_length)
    direction = torch.arange(len(number)) - (by_length.cumsum(0) - by_length)[number]
    places = order[number] * short + direction
    beyond = direction >= short
    places[beyond] = torch.tensor(starts, dtype=torch.int64)[number[beyond]] + direction[beyond] - short
    return Layout(tuple(tiles), order[: len(long)], places, numel)


def _tile_sizes(lengths: Tensor) -> Iterator[int]:
    """Yield the sizes of tiles of lines of ``lengths``, descending, none less than half as long as its tile's first."""
    start = 0
    while start < len(lengths):
        as_long = int((2 * lengths[start:] > lengths[start]).sum())
        size = min(max(as_long, LEAST_LINES), len(lengths) - start)
        yield size
        start += size


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
