"""Fixtures shared by the tests that train: process groups that live as long as the session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import Case, observe_state, train
from workers import Workers

pytest_plugins = ["budget"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow what repeats at 1 rank a test that runs at 2: one case of each stage, offload and home of states stays.

    What goes wrong at one rank alone (no padding, no collectives) is the same for the cases of such a class.
    """
    at_two = {function(item) for item in items if ranks(item) == 2}
    seen = set()
    for item in items:
        if ranks(item) == 1 and function(item) in at_two and not item.get_closest_marker("slow"):
            kind = (function(item), *class_of(parameters(item)))
            if kind in seen:
                item.add_marker(pytest.mark.slow)
            seen.add(kind)


def function(item: pytest.Item) -> Any:
    return getattr(item, "function", None)


def ranks(item: pytest.Item) -> int | None:
    found = parameters(item)
    return found.get("ranks", found.get("world_size"))


def parameters(item: pytest.Item) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    return dict(callspec.params) if callspec else {}


def class_of(parameters: dict[str, Any]) -> tuple[Any, ...]:
    """Stage, offload and whether states visit, from a case or from parameters of those names."""
    case = parameters.get("case")
    if not isinstance(case, Case):
        return parameters.get("stage"), parameters.get("offload"), None
    return case.stage, case.offload, (case.section or {}).get("step_device")


def groups(directory: Path, accelerator: str = "cpu") -> Iterator[Callable[[int], Workers]]:
    """A fixture's body: one group of each size, started when first used and stopped at the end."""
    started: dict[int, Workers] = {}

    def group(world_size: int) -> Workers:
        return started.setdefault(world_size, Workers(world_size, directory, accelerator))

    yield group
    for each in started.values():
        each.stop()


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Workers]]:
    """``workers(n)``: the session's group of n gloo processes."""
    yield from groups(tmp_path_factory.mktemp("workers"))


@pytest.fixture(scope="session")
def other_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Workers]]:
    """Like ``workers``, in processes that know nothing of what those have done: to resume in."""
    yield from groups(tmp_path_factory.mktemp("others"))


@pytest.fixture(scope="session")
def simulated_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Workers]]:
    """Like ``workers``, with the simulated accelerator."""
    yield from groups(tmp_path_factory.mktemp("simulated"), "sim")


@pytest.fixture
def fresh_workers(workers: Callable[[int], Workers]) -> Iterator[Callable[[int], Workers]]:
    """Like ``workers``, for what leaves a mark on a process (DeepSpeed's autocast state): new before and after."""
    used: list[Workers] = []

    def group(world_size: int) -> Workers:
        started = workers(world_size)
        if started not in used:
            started.stop()
            used.append(started)
        return started

    yield group
    for started in used:
        started.stop()


@pytest.fixture(scope="session")
def trained(workers: Callable[[int], Workers]) -> Callable[[Case, int], list[dict[str, Any]]]:
    """``trained(case, n)``: that run on each of n ranks, observed by `observe_state`; made once a session."""
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}

    def run(case: Case, world_size: int) -> list[dict[str, Any]]:
        key = (repr(case), world_size)
        if key not in runs:
            runs[key] = workers(world_size).run(train, case, observe_state)
        return runs[key]

    return run
