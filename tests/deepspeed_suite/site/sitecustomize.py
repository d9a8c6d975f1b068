"""What Python runs at the start of every process of the suite: `deepspeed.initialize` goes through `agsel_suite_shim`.

It is ds_agsel's own way to reach the processes that a script starts (ds_agsel/entry/site), with another replacement for
`deepspeed.initialize`. DeepSpeed's `DistributedTest` starts its processes by forkserver or spawn; both run this.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))
_OURS = os.environ["DS_AGSEL_SUITE_SITE"]  # ds_agsel/entry/site/sitecustomize.py


def _replace_initialize(deepspeed: Any) -> None:
    stock = deepspeed.initialize

    @functools.wraps(stock)
    def initialize(*args: Any, **kwargs: Any) -> Any:
        import agsel_suite_shim

        return agsel_suite_shim.initialize(stock, *args, **kwargs)

    deepspeed.initialize = initialize


# Ours runs the next sitecustomize on the path, which must not be this one again.
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _HERE]
_spec = importlib.util.spec_from_file_location("ds_agsel_sitecustomize", _OURS)
if _spec is None or _spec.loader is None:
    raise ImportError(f"{_OURS} can't be loaded, so the suite would run without ds_agsel.")
_site = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_site)
if not hasattr(_site, "_replace_initialize"):
    raise ImportError(f"{_OURS} has no _replace_initialize, so the suite would run without ds_agsel.")
_site._replace_initialize = _replace_initialize  # looked up when deepspeed has been loaded
