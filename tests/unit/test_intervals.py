"""Wilson's interval against scipy's values and published ones."""

from __future__ import annotations

import pytest

from launch.intervals import wilson_interval


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [  # scipy 1.17.1: binomtest(correct, total).proportion_ci(method="wilson")
        (0, 10, 0.0, 0.27753279986288926),
        (10, 10, 0.7224672001371109, 1.0),
        (66, 100, 0.5627772885472462, 0.7453847920265184),
        (5, 10, 0.236593090512564, 0.7634069094874361),
        (1, 50, 0.0035392592716462223, 0.10495443589637814),
    ],
)
def test_wilson_intervals_are_scipy_s(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), rel=1e-12, abs=1e-12)


def test_wilson_intervals_are_the_published_ones() -> None:
    # Newcombe (1998), table I, method 3, for 81 of 263: 0.2553 to 0.3662; for 0 of 20: 0 to 0.1611.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson_interval(20, 20)[1] == 1
