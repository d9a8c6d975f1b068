"""The choice of rows: z-scores, draws without replacement, keys that are independent, weights."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ds_agsel.gast_section import GastConfig
from ds_agsel.samples.choice import DrawKey, gumbel, needs_scores, num_taken, row_weight, take, z_scores

KEY = DrawKey(seed=1, step=2, micro_step=0, rank=0, block=3)
CPU = torch.device("cpu")


def taken(config: GastConfig, rows: int, key: DrawKey = KEY, scores: torch.Tensor | None = None) -> list[int] | None:
    found = take(config, rows, key, scores, CPU)
    return None if found is None else found.tolist()


def test_z_scores_are_standardised_by_the_population() -> None:
    scores = torch.tensor([1.0, 2.0, 4.0, 9.0])
    z = z_scores(scores)
    assert z.tolist() == pytest.approx(((scores - 4) / scores.std(correction=0)).tolist())
    assert z_scores(scores * 1e-20).tolist() == pytest.approx(z.tolist()), "the scale of gradients is no matter"
    assert z_scores(torch.full((3,), 7.0)).tolist() == [0, 0, 0]


def test_a_row_without_a_finite_score_is_taken_last() -> None:
    scores = torch.tensor([math.nan, 5.0, -math.inf, 1.0])
    assert z_scores(scores).tolist() == pytest.approx([-math.inf, 1, -math.inf, -1])
    for step in range(20):
        assert taken(GastConfig(select_samples=2), 4, replace(KEY, step=step), scores) == [1, 3]


@pytest.mark.parametrize(("rows", "wanted", "k"), [(8, None, 4), (5, None, 3), (1, None, 1), (8, 3, 3), (2, 3, 2)])
def test_half_of_the_rows_by_default_and_never_more_than_there_are(rows: int, wanted: int | None, k: int) -> None:
    config = GastConfig(select_samples=wanted)
    assert num_taken(config, rows) == k
    found = taken(config, rows, scores=torch.arange(rows).float())
    assert found is None if k == rows else len(set(found or [])) == k
    assert row_weight(rows, k) * k == pytest.approx(rows)
    assert needs_scores(config, rows) == (k < rows)
    assert not needs_scores(GastConfig(select_samples=wanted, draw="random"), rows)


def test_top_takes_the_highest_and_ties_go_to_the_lower_row() -> None:
    config = GastConfig(draw="top", select_samples=2)
    assert taken(config, 4, scores=torch.tensor([1.0, 3.0, 3.0, 3.0])) == [1, 2]


def test_every_part_of_the_key_gives_another_draw() -> None:
    noises = [gumbel(4, KEY)] + [gumbel(4, replace(KEY, **{part: 99})) for part in vars(KEY)]
    assert torch.equal(noises[0], gumbel(4, replace(KEY)))
    for one, other in itertools.combinations(noises, 2):
        assert not torch.equal(one, other)


def test_the_global_generators_are_left_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    take(GastConfig(), 8, KEY, torch.rand(8, generator=torch.Generator()), CPU)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


@pytest.mark.parametrize("draw", ["sample", "random"])
def test_draws_follow_softmax_without_replacement(draw: str) -> None:
    """Pairs of 4 rows, each as often as drawing one after the other in proportion to exp(z) gives it: z < 4.5."""
    scores, trials = torch.tensor([0.5, -1.0, 2.0, 0.1]), 4000
    config = GastConfig(select_samples=2, draw=draw)
    p = torch.softmax(z_scores(scores), 0) if draw == "sample" else torch.full((4,), 0.25)
    counts: dict[tuple[int, ...], int] = {}
    for step in range(trials):
        pair = tuple(taken(config, 4, replace(KEY, step=step), scores if draw == "sample" else None) or [])
        counts[pair] = counts.get(pair, 0) + 1
    for a, b in itertools.combinations(range(4), 2):
        expected = float(p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b]))
        deviation = math.sqrt(trials * expected * (1 - expected))
        assert abs(counts.get((a, b), 0) - trials * expected) < 4.5 * deviation
