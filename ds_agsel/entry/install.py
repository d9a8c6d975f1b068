"""`deepspeed.initialize` replaced by ours, for frameworks that look it up when they call it."""

from __future__ import annotations

import atexit
import functools
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed

from ds_agsel.entry import children
from ds_agsel.entry import stock as stock_call
from ds_agsel.entry.initialize import initialize as selective

logger = logging.getLogger("ds_agsel")


class _Installation:
    """The users of the wrapper, and the wrapper while there are any."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.wanted_by_install = False
        self.open_scopes = 0
        self.calls = {"selective": 0, "plain": 0}
        self._wrapper: Callable[..., Any] | None = None
        self._stock: Callable[..., Any] | None = None

    @property
    def is_wanted(self) -> bool:
        return self.wanted_by_install or self.open_scopes > 0

    def apply(self) -> None:
        """Put the wrapper in or take it out, as is wanted now. Under the lock."""
        if self.is_wanted and self._wrapper is None:
            self._stock = deepspeed.initialize
            self._wrapper = self._wrap(self._stock)
            deepspeed.initialize = self._wrapper
        elif not self.is_wanted and self._wrapper is not None:
            if (
                deepspeed.initialize is self._wrapper
            ):  # else another wrapper holds ours, which from now on passes all calls on
                deepspeed.initialize = self._stock
            self._wrapper = self._stock = None

    def _wrap(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def initialize(*args: Any, **kwargs: Any) -> Any:
            if stock_call.is_meant() or not self.is_wanted:
                return stock(*args, **kwargs)
            result = selective(*args, **kwargs)
            is_selective = hasattr(result[0], "selection")
            if is_selective:
                children.note_engaged()
            with self.lock:
                self.calls["selective" if is_selective else "plain"] += 1
            return result

        return initialize


_installation = _Installation()


def install() -> None:
    """Make every later call of `deepspeed.initialize` in this process honour the ``adagrad_select`` section.

    Calls whose ds_config has none, or a disabled one, go to DeepSpeed as they are. Idempotent and thread-safe. A name
    bound before (``from deepspeed import initialize``) is not reached: install first. A process that succeeds without
    any selection logs that, as a framework may never have called it.
    """
    with _installation.lock:
        if not _installation.wanted_by_install:
            atexit.register(_warn_if_nothing_was_selected)
        _installation.wanted_by_install = True
        _installation.apply()


def uninstall() -> None:
    """Undo `install`: `deepspeed.initialize` is DeepSpeed's own again, once no `installed` scope is open either."""
    with _installation.lock:
        atexit.unregister(_warn_if_nothing_was_selected)
        _installation.wanted_by_install = False
        _installation.apply()


@contextmanager
def installed() -> Iterator[None]:
    """`install` inside the ``with``, in all threads; an earlier `install` stands after it."""
    with _installation.lock:
        _installation.open_scopes += 1
        _installation.apply()
    try:
        yield
    finally:
        with _installation.lock:
            _installation.open_scopes -= 1
            _installation.apply()


def calls() -> dict[str, int]:
    """Return how many calls of the installed `deepspeed.initialize` gave a "selective" or a "plain" engine."""
    return dict(_installation.calls)


def _warn_if_nothing_was_selected() -> None:
    """Say at exit, on rank 0, why no engine selected, unless the script itself failed."""
    is_main = multiprocessing.parent_process() is None and os.environ.get("RANK", "0") == "0"
    if not is_main or getattr(sys, "last_value", None) is not None or _installation.calls["selective"]:
        return
    if children.has_engaged():
        return
    plain = _installation.calls["plain"]
    logger.warning(
        "ds_agsel is installed and nothing was selected: %s",
        f"of {plain} deepspeed.initialize call(s) none had an optimizer and an enabled adagrad_select section at the "
        "top level of its ds_config."
        if plain
        else "deepspeed.initialize was not called, so DeepSpeed was not used (Accelerator(cpu=True) turns it off, a "
        "Trainer needs TrainingArguments(deepspeed=...)), or its name was imported before ds_agsel.install().",
    )
