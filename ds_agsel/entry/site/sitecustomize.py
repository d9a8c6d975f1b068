"""What Python runs at the start of every child of ``python -m ds_agsel.run`` (`ds_agsel.entry.children`).

The first call of `deepspeed.initialize` in the child installs ds_agsel. Until then nothing of ds_agsel or DeepSpeed is
imported. Another ``sitecustomize`` on the path still runs.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))


class _DeepSpeedFinder(importlib.abc.MetaPathFinder):
    """Finds deepspeed as it would be found, and puts `initialize` in its place once it has been loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "deepspeed":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_replace(module: ModuleType) -> None:
                load(module)
                _replace_initialize(module)

            spec.loader.exec_module = load_and_replace  # type: ignore[method-assign]
        return spec


def _replace_initialize(deepspeed: Any) -> None:
    stock = deepspeed.initialize

    @functools.wraps(stock)
    def initialize(*args: Any, **kwargs: Any) -> Any:
        import ds_agsel

        if deepspeed.initialize is initialize:
            deepspeed.initialize = stock
        ds_agsel.install()
        return deepspeed.initialize(*args, **kwargs)

    deepspeed.initialize = initialize


def _run_the_next_one() -> None:
    path = [entry for entry in sys.path if os.path.abspath(entry) != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, _DeepSpeedFinder())
_run_the_next_one()
