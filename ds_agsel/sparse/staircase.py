"""Which entries of a matrix are trained: the K largest of a product of line and direction energies. Pure.

A matrix has *lines* along its longer side and, after the rotation, *directions* along its shorter one. With the
directions in the order of their energy, the K largest products are a prefix of each line: a length for each line says
which they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FLOOR_TOLERANCE = 1e-9  # absorbs the rounding of percent * n / 100


def num_entries(entries_percent: float, numel: int) -> int:
    """Return K = max(1, floor(entries_percent / 100 * numel)), the trained entries of a matrix of ``numel``."""
    return max(1, math.floor(entries_percent * numel / 100 + _FLOOR_TOLERANCE))


def prefix_lengths(lines: Tensor, directions: Tensor, entries: int) -> Tensor:
    """Return how many directions of each line are among the ``entries`` largest products; ties: lower line, direction.

    Args:
        lines: energy of each line, (L,), fp32, non-negative.
        directions: energy of each direction, (d,), fp32, non-negative, descending.

    Returns: (L,), int64, each in [0, d]; their sum is ``entries``.
    """
    if not 1 <= entries <= lines.numel() * directions.numel():
        raise ValueError(f"{entries} entries of a matrix of {lines.numel()} by {directions.numel()}")
    products = torch.outer(lines, directions)
    threshold = products.flatten().kthvalue(products.numel() - entries + 1).values
    lengths = (products > threshold).sum(1)
    ties = (products == threshold).sum(1)
    before = ties.cumsum(0) - ties
    left = entries - int(lengths.sum())
    return lengths + (left - before).clamp(min=0).minimum(ties)


def captured_fraction(lines: Tensor, directions: Tensor, lengths: Tensor) -> float:
    """Return the share of all energy that lies in the staircase, if entries have the product of their energies."""
    total = float(lines.double().sum() * directions.double().sum())
    if total == 0:
        return 0.0
    up_to = torch.cat([torch.zeros(1, dtype=torch.float64), directions.double().cumsum(0)])
    return float((lines.double() * up_to[lengths]).sum()) / total
