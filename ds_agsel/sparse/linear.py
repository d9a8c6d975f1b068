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
    rotated = support.rotate(directions)
    if support.lines is not None:
        lines = lines @ support.lines.to(lines.dtype)
    pieces = []
    for tile in support.tiles:
        products = lines.index_select(1, tile.lines).T @ rotated[:, : tile.width]
        pieces.append(products.flatten().index_select(0, tile.places))
    return torch.cat(pieces)


def added_rows(values: Tensor, support: Support, rows: slice, lines_are_rows: bool) -> Tensor:
    """Return the rows ``rows`` of what ``values`` add to the matrix, in fp32.

    Args:
        values: the carrier, (K,).
        lines_are_rows: whether the matrix is (L, d); else it is (d, L).
    """
    spread = _spread(values, support)
    line_rows, direction_rows = (rows, slice(None)) if lines_are_rows else (slice(None), rows)
    spread = spread[line_rows] if support.lines is None else support.lines[line_rows].float() @ spread
    if support.directions.dim() == 1:
        added = spread.new_zeros((spread.shape[0], support.num_directions))
        added[:, support.directions] = spread
        added = added[:, direction_rows]
    else:
        added = spread @ support.directions[direction_rows].float().T
    return added if lines_are_rows else added.T


def _spread(values: Tensor, support: Support) -> Tensor:
    """Return ``values`` at their lines and directions, (L, widest), fp32."""
    spread = values.new_zeros((support.lengths.numel(), support.widest), dtype=torch.float32)
    start = 0
    for tile in support.tiles:
        piece = values.new_zeros(len(tile.lines) * tile.width, dtype=torch.float32)
        end = start + len(tile.places)
        piece.index_copy_(0, tile.places.long(), values[start:end].float())
        spread[tile.lines, : tile.width] = piece.view(-1, tile.width)
        start = end
    return spread
