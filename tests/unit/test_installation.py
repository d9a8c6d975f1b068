"""`install` replaces `deepspeed.initialize` and takes every trace of it back."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from typing import Any

import deepspeed
import pytest

import ds_agsel
from ds_agsel.entry import initialize as entry
from ds_agsel.entry import install as installation

STOCK = deepspeed.initialize
SECTION: dict[str, Any] = {"adagrad_select": {}, "optimizer": {"type": "AdamW"}}


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Who got each call: "stock" (DeepSpeed's own) or "ours"; no engine is made."""
    calls: list[str] = []

    def stock(args=None, model=None, optimizer=None, config=None, config_params=None, training_data=None):
        calls.append("stock")
        return None, None, None, None

    def ours(*args: Any) -> tuple[Any, Any, Any, Any]:
        calls.append("ours")
        return deepspeed.initialize(model="split")

    monkeypatch.setattr(deepspeed, "initialize", stock)
    monkeypatch.setattr(entry, "_initialize_selective", ours)
    yield calls
    ds_agsel.uninstall()


def test_calls_with_a_section_are_ours_and_others_are_not(received: list[str]) -> None:
    ds_agsel.install()
    deepspeed.initialize(config=SECTION)
    assert received == ["ours", "stock"]
    received.clear()
    deepspeed.initialize(config={"optimizer": {"type": "AdamW"}})
    deepspeed.initialize(config={**SECTION, "adagrad_select": {"enabled": False}})
    assert received == ["stock", "stock"]


def test_without_an_optimizer_the_engine_is_plain(received: list[str]) -> None:
    ds_agsel.install()
    deepspeed.initialize(config={"adagrad_select": {}, "zero_optimization": {"stage": 0}})  # TRL's reference model
    assert received == ["stock"]


def test_installing_twice_is_installing_once(received: list[str]) -> None:
    stock = deepspeed.initialize
    ds_agsel.install()
    wrapper = deepspeed.initialize
    ds_agsel.install()
    assert deepspeed.initialize is wrapper and wrapper is not stock
    assert inspect.signature(wrapper) == inspect.signature(stock)
    ds_agsel.uninstall()
    assert deepspeed.initialize is stock
    ds_agsel.uninstall()
    assert deepspeed.initialize is stock


def test_a_scope_ends_where_it_began(received: list[str]) -> None:
    stock = deepspeed.initialize
    with pytest.raises(RuntimeError, match="inside"), ds_agsel.installed():
        assert deepspeed.initialize is not stock
        raise RuntimeError("inside")
    assert deepspeed.initialize is stock
    ds_agsel.install()
    with ds_agsel.installed(), ds_agsel.installed():
        pass
    assert deepspeed.initialize is not stock
    with ds_agsel.installed():
        ds_agsel.uninstall()
        deepspeed.initialize(config=SECTION)
    assert received == ["ours", "stock"] and deepspeed.initialize is stock


def test_a_wrapper_put_over_ours_goes_on_working(received: list[str]) -> None:
    ds_agsel.install()
    ours = deepspeed.initialize
    seen = []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return ours(*args, **kwargs)

    deepspeed.initialize = theirs
    ds_agsel.initialize(config=SECTION)  # reaches theirs, ours and then DeepSpeed's, not ours again
    assert received == ["ours", "stock"] and len(seen) == 1
    ds_agsel.uninstall()
    received.clear()
    deepspeed.initialize(config=SECTION)
    assert received == ["stock"] and deepspeed.initialize is theirs


def test_threads_do_not_lose_or_double_it(received: list[str]) -> None:
    stock = deepspeed.initialize
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        for _ in range(200):
            with ds_agsel.installed():
                assert deepspeed.initialize is not stock

    threads = [threading.Thread(target=work) for _ in range(8)]
    failures: list[Any] = []
    hook, threading.excepthook = threading.excepthook, failures.append
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threading.excepthook = hook
    assert not failures and deepspeed.initialize is stock


@pytest.mark.parametrize("change", [ds_agsel.install, ds_agsel.uninstall, lambda: ds_agsel.installed().__enter__()])
def test_no_change_is_made_in_the_middle_of_another(received: list[str], change: Any) -> None:
    """The interpreter's own lock hides a missing one in the test above: here another thread holds ours."""
    thread = threading.Thread(target=change)
    with installation._installation.lock:
        thread.start()
        thread.join(timeout=0.2)
        assert thread.is_alive()
    thread.join(timeout=10)
    assert not thread.is_alive()
    installation._installation.open_scopes = 0
    ds_agsel.uninstall()


def test_calls_are_counted(received: list[str]) -> None:
    before = installation.calls()
    ds_agsel.install()
    deepspeed.initialize(config={})
    assert installation.calls()["plain"] == before["plain"] + 1


def test_the_stock_function_is_back_after_all_that() -> None:
    assert deepspeed.initialize is STOCK
