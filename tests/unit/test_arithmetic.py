"""The built-in data: right answers, disjoint splits, the same for the same seed."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_agsel.errors import ConfigError, DataError
from launch.data import arithmetic


def skeleton(row: dict[str, str]) -> tuple[str, ...]:
    """What makes a problem the same problem: its numbers and calculations, whoever the story is about."""
    return (*re.findall(r"\d+", row["question"]), row["answer"])


@settings(max_examples=10, deadline=None)
@given(
    split=st.sampled_from(arithmetic.SPLITS),
    level=st.sampled_from(arithmetic.LEVELS),
    seed=st.integers(0, 2**32),
)
def test_every_calculation_is_right_and_the_last_one_is_the_answer(split: str, level: int, seed: int) -> None:
    for row in arithmetic.generate(split, 20, level=level, seed=seed):
        *calculations, last = row["answer"].split("\n")
        results = []
        for calculation in calculations:
            left, operator, right, equals, result = calculation.split()
            assert equals == "="
            value = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}
            assert int(result) == value[operator]
            results.append(int(result))
        assert min(results) >= 0, "nobody has fewer than no apples"
        assert last == f"#### {results[-1]}"


@pytest.mark.parametrize("level", arithmetic.LEVELS)
def test_splits_share_no_problem_whatever_their_seeds(level: int) -> None:
    parts = {
        (split, seed): {skeleton(row) for row in arithmetic.generate(split, 100, level=level, seed=seed)}
        for split in arithmetic.SPLITS
        for seed in (0, 1)
    }
    for (first, ours), (second, theirs) in itertools.combinations(parts.items(), 2):
        if first[0] != second[0]:
            assert not ours & theirs, f"{first} and {second}"


def test_problems_of_one_split_are_all_different() -> None:
    rows = arithmetic.generate("train", 1000, level=1)
    assert len({skeleton(row) for row in rows}) == len(rows) == 1000


def test_the_same_seed_gives_the_same_problems_and_another_one_others() -> None:
    assert arithmetic.generate("test", 50, seed=7) == arithmetic.generate("test", 50, seed=7)
    assert arithmetic.generate("test", 50, seed=7) != arithmetic.generate("test", 50, seed=8)


def test_a_larger_size_begins_with_the_smaller_one() -> None:
    assert arithmetic.generate("train", 200)[:50] == arithmetic.generate("train", 50)


def test_harder_levels_take_more_calculations() -> None:
    lines = [
        sum(row["answer"].count("=") for row in arithmetic.generate("train", 200, level=level))
        for level in arithmetic.LEVELS
    ]
    assert lines == sorted(lines) and lines[0] == 200


def test_a_level_without_so_many_problems_says_how_many_it_has() -> None:
    with pytest.raises(DataError, match=r"Level 1 .* too few .* of the 5000 that the validation split asks"):
        arithmetic.generate("validation", 5000, level=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev", "size": 1}, "split='dev' is unknown. Use one of train, validation, test"),
        ({"split": "train", "size": 1, "level": 4}, "--builtin-level=4 is unknown. Use one of 1, 2, 3"),
        ({"split": "train", "size": 0}, "size of the train split is 0"),
    ],
)
def test_what_can_not_be_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        arithmetic.generate(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("percent", [10, 30])
def test_wrong_answers_are_other_rows_and_the_truth_names_them(percent: int) -> None:
    rows = arithmetic.generate("train", 200, seed=3)
    changed, wrong = arithmetic.with_wrong_answers(rows, percent, seed=3)
    assert len(wrong) == 200 * percent // 100 and wrong == sorted(set(wrong))
    assert [place for place, row in enumerate(changed) if row["question"] != rows[place]["question"]] == []
    other = [place for place, row in enumerate(changed) if row["answer"] != rows[place]["answer"]]
    assert set(other) <= set(wrong) and len(other) > 0.9 * len(wrong)
    assert sorted(row["answer"] for row in changed) == sorted(row["answer"] for row in rows)
    assert arithmetic.with_wrong_answers(rows, percent, seed=3) == (changed, wrong)
    assert arithmetic.with_wrong_answers(rows, percent, seed=4)[1] != wrong
    assert arithmetic.with_wrong_answers(rows, 0, seed=3) == (rows, [])


@pytest.mark.parametrize("percent", [-1, 101, 0.5])
def test_an_impossible_share_of_wrong_answers_is_refused(percent: float) -> None:
    with pytest.raises(ConfigError, match=f"--builtin-wrong-percent={percent:g} of 200 training rows"):
        arithmetic.with_wrong_answers(arithmetic.generate("train", 200), percent, seed=3)
