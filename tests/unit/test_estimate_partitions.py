"""ZeRO's arithmetic by hand: what of a param group lies on a rank."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ds_agsel.estimate.partitions import flat_partition, parameter_partition, sub_groups


def test_a_flat_group_is_padded_to_twice_the_ranks_and_cut_in_equal_slices():
    first, second = (flat_partition((5, 4), 2, rank) for rank in (0, 1))
    assert (first.flat_numel, first.numel) == (second.flat_numel, second.numel) == (12, 6)
    assert (first.covered_numel, first.whole_numel, first.padding_numel) == (6, 9, 0)  # 5, and 1 of the 4
    assert (second.covered_numel, second.whole_numel, second.padding_numel) == (3, 4, 3)


def test_a_rank_beyond_the_parameters_has_padding_alone():
    last = flat_partition((1,), 4, 3)
    assert (last.flat_numel, last.numel, last.covered_numel, last.whole_numel, last.padding_numel) == (8, 2, 0, 0, 2)


def test_round_robin_deals_parameters_out_before_the_cut():
    first = flat_partition((6, 1, 2), 2, 0, round_robin=True)  # in the order 6, 2, 1, in a buffer of 12
    assert (first.covered_numel, first.whole_numel) == (6, 6)


def test_aligned_parameters_start_at_16_bytes():
    whole = flat_partition((3, 3), 1, 0, item_bytes=2, align_parameters=True)  # the second starts at 8
    assert (whole.flat_numel, whole.covered_numel, whole.padding_numel) == (12, 6, 6)


def test_stage_3_pads_every_parameter_by_itself():
    first, last = (parameter_partition((5, 4, 1), 4, rank) for rank in (0, 3))
    assert first.numel == last.numel == 2 + 1 + 1
    assert (first.flat_numel, first.covered_numel) == (16, 2 + 1 + 1)
    assert last.covered_numel == 0 + 1 + 0  # of 5 elements in shares of 2, none are left for the last rank


def test_sub_groups_close_once_they_are_large_enough():
    assert sub_groups((4, 4, 4, 4), 2, 3) == [4, 4]
    assert sub_groups((4, 4, 4), 2, 3) == [4, 2]
    assert sub_groups((4, 4, 4), 2, 6) == [6]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 5), st.booleans(), st.booleans())
def test_all_ranks_together_cover_every_element_once(numels, ranks, aligned, dealt):
    shares = [
        flat_partition(numels, ranks, rank, item_bytes=2, align_parameters=aligned, round_robin=dealt)
        for rank in range(ranks)
    ]
    assert sum(share.covered_numel for share in shares) == sum(numels)
    assert sum(share.numel for share in shares) == shares[0].flat_numel
    assert sum(parameter_partition(numels, ranks, rank).covered_numel for rank in range(ranks)) == sum(numels)
