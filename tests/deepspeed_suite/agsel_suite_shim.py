"""`deepspeed.initialize` of the suite: eligible calls get an ``adagrad_select`` section and go through ds_agsel.

Eligible is a call with a model, a ds_config as a dict without a section of its own, ZeRO stage 1 to 3, and Adam or
AdamW. What ds_agsel refuses by ConfigError stays plain. Each call, on each rank, leaves a line in
``DS_AGSEL_SUITE_COUNTS``.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

COUNTS = "DS_AGSEL_SUITE_COUNTS"  # a folder; a file for each process
SECTION_JSON = "DS_AGSEL_SUITE_SECTION"  # the section that is added, as JSON
ADAMS = {"adam", "adamw", "fusedadam", "deepspeedcpuadam"}


def initialize(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what ds_agsel makes of an eligible call, and what ``stock``, DeepSpeed's own, makes of any other."""
    import ds_agsel
    from ds_agsel.entry import stock as stock_call
    from ds_agsel.errors import ConfigError

    if stock_call.is_meant():  # ds_agsel's own call of DeepSpeed
        return stock(*args, **kwargs)
    arguments = inspect.signature(stock).bind(*args, **kwargs).arguments
    if not is_eligible(arguments):
        count("plain")
        return stock(*args, **kwargs)
    name = "config" if arguments.get("config") is not None else "config_params"
    added = {**arguments, name: {**arguments[name], "adagrad_select": json.loads(os.environ[SECTION_JSON])}}
    try:
        result = ds_agsel.initialize(**added)
    except ConfigError as error:
        count("refused", str(error))
        return stock(*args, **kwargs)
    count("engaged" if hasattr(result[0], "selection") else "plain")
    return result


def is_eligible(arguments: Mapping[str, Any]) -> bool:
    """Return whether a call with ``arguments`` gets a section."""
    from ds_agsel.config import find_section
    from ds_agsel.ds_config import DsConfig

    raw = arguments.get("config")
    raw = arguments.get("config_params") if raw is None else raw
    if arguments.get("model") is None or not isinstance(raw, dict) or find_section(raw) is not None:
        return False
    ds_config = DsConfig.of(raw)
    optimizer = arguments.get("optimizer")
    kind = ds_config.optimizer_type if optimizer is None else type(optimizer).__name__
    return ds_config.stage in (1, 2, 3) and str(kind).lower() in ADAMS


def count(kind: str, why: str = "") -> None:
    """Leave a line for this call: "engaged", "plain" or "refused"."""
    with (Path(os.environ[COUNTS]) / f"{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps({"kind": kind, "why": why}) + "\n")
