"""The file of states on NVMe, and the ring that they pass through: no group is read to where another one lies."""

from __future__ import annotations

import random

import pytest

from ds_agsel.residency.swap_plan import FileLayout, Read, plan_reads


def layout_of(sizes: dict[int, int], alignment: int) -> FileLayout:
    return FileLayout({group: {"master": size} for group, size in sizes.items()}, alignment)


def test_a_groups_moments_lie_together_behind_its_master_weights():
    """Each stretch begins where direct I/O can, each tensor where a processor reads it well."""
    layout = FileLayout(
        {3: {"master": 500, "codes": 130, "largest": 4}, 4: {"master": 512}, 9: {"master": 1, "a": 512}}, 512
    )
    assert [layout.master_size(group) for group in layout.sizes] == [512, 512, 512]
    assert [layout.size(group) for group in layout.sizes] == [1024, 512, 1024]
    assert layout.places(3) == {"master": 0, "codes": 512, "largest": 512 + 256}
    assert layout.starts() == {3: 0, 4: 1024, 9: 1536}
    assert layout.total() == 2560


def test_reads_run_ahead_as_far_as_the_ring_goes():
    layout = layout_of(dict.fromkeys(range(4), 12), alignment=4)
    assert plan_reads([0, 1, 2, 3], layout, 24) == (
        Read(0, 0, -1),
        Read(1, 12, -1),
        Read(2, 0, 0),
        Read(3, 12, 1),
    )
    assert {read.after for read in plan_reads([0, 1, 2, 3], layout, 48)} == {-1}
    with pytest.raises(ValueError, match="12 bytes of a ring of 11"):
        plan_reads([0], layout, 11)


@pytest.mark.parametrize("seed", range(50))
def test_no_group_is_read_to_where_another_lies(seed):
    chance = random.Random(seed)
    layout = layout_of({group: chance.randint(1, 120) for group in range(chance.randint(1, 12))}, chance.randint(1, 8))
    capacity = max(map(layout.size, layout.sizes)) + chance.randint(0, 200)
    order = chance.sample(list(layout.sizes), len(layout.sizes))
    reads = plan_reads(order, layout, capacity)
    assert [read.group for read in reads] == order
    for place, read in enumerate(reads):
        assert -1 <= read.after < place
        assert place == 0 or read.after >= reads[place - 1].after
        end = read.at + layout.size(read.group)
        assert read.at >= 0 and end <= capacity
        for other in reads[read.after + 1 : place]:  # those that may lie there still
            assert end <= other.at or other.at + layout.size(other.group) <= read.at
