"""Scores of blocks from the norms of their parameters."""

from __future__ import annotations

import pytest
import torch

from ds_agsel.zero.block_scores import combine


@pytest.mark.parametrize(
    ("score", "expected"), [("sum", [7.0, 0.0, 2.0]), ("norm", [5.0, 0.0, 2.0]), ("rms", [0.5, 0.0, 1.0])]
)
def test_each_score_of_blocks_with_two_parameters_none_and_one(score, expected):
    norms = torch.tensor([3.0, 2.0, 4.0], dtype=torch.float64)
    assert combine(norms, [0, 2, 0], [100, 9, 4], score).tolist() == expected


def test_a_norm_that_is_not_finite_shows_in_its_block_alone():
    norms = torch.tensor([float("nan"), float("inf"), 1.0])
    for score in ("sum", "norm", "rms"):
        assert combine(norms, [0, 1, 2], [1, 1, 1], score).isfinite().tolist() == [False, False, True]
