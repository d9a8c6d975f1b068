"""Grade-school arithmetic word problems, generated from a seed: a data set that needs no download.

A problem is a short story of one to three operations; its answer shows each of them and ends in ``#### N``,
as GSM8K's do. Which split a problem belongs to is a hash of its *skeleton* (story form and numbers, not names
or things), so that no problem of one split occurs in another under other names, at any size and seed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ds_agsel.errors import ConfigError, DataError

SPLITS = ("train", "validation", "test")
LEVELS = (1, 2, 3)

# Of 20 skeletons, 16 belong to train, 2 to validation, 2 to test.
_HASH_BUCKETS = 20
_SPLIT_OF_BUCKET = ("train",) * 16 + ("validation",) * 2 + ("test",) * 2

_NAMES = (
    "Ada",
    "Ben",
    "Carla",
    "David",
    "Emma",
    "Femi",
    "Grace",
    "Hugo",
    "Ivan",
    "Jana",
    "Kofi",
    "Lena",
    "Mia",
    "Noah",
)
_THINGS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pencils", "shells", "stamps", "stickers")
_GAINS = ("buys", "finds", "wins", "gets")
_LOSSES = ("gives away", "loses", "sells", "uses")

_MAX_ATTEMPTS_PER_PROBLEM = 200


@dataclass(frozen=True)
class Level:
    """How hard problems are.

    Attributes:
        forms: story forms drawn from. ``start`` is what the hero has at first, each letter one operation on
        it:
            ``+`` gains, ``-`` losses, ``*`` several boxes of as many things (only as the first), ``=`` a
            friend who has more, and both together.
        largest: largest number that is added or subtracted, and that a story starts from.
        largest_factor: largest number of boxes.
    """

    forms: tuple[str, ...]
    largest: int
    largest_factor: int


_LEVELS = {
    1: Level(forms=("+", "-"), largest=50, largest_factor=0),
    2: Level(forms=("++", "+-", "-+", "--", "*+", "*-"), largest=60, largest_factor=6),
    3: Level(forms=("+-+", "-+-", "*+-", "*-+", "*-=", "+="), largest=90, largest_factor=9),
}


@dataclass(frozen=True)
class Problem:
    """One problem. ``skeleton`` names its form and numbers: problems that share it are the same."""

    question: str
    answer: str
    skeleton: str


def generate(split: str, size: int, *, level: int = 2, seed: int = 42) -> list[dict[str, str]]:
    """``size`` different problems of ``split``, ``{"question", "answer"}`` each, a function of the arguments.

    Raises: ConfigError for an unknown split or level or a size below 1; DataError where the level has too few
    problems.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r} is unknown. Use one of {', '.join(SPLITS)}.")
    if level not in _LEVELS:
        raise ConfigError(f"--builtin-level={level} is unknown. Use one of {', '.join(map(str, LEVELS))}.")
    if size < 1:
        raise ConfigError(f"The size of the {split} split is {size}. Ask for 1 problem or more.")
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    stream = _stream(_LEVELS[level], random.Random(f"{seed}/{level}/{split}"))
    for _ in range(_MAX_ATTEMPTS_PER_PROBLEM * size):
        problem = next(stream)
        if problem.skeleton in seen or split_of(problem.skeleton) != split:
            continue
        seen.add(problem.skeleton)
        rows.append({"question": problem.question, "answer": problem.answer})
        if len(rows) == size:
            return rows
    raise DataError(
        f"Level {level} of the built-in data has too few different problems: found {len(rows)} of the "
        f"{size} that the "
        f"{split} split asks for. Ask for fewer, or raise --builtin-level."
    )


def with_wrong_answers(
    rows: Sequence[Mapping[str, str]], percent: float, seed: int
) -> tuple[list[dict[str, str]], list[int]]:
    """Return ``rows`` of which ``percent`` have another row's answer, and which these are, ascending.

    The answers of the wrong rows are passed on among them, so that each is well written and answers another question.
    A function of the arguments. Raises ConfigError for a share outside [0, 100], or of less than two rows.
    """
    number = round(len(rows) * percent / 100)
    if not 0 <= percent <= 100 or (percent > 0 and number < 2):
        raise ConfigError(
            f"--builtin-wrong-percent={percent:g} of {len(rows)} training rows is {number} rows. Use 0, or a share "
            "within (0, 100] of two rows or more."
        )
    wrong = sorted(random.Random(f"{seed}/wrong").sample(range(len(rows)), number))
    changed = [dict(row) for row in rows]
    for row, other in zip(wrong, [*wrong[1:], *wrong[:1]]):
        changed[row]["answer"] = rows[other]["answer"]
    return changed, wrong


def split_of(skeleton: str) -> str:
    """Return the one split that a skeleton belongs to; independent of seed and size."""
    digest = hashlib.sha256(skeleton.encode()).digest()
    return _SPLIT_OF_BUCKET[int.from_bytes(digest[:8], "big") % _HASH_BUCKETS]


def _stream(level: Level, rng: random.Random) -> Iterator[Problem]:
    while True:
        yield _draw(level, rng)


def _draw(level: Level, rng: random.Random) -> Problem:
    form = rng.choice(level.forms)
    name, friend = rng.sample(_NAMES, 2)
    things = rng.choice(_THINGS)
    story: list[str] = []
    work: list[str] = []
    numbers: list[int] = []

    def compute(left: int, operator: str, right: int) -> int:
        result = {"+": left + right, "-": left - right, "*": left * right}[operator]
        work.append(f"{left} {operator} {right} = {result}")
        return result

    if form[0] == "*":
        boxes, each = rng.randint(2, level.largest_factor), rng.randint(3, 12)
        numbers += [boxes, each]
        story.append(f"{name} has {boxes} boxes of {each} {things}.")
        total = compute(boxes, "*", each)
    else:
        total = rng.randint(10, level.largest)
        numbers.append(total)
        story.append(f"{name} has {total} {things}.")
    question = f"How many {things} does {name} have now?"
    for operation in form.removeprefix("*"):
        if operation == "-":
            amount = rng.randint(1, max(1, total - 1))
            verb = rng.choice(_LOSSES)
            story.append(f"{name} {verb} {amount}.")
            total = compute(total, "-", amount)
        else:
            amount = rng.randint(2, level.largest)
            if operation == "+":
                story.append(f"{name} {rng.choice(_GAINS)} {amount} more.")
                total = compute(total, "+", amount)
            else:
                story.append(f"{friend} has {amount} more than {name}.")
                question = f"How many {things} do they have together?"
                total = compute(total, "+", compute(total, "+", amount))
        numbers.append(amount)
    answer = "\n".join([*work, f"#### {total}"])
    return Problem(" ".join([*story, question]), answer, f"{form}:{','.join(map(str, numbers))}")
