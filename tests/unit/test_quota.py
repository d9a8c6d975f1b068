"""How many blocks a step may update: the first k, or what the share of the parameters takes."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_contexts import context, make

from ds_agsel import policies
from ds_agsel.config import SelectionConfig
from ds_agsel.errors import TrainingError
from ds_agsel.lottery import Bound, Lottery
from ds_agsel.policies import Policy, PolicyContext, Quota, checked_plan, registry
from ds_agsel.policies.quota import RunningAdmission
from ds_agsel.policies.sampling import descending, generator, gumbel_order

# Few values, so that ties are the rule, and a block without a gradient (0) and one that overflowed among them.
KEYS = st.lists(st.sampled_from([0.0, 1.0, 1.0 + 2**-52, 2.0, math.inf]), min_size=1, max_size=9)


@st.composite
def quotas(draw: st.DrawFn, size: int | None = None) -> Quota:
    size = draw(st.integers(1, 9)) if size is None else size
    if draw(st.booleans()):
        return Quota.of_blocks(size, draw(st.integers(1, size)))
    costs = draw(st.lists(st.integers(1, 20), min_size=size, max_size=size))
    return Quota(tuple(costs), draw(st.integers(1, sum(costs))))


def cost(quota: Quota, blocks: tuple[int, ...]) -> int:
    return sum(quota.costs[block] for block in blocks)


@given(st.data())
def test_the_share_is_never_exceeded_and_at_least_one_block_is_admitted(data: st.DataObject) -> None:
    quota = data.draw(quotas())
    ranking = data.draw(st.permutations(range(len(quota.costs))))
    admitted = quota.admit(ranking)
    assert list(admitted) == sorted(admitted)
    first = tuple(ranking[: len(admitted)])
    assert first and set(first) == set(admitted), "the best ones, none left out between them"
    assert cost(quota, first) <= quota.limit or len(first) == 1
    rest = ranking[len(admitted) :]
    assert not rest or cost(quota, first) + quota.costs[rest[0]] > quota.limit


def test_blocks_that_are_counted_are_the_first_k() -> None:
    assert Quota.of_blocks(5, 2).admit([3, 0, 4, 1, 2]) == (0, 3)


def test_a_small_block_behind_one_that_does_not_fit_is_not_admitted() -> None:
    quota = Quota((4, 8, 1), 6)
    assert quota.admit([0, 1, 2]) == (0,)
    assert quota.admit([1, 0, 2]) == (1,), "the first at any cost"


@given(st.data())
def test_the_bounds_hold_for_every_ranking(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 6))
    quota = data.draw(quotas(size))
    values = data.draw(st.lists(st.integers(0, 50), min_size=size, max_size=size))
    choices = {quota.admit(ranking) for ranking in itertools.permutations(range(size))}
    assert max(map(len, choices)) == quota.max_selected
    most = max(sum(values[block] for block in blocks) for blocks in choices)
    assert most <= quota.most(values)
    if set(quota.costs) == {1}:
        assert most == quota.most(values)


@given(keys=KEYS, data=st.data())
def test_the_best_so_far_are_the_best_of_all(keys: list[float], data: st.DataObject) -> None:
    """Keys that come one by one, in any order, give the choice that all of them at once give, ties included."""
    quota = data.draw(quotas(len(keys)))
    running, kept, seen = RunningAdmission(quota), set[int](), list[int]()
    for index in data.draw(st.permutations(range(len(keys)))):
        seen = sorted([*seen, index])
        kept.add(index)
        out = running.add(index, keys[index])
        assert set(out) <= kept
        kept.difference_update(out)
        assert tuple(sorted(kept)) == quota.admit(seen[place] for place in descending([keys[i] for i in seen]))
    assert tuple(sorted(kept)) == quota.admit(descending(keys))


def test_nan_is_the_largest_running_key() -> None:
    running = RunningAdmission(Quota.of_blocks(3, 1))
    assert running.add(0, math.nan) == ()
    assert running.add(1, 5.0) == (1,)
    assert running.add(2, math.inf) == (2,), "a tie with the first one"


def of_share(costs: tuple[int, ...], limit: int, **section: object) -> PolicyContext:
    quota = Quota(costs, limit)
    names = tuple(f"unit{index}" for index in range(len(costs)))
    return PolicyContext(SelectionConfig(**section), len(costs), quota.max_selected, names, 10, share=quota)


@pytest.mark.parametrize(("num_selected", "costs"), [(2, (1, 1, 1)), (3, (1, 1))])
def test_a_share_that_does_not_fit_the_context_is_refused(num_selected: int, costs: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"^num_selected={num_selected}, num_blocks=3 and a share of {len(costs)}"):
        PolicyContext(SelectionConfig(), 3, num_selected, ("a", "b", "c"), 10, share=Quota(costs, len(costs)))


OF_THE_PACKAGE = {name: cls for name, cls in registry._POLICIES.items() if cls.__module__.startswith("ds_agsel.")}
KEEP_TO_THE_SHARE = [name for name, cls in OF_THE_PACKAGE.items() if cls.max_selected is Policy.max_selected]


def test_the_policies_that_do_not_keep_to_the_share_follow_a_list() -> None:
    assert set(OF_THE_PACKAGE) - set(KEEP_TO_THE_SHARE) == {"all", "fixed", "replay"}


@pytest.mark.parametrize("policy", KEEP_TO_THE_SHARE)
@given(costs=st.lists(st.integers(1, 9), min_size=2, max_size=8), seed=st.integers(0, 99), data=st.data())
def test_every_policy_keeps_to_the_share(policy: str, costs: list[int], seed: int, data: st.DataObject) -> None:
    """Asked as the controller asks: each observes the scores of what it chose, or of all units where it explores."""
    run = of_share(tuple(costs), data.draw(st.integers(1, sum(costs))), policy=policy, seed=seed)
    chooser, units = policies.create(run), range(len(costs))
    for step in range(12):
        scores = data.draw(st.lists(st.integers(0, 3), min_size=len(costs), max_size=len(costs)))
        probes = chooser.selects_nothing(step)
        blocks = chooser.plan(step, [0] * len(costs))
        scored = tuple(units) if blocks is None else blocks
        if blocks is None:
            chooser.observe_times([float(len(costs) - unit) for unit in units], 0.0)
            blocks = () if probes else chooser.choose(step, scores)
        chooser.observe(step, scored, [scores[unit] for unit in scored])
        if not probes:
            assert 1 <= len(blocks) <= chooser.max_selected
            assert sum(costs[block] for block in blocks) <= run.quota.limit or len(blocks) == 1


@given(st.data())
def test_cyclic_goes_through_all_blocks_in_order_without_leaving_one_out(data: st.DataObject) -> None:
    costs = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=7)))
    run = of_share(costs, data.draw(st.integers(1, sum(costs))), policy="cyclic")
    chooser, n, place = policies.create(run), len(costs), 0
    for step in range(30):
        blocks = chooser.plan(step, [0] * n)
        expected = run.admit((place + offset) % n for offset in range(n))
        assert blocks == expected
        place = (place + len(blocks)) % n


@pytest.mark.parametrize(("k", "num_blocks"), [(1, 1), (1, 5), (2, 5), (4, 6), (5, 5)])
def test_cyclic_over_blocks_that_are_counted_starts_at_step_times_k(k: int, num_blocks: int) -> None:
    cyclic = make(num_blocks, k, policy="cyclic")
    for step in range(40):
        expected = sorted((step * k + offset) % num_blocks for offset in range(k))
        assert cyclic.plan(step, [0] * num_blocks) == tuple(expected)


class _Own(Policy):
    name = "own"

    def plan(self, step: int, update_counts: object) -> tuple[int, ...]:
        return (0, 1)


class _Sized(_Own):
    @property
    def max_selected(self) -> int:
        return 2


def test_an_answer_above_the_share_is_an_error_unless_the_policy_has_a_bound_of_its_own() -> None:
    run = of_share((3, 4, 2), 6)
    with pytest.raises(TrainingError, match=r"has 7 parameters, more than the 6 of adagrad_select.select_percent=20"):
        checked_plan(_Own(run), 0, [0, 0, 0])
    assert checked_plan(_Sized(run), 0, [0, 0, 0]) == (0, 1)
    assert checked_plan(_Own(of_share((3, 3, 2), 6)), 0, [0, 0, 0]) == (0, 1)


def test_memory_is_sized_by_the_share_where_the_policy_keeps_to_it() -> None:
    share = Quota((30, 30, 5, 5, 5), 15)
    lottery = Lottery((1, 2, 3, 4, 5), always=(0,), never=(6,), num_selected=3, share=share)
    sizes = {0: 7, 1: 60, 2: 60, 3: 10, 4: 10, 5: 10, 6: 99}
    active = {block: sizes[block] for block in lottery.active}
    assert lottery.bound() == Bound(4, lottery)
    assert lottery.bound().most(active) == 7 + 60, "one that exceeds the share by itself"
    assert lottery.bound().most(active, more=1) == 7 + 60 + 60
    run = of_share(share.costs, share.limit)
    assert lottery.bound(_Own(run)) == Bound(4, lottery)
    assert lottery.bound(_Sized(run)) == Bound(3)
    assert Bound(3).most(sizes) == 99 + 60 + 60
    assert Lottery((0, 1, 2), num_selected=2).bound(make(3, 2)) == Bound(2)


def test_a_context_without_a_share_counts_blocks() -> None:
    assert context(6, 2).quota == Quota.of_blocks(6, 2)
    assert context(6, 2).admit([5, 4, 3, 2, 1, 0]) == (4, 5)


def within(count: int, probability: float, draws: int) -> bool:
    """Whether the count lies within 4.5 standard errors: a false alarm in 150 000 of them."""
    return abs(count / draws - probability) <= 4.5 * math.sqrt(probability * (1 - probability) / draws)


def chances(costs: tuple[int, ...], limit: int, p: tuple[float, ...]) -> dict[tuple[int, ...], float]:
    """Each selection's probability, where units are drawn one by one in proportion to ``p`` until one doesn't fit."""
    found: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(len(costs))):
        probability, left, taken, used = 1.0, 1.0, list[int](), 0
        for unit in order:
            probability, left = probability * p[unit] / left, left - p[unit]
        for unit in order:
            used += costs[unit]
            if used > limit and taken:
                break
            taken.append(unit)
        key = tuple(sorted(taken))
        found[key] = found.get(key, 0.0) + probability
    return found


@pytest.mark.parametrize("p", [(0.25, 0.25, 0.25, 0.25), (0.4, 0.1, 0.3, 0.2)])
def test_draws_of_a_share_are_draws_without_replacement_up_to_the_first_that_does_not_fit(p: tuple[float, ...]) -> None:
    costs, limit, draws = (3, 5, 2, 4), 8, 6000
    quota, rng = Quota(costs, limit), generator(7, 0)
    counts = Counter(quota.admit(gumbel_order(np.log(p), rng)) for _ in range(draws))
    expected = chances(costs, limit, p)
    assert counts.keys() <= expected.keys() and sum(expected.values()) == pytest.approx(1)
    assert all(within(counts[blocks], chance, draws) for blocks, chance in expected.items())


def test_random_over_a_share_is_uniform_over_the_orders() -> None:
    costs, draws = (3, 5, 2, 4), 4000
    random = policies.create(of_share(costs, 8, policy="random", seed=3))
    counts = Counter(random.plan(step, [0] * 4) for step in range(draws))
    expected = chances(costs, 8, (0.25,) * 4)
    assert all(within(counts[blocks], chance, draws) for blocks, chance in expected.items())
