"""The gradient of a matrix's trained entries, and what they add to the matrix.

[Note: The rotation stays out of forward] The paper's layer multiplies by the rotated matrix, three products a forward.
W + P scatter(S) Q' is the same function of the values S, so that forward is the plain layer, and the values are added
to the matrix after each update. Only the gradient of S needs the rotation: for lines a and directions b of a matrix
whose gradient is A'B, with A of the lines and B of the directions, dS[a, b] = A[:, a] . (B U)[:, b].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ds_agsel.sparse.basis import Support

if TYPE_CHECKING:
    from ds_agsel.sparse.targets import Target


class EntriesGradient(torch.autograd.Function):
    """The identity on a layer's output; its backward gives the layer's carrier its gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, layer_input: Tensor, values: Tensor, target: Target) -> Tensor:
        """Return ``output`` as a view.

        Args:
            output, layer_input: of the layer, (..., D_out) and (..., D_in).
            values: the carrier, (K,).
        """
        ctx.save_for_backward(layer_input)
        ctx.target, ctx.dtype = target, values.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return (gradient of the output, none, gradient of the carrier, none)."""
        (gradient,) = gradients
        (layer_input,) = ctx.saved_tensors
        target: Target = ctx.target
        of_output = gradient.reshape(-1, gradient.shape[-1])
        of_input = layer_input.detach().reshape(-1, layer_input.shape[-1]).to(of_output.dtype)
        lines, directions = (of_output, of_input) if target.lines_are_outputs else (of_input, of_output)
        if target.energy is not None:
            target.energy.add(lines.T @ directions)
        if target.support is None:
            return gradient, None, gradient.new_zeros(target.entries, dtype=ctx.dtype), None
        return gradient, None, entries_gradient(lines, directions, target.support).to(ctx.dtype), None


def entries_gradient(lines: Tensor, directions: Tensor, support: Support) -> Tensor:
    """Return the gradient of the carrier, (K,), of activations (T, L) and (T, d); the matrix's is their product."""
    if support.lines is not None:
        lines = lines @ support.lines.to(lines.dtype)
    layout = support.layout
    products = lines.new_empty(layout.numel)
    of_long = lines.index_select(1, layout.long_lines).T @ directions  # all directions: few lines, and any length
    for tile in layout.tiles:
        if tile.lines is None:
            torch.mm(lines.T, support.rotate(directions, tile.directions), out=tile.of(products))
        else:
            tile.of(products).copy_(support.rotate(of_long[tile.lines], tile.directions))
    return products.index_select(0, layout.places)


def entries_products(lines: Tensor, directions: Tensor, support: Support, values: Tensor) -> Tensor:
    """Return each token's gradient of the carrier times ``values``, (K,): their inner products, (T,), fp32 or fp64.

    Args:
        lines, directions: activations (T, L) and (T, d), as for `entries_gradient`.
    """
    matrix = added_rows(values, support, slice(None), lines_are_rows=True).to(lines.dtype)
    products = (lines @ matrix).mul_(directions)
    return products.sum(1, dtype=torch.promote_types(lines.dtype, torch.float32))


def added_rows(values: Tensor, support: Support, rows: slice, lines_are_rows: bool) -> Tensor:
    """Return the rows ``rows`` of what ``values`` add to the matrix, in fp32.

    Args:
        values: the carrier, (K,).
        rows: with bounds, or all.
        lines_are_rows: whether the matrix is (L, d); else it is (d, L).
    """
    products = values.new_zeros(support.layout.numel, dtype=torch.float32)
    products.index_copy_(0, support.layout.places.long(), values.float())
    line_rows, direction_rows = (rows, slice(None)) if lines_are_rows else (slice(None), rows)
    if support.directions.dim() > 1 and support.lines is None:
        return _added_by_tiles(products, support, line_rows, support.directions[direction_rows], lines_are_rows)
    added = _added_through_all_lines(products, support, line_rows, direction_rows)
    return added if lines_are_rows else added.T


def _added_by_tiles(
    products: Tensor, support: Support, line_rows: slice, basis: Tensor, lines_are_rows: bool
) -> Tensor:
    """Return `added_rows` of the lines ``line_rows`` and the components that ``basis`` has rows for."""
    start, end, _ = line_rows.indices(len(support.lengths))
    shape = (end - start, len(basis)) if lines_are_rows else (len(basis), end - start)
    added = products.new_zeros(shape)
    for tile in support.layout.tiles:
        spread, of_tile = tile.of(products), basis[:, tile.directions].float()
        if tile.lines is None:
            _multiply(spread[line_rows], of_tile, lines_are_rows, out=added)
            continue
        lines = support.layout.long_lines[tile.lines]
        if end - start < len(support.lengths):
            here = (lines >= start) & (lines < end)
            lines, spread = lines[here] - start, spread[here]
        added.index_add_(0 if lines_are_rows else 1, lines, _multiply(spread, of_tile, lines_are_rows))
    return added


def _multiply(spread: Tensor, basis: Tensor, lines_are_rows: bool, out: Tensor | None = None) -> Tensor:
    return torch.mm(*((spread, basis.T) if lines_are_rows else (basis, spread.T)), out=out)


def _added_through_all_lines(products: Tensor, support: Support, line_rows: slice, direction_rows: slice) -> Tensor:
    """Return `added_rows` by line, (lines, d), of the values spread over all lines."""
    spread = products.new_zeros((len(support.lengths), support.widest))
    for tile in support.layout.tiles:
        lines = slice(None) if tile.lines is None else support.layout.long_lines[tile.lines]
        spread[lines, tile.directions] = tile.of(products)
    spread = spread[line_rows] if support.lines is None else support.lines[line_rows].float() @ spread
    if support.directions.dim() > 1:
        return spread @ support.directions[direction_rows].float().T
    added = spread.new_zeros((len(spread), support.num_directions))
    added[:, support.directions] = spread
    return added[:, direction_rows]
