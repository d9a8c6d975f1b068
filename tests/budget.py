"""Processor seconds of each test, its ranks and subprocesses included: what `make test` is measured in.

Wall time says little on a machine that does other work. The summary names the sum by folder, and every test above
`BUDGET_SECONDS` that is not marked slow: give it fewer cases, or mark the rest of them ``slow``.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import workers

BUDGET_SECONDS = 15.0
_TICKS = os.sysconf("SC_CLK_TCK")
_NAME = "processor_seconds"
_BEFORE = pytest.StashKey[float]()


def processor_seconds() -> float:
    """User and system time so far of this process, of the subprocesses that have ended, and of all ranks."""
    total = sum(os.times()[:4])
    for process in workers.processes():
        with contextlib.suppress(OSError):  # one that has ended counts in its server's children
            total += sum(map(int, Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:15])) / _TICKS
    return total


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    item.stash[_BEFORE] = processor_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "teardown":
        report.user_properties.append((_NAME, round(processor_seconds() - item.stash[_BEFORE], 2)))
        report.user_properties.append(("slow", item.get_closest_marker("slow") is not None))
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    spent: Counter[str] = Counter()
    above = []
    for report in (report for kind in terminalreporter.stats.values() for report in kind):
        properties = dict(getattr(report, "user_properties", ()))
        if getattr(report, "when", None) == "teardown" and _NAME in properties:
            folder = "/".join(report.nodeid.split("::")[0].split("/")[:2])
            spent[folder] += properties[_NAME]
            if properties[_NAME] > BUDGET_SECONDS and not properties["slow"]:
                above.append((properties[_NAME], report.nodeid))
    if not spent:
        return
    by_folder = ", ".join(f"{folder} {seconds:.0f}" for folder, seconds in spent.most_common())
    terminalreporter.write_line(f"processor seconds: {spent.total():.0f} ({by_folder})")
    for seconds, name in sorted(above, reverse=True):
        terminalreporter.write_line(f"  above the budget of {BUDGET_SECONDS:.0f} s: {seconds:.0f} s {name}")
