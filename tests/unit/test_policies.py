"""Policies and their draws: schedules, distributions with fixed seeds, ties, records, every refusal."""

from __future__ import annotations

import logging
import math
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_contexts import context, make

from ds_agsel.errors import ConfigError, TrainingError
from ds_agsel.policies import Policy, num_selected
from ds_agsel.policies.sampling import descending, generator, gumbel_order, log_dirichlet

# Properties hold for every example; a fixed order of examples keeps a run repeatable on a loaded machine.
settings.register_profile("unit", deadline=None, derandomize=True)
settings.load_profile("unit")

# Standard errors that a sampled mean may be off. The seeds are fixed, so a test passes always or never; the
# bound only has to be wide enough for a right sampler's seed and narrow enough for a wrong one to miss.
SIGMAS = 5


def within(frequency: float, probability: float, draws: int) -> bool:
    return abs(frequency - probability) <= SIGMAS * math.sqrt(probability * (1 - probability) / draws)


# k


@pytest.mark.parametrize(
    ("percent", "num_blocks", "k"),
    [
        (10, 25, 2),
        (10, 18, 1),
        (20, 18, 3),
        (10, 30, 3),
        (29, 100, 29),
        (57, 100, 57),
        (100, 7, 7),
        (99.9, 7, 6),
        (33.33, 3, 1),
        (0.001, 26, 1),
        (100, 1, 1),
        (100 * 7 / 26, 26, 7),
    ],
)
def test_blocks_per_step(percent: float, num_blocks: int, k: int) -> None:
    assert num_selected(percent, num_blocks) == k


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n))))
def test_a_percentage_computed_from_k_gives_k_back(pair: tuple[int, int]) -> None:
    k, num_blocks = pair
    assert num_selected(100 * k / num_blocks, num_blocks) == k


def test_a_percentage_below_one_block_warns_with_what_one_block_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="ds_agsel"):
        assert num_selected(5, 18) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "adagrad_select.select_percent=5 is less than one of the 18 blocks: each step updates one, which is 5.556 %."
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="ds_agsel"):
        num_selected(100 / 18, 18)
        num_selected(10, 18)
    assert not caplog.records


def test_a_lottery_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^adagrad_select.always_select and adagrad_select.never_select name every"):
        num_selected(20, 0)


@pytest.mark.parametrize("k", [0, 7])
def test_a_context_that_does_not_fit_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"^num_selected={k}, num_blocks=6 and 6 names do not fit"):
        context(k=k)


# Draws


@given(
    st.lists(st.floats(-1e9, 0) | st.just(-math.inf), min_size=1, max_size=40),
    st.integers(0, 2**32),
)
def test_a_gumbel_order_has_every_index_once(log_p: list[float], seed: int) -> None:
    assert sorted(gumbel_order(log_p, generator(seed, 0))) == list(range(len(log_p)))


def test_a_gumbel_order_draws_one_after_the_other_in_proportion() -> None:
    p = np.array([0.5, 0.3, 0.15, 0.05])
    draws = 8_000
    rng = generator(1, 2)
    counts = Counter(tuple(sorted(gumbel_order(np.log(p), rng)[:2])) for _ in range(draws))
    for i, j in combinations(range(4), 2):
        probability = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        assert within(counts[i, j] / draws, probability, draws), (i, j)


def test_a_gumbel_order_needs_no_normalization() -> None:
    log_p = np.log([0.5, 0.3, 0.2])
    assert [gumbel_order(log_p, generator(0, t)) for t in range(50)] == [
        gumbel_order(log_p + 100.0, generator(0, t)) for t in range(50)
    ]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_descending_keys_give_ties_to_the_lower_index(keys: list[int]) -> None:
    assert descending(keys) == tuple(sorted(range(len(keys)), key=lambda i: (-keys[i], i)))


