"""The simulated timeline: hand-computed steps, and what must hold for every plan, rate and selection."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_estimate import model_of

from ds_agsel.blocks import Block
from ds_agsel.config import SelectionConfig
from ds_agsel.estimate.cards import CARDS, Card
from ds_agsel.estimate.setup import Setup
from ds_agsel.estimate.shapes import ModelShape
from ds_agsel.estimate.table import estimate
from ds_agsel.estimate.timeline import Links, StepWork, Timeline, hiding_tokens, simulate, timeline_of, work_of
from ds_agsel.lottery import Bound
from ds_agsel.residency.plan import default_budget_bytes

SLOW = Links(h2d_bytes=1.0, d2h_bytes=1.0)
PLENTY = 10**9


def work(phase, before, *blocks, update=1.0):
    return StepWork(phase, before, dict.fromkeys(blocks, update))


# --------------------------------------------------------------------- by hand


def test_an_exploit_step_hides_what_arrives_before_its_update():
    timeline = Timeline({0: 4, 1: 6}, PLENTY, SLOW)
    timing = timeline.step(work("exploit", 12.0, 0, 1))
    assert (timing.seconds, timing.exposed_seconds, timing.h2d_bytes) == (14.0, 0.0, 10)


def test_an_update_waits_for_its_own_arrival_alone():
    timeline = Timeline({0: 4, 1: 6}, PLENTY, SLOW)
    timing = timeline.step(work("exploit", 5.0, 0, 1))
    # Block 0 is there at 4 and updated from 5 to 6; block 1 arrives at 10.
    assert (timing.seconds, timing.exposed_seconds) == (11.0, 4.0)


def test_an_explore_step_begins_to_move_when_backward_has_ended():
    timeline = Timeline({0: 4, 1: 6}, PLENTY, SLOW)
    timing = timeline.step(work("explore", 5.0, 0, 1))
    # Block 0 arrives at 9 and is updated while block 1 arrives, which is there at 15.
    assert (timing.seconds, timing.exposed_seconds) == (16.0, 9.0)


def test_blocks_that_stay_do_not_move():
    timeline = Timeline({0: 4, 1: 6}, PLENTY, SLOW, resident=frozenset({0, 1}))
    for phase in ("exploit", "explore"):
        timing = timeline.step(work(phase, 5.0, 0, 1))
        assert (timing.seconds, timing.exposed_seconds, timing.h2d_bytes, timing.d2h_bytes) == (7.0, 0.0, 0, 0)


def test_a_full_accelerator_lets_out_before_it_lets_in():
    timeline = Timeline({0: 4, 1: 6}, 6, SLOW, resident=frozenset({0}))
    timing = timeline.step(work("exploit", 1.0, 1))
    # Block 0 is written back from 0 to 4, block 1 arrives from 4 to 10.
    assert (timing.seconds, timing.d2h_bytes) == (11.0, 4)


def test_blocks_pass_through_a_budget_smaller_than_the_step():
    timeline = Timeline({0: 4, 1: 4}, 4, SLOW)
    timing = timeline.step(work("exploit", 4.0, 0, 1))
    # Updated from 4 to 5, written back from 5 to 9; the other arrives from 9 to 13.
    assert (timing.seconds, timing.exposed_seconds) == (14.0, 8.0)
    assert timeline.resident == {1}


def test_a_copy_still_under_way_holds_up_the_next_step():
    timeline = Timeline({0: 4, 1: 100, 2: 4}, PLENTY, SLOW, resident=frozenset({1}))
    assert timeline.step(work("exploit", 10.0, 0)).exposed_seconds == 0.0  # block 1 leaves until 100
    later = timeline.step(work("exploit", 10.0, 2))
    assert later.exposed_seconds == 104.0 - 11.0 - 10.0  # that of block 2 comes after it


def test_every_copy_has_its_latency():
    timeline = Timeline({0: 4, 1: 6}, PLENTY, replace(SLOW, latency_seconds=0.5))
    assert timeline.step(work("explore", 0.0, 0, 1)).seconds == 4.5 + 6.5 + 1.0


def test_work_is_counted_in_products_by_hand():
    """A tied model: two layers of 10 and 6 weights, a head of 4."""
    blocks = (Block(0, "embedding", (), 4), Block(1, "l.0", (), 10), Block(2, "l.1", (), 6))
    tied = ModelShape("tied", blocks, ((4,), (10,), (6,)), (0, 1, 2), ((4, 10, 6),))
    card = Card("c", "", flops=2.0, memory_bytes=28.0, link_bytes=1.0)

    def seconds(phase, selected):
        return work_of(tied, Setup(), card, 1, phase, selected).before_update_seconds

    assert seconds("exploit", [2]) == 20 + 4 + 6  # forward; back through the head; the gradient of the top layer
    assert seconds("exploit", [1]) == 20 + (4 + 6) + 10
    assert seconds("exploit", [0]) == 20 + (10 + 6) + 4
    assert seconds("explore", [2]) == 20 + (10 + 6) + 20
    assert work_of(tied, Setup(), card, 1, "explore", [2]).update_seconds == {2: 6.0}


# ------------------------------------------------------------------ for every plan

SIZES = st.lists(st.integers(1, 40), min_size=2, max_size=6)
RATES = st.floats(0.1, 1e3)


@st.composite
def runs(draw):
    """(block bytes, budget, [work of each step]) of a run."""
    sizes = dict(enumerate(draw(SIZES)))
    k = draw(st.integers(1, len(sizes)))
    budget = draw(st.integers(max(sizes.values()), default_budget_bytes(sizes, Bound(k))))
    steps = []
    for _ in range(draw(st.integers(1, 5))):
        selected = draw(st.sets(st.sampled_from(sorted(sizes)), min_size=1, max_size=k))
        before, update = draw(st.floats(0, 50)), draw(st.floats(0, 5))
        steps.append(work(draw(st.sampled_from(["explore", "exploit"])), before, *sorted(selected), update=update))
    return sizes, budget, steps


def play(run, links):
    sizes, budget, steps = run
    timeline = Timeline(sizes, budget, links)
    return timeline, [timeline.step(step) for step in steps]


@given(runs(), RATES, RATES)
def test_no_step_is_shorter_than_its_critical_path(run, h2d, d2h):
    timeline, timings = play(run, Links(h2d, d2h))
    total = 0.0
    for step, timing in zip(run[2], timings, strict=True):
        assert timing.exposed_seconds >= 0
        assert timing.seconds == pytest.approx(step.compute_seconds + timing.exposed_seconds)
        total += timing.seconds
    last_update = min(run[2][-1].update_seconds.values())
    assert timeline.now == pytest.approx(total)
    arrivals = sum(timing.h2d_bytes for timing in timings) / h2d
    assert total + 1e-6 >= arrivals + (last_update if timings[-1].h2d_bytes else 0)


@given(runs(), RATES, RATES, st.floats(1, 10))
def test_a_faster_link_never_makes_a_step_later(run, h2d, d2h, factor):
    slow, _ = play(run, Links(h2d, d2h))
    faster_in, _ = play(run, Links(h2d * factor, d2h))
    faster_out, _ = play(run, Links(h2d, d2h * factor))
    assert faster_in.now <= slow.now * (1 + 1e-12)
    assert faster_out.now <= slow.now * (1 + 1e-12)


@given(runs())
def test_nothing_is_exposed_where_nothing_moves(run):
    sizes, _, steps = run
    timeline = Timeline(sizes, PLENTY, SLOW, resident=frozenset(sizes))
    everything = [StepWork(s.phase, s.before_update_seconds, dict.fromkeys(sizes, 1.0)) for s in steps]
    for step in everything:
        timing = timeline.step(step)
        assert timing.exposed_seconds == pytest.approx(0, abs=1e-9)
        assert timing.h2d_bytes == timing.d2h_bytes == 0


@given(runs(), RATES)
def test_knowing_the_blocks_earlier_is_never_slower(run, rate):
    sizes, budget, steps = run
    ends = []
    for phase in ("exploit", "explore"):
        of_phase = [replace(step, phase=phase) for step in steps]
        ends.append(play((sizes, budget, of_phase), Links(rate, rate))[0].now)
    assert ends[0] <= ends[1] * (1 + 1e-12)


# ------------------------------------------------------------------------- models


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_exploit_steps_hide_from_the_stated_tokens_on_and_not_before(card):
    model = model_of(*((numel,) for numel in (5_000_000, *(2_000_000,) * 8)))
    least = hiding_tokens(model, Setup(), card, 2)
    assert least is not None
    assert simulate(model, Setup(), card, 2, least, "exploit").is_hidden
    assert not simulate(model, Setup(), card, 2, least - 1, "exploit").is_hidden
    assert not simulate(model, Setup(), card, 2, least, "explore").is_hidden


@pytest.mark.parametrize("phase", ["exploit", "explore"])
def test_a_round_moves_what_one_step_of_it_moves(phase):
    """Of 400 rounds: by the factor `select_every` fewer bytes a step, near the estimate's mean over all draws."""
    model, card = model_of(*((1_000_000,) for _ in range(8))), CARDS[0]
    single, held = (simulate(model, Setup(), card, 2, 100, phase, length, rounds=400) for length in (1, 5))
    assert held.h2d_bytes == single.h2d_bytes / 5 > 0
    assert held.exposed_seconds < single.exposed_seconds / 2
    rows = estimate(model, Setup(), SelectionConfig(select_every=5), (25,)).rows
    wanted = ("accelerator", "exploit", "expected")
    (expected,) = (row.traffic.h2d for row in rows if (row.stepping, row.phase, row.which) == wanted)
    # Of a step's two blocks 1.5 ± 0.57 are new: 400 rounds, four standard errors.
    assert held.h2d_bytes == pytest.approx(expected, rel=4 * 0.57 / 1.5 / 20)


def test_only_the_first_step_of_a_round_explores():
    model, card = model_of(*((1_000_000,) for _ in range(8))), replace(CARDS[0], link_bytes=1e30, latency_seconds=0.0)
    single, exploit, held = (
        simulate(model, Setup(), card, 2, 100, phase, length).step_seconds
        for phase, length in (("explore", 1), ("exploit", 1), ("explore", 5))
    )
    assert held == pytest.approx((single + 4 * exploit) / 5)


def test_a_link_that_is_too_slow_never_hides():
    model = model_of((1000,), (1000,))
    card = replace(CARDS[0], link_bytes=1e-3)
    assert hiding_tokens(model, Setup(), card, 1, limit=1 << 10) is None


def test_the_budget_is_the_one_of_the_run():
    model = model_of((6,), (4,), (4,), (2,))
    assert timeline_of(model, Setup(), CARDS[0], 1).budget_bytes == (6 + 4 + 4) * 12
    assert timeline_of(model, Setup(state_budget_bytes=100), CARDS[0], 1).budget_bytes == 100
    assert timeline_of(model, Setup(ranks=2), CARDS[0], 1).block_bytes[0] == 4 * 12  # 6 padded to 8
