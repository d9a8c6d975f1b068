"""DeepSpeed's own reading of a ds_config."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping
from typing import Any

import hjson
import torch
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from ds_agsel.zero.compat.versions import until

if not until("0.18.5"):
    from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config as stock_load_ds_config


def load_ds_config(config: str | dict[str, Any]) -> dict[str, Any]:
    """Return the ds_config that DeepSpeed reads in ``config``: a dict, the path of a JSON file, or its text in base64.

    Until 0.18.5 that is code of `DeepSpeedConfig.__init__` (runtime/config.py:731), repeated here. Raises ValueError.
    """
    if not until("0.18.5"):
        return stock_load_ds_config(config)
    if isinstance(config, dict):
        return config
    if os.path.exists(config):
        with open(config) as file:
            return hjson.load(file, object_pairs_hook=dict_raise_error_on_duplicate_keys)
    try:
        return hjson.loads(base64.urlsafe_b64decode(config).decode("utf-8"))
    except (UnicodeDecodeError, AttributeError, ValueError) as error:
        raise ValueError(
            "Expected a string path to an existing deepspeed config, or a dictionary or a valid base64. "
            f"Received: {config}"
        ) from error


def ds_config_problems(ds_config: Mapping[str, Any]) -> list[str]:
    """Return the errors of DeepSpeed's own parser on ``ds_config``, which has no values "auto" and fits one rank.

    No process group is needed: without one the parser takes one rank (runtime/config.py, DeepSpeedConfig.__init__). It
    stops at its first complaint; a wrong section of a pydantic model gives a line for each of its settings.
    """
    try:
        parsed = DeepSpeedConfig(dict(ds_config))
    except ValidationError as error:
        return [
            f"{'.'.join(map(str, found['loc']))}={found['input']!r} is refused by DeepSpeed ({error.title}): "
            f"{found['msg']}. See this section in its documentation."
            for found in error.errors(include_url=False)
        ]
    except (
        Exception
    ) as error:  # AssertionError, ValueError, DeepSpeedConfigError, or any error that a value's type causes
        return [f"DeepSpeed refuses this ds_config: {str(error) or type(error).__name__}"]
    return list(_engine_problems(parsed))


def _engine_problems(parsed: DeepSpeedConfig) -> Iterator[str]:
    """Yield the problems that the parser accepts and the engine stops at."""
    name = parsed.scheduler_name
    if name is not None and not hasattr(lr_schedules, name) and not hasattr(torch.optim.lr_scheduler, name):
        yield (
            f"scheduler.type={name!r} is refused by DeepSpeed, which does not know it. Use one of "
            f"{', '.join(lr_schedules.VALID_LR_SCHEDULES)}, or a class of torch.optim.lr_scheduler."
        )
    if parsed.prescale_gradients and parsed.zero_config.reduce_scatter and parsed.zero_enabled:
        yield (
            "prescale_gradients=true with zero_optimization.reduce_scatter=true is refused by DeepSpeed. Set one of "
            "them to false."
        )


def zero_section_problems(section: Mapping[str, Any]) -> list[str]:
    """Return DeepSpeed's own errors for a ``zero_optimization`` section that has no values "auto"."""
    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        return [
            f"zero_optimization.{'.'.join(map(str, found['loc']))}={found['input']!r} is refused by DeepSpeed: "
            f"{found['msg']}. See the table of ZeRO settings in its documentation."
            for found in error.errors(include_url=False)
        ]
    return []
