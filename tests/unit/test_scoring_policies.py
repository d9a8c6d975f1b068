"""Policies that choose by what they have observed, against few-line versions on the same recorded scores."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import permutations

import numpy as np
import pytest
from policy_contexts import make

from ds_agsel.errors import CheckpointError
from ds_agsel.policies import Policy
from ds_agsel.policies.sampling import generator

SIGMAS = 5  # as in test_policies
UNITS = 6
RECORDED = np.random.default_rng(1).gamma(2.0, 0.5, (400, UNITS))  # scores of every unit at every step


def chosen_rounds(policy: Policy, steps: int, every: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Run ``policy`` as the controller does, on the recorded scores: the first step of each round and its units."""
    step = 0
    while step < steps:
        plan = policy.plan(step, [0] * UNITS)
        if plan is None:
            assert policy.selects_nothing(step)
            policy.observe(step, tuple(range(UNITS)), list(RECORDED[step]))
            step += 1
            continue
        yield step, plan
        for _ in range(min(every, steps - step)):
            policy.observe(step, plan, [RECORDED[step][unit] for unit in plan])
            step += 1


def draw(weights: np.ndarray, rng: np.random.Generator) -> list[int]:
    """All units, one after the other in proportion to ``weights``, by the same random numbers as the policies use."""
    race = rng.standard_exponential(len(weights)) / weights  # the first to arrive is drawn first
    return [int(unit) for unit in np.argsort(race)]


def few_line_grass(steps: int, probe: int, hold: int, refresh: int, k: int, tau: float, old: float, seed: int):
    mgn = RECORDED[:probe].mean(0)
    sums, numbers = np.zeros(UNITS), np.zeros(UNITS)
    for step in range(probe, steps):
        if (step - probe) % refresh == 0:
            new = np.divide(sums, numbers, where=numbers > 0, out=np.zeros(UNITS))
            mgn = np.where(numbers > 0, old * mgn + (1 - old) * new, mgn)
            sums, numbers = np.zeros(UNITS), np.zeros(UNITS)
        if (step - probe) % hold == 0:
            layers = tuple(sorted(draw(np.exp(mgn / tau), generator(seed, step))[:k]))
            yield step, layers
        sums[list(layers)] += RECORDED[step][list(layers)]
        numbers[list(layers)] += 1


@pytest.mark.parametrize(("refresh", "tau", "old"), [(None, 0.3, 0.5), (4, 1.0, 0.9), (20, 0.1, 0.0)])
def test_grass_chooses_as_its_few_line_version(refresh, tau, old):
    section = {"score_decay": old, "temperature": tau, "refresh_every": refresh, "probe_steps": 7, "select_every": 8}
    policy = make(UNITS, 2, policy="grass", seed=3, **section)
    expected = list(few_line_grass(160, 7, 8, refresh or 8, 2, tau, old, 3))
    assert list(chosen_rounds(policy, 160, 8)) == expected
    assert len({units for _, units in expected}) > 3


def few_line_misa(steps: int, inner: int, k: int, eta: float, seed: int):
    average, updates, last = np.zeros(UNITS), np.zeros(UNITS), np.full(UNITS, -1)
    for step in range(0, steps, inner):
        unused = [unit for unit in range(UNITS) if last[unit] < 0]
        oldest = sorted(range(UNITS), key=lambda unit: last[unit])[: min(2, k - 1)]
        g = np.divide(average, 1 - 0.8**updates, where=updates > 0, out=np.zeros(UNITS))
        drawn = draw(np.exp(np.minimum(5, eta * g**2)), generator(seed, step))
        ranking = dict.fromkeys([*(unused or oldest), *drawn])
        modules = tuple(sorted(list(ranking)[:k]))
        yield step, modules
        end = min(step + inner, steps)
        for unit in modules:
            average[unit] = 0.8 * average[unit] + 0.2 * RECORDED[step:end, unit].mean()
            updates[unit] += 1
            last[unit] = end - 1


@pytest.mark.parametrize(("k", "eta"), [(1, 1.0), (2, 4.0), (3, 1.0), (4, 0.5)])
def test_misa_chooses_as_its_few_line_version(k, eta):
    policy = make(UNITS, k, policy="misa", seed=5, select_every=6, temperature=1 / eta)
    rounds = list(chosen_rounds(policy, 180, 6))
    assert rounds == list(few_line_misa(180, 6, k, eta, 5))
    first = [unit for _, units in rounds[: math.ceil(UNITS / k)] for unit in units]
    assert set(first) == set(range(UNITS))  # every unit once, first
    if k > 1:  # and none is forgotten
        for unit in range(UNITS):
            used = [number for number, (_, units) in enumerate(rounds) if unit in units]
            assert max(np.diff([*used, len(rounds)])) <= UNITS


