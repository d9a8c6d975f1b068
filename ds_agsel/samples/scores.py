"""Scores of rows against a support, and gradients of some rows, from a Linear's inputs and output gradients.

With X (rows, tokens, D_in) and dY (rows, tokens, D_out), row i's gradient of the weight is dY_iᵀ X_i, and its score is
the inner product of that with the support's gradient G: s_i = Σ_t (X_it Gᵀ) · dY_it. No per-row gradient is made. The
same number comes from inner products of tokens, Σ (X_it · X_u)(dY_it · dY_u) over the support's tokens u, which is
cheaper where tokens are few: each function takes what costs less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MAX_PRODUCTS = 1 << 22  # elements of a matrix of products that exists at once


@dataclass(frozen=True)
class Use:
    """What one call of a Linear left: input (rows, ..., D_in) and the output's gradient (rows, ..., D_out)."""

    x: Tensor
    dy: Tensor

    def by_row(self) -> tuple[Tensor, Tensor]:
        """Return both as (rows, tokens, D), to be multiplied for scores: fp16, whose range is too small, as bf16."""
        x, dy = (tensor.reshape(tensor.shape[0], -1, tensor.shape[-1]) for tensor in (self.x, self.dy))
        return (x.bfloat16(), dy.bfloat16()) if dy.dtype == torch.float16 else (x, dy)

    def of(self, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return both, of ``rows`` alone; of all if they are None."""
        return (self.x, self.dy) if rows is None else (self.x.index_select(0, rows), self.dy.index_select(0, rows))

    def gradient(self, rows: Tensor | None = None, weight: float = 1.0) -> Tensor:
        """Return the weight's gradient (D_out, D_in): of ``rows``, times ``weight``, or of all as torch computes it."""
        x, dy = self.of(rows)
        total = dy.reshape(-1, dy.shape[-1]).t().mm(x.reshape(-1, x.shape[-1]))
        return total if rows is None else total.mul_(weight)


@dataclass(frozen=True)
class Support:
    """What rows are scored against: G (D_out, D_in), or the support's tokens; divided by ``rows``, of which it is."""

    gradient: Tensor | None
    x: Tensor | None
    dy: Tensor | None
    rows: int

    def bytes(self) -> int:
        """Return the bytes that it holds."""
        held = (self.gradient, self.x, self.dy)
        return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)


def support_of(uses: Sequence[Use]) -> Support:
    """Return the support that ``uses`` of one Linear are: G or their tokens, whatever is smaller."""
    x, dy = joined(uses)
    rows, tokens = x.shape[0], x.shape[0] * x.shape[1]
    if tokens * (x.shape[-1] + dy.shape[-1]) < x.shape[-1] * dy.shape[-1]:
        return Support(None, x.flatten(0, 1), dy.flatten(0, 1), rows)
    return Support(_gradient(x, dy), None, None, rows)


def against(uses: Sequence[Use], support: Support) -> Tensor:
    """Return the scores of the rows of ``uses`` against ``support``, fp32, (rows,)."""
    x, dy = joined(uses)
    if support.gradient is not None:
        return _by_gradient(x, dy, support.gradient) / support.rows
    if support.x is None or support.dy is None:
        raise ValueError("a support holds a gradient or tokens")
    return _by_products(x, dy, support.x, support.dy, 1).sum(1) / support.rows


def of_halves(uses: Sequence[Use]) -> Tensor:
    """Return the scores of all rows, each against the mean gradient of the other half, fp32, (rows,).

    The first half is rows // 2 rows; there must be at least two rows.
    """
    x, dy = joined(uses)
    rows, tokens, d_in = x.shape
    half, d_out = rows // 2, dy.shape[-1]
    if half * (rows - half) * tokens * (d_in + d_out) < 2 * rows * d_in * d_out:
        products = _by_products(x[:half], dy[:half], x[half:].flatten(0, 1), dy[half:].flatten(0, 1), tokens)
        return torch.cat((products.sum(1) / (rows - half), products.sum(0) / half))
    first = _by_gradient(x[:half], dy[:half], _gradient(x[half:], dy[half:])) / (rows - half)
    second = _by_gradient(x[half:], dy[half:], _gradient(x[:half], dy[:half])) / half
    return torch.cat((first, second))


def joined(uses: Sequence[Use]) -> tuple[Tensor, Tensor]:
    """Return X and dY (rows, tokens, D): several uses are as many more tokens of the same rows."""
    pairs = [use.by_row() for use in uses]
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([x for x, _ in pairs], 1), torch.cat([dy for _, dy in pairs], 1)


def _gradient(x: Tensor, dy: Tensor) -> Tensor:
    return dy.flatten(0, 1).t().mm(x.flatten(0, 1))


def _by_gradient(x: Tensor, dy: Tensor, gradient: Tensor) -> Tensor:
    """Return Σ_t (X_it Gᵀ) · dY_it, (rows,): the smaller of the two sides is multiplied out."""
    products = x.matmul(gradient.t()).mul_(dy) if dy.shape[-1] <= x.shape[-1] else dy.matmul(gradient).mul_(x)
    return products.flatten(1).sum(1, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _by_products(x: Tensor, dy: Tensor, support_x: Tensor, support_dy: Tensor, tokens: int) -> Tensor:
    """Return Σ over tokens of (X_it · X_u)(dY_it · dY_u), (rows, support tokens / ``tokens``): by support row."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, support_rows = x.shape[0], support_x.shape[0] // tokens
    at_once = max(1, _MAX_PRODUCTS // max(1, x.shape[1] * support_x.shape[0]))
    parts = []
    for start in range(0, rows, at_once):
        x_part, dy_part = x[start : start + at_once], dy[start : start + at_once]
        products = x_part.matmul(support_x.t()).mul_(dy_part.matmul(support_dy.t()))
        parts.append(products.view(len(x_part), x.shape[1], support_rows, tokens).sum((1, 3), dtype=dtype))
    return torch.cat(parts)
