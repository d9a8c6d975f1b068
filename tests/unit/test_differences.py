"""Paired differences on made-up cells with a known answer: mean, coverage of the interval, what is not paired."""

from __future__ import annotations

import numpy as np
import pytest

from launch.reproduction.differences import Difference, Rows, difference


def cells(random: np.random.Generator, seeds: int, rows: int, apart: float, of_seed: float, of_row: float):
    """Two methods ``apart``, whose difference varies by seed and by row; what they share varies far more."""
    ours, theirs = {}, {}
    for seed in range(seeds):
        tokens = random.integers(5, 30, rows).astype(float)
        shared = tokens * (2 + random.normal(0, 1, rows) + random.normal(0, 1))
        between = tokens * (apart + random.normal(0, of_seed) + random.normal(0, of_row, rows))
        ours[seed] = Rows(tuple(shared + between), tuple(tokens))
        theirs[seed] = Rows(tuple(shared), tuple(tokens))
    return ours, theirs


def test_the_mean_is_that_of_the_seeds_differences_and_equal_runs_do_not_differ():
    ours = {1: Rows((3.0, 5.0), (1.0, 3.0)), 2: Rows((2.0,), (1.0,)), 9: Rows((7.0,), (1.0,))}
    theirs = {1: Rows((1.0, 3.0), (1.0, 3.0)), 2: Rows((5.0,), (1.0,)), 4: Rows((7.0,), (1.0,))}
    found = difference(ours, theirs)
    assert found is not None and (found.mean, found.seeds) == ((1.0 - 3.0) / 2, 2)
    assert difference(ours, ours) == Difference(0.0, 0.0, 0.0, 3)
    assert difference({1: ours[1]}, {2: theirs[2]}) is None


@pytest.mark.parametrize(("seeds", "of_seed", "of_row", "least"), [(20, 0.1, 0.3, 0.88), (8, 0.0, 1.0, 0.90)])
def test_the_interval_holds_the_true_difference_as_often_as_it_says(seeds, of_seed, of_row, least):
    random, held = np.random.default_rng(7), 0
    for trial in range(200):
        found = difference(*cells(random, seeds, 40, -0.05, of_seed, of_row), resamples=400, seed=trial)
        held += found.low <= -0.05 <= found.high
    assert least <= held / 200 <= 0.995


def test_pairing_tells_apart_what_two_separate_means_can_not():
    ours, theirs = cells(np.random.default_rng(3), 3, 256, -0.03, 0.002, 0.05)
    found = difference(ours, theirs)
    assert found.is_beyond_chance and -0.05 < found.low < found.high < -0.01
    assert np.std([rows.mean for rows in theirs.values()]) > 0.1  # the seeds themselves differ far more
    nothing = difference(*cells(np.random.default_rng(4), 3, 256, 0.0, 0.02, 0.05))
    assert not nothing.is_beyond_chance


def test_other_rows_are_not_paired():
    with pytest.raises(ValueError, match="rows of seed 1 are not the same"):
        difference({1: Rows((1.0,), (2.0,))}, {1: Rows((1.0,), (3.0,))})


def test_a_run_between_two_measurements_is_interpolated_row_by_row():
    before, after = Rows((4.0, 8.0), (1.0, 2.0)), Rows((2.0, 4.0), (1.0, 2.0))
    assert before.toward(after, 0.25) == Rows((3.5, 7.0), (1.0, 2.0))
    assert before.toward(after, 0.25).mean == pytest.approx(before.mean + 0.25 * (after.mean - before.mean))