@pytest.mark.parametrize(("k", "oldest"), [(1, 0), (3, 2)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_misa_draws_in_proportion_to_its_clipped_importance(temperature, k, oldest):
    scores, draws = np.array([0.5, 1.2, 0.0, 1.8, 1.5, 3.5, 1e6]), 8000
    policy = make(7, k, policy="misa", temperature=temperature)
    for unit, score in enumerate(scores):
        policy.observe(unit, (unit,), [score])
    p = np.exp(np.minimum(5.0, scores**2 / temperature))  # of units 5 and 6 the clip
    p[:oldest] = 0  # they come first, whatever their scores
    expected = draws * p / p.sum()
    plans = [policy.plan(step, [0] * 7) for step in range(7, 7 + draws)]
    assert all(len(plan) == k and set(range(oldest)) <= set(plan) for plan in plans)
    drawn = Counter(unit for plan in plans for unit in plan if unit >= oldest)
    chi_square = sum((drawn[unit] - expected[unit]) ** 2 / expected[unit] for unit in range(oldest, 7))
    assert chi_square < {6: 22.5, 4: 18.5}[6 - oldest]  # degrees of freedom, 0.1 %


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_grass_draws_without_replacement_from_the_softmax(temperature):
    scores, draws = np.array([0.2, 1.0, 1.7, 0.0]), 8000
    policy = make(4, 2, policy="grass", temperature=temperature, probe_steps=1)
    assert policy.explore_probability(0) == 1.0
    policy.observe(0, range(4), list(scores))
    assert policy.explore_probability(1) == 0.0
    p = np.exp(scores / temperature) / np.exp(scores / temperature).sum()
    expected = Counter()
    for first, second in permutations(range(4), 2):
        expected[tuple(sorted((first, second)))] += p[first] * p[second] / (1 - p[first])
    drawn = Counter(policy.plan(step, [0] * 4) for step in range(1, draws + 1))
    chi_square = sum((drawn[pair] - draws * share) ** 2 / (draws * share) for pair, share in expected.items())
    assert chi_square < 20.5  # 5 degrees of freedom, 0.1 %


def test_a_unit_that_was_never_scored_is_drawn_as_one_of_score_0():
    policy = make(3, 1, policy="grass", temperature=0.01, probe_steps=1)
    policy.observe(0, (0, 2), [0.0, 1.0])
    assert {policy.plan(step, [0] * 3) for step in range(1, 50)} == {(2,)}


@pytest.mark.parametrize("name", ["grass", "misa"])
def test_a_policy_goes_on_from_its_state_at_any_step(name):
    section = {"policy": name, "select_every": 4, "refresh_every": 3, "temperature": 0.5}
    whole = list(chosen_rounds(make(UNITS, 2, **section), 60, 4))
    for saved_at in (1, 4, 6, 11, 21):
        first, rounds, step = make(UNITS, 2, **section), [], 0
        plan: tuple[int, ...] | None = None
        begun = -99
        for step in range(60):
            if step == saved_at:
                second = make(UNITS, 2, **section)
                second.load_state_dict(json.loads(json.dumps(first.state_dict())))
                first = second
            if step >= begun + 4:
                plan = first.plan(step, [0] * UNITS)
                if plan is not None:
                    begun = step
                    rounds.append((step, plan))
            units = tuple(range(UNITS)) if plan is None else plan
            first.observe(step, units, [RECORDED[step][unit] for unit in units])
        assert rounds == whole


# cost_aware


ARRIVALS = [6.0, 5.5, 4.0, 3.0, 1.0, 0.25]  # of the embedding first, as backward comes to it last
OWN = [0.5, 1.5, 1.0, 2.0, 0.75, 0.25]


def cost_aware(k: int = 2, scores: object = (1.0,) * UNITS, sunk: float = 0.0, **section: object) -> Policy:
    policy = make(UNITS, k, policy="cost_aware", probe_steps=1, **section)
    policy.observe_times(ARRIVALS, sunk)
    policy.observe(0, range(UNITS), list(scores))
    return policy


def seconds(units: tuple[int, ...], k: int, sunk: float = 0.0) -> float:
    """A step's time by the model: forward, the way down to the lowest unit, the units' own products."""
    passed = max([sunk, *(ARRIVALS[unit] for unit in units)]) / 2
    return ARRIVALS[0] / 2 * len(units) / k + passed + sum(OWN[unit] / 2 for unit in units)


@pytest.mark.parametrize("sunk", [0.0, 3.5, 6.0])
def test_cost_aware_adds_up_to_the_time_of_a_step(sunk):
    policy = cost_aware(3, sunk=sunk)
    for units in permutations(range(UNITS), 3):
        reached, total = sunk, sunk
        for unit in units:
            total += policy.added_times(reached)[unit]
            reached = max(reached, ARRIVALS[unit])
        assert total / 2 == pytest.approx(seconds(units, 3, sunk))


@pytest.mark.parametrize("scores", [(1.0,) * 6, (9.0, 1.0, 1.0, 1.0, 1.0, 1.0), tuple(RECORDED[5])])
def test_cost_aware_takes_the_best_score_for_the_time_that_it_adds(scores):
    for k in (1, 2, 4):
        taken: tuple[int, ...] = ()
        for _ in range(k):
            rest = [unit for unit in range(UNITS) if unit not in taken]
            by_value = {u: scores[u] / (seconds((*taken, u), k) - seconds(taken, k)) for u in rest}
            taken = (*taken, max(by_value, key=by_value.__getitem__))
        assert cost_aware(k, scores, exploit_draw="top").plan(1, [0] * UNITS) == tuple(sorted(taken))


def test_cost_aware_does_not_shun_what_backward_reaches_anyway():
    assert cost_aware(1, exploit_draw="top").plan(1, [0] * UNITS) == (5,)
    assert cost_aware(1, (1.7, 1, 1, 1, 1, 1), exploit_draw="top").plan(1, [0] * UNITS) == (5,)
    assert cost_aware(1, (1.7, 1, 1, 1, 1, 1), sunk=6.0, exploit_draw="top").plan(1, [0] * UNITS) == (0,)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_cost_aware_draws_in_proportion(temperature):
    scores, draws = np.array([3.0, 1.0, 0.0, 2.0, 1.0, 0.5]), 8000
    policy = cost_aware(2, scores, temperature=temperature)
    expected: Counter[tuple[int, ...]] = Counter()

    def shares(taken: tuple[int, ...]) -> dict[int, float]:
        left = [unit for unit in range(UNITS) if unit not in taken]
        added = {unit: seconds((*taken, unit), 2) - seconds(taken, 2) for unit in left}
        weights = {unit: (scores[unit] / added[unit]) ** (1 / temperature) for unit in left}
        return {unit: weight / sum(weights.values()) for unit, weight in weights.items()}

    for first, p in shares(()).items():
        for second, q in shares((first,)).items():
            expected[tuple(sorted((first, second)))] += p * q
    drawn = Counter(policy.plan(step, [0] * UNITS) for step in range(1, draws + 1))
    drawable = {pair: share for pair, share in expected.items() if share > 0}
    assert set(drawn) <= set(drawable)
    chi_square = sum((drawn[pair] - draws * share) ** 2 / (draws * share) for pair, share in drawable.items())
    assert chi_square < 27.9  # 9 degrees of freedom, 0.1 %


def test_cost_aware_keeps_the_shortest_times_and_without_any_goes_by_score():
    policy = cost_aware(scores=range(UNITS), exploit_draw="top")
    policy.observe_times([2 * value for value in ARRIVALS], 1.0)
    assert policy.state_dict()["arrivals"] == ARRIVALS
    unmeasured = make(UNITS, 2, policy="cost_aware", probe_steps=1, exploit_draw="top")
    unmeasured.observe(0, range(UNITS), list(range(UNITS)))
    assert unmeasured.plan(1, [0] * UNITS) == (4, 5)
    nothing = cost_aware(scores=[0.0] * UNITS)
    assert len(nothing.plan(1, [0] * UNITS) or ()) == 2


def test_cost_aware_goes_on_from_its_state():
    policy, other = cost_aware(3, RECORDED[0], sunk=1.0), make(UNITS, 3, policy="cost_aware", probe_steps=1)
    other.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert [other.plan(step, [0] * UNITS) for step in range(1, 40)] == [
        policy.plan(step, [0] * UNITS) for step in range(1, 40)
    ]


COST = cost_aware().state_dict()
GRASS, MISA = make(UNITS, 2, policy="grass").state_dict(), make(UNITS, 2, policy="misa").state_dict()


@pytest.mark.parametrize(
    ("name", "state", "message"),
    [
        ("grass", {}, r'Policy "grass" keeps running scores, and the checkpoint has \[\] for it'),
        ("grass", {**GRASS, "probes_left": -1}, "keeps running scores"),
        ("grass", {**GRASS, "probes_left": True}, "keeps running scores"),
        ("grass", {**GRASS, "scores": 3}, "has no running scores"),
        ("grass", {**GRASS, "scores": {**GRASS["scores"], "sums": [0.0]}}, "not those of 6 units"),
        ("grass", {**GRASS, "scores": {**GRASS["scores"], "sums": ["a"] * UNITS}}, "not those of 6 units"),
        ("grass", {**GRASS, "scores": {**GRASS["scores"], "averages": [math.nan] * UNITS}}, "not those of 6 units"),
        ("grass", {**GRASS, "scores": {**GRASS["scores"], "period": 0.5}}, "not those of 6 units"),
        ("cost_aware", GRASS, 'Policy "cost_aware" has no measured times of 6 units'),
        ("cost_aware", {**COST, "arrivals": [1.0]}, "no measured times of 6 units"),
        ("cost_aware", {**COST, "arrivals": [-1.0] * UNITS}, "no measured times of 6 units"),
        ("cost_aware", {**COST, "sunk": None}, "no measured times of 6 units"),
        ("misa", GRASS, 'Policy "misa" has no last_steps of 6 units'),
        ("misa", {**MISA, "last_steps": [0] * 5}, "no last_steps of 6 units"),
        ("misa", {**MISA, "last_steps": [-2] * UNITS}, "no last_steps of 6 units"),
    ],
)
def test_a_state_that_is_damaged_or_another_policy_s_is_refused(name, state, message):
    policy = make(UNITS, 2, policy=name)
    before = policy.state_dict()
    with pytest.raises(CheckpointError, match=message):
        policy.load_state_dict(state)
    assert policy.state_dict() == before
