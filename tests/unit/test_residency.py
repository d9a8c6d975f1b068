"""What moves between host and accelerator: the plan, and the states that the moves leave behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rehearsal import Twin, rehearse

from ds_agsel.errors import ConfigError, TrainingError
from ds_agsel.lottery import Bound
from ds_agsel.residency import (
    BlockResidency,
    Move,
    Residency,
    default_budget_bytes,
    eviction_order,
    plan_moves,
    transfer,
    update_order,
)
from ds_agsel.residency.plan import check_budget
from ds_agsel.residency.states import MASTER, MOMENTS

SIZES = {0: 50, 1: 10, 2: 20, 3: 30}
HOST = SimpleNamespace(is_synchronized_device=lambda: True, current_device_name=lambda: "cpu")


@st.composite
def situations(draw: Any) -> tuple[dict[int, int], int, set[int], set[int]]:
    """Bytes of up to eight blocks, a budget that holds each of them, resident and selected blocks."""
    sizes = dict(enumerate(draw(st.lists(st.integers(1, 20), min_size=1, max_size=8))))
    budget = draw(st.integers(max(sizes.values()), sum(sizes.values()) + 5))
    resident: set[int] = set()
    for block in draw(st.permutations(list(sizes))):
        if sum(sizes[b] for b in resident) + sizes[block] <= budget and draw(st.booleans()):
            resident.add(block)
    selected = draw(st.sets(st.sampled_from(list(sizes)), min_size=1))
    return sizes, budget, resident, selected


COUNTS = st.lists(st.integers(0, 3), min_size=8, max_size=8)


@given(situations(), st.booleans(), COUNTS)
def test_a_plan_brings_every_selected_block_in_time_and_stays_inside_its_budget(situation, is_cache, counts):
    sizes, budget, resident, selected = situation
    may_stay = eviction_order(resident, counts) if is_cache else ()
    moves = plan_moves(resident, selected, sizes, budget, may_stay)
    here, updated = set(resident), []

    def carry_out(after: int | None) -> None:
        for move in moves:
            if move.after == after:
                (here.add if move.kind == "arrive" else here.remove)(move.block)
                assert sum(sizes[block] for block in here) <= budget

    carry_out(None)
    for block in update_order(resident, selected):
        assert block in here
        updated.append(block)
        carry_out(block)
    assert here <= selected | set(may_stay)
    assert sorted(updated) == sorted(selected)


@given(situations(), COUNTS)
def test_a_cache_evicts_for_room_alone_and_what_was_updated_least(situation, counts):
    sizes, budget, resident, selected = situation
    order = eviction_order(resident, counts)
    assert [counts[block] for block in order] == sorted(counts[block] for block in resident)
    moves = plan_moves(resident, selected, sizes, budget, order)
    unselected = [block for block in order if block not in selected]
    gone = [move.block for move in moves if move.kind == "leave" and move.block in unselected]
    assert gone == unselected[: len(gone)]
    used = sum(sizes[block] for block in resident)
    for place, move in enumerate(moves):
        if move.kind == "leave":  # the arrival that comes next had no room
            coming = next(later.block for later in moves[place:] if later.kind == "arrive")
            assert used + sizes[coming] > budget
        used += sizes[move.block] * (1 if move.kind == "arrive" else -1)


@given(situations(), COUNTS)
def test_with_room_for_all_only_first_visits_move(situation, counts):
    sizes, _, resident, selected = situation
    moves = plan_moves(resident, selected, sizes, sum(sizes.values()), eviction_order(resident, counts))
    assert moves == tuple(Move("arrive", block) for block in sorted(selected - resident))


@given(situations())
def test_blocks_that_stay_selected_do_not_move_where_the_selection_fits(situation):
    sizes, _, resident, selected = situation
    roomy = sum(sizes.values())
    moves = plan_moves(resident, selected, sizes, roomy)
    assert {move.block for move in moves} == resident ^ selected
    assert all(move.after is None for move in moves)
    assert plan_moves(selected, selected, sizes, roomy) == ()


def test_what_does_not_fit_passes_through():
    assert plan_moves({1}, {1, 2, 3}, SIZES, 40) == (
        Move("arrive", 2), Move("leave", 1, 1), Move("leave", 2, 2), Move("arrive", 3, 2),
    )  # fmt: skip
    assert update_order({3}, {1, 2, 3}) == (3, 1, 2)


def test_the_default_budget_is_the_largest_selection_and_two_blocks():
    assert default_budget_bytes(SIZES, Bound(1)) == 50 + 30 + 20
    assert default_budget_bytes(SIZES, Bound(4)) == sum(SIZES.values())


def test_a_budget_below_the_largest_block_is_refused_with_its_name_and_bytes():
    with pytest.raises(ConfigError, match=r'state_budget_bytes=49 .* block "embedding", which takes 50 bytes'):
        check_budget(49, SIZES, ["embedding", "a", "b", "c"])
    check_budget(50, SIZES, ["embedding", "a", "b", "c"])


def test_places_change_in_one_order_only():
    block = BlockResidency(3)
    with pytest.raises(TrainingError, match="block 3 can't be updated: it is on host"):
        block.updated()
    with pytest.raises(TrainingError, match="block 3 can't become resident: it is on host"):
        block.become(Residency.RESIDENT)
    for place in (Residency.ARRIVING, Residency.RESIDENT):
        block.become(place)
    block.updated()
    block.become(Residency.LEAVING)
    with pytest.raises(TrainingError, match="the host's copy of its state is stale"):
        block.become(Residency.ON_HOST)


@given(st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_states_that_visit_are_those_that_stay(seed):
    rehearse(HOST, seed)


def test_bytes_moved_are_those_of_the_blocks_that_changed():
    twin = Twin(HOST, [4, 6, 8, 10], (MASTER, *MOMENTS), 28)
    twin.step({0}, 0)
    assert twin.moved == {"h2d": 4 * 10, "d2h": 0}  # no moments yet: they are made where they are needed
    twin.step({0}, 1)
    assert twin.moved == {"h2d": 4 * 10, "d2h": 0}
    twin.step({1}, 2)
    assert twin.moved == {"h2d": 4 * (10 + 18), "d2h": 12 * 10}
    twin.step({0}, 3)
    assert twin.moved == {"h2d": 4 * (10 + 18) + 12 * 10, "d2h": 12 * (10 + 18)}
    assert twin.transfer.resident_bytes() == 12 * 10


def test_memory_that_can_not_be_pinned_is_used_as_it_is_with_one_warning(caplog, monkeypatch):
    def no_room(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(transfer, "_pageable_warned", False)
    device = SimpleNamespace(is_synchronized_device=lambda: False, is_pinned=lambda tensor: False, pin_memory=no_room)
    tensors = [torch.arange(3.0), torch.arange(5.0)]
    assert all(transfer.pinned(tensor, device) is tensor for tensor in tensors)
    [record] = caplog.records
    assert "12 bytes of host memory can't be pinned" in record.message and "ulimit -l" in record.message