@given(st.lists(st.sampled_from([1e-310, 1e-6, 1e-3, 0.5, 1.0, 40.0, 1e9]), min_size=1, max_size=30))
def test_log_dirichlet_is_finite_and_normalized_for_any_alpha(alpha: list[float]) -> None:
    log_p = log_dirichlet(alpha, generator(3, 4))
    assert np.isfinite(log_p).all()
    assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("alpha", [[1.0, 1.0, 1.0], [0.3, 2.0, 5.0, 0.01], [1e-6, 2e-6, 1e-6], [1e9, 3e9]])
def test_log_dirichlet_has_the_moments_of_the_distribution(alpha: list[float]) -> None:
    a = np.array(alpha)
    draws = 8_000
    rng = generator(5, 6)
    p = np.exp([log_dirichlet(a, rng) for _ in range(draws)])
    total = a.sum()
    for sample, moment in ((p, a / total), (p**2, a * (a + 1) / (total * (total + 1)))):
        assert (np.abs(sample.mean(0) - moment) <= SIGMAS * sample.std(0) / math.sqrt(draws)).all()


def test_a_tiny_alpha_keeps_its_order_where_its_probability_underflows() -> None:
    log_p = log_dirichlet(np.full(8, 1e-6), generator(7, 8))
    assert (np.exp(log_p) == 0).sum() >= 6
    assert len(set(log_p)) == 8


def test_a_steps_generator_hangs_on_seed_and_step_alone() -> None:
    first = generator(42, 7).random(4)
    random.seed(1)
    np.random.seed(1)
    assert (generator(42, 7).random(4) == first).all()
    others = [generator(seed, step).random() for seed in range(40) for step in range(40)]
    assert len(set(others)) == 1600


# adagrad_select


def test_epsilon_falls_exponentially_in_epoch_1_and_is_0_from_epoch_2_on() -> None:
    policy = make(steps_per_epoch=50, explore_rate=0.8, explore_decay=0.1)
    for step in range(50):
        assert policy.explore_probability(step) == pytest.approx(0.8 * math.exp(-0.1 * step), rel=1e-15)
    assert [policy.explore_probability(step) for step in (50, 51, 10**6)] == [0.0, 0.0, 0.0]


def test_a_decay_of_0_is_no_decay() -> None:
    policy = make(steps_per_epoch=50, explore_decay=0)
    assert [policy.explore_probability(step) for step in (0, 49, 50)] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("steps_per_epoch", [1, 2, 100, 12_345])
