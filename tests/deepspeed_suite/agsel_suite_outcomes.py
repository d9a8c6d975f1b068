"""A pytest plugin that writes each test's outcome as it ends, so that a run that dies leaves what it knew."""

from __future__ import annotations

import json
import os
from typing import Any

FILE = "DS_AGSEL_SUITE_OUTCOMES"
_found: dict[str, str] = {}


def pytest_runtest_logreport(report: Any) -> None:
    before = _found.get(report.nodeid)
    if report.failed:
        _found[report.nodeid] = "failed"
    elif report.skipped and before != "failed":
        _found[report.nodeid] = "xfailed" if hasattr(report, "wasxfail") else "skipped"
    elif report.when == "call" and before is None:
        _found[report.nodeid] = "passed"


def pytest_runtest_logfinish(nodeid: str) -> None:
    _write(nodeid, _found.pop(nodeid, "not run"))


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _write(report.nodeid, "not collected")


def _write(test: str, outcome: str) -> None:
    with open(os.environ[FILE], "a") as file:
        file.write(json.dumps([test, outcome]) + "\n")
