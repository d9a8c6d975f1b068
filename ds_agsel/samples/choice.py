"""The choice of rows: z-scores, a draw without replacement, the rows' weight. Pure but for the device of its tensors.

GAST, arXiv:2603.09865: a block learns from K of its micro-batch's b rows, drawn in proportion to
softmax((s - mean) / std) of their scores s. Where the paper is silent: without replacement, population std. The draw is
Gumbel top-K, so that nothing is read back from the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ds_agsel.gast_section import GastConfig

_PURPOSE = 0x67617374  # keeps these draws apart from those of blocks, which come from (seed, step)
_EPS = 1e-12
_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class DrawKey:
    """What a draw depends on. ``micro_step``: the number of the forward in the step's window."""

    seed: int
    step: int
    micro_step: int
    rank: int
    block: int

    def generator(self) -> np.random.Generator:
        """Return the generator of this draw, independent of any global state."""
        entropy = [_PURPOSE, self.seed, self.step, self.micro_step, self.rank, self.block]
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def num_taken(config: GastConfig, rows: int) -> int:
    """Return K: how many of ``rows`` a block learns from, at most all of them. By default half, rounded up."""
    wanted = (rows + 1) // 2 if config.select_samples is None else config.select_samples
    return min(wanted, rows)


def needs_scores(config: GastConfig, rows: int) -> bool:
    """Return whether the choice among ``rows`` depends on their scores."""
    return config.draw != "random" and num_taken(config, rows) < rows


def row_weight(rows: int, taken: int) -> float:
    """Return the weight of a taken row; the others weigh 0. A loss that is a mean over rows stays one."""
    return rows / taken


def z_scores(scores: Tensor) -> Tensor:
    """Return (s - mean) / std of ``scores``, (rows,), in float64.

    The std is the population's, plus 1e-12 of the largest score. A row whose score is not finite gets -inf: it is
    taken last, and the others are scored without it.
    """
    s = scores.double()
    finite = torch.isfinite(s)
    s = torch.where(finite, s, 0.0)
    s = s / s.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    count = finite.sum().clamp_min(1)
    centred = torch.where(finite, s - s.sum() / count, 0.0)
    z = centred / ((centred.square().sum() / count).sqrt() + _EPS)
    return torch.where(finite, z, -torch.inf)


def gumbel(rows: int, key: DrawKey) -> Tensor:
    """Return standard Gumbel noise, float64, (rows,), on the host."""
    return torch.from_numpy(-np.log(np.maximum(key.generator().standard_exponential(rows), _TINY)))


def take(config: GastConfig, rows: int, key: DrawKey, scores: Tensor | None, device: torch.device) -> Tensor | None:
    """Return the taken rows of ``rows``, ascending, int64, (K,), on ``device``; None: all of them.

    Args:
        scores: (rows,), on ``device``; None where `needs_scores` says that there are none.

    Ties go to the lower row. The host does not wait for the device.
    """
    taken = num_taken(config, rows)
    if taken == rows:
        return None
    keys = torch.zeros(rows, dtype=torch.float64, device=device) if scores is None else z_scores(scores)
    if config.draw != "top":
        keys = keys + gumbel(rows, key).to(device, non_blocking=True)
    order = torch.sort(keys, descending=True, stable=True).indices
    return torch.sort(order[:taken]).values
