"""Fixtures shared by the tests that train: process groups that live as long as the session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import Case, observe_state, train
from workers import Workers


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Workers]]:
    """``workers(n)``: the session's group of n gloo processes, started when first used."""
    groups: dict[int, Workers] = {}
    directory = tmp_path_factory.mktemp("workers")

    def group(world_size: int) -> Workers:
        return groups.setdefault(world_size, Workers(world_size, directory))

    yield group
    for started in groups.values():
        started.stop()


@pytest.fixture(scope="session")
def simulated_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Workers]]:
    """Like ``workers``, with the simulated accelerator."""
    groups: dict[int, Workers] = {}
    directory = tmp_path_factory.mktemp("simulated")

    def group(world_size: int) -> Workers:
        return groups.setdefault(world_size, Workers(world_size, directory, "sim"))

    yield group
    for started in groups.values():
        started.stop()


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
