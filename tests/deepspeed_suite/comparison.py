"""Two runs of the suite compared, and what is known to differ. Standard library only."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

OUTCOMES = ("passed", "skipped", "failed", "xfailed", "not collected", "not run")


@dataclass(frozen=True)
class Difference:
    """A row of expected.csv: with ``policy``, the tests of ``test`` end in ``outcome`` for a ``reason``.

    ``test`` is a whole test id, or one without its parameters, or a class or a file. ``policy`` is the section's, or
    "*" for each.
    """

    test: str
    policy: str
    outcome: str
    reason: str

    def covers(self, test: str) -> bool:
        return test == self.test or test.startswith((f"{self.test}[", f"{self.test}::"))


def read_table(path: Path) -> list[Difference]:
    """Return the rows of expected.csv. Raises ValueError for one without a known outcome or without a reason."""
    rows = []
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            difference = Difference(**row)
            if difference.outcome not in OUTCOMES or not difference.reason or not difference.test:
                raise ValueError(f"{path}:{number}: needs a test, one of the outcomes {OUTCOMES} and a reason: {row}")
            rows.append(difference)
    return rows


def read_engines(path: Path) -> dict[tuple[str, str], int]:
    """Return engines.csv: (file, policy) -> engines that are to be engaged, over all ranks and tests."""
    with path.open(newline="") as file:
        return {(row["file"], row["policy"]): int(row["engaged"]) for row in csv.DictReader(file)}


def compare(
    plain: Mapping[str, str], selective: Mapping[str, str], table: Sequence[Difference], policy: str
) -> list[str]:
    """Return a line for each test whose outcome through ds_agsel is not the plain one and not the table's.

    A row that covers tests of this run and that none of them needs is a line, too. Outcomes by test id; a test that is
    missing in ``selective`` was "not run", and so was one that is missing in ``plain``.
    """
    rows = [row for row in table if row.policy in (policy, "*")]
    used = set()
    problems = []
    for test in sorted({*plain, *selective}):
        before, after = plain.get(test, "not run"), selective.get(test, "not run")
        if before == after:
            continue
        row = next((row for row in rows if row.covers(test)), None)
        if row is not None and row.outcome == after:
            used.add(row)
            continue
        wanted = before if row is None else f"{row.outcome} ({row.reason})"
        problems.append(f"{test}: {after} through ds_agsel, {before} in plain DeepSpeed, expected {wanted}")
    for row in rows:
        if row not in used and any(map(row.covers, plain)):
            problems.append(f"{row.test}: the table expects {row.outcome} ({row.reason}), and no test differs so")
    return problems


def not_run(files: Sequence[str], plain: Mapping[str, str]) -> list[str]:
    """Return a line for each of ``files`` without a test that ran or was skipped in plain DeepSpeed."""
    ran = {test.partition("::")[0] for test, outcome in plain.items() if not outcome.startswith("not ")}
    return [
        f"{file}: no test ran in plain DeepSpeed, so there is nothing to compare" for file in files if file not in ran
    ]


def compare_engines(engaged: Mapping[str, int], known: Mapping[tuple[str, str], int], policy: str) -> list[str]:
    """Return a line for each file whose number of engaged engines is not the known one, and for a run without any."""
    problems = [
        f"{file}: {number} engines engaged, expected {known[file, policy]}"
        for file, number in sorted(engaged.items())
        if number != known.get((file, policy), number)
    ]
    if not sum(engaged.values()):
        problems.append("no engine was engaged: nothing of ds_agsel was tried")
    return problems