def test_lambda_by_default_takes_epsilon_to_1_percent_over_epoch_1(steps_per_epoch: int) -> None:
    policy = make(steps_per_epoch=steps_per_epoch)
    decay = math.log(100) / steps_per_epoch
    for step in {0, steps_per_epoch // 2, steps_per_epoch - 1}:
        assert policy.explore_probability(step) == pytest.approx(math.exp(-decay * step), rel=1e-12)
    assert policy.explore_probability(steps_per_epoch) == 0.0


@given(st.integers(1, 10_000), st.floats(0, 1), st.none() | st.floats(0, 1e6), st.integers(0, 20_000))
def test_epsilon_is_a_probability_that_never_rises(
    steps_per_epoch: int, rate: float, decay: float | None, step: int
) -> None:
    policy = make(steps_per_epoch=steps_per_epoch, explore_rate=rate, explore_decay=decay)
    assert rate >= policy.explore_probability(step) >= policy.explore_probability(step + 1) >= 0


@given(st.integers(0, 2**63), st.integers(1, 1000))
def test_the_first_step_explores_and_none_after_epoch_1(seed: int, steps_per_epoch: int) -> None:
    policy = make(seed=seed, steps_per_epoch=steps_per_epoch)
    assert policy.plan(0, [0] * 6) is None
    assert policy.plan(steps_per_epoch, [0] * 6) is not None


def test_steps_explore_as_often_as_epsilon_says() -> None:
    steps = 4000
    policy = make(steps_per_epoch=steps)
    explored = [policy.plan(step, [0] * 6) is None for step in range(steps)]
    for start in range(0, steps, 1000):
        expected = np.mean([policy.explore_probability(step) for step in range(start, start + 1000)])
        assert within(sum(explored[start : start + 1000]) / 1000, float(expected), 1000)


def exploited(policy: Policy, counts: Sequence[int], steps: int = 4000) -> Counter[tuple[int, ...]]:
    plans = [policy.plan(step, counts) for step in range(1000, 1000 + steps)]
    return Counter(plan for plan in plans if plan is not None)


@pytest.mark.parametrize("smoothing", [1.0, 0.25])
def test_exploit_draws_a_block_in_proportion_to_its_count_plus_smoothing(smoothing: float) -> None:
    counts = [0, 1, 3, 8]
    policy = make(4, 1, smoothing=smoothing)
    drawn = exploited(policy, counts)
    for index, count in enumerate(counts):
        # the mean of Dirichlet(alpha) is alpha over its sum
        expected = (count + smoothing) / (sum(counts) + 4 * smoothing)
        assert within(drawn[(index,)] / 4000, expected, 4000), index


def test_exploit_draw_top_takes_the_largest_p() -> None:
    policy = make(4, 2, exploit_draw="top")
    counts = [0, 5, 5, 50]
    for step in range(1000, 1200):
        rng = generator(42, step)
        rng.random()  # explore or exploit
        log_p = log_dirichlet(np.array(counts) + 1.0, rng)
        assert policy.plan(step, counts) == tuple(sorted(np.argsort(-log_p)[:2]))


def test_top_is_sharper_than_sample() -> None:
    counts = [0, 0, 0, 40]
    top = exploited(make(4, 1, exploit_draw="top"), counts, 2000)
    sample = exploited(make(4, 1, exploit_draw="sample"), counts, 2000)
    assert top[(3,)] > sample[(3,)] > 1600


@pytest.mark.parametrize("draw", ["sample", "top"])
@pytest.mark.parametrize("smoothing", [1e-6, 1.0, 1e9])
def test_exploit_gives_k_blocks_for_any_smoothing_and_counts(draw: str, smoothing: float) -> None:
    policy = make(18, 3, exploit_draw=draw, smoothing=smoothing)
    for counts in ([0] * 18, [10**9] + [0] * 17, list(range(18))):
        for step in range(100, 200):
            plan = policy.plan(step, counts)
            assert plan is not None and len(set(plan)) == 3 and list(plan) == sorted(plan)


def test_a_plan_hangs_on_step_and_counts_alone() -> None:
    counts = [1, 2, 3, 4, 5, 6]
    forward = make()
    plans = [forward.plan(step, counts) for step in range(150)]
    backward = make()
    assert [backward.plan(step, counts) for step in reversed(range(150))] == plans[::-1]
    assert [make(seed=43).plan(step, counts) for step in range(150)] != plans
    assert {len(plan) for plan in plans if plan is not None} == {2}


def test_without_steps_per_epoch_exploring_is_refused_and_not_exploring_is_fine() -> None:
    expected = (
        "adagrad_select.steps_per_epoch is not set and can't be taken from training_data, and exploring ends"
        " with epoch 1. Set adagrad_select.steps_per_epoch to the optimizer steps in one pass over the data,"
        " or adagrad_select.explore_rate=0."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
        make(steps_per_epoch=None)
    policy = make(steps_per_epoch=None, explore_rate=0)
    assert policy.explore_probability(0) == 0.0
    assert policy.plan(0, [0] * 6) is not None


def test_counts_of_another_number_of_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^5 update counts for the 6 blocks that a policy chooses from"):
        make(explore_rate=0).plan(0, [0] * 5)


# The choice by score


@pytest.mark.parametrize("name", ["adagrad_select", "gradient_topk"])
def test_an_explore_step_takes_the_highest_scores_and_ties_go_to_the_lower_index(name: str) -> None:
    policy = make(k=3, policy=name)
    assert policy.choose(0, [0.1, 5.0, 2.0, 0.0, 3.0, 1.0]) == (1, 2, 4)
    assert policy.choose(0, [1.0] * 6) == (0, 1, 2)
    assert policy.choose(0, [0.0, 1.0, 2.0, 1.0, 2.0, 1.0]) == (1, 2, 4)
    assert policy.choose(0, [0.0, 0.0, math.inf, 0.0, 0.0, 1.0]) == (0, 2, 5)


def test_scores_that_can_not_be_ordered_are_refused() -> None:
    with pytest.raises(TrainingError, match=r'^The gradient of block "layers.2" is NaN at step 9. Such a step must be'):
        make().choose(9, [0, 0, math.nan, 0, 0, 0])
    with pytest.raises(ValueError, match=r"^7 scores for the 6 blocks that a policy chooses from"):
        make().choose(9, [0] * 7)


# The comparison policies


def test_gradient_topk_explores_at_every_step() -> None:
    policy = make(policy="gradient_topk", steps_per_epoch=None)
    assert [policy.plan(step, [0] * 6) for step in (0, 1, 10**6)] == [None] * 3
    assert policy.explore_probability(10**6) == 1.0


def test_random_takes_each_set_of_k_equally_often() -> None:
    policy = make(4, 2, policy="random", steps_per_epoch=None)
    drawn = Counter(policy.plan(step, [0] * 4) for step in range(3000))
    assert set(drawn) == set(combinations(range(4), 2))
    assert all(within(count / 3000, 1 / 6, 3000) for count in drawn.values())
    assert policy.plan(5, [0] * 4) == policy.plan(5, [9] * 4)


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_cyclic_updates_every_block_equally_often(shape: tuple[int, int]) -> None:
    num_blocks, k = shape
    policy = make(num_blocks, k, policy="cyclic", steps_per_epoch=None)
    plans = [policy.plan(step, [0] * num_blocks) for step in range(num_blocks)]
    assert all(plan is not None and len(set(plan)) == k and list(plan) == sorted(plan) for plan in plans)
    assert set(Counter(index for plan in plans for index in plan or ()).values()) == {k}


def test_cyclic_goes_in_model_order_and_wraps() -> None:
    policy = make(5, 2, policy="cyclic", steps_per_epoch=None)
    assert [policy.plan(step, [0] * 5) for step in range(4)] == [(0, 1), (2, 3), (0, 4), (1, 2)]


def test_fixed_takes_the_named_blocks_whatever_k_is() -> None:
    policy = make(policy="fixed", fixed_blocks=["layers.5", "layers.0", "layers.3"], steps_per_epoch=None)
    assert [policy.plan(step, [0] * 6) for step in (0, 99)] == [(0, 3, 5)] * 2


def test_fixed_refuses_a_block_that_can_not_be_chosen() -> None:
    expected = (
        'adagrad_select.fixed_blocks names "layer.1", which is not a block that can be chosen. Did you mean'
        ' "layers.1"? Blocks that can: "layers.0", "layers.1".'
    )
    with pytest.raises(ConfigError, match=re.escape(expected)):
        make(2, 1, policy="fixed", fixed_blocks=["layer.1"])


def test_all_takes_every_block_whatever_k_is() -> None:
    policy = make(policy="all", steps_per_epoch=None)
    assert [policy.plan(step, [0] * 6) for step in (0, 99)] == [tuple(range(6))] * 2


def test_choosing_needs_neither_torch_nor_deepspeed() -> None:
    code = "import sys, ds_agsel.policies; sys.exit(bool({'torch', 'deepspeed'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_fraction_given_for_a_percentage_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="ds_agsel"):
        assert num_selected(0.2, 18) == 1
    assert caplog.records[0].getMessage().endswith("It is in percent: for 0.2 of the blocks set it to 20.")
