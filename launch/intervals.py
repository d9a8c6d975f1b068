"""The confidence interval of a measured share."""

from __future__ import annotations

import math
from statistics import NormalDist

_Z_95 = NormalDist().inv_cdf(0.975)


def wilson_interval(correct: float, total: int) -> tuple[float, float]:
    """Return the bounds in [0, 1] of Wilson's 95 % score interval for ``correct`` of ``total`` trials.

    ``correct`` need not be whole: it may be a mean over seeds. scipy's `binomtest` takes whole numbers alone.
    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    share, weight = correct / total, _Z_95**2 / total
    center = (share + weight / 2) / (1 + weight)
    half_width = _Z_95 / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return max(0.0, center - half_width), min(1.0, center + half_width)
