"""Differences between methods that were trained on the same data, with bootstrap intervals over seeds and rows.

[Note: Pairing] Two methods share a seed: its training batches and its held-out rows. So a row's loss under the one less
its loss under the other is free of what the rows and the data have in common. A resample draws seeds with replacement,
and for each of them its rows with replacement; rows of one seed are not those of another. What it gives is the spread
over other seeds and other rows of the same kind; with s seeds there are few different draws of seeds, and an interval
over two or three of them is narrow by chance at times. The number of seeds stands beside each interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 4000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Rows:
    """A run's values on its held-out rows, in their order: sums (of losses, of right answers), and their weights.

    The run's value is Σ sums / Σ weights. Weights are tokens for a loss, 1 for an answer.
    """

    sums: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The run's value."""
        return sum(self.sums) / sum(self.weights)

    def toward(self, other: Rows, share: float) -> Rows:
        """Return the values on the way to ``other``, at ``share`` of it: linear, row by row."""
        return Rows(tuple(a + share * (b - a) for a, b in zip(self.sums, other.sums, strict=True)), self.weights)


@dataclass(frozen=True)
class Difference:
    """The mean over ``seeds`` seeds of a method's value less another's, and its 95 % interval."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def is_beyond_chance(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def difference(
    ours: Mapping[int, Rows], theirs: Mapping[int, Rows], resamples: int = RESAMPLES, seed: int = 0
) -> Difference | None:
    """Return ``ours`` less ``theirs`` (seed -> its rows) over the seeds that both have; None if they have none.

    The interval is the percentile bootstrap's, [Note: Pairing]. Raises ValueError if a seed's rows are not the same.
    """
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    apart, weights = [], []
    for number in shared:
        if ours[number].weights != theirs[number].weights:
            raise ValueError(f"the held-out rows of seed {number} are not the same in both runs")
        apart.append(np.subtract(ours[number].sums, theirs[number].sums))
        weights.append(np.array(ours[number].weights))
    mean = float(np.mean([a.sum() / w.sum() for a, w in zip(apart, weights)]))
    drawn = _resampled(apart, weights, resamples, np.random.default_rng(seed))
    low, high = np.quantile(drawn, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return Difference(mean, float(low), float(high), len(shared))


def _resampled(
    apart: Sequence[Floats], weights: Sequence[Floats], resamples: int, random: np.random.Generator
) -> Floats:
    """Return the mean difference of each resample, (resamples,)."""
    seeds = random.integers(len(apart), size=(resamples, len(apart)))
    means = np.empty(seeds.shape)
    for number, (values, tokens) in enumerate(zip(apart, weights)):
        places = np.nonzero(seeds == number)
        rows = random.integers(len(values), size=(len(places[0]), len(values)))
        means[places] = values[rows].sum(1) / tokens[rows].sum(1)
    drawn: Floats = means.mean(1)
    return drawn
