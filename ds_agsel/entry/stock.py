"""A switch by which the installed `deepspeed.initialize` acts as DeepSpeed's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_inside: ContextVar[bool] = ContextVar("ds_agsel_inside_initialize", default=False)


def is_meant() -> bool:
    """Return whether the caller is inside `stock_initialize`, in this thread."""
    return _inside.get()


@contextmanager
def stock_initialize() -> Iterator[None]:
    """Inside, the installed `deepspeed.initialize` is DeepSpeed's own, in this thread."""
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)
