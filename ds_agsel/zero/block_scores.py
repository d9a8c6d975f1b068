"""From the gradient norms of parameters to the scores of their blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Score = Literal["sum", "norm", "rms"]


def combine(norms: Tensor, block_of_param: Sequence[int], numels: Sequence[int], score: Score) -> Tensor:
    """Return the score of each block: one of three sizes of its gradient.

    "sum" adds up the norms of the parameters (Algorithm 1, lines 2-6, of arXiv:2512.15764); "norm" is the L2 norm of
    the block's whole gradient; "rms" is that divided by the square root of the block's number of elements. A block
    with no parameter in ``norms`` scores 0.

    Args:
        norms: L2 norm of each parameter's gradient, (num_params,), on the host: an `index_add_` on an accelerator has
            no fixed order, and ranks could differ where scores are close.
        block_of_param: the parameter's block, (num_params,).
        numels: elements of each block, (num_blocks,).

    Returns: (num_blocks,), of the dtype of ``norms``.
    """
    owners = torch.tensor(block_of_param, dtype=torch.int64)
    zeros = norms.new_zeros(len(numels))
    if score == "sum":
        return zeros.index_add_(0, owners, norms)
    of_blocks = zeros.index_add_(0, owners, norms.square()).sqrt()
    return of_blocks if score == "norm" else of_blocks / torch.tensor(numels, dtype=norms.dtype).sqrt()
