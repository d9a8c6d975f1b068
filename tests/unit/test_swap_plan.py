"""The ring through which states on NVMe pass: no group is read to where another one still lies."""

from __future__ import annotations

import random

import pytest

from ds_agsel.residency.swap_plan import FileLayout, Read, plan_reads


def test_tensors_lie_aligned_and_one_after_the_other():
    layout = FileLayout({3: 5, 4: 8, 9: 1}, alignment=4)
    assert [layout.padded(group) for group in layout.numels] == [8, 8, 4]
    assert layout.starts() == {3: 0, 4: 24, 9: 48}
    assert layout.total() == 60


def test_reads_run_ahead_as_far_as_the_ring_goes():
    layout = FileLayout(dict.fromkeys(range(4), 4), alignment=4)
    assert plan_reads([0, 1, 2, 3], layout, 24) == (
        Read(0, 0, -1),
        Read(1, 12, -1),
        Read(2, 0, 0),
        Read(3, 12, 1),
    )
    assert {read.after for read in plan_reads([0, 1, 2, 3], layout, 48)} == {-1}
    with pytest.raises(ValueError, match="12 elements of a ring of 11"):
        plan_reads([0], layout, 11)


@pytest.mark.parametrize("seed", range(50))
def test_no_group_is_read_to_where_another_lies(seed):
    chance = random.Random(seed)
    layout = FileLayout({group: chance.randint(1, 40) for group in range(chance.randint(1, 12))}, chance.randint(1, 8))
    capacity = max(map(layout.size, layout.numels)) + chance.randint(0, 200)
    order = chance.sample(list(layout.numels), len(layout.numels))
    reads = plan_reads(order, layout, capacity)
    assert [read.group for read in reads] == order
    for place, read in enumerate(reads):
        assert -1 <= read.after < place
        assert place == 0 or read.after >= reads[place - 1].after
        end = read.at + layout.size(read.group)
        assert read.at >= 0 and end <= capacity
        for other in reads[read.after + 1 : place]:  # those that may lie there still
            assert end <= other.at or other.at + layout.size(other.group) <= read.at
