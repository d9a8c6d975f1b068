"""Random draws in log space: probabilities that would underflow to 0 keep their order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_TINY = float(np.finfo(np.float64).tiny)
# Below this, an exponential variate divided by alpha would overflow to inf and lose its order.
_SMALLEST_ALPHA = 1e-300


def generator(seed: int, step: int) -> np.random.Generator:
    """Return the generator of one step's draws: equal on all ranks, independent of any global state."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, step])))


def log_dirichlet(alpha: npt.ArrayLike, rng: np.random.Generator) -> Floats:
    """Return log p with p ~ Dirichlet(alpha), (n,); finite for any positive alpha.

    Gamma(a) = Gamma(a + 1) · U^(1/a) in distribution (Marsaglia and Tsang, 2000, section 6), whose logarithm
    does not underflow: with a = 1e-6 a plain Gamma variate is almost always 0.
    """
    a = np.maximum(np.asarray(alpha, dtype=np.float64), _SMALLEST_ALPHA)
    log_gamma = np.log(np.maximum(rng.standard_gamma(a + 1.0), _TINY)) - rng.standard_exponential(a.shape) / a
    shifted = log_gamma - log_gamma.max()
    log_p: Floats = shifted - np.log(np.exp(shifted).sum())
    return log_p


def gumbel_order(log_p: npt.ArrayLike, rng: np.random.Generator) -> tuple[int, ...]:
    """Return all indices in the order in which they are drawn without replacement in proportion to exp(log_p).

    That is by descending log_p plus Gumbel noise (Kool, van Hoof, Welling, arXiv:1903.06059). log_p need not be
    normalized.
    """
    keys = np.asarray(log_p)
    gumbel = -np.log(np.maximum(rng.standard_exponential(keys.shape), _TINY))
    return descending(keys + gumbel)


def descending(keys: Sequence[float] | Floats) -> tuple[int, ...]:
    """Return all indices by descending key; ties go to the lower index."""
    return tuple(int(index) for index in np.argsort(-np.asarray(keys, dtype=np.float64), kind="stable"))
